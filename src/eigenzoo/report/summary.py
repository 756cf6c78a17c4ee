"""Write the verdict as a sentence, the four main numbers, and the controls."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from eigenzoo.display import counted, in_bytes, in_number, in_percent
from eigenzoo.report.document import Report
from eigenzoo.report.numbers import at_rank
from eigenzoo.report.tables import in_words, statistic_text

HEADLINES = {
    "no-shared-structure": "These models share no subspace beyond chance.",
    "shared-mean": "These models share only their mean.",
    "shared-lineage": "These models share what their lineages share.",
    "no-variance": "These models do not differ.",
}

LOW_DIMENSIONAL = 0.5
"""Share of held-out models' variance from which few directions are called a low-dimensional subspace."""

DECIDERS = {
    "chance": "against chance",
    "unseen": "models held out of the fit",
    "mean": "the mean alone",
    "universality": "two halves of the zoo",
    "growth": "growth with the number of models",
    "lineage": "whole lineages held out",
    "secondary": "the directions after the first",
    "suitability": "the shape of the spectra",
    "variance": "there is no variance",
}

VIEWS = {
    "weight": "the weights themselves",
    "delta": "differences from the base",
    "update": "LoRA updates, scaled: s·B·A",
    "factors": "LoRA factors, A and B as layers of their own",
}


@dataclass(frozen=True)
class Key:
    """One of the numbers at the top: its label, its value, and its denominator."""

    label: str
    value: str
    of: str
    tone: str


@dataclass(frozen=True)
class Control:
    """One control: question, statistic, control, uncertainty, its sentence, and positions of both values on a bar from 0 to 1."""

    name: str
    question: str
    statistic: str
    value: str
    control: str
    control_value: str
    uncertainty: str
    sentence: str
    decided: bool
    bar: tuple[float, float] | None


@dataclass(frozen=True)
class Fact:
    """A fact about the zoo, with its denominator or meaning."""

    label: str
    value: str
    note: str = ""


def headline(report: Report) -> str:
    """Write the verdict as one sentence."""
    code = report.evidence["verdict"]["code"]
    if code == "shared-subspace":
        return _shared(report)
    return HEADLINES.get(code, f"Verdict: {in_words(code)}.")


def _shared(report: Report) -> str:
    """A subspace is called low-dimensional only if few directions keep most of models that it was not fitted to."""
    summary, rank = report.evidence["summary"], report.rank
    share = at_rank(summary["rank"], summary["captured"], rank)
    if share is None:
        return "These models share directions."
    kept = f"{counted(rank, 'direction')} per layer keep{'s' if rank == 1 else ''}"
    if share >= LOW_DIMENSIONAL:
        return (
            f"These models share a low-dimensional subspace: {kept} {in_percent(share)} of held-out models' variance."
        )
    return f"These models share directions, but {kept} only {in_percent(share)} of held-out models' variance."


def decider(report: Report) -> str:
    """Name the control that decided."""
    name = str(report.evidence["verdict"]["decided_by"])
    return DECIDERS.get(name, name)


def keys(report: Report) -> list[Key]:
    """Return held out, in-sample, chance and the mean, always together, and the metric of rebuilt models if it was measured."""
    summary, rank = report.evidence["summary"], report.rank
    shares = [at_rank(summary["rank"], summary[key], rank) for key in ("in_sample", "captured", "null")]
    return [
        Key("held out", in_percent(shares[1]), f"of held-out models' variance about the mean, rank {rank}", "heldout"),
        Key(
            "in-sample", in_percent(shares[0]), f"of the variance of each fold's fitted models, rank {rank}", "insample"
        ),
        Key("chance", in_percent(shares[2]), f"of unrelated held-out models' variance, rank {rank}", "null"),
        Key("mean alone", in_percent(summary["mean_heldout"]), "of a held-out model's energy, rank 0", "mean"),
        *_function_key(report),
    ]


def _function_key(report: Report) -> Iterator[Key]:
    """Return the metric of rebuilt models at the rank of the other numbers, or at the largest measured one below it."""
    function = report.function
    if function is None or not function["mean"]["rebuilt"]:
        return
    rebuilt = {int(rank): value for rank, value in function["mean"]["rebuilt"].items() if value is not None}
    rank = max((rank for rank in rebuilt if rank <= report.rank), default=min(rebuilt, default=0))
    mean = function["mean"]
    controls = (("original", "original"), ("the mean alone", "mean"))
    beside = [f"{label} {in_number(mean[key])}" for label, key in controls if mean[key] is not None]
    kind = "held-out models" if function["heldout"] else "models, not all held out"
    models = f"average of {function['num_models']:,} {kind}"
    if rebuilt:
        yield Key(
            f"{function['metric']}, rebuilt",
            in_number(rebuilt[rank]),
            "; ".join([f"rank {rank}, {models}", *beside]),
            "function",
        )


def controls(report: Report) -> list[Control]:
    """Return the controls in the evidence's order."""
    decided = report.evidence["verdict"]["decided_by"]
    return [_control(control, control["name"] == decided) for control in report.evidence["controls"]]


def _control(control: Mapping[str, Any], decided: bool) -> Control:
    value, against = control["value"], control["control_value"]
    shares = value is not None and against is not None and 0 <= value <= 1 and 0 <= against <= 1
    return Control(
        control["name"],
        control["question"],
        control["statistic"],
        statistic_text(control, "value"),
        control["control"],
        statistic_text(control, "control_value") if against is not None else "",
        control["uncertainty"],
        control["sentence"],
        decided,
        (round(100 * value, 1), round(100 * against, 1)) if shares else None,
    )


def facts(report: Report) -> list[Fact]:
    """Return facts about the zoo."""
    evidence, summary = report.evidence, report.evidence["summary"]
    values = sum(layer["num_values"] or 0 for layer in report.layers.values())
    energy, variance = summary["energy"] or 0.0, summary["variance"] or 0.0
    still = sum(not layer["variance"] for layer in report.layers.values())
    found = [
        Fact(
            "models",
            f"{evidence['num_models']:,}",
            f"they span at most {max(evidence['num_models'] - 1, 0):,} directions",
        ),
        Fact("layers", f"{evidence['num_layers']:,}", f"{counted(still, 'layer')} without variance" if still else ""),
        Fact("view", evidence["view"] or "–", VIEWS.get(evidence["view"], "")),
        Fact("centred on", evidence["center"] or "–", "subtracted before the fit"),
        Fact("values per model", f"{values:,}", "in the analysed layers"),
        Fact("energy Σ‖X‖²", in_number(energy), "of all models, all analysed layers"),
        Fact("variance", in_percent(variance / energy if energy else None), "of that energy, about the center"),
    ]
    if evidence["folds"]:
        found.append(Fact("held-out folds", in_number(evidence["folds"]), f"drawn with seed {evidence['seed']}"))
    if report.sizes is not None:
        found.append(Fact("the models' files", in_bytes(report.sizes["whole_zoo"]), "everything in them"))
    if evidence["seconds"] is not None:
        found.append(Fact("evidence took", f"{evidence['seconds']:,.1f} s"))
    return found


def provenance(report: Report) -> list[Fact]:
    """Return the report's command, versions, date and seed."""
    made_by = report.made_by
    found = [Fact("command", made_by["command"]), Fact("date", str(made_by["date"]))]
    found += [Fact("seed", str(made_by["seed"]))] if made_by["seed"] is not None else []
    found += [Fact(name, str(version)) for name, version in (made_by["versions"] or {}).items()]
    return [fact for fact in found if fact.value]
