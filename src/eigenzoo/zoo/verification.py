"""Results of checks of a bundle or an adapter: frozen records that read as a sequence of faults."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from eigenzoo.display import counted, html_table, one_line
from eigenzoo.formats.model import Model
from eigenzoo.zoo.adapter import Adapter

MUCH = 1.0
"""A change that outweighs what the layer itself answers: trained updates mostly stay well below."""

ABSURD = 100.0
"""A change of so many times what the layer itself answers leaves nothing of the base."""

MOST_FAULTS = 5
"""Faults that `repr` shows."""

NEGLIGIBLE = 1e-6
"""A change below this share of what the layer answers: less than float32 rounds away over a layer's sum."""


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        name: what was checked, in two or three words.
        detail: of what, and how much of it; true of what failed, too.
        faults: why it failed; none where it held.
        notes: what a reader should know, and what fails nothing.
        done: whether it was made at all; a note, or a fault of a check before it, says why not.
    """

    name: str
    detail: str
    faults: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    done: bool = True

    @property
    def ok(self) -> bool:
        """Whether it held, as far as it was made."""
        return not self.faults


def checked(name: str, passed: str, faults: Iterable[str], failed: str = "", notes: Iterable[str] = ()) -> Check:
    """Make a check. Its detail is `passed` if there are no faults; otherwise `failed`, or the number of faults."""
    listed = tuple(faults)
    detail = passed if not listed else failed or f"faults: {len(listed)}"
    return Check(name, detail, listed, tuple(notes))


@dataclass(frozen=True)
class LayerChange:
    """One layer beside its base.

    Attributes:
        base: the tensor of the base that it changes; None where there is none.
        change: ‖s·B·A·x‖ / ‖W·x‖ for random x (of full weights, the mean's ‖M − W‖ / ‖W‖); None where it cannot be said.
    """

    base: str | None
    change: float | None


@dataclass(frozen=True)
class Loading:
    """What a library does with an adapter when it loads it into a base; see `eigenzoo.integrations.dry_loading`.

    Attributes:
        what: which library, and into what.
        names: what it calls the tensors of the base's files in memory.
        modules: the modules in memory that each loaded tensor of the adapter goes to.
        dropped: the adapter's tensors that it does not take up.
        missing: the tensors that it looks for in vain.
        error: why it refuses the adapter altogether; empty where it does not.
        note: what a reader should know of how it was loaded.
        advice: another way to load the base, by which it takes up everything; empty where none was found.
    """

    what: str
    names: Mapping[str, str]
    modules: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    error: str = ""
    note: str = ""
    advice: str = ""

    @property
    def is_whole(self) -> bool:
        """Whether every tensor of the adapter is taken up."""
        return not self.error and not self.dropped


Loader = Callable[[Model, Adapter], Loading | str]
"""Called as loader(base, adapter); a text says why the library could not be asked."""

LOADING = "loading"
"""The name of the check that decides whether an adapter takes effect on a base."""


@dataclass(frozen=True)
class Verification:
    """All checks of one bundle or adapter; iterating over it gives the faults.

    Attributes:
        path: what was checked.
        kind: `bundle` or `adapter`.
        against: the base, where one was given.
        checks: in the order in which they were made.
        changes: by model (of an adapter: its name; of a bundle of full weights: `mean`) and layer.
    """

    path: str
    kind: str
    against: str | None
    checks: tuple[Check, ...]
    changes: Mapping[str, Mapping[str, LayerChange]] = field(default_factory=dict)

    @property
    def faults(self) -> tuple[str, ...]:
        """Why checks failed."""
        return tuple(fault for check in self.checks for fault in check.faults)

    @property
    def notes(self) -> tuple[str, ...]:
        """What fails nothing and should be known."""
        return tuple(note for check in self.checks for note in check.notes)

    @property
    def undecided(self) -> bool:
        """Whether no check failed, and the one that decides was not made: no library has loaded the adapter."""
        return not self.faults and any(check.name == LOADING and not check.done for check in self.checks)

    @property
    def ok(self) -> bool | None:
        """Whether every check held; None where that is undecided."""
        return None if self.undecided else not self.faults

    @property
    def typical_change(self) -> float | None:
        """The median change over all layers of all models; None where none is known."""
        changes = [layer.change for layers in self.changes.values() for layer in layers.values()]
        return median(finite) if (finite := [change for change in changes if change is not None]) else None

    def __repr__(self) -> str:
        against = "" if self.against is None else f", against={self.against!r}"
        number = counted(len(self.faults), "fault")
        answer = "undecided" if self.undecided else number if self.faults else "ok"
        lines = [
            f"Verification({self.path!r}, kind={self.kind!r}, {counted(len(self.checks), 'check')}{against}): {answer}"
        ]
        lines += self.faults[:MOST_FAULTS]
        if len(self.faults) > MOST_FAULTS:
            lines.append(f"and {len(self.faults) - MOST_FAULTS} more: iterate over the record")
        return "\n".join(map(one_line, lines))

    def _repr_html_(self) -> str:
        rows = [
            (check.name, ("ok" if check.ok else "failed") if check.done else "not made", check.detail)
            for check in self.checks
        ]
        return html_table(
            repr(self).partition("\n")[0], ("check", "answer", "detail"), rows, note=" ".join(self.faults)
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self.faults)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as `eigenzoo verify --json` prints them."""
        return {
            self.kind: self.path,
            "against": self.against,
            "ok": self.ok,
            "faults": list(self.faults),
            "notes": list(self.notes),
            "checks": [
                {
                    "name": check.name,
                    "ok": check.ok,
                    "done": check.done,
                    "detail": check.detail,
                    "faults": list(check.faults),
                    "notes": list(check.notes),
                }
                for check in self.checks
            ],
            "typical_change": self.typical_change,
            "changes": {
                model: {name: {"base": layer.base, "change": layer.change} for name, layer in layers.items()}
                for model, layers in self.changes.items()
            },
        }
