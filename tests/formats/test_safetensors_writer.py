"""The streaming writer: the library opens what it wrote, and mistakes are seen where they are made."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from eigenzoo.errors import OutputError, UnsupportedError, UsageError
from eigenzoo.formats.safetensors.dtypes import DTYPES
from eigenzoo.formats.safetensors.file import SafetensorsFile
from eigenzoo.formats.safetensors.writer import SafetensorsWriter, header_bytes


def test_the_library_reads_what_was_streamed(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    whole, blocks = torch.randn(5, 3), torch.randn(4, 100, dtype=torch.float64)
    with SafetensorsWriter(path, 1000) as writer:
        writer.begin("blocks", torch.float64, (4, 100))
        for row in (2, 0, 3, 1):
            writer.write_flat("blocks", row * 100 + 50, blocks[row, 50:])
            writer.write_flat("blocks", row * 100, blocks[row, :50])
        writer.append("whole", whole.T)
        assert torch.equal(writer.read_flat("blocks", 150, 250), blocks.reshape(-1)[150:250])
        assert torch.equal(writer.read_flat("blocks", 0, 4, torch.empty(4)), blocks[0, :4].float())
        writer.write_flat("blocks", 0, blocks[0] * 2)
        writer.finish({"note": "é"})
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"note": "é"}
        assert torch.equal(file.get_tensor("blocks")[1:], blocks[1:])
        assert torch.equal(file.get_tensor("blocks")[0], blocks[0] * 2)
        assert torch.equal(file.get_tensor("whole"), whole.T)
    assert (int.from_bytes(path.read_bytes()[:8], "little") + 8) % 8 == 0


def test_threads_write_and_read_one_file_by_position(tmp_path: Path) -> None:
    rows = torch.randn(64, 1000)
    with SafetensorsWriter(tmp_path / "x.safetensors", 100) as writer, ThreadPoolExecutor(4) as pool:
        writer.begin("x", torch.float32, (64, 1000))
        list(pool.map(lambda row: writer.write_flat("x", row * 1000, rows[row]), range(64)))
        read = list(pool.map(lambda row: writer.read_flat("x", row * 1000, row * 1000 + 1000), range(64)))
        assert torch.equal(torch.stack(read), rows)
        writer.finish()
    assert torch.equal(load_file(tmp_path / "x.safetensors")["x"], rows)


@pytest.mark.parametrize("name", sorted(set(DTYPES) - {"F8_E8M0"}))
def test_every_dtype_is_written_as_the_library_reads_it(tmp_path: Path, name: str) -> None:
    tensor = torch.arange(6).to(torch.float32).to(DTYPES[name]).reshape(2, 3)
    with SafetensorsWriter(tmp_path / "x.safetensors", 200) as writer:
        writer.append("x", tensor)
        writer.append("scalar", tensor[1, 1])
        writer.append("empty", tensor[:0])
        writer.finish()
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded["x"].dtype == tensor.dtype
    for key, expected in {"x": tensor, "scalar": tensor[1, 1], "empty": tensor[:0]}.items():
        assert loaded[key].shape == expected.shape
        assert torch.equal(loaded[key].reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8))


def test_a_known_set_of_tensors_gives_the_library_s_own_file(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(5)}
    save_file(tensors, tmp_path / "library.safetensors", metadata={"format": "pt"})
    size = len(header_bytes([(name, value.dtype, value.shape) for name, value in tensors.items()], {"format": "pt"}))
    with SafetensorsWriter(tmp_path / "ours.safetensors", size, {"format": "pt"}) as writer:
        for name, value in tensors.items():
            writer.append(name, value)
        writer.finish()
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "library.safetensors").read_bytes()


def test_what_cannot_be_meant_is_refused_at_once(tmp_path: Path) -> None:
    with SafetensorsWriter(tmp_path / "x.safetensors", 120, {"format": "pt"}) as writer:
        writer.begin("a", torch.float32, (2,))
        with pytest.raises(UsageError, match="the tensor name 'a' is taken"):
            writer.append("a", torch.zeros(2))
        with pytest.raises(UsageError, match=r"tensor 'b{10}' does not fit into the 120 bytes reserved"):
            writer.begin("b" * 10, torch.float32, (2,))
        with pytest.raises(UsageError, match="values 1:3 of a tensor of 2"):
            writer.write_flat("a", 1, torch.zeros(2))
        with pytest.raises(UsageError, match=r"torch\.float64 values for a tensor of torch\.float32"):
            writer.write_flat("a", 0, torch.zeros(2, dtype=torch.float64))
        with pytest.raises(UsageError, match="no tensor 'c' was begun"):
            writer.write_flat("c", 0, torch.zeros(2))
        with pytest.raises(UnsupportedError, match=r"cannot hold torch\.complex128"):
            writer.begin("c", torch.complex128, (2,))
        writer.write_flat("a", 1, torch.zeros(1))
        with pytest.raises(UsageError, match="'a' has values that were never written"):
            writer.finish()
        writer.write_flat("a", 0, torch.zeros(1))
        with pytest.raises(UsageError, match="but 120 are reserved"):
            writer.finish({"note": "n" * 100})
        writer.finish()
    assert torch.equal(SafetensorsFile(tmp_path / "x.safetensors").read("a"), torch.zeros(2))
    with pytest.raises(OutputError, match=r"x\.safetensors: cannot be created \(File exists\)"):
        SafetensorsWriter(tmp_path / "x.safetensors", 100)
    with pytest.raises(UsageError, match="Headers have 1 to"):
        SafetensorsWriter(tmp_path / "y.safetensors", 2**40)


@given(st.lists(st.text(max_size=4), unique=True, max_size=8), st.integers(0, 2**40))
@settings(max_examples=50)
def test_the_counted_header_is_the_header(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], first: int
) -> None:
    """With exactly the bytes that the header takes nothing is refused; with eight less the last tensor is."""
    path = tmp_path_factory.getbasetemp() / "counted.safetensors"
    tensors = [(name, torch.uint8, (first if name == names[0] else 3,)) for name in names]
    size = len(header_bytes(tensors, {}))
    path.unlink(missing_ok=True)
    with SafetensorsWriter(path, size) as writer:
        for tensor in tensors:
            writer.begin(*tensor)
    if tensors:
        path.unlink()
        with SafetensorsWriter(path, size - 8) as writer:
            for tensor in tensors[:-1]:
                writer.begin(*tensor)
            with pytest.raises(UsageError, match="does not fit"):
                writer.begin(*tensors[-1])
