"""Merging adapters: eigenzoo from files to a file, against PEFT's combination type `svd` on adapters that are loaded.

    python -m bench.merging                    # 20 adapters of rank 16 in Mistral-7B's shapes (q, k, v of 8 layers): some minutes
    python -m bench.merging --write            # … and the table of README.md beside this file

All in one process, one after the other. PEFT forms each update as a dense matrix, adds, and takes an SVD. It merges one layer
of each kind, and its time is multiplied by the number of layers. Errors are ‖M − M̂‖ / ‖M‖ of these layers, against
the exact sum M, by QR decompositions of all factors in float64.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import nn

import eigenzoo as ez
from bench import machine
from bench.collection import AdapterRecipe, make
from bench.pages import markdown, with_tables
from bench.tables import machine_line, number

PAGE = Path(__file__).parent / "README.md"
PREFIX = "base_model.model."
FILE = "adapter_model.safetensors"
SUM = "task_arithmetic"

Factors = tuple[NDArray[np.float64], NDArray[np.float64]]


def measure(num_models: int, recipe: AdapterRecipe, home: Path) -> list[tuple[str, ...]]:
    """Return the rows of the table."""
    paths = make(recipe, num_models, home, lambda text: print(text, file=sys.stderr)).paths
    weights = [1.0 if place % 3 else -0.5 for place in range(num_models)]
    first = [module for module in recipe.modules if ".0." in module]
    exact = {module: stacked(paths, weights, module, recipe.scale) for module in first}
    seconds, merged = by_peft(paths, weights, recipe, first)
    slow = seconds * recipe.num_layers
    rows = [
        (
            f"PEFT, svd, rank {recipe.rank}",
            f"≈ {number(slow)}",
            error(exact, merged),
            "1.00×",
            "one layer of each kind, scaled",
        )
    ]
    for title, method, rank in (
        (f"eigenzoo, task arithmetic, rank {recipe.rank}", SUM, recipe.rank),
        ("eigenzoo, task arithmetic, full rank", SUM, "full"),
        (f"eigenzoo, TSV, rank {recipe.rank}", "tsv", recipe.rank),
        ("eigenzoo, TSV, full rank", "tsv", "full"),
    ):
        with tempfile.TemporaryDirectory(dir=home) as name:
            started = time.perf_counter()
            result = ez.merge(paths, method, weights=weights, rank=rank)
            result.save(Path(name) / "merged")
            seconds = time.perf_counter() - started
            loss = f"{result.certificate.loss.frobenius:.1e}"
            if method == SUM:
                loss = error(exact, {module: factors(Path(name) / "merged", module, 1.0) for module in first})
        remark = "" if method == SUM else "against TSV of full rank"
        rows.append((title, number(seconds), loss, f"{slow / seconds:.0f}×", remark))
    return rows


def factors(folder: Path, module: str, scale: float) -> Factors:
    tensors = load_file(folder / FILE)
    b, a = (tensors[f"{PREFIX}{module}.lora_{side}.weight"].double().numpy() for side in "BA")
    return b * scale, a


def stacked(paths: Sequence[Path], weights: Sequence[float], module: str, scale: float) -> Factors:
    """The exact sum as two long factors."""
    found = [factors(path, module, scale * weight) for path, weight in zip(paths, weights, strict=True)]
    return np.concatenate([b for b, _ in found], 1), np.concatenate([a for _, a in found], 0)


def error(exact: Mapping[str, Factors], merged: Mapping[str, Factors]) -> str:
    lost = total = 0.0
    for module, (b, a) in merged.items():
        whole_b, whole_a = exact[module]
        lost += squared_norm(np.concatenate([whole_b, -b], 1), np.concatenate([whole_a, a], 0))
        total += squared_norm(whole_b, whole_a)
    return f"{(lost / total) ** 0.5:.6f}" if lost > 1e-8 * total else f"{(lost / total) ** 0.5:.1e}"


def squared_norm(b: NDArray[np.float64], a: NDArray[np.float64]) -> float:
    core = np.linalg.qr(b, mode="r") @ np.linalg.qr(a.T, mode="r").T
    return float(np.square(core).sum())


def by_peft(
    paths: Sequence[Path], weights: Sequence[float], recipe: AdapterRecipe, modules: Sequence[str]
) -> tuple[float, dict[str, Factors]]:
    """Merge these modules by PEFT. Loading is not counted."""
    from peft import LoraConfig, PeftModel

    base = nn.Module()
    for module in modules:
        *above, name = module.split(".")
        place = base
        for part in above:
            if not hasattr(place, part):
                place.add_module(part, nn.Module())
            place = getattr(place, part)
        outputs, inputs = recipe.modules[module]
        place.add_module(name, nn.Linear(inputs, outputs, bias=False))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the other layers' factors, which find no module
        config = LoraConfig.from_pretrained(str(paths[0]))
        config.task_type = None  # of language models, which this is not
        model = PeftModel.from_pretrained(base, str(paths[0]), adapter_name="m0", config=config)
        for place_, path in enumerate(paths[1:], 1):
            model.load_adapter(str(path), f"m{place_}")
        names = [f"m{place_}" for place_ in range(len(paths))]
        started = time.perf_counter()
        model.add_weighted_adapter(names, list(weights), "merged", "svd", svd_rank=recipe.rank, svd_full_matrices=False)
        seconds = time.perf_counter() - started
    found = {}
    for module in modules:
        layer = model.get_submodule(f"{PREFIX}{module}")
        b, a = (getattr(layer, f"lora_{side}")["merged"].weight.detach().double().numpy() for side in "BA")
        found[module] = b * layer.scaling["merged"], a
    return seconds, found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("collections"))
    parser.add_argument("--models", type=int, default=20)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args(arguments)
    machine.pin(asked.threads)
    torch.set_num_threads(asked.threads)
    about = machine.describe()
    recipe = AdapterRecipe(num_layers=asked.layers, hidden=asked.hidden, kv=asked.hidden // 4)
    rows = measure(asked.models, recipe, asked.folder)
    title = f"**{asked.models} adapters of rank {recipe.rank}, q, k and v of {recipe.num_layers} layers, width {recipe.hidden}**"
    lines = [
        "",
        title,
        "",
        *markdown(("merge", "wall s", "error", "× PEFT", "remark"), rows),
        "",
        f"{machine_line(about)}.",
        "",
    ]
    print("\n".join(lines))
    print(json.dumps({"rows": rows}), file=sys.stderr)
    if asked.write:
        PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8"), {"merging": lines}, PAGE), encoding="utf-8")


if __name__ == "__main__":
    main()
