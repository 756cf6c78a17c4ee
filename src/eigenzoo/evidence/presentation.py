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
from eigenzoo.records import finite
from eigenzoo.subspace.fitting.bytes import sizes
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
) -> dict[str, Any]:
    """Return the document: plain JSON values, as `eigenzoo.report` lists them.

    Args:
        evidence: the evidence.
        source: its source: a zoo, or a subspace, which adds the models' residuals.
        title: title of the zoo.
        command, date: command and date of the report.
        function: the result of `evaluate`, if it was run.
    """
    return {
        "title": title,
        "evidence": evidence.to_dict(),
        "function": None if function is None else function.to_dict(),
        "sizes": _sizes(source),
        "models": _models(source),
        "made_by": {
            "command": command,
            "versions": {**{package: version(package) for package in PACKAGES}, "python": platform.python_version()},
            "date": date,
            "seed": evidence.seed,
        },
    }


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
