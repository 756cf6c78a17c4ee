"""Folders that vLoRA itself wrote become bundles: a rebuilt task is the adapter that vLoRA reconstructs, and peft answers alike."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import vlora
import vlora.cli
from click.testing import CliRunner
from model_builders import add_adapter, make_conv, make_llama, quietly, save_adapter
from peft import PeftModel
from safetensors.torch import load_file
from vlora_cases import KINDS, MODULES, SCALE, TASKS, assert_same, edit_meta, fitted, leaning

import eigenzoo as ez
from builders import random_factors, write_adapter


@pytest.mark.parametrize("kind", KINDS)
def test_a_rebuilt_task_is_what_vlora_reconstructs(tmp_path: Path, kind: str) -> None:
    shared = KINDS[kind](tmp_path)
    shared.save(tmp_path / "vlora")
    space = ez.import_subspace(tmp_path / "vlora", like=tmp_path / "zoo" / "a1")
    assert (space.view, space.axes, space.has_moments) == ("factors", ("models",), False)
    assert_same(space, shared)
    space.save(tmp_path / "bundle")
    loaded = ez.load(tmp_path / "bundle")
    assert list(loaded.verify()) == []
    assert_same(loaded, vlora.SharedSubspace.load(tmp_path / "vlora"))


@pytest.mark.parametrize("block_size", [64, 7])
def test_packed_directions_are_what_vlora_unpacks(tmp_path: Path, block_size: int) -> None:
    fitted(tmp_path, num_components=3).save_quantized(tmp_path / "vlora", block_size=block_size)
    space = ez.import_subspace(tmp_path / "vlora", alpha=12)
    assert_same(space, vlora.SharedSubspace.load(tmp_path / "vlora"))
    assert any("NF4" in warning for warning in space.report["warnings"])
    assert any("were not orthonormal" in warning for warning in space.report["warnings"])


def test_orthonormal_directions_and_their_loadings_stay_as_they_are(tmp_path: Path) -> None:
    shared = fitted(tmp_path, num_components=2)
    shared.save(tmp_path / "vlora")
    space = ez.import_subspace(tmp_path / "vlora", alpha=12)
    assert not any("orthonormal" in warning for warning in space.report["warnings"])
    for layer in MODULES:
        basis = space.layers[f"{layer}.lora_B"]
        assert torch.equal(basis.operator().table.flatten(1), shared.components_b[layer])
        found = space.coefficients("code").values[f"{layer}.lora_B"]
        assert torch.equal(found, SCALE * shared.tasks["code"].loadings_b[layer])


def test_directions_that_lean_are_said_and_made_orthonormal(tmp_path: Path) -> None:
    leaning(tmp_path).save(tmp_path / "vlora")
    space = ez.import_subspace(tmp_path / "vlora", alpha=12)
    (said,) = [warning for warning in space.report["warnings"] if "orthonormal" in warning]
    assert "the directions of 4 of 4 layers" in said
    assert max(basis.orthonormality() for basis in space.layers.values()) < 1e-6


@pytest.mark.parametrize("kind", ["components", "projected", "leaning"])
def test_energies_are_those_of_the_rebuilt_models(tmp_path: Path, kind: str) -> None:
    KINDS[kind](tmp_path).save(tmp_path / "vlora")
    space = ez.import_subspace(tmp_path / "vlora", alpha=12)
    assert_energies(space)


def assert_energies(space: ez.Subspace) -> None:
    """Energies, variance and the mean's share are those of the rebuilt layers, within float32."""
    for layer, fit in space.report["layers"].items():
        rows_ND = torch.stack([space.rebuild(name).layer(layer).flatten() for name in space.names])
        for name, row_D in zip(space.names, rows_ND, strict=True):
            assert space.coefficients(name).energies[layer] == pytest.approx(float(row_D.square().sum()), rel=1e-5)
        energy, mean_D = float(rows_ND.square().sum()), rows_ND.mean(0)
        assert fit["energy"] == pytest.approx(energy, rel=1e-5)
        assert fit["variance"] == pytest.approx(float((rows_ND - mean_D).square().sum()), rel=1e-5)
        assert fit["mean_energy"] == pytest.approx(len(rows_ND) * float(mean_D.square().sum()) / energy, rel=1e-5)


def test_a_folder_of_an_early_version_without_shapes_and_file_names(tmp_path: Path) -> None:
    shared = fitted(tmp_path, num_components=2)
    shared.tasks = {"sql": shared.tasks["sql"], "code": shared.tasks["code"]}
    shared.save(tmp_path / "vlora")
    edit_meta(tmp_path / "vlora", shapes_a=None, shapes_b=None, task_filenames=None)
    assert_same(ez.import_subspace(tmp_path / "vlora", alpha=12), shared)


