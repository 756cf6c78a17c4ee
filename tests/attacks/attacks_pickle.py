"""Pickles: that run code, that look as if they did not, and that only take time and memory. With permission and without."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from attack_runner import EITHER, REFUSED, Attack, Sandbox, Words
from pickle_programs import (
    Canary,
    dictionary,
    hexed,
    legacy,
    name,
    nested_tuples,
    number,
    script,
    tar_file,
    tensor,
    text,
    zipped,
)
from victims import use_model

PERMISSION = "--allow-pickle"
Write = Callable[[Sandbox, Path], object]


def plain_pickle(sandbox: Sandbox, path: Path) -> None:
    path.write_bytes(pickle.dumps({"block.weight": Canary(sandbox.canary)}))


def torch_pickle(sandbox: Sandbox, path: Path) -> None:
    torch.save({"block.weight": torch.zeros(8, 7), "x": Canary(sandbox.canary)}, path)


def old_pickle(sandbox: Sandbox, path: Path) -> None:
    torch.save({"x": Canary(sandbox.canary)}, path, _use_new_zipfile_serialization=False)


def by_code(target: str, *arguments: bytes) -> Callable[[Sandbox, Path], None]:
    """A zip file whose pickle calls something."""

    def write(sandbox: Sandbox, path: Path) -> None:
        called = tuple(text(f"touch {sandbox.canary}") if argument == b"canary" else argument for argument in arguments)
        zipped(path, dictionary(name(target) + b"(" + b"".join(called) + b"tR"))

    return write


def program(data: bytes, **options: Any) -> Write:
    """A zip file around a pickle."""
    return lambda sandbox, path: zipped(path, data, **options)


def old(data: bytes, keys: Sequence[str] = (), rest: bytes = b"") -> Write:
    """The legacy form around a pickle."""
    return lambda sandbox, path: legacy(path, data, keys, rest)


def resave(change: Callable[[bytes], bytes]) -> Write:
    """A sound file of torch's own, changed."""

    def write(sandbox: Sandbox, path: Path) -> None:
        buffer = io.BytesIO()
        torch.save({"block.weight": torch.ones(8, 7), "block.bias": torch.ones(5)}, buffer)
        path.write_bytes(change(buffer.getvalue()))

    return write


CODE: dict[str, Write] = {
    "Python's pickle that runs a command": plain_pickle,
    "torch's zip file that runs a command": torch_pickle,
    "torch's old form that runs a command": old_pickle,
    "a tar file that runs a command": lambda sandbox, path: tar_file(path, sandbox.canary),
    "a TorchScript archive": lambda sandbox, path: script(path),
    "builtins.eval": by_code("builtins.eval", b"canary"),
    "os.system": by_code("os.system", b"canary"),
    "posix.system": by_code("posix.system", b"canary"),
    "subprocess.getoutput": by_code("subprocess.getoutput", b"canary"),
    "torch.hub.load": by_code("torch.hub.load", text("x/y"), text("z")),
    "torch.load within torch.load": by_code("torch.load", b"canary"),
    "torch.jit.load": by_code("torch.jit.load", b"canary"),
    "numpy's loader": by_code("numpy.load", b"canary"),
    "getattr of an allowed class": by_code("builtins.getattr", name("torch.Tensor"), text("__reduce_ex__")),
    "importlib by a dotted name": by_code("importlib.import_module", text("antigravity")),
    "a subclass hook with state": program(
        dictionary(
            name("torch._tensor._rebuild_from_type_v2")
            + b"("
            + name("os.system")
            + name("torch.Tensor")
            + b"("
            + text("true")
            + b"t}tR"
        )
    ),
    "an OrderedDict with a state of methods": program(
        dictionary(name("collections.OrderedDict") + b")R}" + text("items") + name("os.system") + b"sb")
    ),
    "a Parameter with hooks": program(
        dictionary(
            name("torch._utils._rebuild_parameter")
            + b"("
            + tensor(56, (8, 7), (7, 1))
            + b"\x88"
            + name("os.system")
            + b"tR"
        )
    ),
}

