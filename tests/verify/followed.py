"""What a user does who follows the advice of `verify`."""

from __future__ import annotations

import re
from collections.abc import Callable

NEXT = re.compile(r"\. ((?:Put|Cut|Take|Write|Set|Load) .*?)(?:\. Then |: then )[^.]*\.[^ ]* ?[^,]*, loading into .*, takes up all of them$")


def advice_in(faults: list[str]) -> str:
    """The one next step that verify says it has tried; empty where it has none."""
    found = [match[1] for fault in faults if (match := NEXT.search(fault))]
    assert len(found) <= 1, found
    return found[0] if found else ""


def renaming(advice: str) -> Callable[[str], str]:
    """What the words of an advice do to each key, read as a user reads them."""
    quoted = r"'([^']*)'"
    if match := re.fullmatch(f"Put {quoted} in the place of {quoted} in the keys that begin with it", advice):
        new, old = match.groups()
        return lambda key: new + key.removeprefix(old) if key.startswith(old) else key
    if match := re.fullmatch(f"Cut {quoted} off the keys that begin with it", advice):
        return lambda key: key.removeprefix(match[1])
    if match := re.fullmatch(f"Take {quoted} out of the keys", advice):
        return lambda key: key.replace(match[1], "")
    prefix, spelling, rest = "", [], advice[0].lower() + advice[1:]
    for part in rest.split(" and "):
        if match := re.fullmatch(f"put {quoted} before each key", part):
            prefix = match[1]
        elif match := re.fullmatch(f"write {quoted} for {quoted} in the keys", part):
            spelling.append(match.groups())
        else:
            raise AssertionError(f"nobody knows how to follow: {advice}")

    def change(key: str) -> str:
        for new, old in spelling:
            key = key.replace(old, new)
        return prefix + key

    return change
