"""Describe the controls of a whole zoo in sentences: question, result, the value of chance or of the control, and uncertainty."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from eigenzoo.display import counted, in_percent
from eigenzoo.evidence.alpha_score import AlphaScore
from eigenzoo.evidence.layer_evidence import LayerEvidence
from eigenzoo.evidence.record import EvidenceRecord
from eigenzoo.evidence.summary import groups_of, shown_index, shown_indices
from eigenzoo.evidence.unseen import num_folds
from eigenzoo.evidence.verdict import lead, p_text
from eigenzoo.linalg.heldout import NUM_FOLDS


@dataclass(frozen=True)
class Control:
    """One control: question, statistic and its value, control and its value, uncertainty, and a sentence of them."""

    name: str
    question: str
    statistic: str
    value: float | None
    control: str
    control_value: float | None
    uncertainty: str
    sentence: str


def controls(record: EvidenceRecord) -> list[Control]:
    """Describe each control of a zoo. Figures are averages over layers weighted by number of values, unless stated otherwise."""
    varying = [layer for layer in record.layers.values() if layer.variance > 0]
    if not varying:
        return []
    return [
        control
        for control in (
            _chance(varying),
            _mean(record),
            _unseen(record),
            _universality(varying),
            _growth(record),
            _lineage(record),
            _secondary(record, varying),
            _suitability(record),
        )
        if control is not None
    ]


def _average(layers: Sequence[LayerEvidence], values: Sequence[float]) -> float:
    weights = [layer.layer.num_values for layer in layers]
    return sum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)


def _ranks(ranks: Sequence[int]) -> str:
    """Write the ranks of all layers.

    >>> _ranks([4, 4]), _ranks([4, 1, 2])
    ('4', '1 to 4')
    """
    return f"{min(ranks)}" if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}"


def _chance(layers: Sequence[LayerEvidence]) -> Control:
    top = _average(layers, [layer.chance.explained_variance_ratio[0] for layer in layers])
    null, iid = (
        _average(layers, [getattr(layer.chance, kind)[0] for layer in layers]) for kind in ("norm_matched", "iid")
    )
    ranks = [layer.chance.auto for layer in layers]
    above = f"{_ranks(ranks)} direction{'s exceed' if max(ranks) != 1 else ' exceeds'} the null in each layer"
    average = f" ({fmean(ranks):.1f} on average over {len(layers)} layers)" if min(ranks) < max(ranks) else ""
    fooled = (
        f" (a null with equal norms, which uneven norms mislead, gives {in_percent(iid)})" if null > 1.2 * iid else ""
    )
    return Control(
        "chance",
        "Is the spectrum steeper than that of unrelated models?",
        "share of the variance in the first direction",
        top,
        "unrelated models with the same norms",
        null,
        "parallel analysis against the 95th percentile of the null's draws",
        f"The first direction explains {in_percent(top)} of the variance. Unrelated models with the same norms give "
        f"{in_percent(null)}{fooled}. {above}{average}.",
    )


def _mean(record: EvidenceRecord) -> Control:
    summary = record.summary
    return Control(
        "mean",
        "How much do all models have in common?",
        "share of a held-out model's energy that the others' mean removes",
        summary.mean_heldout,
        "the mean of unrelated models",
        summary.mean_null,
        f"{min(NUM_FOLDS, len(record.names))} folds",
        f"The mean of the others removes {in_percent(summary.mean_heldout)} of a held-out model's energy (in-sample "
        f"{in_percent(summary.mean_energy)}). The mean of unrelated models would remove {in_percent(summary.mean_null)}.",
    )


def _unseen(record: EvidenceRecord) -> Control | None:
    pooled, test, measures = record.summary.dealt, record.summary.directions, record.summary.measures
    index = shown_index(pooled)
    if index is None:
        return None
    captured, null = pooled.captured[index], pooled.null[index]
    leading = "" if measures is None else f" {lead(measures)}"
    return Control(
        "unseen",
        "Do directions found on some models explain the others?",
        f"share of held-out models' variance in the top {pooled.rank[index]} directions of each layer",
        captured,
        "unrelated models with the same norms",
        null,
        f"{num_folds(len(record.names))} folds; p {p_text(test.p_value)} at {counted(test.rank, 'direction')}, all layers together",
        f"The top {pooled.rank[index]} directions explain {in_percent(pooled.in_sample[index])} of the fitted models' variance and "
        f"{in_percent(captured)} of held-out models'. Chance gives {in_percent(null)}.{leading} In-sample, {len(record.names) - 1} "
        f"directions always explain all {len(record.names)} models.",
    )


def _universality(layers: Sequence[LayerEvidence]) -> Control | None:
    known = [(layer, layer.halves) for layer in layers if layer.halves is not None]
    if not known:
        return None
    which = [layer for layer, _ in known]
    first = _average(which, [half.cosines[0] for _, half in known])
    null = _average(which, [half.null_cosines[0] for _, half in known])
    whole = _average(which, [fmean(half.cosines) for _, half in known])
    splits = known[0][1].num_splits
    return Control(
        "universality",
        "Do disjoint halves of the zoo give the same subspace?",
        "cosine of the smallest principal angle between the halves' subspaces",
        first,
        "unrelated subspaces of the same rank",
        null,
        f"{splits} random splits",
        f"Subspaces of rank {_ranks([half.rank for _, half in known])} from disjoint halves "
        f"agree with a cosine of {first:.2f} in their nearest direction and {whole:.2f} on average "
        f"over directions. Unrelated subspaces of the same rank reach {null:.2f}.",
    )


def _growth(record: EvidenceRecord) -> Control | None:
    grown = record.growth
    if grown is None:
        return None
    few, many = grown.num_models[0], grown.num_models[-1]
    return Control(
        "growth",
        "Does the dimension saturate as models are added?",
        f"directions for 90 % of the variance of {many} models",
        grown.var90_rank[-1],
        f"the same for {few} models",
        grown.var90_rank[0],
        f"{grown.num_draws} random orders; standard deviation of the held-out share {in_percent(grown.spread[-1])}",
        f"From {few} to {many} models, the directions needed for 90 % of the variance change from {grown.var90_rank[0]:.1f} to "
        f"{grown.var90_rank[-1]:.1f}. The share of a fixed held-out set that up to {grown.rank} directions explain changes from "
        f"{in_percent(grown.captured[0])} to {in_percent(grown.captured[-1])} (chance {in_percent(grown.null[-1])}).",
    )


def _lineage(record: EvidenceRecord) -> Control:
    origin, across = record.lineage, record.summary.across
    grouped = sum(map(len, origin.groups))
    value = control = None
    held = ""
    indices = shown_indices(record.summary.contrasts, across)
    if across is not None and indices is not None:
        index = indices[1]
        value, control = record.summary.contrasts.captured[indices[0]], across.captured[index]
        held = (
            f" The top {across.rank[index]} directions explain {in_percent(value)} of the variance of models held out at random "
            f"and {in_percent(control)} of the variance of whole lineages held out (chance {in_percent(across.null[index])})."
        )
    elif len(origin.groups) == 1 and grouped == len(record.names):
        held = " All models have one origin, so no lineage can be held out."
    groups = "No groups with a common origin"
    if origin.groups:
        count = groups_of(len(origin.groups))
        groups = f"{count} with a common origin: {grouped} of {len(record.names)} models, {len(origin.groups[0])} in the largest"
    copies = f" {len(origin.duplicates)} models are copies of another." if origin.duplicates else ""
    return Control(
        "lineage",
        "Do models share more than a common initialisation or parent?",
        "share of held-out models' variance in the top directions, models held out at random",
        value,
        "whole lineages held out",
        control,
        f"cosines of {origin.measure}, average linkage",
        f"{groups}, by cosines of {origin.measure}.{copies}{held}",
    )


def _secondary(record: EvidenceRecord, layers: Sequence[LayerEvidence]) -> Control | None:
    known = [(layer, layer.secondary) for layer in layers if layer.secondary is not None]
    if not known:
        return None
    which = [layer for layer, _ in known]
    captured, null, inside = (
        _average(which, [getattr(second, part) for _, second in known]) for part in ("captured", "null", "in_sample")
    )
    return Control(
        "secondary",
        "Is anything shared outside the top directions?",
        "share of held-out models' variance in the next directions after the kept ones",
        captured,
        "unrelated models with the same norms",
        null,
        f"{num_folds(len(record.names))} folds",
        f"The next directions, after the top {_ranks([second.rank for _, second in known])}, explain "
        f"{in_percent(inside)} of the fitted models' variance and "
        f"{in_percent(captured)} of held-out models'. Chance gives {in_percent(null)}.",
    )


def _suitability(record: EvidenceRecord) -> Control | None:
    known = [layer for layer in record.layers.values() if layer.suitability.exponents]
    if not known and not measured_scores(record):
        return None
    limits = record.thresholds
    suited = sum(layer.suitability.is_suited(limits) for layer in known)
    own = "There are too few models to fit exponents to halves of the zoo."
    if known:
        middle = fmean(layer.suitability.mean or 0.0 for layer in known)
        own = (
            f"{suited} of {len(known)} layers have exponents from {limits.low:g} to {limits.high:g} that agree between halves to "
            f"{limits.spread:g}. The mean exponent is {middle:.2f}."
        )
    return Control(
        "suitability",
        "Do the spectra follow power laws, as those of trained layers do?",
        "share of layers whose exponents are in range and agree",
        suited / len(known) if known else None,
        f"exponents from {limits.low:g} to {limits.high:g}",
        None,
        "random halves of the zoo",
        f"{own} {_alpha_score(record)}",
    )


def measured_scores(record: EvidenceRecord) -> dict[str, AlphaScore]:
    """Return the authors' score of the layers with models' own spectra that are long enough to fit."""
    scores = {name: layer.alpha_score for name, layer in record.layers.items()}
    return {name: score for name, score in scores.items() if score is not None and score.fitted}


def _alpha_score(record: EvidenceRecord) -> str:
    scores = measured_scores(record)
    if all(layer.alpha_score is None for layer in record.layers.values()):
        return "The authors' alpha score of every model's own spectrum was not measured (option --suitability)."
    if not scores:
        return "The authors' alpha score needs longer spectra than these models have."
    retained = sum(score.is_retained for score in scores.values())
    return (
        f"The authors' alpha score of every model's own spectrum retains {retained} of {len(scores)} layers. The mean exponent is "
        f"{fmean(score.mean or 0.0 for score in scores.values()):.2f}, the mean q "
        f"{fmean(score.q for score in scores.values()):.2f}."
    )
