"""Outputs appear whole or not at all; what exists is replaced only on demand, and nobody's other folder ever."""

from __future__ import annotations

import gc
import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import eigenzoo as ez
from builders import edit_model, random_stack, write_stacks
from eigenzoo.formats.paths import OUTPUT_RECORD


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    write_stacks(tmp_path / "zoo", {"block.weight": random_stack(4, (6, 5)), "norm.bias": random_stack(4, (6,), 1)})
    return tmp_path / "zoo"


def listing(folder: Path) -> set[str]:
    """Every path below, hidden ones too."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_a_failed_fit_leaves_nothing(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the workspace that was named, in the default one, and beside the zoo."""
    edit_model(zoo / "m3", norm__bias=torch.full((6,), float("nan")))
    (tmp_path / "work").mkdir()
    (tmp_path / "default").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "default"))
    before = listing(tmp_path)
    for workspace in (tmp_path / "work", None):
        with pytest.raises(ez.DataError, match=r"layer 'norm\.bias' of m3"):
            ez.fit(zoo, rank=1, workspace=workspace)
        assert listing(tmp_path) == before


def test_a_subspace_takes_its_folder_along(zoo: Path, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    space = ez.fit(zoo, rank=1, workspace=tmp_path / "work")
    assert listing(tmp_path / "work")
    space.save(tmp_path / "bundle")
    del space
    gc.collect()
    assert listing(tmp_path / "work") == set()
    assert list(ez.load(tmp_path / "bundle").verify()) == []


def test_a_failed_save_leaves_nothing(zoo: Path, tmp_path: Path) -> None:
    """The model whose excluded layer is to be carried is gone when it is written."""
    space = ez.fit(ez.open_zoo(zoo, exclude=["norm*"]), rank=1.0)
    coefficients = space.project(zoo / "m1")
    shutil.rmtree(zoo / "m1")
    before = listing(tmp_path)
    with pytest.raises(ez.FormatError, match="cannot be read any more"):
        space.rebuild(coefficients).save(tmp_path / "out")
    assert listing(tmp_path) == before


def test_a_failed_replacement_leaves_the_old_output(zoo: Path, tmp_path: Path) -> None:
    space = ez.fit(ez.open_zoo(zoo, exclude=["norm*"]), rank=1.0)
    space.rebuild("m0").save(tmp_path / "out")
    coefficients = space.project(zoo / "m1")
    shutil.rmtree(zoo / "m1")
    before, content = listing(tmp_path), (tmp_path / "out" / "model.safetensors").read_bytes()
    with pytest.raises(ez.FormatError, match="cannot be read any more"):
        space.rebuild(coefficients).save(tmp_path / "out", force=True)
    assert listing(tmp_path) == before
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == content


def test_outputs_are_not_overwritten_unasked(zoo: Path, tmp_path: Path) -> None:
    space = ez.fit(zoo, rank=1)
    for save, folder in ((space.save, tmp_path / "bundle"), (space.rebuild("m0").save, tmp_path / "model")):
        save(folder)
        content = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        with pytest.raises(ez.OutputError, match=f"{folder.name}: exists already.*--force"):
            save(folder)
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == content


def test_force_replaces_its_own_kind_whole(zoo: Path, tmp_path: Path) -> None:
    first, second = ez.fit(zoo, rank=1), ez.fit([zoo / "m0", zoo / "m1"], rank=1)
    first.save(tmp_path / "bundle")
    second.save(tmp_path / "bundle", force=True)
    loaded = ez.load(tmp_path / "bundle")
    assert loaded.names == ("m0", "m1")
    assert list(loaded.verify()) == []
    first.rebuild("m0").save(tmp_path / "model")
    second.rebuild("m1").save(tmp_path / "model", force=True)
    rebuilt = load_file(tmp_path / "model" / "model.safetensors")["norm.bias"]
    torch.testing.assert_close(rebuilt, load_file(zoo / "m1" / "model.safetensors")["norm.bias"], rtol=1e-6, atol=1e-6)
    assert {name.split("/")[0] for name in listing(tmp_path)} == {"zoo", "bundle", "model"}


def test_force_refuses_what_is_not_its_own(zoo: Path, tmp_path: Path) -> None:
    """Nobody's thesis is deleted: neither folders of another kind, nor files, nor links."""
    space = ez.fit(zoo, rank=1)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    (tmp_path / "file").write_text("years of work")
    (tmp_path / "link").symlink_to(zoo)
    before = listing(tmp_path)
    saves = ((space.save, "is a folder of another kind"), (space.rebuild("m0").save, "has no record"))
    for save, said in saves:
        with pytest.raises(ez.OutputError, match=f"thesis: {said}"):
            save(tmp_path / "thesis", force=True)
        with pytest.raises(ez.OutputError, match="file: is not a folder"):
            save(tmp_path / "file", force=True)
        with pytest.raises(ez.OutputError, match="link: is not a folder"):
            save(tmp_path / "link", force=True)
    with pytest.raises(ez.OutputError, match="m0: is a folder of another kind"):
        space.save(zoo / "m0", force=True)
    assert listing(tmp_path) == before
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "years of work"


def test_force_refuses_a_zoo(zoo: Path) -> None:
    with pytest.raises(ez.OutputError, match="zoo: has no record"):
        ez.fit(zoo, rank=1).rebuild("m0").save(zoo, force=True)


@pytest.mark.parametrize("kind", ["bundle", "model", "bare"])
def test_force_refuses_its_own_kind_with_other_things_in_it(zoo: Path, tmp_path: Path, kind: str) -> None:
    """One weight file does not make a folder a model that may go: it may be a home."""
    space = ez.fit(zoo, rank=1)
    save, folder = (space.save if kind == "bundle" else space.rebuild("m0").save), tmp_path / "mixed"
    if kind == "bare":
        folder.mkdir()
        shutil.copy(zoo / "m0" / "model.safetensors", folder / "some.safetensors")
    else:
        save(folder)
    (folder / "thesis").mkdir()
    (folder / "thesis" / "chapter.tex").write_text("years of work")
    said = "has no record" if kind == "bare" else "holds 'thesis/chapter.tex', which eigenzoo did not write"
    with pytest.raises(ez.OutputError, match=f"mixed: {said}"):
        save(folder, force=True)
    assert (folder / "thesis" / "chapter.tex").read_text() == "years of work"


@pytest.mark.parametrize("what", ["link", "pipe", "record"])
def test_force_refuses_what_is_no_plain_file_whatever_the_record_says(zoo: Path, tmp_path: Path, what: str) -> None:
    model, out = ez.fit(zoo, rank=1).rebuild("m0"), tmp_path / "out"
    record = model.save(out) / OUTPUT_RECORD
    entry = {"link": out / "link", "pipe": out / "pipe", "record": record}[what]
    text = json.loads(record.read_text())
    if what == "record":
        record.rename(tmp_path / "elsewhere")
    else:
        record.write_text(json.dumps({**text, "files": {**text["files"], what: ""}}))
    os.mkfifo(entry) if what == "pipe" else entry.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ez.OutputError, match="replaces only an output of the same kind"):
        model.save(out, force=True)
    assert os.path.lexists(entry)