# What weights_only lets through, and takes memory or time: by sizes that are only said.
COST: dict[str, Write] = {
    "a bytearray of 100 GB": program(dictionary(name("builtins.bytearray") + number(10**11) + b"\x85R")),
    "a bytearray of 3 GB": program(dictionary(name("builtins.bytearray") + number(3 * 10**9) + b"\x85R")),
    "a tensor made, not read": program(dictionary(name("torch.Tensor") + number(3 * 10**9) + b"\x85R")),
    "a storage made, not read": program(dictionary(name("torch.storage.UntypedStorage") + number(10**12) + b"\x85R")),
    "a hash of 2^60 steps": program(dictionary(b"N", nested_tuples())),
    "a text that doubles 36 times": program(dictionary(hexed(36))),
    "a million sets": program(b"\x80\x02(" + b"\x8f" * 6_000_000 + b"t."),
    "a number of a megabyte": program(
        b"\x80\x02}" + text("x") + b"\x8b" + struct.pack("<i", 10**6) + b"\x01" * 10**6 + b"s."
    ),
    "a pickle that is a zip bomb": lambda sandbox, path: zip_bomb(path),
    "a storage that is a zip bomb": lambda sandbox, path: zip_bomb(path, of_storage=True),
    "a storage of 10^15 values": program(dictionary(tensor(10**15, (10**15,), (1,)))),
    "a storage of 10^11 values in the old form": old(dictionary(tensor(10**11, (10**11,), (1,), old=True))),
    "a storage of 2^32 values in the old form": old(dictionary(tensor(2**32, (2**16, 2**16), (2**16, 1), old=True))),
    "a storage of 2^32 values whose key is listed": old(
        dictionary(tensor(2**32, (2**32,), (1,), old=True)), ["0"], struct.pack("<q", 2**32)
    ),
    "a negative storage": program(dictionary(tensor(-5, (5,), (1,)))),
    "a negative storage in the old form": old(
        dictionary(tensor(-5, (5,), (1,), old=True)), ["0"], struct.pack("<q", -5)
    ),
    "a stride of zero": program(dictionary(tensor(60, (10**6, 10**6), (0, 0)))),
    "negative strides": program(dictionary(tensor(60, (60,), (-1,), 59))),
    "an offset beyond the end": program(dictionary(tensor(60, (60,), (1,), 10**9))),
    "a negative offset": program(dictionary(tensor(60, (60,), (1,), -30))),
    "a size beyond the end": program(dictionary(tensor(60, (10**6,), (1,)))),
    "a size beyond the end in the old form": old(
        dictionary(tensor(60, (10**9,), (1,), old=True)), ["0"], struct.pack("<q", 60) + bytes(240)
    ),
    "sizes whose product overflows": program(dictionary(tensor(60, (2**32, 2**32), (0, 0)))),
    "a record longer than the file says": program(dictionary(tensor(10**6, (10**6,), (1,)))),
    "a storage over its neighbours": program(
        b"\x80\x02}"
        + text("a")
        + tensor(200, (200,), (1,))
        + b"s"
        + text("b")
        + tensor(60, (60,), (1,), key="1")
        + b"s.",
        storages={"0": bytes(240), "1": bytes(240)},
    ),
    "a storage that is nowhere": program(dictionary(tensor(60, (60,), (1,), key="../../../../etc/passwd"))),
    "a qtensor": program(dictionary(tensor(60, (60,), (1,), function="_rebuild_qtensor"))),
    "a sparse tensor": program(
        dictionary(name("torch._utils._rebuild_sparse_tensor") + b"(" + name("torch.sparse_coo") + b"N" + b"tR")
    ),
    "a meta tensor of 2^60 values": program(
        dictionary(
            name("torch._utils._rebuild_meta_tensor_no_storage")
            + b"("
            + name("torch.float32")
            + b"("
            + number(2**58)
            + b"t("
            + number(1)
            + b"t\x89tR"
        )
    ),
    "a byte order that is none": program(dictionary(tensor(60, (60,), (1,))), byteorder=b"middle" * 10),
    "big-endian": program(dictionary(tensor(60, (60,), (1,))), byteorder=b"big"),
    "a dict that holds itself": program(b"\x80\x02}q\x00" + text("model") + b"h\x00s."),
    "a list that holds itself": program(b"\x80\x02]q\x00h\x00a."),
    "an unknown protocol": program(b"\x80\x05" + dictionary(tensor(60, (60,), (1,)))[2:]),
    "a stack that is empty": program(b"\x80\x02sss."),
    "no end": program(b"\x80\x02" + b"}" * 100),
    "nothing in the zip file": lambda sandbox, path: zipfile.ZipFile(path, "w").close(),
    "two pickles of one name": lambda sandbox, path: doubled(sandbox, path),
    "zip64 sizes that are not there": resave(lambda data: data.replace(b"PK\x05\x06", b"PK\x06\x06")),
    "truncated": resave(lambda data: data[:-100]),
    "cut in the middle": resave(lambda data: data[: len(data) // 2]),
    "zeros": lambda sandbox, path: path.write_bytes(bytes(1000)),
    "empty": lambda sandbox, path: path.write_bytes(b""),
    "text": lambda sandbox, path: path.write_text("no pickle\n" * 10),
    "a zip file of something else": lambda sandbox, path: foreign_zip(path),
    "a safetensors file": lambda sandbox, path: path.write_bytes(
        (sandbox.copy("zoo") / "m0" / "model.safetensors").read_bytes()
    ),
    "a hundred thousand levels": program(b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."),
}

HARMLESS = {"a storage over its neighbours", "big-endian", "an unknown protocol"}
"""What torch reads as it is meant, or within the file's own bytes."""


def zip_bomb(path: Path, of_storage: bool = False) -> None:
    """Two gigabytes of zeros in two megabytes, without ever holding them."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        if of_storage:
            archive.writestr("archive/data.pkl", dictionary(tensor(5 * 10**8, (5 * 10**8,), (1,))))
        with archive.open("archive/data/0" if of_storage else "archive/data.pkl", "w", force_zip64=True) as file:
            for _ in range(120):
                file.write(bytes(2**24))
        archive.writestr("archive/version", b"3\n")


def doubled(sandbox: Sandbox, path: Path) -> None:
    """One reader may check the first of two entries, and another read the second."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(
                "archive/data.pkl", dictionary(name("os.system") + text(f"touch {sandbox.canary}") + b"\x85R")
            )
            archive.writestr("archive/data.pkl", dictionary(tensor(60, (60,), (1,))))
            archive.writestr("archive/data/0", bytes(240))


def foreign_zip(path: Path) -> None:
    """A zip file with names that lead out of a folder."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../../canary", "x")
        archive.writestr("/etc/x", "x")


def pickled(
    write: Write, file: str, *flags: str, thorough: bool | None = False
) -> Callable[[Sandbox], Sequence[Words]]:
    """Put a pickle under a name into a folder of its own."""

    def build(sandbox: Sandbox) -> Sequence[Words]:
        folder = sandbox.files / "evil"
        folder.mkdir()
        write(sandbox, folder / file)
        return use_model(sandbox, folder, *flags, thorough=thorough)

    return build


def as_adapter(file: str, *flags: str) -> Callable[[Sandbox], Sequence[Words]]:
    """A pickle in the place of an adapter's factors."""

    def build(sandbox: Sandbox) -> Sequence[Words]:
        folder = sandbox.copy("adapters") / "m3"
        (folder / "adapter_model.safetensors").unlink()
        torch_pickle(sandbox, folder / file)
        return use_model(sandbox, folder, *flags, kind="adapters")

    return build


def beside(sandbox: Sandbox) -> Sequence[Words]:
    """A sound checkpoint with pickles beside it, which nobody may open."""
    model = sandbox.copy("zoo") / "m3"
    for file in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "adapter_model.bin"):
        torch_pickle(sandbox, model / file)
    return use_model(sandbox, model, PERMISSION, thorough=True)[:3]


def renamed(sandbox: Sandbox, file: str, *flags: str) -> Sequence[Words]:
    """A pickle that calls itself safetensors."""
    folder = sandbox.files / "evil"
    folder.mkdir()
    torch_pickle(sandbox, folder / file)
    return use_model(sandbox, folder, *flags)


ATTACKS = [
    *(
        Attack(
            f"pickle without permission: {file}",
            pickled(torch_pickle, file, thorough=file == "model.pt"),
            says="pickle",
        )
        for file in ("model.pt", "model.pth", "model.bin", "pytorch_model.bin")
    ),
    *(
        Attack(
            f"pickle with permission: {what}",
            pickled(write, "model.pt", PERMISSION, thorough=what == "os.system" or None),
        )
        for what, write in CODE.items()
    ),
    *(
        Attack(
            f"pickle with permission as pytorch_model.bin: {what}", pickled(CODE[what], "pytorch_model.bin", PERMISSION)
        )
        for what in ("torch's zip file that runs a command", "torch's old form that runs a command")
    ),
    *(
        Attack(
            f"pickle of odd sizes: {what}",
            pickled(write, "model.pt", PERMISSION, thorough=None),
            EITHER if what in HARMLESS else REFUSED,
        )
        for what, write in COST.items()
    ),
    *(
        Attack(
            f"pickle called {file}{' with permission' * bool(flags)}", lambda box, f=file, g=flags: renamed(box, f, *g)
        )
        for file in ("model.safetensors", "weights.safetensors")
        for flags in ((), (PERMISSION,))
    ),
    Attack("adapter whose factors are a pickle", as_adapter("adapter_model.bin"), says="pickle"),
    Attack("adapter whose factors are a pickle, with permission", as_adapter("adapter_model.bin", PERMISSION)),
    Attack("adapter with a pickle called safetensors", as_adapter("adapter_model.safetensors", PERMISSION)),
    Attack("checkpoint with pickles beside it", beside, EITHER),
]
