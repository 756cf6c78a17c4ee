"""A bundle beside a base; what is written out of bundles passes, and the real PEFT agrees."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from verify_cases import broken, change_of, make, quietly, write_adapter

import eigenzoo as ez
from builders import edit_model, random_factors, write_model
from builders import write_adapter as write_plain
from eigenzoo.formats.model import Model
from eigenzoo.integrations.dry_loading import load_dry
from eigenzoo.zoo.adapter import Adapter
from eigenzoo.zoo.adapter_verifying import MOST_TRIES
from eigenzoo.zoo.verification import Check, Loading, Verification

Made = Callable[[str], Path]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Bundles of four adapters of a kind; `factors-<kind>` in the paper's view."""
    root = tmp_path_factory.mktemp("bundles")

    def make_one(name: str) -> Path:
        if not (root / name).exists():
            kind = name.rpartition("-")[2]
            paths = [write_adapter(root / f"{name}-{place}", kind, seed=place) for place in range(4)]
            options = {"view": "factors"} if name.startswith("factors") else {}
            ez.fit(paths, 2, **options).save(root / name)
        return root / name

    return make_one


def check(found: Verification, name: str) -> Check:
    (only,) = [check for check in found.checks if check.name == name]
    return only


@pytest.mark.parametrize("name", ["llama", "gpt2", "vit", "conv", "factors-llama"])
def test_what_a_bundle_rebuilds_takes_effect(name: str, bundle: Made, base: Made, tmp_path: Path) -> None:
    kind, space = name.rpartition("-")[2], ez.load(bundle(name))
    found = space.verify(against=base(kind), loader=load_dry)
    assert list(found) == []
    assert sorted(found.changes) == sorted(space.names)
    first = space.names[0]
    space.rebuild(first, max_lora_rank="full").save(tmp_path / "rebuilt")
    alone = ez.verify_adapter(tmp_path / "rebuilt", base(kind), loader=load_dry)
    assert list(alone) == []
    for module, layer in alone.changes["rebuilt"].items():
        same = found.changes[first][module]
        assert same.base == layer.base
        assert same.change == pytest.approx(layer.change, rel=1e-4)
    assert change_of(kind, tmp_path / "rebuilt") > 1e-5


def test_a_bundle_of_another_architecture_or_of_renamed_keys(
    bundle: Made, base: Made, sound: Made, tmp_path: Path
) -> None:
    found = ez.load(bundle("llama")).verify(against=base("gpt2"), loader=load_dry)
    assert not check(found, "modules").ok
    assert not check(found, "loading").ok
    assert check(found, "checksums").ok
    paths = [
        broken(
            write_adapter(tmp_path / f"a{place}", "llama", seed=place),
            tmp_path / f"b{place}",
            lambda key: key.replace("model.layers", "layers"),
        )
        for place in range(3)
    ]
    (fault, dropped) = ez.fit(paths, 1).verify(against=base("llama"), loader=load_dry)
    assert "with 'model.' before each name all of them are" in fault
    assert "drops 8 of 8 tensors" in dropped


def test_each_step_is_told(bundle: Made, base: Made) -> None:
    told: dict[str, list[tuple[int, int]]] = {}
    space = ez.load(bundle("llama"))
    found = space.verify(
        against=base("llama"),
        loader=load_dry,
        progress=lambda stage, *counts: told.setdefault(stage, []).append(counts),
    )
    assert found.ok
    assert {stage: counts[-1] for stage, counts in told.items()} == {
        "comparing files": (len(space.manifest.files),) * 2,
        "reading bases": (6 * len(space.layers),) * 2,
        "multiplying bases": (len(space.layers),) * 2,
        "reading coefficients": (len(space.names),) * 2,
        "reading moments": (len(space.layers),) * 2,
        "checking adapters": (len(space.names),) * 2,
    }
    assert all([done for done, _ in counts] == list(range(1, len(counts) + 1)) for counts in told.values())


def test_a_model_that_changes_nothing_is_named(base: Made, tmp_path: Path) -> None:
    paths = [
        write_adapter(tmp_path / f"a{place}", "llama", seed=place, size=0.0 if place == 2 else 0.02)
        for place in range(3)
    ]
    found = ez.fit(paths, 1.0).verify(against=base("llama"))
    (fault,) = found
    # What a subspace leaves of zero is round-off.
    assert fault.startswith("model a2: ")
    assert "changes nothing" in fault or "practically none" in fault


