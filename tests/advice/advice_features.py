"""Messages about files of features, which a router reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import safetensors.numpy
from advice_case import Case

from eigenzoo.formats.feature_file import MOST_INPUTS, read_examples, read_inputs

FEATURES = np.arange(12.0).reshape(4, 3)


def read_examples_without_names(folder: Path) -> object:
    np.save(folder / "examples.npy", FEATURES)
    return read_examples(folder / "examples.npy")


def write_them_by_safetensors(folder: Path) -> None:
    """The features of the .npy file were written with safetensors under a model's name, and read with equal values."""
    path = folder / "examples.safetensors"
    safetensors.numpy.save_file({"model": np.load(folder / "examples.npy")}, path)
    assert np.array_equal(read_examples(path)["model"].numpy(), FEATURES)


def read_a_cut_file(folder: Path) -> object:
    np.save(folder / "inputs.npy", FEATURES)
    whole = (folder / "inputs.npy").read_bytes()
    (folder / "inputs.npy").write_bytes(whole[:-8])
    return read_inputs(folder / "inputs.npy")


def write_it_whole(folder: Path) -> None:
    """The features were saved again, and read with equal values."""
    np.save(folder / "inputs.npy", FEATURES)
    assert np.array_equal(read_inputs(folder / "inputs.npy").numpy(), FEATURES)


def read_too_many(folder: Path) -> object:
    rows = np.lib.format.open_memmap(folder / "inputs.npy", "w+", "int8", (MOST_INPUTS // 8 + 2, 8))
    rows[-1] = 7
    del rows
    return read_inputs(folder / "inputs.npy")


def split_it(folder: Path) -> None:
    """The file was split into two halves, and the last row of the second has the values that it had."""
    halves = np.array_split(np.load(folder / "inputs.npy", mmap_mode="r"), 2)
    for place, half in enumerate(halves):
        np.save(folder / f"inputs-{place}.npy", half)
    assert read_inputs(folder / "inputs-1.npy")[-1].tolist() == [7] * 8


CASES = [
    Case(
        "Examples without names of models",
        read_examples_without_names,
        ("an .npy file has no names of models", "rite it with safetensors.numpy.save_file({'model': features}, path)"),
        write_them_by_safetensors,
    ),
    Case(
        "A file of features that is cut",
        read_a_cut_file,
        ("bytes do not fit a header", "rite or copy the file again, whole"),
        write_it_whole,
    ),
    Case(
        "A file of features that is too large",
        read_too_many,
        ("values. At most 67,108,864 are read at once", "plit the file"),
        split_it,
    ),
]
