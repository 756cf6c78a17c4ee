"""Decide the verdict, one of four codes. docs/evidence.md has the rule, with the reason of every threshold.

A layer is judged on models held out of the fit, with models assigned to folds at random. If groups of common origin were found, it
is judged again with whole lineages held out together. Structure that is then gone belonged to lineages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import erfc, isinf, sqrt

from eigenzoo.display import in_percent
from eigenzoo.evidence.unseen import TESTED_RANK, Capture, MeanShare, ranks_up_to
from eigenzoo.linalg.gram import effective_directions

NO_SHARED_STRUCTURE, SHARED_MEAN = "no-shared-structure", "shared-mean"
SHARED_LINEAGE, SHARED_SUBSPACE = "shared-lineage", "shared-subspace"
NO_VARIANCE = "no-variance"
CODES = (NO_SHARED_STRUCTURE, SHARED_MEAN, SHARED_LINEAGE, SHARED_SUBSPACE)
"""Codes from the most to the least sceptical. With equal weights the first one is the verdict."""

SIGNIFICANCE = 1e-3
"""Probability that a layer of noise appears to share directions. Zoos have tens of layers."""

DISTINCT = 1.1
"""Least ratio of the energy in leading directions to that in average ones. Otherwise the models are a cloud without directions."""

FEW = 0.5
"""Largest effective number of directions as a multiple of the number of models. Weights that only vary together, such as the nine
entries of a kernel, have as many directions as kernels and use all of them.
"""

FEWER_THAN_MODELS = 1.0
"""A cloud of more directions than models does not have a low dimension, for any captured share."""

MATERIAL_SHARE, MATERIAL_RATIO = 0.05, 2.0
"""Few directions with this share of unseen models, and this multiple of chance, are a subspace even if no direction leads."""

MEAN_SHARE, MEAN_DEVIATIONS = 0.05, 4.0
"""Least share of a model's energy in the mean, and its least number of standard deviations above zero."""


@dataclass(frozen=True)
class Weighed:
    """Input for judging directions: one layer's held-out energies, its spectrum's edges, and its weight (its number of values).

    Attributes:
        sums: energies of held-out models.
        edges: standard deviations of the top k eigenvalues above those of unrelated models of the same norms, with k in
            `sums.rank`; None if whole lineages are held out, which does not change the spectrum.
        cloud_edges: the same relative to a cloud without directions.
        excess: second and third moments of the models beyond isotropic noise; None if lineages are held out.
    """

    sums: Capture
    edges: tuple[float, ...] | None
    cloud_edges: tuple[float, ...] | None
    excess: tuple[float, float] | None
    weight: float = 1.0


@dataclass(frozen=True)
class Directions:
    """Whether unseen models are along the fitted ones' leading directions.

    Attributes:
        shared: the result: `distinct` or `material`.
        rank: the number of directions with the clearest result.
        p_value: p-value of spectrum and held-out models together at that rank, times the number of ranks tried; against a cloud
            without directions if they are distinct, else against unrelated models.
        ratio: captured energy of held-out models over that of as many average directions.
        effective: number of equal directions of a cloud with these second and third moments; None if lineages are held out, or if
            no direction leads.
        held: whether they would be material without the limit by the number of models, which excludes pairs of related models.
    """

    shared: bool
    distinct: bool
    material: bool
    rank: int
    p_value: float
    ratio: float
    effective: float | None = None
    held: bool = False


@dataclass(frozen=True)
class Measures:
    """Figures of one layer or several together at one number of directions, which the rule compares with its limits.

    Attributes:
        rank: the number of directions.
        share, over_chance: captured share of held-out models about their own mean, and its multiple of chance.
        p_chance: p-value of that share and the spectrum's edge together, against unrelated models.
        ratio, p_cloud: captured energy over that of as many average directions, and its p-value against a cloud without directions.
        effective: the effective number of directions; infinite if none leads, None if lineages are held out.
        num_models: the number of models.

    p-values are multiplied by the number of ranks tried.
    """

    rank: int
    share: float
    over_chance: float
    p_chance: float
    ratio: float
    p_cloud: float
    effective: float | None
    num_models: int

    def is_few(self, share: float) -> bool:
        """Tell whether the effective number of directions is at most this share of the models, or is not measured."""
        return self.effective is None or self.effective / self.num_models <= share

    @property
    def distinct(self) -> bool:
        """Whether a few directions lead."""
        return self.is_few(FEW) and self.p_cloud < SIGNIFICANCE and self.ratio >= DISTINCT

    @property
    def held(self) -> bool:
        """Whether the directions capture enough, for any number of them."""
        return self.p_chance < SIGNIFICANCE and self.share >= MATERIAL_SHARE and self.over_chance >= MATERIAL_RATIO

    @property
    def material(self) -> bool:
        """Whether the directions capture enough and are fewer than the models."""
        return self.held and self.is_few(FEWER_THAN_MODELS)

    @property
    def p_value(self) -> float:
        """The p-value of the comparison that decides."""
        return self.p_chance if self.held and not self.distinct else self.p_cloud


