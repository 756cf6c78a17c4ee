"""Where the old models' files are: at hand, moved, gone, or no longer what they were."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from growth_zoos import delete, saved, write

import eigenzoo as ez
from builders import edit_model, random_stack, write_model
from eigenzoo.subspace.bundles.originals import missing_originals


def fitted(root: Path, view: str = "weight") -> tuple[ez.Subspace, list[Path]]:
    paths = write(root / "zoo", view)
    return saved(ez.fit(ez.open_zoo(paths[:5], view=view), {"models": 3}), root / "old"), paths


def test_moved_files_are_named_with_old(tmp_path: Path) -> None:
    space, paths = fitted(tmp_path)
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for path in reversed(paths[:5]):
        shutil.copytree(path, moved / path.name)  # new times of change: the checksums decide
        for file in (moved / path.name).iterdir():
            os.utime(file, ns=(1, 1))
    delete(paths[:5])
    assert not space.add(paths[5:]).report["growth"]["exact"]
    grown = saved(space.add(paths[5:], old=moved), tmp_path / "grown")
    assert grown.report["growth"]["exact"]
    whole = ez.fit([*(moved / f"m{place}" for place in range(5)), *paths[5:]], 3)
    for layer in whole.layers:
        expected, found = whole.moments(layer).centered_NN, grown.moments(layer).centered_NN
        assert float((expected - found).abs().max()) <= 1e-7 * float(expected.diagonal().max())


def test_old_must_name_all_models_and_the_same_ones(tmp_path: Path) -> None:
    space, paths = fitted(tmp_path)
    with pytest.raises(ez.UsageError, match="'m4' is not among the old models' files"):
        space.add(paths[5:], old=paths[:4])
    moved = tmp_path / "elsewhere"
    for path in paths[:5]:
        shutil.copytree(path, moved / path.name)
    edit_model(moved / "m2", block__bias=torch.zeros(5))
    with pytest.raises(ez.UsageError, match="the files of 'm2' are not those that were fitted"):
        space.add(paths[5:], old=moved)


def test_a_file_that_changed_in_content_only_is_noticed(tmp_path: Path) -> None:
    space, paths = fitted(tmp_path)
    file = paths[2] / "model.safetensors"
    size, data = file.stat().st_size, bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    assert file.stat().st_size == size
    assert not space.add(paths[5:]).report["growth"]["exact"]


def test_a_file_that_was_only_touched_is_still_the_same(tmp_path: Path) -> None:
    space, paths = fitted(tmp_path)
    os.utime(paths[2] / "model.safetensors", ns=(5, 5))
    assert space.add(paths[5:]).report["growth"]["exact"]


def test_an_adapter_whose_alpha_changed_is_noticed(tmp_path: Path) -> None:
    """The scale is in the config, not in the weight file: another alpha is another update."""
    space, paths = fitted(tmp_path, "update")
    config = paths[1] / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": 100}))
    assert not space.add(paths[5:]).report["growth"]["exact"]
    with pytest.raises(ez.UsageError, match="the files of 'm1' are not those that were fitted"):
        space.add(paths[5:], old=paths[:5])


def test_a_missing_file_counts_as_gone(tmp_path: Path) -> None:
    space, paths = fitted(tmp_path)
    (paths[0] / "model.safetensors").unlink()
    assert not space.add(paths[5:]).report["growth"]["exact"]


def test_a_bundle_that_moved_with_its_models_still_finds_them(tmp_path: Path) -> None:
    _, paths = fitted(tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    moved = [tmp_path / "there" / path.relative_to(tmp_path / "here") for path in paths]
    assert ez.load(tmp_path / "there" / "old").add(moved[5:]).report["growth"]["exact"]


def added(space: ez.Subspace, paths: list[Path], refresh: bool = False) -> tuple[str, str]:
    """What a growth without the old files says in its bundle, and what is said of the files beside."""
    grown = space.add(paths, refresh=refresh)
    assert not grown.report["growth"]["exact"]
    why = missing_originals(space)
    assert why is not None
    return grown.report["growth"]["statement"], why.detail


@pytest.mark.parametrize("refresh", [False, True])
def test_a_bundle_that_was_copied_away_says_where_it_looked_and_not_that_files_are_gone(
    tmp_path: Path, refresh: bool
) -> None:
    space, paths = fitted(tmp_path)
    (tmp_path / "far" / "away").mkdir(parents=True)
    copied = ez.load(shutil.copytree(space.path, tmp_path / "far" / "away" / "copied"))
    statement, detail = added(copied, paths[5:], refresh)
    assert "old files are not found where the bundle names them" in statement
    assert "gone" not in statement
    assert str(tmp_path) not in statement, "paths of this machine are in no report"
    looked = tmp_path / "far" / "away" / "zoo" / "m0"
    assert detail == (
        f"'m0': {looked} is not there. No old model is: the bundle names them from its own folder, so it was moved or copied "
        "without them, or they were removed"
    )
    assert missing_originals(ez.load(shutil.copytree(space.path, tmp_path / "beside"))) is None
    assert copied.add(paths[5:], old=tmp_path / "zoo" / "m[0-4]").report["growth"]["exact"]


def test_files_that_are_missing_changed_or_not_told_are_told_apart(tmp_path: Path) -> None:
    space, paths = fitted(tmp_path)
    file = paths[3] / "model.safetensors"
    data, moved = file.read_bytes(), file.rename(tmp_path / "kept")
    statement, detail = added(space, paths[5:])
    assert "old files are not found" in statement
    assert detail == f"'m3': {file} is not there, though other old models are"
    file.write_bytes(data + b"more")
    statement, detail = added(space, paths[5:])
    assert "old files have changed" in statement
    assert detail == f"'m3': {file} has {len(data) + 4} bytes, and had {len(data)} when it was read"
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert added(space, paths[5:])[1] == f"'m3': {file} has other contents than when it was read"
    unsaved = ez.fit(paths[:5], 3)
    os.utime(file, ns=(5, 5))
    assert (
        added(unsaved, paths[5:])[1] == f"'m3': {file} was written to since it was read, and its checksum is not known"
    )
    moved.replace(file)
    assert missing_originals(space) is None
    edit_model(paths[2], more=torch.zeros(5))
    with pytest.raises(ez.UsageError, match=r"files of 'm2' are not those that were fitted.*safetensors has \d+ bytes"):
        space.add(paths[5:], old=paths[:5])


def test_another_scale_of_an_adapter_is_told(tmp_path: Path) -> None:
    space, paths = fitted(tmp_path, "update")
    config = paths[1] / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": 100}))
    statement, detail = added(space, paths[5:])
    assert "old files have changed" in statement
    assert detail == f"'m1': {paths[1]} gives its updates another scale than when it was read"


def test_duplicate_names_are_refused(tmp_path: Path) -> None:
    space, paths = fitted(tmp_path)
    with pytest.raises(ez.UsageError, match="a model called 'm3' is in the subspace already"):
        space.add([paths[5], paths[3]])
    twice = ez.open_zoo([paths[5]])
    with pytest.raises(ez.ZooError, match="'m5' is used by more than one model"):
        space.add(ez.Zoo([*twice.models] * 2, ["m5", "m5"], twice.selection))


def test_a_model_of_another_shape_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    space, _ = fitted(tmp_path)
    wrong = edit_model(
        write_model(tmp_path / "wrong", {"block.weight": torch.zeros(9, 8)}), block__kernel=torch.zeros(3)
    )
    with pytest.raises(ez.MismatchError, match="block"):
        space.add([wrong])
    assert list(space.verify()) == []
    assert space.names == tuple(f"m{place}" for place in range(5))


def test_models_that_do_not_match_in_a_layer_that_was_left_out_are_still_at_hand(tmp_path: Path) -> None:
    """A fit with --allow-missing leaves layers out in which the models differ; growth looks at the others only."""
    stack = random_stack(7, (6, 5), 0).float()
    paths = []
    for place in range(7):
        extra = {"only.here": torch.ones(3)} if place % 2 else {"only.there": torch.ones(2, place + 1)}
        paths.append(write_model(tmp_path / "zoo" / f"m{place}", {"block.weight": stack[place], **extra}))
    zoo = ez.open_zoo(paths[:5], allow_missing=True)
    space = saved(ez.fit(zoo, 2), tmp_path / "old")
    for refresh in (False, True):
        grown = saved(space.add(paths[5:], refresh=refresh), tmp_path / f"grown{refresh}")
        assert grown.report["growth"]["exact"]
        assert set(grown.layers) == {"block.weight"}
        folder = grown.rebuild("m1").save(tmp_path / f"back{refresh}")
        assert torch.equal(ez.open_zoo([folder]).models[0].read("only.here"), torch.ones(3))


def test_models_that_are_links_to_files_of_other_names_are_at_hand(tmp_path: Path) -> None:
    """As single files in the cache of the hub are: the link has the name, and its target is called by its hash."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "zoo").mkdir()
    for place, folder in enumerate(write(tmp_path / "written", "weight")[:6]):
        blob = (folder / "model.safetensors").rename(tmp_path / "blobs" / f"{place:064x}")
        (tmp_path / "zoo" / f"m{place}.safetensors").symlink_to(blob)
    paths = sorted((tmp_path / "zoo").iterdir())
    fresh = ez.fit(paths[:5], 2, cache=False)
    assert missing_originals(fresh) is None
    assert ez.evaluate(fresh, lambda path: float(path.stat().st_size)).heldout
    space = saved(fresh, tmp_path / "deeper" / "bundle")
    assert missing_originals(space) is None
    assert space.add(paths[5:]).report["growth"]["exact"]
    os.replace(tmp_path / "deeper" / "bundle", tmp_path / "deeper" / "renamed")
    assert missing_originals(ez.load(tmp_path / "deeper" / "renamed")) is None


def test_pickles_ask_for_permission_and_not_for_another_place(tmp_path: Path) -> None:
    for number in range(4):
        draw = torch.Generator().manual_seed(number)
        (tmp_path / "zoo").mkdir(exist_ok=True)
        torch.save({"w": torch.randn(6, 5, generator=draw)}, tmp_path / "zoo" / f"m{number}.pt")
    space = ez.fit(ez.open_zoo(tmp_path / "zoo", allow_pickle=True), rank=2, cache=False).save(tmp_path / "bundle")
    missing = missing_originals(ez.load(space))
    assert missing is not None
    assert missing.detail == "'m0' is a pickle"
    assert missing.next_step == "--allow-pickle (allow_pickle=True) reads it"
