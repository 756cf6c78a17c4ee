"""eigenzoo: the low-dimensional weight subspace that many models of one architecture share, whether there is one, and its use.

    import eigenzoo as ez
    zoo   = ez.open_zoo("adapters/*")
    space = ez.fit(zoo, rank=16)
    coeff = space.project("adapters/unseen")
    space.rebuild(coeff).save("out/")
    space.save("bundle/"); ez.load("bundle/")

Names are imported when they are first used, so that `import eigenzoo` itself costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eigenzoo.errors import (
        BudgetError,
        BundleError,
        DataError,
        EigenzooError,
        FormatError,
        MismatchError,
        OutputError,
        RankError,
        ResourceError,
        UnsafePathError,
        UnsupportedError,
        UsageError,
        ZooError,
    )
    from eigenzoo.evidence.evidence import Evidence, evidence
    from eigenzoo.evidence.function import evaluate
    from eigenzoo.merge.merged import Merged
    from eigenzoo.merge.merging import merge
    from eigenzoo.routing.router import Router, route
    from eigenzoo.routing.routing import Routing
    from eigenzoo.subspace.bundles.loading import load
    from eigenzoo.subspace.coefficients import Coefficients
    from eigenzoo.subspace.fitting.fit import fit
    from eigenzoo.subspace.fitting.plan import plan
    from eigenzoo.subspace.imports.importing import import_subspace
    from eigenzoo.subspace.rebuilt import RebuiltModel
    from eigenzoo.subspace.subspace import Subspace
    from eigenzoo.zoo.adapter_verifying import verify_adapter
    from eigenzoo.zoo.inspection import inspect
    from eigenzoo.zoo.zoo import Zoo, open_zoo

_ERRORS = (
    "BudgetError",
    "BundleError",
    "DataError",
    "EigenzooError",
    "FormatError",
    "MismatchError",
    "OutputError",
    "RankError",
    "ResourceError",
    "UnsafePathError",
    "UnsupportedError",
    "UsageError",
    "ZooError",
)
_HOMES = {
    "Coefficients": "subspace.coefficients",
    "Merged": "merge.merged",
    "RebuiltModel": "subspace.rebuilt",
    "Router": "routing.router",
    "Routing": "routing.routing",
    "Subspace": "subspace.subspace",
    "Zoo": "zoo.zoo",
    "Evidence": "evidence.evidence",
    "evaluate": "evidence.function",
    "evidence": "evidence.evidence",
    "fit": "subspace.fitting.fit",
    "import_subspace": "subspace.imports.importing",
    "inspect": "zoo.inspection",
    "load": "subspace.bundles.loading",
    "merge": "merge.merging",
    "open_zoo": "zoo.zoo",
    "plan": "subspace.fitting.plan",
    "route": "routing.router",
    "verify_adapter": "zoo.adapter_verifying",
    **dict.fromkeys(_ERRORS, "errors"),
}

_ROOMS = ("adapt", "serve")
"""Packages that are used by their own name, such as `eigenzoo.serve.attach`."""

__all__ = [
    "BudgetError",
    "BundleError",
    "Coefficients",
    "DataError",
    "EigenzooError",
    "Evidence",
    "FormatError",
    "Merged",
    "MismatchError",
    "OutputError",
    "RankError",
    "RebuiltModel",
    "ResourceError",
    "Router",
    "Routing",
    "Subspace",
    "UnsafePathError",
    "UnsupportedError",
    "UsageError",
    "Zoo",
    "ZooError",
    "evaluate",
    "evidence",
    "fit",
    "import_subspace",
    "inspect",
    "load",
    "merge",
    "open_zoo",
    "plan",
    "route",
    "verify_adapter",
]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f"eigenzoo.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'eigenzoo' has no attribute {name!r}")
    return getattr(import_module(f"eigenzoo.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
