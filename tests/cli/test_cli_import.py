"""`eigenzoo import`: a folder that vLoRA saved, on the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import vlora
from cli_runner import Run
from safetensors.torch import load_file

from builders import random_factors, write_adapter

MODULES = {"layers.0.q": (6, 8), "layers.0.v": (5, 8)}


@pytest.fixture
def shared(tmp_path: Path) -> vlora.SharedSubspace:
    """Four adapters of rank 2 and alpha 6, in vLoRA's folder `vlora`."""
    folders = [write_adapter(tmp_path / "zoo" / f"a{n}", random_factors(MODULES, 2, n), lora_alpha=6) for n in range(4)]
    adapters = [vlora.load_adapter(folder) for folder in folders]
    made = vlora.SharedSubspace.from_adapters(adapters, task_ids=[folder.name for folder in folders], num_components=2)
    made.save(tmp_path / "vlora")
    return made


def test_a_folder_becomes_a_bundle_that_the_other_commands_take(
    tmp_path: Path, shared: vlora.SharedSubspace, run: Run, refused: Callable[..., str]
) -> None:
    bundle = tmp_path / "bundle"
    done = run("import", tmp_path / "vlora", "-o", bundle, "--like", tmp_path / "zoo" / "a0")
    assert done.code == 0, done.err
    assert "4 models, 4 layers, view factors, axes models" in done.out
    assert "note: imported from vLoRA: the models are the adapters that it rebuilds" in done.out
    assert run("verify", bundle, "--json").json["ok"]
    assert 0 < run("project", bundle, tmp_path / "zoo" / "a1", "--json").json["models"]["a1"]["residual"] < 1
    said = run("rebuild", bundle, "a2", "-o", tmp_path / "out")
    assert "as vLoRA rebuilds it; the error against the original is unknown" in said.out
    assert run("rebuild", bundle, "a3", "-o", tmp_path / "out3", "--json").json["residual"] is None
    rebuilt, expected = load_file(tmp_path / "out" / "adapter_model.safetensors"), shared.reconstruct("a2")
    for layer in MODULES:
        found = rebuilt[f"base_model.model.{layer}.lora_B.weight"]
        torch.testing.assert_close(found, 3 * expected.lora_b[layer], rtol=1e-6, atol=1e-6)
    assert "the bundle has no moments" in refused("evidence", bundle)
    assert "the bundle has no moments" in refused("report", bundle, "-o", tmp_path / "page.html")
    write_adapter(tmp_path / "new", random_factors(MODULES, 2, 9), lora_alpha=6)
    grown = tmp_path / "grown"
    added = run("add", bundle, tmp_path / "new", "-o", grown)
    assert "the basis is unchanged; the bundle has no moments · lost: " in added.out
    assert "of the new models' energy; the error of vLoRA for the imported models is unknown" in added.out
    card = (grown / "README.md").read_text()
    assert "```bash\neigenzoo import FOLDER --like ADAPTER -o BUNDLE\neigenzoo add BUNDLE MODEL…\n```" in card
    assert "eigenzoo fit" not in card
    assert run("rebuild", grown, "new", "-o", tmp_path / "out4", "--json").json["residual"] > 0
    assert run("rebuild", grown, "a3", "-o", tmp_path / "out5", "--json").json["residual"] is None


def test_json_is_one_document(tmp_path: Path, shared: vlora.SharedSubspace, run: Run) -> None:
    found = run("import", tmp_path / "vlora", "-o", tmp_path / "bundle", "--alpha", 6, "--json").json
    assert found["imported"]["tool"] == "vLoRA"
    assert found["num_models"] == 4


def test_an_output_is_never_overwritten_without_force(
    tmp_path: Path, shared: vlora.SharedSubspace, run: Run, refused: Callable[..., str]
) -> None:
    words = ("import", tmp_path / "vlora", "--alpha", 6, "-o")
    assert run(*words, tmp_path / "bundle").code == 0
    assert "exists already" in refused(*words, tmp_path / "bundle")
    assert run(*words, tmp_path / "bundle", "--force").code == 0
    assert "is a folder of another kind" in refused(*words, tmp_path / "zoo", "--force")
    assert (tmp_path / "zoo" / "a0" / "adapter_model.safetensors").is_file()


def test_what_cannot_be_known_is_asked_for(
    tmp_path: Path, shared: vlora.SharedSubspace, refused: Callable[..., str]
) -> None:
    said = refused("import", tmp_path / "vlora", "-o", tmp_path / "bundle")
    assert "the scale of the adapters is not known" in said
    assert "--like" in said
    assert "this is not an adapter, because there is no adapter_config.json. Name an adapter of the zoo" in refused(
        "import", tmp_path / "vlora", "-o", tmp_path / "bundle", "--like", tmp_path / "zoo"
    )
    assert "imported are a folder that vLoRA saved" in refused(
        "import", tmp_path / "zoo" / "a0", "-o", tmp_path / "bundle"
    ).replace("Imported", "imported")
    assert not (tmp_path / "bundle").exists()