def test_exported_adapters_pass(bundle: Made, base: Made, tmp_path: Path) -> None:
    from peft import get_peft_model

    from eigenzoo.integrations.peft_tuner import EigenzooConfig, export_lora

    for kind in ("llama", "gpt2"):
        model = quietly(get_peft_model, make(kind), EigenzooConfig(bundle=str(bundle(kind))))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
        out = export_lora(model, tmp_path / kind)
        found = ez.verify_adapter(out, base(kind), loader=load_dry)
        assert list(found) == []
        assert change_of(kind, out) > 0


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory, base: Made) -> list[Path]:
    """Fine-tunes of the Llama: every weight moved by a tenth."""
    root, paths = tmp_path_factory.mktemp("tuned"), []
    for place in range(4):
        folder = Path(shutil.copytree(base("llama"), root / f"m{place}"))
        draw = torch.Generator().manual_seed(place)
        tensors = load_file(folder / "model.safetensors")
        moved = {
            name: value + 0.1 * value.norm() / value.numel() ** 0.5 * torch.randn(value.shape, generator=draw)
            for name, value in tensors.items()
        }
        save_file(moved, folder / "model.safetensors", {"format": "pt"})
        paths.append(folder)
    return paths


def test_full_weights_beside_their_base(tuned: list[Path], base: Made, tmp_path: Path) -> None:
    for options in ({}, {"view": "delta", "base": base("llama")}, {"axes": ("outputs",)}):
        space = ez.load(ez.fit(tuned, 2, **options).save(tmp_path / f"bundle{len(options)}{'axes' in options}"))
        found = space.verify(against=base("llama"))
        assert list(found) == []
        # Four independent moves of a tenth: their mean is off by half of that.
        assert found.typical_change == pytest.approx(0.05, rel=0.3)
        mean = torch.stack([load_file(path / "model.safetensors")["lm_head.weight"] for path in tuned]).mean(0)
        weight = load_file(base("llama") / "model.safetensors")["lm_head.weight"]
        expected = float((mean - weight).norm() / weight.norm())
        assert found.changes["mean"]["lm_head.weight"].change == pytest.approx(expected, rel=1e-4)


def test_full_weights_beside_another_base(tuned: list[Path], base: Made, tmp_path: Path) -> None:
    space = ez.fit(tuned, 2)
    found = space.verify(against=base("wide"))
    assert "shape [16, 16], and in the base [20, 20]" in " ".join(found)
    found = space.verify(against=base("gpt2"))
    assert check(found, "layers").detail.startswith("1 of 21") or not check(found, "layers").ok
    stranger = Path(shutil.copytree(base("llama"), tmp_path / "stranger"))
    tensors = load_file(stranger / "model.safetensors")
    drawn = {
        name: torch.randn(value.shape, generator=torch.Generator().manual_seed(9)) * value.std()
        if value.ndim > 1
        else value
        for name, value in tensors.items()
    }
    save_file(drawn, stranger / "model.safetensors", {"format": "pt"})
    (fault,) = space.verify(against=stranger)
    assert "as far from the base as zero is" in fault
    other = ez.fit(tuned, 2, view="delta", base=base("llama")).verify(against=stranger)
    assert any("is not the base that was subtracted: its weights differ" in fault for fault in other)
    half = Path(shutil.copytree(base("llama"), tmp_path / "half"))
    save_file({name: value.bfloat16() for name, value in tensors.items()}, half / "model.safetensors", {"format": "pt"})
    found = space.verify(against=half)
    assert found.ok
    assert any("other dtypes than in the base: float32 for BF16" in note for note in found.notes)


def test_layers_under_another_prefix(tuned: list[Path], base: Made, tmp_path: Path) -> None:
    wrapped = tmp_path / "wrapped.safetensors"
    tensors = load_file(base("llama") / "model.safetensors")
    save_file({f"module.{name}": value for name, value in tensors.items()}, wrapped)
    (fault,) = ez.fit(tuned, 2).verify(against=wrapped)
    assert "with 'module.' before each name all of them are" in fault


def test_a_task_head_of_another_size_is_no_fault(tuned: list[Path], base: Made, tmp_path: Path) -> None:
    other = Path(shutil.copytree(base("llama"), tmp_path / "other"))
    edit_model(other, lm_head__weight=torch.ones(7, 16))
    found = ez.fit(tuned, 2).verify(against=other)
    assert found.ok
    assert any("lm_head.weight: a task head" in note for note in found.notes)
    assert os.path.exists(other)
    assert json.dumps(found.to_dict(), allow_nan=False)


def test_changes_that_are_tried_are_bounded_over_all_adapters(tmp_path: Path) -> None:
    """Sixty adapters, each with a config of its own, none of which any change helps."""
    shapes = {"a.q": (6, 4), "a.v": (4, 6)}
    write_model(tmp_path / "base", {f"model.{name}.weight": torch.ones(shape) for name, shape in shapes.items()})
    for n in range(60):
        write_plain(tmp_path / "zoo" / f"m{n}", random_factors(shapes, 1, n), revision=f"v{n}")
    space = ez.fit(tmp_path / "zoo", 2)
    loads: list[str] = []

    def load(base: Model, adapter: Adapter) -> Loading:
        loads.append(adapter.name)
        return Loading("the library", {}, dropped=tuple(adapter.shapes))

    found = space.verify(against=tmp_path / "base", loader=load)
    assert 60 < len(loads) <= 60 + MOST_TRIES
    assert any(f"No more than {MOST_TRIES} changes were tried" in fault for fault in found)
