"""Changes of an input that get past its outermost check: JSON stays JSON, and a safetensors header keeps its length.

All draws come from one `random.Random`, so that an input follows from a seed.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from random import Random
from typing import Any

JSON, SAFETENSORS, TEXT, BYTES = "json", "safetensors", "text", "bytes"

MAX_BYTES = 2**16

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 7, 255, 2**31, 2**31 - 1, 2**32, 2**62, 2**63, 2**64, 10**40, -(2**63)),
    *(0.0, -0.5, 0.95, 1.5, 1e308, -1e308, 1e-320, float("nan"), float("inf")),
    *[
        ".",
        "..",
        "../x",
        "/etc/passwd",
        "a/b",
        "C:\\x",
        "m0",
        "model.safetensors",
        "LORA",
        "F32",
        "F64",
        "BF16",
        "F4",
        "I64",
        "BOOL",
    ],
    *["models", "outputs", "inputs", "flat", "tucker", "stacked"],
    *("", "\0", "\x1b[2J", "\ud800", "é" * 300, "0" * 64),
    *([], {}, [0], [1, 1], [2**40], [0, 2**62], [[]], {"a": 1}, {"": None}),
)
WORDS = (
    *[
        "*",
        "**",
        "?",
        "[",
        "]",
        "[!a-",
        "{",
        "}",
        "..",
        "/",
        "\\",
        "~",
        "#",
        "://",
        "::",
        "@",
        "%",
        "=",
        ",",
        "-",
        "+",
        ".",
    ],
    *["1e999", "nan", "inf", "0x10", "²", "٣", "GB", "KiB", "auto", "m0", ".txt", "é"],
    *("\0", "\n", "\r\n", "\ud800", "\ufeff", "9" * 400),
)

Bytewise = Callable[[bytes], bytes]


def mutate(data: bytes, kind: str, random: Random, bytewise: Bytewise | None = None) -> bytes:
    """Return a changed input; `bytewise` changes bytes without knowledge of what they mean."""
    bytewise = bytewise or (lambda given: _bytewise(given, random))
    if kind == SAFETENSORS and len(data) >= 8 and random.random() < 0.9:
        return _safetensors(data, random, bytewise)[:MAX_BYTES]
    if kind == JSON and random.random() < 0.7:
        return _json(data, random, bytewise)[:MAX_BYTES]
    if kind == TEXT and random.random() < 0.5:
        return _text(data, random)[:MAX_BYTES]
    return bytewise(data)[:MAX_BYTES]


def _safetensors(data: bytes, random: Random, bytewise: Bytewise) -> bytes:
    """Change the header, or the values, and make the length before the header fit."""
    length = min(int.from_bytes(data[:8], "little"), len(data) - 8)
    header, values = data[8 : 8 + length], data[8 + length :]
    choice = random.random()
    if choice < 0.6:
        header = _json(header, random, bytewise)
    elif choice < 0.75:
        header, values = _resize(header, values, random)
    elif choice < 0.85:
        header = bytewise(header)
    else:
        values = bytewise(values)
    return len(header).to_bytes(8, "little") + header + values


def _resize(header: bytes, values: bytes, random: Random) -> tuple[bytes, bytes]:
    """Give a tensor another shape or dtype, and all tensors offsets that fit: the format is kept, what is meant is not."""
    sizes = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "U8": 1, "BOOL": 1, "F8_E4M3": 1}
    try:
        document = json.loads(header)
        names = [name for name in document if name != "__metadata__"]
        entry = document[random.choice(names)]
        if random.random() < 0.5:
            entry["dtype"] = random.choice(list(sizes))
        else:
            entry["shape"] = [random.choice([0, 1, 2, 3, 5, 7, 2**40]) for _ in range(random.randrange(4))]
        end = 0
        for name in names:
            start, count = end, sizes[document[name]["dtype"]]
            for size in document[name]["shape"]:
                count = min(count * int(size), 2**64)
            end += count
            document[name]["data_offsets"] = [start, end]
        return json.dumps(document).encode(), (values * (1 + min(end, MAX_BYTES) // max(len(values), 1)))[
            : min(end, MAX_BYTES)
        ]
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError):
        return header, values


def _json(data: bytes, random: Random, bytewise: Bytewise) -> bytes:
    """Change one place of a document; what is none is changed byte by byte."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return bytewise(data)
    places = _places(document)
    if not places:
        return bytewise(data)
    for _ in range(random.choice([1, 1, 1, 2, 3])):
        holder, key = random.choice(places)
        if (isinstance(holder, dict) and key not in holder) or (isinstance(holder, list) and key >= len(holder)):
            continue
        _change(holder, key, random, places)
    try:
        return json.dumps(document, ensure_ascii=random.random() < 0.9).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):
        return bytewise(data)


def _change(holder: Any, key: Any, random: Random, places: list[tuple[Any, Any]]) -> None:
    choice = random.randrange(7)
    if choice == 0:
        del holder[key]
    elif choice == 1:
        other, name = random.choice(places)
        try:
            holder[key] = copy.deepcopy(other[name])
        except LookupError:
            return
    elif choice == 2 and isinstance(holder, dict):
        holder[str(random.choice(VALUES))] = holder.pop(key)
    elif choice == 3 and isinstance(holder, list):
        holder.insert(key, copy.deepcopy(holder[key]))
    elif choice == 4 and isinstance(holder[key], int | float):
        holder[key] = random.choice(
            [holder[key] + 1, holder[key] - 1, -holder[key], float(holder[key] % 2**53), str(holder[key])]
        )
    elif choice == 5 and isinstance(holder[key], str):
        holder[key] = _text(holder[key].encode("utf-8", "replace"), random).decode("utf-8", "replace")
    else:
        holder[key] = copy.deepcopy(random.choice(VALUES))


def _places(document: Any) -> list[tuple[Any, Any]]:
    """Every place of a document that holds a value: its holder, and its key there."""
    found: list[tuple[Any, Any]] = []
    holders = [document]
    while holders:
        holder = holders.pop()
        keys: Any = list(holder) if isinstance(holder, dict) else range(len(holder)) if isinstance(holder, list) else ()
        for key in keys:
            found.append((holder, key))
            if isinstance(holder[key], dict | list):
                holders.append(holder[key])
    return found


def _text(data: bytes, random: Random) -> bytes:
    place = random.randrange(len(data) + 1)
    gone = random.choice([0, 0, 1, 5])
    return data[:place] + random.choice(WORDS).encode("utf-8", "surrogatepass") + data[place + gone :]


def _bytewise(data: bytes, random: Random) -> bytes:
    for _ in range(random.choice([1, 1, 2, 4])):
        place, choice = random.randrange(len(data) + 1), random.randrange(4)
        some = bytes(
            random.choice([0, 1, 0x7F, 0x80, 0xFF, random.randrange(256)]) for _ in range(random.choice([1, 1, 2, 8]))
        )
        if choice == 0:
            data = data[:place] + some + data[place:]
        elif choice == 1:
            data = data[:place] + some + data[place + len(some) :]
        elif choice == 2:
            data = data[:place] + data[place + random.choice([1, 2, 8, 100]) :]
        else:
            data = data[:place] + data[place : place + 16] + data[place:]
    return data
