"""The methods of merging, a file for each kind. Importing this registers all of them, in the order of the documentation."""

from eigenzoo.errors import UsageError
from eigenzoo.merge.method import METHODS, Method
from eigenzoo.merge.methods import combinations, elementwise, from_data, spectral

__all__ = ["METHODS", "combinations", "elementwise", "find_method", "from_data", "spectral"]


def find_method(name: str) -> Method:
    """Return the method of this name; raises UsageError that lists all."""
    if name not in METHODS:
        raise UsageError(f"method {name[:40]!r} is unknown", rule=f"it is one of {', '.join(METHODS)}")
    return METHODS[name]
