"""What a user does who follows the advice of `verify`."""

from __future__ import annotations

import re
from collections.abc import Callable

NEXT = re.compile(
    r"\. ((?:Put|Cut|Take|Write|Set|Load) .*?)(?:\. Then |: then )[^.]*\.[^ ]* ?[^,]*, loading into .*, takes up all of them$"
)


def advice_in(faults: list[str]) -> str:
    """The one next step that verify says it has tried; empty where it has none."""
    found = [match[1] for fault in faults if (match := NEXT.search(fault))]
    assert len(found) <= 1, found
    return found[0] if found else ""


def renaming(advice: str) -> Callable[[str], str]:
    """What the words of an advice do to each key, read as a user reads them."""
    quoted = r"'([^']*)'"
    prefix, spelling, taken, begun = "", [], [], []
    for part in (advice[0].lower() + advice[1:]).split(", and "):
        if match := re.fullmatch(f"put {quoted} in the place of {quoted} in the keys that begin with it", part):
            begun.append((match[2], match[1]))
        elif match := re.fullmatch(f"cut {quoted} off the keys that begin with it", part):
            begun.append((match[1], ""))
        elif match := re.fullmatch(f"take {quoted} out of the keys", part):
            taken.append(match[1])
        elif match := re.fullmatch(f"put {quoted} before each key", part):
            prefix = match[1]
        elif match := re.fullmatch(f"write {quoted} for {quoted} in the keys", part):
            spelling.append((match[2], match[1]))
        else:
            raise AssertionError(f"nobody knows how to follow: {part}")

    def change(key: str) -> str:
        for old, new in (*spelling, *((part, "") for part in taken)):
            key = key.replace(old, new)
        key = next((new + key.removeprefix(old) for old, new in begun if key.startswith(old)), key)
        return prefix + key

    return change
