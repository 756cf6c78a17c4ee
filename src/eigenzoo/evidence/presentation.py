"""Make the document for reports: evidence, sizes, residuals, a metric's figures, and its origin."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from eigenzoo.errors import UsageError
from eigenzoo.evidence.evidence import Evidence
from eigenzoo.evidence.function import FunctionEvidence
from eigenzoo.formats.remote import source_url
from eigenzoo.records import finite, plain, weighted_share
from eigenzoo.subspace.fitting.alone import against_alone, alone_of
from eigenzoo.subspace.fitting.bytes import sizes
from eigenzoo.subspace.fitting.plan import Plan
from eigenzoo.subspace.subspace import Subspace
from eigenzoo.zoo.zoo import Zoo

PACKAGES = ("eigenzoo", "torch", "numpy", "scipy")


def present(
    evidence: Evidence,
    source: Zoo | Subspace,
    *,
    title: str,
    command: str,
    date: str,
    function: FunctionEvidence | None = None,
    plan: Plan | None = None,
) -> dict[str, Any]:
    """Return the document: plain JSON values, as `eigenzoo.report` lists them.

    Args:
        evidence: the evidence.
        source: its source: a zoo, or a subspace, which adds the models' residuals.
        title: title of the zoo.
        command, date: command and date of the report.
        function: the result of `evaluate`, if it was run.
        plan: sizes and errors of a zoo at other axes, and of models cut alone.
    """
    return {
        "title": title,
        "evidence": evidence.to_dict(),
        "function": None if function is None else function.to_dict(),
        "sizes": _sizes(source),
        "rates": _rates(evidence, source, plan),
        "models": _models(source),
        "made_by": {
            "command": command,
            "versions": {**{package: version(package) for package in PACKAGES}, "python": platform.python_version()},
            "date": date,
            "seed": evidence.seed,
        },
    }


def _rates(found: Evidence, source: Zoo | Subspace, plan: Plan | None) -> dict[str, Any] | None:
    """Return bytes and kept shares of the variance about the mean: of sides, of models cut alone, and of the bundle."""
    energy, variance = found.summary.energy, found.summary.variance
    if energy <= 0 or variance <= 0:
        return None
    known = plan.alone if plan is not None else () if isinstance(source, Zoo) else alone_of(source.report)
    rates: dict[str, Any] = {
        "num_models": len(found.names),
        "rows": [
            {key: getattr(row, key) for key in ("rank", "bytes", "per_model", "captured", "heldout")}
            | {"axes": ",".join(row.axes)}
            for row in (plan.rows if plan is not None else ())
            if "models" not in row.axes
        ],
        "alone": [{**plain(row), "captured": 1 - row.residual * energy / variance} for row in known],
        "bundle": None,
        "sentences": [plan.advice] if plan is not None and plan.advice else [],
    }
    if isinstance(source, Subspace):
        beside = against_alone(source.report)
        layers = list(source.report["layers"].values())
        rates["sentences"] = [] if beside is None else beside.sentences
        rates["bundle"] = {
            "axes": ",".join(source.axes),
            "bytes": source.report["bytes"]["whole_bundle"],
            "per_model": source.report["bytes"]["per_model"],
            **{key: weighted_share(layers, key) for key in ("captured", "heldout")},
        }
    return rates


def _sizes(source: Zoo | Subspace) -> dict[str, Any] | None:
    """Return bytes by rank; None for a bundle with other axes than `models`."""
    try:
        return sizes(source).to_dict()
    except UsageError:
        return None


def _models(source: Zoo | Subspace) -> dict[str, Mapping[str, Any]]:
    if isinstance(source, Zoo):
        return {
            name: {"residual": None, "energy": None, "source": source_url(model.path) or str(model.path)}
            for name, model in zip(source.names, source.models, strict=True)
        }
    found: dict[str, Mapping[str, Any]] = {}
    for record in source.manifest.models:
        coefficients = source.coefficients(record.name)
        found[record.name] = {
            "residual": finite(coefficients.residual),
            "energy": sum(coefficients.energies.values()) if coefficients.energies else None,
            "source": record.source.path,
        }
    return found
