"""`eigenzoo route`: what it prints and writes, beside `ez.route`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from cli_runner import Run
from safetensors.torch import load_file, save_file

import eigenzoo as ez
from builders import random_factors, write_adapter
from routing_data import Tasks

MODULES = {"h.0.q_proj": (12, 10), "h.0.v_proj": (8, 10)}
TASKS = Tasks(("m0", "m1", "m3"))
INPUTS = torch.cat([TASKS.draw(8, seed=2)["m1"], TASKS.draw(2, seed=3)["m3"]])


def test_the_command_end_to_end(run: Run, tmp_path: Path) -> None:
    for number in range(5):
        write_adapter(tmp_path / "zoo" / f"m{number}", random_factors(MODULES, 2, number), alpha=4)
    space = ez.fit(ez.open_zoo(tmp_path / "zoo"), rank=2)
    space.save(tmp_path / "bundle")
    examples, inputs, output = (tmp_path / name for name in ("examples.safetensors", "inputs.npy", "mix.safetensors"))
    save_file(TASKS.draw(30, seed=1), examples)
    far = torch.full((1, 6), 1e4).double()
    np.save(inputs, torch.cat([INPUTS, far]).numpy())
    wanted = ez.route(space, inputs, examples)
    words = ("route", tmp_path / "bundle", inputs, "--examples", examples)
    document = run(*words, "--json").json
    assert document == {**wanted.to_dict(), "output": None}
    assert document["models"] == {"m0": 0, "m1": 8, "m3": 2}
    assert document["num_abstained"] == 1
    assert document["inputs"][-1]["model"] is None
    shown = run(*words, "-o", output)
    assert shown.code == 0
    assert "at most 5.00 % of inputs like the examples are left without a model" in " ".join(shown.out.split())
    assert "--like m1" in shown.out
    assert run("rebuild", tmp_path / "bundle", output, "-o", tmp_path / "rebuilt", "--like", "m1").code == 0
    space.rebuild(wanted.coefficients(space)).save(tmp_path / "direct")
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("rebuilt", "direct")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    refused = run(*words, "-o", output)
    assert (refused.code, refused.out) == (2, "")
    assert run(*words, "-o", output, "--force").code == 0
    assert run(*words, "--alpha", "0.01").code == 2
