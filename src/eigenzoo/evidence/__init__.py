"""Test a zoo for a shared subspace with controls. Each control returns a record, and `evidence` runs all of them.

The package and its main function have the same name: `eigenzoo.evidence(zoo)` calls `eigenzoo.evidence.evidence.evidence`. `help`
and `inspect.signature` of the package show that function's docstring and signature.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

_ROOM = __doc__


class _Room(ModuleType):
    """A callable package, because importing any of its files replaces the public function by the package."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        return _function()(*args, **options)

    @property
    def __signature__(self) -> inspect.Signature:
        """The public function's signature, which `inspect.signature` asks for."""
        return inspect.signature(_function())

    @property
    def __doc__(self) -> str:  # type: ignore[override]
        """The public function's docstring. `help` of a module prints no signature, so the signature is part of it."""
        function = _function()
        first, _, rest = (inspect.getdoc(function) or "").partition("\n\n")
        return f"{first}\n\n{_call(inspect.signature(function))}\n\n{rest}\n\n{_ROOM}"


def _function() -> Callable[..., Any]:
    # Importing the package is fast. torch is imported when the function is called or shown.
    from eigenzoo.evidence.evidence import evidence

    return evidence


def _call(signature: inspect.Signature) -> str:
    """Write a call with one parameter a line."""
    lines = [f"    {parameter}," for parameter in signature.parameters.values()]
    kinds = [parameter.kind for parameter in signature.parameters.values()]
    lines.insert(kinds.index(inspect.Parameter.KEYWORD_ONLY), "    *,")
    return "\n".join(["evidence(", *lines, f") -> {signature.return_annotation}"])


sys.modules[__name__].__class__ = _Room
