"""Models of other kinds are refused by name, with what converts them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import eigenzoo as ez
from eigenzoo.errors import UnsupportedError
from eigenzoo.formats.opening import open_model

CONVERTS = (
    r"a GGUF file.*gguf_file=name, quantization_config=GgufConfig\(dequantize=True\)\)\.save_pretrained\(new_folder\)"
)


def write_gguf(path: Path) -> Path:
    """A real GGUF file of one tensor."""
    gguf = pytest.importorskip("gguf")
    import numpy as np

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("token_embd.weight", np.ones((4, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_is_refused_by_ending_by_magic_and_in_folders(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "model.gguf"
    file.parent.mkdir()
    file.write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(100))
    (file.parent / "README.md").write_text("a model card")
    shutil.copy(file, tmp_path / "ggml-model.bin")
    shutil.copy(file, tmp_path / "weights.Q4_0")
    for path in (file, file.parent, tmp_path / "ggml-model.bin", tmp_path / "weights.Q4_0"):
        with pytest.raises(UnsupportedError, match=CONVERTS):
            open_model(path, allow_pickle=True)
    with pytest.raises(UnsupportedError, match=CONVERTS):
        ez.open_zoo(tmp_path, allow_pickle=True)


def test_a_file_that_the_gguf_library_wrote_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=CONVERTS):
        open_model(write_gguf(tmp_path / "model"), allow_pickle=True)


def test_a_folder_of_gguf_among_models_is_an_error_unless_missing_is_allowed(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save_file({"w": torch.eye(2)}, tmp_path / name / "model.safetensors")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "c.Q8_0.gguf").write_bytes(b"GGUF")
    with pytest.raises(UnsupportedError, match=CONVERTS):
        ez.open_zoo(tmp_path)
    zoo = ez.open_zoo(tmp_path, allow_missing=True)
    assert zoo.names == ("a", "b")
    assert [skipped.path for skipped in zoo.skipped] == ["c"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [("tf_model.h5", "HDF5"), ("flax_model.msgpack", "msgpack"), ("model.onnx", "an ONNX graph")],
)
def test_models_of_other_libraries_are_named(tmp_path: Path, name: str, kind: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    (tmp_path / "config.json").write_text("{}")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(UnsupportedError, match=f"{kind}.*Save the model as safetensors"):
            open_model(path)
    # Beside weights that are read, such a file is another copy of the same model.
    save_file({"w": torch.eye(2)}, tmp_path / "model.safetensors")
    assert open_model(tmp_path).ignored_files == (name,)


def test_files_of_data_beside_models_are_no_models(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "measurements.h5").write_bytes(b"x")
    (tmp_path / "m").mkdir()
    save_file({"w": torch.eye(2)}, tmp_path / "m" / "model.safetensors")
    assert ez.open_zoo(tmp_path).names == ("m",)
