"""Files of features: what is read, against numpy and safetensors, and what is refused."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from eigenzoo import errors
from eigenzoo.formats.feature_file import read_examples, read_inputs

DTYPES = ["<f4", "<f8", "<f2", "<i8", "<i4", "<i2", "|i1", "|u1", "<u2", "<u4", "<u8"]


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_npy_files_are_read_as_numpy_does(tmp_path: Path, dtype: str, order: str) -> None:
    values = np.asarray(np.arange(12).reshape(3, 4), dtype, order=order)
    np.save(tmp_path / "x.npy", values)
    found = read_inputs(tmp_path / "x.npy")
    assert found.shape == (3, 4)
    assert np.array_equal(found.numpy(), np.load(tmp_path / "x.npy").astype(found.numpy().dtype))


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_all_versions_of_npy_files(tmp_path: Path, version: tuple[int, int]) -> None:
    with (tmp_path / "x.npy").open("wb") as file:
        np.lib.format.write_array(file, np.eye(3), version=version)
    assert torch.equal(read_inputs(tmp_path / "x.npy"), torch.eye(3).double())


def test_safetensors_of_one_tensor_or_one_called_inputs(tmp_path: Path) -> None:
    save_file({"x": torch.eye(3)}, tmp_path / "one.safetensors")
    save_file({"x": torch.ones(3, 3), "inputs": torch.eye(3).bfloat16()}, tmp_path / "two.safetensors")
    save_file({"x": torch.ones(3, 3), "y": torch.eye(3)}, tmp_path / "none.safetensors")
    assert torch.equal(read_inputs(tmp_path / "one.safetensors"), torch.eye(3))
    assert torch.equal(read_inputs(tmp_path / "two.safetensors"), torch.eye(3).bfloat16())
    with pytest.raises(errors.FormatError, match="2 tensors, and none is called 'inputs'"):
        read_inputs(tmp_path / "none.safetensors")
    assert set(read_examples(tmp_path / "none.safetensors")) == {"x", "y"}


def npy(header: str, body: bytes = bytes(32), length: int | None = None) -> bytes:
    text = header.encode()
    size = len(text) if length is None else length
    return b"\x93NUMPY\x01\x00" + size.to_bytes(2, "little") + text + body


HEADER = "{{'descr': {}, 'fortran_order': False, 'shape': {}, }}\n"
FAULTS = {
    "empty": b"",
    "magic alone": b"\x93NUMPY",
    "text": b"1,2\n3,4\n",
    "pickle": pickle.dumps([1.0]),
    "zip": b"PK\x03\x04" + bytes(60),
    "version 9": b"\x93NUMPY\x09\x00" + bytes(60),
    "objects": npy(HEADER.format("'|O'", "(2, 2)"), pickle.dumps([1.0])),
    "records": npy(HEADER.format("[('a', '<f8')]", "(2, 2)")),
    "bytes": npy(HEADER.format("'|S8'", "(2, 2)")),
    "complex": npy(HEADER.format("'<c8'", "(2, 2)")),
    "one byte of a float": npy(HEADER.format("'<f1'", "(2, 2)")),
    "a vector": npy(HEADER.format("'<f8'", "(4,)")),
    "negative": npy(HEADER.format("'<f8'", "(-2, -2)")),
    "code": npy(HEADER.format("'<f8'", "(__import__('os').getpid(), 2)")),
    "nested": npy("(" * 9000),
    "short": npy(HEADER.format("'<f8'", "(2, 2)"), bytes(31)),
    "long": npy(HEADER.format("'<f8'", "(2, 2)"), bytes(33)),
    "huge": npy(HEADER.format("'<f8'", f"({10**17}, {10**17})")),
    "header longer than the file": npy(HEADER.format("'<f8'", "(2, 2)"), length=65535),
    "not text": npy("\x00" * 40),
}


@pytest.mark.parametrize("data", FAULTS.values(), ids=FAULTS)
def test_other_npy_files_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.npy").write_bytes(data)
    with pytest.raises(errors.FormatError, match=r"x\.npy"):
        read_inputs(tmp_path / "x.npy")


def test_large_files_are_refused_before_they_are_read(tmp_path: Path) -> None:
    with (tmp_path / "x.npy").open("wb") as file:
        file.write(npy(HEADER.format("'<f8'", f"({2**20}, {2**10})"), b""))
        file.truncate(file.tell() + 2**33)
    with pytest.raises(errors.FormatError, match=r"1,073,741,824 values\. At most 67,108,864 are read at once"):
        read_inputs(tmp_path / "x.npy")


TENSORS = {"a vector": torch.zeros(3), "a cube": torch.zeros(1, 2, 3), "truth": torch.zeros(2, 2, dtype=torch.bool)}


@pytest.mark.parametrize("values", TENSORS.values(), ids=TENSORS)
@pytest.mark.parametrize("read", [read_inputs, read_examples])
def test_other_tensors_are_refused(tmp_path: Path, values: torch.Tensor, read: Callable[[Path], object]) -> None:
    save_file({"x": values}, tmp_path / "x.safetensors")
    with pytest.raises(errors.FormatError, match="Features are numbers, one row per input"):
        read(tmp_path / "x.safetensors")


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.npy")
    (tmp_path / "folder.npy").mkdir()
    for name in ("pipe.npy", "folder.npy"):
        with pytest.raises(errors.FormatError, match=rf"{name}: (is not a regular file|cannot be read)"):
            read_inputs(tmp_path / name)
    with pytest.raises(errors.FormatError, match="there is no such file"):
        read_inputs(tmp_path / "absent.npy")
    np.save(tmp_path / "x.npy", np.eye(2))
    with pytest.raises(errors.FormatError, match=r"no names of models.*safetensors\.numpy\.save_file"):
        read_examples(tmp_path / "x.npy")
