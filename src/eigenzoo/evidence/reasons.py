"""Why a verdict is what it is: the condition of the rule that was met or missed, with its numbers and its limits."""

from __future__ import annotations

from math import isinf

from eigenzoo.display import in_percent
from eigenzoo.evidence import verdict as rule
from eigenzoo.evidence.verdict import Measures


def why_shared(measures: Measures) -> str:
    """Name the condition that was met: leading directions (distinct), or directions that explain enough (material)."""
    if measures.distinct:
        return _sentence(
            f"{_leading(measures)} (needed: at least {rule.DISTINCT:g}; p {p_text(measures.p_cloud)}, needed: "
            f"below {rule.SIGNIFICANCE:g}). The models spread over {_directions(measures)} (needed: at most {_few(measures)})."
        )
    return _sentence(
        f"{_holding(measures)} (needed: at least {_limit(rule.MATERIAL_SHARE)} and {rule.MATERIAL_RATIO:g} times chance; "
        f"p {p_text(measures.p_chance)}, needed: below {rule.SIGNIFICANCE:g}). The models spread over "
        f"{_directions(measures)} (needed: at most {measures.num_models}, one per model)."
    )


def why_not_shared(measures: Measures) -> str:
    """Name the conditions that were missed: first those of `material`, then those of `distinct`."""
    return _sentence(_why_not(measures))


def _sentence(text: str, start: str = "with all models scaled to the same norm, ") -> str:
    return _capital(start + text)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _why_not(measures: Measures) -> str:
    if measures.p_chance >= rule.SIGNIFICANCE and measures.p_cloud >= rule.SIGNIFICANCE:
        best = min(measures.p_chance, measures.p_cloud)
        return f"{_holding(measures)}. Unrelated models reach as much (p {p_text(best)}, needed: below {rule.SIGNIFICANCE:g})."
    if measures.held:
        return (
            f"{_holding(measures)}. But the models spread over {_directions(measures)} (needed: at most {measures.num_models}, "
            "one per model). Add models to decide."
        )
    missed = []
    if measures.p_chance >= rule.SIGNIFICANCE:
        missed.append(f"unrelated models reach that share too (p {p_text(measures.p_chance)})")
    if measures.share < rule.MATERIAL_SHARE:
        missed.append(f"at least {_limit(rule.MATERIAL_SHARE)} is needed")
    if measures.over_chance < rule.MATERIAL_RATIO:
        missed.append(f"at least {rule.MATERIAL_RATIO:g} times chance is needed")
    return f"{_holding(measures)}, but {_listed(missed)}. {_capital(_why_not_distinct(measures))}"


def why_gone(measures: Measures) -> str:
    """Name the conditions that are missed with whole lineages held out."""
    return _sentence(_why_not(measures), "with whole lineages held out and all models scaled to the same norm, ")


def why_mean(common: float, *, shared: bool) -> str:
    """Name the condition by which the mean counts or does not, from the energy that two models share."""
    said = f"Two models share {in_percent(common)} of a model's energy on average"
    if shared or common < rule.MEAN_SHARE:
        return f"{said} (needed: at least {_limit(rule.MEAN_SHARE)})."
    return f"{said}, which is less than {rule.MEAN_DEVIATIONS:g} standard deviations from zero in most layers."


def _why_not_distinct(measures: Measures) -> str:
    missed = []
    if measures.ratio < rule.DISTINCT:
        missed.append(f"at least {rule.DISTINCT:g} is needed")
    if measures.p_cloud >= rule.SIGNIFICANCE:
        missed.append(f"an even cloud reaches that too (p {p_text(measures.p_cloud)})")
    if not measures.is_few(rule.FEW):
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
    return f"{rule.FEW * measures.num_models:.3g}, half of the {measures.num_models} models"


def _directions(measures: Measures) -> str:
    """Write the effective number of directions."""
    number = measures.effective
    if number is None:
        return "an unmeasured number of directions"
    return "directions of which none leads" if isinf(number) else f"{number:.3g} effective directions"


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
    """Write a p-value; floats end where it does not.

    >>> p_text(0.034), p_text(0.0)
    ('= 0.03', '< 1e-300')
    """
    return f"= {value:.1g}" if value > 1e-300 else "< 1e-300"
