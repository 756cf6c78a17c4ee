"""Import a module after another library is imported, by a finder for its name. The library need not be installed."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

from eigenzoo.errors import EigenzooError


def when_imported(library: str, module: str) -> None:
    """Import one of our modules as soon as a library is imported, or now if it already is.

    If our module does not support the library's version, that is a warning, and the library still works.
    """
    if sys.modules.get(library) is not None:
        _follow(library, module)
    else:
        sys.meta_path.insert(0, _Finder(library, module))


def _follow(library: str, module: str) -> None:
    try:
        importlib.import_module(module)
    except EigenzooError as error:
        name = library.upper()
        warnings.warn(f"eigenzoo cannot be a method of this {name}: {error}", RuntimeWarning, stacklevel=2)


class _Finder(MetaPathFinder):
    """Finds one library like the other finders, with a loader that also imports our module."""

    def __init__(self, library: str, module: str) -> None:
        self._library, self._module = library, module

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return the library's spec; None for other modules, or if it is not installed."""
        if name != self._library:
            return None
        sys.meta_path.remove(self)
        try:
            spec = find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self, self._library, self._module)
        return spec


class _Loader(Loader):
    """Another loader, and an import after it."""

    def __init__(self, loader: Loader, finder: _Finder, library: str, module: str) -> None:
        self._loader, self._finder, self._library, self._module = loader, finder, library, module

    def __getattr__(self, name: str) -> object:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Create the module with the library's own loader."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run the library, then our module, and remove the finder."""
        # Code that inspects the module's loader later must see the library's own.
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
        _follow(self._library, self._module)
