"""Packages that are called like their main function, because both have one name.

`eigenzoo.evidence(zoo)` calls `eigenzoo.evidence.evidence.evidence`. `help` and `inspect.signature` of the package show that
function's docstring and signature.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any


def make_callable(package: str, home: str) -> None:
    """Make an imported package callable: its function is that of its last name in its module `home`.

    Importing any file of a package replaces a function of the package's name in the package above, so the package itself has to be
    callable. The function's module is imported when it is called or shown: importing the package is fast.
    """
    room = sys.modules[package]
    text = room.__doc__
    room.__class__ = _Room
    vars(room).update(_home=f"{package}.{home}", _text=text)


class _Room(ModuleType):
    _home: str
    _text: str

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._function()(*args, **options)

    @property
    def __signature__(self) -> inspect.Signature:
        """The public function's signature, which `inspect.signature` asks for."""
        return inspect.signature(self._function())

    @property
    def __doc__(self) -> str:  # type: ignore[override]
        """The public function's docstring. `help` of a module prints no signature, so the signature is part of it."""
        function = self._function()
        first, _, rest = (inspect.getdoc(function) or "").partition("\n\n")
        return f"{first}\n\n{_call(function)}\n\n{rest}\n\n{self._text}"

    def _function(self) -> Callable[..., Any]:
        function: Callable[..., Any] = getattr(import_module(self._home), self.__name__.rpartition(".")[2])
        return function


def _call(function: Callable[..., Any]) -> str:
    """Write a call with one parameter a line."""
    signature = inspect.signature(function)
    lines = [f"    {parameter}," for parameter in signature.parameters.values()]
    kinds = [parameter.kind for parameter in signature.parameters.values()]
    lines.insert(kinds.index(inspect.Parameter.KEYWORD_ONLY), "    *,")
    return "\n".join([f"{function.__name__}(", *lines, f") -> {signature.return_annotation}"])