NOWHERE = Directions(False, False, False, 0, 1.0, 0.0)


@dataclass(frozen=True)
class Findings:
    """Results of held-out models for one assignment to folds."""

    directions: Directions
    mean: MeanShare

    @property
    def mean_is_shared(self) -> bool:
        """Whether the mean captures enough, and more than chance."""
        return self.mean.common >= MEAN_SHARE and self.mean.deviations >= MEAN_DEVIATIONS


def directions(layers: Sequence[Weighed]) -> Directions:
    """Judge one layer, or several together.

    The tests of the spectrum's edge in-sample and of held-out models are independent if nothing is shared. They are added as normal
    deviates, over layers by weight (Stouffer 1949). The best of a few ranks counts, with a correction for the choice.
    """
    tried = _tried(layers)
    if not tried:
        return NOWHERE
    best = min(tried, key=_clearest)
    return Directions(
        shared=any(each.distinct or each.material for each in tried),
        distinct=best.distinct,
        material=any(each.material for each in tried),
        rank=best.rank,
        p_value=best.p_value,
        ratio=best.ratio,
        held=any(each.held for each in tried),
        effective=None if best.effective is None or isinf(best.effective) else best.effective,
    )


def deciding(layers: Sequence[Weighed]) -> Measures | None:
    """Return the measures that explain the result of `directions`; None if no models can be held out.

    If directions are shared, they are those of the clearest rank, else of a rank with too many directions that capture enough, if
    there is one.
    """
    tried = _tried(layers)
    shared = any(each.distinct or each.material for each in tried)
    return min(tried, key=lambda each: (not shared and not each.held, *_clearest(each)), default=None)


def _clearest(measures: Measures) -> tuple[bool, bool, float, float]:
    return not measures.distinct, not measures.material, measures.p_value, -measures.ratio


def _tried(layers: Sequence[Weighed]) -> list[Measures]:
    """Return the measures at every tried rank."""
    with_sums = [layer for layer in layers if layer.sums.freedom > 0 and layer.sums.cloud > 0]
    total = sum(layer.weight for layer in with_sums)
    by_rank = {
        rank: having
        for rank in ranks_up_to(TESTED_RANK)
        if (having := [layer for layer in with_sums if rank in layer.sums.rank])
        # Layers with fewer dimensions, such as biases, are left out at this rank.
        and 2 * sum(layer.weight for layer in having) >= total
    }
    if not by_rank:
        return []
    effective = _effective(with_sums)
    num_models = min(layer.sums.num_models for layer in with_sums)
    return [_at_rank(having, rank, len(by_rank), effective, num_models) for rank, having in by_rank.items()]


def _effective(layers: Sequence[Weighed]) -> float | None:
    """Return the effective number of directions of a layer, or the weighted average over several."""
    measured = [(layer.excess, layer.weight) for layer in layers if layer.excess is not None]
    if len(measured) < len(layers):
        return None
    total = sum(weight for _, weight in measured)
    second, third = (sum(excess[part] * weight for excess, weight in measured) / total for part in (0, 1))
    return effective_directions(second, third)


def _at_rank(
    layers: Sequence[Weighed], rank: int, num_tried: int, effective: float | None, num_models: int
) -> Measures:
    total = sum(layer.weight for layer in layers)

    def average(values: Sequence[float]) -> float:
        return sum(value * layer.weight for value, layer in zip(values, layers, strict=True)) / total

    indices = [layer.sums.rank.index(rank) for layer in layers]
    ratios = [layer.sums.ratio[index] for layer, index in zip(layers, indices, strict=True)]
    chances = [layer.sums.over_chance[index] for layer, index in zip(layers, indices, strict=True)]
    shares = [
        layer.sums.contrast[index] / layer.sums.contrast_energy for layer, index in zip(layers, indices, strict=True)
    ]
    against_cloud = min(1.0, num_tried * _p_value(layers, indices, ratios, [layer.cloud_edges for layer in layers]))
    against_chance = min(1.0, num_tried * _p_value(layers, indices, chances, [layer.edges for layer in layers]))
    return Measures(
        rank, average(shares), average(chances), against_chance, average(ratios), against_cloud, effective, num_models
    )


