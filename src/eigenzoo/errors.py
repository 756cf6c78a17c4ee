"""Every error that eigenzoo raises on purpose.

    EigenzooError
    ├── UsageError          an option or argument that cannot be meant
    │   ├── RankError       a rank that the stack cannot have
    │   └── BudgetError     a byte budget or an error bound that no rank can meet
    ├── OutputError         an output that exists already or cannot be written
    ├── FormatError         a file that is not what its format says
    │   ├── UnsupportedError    a valid file of a kind that is refused by rule
    │   └── UnsafePathError     a path that leads out of the model's own folder
    ├── ZooError            models that do not make one zoo
    │   └── MismatchError   layers that differ between models
    ├── DataError           values that no subspace can be fitted to (NaN, Inf)
    ├── BundleError         a bundle that is damaged or of another version
    └── ResourceError       not enough memory, on the machine or on a GPU

Each message says what, where, the rule, and the next step. Low rooms raise with the facts that they know;
whoever knows the model and the layer adds them once, as `where`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any


def install(extra: str) -> str:
    """Say how to install an extra; eigenzoo is installed from its checkout.

    >>> install("report")
    "in eigenzoo's checkout run: pip install -c constraints.txt -e '.[report]'"
    """
    return f"in eigenzoo's checkout run: pip install -c constraints.txt -e '.[{extra}]'"


def require(*libraries: str, where: str, extra: str) -> None:
    """Raise UsageError that names the extra where one of these libraries is not installed."""
    missing = [name for name in libraries if find_spec(name) is None]
    if missing:
        raise UsageError(f"not installed: {', '.join(missing)}", where=where, next_step=install(extra))


class EigenzooError(Exception):
    """Base class of all deliberate errors of eigenzoo.

    `what` is the fact, `where` the model, layer or file, `rule` what was expected, `next_step` what to do.
    """

    def __init__(self, what: str, *, where: str = "", rule: str = "", next_step: str = "") -> None:
        self.what, self.where, self.rule, self.next_step = what, where, rule, next_step
        super().__init__(what, where, rule, next_step)

    def __reduce__(self) -> tuple[Callable[..., EigenzooError], tuple[Any, ...]]:
        # An exception is rebuilt from positional arguments; without this, one of another process would arrive as a TypeError.
        return _rebuilt, (type(self), *self.args)

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        for part in (self.rule, self.next_step):
            if part:
                text = f"{text.rstrip('.')}. {part[0].upper()}{part[1:]}"
        # Half surrogates, of odd file names or spelt in JSON, can be neither printed nor logged as they are.
        text = text.encode("utf-8", "backslashreplace").decode("utf-8")
        return text if text.endswith((".", "?")) else f"{text}."

    def at(self, where: str) -> EigenzooError:
        """Return the same error with its location. A location that the error already has follows it."""
        place = f"{where}, {self.where}" if self.where else where
        return type(self)(self.what, where=place, rule=self.rule, next_step=self.next_step)


def _rebuilt(kind: type[EigenzooError], what: str, where: str, rule: str, next_step: str) -> EigenzooError:
    return kind(what, where=where, rule=rule, next_step=next_step)


class UsageError(EigenzooError):
    """An invalid option or argument."""


class RankError(UsageError):
    """A rank that the stack cannot have."""


class BudgetError(UsageError):
    """A byte budget or an error bound that no rank can meet."""


class OutputError(EigenzooError):
    """An output that exists already or cannot be written."""


class FormatError(EigenzooError):
    """A file that violates its format."""


class UnsupportedError(FormatError):
    """A valid file of an unsupported kind."""


class UnsafePathError(FormatError):
    """A path that leads out of the model's own folder."""


class ZooError(EigenzooError):
    """Models that do not form one zoo."""


class MismatchError(ZooError):
    """Layers that differ between the models of a zoo."""


class DataError(EigenzooError):
    """Values to which no subspace can be fitted."""


class BundleError(EigenzooError):
    """A bundle that is damaged, incomplete or of another version."""


class ResourceError(EigenzooError):
    """Not enough memory, on the machine or on a GPU, or too many requests at once."""
