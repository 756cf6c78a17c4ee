"""Commands name what rebuilt models lack of the files beside the originals."""

from __future__ import annotations

import re
from pathlib import Path

from cli_runner import Run

from builders import random_factors, write_adapter

MODULES = {"q_proj": (6, 5), "v_proj": (4, 5)}


def test_inspect_fit_and_rebuild_name_what_is_left(tmp_path: Path, run: Run) -> None:
    zoo = tmp_path / "zoo"
    for seed in range(3):
        write_adapter(zoo / f"t{seed}", random_factors(MODULES, 2, seed=seed))
        (zoo / f"t{seed}" / "README.md").touch()
    (zoo / "t1" / "value_head.safetensors").touch()
    (zoo / "t1" / "second").mkdir()
    (zoo / "t1" / "second" / "adapter_config.json").touch()
    bundle = tmp_path / "bundle"
    done = run("inspect", zoo)
    assert "not carried: value_head.safetensors (1 model), second (1 model), README.md" in done.out
    warning = "warning: weights beside these models are neither read nor carried: t1/value_head.safetensors"
    below = "warning: folders below these models hold models of their own, which are not read: t1/second"
    assert warning in done.out
    assert below in done.out
    found = run("inspect", zoo, "--json").json
    assert found["not_carried"][0] == {"file": "value_head.safetensors", "kind": "weights", "num_models": 1}
    done = run("fit", zoo, "-o", bundle, "--rank", 1)
    assert "not carried: value_head.safetensors (1 model), second (1 model), README.md" in done.out
    assert warning in done.out
    assert below in done.out
    done = run("rebuild", bundle, "t0", "-o", tmp_path / "t0")
    assert re.search(r"^not carried: README.md$", done.out, re.M)
    assert "warning" not in done.out
    done = run("rebuild", bundle, "t1", "-o", tmp_path / "t1")
    assert "not carried: README.md, second" in done.out
    assert "warning: these weights beside the original were not written: value_head.safetensors" in done.out
    answer = run("rebuild", bundle, "t1", "-o", tmp_path / "again", "--json").json
    assert answer["not_carried"] == ["value_head.safetensors", "README.md", "second"]
    assert answer["weights_not_carried"] == ["value_head.safetensors"]
    assert "weights beside these models" in run("evidence", bundle).out
