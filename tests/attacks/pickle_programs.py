"""Pickles written by hand: instructions of the attacker's choice, in each of the forms that torch.load reads."""

from __future__ import annotations

import io
import os
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class Canary:
    """Makes a file when it is unpickled by Python's own pickle."""

    def __init__(self, path: Path) -> None:
        self.command = f"touch {path}"

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def text(value: str) -> bytes:
    """A string, by the opcode that torch knows."""
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def name(path: str) -> bytes:
    """A global, `module name`."""
    module, _, attribute = path.rpartition(".")
    return b"c" + f"{module}\n{attribute}\n".encode()


def number(value: int) -> bytes:
    """An integer of any size."""
    data = pickle.encode_long(value)
    return b"\x8a" + bytes([len(data)]) + data


def storage(key: str, numel: int, *, old: bool = False) -> bytes:
    """A storage by its persistent id; the form before zip files says of what it is a view, or None."""
    view = b"N" if old else b""
    return b"(" + text("storage") + name("torch.FloatStorage") + text(key) + text("cpu") + number(numel) + view + b"tQ"


def tensor(
    numel: int,
    size: Sequence[int],
    stride: Sequence[int],
    offset: int = 0,
    key: str = "0",
    function: str = "_rebuild_tensor_v2",
    old: bool = False,
) -> bytes:
    """A tensor as torch writes it, with sizes of the attacker's choice."""

    def ints(values: Sequence[int]) -> bytes:
        return b"(" + b"".join(map(number, values)) + b"t"

    hooks = name("collections.OrderedDict") + b")R"
    arguments = storage(key, numel, old=old) + number(offset) + ints(size) + ints(stride) + b"\x89" + hooks
    return name(f"torch._utils.{function}") + b"(" + arguments + b"tR"


def dictionary(value: bytes, key: bytes | None = None) -> bytes:
    """A dict of one entry, as a whole pickle."""
    return b"\x80\x02}" + (key if key is not None else text("block.weight")) + value + b"s."


def zipped(
    path: Path, program: bytes, *, storages: dict[str, bytes] | None = None, compressed: bool = False, **more: bytes
) -> None:
    """A zip file as torch writes it, around a pickle of the attacker's."""
    method = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/byteorder", more.pop("byteorder", b"little"))
        for key, data in (storages if storages is not None else {"0": bytes(240)}).items():
            archive.writestr(f"archive/data/{key}", data)
        archive.writestr("archive/version", b"3\n")
        for file, data in more.items():
            archive.writestr(f"archive/{file}", data)


def legacy(path: Path, program: bytes, keys: Sequence[str] = (), rest: bytes = b"") -> None:
    """The form before zip files: several pickles, then the storages."""
    magic = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)
    sizes = {"short": 2, "int": 4, "long": 4}
    system = pickle.dumps({"protocol_version": 1001, "little_endian": True, "type_sizes": sizes}, 2)
    path.write_bytes(magic + system + program + pickle.dumps(list(keys), 2) + rest)


def tar_file(path: Path, canary: Path) -> None:
    """The oldest form: a tar file of pickles."""
    with tarfile.open(path, "w") as archive:
        for entry in ("storages", "tensors", "pickle"):
            data = pickle.dumps(Canary(canary) if entry != "storages" else 0, 2)
            info = tarfile.TarInfo(entry)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("escape")
        link.type, link.linkname = tarfile.SYMTYPE, str(canary.parent)
        archive.addfile(link)


def script(path: Path) -> None:
    """A TorchScript archive, which is a zip file too."""
    zipped(
        path, pickle.dumps({}, 2), **{"constants.pkl": pickle.dumps((), 2), "code/__torch__.py": b"while True: pass"}
    )


def nested_tuples(depth: int = 60) -> bytes:
    """((((…), …), …)): every level the one below it twice. Its hash would take 2^depth steps."""
    return b")" + b"".join(b"q\x01h\x01\x86" for _ in range(depth))


def hexed(depth: int = 36) -> bytes:
    """A text that doubles at every level, by an encoder that torch allows."""
    inner = name("_codecs.encode") + text("x" * 64) + text("latin-1") + b"\x86R"
    for _ in range(depth):
        inner = name("_codecs.encode") + inner + text("hex") + b"\x86R"
    return inner
