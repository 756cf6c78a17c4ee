"""Commands name adapters without an update, checkpoints of one run, models that are passed over, and the tools that wrote files."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from cli_runner import Run
from safetensors.torch import load_file, save_file

import eigenzoo as ez
from builders import random_factors, random_stack, write_adapter, write_stacks

MODULES = {"q_proj": (6, 5), "v_proj": (4, 5)}


def adapters(root: Path, names: list[str]) -> list[Path]:
    return [write_adapter(root / name, random_factors(MODULES, 2, seed=seed)) for seed, name in enumerate(names)]


def silence(folder: Path) -> None:
    """What PEFT writes of an adapter that was never trained: B is zero."""
    path = folder / "adapter_model.safetensors"
    tensors = {name: tensor * (0.0 if "lora_B" in name else 1.0) for name, tensor in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize("view", ["update", "factors"])
def test_an_adapter_without_an_update_is_named_in_inspect_fit_and_evidence(tmp_path: Path, run: Run, view: str) -> None:
    folders = adapters(tmp_path / "zoo", ["t0", "t1", "t2", "t3"])
    silence(folders[2])
    said = "warning: t2: all updates are zero\n"
    for words in (["inspect"], ["fit", "-o", tmp_path / "bundle", "--rank", 1], ["evidence"]):
        assert said in run(words[0], tmp_path / "zoo", "--view", view, *words[1:]).out
    assert run("evidence", tmp_path / "bundle").out.count(said) == 1
    shutil.rmtree(folders[2])
    assert "are zero" not in run("inspect", tmp_path / "zoo", "--view", view).out
    assert "are zero" not in run("evidence", tmp_path / "zoo", "--view", view).out


def test_an_adapter_of_alpha_zero_is_one_without_an_update(tmp_path: Path, run: Run) -> None:
    folders = adapters(tmp_path / "zoo", ["t0", "t1", "t2", "t3"])
    config = folders[2] / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": 0}))
    for view in ("update", "factors"):
        for words in (["inspect"], ["fit", "-o", tmp_path / view, "--rank", 1], ["evidence"]):
            done = run(words[0], tmp_path / "zoo", "--view", view, *words[1:])
            assert "warning: t2: all updates are zero\n" in done.out


def test_an_adapter_that_is_only_small_is_none_without_an_update(tmp_path: Path, run: Run) -> None:
    folders = adapters(tmp_path / "zoo", ["t0", "t1", "t2", "t3"])
    path = folders[2] / "adapter_model.safetensors"
    save_file({name: tensor * 1e-6 for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    assert "are zero" not in run("inspect", tmp_path / "zoo").out
    assert "are zero" not in run("evidence", tmp_path / "zoo").out


def test_a_model_that_is_its_base_is_named(tmp_path: Path) -> None:
    stacks = {"w": random_stack(4, (4, 3)), "v": random_stack(4, (5, 3), 1)}
    folders = write_stacks(tmp_path / "zoo", stacks)
    shutil.copytree(folders[3], tmp_path / "base")
    space = ez.fit(tmp_path / "zoo", rank=1, base=tmp_path / "base")
    assert "m3: all weights are those of the base" in space.report["warnings"]
    found = ez.evidence(tmp_path / "zoo", base=tmp_path / "base")
    assert "m3: all weights are those of the base" in found.warnings


def test_checkpoints_of_one_run_are_said_beside_the_verdict(tmp_path: Path, run: Run) -> None:
    names = [f"checkpoint-{step}" for step in (100, 200, 300, 400)]
    for folder in adapters(tmp_path / "run", names):
        (folder / "trainer_state.json").write_text("{}")
    adapters(tmp_path / "other", ["t0"])
    sources = [tmp_path / "run", tmp_path / "other"]
    said = "4 of the 5 models are checkpoints of one training run (checkpoint-100, checkpoint-200, checkpoint-300, …)"
    assert said in run("inspect", *sources).out
    assert run("inspect", *sources, "--json").json["runs"] == [names]
    verdict = run("evidence", *sources).out.splitlines()[1]
    assert said in verdict
    run("fit", *sources, "-o", tmp_path / "bundle", "--rank", 1)
    found = run("evidence", tmp_path / "bundle", "--json").json
    assert said in found["verdict"]["text"]
    assert found["runs"] == [names]
    # Folders of the same names that no trainer wrote are models as any others.
    for name in names:
        (tmp_path / "run" / name / "trainer_state.json").unlink()
    assert "training run" not in run("evidence", *sources).out
    assert run("inspect", *sources, "--json").json["runs"] == []


def test_checkpoints_of_several_runs_are_several_runs() -> None:
    from eigenzoo.zoo.runs import say_runs, training_runs

    state = ["trainer_state.json"]
    places = [(f"{run}{step}", f"s3://zoo/{run}/checkpoint-{step}", state) for run in "ab" for step in (1, 2)]
    runs = training_runs([*places, ("alone", "c/checkpoint-1", state)])
    assert runs == (("a1", "a2"), ("b1", "b2"))
    assert say_runs(runs, 5).startswith("4 of the 5 models are checkpoints of 2 training runs")


def test_models_that_are_passed_over_are_named_and_can_be_named(tmp_path: Path, run: Run) -> None:
    adapters(tmp_path / "zoo", ["t0", "t1", "_t2", ".t3"])
    adapters(tmp_path / "zoo" / "_old", ["t4"])
    (tmp_path / "zoo" / ".git").mkdir()
    (tmp_path / "zoo" / "_notes").mkdir()
    for words in (["inspect"], ["fit", "-o", tmp_path / "bundle", "--rank", 1]):
        done = run(words[0], tmp_path / "zoo", *words[1:])
        line = next(line for line in done.out.splitlines() if line.startswith("not read"))
        hidden = [str(tmp_path / "zoo" / name) for name in (".t3", "_old/t4", "_t2")]
        assert (
            line
            == f"not read, because their names begin with '.' or '_': {', '.join(hidden)}; give the full path to read one"
        )
    assert run("inspect", f"{tmp_path}/zoo/*", "--json").json["not_read"]
    every = run("inspect", tmp_path / "zoo", *hidden, "--json").json
    assert [model["name"] for model in every["models"]] == ["t0", "t1", ".t3", "t4", "_t2"]


def test_a_folder_of_nothing_but_a_hidden_model_says_so(tmp_path: Path, refused, run: Run) -> None:
    (path,) = adapters(tmp_path / "zoo", ["_parent"])
    assert "the only model there is '_parent', whose name begins with '_'. Folders and globs" in refused(
        "inspect", tmp_path / "zoo"
    )
    assert f"Name it directly: {path}" in refused("inspect", tmp_path / "zoo")
    assert run("inspect", path).code == 0


TOOLS = {
    "kohya": ({"format": "pt", "ss_sd_scripts_commit_hash": "a1b2"}, None, "kohya's sd-scripts"),
    "ai-toolkit": (
        {"format": "pt", "software": json.dumps({"name": "ai-toolkit", "version": "0.7.8"})},
        None,
        "ai-toolkit 0.7.8",
    ),
    "mlx": ({"format": "mlx"}, {"transformers_version": "4.50.0"}, "MLX"),
    "transformers": ({"format": "pt"}, {"transformers_version": "4.50.0"}, "transformers 4.50.0"),
    "diffusers": ({"format": "pt"}, {"_diffusers_version": "0.30.0"}, "diffusers 0.30.0"),
    "unsloth": ({"format": "pt"}, {"unsloth_version": "2025.1", "transformers_version": "4.50.0"}, "unsloth 2025.1"),
    "nobody": ({"format": "pt"}, None, ""),
    "a lie": ({"format": "pt", "software": "[" * 100_000, "ss": "x"}, None, ""),
}


@pytest.mark.parametrize("which", TOOLS)
def test_the_tool_that_wrote_a_model_is_told(tmp_path: Path, run: Run, which: str) -> None:
    metadata, config, tool = TOOLS[which]
    folder = tmp_path / "m"
    folder.mkdir()
    save_file({"w": torch.ones(4, 3)}, folder / "model.safetensors", metadata)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    assert run("inspect", folder, "--json").json["models"][0]["written_by"] == tool
    assert (tool or "–") in run("inspect", folder).out


def test_tools_are_named_where_models_differ(tmp_path: Path, refused) -> None:
    for number, (name, metadata) in enumerate([("w", {"format": "mlx"}), ("v", {"ss_sd_scripts_commit_hash": "a"})]):
        (tmp_path / f"m{number}").mkdir()
        save_file({name: torch.ones(4, 3)}, tmp_path / f"m{number}" / "model.safetensors", metadata)
    assert "(m0 was written by MLX, m1 was written by kohya's)" in refused("inspect", tmp_path)


def test_a_hidden_folder_that_cannot_be_listed_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Snapshots of a file system, and the trash of other users; root may list all, so the refusal is put in."""
    adapters(tmp_path / "zoo", ["t0", "t1"])
    for name in (".snapshot", "_theirs"):
        (tmp_path / "zoo" / name).mkdir()
    listdir = os.listdir

    def refusing(path: Path) -> list[str]:
        if Path(path).name in (".snapshot", "_theirs"):
            raise PermissionError(13, "Permission denied")
        return listdir(path)

    monkeypatch.setattr(os, "listdir", refusing)
    for source in (tmp_path / "zoo", str(tmp_path / "zoo" / "*"), str(tmp_path / "zoo" / "[._t]*")):
        zoo = ez.open_zoo(source)
        assert (zoo.names, zoo.hidden) == (("t0", "t1"), ())


