"""One tree of names: what a glob matches on disk, in a listing, and by Python's own glob."""

from __future__ import annotations

import glob
import os
import random
from pathlib import Path

import pytest

from eigenzoo.errors import ZooError
from eigenzoo.formats import tree
from eigenzoo.formats.remote.hub_files import find_in_tree
from eigenzoo.formats.tree import Disk, Listed, models_at, models_matching, split_pattern
from eigenzoo.zoo.sources import find_models

NAMES = ("a", "b", "ab", "run-1", "run-10", "run-9", ".hidden", "_base")
WEIGHTS = "model.safetensors"
PATTERNS = (
    "*",
    "a*",
    "**",
    "**/a",
    "*/*",
    "a/**",
    "**/run-[19]/*",
    "**/b/**",
    "r*/**/ab",
    "**/**/a",
    "*/*/**",
    ".*",
    "*/.h*",
)


def make_tree(root: Path, seed: int) -> list[str]:
    """Folders of models, files and nothing, three deep; returns the files."""
    draw = random.Random(seed)
    files = []
    for _ in range(30):
        folder = "/".join(draw.sample(NAMES, draw.randint(1, 3)))
        files.append(f"{folder}/{draw.choice((WEIGHTS, 'one.safetensors', 'notes.md', 'x.bin'))}")
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return sorted(set(files))


def listed(files: list[str]) -> Listed:
    root = Listed()
    for name in files:
        root.put(name, name)
    return root


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_glob_matches_what_pythons_does(pattern: str, seed: int, tmp_path: Path) -> None:
    files = make_tree(tmp_path, seed)
    passed: list[object] = []
    found = models_matching(Disk(str(tmp_path)), pattern.split("/"), passed.append)
    ours = {os.path.relpath(getattr(entry, "path", entry), tmp_path) for entry in [*found, *passed]}
    python = {name.rstrip("/") for name in glob.glob(pattern, root_dir=tmp_path, recursive=True)}
    models = {name for name in python if name and Path(name).name.startswith((".", "_"))}
    for name in python - models - {""}:
        entry = Disk(str(tmp_path / name)) if (tmp_path / name).is_dir() else name
        models |= {name} if tree.is_model(entry, name) else set()
    assert ours == models
    store = models_matching(listed(files), tuple(pattern.split("/")))
    assert {getattr(entry, "name", entry) for entry in store} == {
        name for name in ours if not Path(name).name.startswith((".", "_"))
    }


@pytest.mark.parametrize("seed", range(8))
def test_a_folder_a_listing_and_a_repository_hold_the_same_models_in_one_order(seed: int, tmp_path: Path) -> None:
    files = make_tree(tmp_path, seed)
    on_disk = [path.relative_to(tmp_path).as_posix() for path in find_models(tmp_path) if isinstance(path, Path)]
    assert len(on_disk) > 3
    assert [getattr(entry, "name", entry) for entry in models_at(listed(files), 3)] == on_disk
    assert [model.path for model in find_in_tree(dict.fromkeys(files, 1), "", 3, "it")] == on_disk


def test_two_stars_go_through_no_link_and_a_bound_ends_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tree(tmp_path / "zoo", 0)
    (tmp_path / "zoo" / "round").symlink_to(tmp_path / "zoo")
    (tmp_path / "link").symlink_to(tmp_path / "zoo")
    direct, through = (list(models_matching(Disk(str(tmp_path / name)), ["**"])) for name in ("zoo", "link"))
    assert len(direct) == len(through) > 3
    inner = lambda follow: list(models_matching(Disk(str(tmp_path)), ["l*", "*", "*"], follow=follow))  # noqa: E731
    assert inner(True)
    assert not inner(False)
    monkeypatch.setattr(tree, "MAX_LOOKED_AT", 5)
    with pytest.raises(ZooError, match="the folder contains more than 5 names"):
        list(models_matching(Disk(str(tmp_path)), ["**"]))


def test_many_stars_look_at_each_name_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = len(make_tree(tmp_path, 1))
    monkeypatch.setattr(tree, "MAX_LOOKED_AT", 4 * names)
    assert list(models_matching(Disk(str(tmp_path)), [*["**"] * 20, "run-1"]))


def test_a_pattern_is_split_at_its_first_wildcard() -> None:
    assert split_pattern("*") == (".", ["*"])
    assert split_pattern("../zoo//m*/") == ("../zoo/", ["m*"])
