"""`eigenzoo route`: files of features that are programs, giants, links or something else, and names of models in them."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from attack_runner import EITHER, REFUSED, SAFE, Attack, Sandbox, Words
from pickle_programs import Canary
from safetensors.torch import save_file
from torch import Tensor

Build = Callable[[Sandbox], Sequence[Words]]


def sound() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {f"m{place}": torch.randn(40, 3, generator=draw) + 5 * place for place in range(3)}


def route(sandbox: Sandbox, inputs: Path, examples: Path) -> list[Words]:
    words = ("route", sandbox.copy("adapters_bundle"), inputs, "--examples", examples)
    return [words, (*words, "--json"), (*words, "-o", "out.safetensors")]


def inputs_that(write: Callable[[Sandbox, Path], object], name: str = "inputs.npy") -> Build:
    """Sound examples, and hostile inputs."""

    def build(sandbox: Sandbox) -> Sequence[Words]:
        examples, inputs = sandbox.files / "examples.safetensors", sandbox.files / name
        save_file(sound(), examples)
        write(sandbox, inputs)
        return route(sandbox, inputs, examples)

    return build


def examples_that(write: Callable[[Sandbox, Path], object]) -> Build:
    """Sound inputs, and hostile examples."""

    def build(sandbox: Sandbox) -> Sequence[Words]:
        examples, inputs = sandbox.files / "examples.safetensors", sandbox.files / "inputs.npy"
        np.save(inputs, torch.cat(list(sound().values())).numpy())
        write(sandbox, examples)
        return route(sandbox, inputs, examples)

    return build


def npy(descr: str, shape: str, body: bytes = bytes(24), size: int = 0) -> Callable[[Sandbox, Path], None]:
    """An .npy file with these words in its header, of so many bytes."""

    def write(sandbox: Sandbox, path: Path) -> None:
        header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
        with path.open("wb") as file:
            file.write(b"\x93NUMPY\x02\x00" + len(header).to_bytes(4, "little") + header + body)
            if size:
                file.truncate(file.tell() + size)

    return write


def giant(rows: int, columns: int, name: str = "m0") -> Callable[[Sandbox, Path], None]:
    """A sparse safetensors file of one matrix."""

    def write(sandbox: Sandbox, path: Path) -> None:
        end = 4 * rows * columns
        header = json.dumps({name: {"dtype": "F32", "shape": [rows, columns], "data_offsets": [0, end]}}).encode()
        with path.open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(file.tell() + end)

    return write


def named(name: str) -> Callable[[Sandbox, Path], None]:
    return lambda sandbox, path: save_file({**sound(), name: torch.zeros(3, 3)}, path)


def valued(value: float) -> Callable[[Sandbox, Path], None]:
    return lambda sandbox, path: save_file({name: rows * value for name, rows in sound().items()}, path)


ATTACKS = [
    Attack("route: sound, as the control", examples_that(valued(1.0)), SAFE),
    Attack(
        "route: inputs that are a pickle",
        inputs_that(lambda box, path: path.write_bytes(pickle.dumps(Canary(box.canary)))),
    ),
    Attack(
        "route: an array of objects",
        inputs_that(lambda box, path: np.save(path, np.array([[Canary(box.canary)]], dtype=object), allow_pickle=True)),
    ),
    Attack("route: code in a header", inputs_that(npy("'<f8'", "(__import__('os').system('true'), 1)"))),
    Attack("route: a header nested without end", inputs_that(npy("(" * 50_000 + ")" * 50_000, "(1, 3)"))),
    Attack("route: a header of 10^18 rows", inputs_that(npy("'<f8'", f"({10**17}, 3)"))),
    Attack("route: a sparse file of a terabyte", inputs_that(npy("'<f8'", f"({2**37}, 1)", b"", 2**40))),
    Attack("route: a sparse file of 10^8 inputs", inputs_that(npy("'<f4'", f"({10**8}, 3)", b"", 12 * 10**8))),
    Attack("route: inputs of no rows", inputs_that(npy("'<f8'", "(0, 3)", b""))),
    Attack(
        "route: an archive of arrays",
        inputs_that(lambda box, path: np.savez(path.with_suffix(".npz"), x=np.eye(3)), "inputs.npz"),
    ),
    Attack("route: inputs that are a pipe", inputs_that(lambda box, path: os.mkfifo(path))),
    Attack("route: inputs that are a device", inputs_that(lambda box, path: path.symlink_to("/dev/zero"))),
    Attack("route: inputs that are a folder", inputs_that(lambda box, path: path.mkdir())),
    Attack("route: NaN", inputs_that(lambda box, path: np.save(path, np.full((2, 3), np.nan)))),
    Attack("route: numbers of 10^300", inputs_that(lambda box, path: np.save(path, np.full((2, 3), 1e300)))),
    Attack("route: examples of a terabyte", examples_that(giant(2**30, 2**8))),
    Attack("route: examples of 4096 × 4097", examples_that(giant(2**12, 2**12 + 1))),
    Attack("route: examples of many features", examples_that(giant(3, 2**22))),
    Attack("route: a model that is an escape", examples_that(named("\x1b]0;x\x07\ny"))),
    Attack("route: a model of 10^5 characters", examples_that(named("m" * 10**5))),
    Attack("route: a model of another folder", examples_that(named("../m0"))),
    Attack("route: equal examples", examples_that(valued(0.0))),
    Attack("route: examples of subnormal numbers", examples_that(valued(1e-44)), EITHER),
    Attack("route: examples of 10^38", examples_that(valued(1e37)), EITHER),
    Attack("route: examples that are Inf", examples_that(valued(float("inf"))), REFUSED),
]
