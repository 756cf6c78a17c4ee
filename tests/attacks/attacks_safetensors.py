"""Safetensors files whose header lies, and indexes whose shards do."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from attack_runner import EITHER, REFUSED, SAFE, Attack, Sandbox, Words
from safetensors.torch import load_file, save_file
from victims import use_model

Write = Callable[[Path], object]
ENTRY = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}


def raw(header: bytes, values: bytes = bytes(16), length: int | None = None) -> Write:
    """A file of these bytes; `length` is what it says of its header."""
    return lambda path: path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + values)


def entries(values: bytes = bytes(16), **tensors: Any) -> Write:
    """A file with a header of these entries."""
    return raw(json.dumps(tensors).encode(), values)


def one(**changes: Any) -> Write:
    """A file of one tensor, its entry changed."""
    return entries(w={**ENTRY, **changes})


def sparse(header: bytes, num_bytes: int) -> Write:
    """A file that is long and takes no room."""

    def write(path: Path) -> None:
        raw(header, b"")(path)
        os.truncate(path, num_bytes)

    return write


def many(num: int) -> bytes:
    """A header of many empty tensors."""
    return (
        b"{"
        + b",".join(b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % number for number in range(num))
        + b"}"
    )


def long(header: Callable[[], bytes]) -> Write:
    """A file of such a header, which is made when it is written: every run of the tests imports this list."""
    return lambda path: raw(header(), b"")(path)


def dotted(num: int) -> bytes:
    """A header of names of two hundred parts each, nearly all of them different."""
    names = (".".join(f"{number}_{part}" for part in range(200))[:1000] for number in range(num))
    entry = json.dumps({**ENTRY, "shape": [0], "data_offsets": [0, 0]})
    return ("{" + ",".join(f'"{name}.x":{entry}' for name in names) + "}").encode()


HEADERS: dict[str, Write] = {
    "a length of 2^63": raw(json.dumps({"w": ENTRY}).encode(), length=2**63),
    "a length of 2^64 - 1": raw(json.dumps({"w": ENTRY}).encode(), length=2**64 - 1),
    "a length beyond the file": raw(json.dumps({"w": ENTRY}).encode(), length=10_000),
    "a length of nothing": raw(b"", b"", 0),
    "a header of 100 MB": sparse(b"{" + b" " * 100, 10**8),
    "a header of 100 MB, said and true": lambda path: (
        path.write_bytes(struct.pack("<Q", 10**8)),
        os.truncate(path, 10**8 + 8),
    ),
    "a header of 32 MB of brackets": long(lambda: b'{"w":[' + b"[]," * 10**7 + b"[]]}"),
    "a header of 30 MB of short texts": long(lambda: b'{"w":[' + b'"ab",' * 6 * 10**6 + b'""]}'),
    "a hundred thousand levels": raw(b'{"w":' * 100_000 + b"1" + b"}" * 100_000, b""),
    "names of two hundred parts": long(lambda: dotted(25_000)),
    "a million tensors": long(lambda: many(600_000)),
    "a list": raw(b"[1, 2]"),
    "a number of 5000 digits": raw(b'{"w": ' + b"9" * 5000 + b"}"),
    "invalid UTF-8": raw(b'{"\xff\xfe": ' + json.dumps(ENTRY).encode() + b"}"),
    "a key twice": raw(b'{"w": %b, "w": %b}' % ((json.dumps(ENTRY).encode(),) * 2)),
    "metadata that is no text": entries(w=ENTRY, __metadata__={"format": {"deep": 1}}),
    "metadata that is a list": entries(w=ENTRY, __metadata__=["pt"]),
    "overlapping tensors": entries(bytes(24), a=ENTRY, b={**ENTRY, "data_offsets": [8, 24]}),
    "one range for two tensors": entries(a=ENTRY, b=ENTRY),
    "a hole": entries(bytes(40), a=ENTRY, b={**ENTRY, "data_offsets": [24, 40]}),
    "offsets beyond the file": one(shape=[400], data_offsets=[0, 1600]),
    "offsets of 2^63": one(shape=[2**61], data_offsets=[0, 2**63]),
    "offsets of 2^64 and more": one(shape=[2**63], data_offsets=[0, 2**65]),
    "negative offsets": one(data_offsets=[-16, 0]),
    "offsets from back to front": one(data_offsets=[16, 0]),
    "fractions as offsets": one(data_offsets=[0.0, 16.0]),
    "texts as offsets": one(data_offsets=["0", "16"]),
    "three offsets": one(data_offsets=[0, 8, 16]),
    "true as an offset": one(shape=[True], data_offsets=[0, 4]),
    "an unknown dtype": one(dtype="F1024"),
    "a dtype that is a list": one(dtype=["F32"]),
    "a dtype of four bits": one(dtype="F4", shape=[32]),
    "a negative shape": one(shape=[-2, -2]),
    "a shape whose product overflows": one(shape=[2**32, 2**32], data_offsets=[0, 0]),
    "a shape whose bytes overflow": one(shape=[2**62], data_offsets=[0, 0]),
    "a shape of a terabyte": one(shape=[2**38], data_offsets=[0, 2**40]),
    "zero beside huge sizes": one(shape=[0, 2**62, 2**62], data_offsets=[0, 0]),
    "a shape of a thousand ones": one(shape=[1] * 998 + [2, 2]),
    "a shape that is a text": one(shape="4"),
    "another key": one(stride=[1]),
    "no shape": entries(w={"dtype": "F32", "data_offsets": [0, 16]}),
    "bytes after the end": raw(json.dumps({"w": ENTRY}).encode(), bytes(100)),
    "empty": lambda path: path.write_bytes(b""),
    "seven bytes": lambda path: path.write_bytes(bytes(7)),
    "a zip file": lambda path: path.write_bytes(b"PK\x03\x04" + bytes(100)),
    "a tar file": lambda path: path.write_bytes(b"archive/".ljust(257, b"\0") + b"ustar\0" + bytes(200)),
}

FINE: dict[str, Write] = {
    "a name of a megabyte": raw(b'{"' + b"n" * 10**6 + b'": ' + json.dumps(ENTRY).encode() + b"}"),
    "no tensors": raw(b"{}", b""),
    "a tensor of no values": one(shape=[0, 3], data_offsets=[0, 0]),
}
"""What the format allows, odd as it is: a model with these has to do no harm."""


def model(write: Write, thorough: bool | None = None) -> Callable[[Sandbox], Sequence[Words]]:
    """A checkpoint of one such file."""

    def build(sandbox: Sandbox) -> Sequence[Words]:
        folder = sandbox.files / "evil"
        folder.mkdir()
        write(folder / "model.safetensors")
        return use_model(sandbox, folder, thorough=thorough)

    return build


def adapter(write: Write) -> Callable[[Sandbox], Sequence[Words]]:
    """An adapter of one such file."""

    def build(sandbox: Sandbox) -> Sequence[Words]:
        folder = sandbox.copy("adapters") / "m3"
        write(folder / "adapter_model.safetensors")
        return use_model(sandbox, folder, kind="adapters")

    return build


def long_updates(outputs: int, inputs: int, rank: int) -> Callable[[Sandbox], Sequence[Words]]:
    """An adapter of one layer whose sparse file takes no room, and whose answers to random inputs would take gigabytes."""

    def build(sandbox: Sandbox) -> Sequence[Words]:
        folder = sandbox.files / "evil"
        folder.mkdir()
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["q"]}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        middle, end = 4 * rank * inputs, 4 * rank * (inputs + outputs)
        factors = {
            "base_model.model.q.lora_A.weight": {**ENTRY, "shape": [rank, inputs], "data_offsets": [0, middle]},
            "base_model.model.q.lora_B.weight": {**ENTRY, "shape": [outputs, rank], "data_offsets": [middle, end]},
        }
        header = json.dumps(factors).encode()
        sparse(header, 8 + len(header) + end)(folder / "adapter_model.safetensors")
        return [("inspect", folder)]

    return build


def sharded(
    change: Callable[[dict[str, str], Path, Sandbox], object], thorough: bool | None = None
) -> Callable[[Sandbox], Sequence[Words]]:
    """A checkpoint of two shards, its index changed."""

    def build(sandbox: Sandbox) -> Sequence[Words]:
        folder = sandbox.copy("zoo") / "m3"
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        shards = {name: f"model-{place:05}-of-00002.safetensors" for place, name in enumerate(sorted(tensors), 1)}
        for name, shard in shards.items():
            save_file({name: tensors[name]}, folder / shard, {"format": "pt"})
        change(shards, folder, sandbox)
        index = folder / "model.safetensors.index.json"
        if not index.exists():
            index.write_text(json.dumps({"metadata": {}, "weight_map": shards}))
        return use_model(sandbox, folder, thorough=thorough)

    return build


def moved(name: str) -> Callable[[dict[str, str], Path, Sandbox], object]:
    """A shard that the index says lies elsewhere, where there is a sound one."""

    def change(shards: dict[str, str], folder: Path, sandbox: Sandbox) -> None:
        away = folder.parent / "away.safetensors"
        (folder / shards["block.bias"]).rename(away)
        shards["block.bias"] = name.replace("AWAY", str(away))

    return change


def linked(shards: dict[str, str], folder: Path, sandbox: Sandbox) -> None:
    """A shard that is a link out of the folder."""
    away = sandbox.root / "files" / "away.safetensors"
    (folder / shards["block.bias"]).rename(away)
    (folder / shards["block.bias"]).symlink_to(away)


def write_index(text: str) -> Callable[[dict[str, str], Path, Sandbox], object]:
    """An index of other text."""
    return lambda shards, folder, sandbox: (folder / "model.safetensors.index.json").write_text(text)


INDEXES: dict[str, Callable[[dict[str, str], Path, Sandbox], object]] = {
    "a shard above": moved("../away.safetensors"),
    "a shard by an absolute path": moved("AWAY"),
    "a shard above, by a detour": moved("x/../../away.safetensors"),
    "a shard by a link": linked,
    "a shard that is missing": lambda shards, folder, sandbox: (folder / shards["block.bias"]).unlink(),
    "a shard that nothing lists": lambda shards, folder, sandbox: shards.pop("block.bias"),
    "all tensors in one shard": lambda shards, folder, sandbox: shards.update(
        dict.fromkeys(shards, shards["block.bias"])
    ),
    "a shard with a zero byte": moved("a\0b.safetensors"),
    "a shard that is the index": moved("model.safetensors.index.json"),
    "a shard that is the folder": moved("."),
    "a shard of a long name": moved("a" * 5000),
    "a shard that is a pipe": lambda shards, folder, sandbox: (
        (folder / shards["block.bias"]).unlink(),
        os.mkfifo(folder / shards["block.bias"]),
    ),
    "no map": write_index('{"metadata": {}}'),
    "a map of numbers": write_index('{"weight_map": {"block.bias": 1}}'),
    "an empty map": write_index('{"weight_map": {}}'),
    "a map of a hundred thousand shards": write_index(
        json.dumps({"weight_map": {str(number): f"{number}.safetensors" for number in range(100_000)}})
    ),
    "an index of 15 MB of brackets": write_index('{"weight_map": [' + "[]," * 5 * 10**6 + "[]]}"),
    "an index of 20 MB": write_index('{"weight_map": {}}' + " " * 20 * 2**20),
}

ATTACKS = [
    *(
        Attack(f"safetensors header: {what}", model(write, True if what == "a hole" else None))
        for what, write in HEADERS.items()
    ),
    *(Attack(f"safetensors, odd and allowed: {what}", model(write), EITHER) for what, write in FINE.items()),
    *(
        Attack(f"adapter's safetensors header: {what}", adapter(HEADERS[what]))
        for what in ("a length of 2^63", "a shape whose product overflows", "overlapping tensors")
    ),
    *(
        Attack(
            f"index: {what}",
            sharded(change, False if what in ("a shard that nothing lists", "a shard above") else None),
            EITHER if what == "a shard that nothing lists" else REFUSED,
        )
        for what, change in INDEXES.items()
    ),
    Attack("updates: of 2^26 outputs", long_updates(2**26, 1, 1), SAFE),
    Attack("updates: of 2^27 inputs", long_updates(1, 2**27, 1), SAFE),
    Attack("updates: of rank 2^25", long_updates(1, 1, 2**25), SAFE),
    Attack("index: sound, as the control", sharded(lambda shards, folder, sandbox: None, False), SAFE),
]
