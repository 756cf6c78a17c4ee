"""`eigenzoo evidence ZOO|BUNDLE`: run all controls and give a verdict."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from eigenzoo.cli import options
from eigenzoo.cli.console import print_json, print_table, progress_bar, say
from eigenzoo.display import counted, in_percent

if TYPE_CHECKING:
    from collections.abc import Sequence

    from eigenzoo import Evidence
    from eigenzoo.evidence.layer_evidence import LayerEvidence
    from eigenzoo.subspace.fitting.heldout_sides import SideShares

Axes = Annotated[
    str | None,
    typer.Option(help="Also compute spectra of these axes, comma-separated: outputs, inputs.", show_default=False),
]


Rank = Annotated[
    str | None,
    typer.Option(
        help="Rank for the controls universality and secondary: a number, a share of the variance such as 0.95, or auto. "
        "Default: auto.",
        show_default=False,
    ),
]

Suitability = Annotated[
    bool,
    typer.Option(
        "--suitability",
        help="Also compute the authors' alpha score of full weights, with an SVD of every model's layers. For LoRA updates "
        "it is always computed.",
    ),
]


def command(
    zoo: options.ZooOrBundleArgument,
    opening: options.Opening,
    running: options.Running,
    axes: Axes = None,
    rank: Rank = None,
    center: options.Center = "models",
    suitability: Suitability = False,
    seed: options.Seed = 0,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Test for a shared subspace, beyond chance, the mean and a common origin, and give a verdict."""
    import eigenzoo as ez

    rank_rule = options.parse_rule(rank)
    with (
        progress_bar(quiet=quiet or json) as progress,
        running.workers() as workers,
    ):
        source = opening.zoo_or_bundle(zoo, progress)
        sides = options.parse_axes(axes) or ()
        evidence = ez.evidence(
            source,
            axes=sides,
            rank=rank_rule,
            center=center,
            seed=seed,
            suitability=suitability,
            workers=workers,
            cache=running.cache,
            progress=progress,
        )
    if json:
        print_json(evidence.to_dict())
    else:
        render(evidence)


PLAN = "A shared subspace need not save bytes: run `eigenzoo plan` to compare sizes."
NEXT = {
    "no-shared-structure": "A subspace of these models is of no use for new ones. "
    "`eigenzoo plan` compares what bundles, and cuts of each model alone, save and lose."
}
"""The next step, by verdict."""


def render(evidence: Evidence, most: int = 40) -> None:
    """Print the verdict, the controls, and the layers by role."""
    from eigenzoo.evidence.controls import controls

    say(f"verdict: {evidence.verdict.code}", style="bold")
    say(evidence.verdict.text)
    say(
        f"\n{counted(len(evidence.names), 'model')}, {counted(len(evidence.layers), 'layer')}, view {evidence.view}, "
        f"center {evidence.center}"
    )
    for control in controls(evidence):
        say(f"{control.name:>12}  {control.sentence}", hang=14)
    say("")
    _render_roles(evidence, most)
    _render_axes(evidence, most)
    _render_sides(evidence)
    for group in evidence.lineage.groups[:5]:
        say(f"common origin: {', '.join(group[:6])}{f', … ({len(group)} models)' if len(group) > 6 else ''}")
    for first, other in evidence.lineage.duplicates[:5]:
        say(f"copies: {first} and {other}")
    if len(evidence.lineage.duplicates) > 5:
        say(f"… and {counted(len(evidence.lineage.duplicates) - 5, 'more pair')} of copies")
    for warning in evidence.warnings:
        say(f"warning: {warning}")


def _render_axes(evidence: Evidence, most: int) -> None:
    rows = [
        (
            name,
            axis,
            side.center,
            len(side.null),
            *(in_percent(sum(values[:16])) for values in (side.explained_variance_ratio, side.null)),
            in_percent(_up_to(side.heldout, 16)),
        )
        for name, sides in evidence.axes.items()
        for axis, side in sides.items()
    ]
    if rows:
        columns = ("layer", "axis", "center", "size", "energy in the top 16", "… chance", "variance held out")
        print_table(
            "sides of the layers" + (f", the first {most}" if len(rows) > most else ""), columns, rows[:most], left=3
        )


