"""Pickles: never without permission, and never code."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from eigenzoo.errors import FormatError, UnsupportedError, UsageError
from eigenzoo.formats.pickles.file import PickleStateDict


class Attack:
    """What a hostile pickle does when it is loaded carelessly."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("nesting", ["", "state_dict", "model_state_dict", "model"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_state_dict_is_read(tmp_path: Path, nesting: str, zipped: bool) -> None:
    layer = nn.Linear(5, 3)
    state = {**layer.state_dict(), "transposed": torch.arange(6.0).reshape(2, 3).T, "half": torch.ones(2).bfloat16()}
    path = tmp_path / "m.pt"
    torch.save({nesting: state, "epoch": 3} if nesting else state, path, _use_new_zipfile_serialization=zipped)
    opened = PickleStateDict(path, allow_pickle=True)
    assert (opened.name, opened.weight_files(), opened.side_files) == ("m", (path,), ())
    assert set(opened.tensors) == set(state)
    for name, value in state.items():
        assert torch.equal(opened.read(name), value)
        assert opened.read(name).is_contiguous()
        assert torch.equal(opened.read_flat(name, 1, 2), value.reshape(-1)[1:2])
        assert torch.equal(opened.read_flat(name, 0, 2, torch.empty(2)), value.reshape(-1)[:2].float())


def test_a_folder_with_its_pickle_is_read(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    torch.save({"w": torch.zeros(2)}, tmp_path / "training_args.bin")
    (tmp_path / "config.json").write_text("{}")
    opened = PickleStateDict(tmp_path, allow_pickle=True)
    assert torch.equal(opened.read("w"), torch.ones(2))
    assert opened.side_files == ("config.json",)
    assert opened.ignored_files == ("training_args.bin",)


def test_without_permission_nothing_is_unpickled(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "m.pt")
    with pytest.raises(UnsupportedError, match=r"m\.pt: the weights are a Python pickle.*--allow-pickle"):
        PickleStateDict(tmp_path / "m.pt")


def test_code_is_never_run(tmp_path: Path) -> None:
    torch.save({"w": Attack(tmp_path / "made")}, tmp_path / "m.pt")
    with pytest.raises(UnsupportedError, match="more than tensors, or is damaged"):
        PickleStateDict(tmp_path / "m.pt", allow_pickle=True)
    assert not (tmp_path / "made").exists()


def test_what_is_no_state_dict_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    for content, message in (
        ([torch.ones(2)], "the pickle holds list"),
        ({}, "the pickle holds dict"),
        ({"w": torch.ones(2), "epoch": 3}, "the entry 'epoch' is int"),
        ({3: torch.ones(2)}, "the entry '3' is Tensor"),
    ):
        torch.save(content, path)
        with pytest.raises(FormatError, match=message):
            PickleStateDict(path, allow_pickle=True)


def test_a_tensor_larger_than_its_storage_is_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1).expand(2**40)}, tmp_path / "m.pt")
    with pytest.raises(FormatError, match=r"tensor 'w': shape \(1099511627776,\) is larger than the stored values"):
        PickleStateDict(tmp_path / "m.pt", allow_pickle=True)
    torch.save({"w": torch.eye(2).to_sparse()}, tmp_path / "m.pt")
    with pytest.raises(UnsupportedError, match=r"_rebuild_sparse_tensor"):
        PickleStateDict(tmp_path / "m.pt", allow_pickle=True)
    torch.save({"w": torch.ones(2, dtype=torch.complex128)}, tmp_path / "m.pt")
    with pytest.raises(UnsupportedError, match=r"tensor 'w': safetensors cannot hold torch\.complex128"):
        PickleStateDict(tmp_path / "m.pt", allow_pickle=True)


@pytest.mark.parametrize("data", [b"", b"garbage", b"PK\x03\x04" + bytes(100), b"\x80\x02}q\x00."])
def test_damaged_pickles_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "m.pt").write_bytes(data)
    with pytest.raises(FormatError, match=r"m\.pt: "):
        PickleStateDict(tmp_path / "m.pt", allow_pickle=True)


def test_misuse_is_named(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2), "c": torch.ones(2, dtype=torch.complex64)}, tmp_path / "m.pt")
    opened = PickleStateDict(tmp_path / "m.pt", allow_pickle=True)
    with pytest.raises(FormatError, match="no tensor 'v'"):
        opened.read("v")
    with pytest.raises(UsageError, match="values 1:3 of a tensor of 2"):
        opened.read_flat("w", 1, 3)
    with pytest.raises(UnsupportedError, match="complex values"):
        opened.read_flat("c", 0, 2, torch.empty(2))
