"""Faults in folders that vLoRA wrote: each is refused, with nothing written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import vlora
import vlora.cli
from hypothesis import given, settings
from hypothesis import strategies as st
from model_builders import edit_config
from safetensors.torch import load_file, save_file
from vlora_cases import MODULES, TASKS, doubled, edit_meta, fitted

import eigenzoo as ez
from builders import random_factors, write_adapter


def edit_tensors(path: Path, **changes: Any) -> None:
    """Replace tensors whose names end in a key, by a function of what was there; None removes them."""
    tensors = load_file(path)
    for ending, change in changes.items():
        for name in [name for name in tensors if name.endswith(ending)][:1]:
            tensors[name] = change(tensors[name]).contiguous() if change else None
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


def with_nan(values: torch.Tensor) -> torch.Tensor:
    values.view(-1)[0] = torch.nan
    return values


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


PLAIN, TASK = "subspace.safetensors", "task_sql.safetensors"
FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no directions": (lambda at: (at / PLAIN).unlink(), r"subspace\.safetensors"),
    "no task": (lambda at: (at / TASK).unlink(), r"task_sql\.safetensors"),
    "cut": (lambda at: cut(at / PLAIN), r"subspace\.safetensors"),
    "cut task": (lambda at: cut(at / TASK), r"task_sql\.safetensors"),
    "a pickle": (lambda at: torch.save({}, at / PLAIN), r"subspace\.safetensors"),
    "no JSON": (lambda at: (at / "subspace_meta.json").write_text("{"), "not valid JSON"),
    "a list": (lambda at: (at / "subspace_meta.json").write_text("[]"), "A JSON object is expected"),
    "NaN in directions": (
        lambda at: edit_tensors(at / PLAIN, components_a=with_nan),
        "NaN or Inf in tensor .*components_a",
    ),
    "NaN in a mean": (lambda at: edit_tensors(at / PLAIN, mean_b=with_nan), "NaN or Inf in tensor .*mean_b"),
    "NaN in loadings": (lambda at: edit_tensors(at / TASK, loadings_b=with_nan), r"task_sql.*NaN or Inf in tensor"),
    "narrow directions": (lambda at: edit_tensors(at / PLAIN, components_b=lambda t: t[:, 1:]), "shape"),
    "short mean": (lambda at: edit_tensors(at / PLAIN, mean_a=lambda t: t[1:]), "shape"),
    "no mean": (lambda at: edit_tensors(at / PLAIN, mean_a=None), "there is no tensor .*mean_a"),
    "few loadings": (lambda at: edit_tensors(at / TASK, loadings_a=lambda t: t[1:]), r"task_sql.*shape \[1\]"),
    "no loadings": (lambda at: edit_tensors(at / TASK, loadings_a=None), r"task_sql.*there is no tensor"),
    "whole numbers": (lambda at: edit_tensors(at / PLAIN, mean_a=lambda t: t.int()), "torch.int32"),
    "complex numbers": (lambda at: edit_tensors(at / PLAIN, mean_a=lambda t: t * 1j), "torch.complex64"),
    "another layer": (
        lambda at: edit_meta(at, layer_names=[*MODULES, "more"]),
        "shapes_a has no shape of layer 'more'",
    ),
    "a layer twice": (lambda at: edit_meta(at, layer_names=[*MODULES] * 2), "a layer is listed twice"),
    "a nameless layer": (lambda at: edit_meta(at, layer_names=[*MODULES, ""]), "the name of a layer is not text"),
    "half a character": (lambda at: edit_meta(at, task_ids=["\ud800"]), "the name of a task is not text"),
    "no layers": (lambda at: edit_meta(at, layer_names=[]), "there is no layer"),
    "no tasks": (lambda at: edit_meta(at, task_ids=[]), "there is no task"),
    "layers of text": (lambda at: edit_meta(at, layer_names="q"), "layer_names is not a list"),
    "outside": (lambda at: edit_meta(at, task_filenames={"sql": "/../../sql"}), r"holds '\.\.'"),
    "file names": (lambda at: edit_meta(at, task_filenames=["sql"]), "task_filenames"),
    "one file": (
        lambda at: edit_meta(at, task_filenames={"sql": "x", "code": "x"}),
        "tasks 'sql' and 'code' have one file",
    ),
    "huge shapes": (lambda at: edit_meta(at, shapes_a={m: [3, 2**60] for m in MODULES}), "has at most"),
    "negative shapes": (lambda at: edit_meta(at, shapes_a={m: [-3, 16] for m in MODULES}), "A has shape"),
    "other ranks": (lambda at: edit_meta(at, shapes_a={m: [4, 12] for m in MODULES}), "A has shape"),
    "another format": (lambda at: edit_meta(at, format="int3"), "the format is 'int3'"),
    "packed without": (lambda at: edit_meta(at, format="nf4_packed"), r"subspace_nf4\.safetensors"),
    "a huge rank": (lambda at: edit_meta(at, rank=10**30, shapes_a=None), "the rank is 1000"),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("faults")
    fitted(root, num_components=2).save(root / "vlora")
    return root


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_refused(tmp_path: Path, written: Path, fault: str) -> None:
    spoil, said = FAULTS[fault]
    shutil.copytree(written / "vlora", tmp_path / "vlora")
    spoil(tmp_path / "vlora")
    with pytest.raises(ez.EigenzooError, match=said):
        ez.import_subspace(tmp_path / "vlora", alpha=12, workspace=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["vlora"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.sampled_from([*MODULES, *TASKS]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*MODULES, *TASKS]), inner, max_size=3),
    max_leaves=5,
)
KEYS = ["layer_names", "task_ids", "task_filenames", "rank", "shapes_a", "shapes_b", "format", "num_components"]


@settings(max_examples=60)
@given(changes=st.dictionaries(st.sampled_from(KEYS), JSON, min_size=1, max_size=2))
def test_whatever_the_metadata_say_is_imported_or_refused(
    tmp_path: Path, written: Path, changes: dict[str, Any]
) -> None:
    shutil.copytree(written / "vlora", tmp_path / "vlora", dirs_exist_ok=True)
    edit_meta(tmp_path / "vlora", **changes)
    try:
        space = ez.import_subspace(tmp_path / "vlora", alpha=12)
    except ez.EigenzooError:
        return
    assert list(space.verify()) == []


@pytest.mark.parametrize("file", [PLAIN, TASK])
def test_whatever_byte_of_a_header_is_changed_is_imported_or_refused(tmp_path: Path, written: Path, file: str) -> None:
    shutil.copytree(written / "vlora", tmp_path / "vlora")
    whole = (written / "vlora" / file).read_bytes()
    refused = 0
    for place in range(0, int.from_bytes(whole[:8], "little"), 7):
        (tmp_path / "vlora" / file).write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            ez.import_subspace(tmp_path / "vlora", alpha=12)
        except ez.EigenzooError:
            refused += 1
    assert refused > 10


def test_more_directions_than_values_take_no_memory_of_their_square(tmp_path: Path) -> None:
    """A file of 4 MB whose directions' Gram would take 8 TB."""
    adapter = write_adapter(tmp_path / "a", {"m": (torch.ones(1, 1), torch.ones(1, 1))})
    shared = vlora.SharedSubspace.from_adapters([vlora.load_adapter(adapter)], task_ids=["t"], num_components=1)
    shared.components_a["m"] = torch.ones(10**6, 1)
    shared.tasks["t"].loadings_a["m"] = torch.ones(10**6)
    shared.save(tmp_path / "vlora")
    space = ez.import_subspace(tmp_path / "vlora", alpha=1)
    assert float(space.rebuild("t").layer("m.lora_A")) == pytest.approx(10**6 + 1)
    assert any("more than dimensions" in warning for warning in space.report["warnings"])


