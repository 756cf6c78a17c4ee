"""Adapters of components and loadings, laid out as the universal-subspace papers' code lays them out, become bundles.

Their PEFT is a fork that no registry has. The files are written here by safetensors and torch under the names and shapes that its
source gives them, from adapters that peft saved; what they mean is computed by that source's formula, x·(C_A·L_A)·(C_B·L_B)ᵀ.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from model_builders import add_adapter, make_llama, quietly, save_adapter
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

import eigenzoo as ez

RANK, ALPHA = 4, 10
TASKS = ("task1", "task2", "task3", "task4", "task5")
TOKENS = torch.arange(12).view(2, 6)
STYLES = {
    "unisub, language generation": ("subspaceadapter", ".weight"),
    "unisub": ("subspaceadapter", ""),
    "EigenLoRAx": ("eigenlora", ""),
    "EigenFlux": ("eigenflux", ""),
}

Parts = dict[str, dict[str, tuple[Tensor, Tensor]]]
"""Per task and factor (named as in the adapter's file) its components (S, K) and loadings (K, rank)."""


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five adapters of one mean, saved by peft."""
    root = tmp_path_factory.mktemp("zoo")
    for number, task in enumerate(TASKS):
        settings = {"target_modules": ["q_proj", "up_proj"], "r": RANK, "lora_alpha": ALPHA}
        peft = add_adapter(make_llama(), **settings)
        draw = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for name, parameter in peft.named_parameters():
                if "lora_" in name:
                    parameter.add_(0.3 * torch.randn(parameter.shape, generator=draw))
        save_adapter(peft, root / task)
    return root


def split(zoo: Path, num_components: int) -> Parts:
    """Components of each factor over all tasks, by an SVD of their columns side by side; loadings by projection."""
    adapters = {task: load_file(zoo / task / "adapter_model.safetensors") for task in TASKS}
    found: Parts = {task: {} for task in TASKS}
    for name in adapters[TASKS[0]]:
        tall = {task: adapters[task][name].T if "lora_A" in name else adapters[task][name] for task in TASKS}
        columns = torch.cat(list(tall.values()), 1)
        left, _, _ = torch.linalg.svd(columns - columns.mean(1, keepdim=True), full_matrices=False)
        components = left[:, :num_components].contiguous()
        for task in TASKS:
            found[task][name] = (components, (components.T @ tall[task]).contiguous())
    return found


def write(
    root: Path, parts: Parts, style: str = "unisub", *, keep: Callable[[str, str], bool] = lambda task, part: True
) -> Path:
    """Write one folder a task; `keep` says which parts a task's file has."""
    word, end = STYLES[style]
    for task, factors in parts.items():
        tensors = {}
        for name, pair in factors.items():
            for part, values in zip(("components", "loadings"), pair, strict=True):
                if keep(task, part):
                    stem = name.removesuffix(".weight").replace("lora_", f"{word}_")
                    tensors[f"{stem}.{part}{end}"] = values.contiguous()
        (root / task).mkdir(parents=True)
        save_file(tensors, root / task / "adapter_model.safetensors")
        (root / task / "adapter_config.json").write_text(json.dumps({"peft_type": word.upper(), "r": RANK}))
    return root


def assert_same(space: ez.Subspace, parts: Parts, scale: float) -> None:
    """Every factor is components · loadings, to 1e-6 of its largest value; B with the scale."""
    for task, factors in parts.items():
        rebuilt = space.rebuild(task)
        for name, (components, loadings) in factors.items():
            wanted = components.double() @ loadings.double()
            wanted = wanted.T if "lora_A" in name else scale * wanted
            layer = name.removeprefix("base_model.model.").removesuffix(".weight")
            assert (rebuilt.layer(layer) - wanted).abs().max() < 1e-6 * wanted.abs().max(), (task, layer)


@contextmanager
def adapted(model: torch.nn.Module, factors: dict[str, tuple[Tensor, Tensor]], scale: float) -> Iterator[None]:
    """Add scale · B(A(x)) to the modules' outputs, as the papers' layers do with scale 1."""
    hooks = []
    for name, (components, loadings) in factors.items():
        if "lora_A" in name:
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            down, (components_b, loadings_b) = components @ loadings, factors[name.replace("lora_A", "lora_B")]
            up = (components_b @ loadings_b).T
            hooks.append(
                model.get_submodule(module).register_forward_hook(
                    lambda _, args, out, down=down, up=up: out + scale * args[0] @ down @ up
                )
            )
    yield
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    return model(TOKENS).logits


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("known", ["like", "alpha"])
def test_peft_answers_as_components_and_loadings_do(tmp_path: Path, zoo: Path, style: str, known: str) -> None:
    parts = split(zoo, 6)
    write(tmp_path / "theirs", parts, style)
    scale = ALPHA / RANK if known == "like" else 1.0
    space = ez.import_subspace(tmp_path / "theirs", **({"like": zoo / "task1"} if known == "like" else {"alpha": RANK}))
    assert (space.view, space.axes, space.manifest.center, space.names) == (
        "factors",
        ("outputs", "inputs"),
        "none",
        TASKS,
    )
    assert_same(space, parts, scale)
    for layer, fit in space.report["layers"].items():
        energies = [float(space.rebuild(task).layer(layer).square().sum()) for task in TASKS]
        assert [space.coefficients(task).energies[layer] for task in TASKS] == pytest.approx(energies, rel=1e-5)
        assert fit["energy"] == pytest.approx(sum(energies), rel=1e-5)
    space.save(tmp_path / "bundle")
    assert list(ez.load(tmp_path / "bundle").verify()) == []
    for task in TASKS[:2]:
        base = make_llama()
        with adapted(base, parts[task], scale):
            expected = logits(base)
        folder = ez.load(tmp_path / "bundle").rebuild(task).save(tmp_path / task)
        found = logits(quietly(PeftModel.from_pretrained, make_llama(), folder).eval())
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert (expected - logits(base)).abs().max() > 1e-2


@pytest.mark.parametrize("num_components", [1, 16, 20])
def test_any_number_of_components(tmp_path: Path, zoo: Path, num_components: int) -> None:
    """As many as a factor has inputs, and more than its side has, which cannot be independent."""
    draw = torch.Generator().manual_seed(1)
    parts: Parts = {task: {} for task in TASKS}
    for name, (components, loadings) in split(zoo, 1)["task1"].items():
        shared = torch.randn(components.shape[0], num_components, generator=draw)
        for task in TASKS:
            parts[task][name] = (shared, torch.randn(num_components, loadings.shape[1], generator=draw))
    space = ez.import_subspace(write(tmp_path / "theirs", parts), alpha=ALPHA)
    assert_same(space, parts, ALPHA / RANK)
    assert list(space.verify()) == []


def test_a_new_adapter_projects_onto_the_components(tmp_path: Path, zoo: Path) -> None:
    parts = split(zoo, 6)
    space = ez.import_subspace(write(tmp_path / "theirs", parts), like=zoo / "task1")
    found = space.project(zoo / "task2")
    name = "model.layers.0.self_attn.q_proj.lora_B"
    torch.testing.assert_close(
        space.layers[name].rebuild(found.values[name]).float(),
        ALPHA / RANK * torch.matmul(*parts["task2"][f"base_model.model.{name}.weight"]),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("refresh", [False, True])
@pytest.mark.parametrize("num_components", [6, 16])
def test_models_are_added(tmp_path: Path, zoo: Path, refresh: bool, num_components: int) -> None:
    parts = {task: factors for task, factors in split(zoo, num_components).items() if task != "task5"}
    space = ez.import_subspace(write(tmp_path / "theirs", parts), like=zoo / "task1")
    grown = space.add(zoo / "task5", refresh=refresh)
    assert grown.names == TASKS
    assert list(grown.verify()) == []


def test_components_that_one_task_holds_for_all(tmp_path: Path, zoo: Path) -> None:
    parts = split(zoo, 6)
    root = write(tmp_path / "theirs", parts, keep=lambda task, part: part == "loadings" or task == "task3")
    assert_same(ez.import_subspace(root, alpha=ALPHA), parts, ALPHA / RANK)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_components_in_a_file_of_their_own(tmp_path: Path, zoo: Path, suffix: str) -> None:
    """A file of more components than were used, named as the factors: the first of them are meant."""
    parts, more = split(zoo, 6), split(zoo, 8)
    root = write(tmp_path / "theirs", parts, keep=lambda task, part: part == "loadings")
    file = tmp_path / f"lola_components{suffix}"
    tensors = {name: components.contiguous() for name, (components, _) in more["task1"].items()}
    (torch.save if suffix == ".pt" else save_file)(tensors, file)
    if suffix == ".pt":
        with pytest.raises(ez.UnsupportedError, match="--allow-pickle"):
            ez.import_subspace(root, alpha=ALPHA, components=file)
    space = ez.import_subspace(root, alpha=ALPHA, components=file, allow_pickle=True)
    assert_same(space, parts, ALPHA / RANK)
    with pytest.raises(ez.FormatError, match="no file has components of"):
        ez.import_subspace(root, alpha=ALPHA)


class Attack:
    """What a hostile pickle does when it is loaded carelessly."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.target),)


def test_pickles_need_permission_and_run_nothing(tmp_path: Path, zoo: Path) -> None:
    parts = split(zoo, 6)
    root = write(tmp_path / "theirs", parts)
    for task in TASKS:
        path = root / task / "adapter_model.safetensors"
        torch.save(load_file(path), root / task / "adapter_model.bin")
        path.unlink()
    with pytest.raises(ez.UnsupportedError, match=r"task1.*--allow-pickle"):
        ez.import_subspace(root, alpha=ALPHA)
    assert_same(ez.import_subspace(root, alpha=ALPHA, allow_pickle=True), parts, ALPHA / RANK)
    torch.save({"w": Attack(tmp_path / "made")}, root / "task2" / "adapter_model.bin")
    with pytest.raises(ez.UnsupportedError, match="more than tensors"):
        ez.import_subspace(root, alpha=ALPHA, allow_pickle=True)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("known", ["a config", "an adapter with a head of its own"])
def test_trained_heads_are_carried_each_with_its_own_model(tmp_path: Path, zoo: Path, known: str) -> None:
    head = "base_model.model.lm_head.weight"
    root, heads = write(tmp_path / "theirs", split(zoo, 6)), {}
    for number, task in enumerate(TASKS):
        path = root / task / "adapter_model.safetensors"
        heads[task] = torch.full((40, 16), float(number))
        save_file({**load_file(path), head: heads[task]}, path)
    like = tmp_path / "like"
    like.mkdir()
    config = json.loads((zoo / "task1" / "adapter_config.json").read_text()) | {"modules_to_save": ["lm_head"]}
    (like / "adapter_config.json").write_text(json.dumps(config))
    if known != "a config":
        tensors = load_file(zoo / "task1" / "adapter_model.safetensors")
        save_file({**tensors, head: torch.full((40, 16), 77.0)}, like / "adapter_model.safetensors")
    space = ez.import_subspace(root, like=like)
    for task in TASKS:
        space.rebuild(task).save(tmp_path / task)
        peft = quietly(PeftModel.from_pretrained, make_llama(), tmp_path / task)
        assert torch.equal(peft.base_model.model.lm_head.modules_to_save["default"].weight, heads[task])


def edited(change: Callable[[dict[str, Tensor]], Any], task: str = "task2") -> Callable[[Path], None]:
    def edit(root: Path) -> None:
        path = root / task / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)

    return edit


NAME = "base_model.model.model.layers.0.self_attn.q_proj.subspaceadapter_A"


def spoilt(part: str, call: Callable[[Tensor], Tensor], task: str = "task2") -> Callable[[Path], None]:
    return edited(lambda tensors: tensors.update({f"{NAME}.{part}": call(tensors[f"{NAME}.{part}"])}), task)


def with_inf(values: Tensor) -> Tensor:
    values[0, 0] = torch.inf
    return values


def cut(root: Path) -> None:
    path = root / "task2" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


def linked(root: Path) -> None:
    path = root / "task2" / "adapter_model.safetensors"
    path.rename(root.parent / "elsewhere")
    path.symlink_to(root.parent / "elsewhere")


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "other components": (spoilt("components", lambda t: t + 1e-3), "components .* differ from those of"),
    "Inf in components": (spoilt("components", with_inf, "task1"), "NaN or Inf in tensor .*components"),
    "Inf in loadings": (spoilt("loadings", with_inf), "task2: NaN or Inf in tensor .*loadings"),
    "fewer loadings": (spoilt("loadings", lambda t: t[1:]), r"task2: .*shape \[5, 4\]"),
    "another rank": (spoilt("loadings", lambda t: t[:, 1:]), r"task2: .*shape \[6, 3\]"),
    "fewer components": (spoilt("components", lambda t: t[:, 1:]), r"task2: .*shape \[16, 5\]"),
    "components that are not used": (spoilt("loadings", lambda t: t[1:], "task1"), "5 loadings for 6 components"),
    "a flat tensor": (spoilt("loadings", lambda t: t[0], "task1"), r"shape \[4\]"),
    "whole numbers": (spoilt("loadings", lambda t: t.int(), "task1"), "torch.int32"),
    "no loadings of one": (edited(lambda tensors: tensors.pop(f"{NAME}.loadings")), "there is no tensor"),
    "no loadings of A": (edited(lambda tensors: tensors.pop(f"{NAME}.loadings"), "task1"), "there is no tensor"),
    "another module": (edited(lambda t: t.update({"x.eigenlora_A.loadings": torch.ones(6, 4)})), "module 'x', which"),
    "twice": (
        edited(lambda t: t.update({f"{NAME}.loadings.weight": torch.ones(6, 4)})),
        "two tensors are the loadings",
    ),
    "cut": (cut, "task2"),
    "behind a link": (linked, "leads out of the folder"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_refused(tmp_path: Path, zoo: Path, fault: str) -> None:
    spoil, said = FAULTS[fault]
    root = write(tmp_path / "zoo" / "theirs", split(zoo, 6))
    spoil(root)
    (tmp_path / "work").mkdir()
    with pytest.raises(ez.EigenzooError, match=said):
        ez.import_subspace(root, alpha=ALPHA, workspace=tmp_path / "work")
    assert not list((tmp_path / "work").iterdir())


def test_components_without_loadings_are_no_models(tmp_path: Path, zoo: Path) -> None:
    root = write(tmp_path / "theirs", split(zoo, 6), keep=lambda task, part: part == "components")
    with pytest.raises(ez.FormatError, match="the files have components, but no loadings"):
        ez.import_subspace(root, alpha=ALPHA)


def test_files_without_components_are_refused(tmp_path: Path, zoo: Path) -> None:
    root = write(tmp_path / "theirs", split(zoo, 6))
    save_file({"w": torch.ones(2)}, tmp_path / "c.safetensors")
    with pytest.raises(ez.FormatError, match="the file has no components"):
        ez.import_subspace(root, alpha=ALPHA, components=tmp_path / "c.safetensors")
    with pytest.raises(ez.FormatError, match="no subspace of another tool is here"):
        ez.import_subspace(zoo, alpha=ALPHA)