def test_a_new_adapter_projects_as_vlora_projects_it(tmp_path: Path) -> None:
    shared = fitted(tmp_path, num_components=2)
    shared.save(tmp_path / "vlora")
    space = ez.import_subspace(tmp_path / "vlora", like=tmp_path / "zoo" / "a0")
    new = write_adapter(tmp_path / "new", random_factors(MODULES, 3, 50), lora_alpha=12)
    found, wanted = space.project(new), shared.project(vlora.load_adapter(new), "new")
    for layer in MODULES:
        torch.testing.assert_close(found.values[f"{layer}.lora_A"], wanted.loadings_a[layer], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            found.values[f"{layer}.lora_B"], SCALE * wanted.loadings_b[layer], rtol=1e-5, atol=1e-4
        )
    shared.add_task(wanted)
    kept, whole = shared.reconstruct("new"), vlora.load_adapter(new)
    pairs = [(1.0, kept.lora_a, whole.lora_a), (SCALE, kept.lora_b, whole.lora_b)]
    lost = sum(float((s * (a[m] - b[m])).square().sum()) for s, a, b in pairs for m in MODULES)
    assert found.residual == pytest.approx(
        lost / sum(float((s * b[m]).square().sum()) for s, _, b in pairs for m in MODULES)
    )


@pytest.mark.parametrize("refresh", [False, True])
@pytest.mark.parametrize("num_components", [2, 5])
def test_models_are_added_to_an_imported_bundle(tmp_path: Path, refresh: bool, num_components: int) -> None:
    shared = fitted(tmp_path, num_components=num_components)
    shared.save(tmp_path / "vlora")
    space = ez.import_subspace(tmp_path / "vlora", like=tmp_path / "zoo" / "a0")
    new = write_adapter(tmp_path / "new", random_factors(MODULES, 3, 50), lora_alpha=12)
    space.add(new, refresh=refresh).save(tmp_path / "bundle")
    grown = ez.load(tmp_path / "bundle")
    assert grown.names == (*TASKS, "new")
    assert list(grown.verify()) == []
    assert not grown.report["growth"]["exact"]
    assert grown.report["imported"]["tool"] == "vLoRA"
    assert grown.report["warnings"] == space.report["warnings"]
    if not refresh:
        assert_same(space, shared)


@torch.no_grad()
def answers(folder: Path | None, make: Callable[[], torch.nn.Module], example: torch.Tensor) -> torch.Tensor:
    model = make()
    if folder is not None:
        model = quietly(PeftModel.from_pretrained, model, folder).eval()
    found = model(example)
    return getattr(found, "logits", found)


TOKENS = torch.arange(12).view(2, 6)
CONV = {"target_modules": ["first", "second", "third"], "r": 2, "lora_alpha": 6, "use_rslora": True}
LLAMA: dict[str, Any] = {"target_modules": ["q_proj", "up_proj"], "r": 4, "lora_alpha": 2}
REAL = {
    "llama": (make_llama, TOKENS, LLAMA),
    "convolutions": (make_conv, torch.randn(1, 3, 6, 6, generator=torch.Generator().manual_seed(0)), CONV),
}


def save_zoo(root: Path, make: Callable[[], torch.nn.Module], chosen: dict[str, Any]) -> list[Path]:
    """Four adapters that peft saved."""
    folders = []
    for number in range(4):
        peft = add_adapter(make(), **chosen)
        with torch.no_grad():
            for name, parameter in peft.named_parameters():
                if "lora_" in name:
                    noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
                    parameter.copy_(parameter + 0.2 * noise)
        folders.append(save_adapter(peft, root / f"t{number}"))
    return folders


@pytest.mark.parametrize("kind", REAL)
def test_peft_answers_with_a_rebuilt_adapter_as_with_vloras_own(tmp_path: Path, kind: str) -> None:
    make, example, chosen = REAL[kind]
    folders = save_zoo(tmp_path / "zoo", make, chosen)
    adapters = [vlora.load_adapter(folder) for folder in folders]
    shared = vlora.SharedSubspace.from_adapters(
        adapters, task_ids=[folder.name for folder in folders], num_components=2
    )
    shared.save(tmp_path / "vlora")
    space = ez.import_subspace(tmp_path / "vlora", like=folders[0])
    for place, task in enumerate(shared.tasks):
        theirs = shared.reconstruct(task)
        theirs.metadata = adapters[place].metadata  # vLoRA forgets alpha; its writer takes a config where it gets one
        vlora.save_adapter(theirs, tmp_path / "theirs" / task)
        expected = answers(tmp_path / "theirs" / task, make, example)
        found = answers(space.rebuild(task).save(tmp_path / "ours" / task), make, example)
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)
        assert (expected - answers(None, make, example)).abs().max() > 1e-2