def _up_to(shares: SideShares | None, rank: int) -> float | None:
    """Return the share of held-out models that sides keep at the largest measured rank up to this one."""
    return None if shares is None else shares.at("captured", rank)


def _render_sides(evidence: Evidence) -> None:
    """Print what sides keep of held-out models at each rank, beside axis models."""
    if not evidence.sides:
        return
    ranks = sorted({rank for shares in evidence.sides.values() for rank in shares.rank})
    names = {"outputs": "outputs", "inputs": "inputs", "outputs,inputs": "both"}
    cells = {rank: [in_percent(_up_to(shares, rank)) for shares in evidence.sides.values()] for rank in ranks}
    print_table(
        "sides, models held out",
        ("rank", *(names[axes] for axes in evidence.sides), "axis models"),
        [(rank, *cells[rank], in_percent(_models_share(evidence, rank))) for rank in ranks],
    )
    say(
        "All columns: share of the variance about the mean of models left out of the fit, layers weighted by their variance."
    )


def _models_share(evidence: Evidence, rank: int) -> float | None:
    """The same of axis models; None beyond the ranks that the folds span."""
    layers = [layer for layer in evidence.layers.values() if layer.variance > 0 and layer.unseen is not None]
    known = [
        (layer.unseen, layer.variance) for layer in layers if layer.unseen is not None and rank in layer.unseen.rank
    ]
    if not known or len(known) < len(layers):
        return None
    total = sum(weight for _, weight in known)
    return sum(unseen.captured[unseen.rank.index(rank)] * weight for unseen, weight in known) / total


def _render_roles(evidence: Evidence, most: int) -> None:
    from eigenzoo.weights.roles import role

    groups: dict[str, list[LayerEvidence]] = {}
    for name, layer in evidence.layers.items():
        groups.setdefault(role(name), []).append(layer)
    largest = sorted(groups, key=lambda name: -sum(layer.layer.num_values for layer in groups[name]))[:most]
    print_table(
        "by role" if len(largest) == len(groups) else f"the {len(largest)} largest of {len(groups)} roles",
        ("role", "layers", "verdict", "mean's energy", "beyond chance", "k", "variance kept", "… held out", "… chance"),
        [(name, len(groups[name]), *_role_cells(groups[name])) for name in largest],
        left=1,
    )
    say(
        "mean's energy: share of all energy in the mean. beyond chance: number of directions above the norm-matched null. "
        "variance kept: share of the variance about the mean in the top k directions, in-sample; held out: for models left out of "
        "the fit; chance: for unrelated models with the same norms. Values are averages over layers with variance. Geometry is not "
        f"function: run `eigenzoo evaluate` to measure what models can do. {NEXT.get(evidence.verdict.code, PLAN)}"
    )


def _role_cells(layers: Sequence[LayerEvidence]) -> tuple[object, ...]:
    codes = sorted({layer.code for layer in layers})
    varying = [layer for layer in layers if layer.variance > 0]
    verdicts = ", ".join(
        f"{code} {sum(layer.code == code for layer in layers)}" if len(codes) > 1 else code for code in codes
    )
    unseen_layers = [layer.unseen for layer in varying if layer.unseen is not None]
    if not varying or not unseen_layers:
        return verdicts, "–", "–", "–", "–", "–", "–"
    shared = sorted(set.intersection(*(set(unseen.rank) for unseen in unseen_layers)))
    rank = max((number for number in shared if number <= 16), default=shared[0] if shared else 0)
    autos = sorted({layer.chance.auto for layer in varying})

    def mean(part: str) -> float:
        return float(
            sum(getattr(unseen, part)[unseen.rank.index(rank)] for unseen in unseen_layers) / len(unseen_layers)
        )

    return (
        verdicts,
        in_percent(sum(layer.mean.share for layer in varying) / len(varying)),
        str(autos[0]) if len(autos) == 1 else f"{autos[0]}–{autos[-1]}",
        rank,
        *(in_percent(mean(part)) for part in ("in_sample", "captured", "null")),
    )