def _p_value(
    layers: Sequence[Weighed],
    indices: Sequence[int],
    ratios: Sequence[float],
    edges: Sequence[tuple[float, ...] | None],
) -> float:
    """Return the one-sided p-value of Σ w·z / √Σ w² over all tests of all layers."""
    score = square = 0.0
    for layer, index, ratio, edge in zip(layers, indices, ratios, edges, strict=True):
        deviates = [_deviate(ratio, layer.sums.freedom * layer.sums.rank[index])]
        if edge is not None:
            deviates.append(edge[index])
        score += layer.weight * sum(deviates)
        square += layer.weight**2 * len(deviates)
    return erfc(score / sqrt(2 * square)) / 2


def _deviate(ratio: float, freedom: float) -> float:
    """Return the normal deviate of a χ² over its degrees of freedom (Wilson and Hilferty 1931)."""
    spread = 2 / (9 * freedom)
    return float((ratio ** (1 / 3) - (1 - spread)) / sqrt(spread)) if ratio > 0 else -sqrt(1 / spread)


def judge(dealt: Findings, across: Findings | None) -> tuple[str, str]:
    """Return the code and the control that decided, from random folds, and from held-out lineages if there are any."""
    gone = across is not None and not across.directions.shared
    if gone and (dealt.directions.shared or dealt.directions.held):
        return SHARED_LINEAGE, "lineage"
    if dealt.directions.shared:
        return SHARED_SUBSPACE, "unseen"
    if dealt.mean_is_shared:
        if across is not None and not across.mean_is_shared:
            return SHARED_LINEAGE, "lineage"
        return SHARED_MEAN, "mean"
    return NO_SHARED_STRUCTURE, "unseen"


def judge_zoo(
    codes: Mapping[str, tuple[str, int]], together: tuple[str, str] | None
) -> tuple[str, str, dict[str, int], dict[str, float]]:
    """Judge the zoo from its layers' codes and numbers of values, and from all layers together.

    The verdict is the code of the layers with most values. If all layers together show directions that no single layer shows, and
    that code is not about directions, the verdict is theirs. Returns code, control, and for each code the number of layers and the
    share of values.
    """
    varying = {name: verdict for name, verdict in codes.items() if verdict[0] != NO_VARIANCE}
    total = sum(num_values for _, num_values in varying.values())
    layers = {code: sum(verdict == code for verdict, _ in codes.values()) for code in (*CODES, NO_VARIANCE)}
    if not total:
        return SHARED_MEAN, "variance", layers, dict.fromkeys(CODES, 0.0)
    values = {code: sum(num for verdict, num in varying.values() if verdict == code) / total for code in CODES}
    code = max(CODES, key=lambda each: (values[each], -CODES.index(each)))
    if code in (NO_SHARED_STRUCTURE, SHARED_MEAN) and together is not None:
        return *together, layers, values
    return code, DECIDED_BY[code], layers, values


DECIDED_BY = {
    NO_SHARED_STRUCTURE: "unseen",
    SHARED_MEAN: "mean",
    SHARED_LINEAGE: "lineage",
    SHARED_SUBSPACE: "unseen",
}
"""The control that decides each code."""


def why_shared(measures: Measures) -> str:
    """Name the condition that was met: leading directions (distinct), or directions that capture enough (material)."""
    if measures.distinct:
        return _sentence(
            f"{_leading(measures)} (needed: at least {DISTINCT:g}; p {p_text(measures.p_cloud)}, needed: "
            f"below {SIGNIFICANCE:g}). The models spread over {_directions(measures)} (needed: at most {_few(measures)})."
        )
    return _sentence(
        f"{_holding(measures)} (needed: at least {_limit(MATERIAL_SHARE)} and {MATERIAL_RATIO:g} times chance; "
        f"p {p_text(measures.p_chance)}, needed: below {SIGNIFICANCE:g}). The models spread over "
        f"{_directions(measures)} (needed: at most {measures.num_models}, one per model)."
    )


