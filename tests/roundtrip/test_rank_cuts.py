"""`max_lora_rank`: every update is the best approximation of that rank by a dense SVD, and the libraries load it as such."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
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
from safetensors.torch import load_file
from torch import Tensor

import eigenzoo as ez
from builders import random_factors, random_stack, read_update, write_adapter, write_stacks
from real_models import add_adapter, load_adapter, logits, make, save_adapter
from tolerance import tolerance

MODULES = {"layers.0.q": (48, 40), "layers.1.q": (40, 48)}


def best(matrix: Tensor, rank: int) -> tuple[Tensor, float]:
    """The best approximation of a rank, and its distance, by a dense SVD."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank], float(values[rank:].square().sum().sqrt())


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    for place in range(12):
        rank = (2, 3)[place % 2]
        write_adapter(tmp_path / "zoo" / f"a{place}", random_factors(MODULES, rank, place), lora_alpha=5)
    return tmp_path / "zoo"


@pytest.mark.parametrize("axes", [("models",), ("outputs", "inputs"), ("models", "outputs", "inputs")], ids="+".join)
@pytest.mark.parametrize("max_rank", [1, pytest.param(3, marks=pytest.mark.slow), 7])
def test_updates_are_the_best_of_their_rank(tmp_path: Path, zoo: Path, axes: tuple[str, ...], max_rank: int) -> None:
    space = ez.fit(zoo, rank=8, axes=axes)
    whole, cut = space.rebuild("a1"), space.rebuild("a1", max_lora_rank=max_rank)
    folder = cut.save(tmp_path / "out")
    ranks = cut.ranks()
    assert ranks is not None
    lost = norm = 0.0
    for module in MODULES:
        matrix = whole.layer(module)
        expected, distance = best(matrix, max_rank)
        size = float(matrix.norm())
        assert (cut.layer(module) - expected).norm() <= tolerance(1e4, scale=size)
        assert (read_update(folder, module) - expected).norm() <= tolerance(10, dtype=torch.float32, scale=size)
        layer = ranks.layers[module]
        assert layer.loss == pytest.approx((distance / size) ** 2, rel=1e-6, abs=1e-12)
        # Outputs and inputs alone keep each update at its own rank, 3, or less: nothing is left to cut.
        cuts = max_rank < 3 or "models" in axes
        assert layer.loss > 1e-6 if cuts else layer.loss == 0
        assert (layer.rank, layer.original) == (max_rank if cuts else 3, 3)
        assert layer.whole == torch.linalg.matrix_rank(matrix)
        lost, norm = lost + distance**2, norm + size**2
    assert ranks.loss == pytest.approx(lost / norm, rel=1e-6, abs=1e-12)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == ranks.rank <= max_rank
    assert config["rank_pattern"] == config["alpha_pattern"] == {}


def test_ranks_of_axis_models_add_up_and_those_of_the_sides_do_not(zoo: Path) -> None:
    """Twelve adapters of ranks 2 and 3: what nobody was told before."""
    summed = ez.fit(zoo, rank=8).rebuild("a1", max_lora_rank="full").ranks()
    some = ez.fit(zoo, rank=8, axes=("models", "outputs", "inputs")).rebuild("a1", max_lora_rank="full").ranks()
    bounded = ez.fit(zoo, rank=8, axes=("outputs", "inputs")).rebuild("a1").ranks()
    assert summed is not None
    assert bounded is not None
    assert (summed.rank, summed.whole, summed.original, summed.loss) == (30, 30, 3, 0.0)
    assert some is not None
    assert (some.rank, bounded.rank, bounded.original) == (8, 3, 3)