def test_folders_of_vloras_own_command_line_answer_as_its_export(tmp_path: Path) -> None:
    folders = save_zoo(tmp_path / "zoo", make_llama, LLAMA)
    names = "model.layers.0.self_attn.q_proj,model.layers.1.self_attn.q_proj,model.layers.0.mlp.up_proj,model.layers.1.mlp.up_proj"
    for words in (
        ["compress", *folders[:3], "-o", tmp_path / "vlora", "--num-components", 2],
        ["add", tmp_path / "vlora", folders[3], "--task-id", "late", "--incremental"],
        ["export", tmp_path / "vlora", "t1", "-o", tmp_path / "theirs", "--alpha", 2, "--target-modules", names],
    ):
        done = CliRunner().invoke(vlora.cli.cli, [str(word) for word in words])
        assert done.exit_code == 0, done.output
    space = ez.import_subspace(tmp_path / "vlora", alpha=2)
    assert space.names == ("t0", "t1", "t2", "late")
    found = answers(space.rebuild("t1").save(tmp_path / "ours"), make_llama, TOKENS)
    torch.testing.assert_close(found, answers(tmp_path / "theirs", make_llama, TOKENS), rtol=2e-5, atol=2e-5)


def test_without_a_model_adapter_the_config_is_made_up_and_peft_takes_it(tmp_path: Path) -> None:
    folders = save_zoo(tmp_path / "zoo", make_llama, LLAMA)
    adapters = [vlora.load_adapter(folder) for folder in folders]
    vlora.SharedSubspace.from_adapters(adapters, task_ids=["a", "b", "c", "d"], num_components=3).save(
        tmp_path / "vlora"
    )
    like, by_alpha, by_config = (
        ez.import_subspace(tmp_path / "vlora", **chosen)
        for chosen in ({"like": folders[0]}, {"alpha": 2}, {"like": folders[0] / "adapter_config.json"})
    )
    expected = answers(like.rebuild("c").save(tmp_path / "like"), make_llama, TOKENS)
    for number, space in enumerate((by_alpha, by_config)):
        torch.testing.assert_close(
            answers(space.rebuild("c").save(tmp_path / f"{number}"), make_llama, TOKENS), expected
        )
    config = json.loads((tmp_path / "0" / "adapter_config.json").read_text())
    assert "model.layers.0.self_attn.q_proj" in config["target_modules"]
    assert any("was made from their modules" in warning for warning in by_alpha.report["warnings"])


def test_what_is_no_factor_comes_from_the_adapter_that_they_are_like(tmp_path: Path) -> None:
    chosen = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "r": 2}
    folder = save_adapter(add_adapter(make_llama(), **chosen), tmp_path / "zoo" / "t0")
    shared = vlora.SharedSubspace.from_adapters([vlora.load_adapter(folder)] * 2, task_ids=["a", "b"], num_components=1)
    shared.save(tmp_path / "vlora")
    space = ez.import_subspace(tmp_path / "vlora", like=folder)
    assert any("1 tensors other than factors come from t0" in warning for warning in space.report["warnings"])
    assert space.report["duplicates"] == [["a", "b"]]
    original, rebuilt = load_file(folder / "adapter_model.safetensors"), space.rebuild("b").save(tmp_path / "out")
    (head,) = [name for name in original if "lora_" not in name]
    assert torch.equal(load_file(rebuilt / "adapter_model.safetensors")[head], original[head])
    torch.testing.assert_close(answers(rebuilt, make_llama, TOKENS), answers(folder, make_llama, TOKENS))
    bare = ez.import_subspace(tmp_path / "vlora", like=folder / "adapter_config.json")
    assert any("modules_to_save ['lm_head']" in warning for warning in bare.report["warnings"])


def test_a_bundle_says_what_it_does_not_know(tmp_path: Path) -> None:
    fitted(tmp_path, num_components=2).save(tmp_path / "vlora")
    folder = ez.import_subspace(tmp_path / "vlora", alpha=12).save(tmp_path / "bundle")
    space = ez.load(folder)
    assert "what that had lost of the original adapters" in (folder / "README.md").read_text()
    assert all(fit["captured"] is None and fit["heldout"] is None for fit in space.report["layers"].values())
    assert all(model.source.files == {} for model in space.manifest.models)
    names = {Path(file).name for file in space.report["imported"]["files"]}
    assert {"subspace.safetensors", "task_chat_two.safetensors"} <= names
    with pytest.raises(ez.BundleError, match=r"the bundle has no moments"):
        ez.evidence(space)
