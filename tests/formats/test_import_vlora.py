"""Folders that vLoRA itself wrote become bundles: a rebuilt task is the adapter that vLoRA reconstructs, and peft answers alike."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import vlora
import vlora.cli
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_builders import add_adapter, edit_config, make_conv, make_llama, quietly, save_adapter
from peft import PeftModel
from safetensors.torch import load_file, save_file

import eigenzoo as ez
from builders import random_factors, write_adapter

MODULES = {"model.layers.0.self_attn.q_proj": (16, 16), "model.layers.1.mlp.up_proj": (32, 16)}
TASKS = ("sql", "chat two", "a/b", "code", "poems")
SCALE = 4.0
"""Of adapters of rank 3 with alpha 12."""


def write_zoo(root: Path) -> list[vlora.LoRAWeights]:
    """Five adapters of two modules around one mean, opened by vLoRA."""
    shared = random_factors(MODULES, 3, 99)
    adapters = []
    for number in range(len(TASKS)):
        own = random_factors(MODULES, 3, number)
        factors = {
            module: tuple(b + 0.3 * o for b, o in zip(shared[module], own[module], strict=True)) for module in own
        }
        adapters.append(vlora.load_adapter(write_adapter(root / f"a{number}", factors, lora_alpha=12)))
    return adapters


def fitted(root: Path, **options: Any) -> vlora.SharedSubspace:
    return vlora.SharedSubspace.from_adapters(write_zoo(root / "zoo"), task_ids=list(TASKS), **options)


def absorbed(root: Path) -> vlora.SharedSubspace:
    """Two tasks fitted, the others absorbed one by one."""
    adapters = write_zoo(root / "zoo")
    shared = vlora.SharedSubspace.from_adapters(adapters[:2], task_ids=list(TASKS[:2]), num_components=2)
    for adapter, task in zip(adapters[2:], TASKS[2:], strict=True):
        shared.absorb_incremental(adapter, task)
    return shared


def projected(root: Path) -> vlora.SharedSubspace:
    """Tasks that took no part in the fit: the mean is not theirs."""
    adapters = write_zoo(root / "zoo")
    shared = vlora.SharedSubspace.from_adapters(adapters[:3], task_ids=list(TASKS[:3]), num_components=2)
    for adapter, task in zip(adapters[3:], TASKS[3:], strict=True):
        shared.add_task(shared.project(adapter, task))
    return shared


def leaning(root: Path) -> vlora.SharedSubspace:
    """Directions that are neither orthogonal nor of norm one, and one of them twice."""
    shared = fitted(root, num_components=3)
    for directions in (shared.components_a, shared.components_b):
        for layer, rows in directions.items():
            directions[layer] = torch.tensor([[1.0, 0.5, 0.0], [-2.0, 3.0, 1.0], [1.0, 0.5, 0.0]]) @ rows
    return shared


def doubled(root: Path) -> vlora.SharedSubspace:
    return fitted(root, num_components=2).to(dtype=torch.float64)


KINDS: dict[str, Callable[[Path], vlora.SharedSubspace]] = {
    "components": lambda root: fitted(root, num_components=2),
    "the mean alone": lambda root: fitted(root, num_components=0),
    "everything": lambda root: fitted(root, num_components=5),
    "adaptive": lambda root: fitted(root, adaptive_k=True, variance_threshold=0.9),
    "absorbed": absorbed,
    "projected": projected,
    "leaning": leaning,
    "quantised in place": lambda root: quantised(root),
    "float64": doubled,
}


def quantised(root: Path) -> vlora.SharedSubspace:
    shared = fitted(root, num_components=2)
    shared.quantize(bits=4)
    return shared


def assert_same(space: ez.Subspace, shared: vlora.SharedSubspace, scale: float = SCALE) -> None:
    """All tasks of a bundle are what vLoRA reconstructs, to 1e-6 of the largest value."""
    assert space.names == tuple(shared.tasks)
    for task in shared.tasks:
        expected, rebuilt = shared.reconstruct(task), space.rebuild(task)
        for layer in expected.layer_names:
            for factor, values, times in (("A", expected.lora_a, 1.0), ("B", expected.lora_b, scale)):
                wanted = values[layer].double() * times
                error = float((rebuilt.layer(f"{layer}.lora_{factor}") - wanted).abs().max() / wanted.abs().max())
                assert error < 1e-6, (task, layer, factor, error)


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
        assert torch.equal(basis.directions().flatten(1), shared.components_b[layer])
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
    assert any("made up" in warning for warning in by_alpha.report["warnings"])


def test_what_is_no_factor_comes_from_the_adapter_that_they_are_like(tmp_path: Path) -> None:
    chosen = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "r": 2}
    folder = save_adapter(add_adapter(make_llama(), **chosen), tmp_path / "zoo" / "t0")
    shared = vlora.SharedSubspace.from_adapters([vlora.load_adapter(folder)] * 2, task_ids=["a", "b"], num_components=1)
    shared.save(tmp_path / "vlora")
    space = ez.import_subspace(tmp_path / "vlora", like=folder)
    assert any("1 tensors that are no factors come from t0" in warning for warning in space.report["warnings"])
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


# Faults. Each is made in a folder that vLoRA wrote, and each is refused with nothing written.


def edit_meta(folder: Path, **changes: Any) -> None:
    """Change entries of vLoRA's metadata; None removes them."""
    path = folder / "subspace_meta.json"
    meta = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in meta.items() if value is not None}))


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
    "a nameless layer": (lambda at: edit_meta(at, layer_names=[*MODULES, ""]), "a layer whose name"),
    "half a character": (lambda at: edit_meta(at, task_ids=["\ud800"]), "a task whose name"),
    "no layers": (lambda at: edit_meta(at, layer_names=[]), "there is no layer"),
    "no tasks": (lambda at: edit_meta(at, task_ids=[]), "there is no task"),
    "layers of text": (lambda at: edit_meta(at, layer_names="q"), "layer_names is no list"),
    "outside": (lambda at: edit_meta(at, task_filenames={"sql": "/../../sql"}), r"holds '\.\.'"),
    "file names": (lambda at: edit_meta(at, task_filenames=["sql"]), "task_filenames"),
    "one file": (
        lambda at: edit_meta(at, task_filenames={"sql": "x", "code": "x"}),
        "tasks 'sql' and 'code' are one file",
    ),
    "huge shapes": (lambda at: edit_meta(at, shapes_a={m: [3, 2**60] for m in MODULES}), "has at most"),
    "negative shapes": (lambda at: edit_meta(at, shapes_a={m: [-3, 16] for m in MODULES}), "A of shape"),
    "other ranks": (lambda at: edit_meta(at, shapes_a={m: [4, 12] for m in MODULES}), "A of shape"),
    "another format": (lambda at: edit_meta(at, format="int3"), "format 'int3'"),
    "packed without": (lambda at: edit_meta(at, format="nf4_packed"), r"subspace_nf4\.safetensors"),
    "a huge rank": (lambda at: edit_meta(at, rank=10**30, shapes_a=None), "rank 1000"),
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


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
    with pytest.raises(ez.MismatchError, match="factors of shapes"):
        importing(like=wide)
    with pytest.raises(ez.MismatchError, match="rank 3, and 8 in the adapter to be like"):
        importing(like=edit_config(shutil.copytree(other, tmp_path / "eight"), r=8) / "adapter_config.json")
    with pytest.raises(ez.UnsupportedError, match="use_dora"):
        importing(like=edit_config(shutil.copytree(other, tmp_path / "dora"), use_dora=True) / "adapter_config.json")
    with pytest.raises(ez.UsageError, match=r"the scale of the adapters is not known.*alpha = 3, the rank"):
        importing()
    with pytest.raises(ez.UsageError, match="both like and alpha are given"):
        importing(like=other, alpha=3)
    with pytest.raises(ez.UsageError, match="alpha nan"):
        importing(alpha=float("nan"))
    with pytest.raises(ez.FormatError, match="missing"):
        importing(like=tmp_path / "nothing")


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ez.FormatError, match="there is no such folder"):
        ez.import_subspace(tmp_path / "nothing", alpha=1)
    with pytest.raises(ez.FormatError, match=r"no subspace of another tool is here.*vLoRA saved"):
        ez.import_subspace(tmp_path, alpha=1)
