"""Merged models as the libraries load them: an adapter answers like its base plus the dense sum of the updates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusion_adapters import (
    OUTPUT,
    add_lora,
    deltas,
    kohya_tensors,
    load_by_diffusers,
    make_all,
    save_by_diffusers,
    save_kohya,
)
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

import eigenzoo as ez
from real_models import (
    ADAPTERS,
    TOLERANCE,
    add_adapter,
    load_adapter,
    load_checkpoint,
    logits,
    make,
    make_finetune,
    save_adapter,
)
from tolerance import tolerance

WEIGHTS = (0.7, -0.3, 1.1)


def by_peft(model: PeftModel) -> dict[str, Tensor]:
    """Every ΔW by PEFT's own arithmetic, as it lies in the module's weight."""
    prefix = "base_model.model."
    return {
        name.removeprefix(prefix): module.get_delta_weight("default").detach().double()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


@pytest.fixture(params=["llama", "gpt2", pytest.param("vit", marks=pytest.mark.slow)])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def adapters(tmp_path: Path, kind: str) -> tuple[list[Path], list[dict[str, Tensor]]]:
    """Three adapters of mixed ranks, alphas, patterns and rsLoRA, and their updates; no base on the disk."""
    paths, updates = [], []
    for seed, settings in enumerate(ADAPTERS[kind]):
        peft = add_adapter(make(kind), seed, **settings)
        updates.append(by_peft(peft))
        paths.append(save_adapter(peft, tmp_path / f"m{seed}"))
    return paths, updates


def weighted(updates: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {
        name: sum((w * each[name] for w, each in zip(WEIGHTS, updates, strict=True)), torch.zeros(()))
        for name in updates[0]
    }


def test_a_merged_adapter_answers_like_the_dense_sum(
    tmp_path: Path, kind: str, adapters: tuple[list[Path], list[dict[str, Tensor]]]
) -> None:
    paths, updates = adapters
    wanted = weighted(updates)
    base = make(kind)
    with torch.no_grad():
        for name, update in wanted.items():
            base.get_parameter(f"{name}.weight").add_(update)
    folder = ez.merge(paths, "task_arithmetic", weights=WEIGHTS).save(tmp_path / "merged")
    loaded = load_adapter(kind, folder)
    assert (logits(loaded, kind) - logits(base, kind)).abs().max() < TOLERANCE
    for name, found in by_peft(loaded).items():
        assert (found - wanted[name]).norm() <= tolerance(100, dtype=torch.float32) * wanted[name].norm()


@pytest.mark.parametrize("choice", [{"rank": 0.95}, {"budget": 14_000}])
def test_ranks_of_their_own_reload_exactly(
    tmp_path: Path,
    kind: str,
    adapters: tuple[list[Path], list[dict[str, Tensor]]],
    choice: dict[str, float],
) -> None:
    paths, updates = adapters
    merged = ez.merge(paths, "task_arithmetic", weights=WEIGHTS, **choice)
    folder = merged.save(tmp_path / "merged")
    ranks = {name: layer.rank for name, layer in merged.certificate.layers.items()}
    assert len(set(ranks.values())) > 1
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"] != {}
    wanted = weighted(updates)
    lost = total = 0.0
    for name, found in by_peft(load_adapter(kind, folder)).items():
        values = torch.linalg.svdvals(wanted[name].flatten(1))
        tail = float(values[ranks[name] :].square().sum())
        distance = float((found - wanted[name]).square().sum())
        assert distance == pytest.approx(tail, rel=1e-3, abs=1e-10)
        lost, total = lost + distance, total + float(values.square().sum())
    assert merged.certificate.loss.frobenius == pytest.approx((lost / total) ** 0.5, rel=1e-4)
    assert merged.certificate.bytes == (folder / "adapter_model.safetensors").stat().st_size
    assert merged.certificate.bytes <= choice.get("budget", 10**6)


@pytest.mark.parametrize("keys", ["diffusers", "kohya"])
def test_loras_of_diffusion_models_merge_with_their_alpha(tmp_path: Path, keys: str) -> None:
    paths, updates = [], []
    for seed, (rank, alpha) in enumerate(((2, 6), (3, 2))):
        models = add_lora(make_all(("unet",)), seed, rank=rank, alpha=alpha)
        updates.append(deltas(models))
        path = tmp_path / f"m{seed}.safetensors"
        if keys == "kohya":
            tensors = kohya_tensors(models, alpha=alpha)
            halved = {name: value.bfloat16() for name, value in tensors.items()}
            paths.append(save_kohya(halved, path))
            updates[-1] = deltas(load_by_diffusers(paths[-1], ("unet",)))
        else:
            paths.append(save_by_diffusers(models, tmp_path / f"m{seed}").rename(path))
    merged = ez.merge(paths, "task_arithmetic", weights=[0.5, -2.0])
    folder = merged.save(tmp_path / "merged")
    wanted = {name: 0.5 * updates[0][name].double() - 2.0 * updates[1][name].double() for name in updates[0]}
    found = deltas(load_by_diffusers(folder / OUTPUT, ("unet",)))
    lost = sum(float((found[name].double() - wanted[name]).square().sum()) for name in wanted)
    total = sum(float(value.square().sum()) for value in wanted.values())
    if keys == "kohya":
        alphas = {float(value) for name, value in load_file(folder / OUTPUT).items() if name.endswith("alpha")}
        assert alphas == {6.0}
        assert (lost / total) ** 0.5 == pytest.approx(merged.certificate.loss.frobenius, rel=1e-3)
        assert merged.certificate.loss.frobenius > 1e-4
    else:
        assert (lost / total) ** 0.5 < 1e-6


@pytest.mark.parametrize("kind", ["llama", pytest.param("resnet", marks=pytest.mark.slow)])
def test_merged_checkpoints_answer_like_the_dense_sum(tmp_path: Path, kind: str) -> None:
    paths = []
    models = [make_finetune(kind, number, share=0.05) for number in range(3)]
    for number, model in enumerate(models):
        model.save_pretrained(tmp_path / f"m{number}", max_shard_size="20KB")
        paths.append(tmp_path / f"m{number}")
    base = make(kind)
    base.save_pretrained(tmp_path / "base")
    wanted = {name: value.clone() for name, value in base.state_dict().items()}
    for name, start in base.state_dict().items():
        if start.is_floating_point():
            terms = (w * (model.state_dict()[name].double() - start) for w, model in zip(WEIGHTS, models, strict=True))
            wanted[name] = (start.double() + sum(terms, torch.zeros((), dtype=torch.float64))).float()
    merged = ez.merge(paths, "task_arithmetic", weights=WEIGHTS, base=tmp_path / "base")
    folder = merged.save(tmp_path / "merged")
    shards = sorted(path.name for path in paths[0].glob("*.safetensors"))
    assert sorted(path.name for path in folder.glob("*.safetensors")) == shards
    assert kind != "llama" or len(shards) > 1
    loaded = load_checkpoint(kind, folder)
    for name, value in loaded.state_dict().items():
        if "running_var" not in name:
            bound = tolerance(1, dtype=torch.float32, scale=float(wanted[name].abs().max()))
            assert (value - wanted[name]).abs().max() <= bound, name
    if kind == "llama":
        base.load_state_dict(wanted)
        assert (logits(loaded, kind) - logits(base, kind)).abs().max() < TOLERANCE
