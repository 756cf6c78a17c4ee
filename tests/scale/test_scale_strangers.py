"""Work folders in a place that many may write to."""

from __future__ import annotations

from pathlib import Path

import pytest

import eigenzoo as ez
from builders import random_stack, write_stacks
from eigenzoo.subspace.fitting.work import work_folder


@pytest.mark.parametrize("planted", ["link", "writable"])
def test_a_folder_that_a_stranger_could_have_planted_is_not_used(tmp_path: Path, planted: str) -> None:
    paths = write_stacks(tmp_path / "zoo", {"w": random_stack(5, (6, 4))})
    workspace, elsewhere = tmp_path / "work", tmp_path / "elsewhere"
    workspace.mkdir()
    elsewhere.mkdir(mode=0o700)
    (elsewhere / "bundle").mkdir()
    (elsewhere / "bundle" / "basis.safetensors").write_bytes(b"somebody's own")
    with work_folder(workspace, "f" * 64) as (folder, _):
        name = folder.name
    if planted == "link":
        (workspace / name).symlink_to(elsewhere)
    else:
        elsewhere.rename(workspace / name)
        (workspace / name).chmod(0o777)
    with work_folder(workspace, "f" * 64) as (folder, lasts):
        assert not lasts
        assert folder.name != name
    assert (workspace / name / "bundle" / "basis.safetensors").read_bytes() == b"somebody's own"
    assert ez.fit(paths, 1, workspace=workspace).report["num_models"] == 5