def test_a_bound_above_the_rank_changes_no_byte(tmp_path: Path, zoo: Path) -> None:
    space = ez.fit(zoo, rank=1.0)
    first, second = space.rebuild("a0").save(tmp_path / "a"), space.rebuild("a0", max_lora_rank=3).save(tmp_path / "b")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_excluded_updates_and_factors_are_cut_too(tmp_path: Path, zoo: Path) -> None:
    """The bound is one of the file, for programs that allow no larger rank."""
    write_adapter(tmp_path / "large" / "a0", random_factors(MODULES, 6, 0), lora_alpha=5)
    write_adapter(tmp_path / "large" / "a1", random_factors(MODULES, 6, 1), lora_alpha=4)
    for name, space in {
        "excluded": ez.fit(ez.open_zoo(tmp_path / "large", exclude=["layers.1.q"]), rank=1.0),
        "factors": ez.fit(tmp_path / "large", rank=1.0, view="factors"),
    }.items():
        rebuilt = space.rebuild("a1", max_lora_rank=2)
        folder = rebuilt.save(tmp_path / name)
        for module in MODULES:
            original = read_update(tmp_path / "large" / "a1", module)
            expected, _ = best(original, 2)
            bound = tolerance(100, dtype=torch.float32, scale=float(original.norm()))
            assert (read_update(folder, module) - expected).norm() <= bound
        assert json.loads((folder / "adapter_config.json").read_text())["r"] == 2


def test_a_zero_update_loses_nothing(tmp_path: Path) -> None:
    zeros = {module: (b * 0, a) for module, (b, a) in random_factors(MODULES, 2, 0).items()}
    for place in range(2):
        write_adapter(tmp_path / "zoo" / f"a{place}", zeros)
    ranks = ez.fit(tmp_path / "zoo", rank=1.0).rebuild("a0", max_lora_rank=1).ranks()
    assert ranks is not None
    assert (ranks.rank, ranks.loss) == (1, 0.0)


def test_peft_answers_by_the_cut_updates(tmp_path: Path) -> None:
    """The logits are those of a base to which the dense best approximations were added."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"]}
    for number in range(4):
        save_adapter(add_adapter(make("llama"), number, **settings), tmp_path / "zoo" / f"a{number}")
    space = ez.fit(tmp_path / "zoo", rank=2)
    folder = space.rebuild("a1", max_lora_rank=3).save(tmp_path / "out")
    model, uncut = make("llama"), make("llama")
    with torch.no_grad():
        for module in space.layers:
            matrix = space.rebuild("a1").layer(module)
            model.get_submodule(module).weight += best(matrix, 3)[0].float()
            uncut.get_submodule(module).weight += matrix.float()
    expected = logits(model, "llama")
    torch.testing.assert_close(logits(load_adapter("llama", folder), "llama"), expected, rtol=1e-5, atol=1e-5)
    assert (logits(uncut, "llama") - expected).abs().max() > 1e-2


NAMES = ("unet", "text_encoder")


def test_loras_of_diffusion_models_are_cut_as_diffusers_reads_them(tmp_path: Path) -> None:
    """Of kohya's keys, whose α stays, and of diffusers' with its configs; and written with each other's."""

    def few(seed: int) -> Mapping[str, torch.nn.Module]:
        return add_lora(make_all(NAMES), seed, rank=4, target_modules=["to_q", "conv1", "proj_in"])

    save_kohya(kohya_tensors(few(0)), tmp_path / "zoo" / "kohya.safetensors")
    save_by_diffusers(few(1), tmp_path / "saved").rename(tmp_path / "zoo" / "diffusers.safetensors")
    space = ez.fit(tmp_path / "zoo", rank=1.0)
    for seed, name in enumerate(("kohya", "diffusers")):
        originals = deltas(few(seed))
        rebuilt = space.rebuild(name, max_lora_rank=2)
        for format in (None, "kohya", "diffusers"):
            found = deltas(
                load_by_diffusers(rebuilt.save(tmp_path / f"{name}-{format}", format=format) / OUTPUT, NAMES)
            )
            assert set(found) == set(originals)
            for module, delta in originals.items():
                expected = best(delta.flatten(1), 2)[0].reshape(delta.shape)
                assert (found[module] - expected).norm() <= 1e-6 * delta.norm(), module
                assert (expected - delta).norm() > 1e-2 * delta.norm()