def lead(measures: Measures) -> str:
    """Write the ratio of the leading directions to average ones, and how often a cloud without directions reaches it."""
    return _sentence(f"{_leading(measures)} (p {p_text(measures.p_cloud)}).")


def why_not_shared(measures: Measures) -> str:
    """Name the conditions that were missed: first those of `material`, then those of `distinct`."""
    return _sentence(_why_not(measures))


def _sentence(text: str, start: str = "with all models scaled to the same norm, ") -> str:
    return _capital(start + text)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _why_not(measures: Measures) -> str:
    if measures.p_chance >= SIGNIFICANCE and measures.p_cloud >= SIGNIFICANCE:
        best = min(measures.p_chance, measures.p_cloud)
        return (
            f"{_holding(measures)}. Unrelated models reach as much (p {p_text(best)}, needed: below {SIGNIFICANCE:g})."
        )
    if measures.held:
        return (
            f"{_holding(measures)}. But the models spread over {_directions(measures)} (needed: at most {measures.num_models}, "
            "one per model). Add models to decide."
        )
    missed = []
    if measures.p_chance >= SIGNIFICANCE:
        missed.append(f"unrelated models reach that share too (p {p_text(measures.p_chance)})")
    if measures.share < MATERIAL_SHARE:
        missed.append(f"at least {_limit(MATERIAL_SHARE)} is needed")
    if measures.over_chance < MATERIAL_RATIO:
        missed.append(f"at least {MATERIAL_RATIO:g} times chance is needed")
    return f"{_holding(measures)}, but {_listed(missed)}. {_capital(_why_not_distinct(measures))}"


def why_gone(measures: Measures) -> str:
    """Name the conditions that are missed with whole lineages held out."""
    return _sentence(_why_not(measures), "with whole lineages held out and all models scaled to the same norm, ")


def why_mean(common: float, *, shared: bool) -> str:
    """Name the condition by which the mean counts or not, from the energy that two models share."""
    said = f"Two models share {in_percent(common)} of a model's energy on average"
    if shared or common < MEAN_SHARE:
        return f"{said} (needed: at least {_limit(MEAN_SHARE)})."
    return f"{said}, which is less than {MEAN_DEVIATIONS:g} standard deviations from zero in most layers."


def _why_not_distinct(measures: Measures) -> str:
    missed = []
    if measures.ratio < DISTINCT:
        missed.append(f"at least {DISTINCT:g} is needed")
    if measures.p_cloud >= SIGNIFICANCE:
        missed.append(f"an even cloud reaches that too (p {p_text(measures.p_cloud)})")
    if not measures.is_few(FEW):
        missed.append(f"the models spread over {_directions(measures)} (needed: at most {_few(measures)})")
    return f"{_leading(measures)}, but {_listed(missed)}."


def _holding(measures: Measures) -> str:
    return (
        f"the top {_counted(measures.rank)} {in_percent(measures.share)} of the variance of held-out models about their "
        f"own mean, {_times(measures.over_chance)} chance"
    )


def _leading(measures: Measures) -> str:
    return (
        f"the top {_counted(measures.rank)} {_times(measures.ratio)} as much of held-out models as average "
        "directions do"
    )


def _counted(rank: int) -> str:
    return "direction explains" if rank == 1 else f"{rank} directions explain"


def _times(ratio: float) -> str:
    return f"{ratio:.3g} times"


def _few(measures: Measures) -> str:
    return f"{FEW * measures.num_models:.3g}, half of the {measures.num_models} models"


def _directions(measures: Measures) -> str:
    """Write the effective number of directions."""
    number = measures.effective
    if number is None:
        return "an unmeasured number of directions"
    if isinf(number):
        return "directions of which none leads"
    # The estimate from two unbiased traces can be less than one direction, which is impossible.
    return f"{number:.3g} effective directions" if number >= 1 else "a single effective direction"


def _limit(share: float) -> str:
    """Write a limit of the rule, which is a round number."""
    return f"{100 * share:g} %"


def _listed(parts: list[str]) -> str:
    """Join clauses.

    >>> _listed(["a", "b", "c"]), _listed(["a"])
    ('a, b, and c', 'a')
    """
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])}, and {parts[-1]}"


def p_text(value: float) -> str:
    """Write a p-value. Values below the range of floats are written as a bound.

    >>> p_text(0.034), p_text(0.0)
    ('= 0.03', '< 1e-300')
    """
    return f"= {value:.1g}" if value > 1e-300 else "< 1e-300"
