"""`eigenzoo merge`: adapters and checkpoints of others, heads, outputs that are something else, sizes without a limit."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from attack_runner import EITHER, REFUSED, SAFE, Attack, Sandbox, Words
from safetensors.torch import load_file, save_file

Build = Callable[[Sandbox], Sequence[Words]]
FILE = "adapter_model.safetensors"


def adapters(change: Callable[[Sandbox, Path], object], *words: object) -> Build:
    """Merge four adapters, the last of which is the attacker's."""

    def build(sandbox: Sandbox) -> Sequence[Words]:
        zoo = sandbox.copy("adapters")
        change(sandbox, zoo / "m3")
        command = ("merge", zoo / "m0", zoo / "m3", "--method", "task_arithmetic", *words)
        return [(*command, "-o", "out"), (*command, "--check", "--json")]

    return build


def checkpoints(change: Callable[[Sandbox, Path], object], *words: object) -> Build:
    """Merge two checkpoints, one of which is the attacker's; m1 is the base."""

    def build(sandbox: Sandbox) -> Sequence[Words]:
        zoo = sandbox.copy("zoo")
        change(sandbox, zoo / "m3")
        return [("merge", zoo / "m3", zoo / "m0", "--base", zoo / "m1", "-o", "out", *words)]

    return build


def onto(target: Callable[[Sandbox], Path], *words: object) -> Build:
    def build(sandbox: Sandbox) -> Sequence[Words]:
        zoo = sandbox.copy("adapters")
        return [("merge", zoo / "m0", zoo / "m1", "-o", target(sandbox), *words)]

    return build


def nothing(sandbox: Sandbox, folder: Path) -> None:
    """Leave it as it is."""


def with_head(name: str, value: float = 0.0) -> Callable[[Sandbox, Path], None]:
    def change(sandbox: Sandbox, folder: Path) -> None:
        save_file({**load_file(folder / FILE), name: torch.full((3, 3), value)}, folder / FILE, {"format": "pt"})

    return change


def huge(rank: int, outputs: int, inputs: int) -> Callable[[Sandbox, Path], None]:
    """Both adapters are sparse files of one update of this rank."""

    def change(sandbox: Sandbox, folder: Path) -> None:
        sizes = {"A": (rank, inputs), "B": (outputs, rank)}
        header, end = {}, 0
        for side, shape in sizes.items():
            stop = end + 4 * shape[0] * shape[1]
            header[f"base_model.model.q.lora_{side}.weight"] = {
                "dtype": "F32",
                "shape": shape,
                "data_offsets": [end, stop],
            }
            end = stop
        data = json.dumps(header).encode()
        for name in ("m0", "m3"):
            place = folder.parent / name
            config = json.loads((place / "adapter_config.json").read_text())
            (place / "adapter_config.json").write_text(json.dumps({**config, "r": rank}))
            with (place / FILE).open("wb") as file:
                file.write(len(data).to_bytes(8, "little") + data)
                file.truncate(file.tell() + end)

    return change


def with_config(data: str) -> Callable[[Sandbox, Path], object]:
    return lambda sandbox, folder: (folder / "config.json").write_text(data)


def link_to_secret(sandbox: Sandbox) -> Path:
    (sandbox.work / "out").symlink_to(sandbox.secret)
    return sandbox.work / "out"


ATTACKS = [
    Attack("merge: sound adapters, as the control", adapters(nothing), SAFE),
    Attack("merge: sound checkpoints, as the control", checkpoints(nothing), SAFE),
    Attack("merge: onto an input", onto(lambda box: box.files / "adapters" / "m0", "--force"), says="record"),
    Attack("merge: onto a link", onto(link_to_secret, "--force")),
    Attack("merge: a head of an escape", adapters(with_head("\x1b]0;x\x07"), "--heads", "m3"), EITHER),
    Attack("merge: a head that differs", adapters(with_head("score.\x1b[31m"))),
    Attack("merge: a head of NaN", adapters(with_head("score", float("nan")), "--heads", "m3"), says="NaN"),
    Attack("merge: heads of an escape", adapters(nothing, "--heads", "\x1b[31m../..")),
    Attack("merge: a budget of 10^30", adapters(nothing, "--budget", "1" + "0" * 30), EITHER),
    Attack("merge: a rank of 10^30", adapters(nothing, "--rank", "1" + "0" * 30), EITHER),
    Attack("merge: a scale of 10^300", adapters(nothing, "--scale", "1e300"), EITHER),
    Attack("merge: updates of rank 10^5", adapters(huge(10**5, 10**5, 10**5)), EITHER),
    Attack("merge: updates of rank 3·10^4", adapters(huge(3 * 10**4, 2, 2)), EITHER),
    Attack("merge: updates of 10^6 inputs", adapters(huge(2, 2, 10**6)), EITHER),
    Attack("merge: a config nested without end", checkpoints(with_config("[" * 10**5), "--dtype", "bfloat16")),
    Attack(
        "merge: a base that is a pipe", checkpoints(lambda box, path: os.mkfifo(box.work / "p"), "--base", "p"), REFUSED
    ),
]
