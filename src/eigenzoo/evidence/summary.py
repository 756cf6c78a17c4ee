"""Pool all layers' figures, and write the verdict in one sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from eigenzoo.display import counted, in_percent
from eigenzoo.evidence import verdict as rule
from eigenzoo.evidence.layer_evidence import LayerEvidence
from eigenzoo.evidence.lineage import Lineage
from eigenzoo.evidence.unseen import MIN_MODELS, TESTED_RANK, Capture
from eigenzoo.evidence.verdict import why_gone, why_mean, why_not_shared, why_shared

SMALLEST = 1e-300
"""Replaces zero energy in a denominator, because held-out models that are copies of each other have no contrast."""


@dataclass(frozen=True)
class Pooled:
    """Shares of the variance, averaged over layers by their number of values.

    Attributes:
        rank: number of directions per layer.
        in_sample, captured, null: shares of the variance of fitted, held-out and unrelated models.
    """

    rank: tuple[int, ...]
    in_sample: tuple[float, ...]
    captured: tuple[float, ...]
    null: tuple[float, ...]


@dataclass(frozen=True)
class Group:
    """The held-out controls inside one group of common origin, over all layers.

    Attributes:
        pooled: shares of the variance about the group's own mean.
        mean: mean inner product of two of its models divided by a model's energy.
        code: the verdict on the group as a zoo.
    """

    pooled: Pooled
    mean: float
    code: str


@dataclass(frozen=True)
class Summary:
    """All layers together.

    Attributes:
        energy, variance: Σ over layers.
        mean_energy: share of a layer's energy in the mean, in-sample; mean_heldout: share of a held-out model's energy that the
            others' mean removes; mean_null: the same for unrelated models. These and all below are averages over layers with
            variance.
        mean_common, mean_across: inner product of two models over a model's energy, for all models and across lineages.
        dealt: held-out models; contrasts: the same seen from their own mean; across: held-out lineages, likewise, where there
            are several; within: inside each large group.
        directions, across_directions: the test on all layers together; measures, across_measures: the figures that decide it.
    """

    energy: float
    variance: float
    mean_energy: float
    mean_heldout: float
    mean_null: float
    dealt: Pooled
    contrasts: Pooled
    across: Pooled | None
    within: tuple[Group, ...]
    directions: rule.Directions
    across_directions: rule.Directions | None
    mean_across: float | None
    mean_common: float
    measures: rule.Measures | None
    across_measures: rule.Measures | None


@dataclass(frozen=True)
class Verdict:
    """The verdict on a zoo.

    Attributes:
        code: `no-shared-structure`, `shared-mean`, `shared-lineage` or `shared-subspace`.
        text: the verdict as a sentence with figures.
        decided_by: the control that decided.
        layers: number of layers by code, including `no-variance`.
        values: share of the values of all layers with variance that lie in layers of each code.
    """

    code: str
    text: str
    decided_by: str
    layers: dict[str, int]
    values: dict[str, float]


def summarize(layers: Sequence[LayerEvidence]) -> Summary:
    """Average over layers weighted by their number of values, so that a bias has a small weight for any energy."""
    varying = [layer for layer in layers if layer.variance > 0]

    def average(shares: Sequence[float]) -> float:
        weights = [layer.layer.num_values for layer in varying]
        return (
            sum(share * weight for share, weight in zip(shares, weights, strict=True)) / sum(weights)
            if varying
            else 0.0
        )

    dealt = [layer.weighed for layer in varying if layer.weighed is not None]
    across = [layer.across_weighed for layer in varying if layer.across_weighed is not None]
    groups = len(varying[0].within) if varying else 0
    return Summary(
        energy=sum(layer.energy for layer in layers),
        variance=sum(layer.variance for layer in layers),
        mean_energy=average([layer.mean.share for layer in varying]),
        mean_heldout=average([layer.mean.heldout for layer in varying]),
        mean_null=average([layer.mean.null for layer in varying]),
        dealt=pool(dealt),
        contrasts=pool(dealt, contrasts=True),
        across=pool(across, contrasts=True) if across else None,
        within=tuple(_group(varying, index) for index in range(groups)),
        directions=rule.directions(dealt),
        across_directions=rule.directions(across) if across else None,
        mean_across=average([layer.across.mean.common if layer.across else 0.0 for layer in varying])
        if across
        else None,
        mean_common=average([layer.mean.common for layer in varying]),
        measures=rule.deciding(dealt),
        across_measures=rule.deciding(across),
    )


def _group(layers: Sequence[LayerEvidence], group_index: int) -> Group:
    """Judge a group by all layers together. A layer that is equal in all its models counts for its mean only."""
    inside = [(layer.within[group_index], layer.layer.num_values) for layer in layers]
    weighed = [sums for (_, sums), _ in inside if sums is not None]
    total = sum(num_values for _, num_values in inside)
    common = sum(findings.mean.common * num_values for (findings, _), num_values in inside) / total
    shared = sum(num_values for (findings, _), num_values in inside if findings.mean_is_shared)
    if rule.directions(weighed).shared:
        code = rule.SHARED_SUBSPACE
    else:
        code = rule.SHARED_MEAN if 2 * shared > total else rule.NO_SHARED_STRUCTURE
    return Group(pool(weighed), common, code)


def pool(layers: Sequence[rule.Weighed], *, contrasts: bool = False) -> Pooled:
    """Average shares over layers by weight, at the ranks of the longest one. A layer with fewer dimensions counts with all of them.

    With `contrasts`, held-out models are measured about their own mean, because the fitted models' mean contains their lineages.
    """
    parts = (("captured", "energy"), ("null", "energy"))
    if contrasts:
        parts = (("contrast", "contrast_energy"), ("contrast_null", "contrast_energy"))
    layers_with_sums = [
        (layer.sums, layer.weight) for layer in layers if layer.sums.fitted > 0 and layer.sums.energy > 0
    ]
    if not layers_with_sums:
        return Pooled((), (), (), ())
    rank = max((layer.rank for layer, _ in layers_with_sums), key=lambda ranks: ranks[-1])
    total = sum(weight for _, weight in layers_with_sums)

    def shares(part: str, whole: str) -> tuple[float, ...]:
        return tuple(
            sum(
                weight * _at(layer, getattr(layer, part), k) / max(getattr(layer, whole), SMALLEST)
                for layer, weight in layers_with_sums
            )
            / total
            for k in rank
        )

    return Pooled(rank, shares("in_sample", "fitted"), *(shares(part, whole) for part, whole in parts))


def _at(layer: Capture, values: Sequence[float], rank: int) -> float:
    """Return a cumulative energy at the largest evaluated rank up to a given one."""
    below = [value for evaluated, value in zip(layer.rank, values, strict=True) if evaluated <= rank]
    return below[-1] if below else 0.0


def decide(
    layers: Mapping[str, LayerEvidence],
    summary: Summary,
    lineage: Lineage,
    num_models: int,
    view: str,
    note: str = "",
) -> Verdict:
    """Apply the rule of `verdict` to all layers, and write the verdict with a note on its limits."""
    codes = {name: (layer.code, layer.layer.num_values) for name, layer in layers.items()}
    together = None
    if summary.directions.shared:
        across_directions = summary.across_directions
        gone = across_directions is not None and not across_directions.shared
        together = (rule.SHARED_LINEAGE, "lineage") if gone else (rule.SHARED_SUBSPACE, "unseen")
    code, decided_by, counts, values = rule.judge_zoo(codes, together)
    parts = (
        _sentence(code, decided_by, summary, lineage, num_models, view),
        "" if decided_by == "variance" else _why(code, summary, layers),
        _denominator(code, counts, values),
        note,
    )
    return Verdict(code, " ".join(filter(None, parts)), decided_by, counts, values)


def _why(code: str, summary: Summary, layers: Mapping[str, LayerEvidence]) -> str:
    """Name the condition of the rule that all layers together meet or miss."""
    measures, across = summary.measures, summary.across_measures
    if code == rule.SHARED_LINEAGE:
        if across is None or summary.across_directions is None or summary.mean_across is None:
            return ""
        if summary.directions.shared or summary.directions.held:
            return "" if summary.across_directions.shared else why_gone(across)
        return f"Across lineages: {why_mean(summary.mean_across, shared=False)}"
    if code == rule.SHARED_SUBSPACE:
        if summary.directions.shared and measures is not None:
            return why_shared(measures)
        return _why_largest(code, layers)
    mean = why_mean(summary.mean_common, shared=code == rule.SHARED_MEAN)
    return f"{mean} {why_not_shared(measures)}" if measures is not None else mean


def _why_largest(code: str, layers: Mapping[str, LayerEvidence]) -> str:
    """Name the condition that the largest layer of the verdict meets, if single layers meet one and all together do not."""
    alone = [layer for layer in layers.values() if layer.code == code and layer.weighed is not None]
    largest = max(alone, key=lambda layer: layer.layer.num_values, default=None)
    measures = rule.deciding([largest.weighed]) if largest is not None and largest.weighed is not None else None
    if largest is None or measures is None:
        return ""
    return (
        "The layers do not share directions when tested together, but most do when tested alone. The largest of these is "
        f"{largest.layer.name}. {why_shared(measures)}"
    )


def _sentence(code: str, decided_by: str, summary: Summary, lineage: Lineage, num_models: int, view: str) -> str:
    if decided_by == "variance":
        return f"The {num_models} models are copies of one model: no analysed layer differs between them."
    heldout = _held(summary.dealt)
    if code == rule.SHARED_SUBSPACE:
        within = _within(summary, lineage, num_models, view)
        strength = (
            "" if summary.directions.material else " This is more than chance, but too little to store models in."
        )
        return f"Shared subspace{within}: {heldout}. {_mean(summary)}.{strength}"
    if code == rule.SHARED_LINEAGE:
        largest = len(lineage.groups[0]) if lineage.groups else 0
        indices = shown_indices(summary.contrasts, summary.across)
        rest = " There are too few origins to test for more than that."
        if summary.across is not None and indices is not None:
            dealt, across = indices
            rest = (
                f" Models of different origin do not share it: the top {summary.across.rank[across]} directions explain "
                f"{in_percent(summary.contrasts.captured[dealt])} of the variance of held-out models, but "
                f"{in_percent(summary.across.captured[across])} of held-out lineages "
                f"(chance {in_percent(summary.across.null[across])})."
            )
        return (
            f"Shared lineage: the shared part comes from a common origin of the models ({groups_of(len(lineage.groups))}, the "
            f"largest with {largest} of the {num_models} models).{rest}"
        )
    if code == rule.SHARED_MEAN:
        return f"Shared mean, without a subspace beyond it. {_mean(summary)}. Around it, {heldout}."
    if num_models < MIN_MODELS:
        return f"No shared structure can be shown: {num_models} models are too few to hold any out. {_mean(summary)}."
    return f"No shared structure: {heldout}. {_mean(summary)}."


def _within(summary: Summary, lineage: Lineage, num_models: int, view: str) -> str:
    """Tell whether the zoo has one lineage: one base, or a group with nearly all models."""
    largest = len(lineage.groups[0]) if lineage.groups else 0
    if view in ("delta", "update") and largest == 0:
        return ", within one base"
    if view in ("delta", "update") and largest < num_models:
        return f", within one base ({largest} of the {num_models} models have a closer common origin)"
    if largest == num_models:
        return ", within one lineage"
    return f", within the lineage of {largest} of the {num_models} models" if largest and summary.across is None else ""


def shown_index(pooled: Pooled) -> int | None:
    """Return the index of the rank in sentences: the largest up to 16."""
    indices = [index for index, rank in enumerate(pooled.rank) if rank <= TESTED_RANK]
    return indices[-1] if indices else None


def shown_indices(dealt: Pooled, across: Pooled | None) -> tuple[int, int] | None:
    """Return the index in each of the largest common rank up to 16. Ranks across lineages can be fewer."""
    if across is None:
        return None
    both = [rank for rank in dealt.rank if rank in across.rank and rank <= TESTED_RANK]
    return (dealt.rank.index(both[-1]), across.rank.index(both[-1])) if both else None


def _held(pooled: Pooled) -> str:
    index = shown_index(pooled)
    if index is None:
        return "there are too few models to hold any out"
    return (
        f"the top {pooled.rank[index]} directions of each layer explain {in_percent(pooled.captured[index])} of the variance "
        f"of held-out models (in-sample {in_percent(pooled.in_sample[index])}, chance {in_percent(pooled.null[index])})"
    )


def _mean(summary: Summary) -> str:
    # A negative share looks like a fault to those who have not read how it is computed.
    below = ": the mean of unrelated models adds energy" if summary.mean_null < 0 else ""
    return (
        f"The mean alone removes {in_percent(summary.mean_heldout)} of a held-out model's energy "
        f"(chance {in_percent(summary.mean_null)}{below})"
    )


def _denominator(code: str, counts: Mapping[str, int], values: Mapping[str, float]) -> str:
    still = counts[rule.NO_VARIANCE]
    varying = sum(counts.values()) - still
    equal = (
        f" {counted(still, 'more layer')} without variance {'does' if still == 1 else 'do'} not count." if still else ""
    )
    return (
        f"Tested alone, {counts[code]} of {varying} layers with variance have this verdict, "
        f"with {in_percent(values[code])} of their values.{equal}"
        if varying
        else ""
    ).strip()


def groups_of(count: int) -> str:
    """Write a number of groups.

    >>> groups_of(1), groups_of(2)
    ('1 group', '2 groups')
    """
    return f"{count} group" + ("" if count == 1 else "s")