def test_what_has_no_rank_is_refused(tmp_path: Path, zoo: Path) -> None:
    space = ez.fit(zoo, rank=1.0)
    with pytest.raises(ez.RankError, match=r"a0: max_lora_rank is 0\. An update has a rank of 1 or more"):
        space.rebuild("a0", max_lora_rank=0)
    write_stacks(tmp_path / "dense", {"w": random_stack(3, (4, 3))})
    dense = ez.fit(tmp_path / "dense", rank=1.0)
    assert dense.rebuild("m0").ranks() is None
    with pytest.raises(ez.UsageError, match=r"m0: a largest LoRA rank of 2 for a checkpoint\..*--max-lora-rank"):
        dense.rebuild("m0", max_lora_rank=2)


def test_a_saved_file_has_no_padding_left(tmp_path: Path, zoo: Path) -> None:
    space = ez.fit(zoo, rank=8)
    sizes: dict[object, int] = {}
    for rank in ("full", 2):
        folder = space.rebuild("a0", max_lora_rank=rank).save(tmp_path / str(rank))
        tensors = load_file(folder / "adapter_model.safetensors")
        sizes[rank] = sum(tensor.numel() for tensor in tensors.values())
    assert sizes["full"] == 15 * sizes[2]


@pytest.mark.parametrize("moments", [True, False], ids=["moments", "bare"])
@pytest.mark.parametrize("axes", [("models",), ("models", "outputs", "inputs")], ids="+".join)
def test_an_adapter_is_written_at_the_zoos_own_rank(
    tmp_path: Path, zoo: Path, axes: tuple[str, ...], moments: bool
) -> None:
    """The original has that rank, so the best approximation of it is no farther off than the original (Eckart and Young)."""
    ez.fit(zoo, rank=8, axes=axes).save(tmp_path / "bundle", moments=moments)
    space = ez.load(tmp_path / "bundle")
    # A model of the smaller rank too: the zoo's rank is the largest of all.
    for name in ("a0", "a1"):
        rebuilt = space.rebuild(name)
        folder = rebuilt.save(tmp_path / f"{name}-out")
        ranks = rebuilt.ranks()
        assert ranks is not None
        assert ranks == space.rebuild(name).ranks()
        assert ranks.rank == json.loads((folder / "adapter_config.json").read_text())["r"] == 3
        assert ranks.whole > 3
        lost = outside = 0.0
        for module in MODULES:
            whole, original = rebuilt.layer(module), read_update(zoo / name, module)
            expected, distance = best(whole, 3)
            size = float(whole.norm())
            assert (read_update(folder, module) - expected).norm() <= tolerance(10, dtype=torch.float32, scale=size)
            lost, outside = lost + distance**2, outside + float((whole - original).square().sum())
        assert ranks.lost == pytest.approx(lost, rel=1e-6)
        assert 0 < lost <= outside


def test_coefficients_that_were_changed_keep_the_whole_rank(tmp_path: Path, zoo: Path) -> None:
    """A mixture of models is of no model's rank, and a cut of it loses more than the projection of one did."""
    space = ez.fit(zoo, rank=11)
    first, second = space.coefficients("a1"), space.coefficients("a3")
    mixed = replace(first, values={name: (value + second.values[name]) / 2 for name, value in first.values.items()})
    for model, mean_only in ((mixed, False), ("a1", True)):
        rebuilt = space.rebuild(model, mean_only=mean_only)
        folder, ranks = rebuilt.save(tmp_path / f"out{mean_only}"), rebuilt.ranks()
        assert ranks is not None
        assert ranks.loss == 0
        assert ranks.rank == ranks.whole == json.loads((folder / "adapter_config.json").read_text())["r"] > 3
