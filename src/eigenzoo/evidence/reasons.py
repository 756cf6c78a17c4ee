"""Why a verdict is what it is: the condition of the rule that was met or missed, with its numbers and its limits."""

from __future__ import annotations

from math import isinf

from eigenzoo.display import in_percent
from eigenzoo.evidence import verdict as rule
from eigenzoo.evidence.verdict import Measures


def why_shared(measures: Measures) -> str:
    """Name the condition by which models share directions: leading ones (distinct), or ones that hold enough (material)."""
    if measures.distinct:
        return _sentence(
            f"{_leading(measures)} (at least {rule.DISTINCT:g} is needed; p {p_text(measures.p_cloud)}, and "
            f"below {rule.SIGNIFICANCE:g} is needed), and the models spread over {_directions(measures)} (at most "
            f"{_few(measures)} count as few)."
        )
    return _sentence(
        f"{_holding(measures)} (at least {_limit(rule.MATERIAL_SHARE)} and {rule.MATERIAL_RATIO:g} times are needed; "
        f"p {p_text(measures.p_chance)}, and below {rule.SIGNIFICANCE:g} is needed), and the models spread over "
        f"{_directions(measures)} (at most {measures.num_models}, one for each model, are allowed)."
    )


def why_not_shared(measures: Measures) -> str:
    """Name the conditions that are missed: those of directions that hold enough, then those of leading directions."""
    return _sentence(_why_not(measures))


def _sentence(text: str, start: str = "with all models scaled to one norm, ") -> str:
    return _capital(start + text)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _why_not(measures: Measures) -> str:
    limit = f"below {rule.SIGNIFICANCE:g} is needed"
    if measures.p_chance >= rule.SIGNIFICANCE and measures.p_cloud >= rule.SIGNIFICANCE:
        best = min(measures.p_chance, measures.p_cloud)
        return f"{_holding(measures)}, and unrelated models reach as much (p {p_text(best)}, and {limit})."
    if measures.held:
        return (
            f"{_holding(measures)}, but spread over {_directions(measures)}: at most {measures.num_models}, one for each model, "
            "are allowed. More models can tell."
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
    """Name what is missed with whole lineages held out."""
    return _sentence(_why_not(measures), "with whole lineages held out and all models scaled to one norm, ")


def why_mean(common: float, *, shared: bool) -> str:
    """Name the condition by which the mean counts or does not, from what two models have in common."""
    said = f"Two models have {in_percent(common)} of a model's energy in common"
    if shared or common < rule.MEAN_SHARE:
        return f"{said} (at least {_limit(rule.MEAN_SHARE)} is needed)."
    return f"{said}, which is less than {rule.MEAN_DEVIATIONS:g} standard deviations from none in most layers."


def _why_not_distinct(measures: Measures) -> str:
    missed = []
    if measures.ratio < rule.DISTINCT:
        missed.append(f"at least {rule.DISTINCT:g} is needed")
    if measures.p_cloud >= rule.SIGNIFICANCE:
        missed.append(f"an even cloud reaches that too (p {p_text(measures.p_cloud)})")
    if not measures.is_few(rule.FEW):
        missed.append(f"the models spread over {_directions(measures)}, and at most {_few(measures)} count as few")
    return f"{_leading(measures)}, but {_listed(missed)}."


def _holding(measures: Measures) -> str:
    return (
        f"the top {_counted(measures.rank)} {in_percent(measures.share)} of left-out models about their "
        f"own mean, {_times(measures.over_chance)} chance"
    )


def _leading(measures: Measures) -> str:
    return (
        f"the top {_counted(measures.rank)} {_times(measures.ratio)} as much of left-out models as average "
        "directions do"
    )


def _counted(rank: int) -> str:
    return "direction holds" if rank == 1 else f"{rank} directions hold"


def _times(ratio: float) -> str:
    return f"{ratio:.3g} times"


def _few(measures: Measures) -> str:
    return f"{rule.FEW * measures.num_models:.3g}, half of the {measures.num_models} models,"


def _directions(measures: Measures) -> str:
    """Write the effective number of directions."""
    number = measures.effective
    if number is None:
        return "a number of directions that is not measured"
    return "directions of which none leads" if isinf(number) else f"an effective number of {number:.3g} directions"


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