def test_numbers_that_float32_cannot_hold_are_refused(tmp_path: Path) -> None:
    doubled(tmp_path).save(tmp_path / "vlora")
    with pytest.raises(ez.DataError, match="too large for float32"):
        ez.import_subspace(tmp_path / "vlora", alpha=1e60)


def test_a_task_behind_a_link_that_leads_out_is_refused(tmp_path: Path, written: Path) -> None:
    shutil.copytree(written / "vlora", tmp_path / "vlora")
    (tmp_path / "vlora" / TASK).rename(tmp_path / TASK)
    (tmp_path / "vlora" / TASK).symlink_to(tmp_path / TASK)
    with pytest.raises(ez.UnsafePathError, match="leads out of the folder"):
        ez.import_subspace(tmp_path / "vlora", alpha=12)


def test_packed_directions_of_other_sizes_are_refused(tmp_path: Path) -> None:
    fitted(tmp_path, num_components=2).save_quantized(tmp_path / "vlora")
    for changes, said in (
        ({"packed_a": lambda values: values[:8]}, "for directions"),
        ({"scales_a": lambda values: values[1:]}, "for directions"),
        ({"packed_a": lambda values: values.float()}, "no packed indices"),
    ):
        shutil.copytree(tmp_path / "vlora", tmp_path / "spoilt", dirs_exist_ok=True)
        edit_tensors(tmp_path / "spoilt" / "subspace_nf4.safetensors", **changes)
        with pytest.raises(ez.FormatError, match=said):
            ez.import_subspace(tmp_path / "spoilt", alpha=12)
    edit_meta(tmp_path / "vlora", nf4_block_size=0)
    with pytest.raises(ez.FormatError, match="nf4_block_size is 0"):
        ez.import_subspace(tmp_path / "vlora", alpha=12)


def test_adapters_to_be_like_that_are_not_of_the_zoo_are_refused(tmp_path: Path, written: Path) -> None:
    def importing(**chosen: Any) -> None:
        ez.import_subspace(written / "vlora", **chosen)

    other = write_adapter(tmp_path / "other", random_factors({"model.q": (3, 4)}, 3, 0))
    with pytest.raises(ez.MismatchError, match="has no such module"):
        importing(like=other)
    wide = write_adapter(tmp_path / "wide", random_factors(dict.fromkeys(MODULES, (16, 17)), 3, 0))
    with pytest.raises(ez.MismatchError, match="factors have shapes"):
        importing(like=wide)
    with pytest.raises(ez.MismatchError, match="the rank is 3, but 8 in the adapter given by like"):
        importing(like=edit_config(shutil.copytree(other, tmp_path / "eight"), r=8) / "adapter_config.json")
    with pytest.raises(ez.UnsupportedError, match="use_dora"):
        importing(like=edit_config(shutil.copytree(other, tmp_path / "dora"), use_dora=True) / "adapter_config.json")
    with pytest.raises(ez.UsageError, match=r"the scale of the adapters is not known.*alpha = 3, the rank"):
        importing()
    with pytest.raises(ez.UsageError, match="both like and alpha are given"):
        importing(like=other, alpha=3)
    with pytest.raises(ez.UsageError, match="alpha is nan"):
        importing(alpha=float("nan"))
    with pytest.raises(ez.FormatError, match="missing"):
        importing(like=tmp_path / "nothing")


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ez.FormatError, match="there is no such folder"):
        ez.import_subspace(tmp_path / "nothing", alpha=1)
    with pytest.raises(ez.FormatError, match=r"no subspace of another tool is here.*vLoRA saved"):
        ez.import_subspace(tmp_path, alpha=1)
