"""How a fit grows with the number of models, of values, and of directions: one of them varied at a time.

python -m bench --only growth
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from bench import child
from bench.collection import make
from bench.sizes import GrowthPlan
from bench.suite import Record, measure, tell


def run_growth(plan: GrowthPlan, threads: int, home: Path, repeats: int, limits: child.Limits) -> list[Record]:
    """Time `eigenzoo` (view factors, files in memory) at every point of the plan."""
    usual = {"models": plan.models[-1], "layers": plan.layers[-1], "rank": plan.recipe.planted}
    rows: list[Record] = []
    known: dict[tuple[int, ...], Record] = {}
    for varied, choices in (("models", plan.models), ("layers", plan.layers), ("rank", plan.ranks)):
        for choice in choices:
            point = {**usual, varied: choice}
            place = tuple(point.values())
            if place not in known:
                tell(f"growth, threads {threads}: {point}")
                # Adapters with fewer layers, and not fewer layers of the same: what a zoo leaves out has to be kept too.
                recipe = replace(plan.recipe, num_layers=point["layers"])
                collection = make(recipe, point["models"], home, tell)
                found = measure(
                    collection, "eigenzoo", point["rank"], threads, repeats=repeats, limits=limits, compared=False
                )
                if "failed" in found:
                    raise RuntimeError(f"growth at {point}: {found['failed']}\n{found.get('stderr', '')}")
                values = collection.num_bytes // (4 * collection.num_models)
                known[place] = {"threads": threads, **point, "values": values, **found}
            rows.append({"varied": varied, **known[place]})
    return rows
