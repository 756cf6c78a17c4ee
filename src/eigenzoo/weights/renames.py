"""Find how the module names of an adapter differ from those of a base: a prefix, a part from a wrapper, or another name."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from eigenzoo.weights.roles import depth, role

LONGEST_NAME, MOST_PAIRS = 200, 2 * 10**7
"""Characters of a name that others are compared with, and pairs of characters that are compared in all."""

WRAPPERS = {
    "module": "DataParallel",
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "base_model": "PEFT",
}
"""Parts of names that wrappers put there, and whose they are."""

Accepts = Callable[[str, str], bool]
"""Tells whether a name of the adapter and a name of the base may be one module: by their shapes."""


@dataclass(frozen=True)
class Rename:
    """One change of names that makes all of them names of the base.

    Attributes:
        old: what names begin with now.
        new: what they would begin with.
        parts: the wrappers' parts that are taken out instead, wherever they stand.
    """

    old: str = ""
    new: str = ""
    parts: tuple[str, ...] = ()

    def __call__(self, name: str) -> str:
        """Return the changed name."""
        if self.parts:
            return ".".join(part for part in name.split(".") if part not in self.parts)
        return self.new + name.removeprefix(self.old)

    def __str__(self) -> str:
        if self.parts:
            return " and ".join(f"'{part}.' ({WRAPPERS[part]}) taken out of the names" for part in self.parts)
        if not self.old:
            return f"'{self.new}' before each name"
        whose = WRAPPERS.get(self.old.split(".")[0], "")
        old = f"'{self.old}'" + (f" ({whose})" if whose else "")
        return f"{old} replaced by '{self.new}'" if self.new else f"{old} cut off each name"


def find_rename(
    names: Sequence[str], base: Collection[str], accepts: Accepts, taken: Collection[str] = ()
) -> Rename | None:
    """Find one change of prefix, or of wrappers' parts, that makes every name one of the base that it may be.

    A change never leads to a name that is already `taken`, and never changes the number of a block: those are other layers. Of
    several, the smallest. Cost: names times those of the base that end as the first one does.
    """
    return next(_renames(names, base, accepts, taken), None)


def find_prefixes(names: Sequence[str], base: Collection[str], accepts: Accepts) -> list[Rename]:
    """Find the changes that only add a prefix to all names, or only cut one off, by the rule of `find_rename`.

    >>> find_prefixes(["a.w", "b.w"], ["bert.a.w", "bert.b.w", "head.w"], lambda name, other: True)
    [Rename(old='', new='bert.', parts=())]
    """
    changes = _renames(names, base, accepts, ())
    return [change for change in changes if not change.parts and not (change.old and change.new)]


def _renames(names: Sequence[str], base: Collection[str], accepts: Accepts, taken: Collection[str]) -> Iterator[Rename]:
    if not names:
        return
    candidates = [Rename(parts=_wrappers_of(names))] if _wrappers_of(names) else []
    first = names[0].split(".")
    ending = [other for other in base if other.rpartition(".")[2] == first[-1]]
    prefixes = {pair for other in ending if _keeps_numbers(*(pair := _differing(first, other.split("."))))}
    # The smallest change first: of two towers with the same block names, the one whose prefix is more similar.
    candidates += [Rename(*pair) for pair in sorted(prefixes, key=lambda pair: (len(pair[0]) + len(pair[1]), pair))]
    for change in candidates:
        if not all(name.startswith(change.old) for name in names):
            continue
        renamed = {change(name): name for name in names}
        apart = len(renamed) == len(set(names)) and renamed.keys().isdisjoint(taken)
        if apart and all(new in base and accepts(name, new) for new, name in renamed.items()):
            yield change


def beyond(names: Sequence[str], base: Collection[str]) -> list[str]:
    """Return the names that the base has for earlier blocks alone: those of a model of more layers.

    >>> beyond(["layers.0.q", "layers.2.q", "layers.2.k"], ["layers.0.q", "layers.1.q"])
    ['layers.2.q']
    """
    last: dict[str, int] = {}
    for name in base:
        number = depth(name)
        if number is not None:
            last[role(name)] = max(number, last.get(role(name), 0))
    return [name for name in names if (number := depth(name)) is not None and number > last.get(role(name), number)]


def _wrappers_of(names: Sequence[str]) -> tuple[str, ...]:
    parts = {part for name in names for part in name.split(".")}
    return tuple(part for part in WRAPPERS if part in parts and part != "base_model")


def _keeps_numbers(old: str, new: str) -> bool:
    """Tell whether two prefixes agree in a block's number. One of them may have none."""
    numbers = [[part for part in prefix.split(".") if part.isdigit()] for prefix in (old, new)]
    return numbers[0] == numbers[1] or not all(numbers)


def _differing(name: list[str], other: list[str]) -> tuple[str, str]:
    """Cut the longest common ending off two names. Return the remaining beginnings, with their dots."""
    common = 0
    while common < min(len(name), len(other)) and name[-1 - common] == other[-1 - common]:
        common += 1
    old, new = name[: len(name) - common], other[: len(other) - common]
    return ".".join([*old, ""]) if old else "", ".".join([*new, ""]) if new else ""


def nearest(name: str, base: Iterable[str], cutoff: float = 0.5) -> str | None:
    """Return the name of the base that is most like this one, by difflib's ratio; None where nothing is.

    The longer the name, the fewer of the base are looked at: a second or two at most.

    >>> nearest("layers.0.q_proj", ["layers.0.attn.q_proj", "layers.1.attn.q_proj", "norm"])
    'layers.0.attn.q_proj'
    """
    name = name[:LONGEST_NAME]
    close = difflib.get_close_matches(name, islice(base, MOST_PAIRS // max(len(name), 1) ** 2), 1, cutoff)
    return close[0] if close else None
