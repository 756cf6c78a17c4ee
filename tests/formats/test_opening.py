"""What lies at a path decides the format; what cannot be read is described."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from eigenzoo.errors import FormatError, UnsupportedError
from eigenzoo.formats.opening import is_model, open_model


def test_each_format_is_recognised(adapter: Path, sharded: Path, tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    save_file({"w": torch.zeros(2)}, tmp_path / "bare" / "weights.safetensors")
    torch.save({"w": torch.zeros(2)}, tmp_path / "m.pth")
    (tmp_path / "old").mkdir()
    torch.save({"w": torch.zeros(2)}, tmp_path / "old" / "pytorch_model.bin")
    expected = {
        adapter: "lora",
        sharded: "checkpoint",
        tmp_path / "bare": "state-dict",
        tmp_path / "bare" / "weights.safetensors": "state-dict",
        tmp_path / "m.pth": "pickle",
        tmp_path / "old": "pickle",
    }
    for path, kind in expected.items():
        assert is_model(path), path
        assert open_model(path, allow_pickle=True).format == kind
    for path in (tmp_path / "m.pth", tmp_path / "old"):
        with pytest.raises(UnsupportedError, match="--allow-pickle"):
            open_model(str(path))


def test_what_is_no_model_is_described(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "several").mkdir()
    for name in "ab":
        save_file({"w": torch.zeros(2)}, tmp_path / "several" / f"{name}.safetensors")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "notes.txt").write_text("x")
    for name, message in {
        "nothing": "nothing of this name exists",
        "empty": "an empty folder",
        "several": "a folder with 2 weight files, which are several models",
        "texts": r"a folder with notes\.txt",
        "texts/notes.txt": r"a file with the ending '\.txt'",
    }.items():
        assert not is_model(tmp_path / name)
        with pytest.raises(FormatError, match=rf"there is no model here: {message}.*Eigenzoo reads a PEFT adapter"):
            open_model(tmp_path / name)


def test_shards_without_their_index_are_refused(sharded: Path, tmp_path: Path) -> None:
    (sharded / "model.safetensors.index.json").unlink()
    assert is_model(sharded)
    with pytest.raises(FormatError, match="there are shards of a checkpoint, but no index"):
        open_model(sharded)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "pytorch_model-00001-of-00002.bin").write_bytes(b"")
    with pytest.raises(UnsupportedError, match="pickled shards"):
        open_model(tmp_path / "old", allow_pickle=True)
