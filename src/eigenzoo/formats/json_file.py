"""JSON from files that others wrote: bounded in size and depth, without duplicate keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from eigenzoo.errors import FormatError
from eigenzoo.formats.paths import read_bounded
from eigenzoo.formats.stand_ins import START_BYTES, refuse_stand_in

MAX_CONFIG_BYTES = 16 * 2**20

MAX_VALUES = 4_000_000
"""Objects, lists and commas: twice what the header of the largest model has. Each may cost 70 bytes once it is an object."""


def read_json(path: Path, *, where: str, max_bytes: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """Read a JSON object from a file; anything else raises FormatError with `where` in it."""
    return parse_json(read_bounded(path, max_bytes, where=where), where=where)


def parse_json(data: bytes, *, where: str) -> dict[str, Any]:
    """Parse a JSON object; duplicate keys are refused, since two readers could each believe another one.

    >>> parse_json(b'{"r": 8}', where="adapter_config.json")
    {'r': 8}
    """
    if sum(map(data.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise FormatError(f"the JSON has more than {MAX_VALUES} values", where=where)
    try:
        document = json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except RecursionError as error:
        raise FormatError("the JSON is nested too deeply", where=where) from error
    except ValueError as error:
        refuse_stand_in(data[:START_BYTES], where)
        # UnicodeDecodeError and JSONDecodeError are ValueErrors too
        raise FormatError(f"this is not valid JSON ({_short(str(error))})", where=where) from error
    if not isinstance(document, dict):
        raise FormatError(f"this is a JSON {type(document).__name__}", where=where, rule="a JSON object is expected")
    return document


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for name, value in pairs:
        if name in entries:
            raise ValueError(f"the key {_short(name)!r} occurs twice")
        entries[name] = value
    return entries


def _short(text: str) -> str:
    return text if len(text) <= 200 else text[:200] + "…"