def test_a_path_in_a_message_keeps_its_case(tmp_path: Path, refused, run: Run, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """A file that cannot be read is named as it is, although a sentence begins there."""
    (tmp_path / "zoo" / "a").mkdir(parents=True)
    (tmp_path / "zoo" / "a" / "adapter_config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert "no model can be read. The first: zoo/a, adapter_config.json: " in refused(
        "inspect", "zoo", "--allow-missing"
    )


def test_a_model_without_a_layer_of_the_bundle_is_told_how_it_counts(tmp_path: Path, refused, run: Run) -> None:  # type: ignore[no-untyped-def]
    adapters(tmp_path / "zoo", ["a", "b", "c"])
    write_adapter(tmp_path / "narrow", random_factors({"q_proj": (6, 5)}, 2, seed=7))
    assert run("fit", tmp_path / "zoo", "-o", tmp_path / "bundle", "--rank", 2).code == 0
    said = refused("project", tmp_path / "bundle", tmp_path / "narrow")
    assert "The subspace has it. Fit the subspace with --missing zero (missing='zero')" in said
    assert run("fit", tmp_path / "zoo", "-o", tmp_path / "zeros", "--rank", 2, "--missing", "zero").code == 0
    assert run("project", tmp_path / "zeros", tmp_path / "narrow").code == 0


def test_what_a_model_has_besides_the_subspace_is_counted(tmp_path: Path, run: Run) -> None:
    """A share of the energy is one of the layers that the subspace has; the others are named."""
    adapters(tmp_path / "zoo", ["a", "b", "c"])
    wide = write_adapter(tmp_path / "wide", random_factors({**MODULES, "up_proj": (7, 5), "o_proj": (5, 6)}, 2, seed=7))
    bundle = tmp_path / "bundle"
    assert run("fit", tmp_path / "zoo", "-o", bundle, "--rank", 2).code == 0
    said = "note: the subspace lacks 2 layers of wide; they are not counted here and are carried unchanged: "
    assert said in run("project", bundle, wide).out
    assert said in run("rebuild", bundle, wide, "-o", tmp_path / "rebuilt").out
    assert said in run("add", bundle, wide).out
    assert "the subspace lacks" not in run("project", bundle, tmp_path / "zoo" / "a").out
    assert "the subspace lacks" not in run("rebuild", bundle, "a", "-o", tmp_path / "a").out
