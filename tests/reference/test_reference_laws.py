"""Laws that hold for any zoo, over seeds: round trips, monotony, order, blocks, saving, rank rules, whole-model residuals."""

from __future__ import annotations

from math import sqrt
from pathlib import Path

import numpy as np
import pytest
import torch
from reference_cases import energy, rebuilt_stack, stored
from torch import Tensor

import eigenzoo as ez
from builders import random_factors, random_stack, seeded, write_adapter, write_stacks
from eigenzoo.errors import RankError
from eigenzoo.linalg.lora import TRUNCATION
from tolerance import tolerance

SEEDS = [0, pytest.param(1, marks=pytest.mark.slow)]
NUM_MODELS = 8
SHAPES = {"h.0.w": (6, 10), "h.0.b": (6,), "h.1.w": (12, 4)}
AXES = [("models",), ("outputs",), ("inputs",), ("outputs", "inputs"), ("models", "outputs", "inputs")]
MODULES = {"h.0.q": (10, 8), "h.1.up": (14, 6)}


def random_stacks(seed: int, num_models: int = NUM_MODELS) -> dict[str, Tensor]:
    """Layers of unlike sizes and scales, so that no residual hides behind another."""
    return {
        name: (1 + place) * random_stack(num_models, shape, 10 * seed + place)
        for place, (name, shape) in enumerate(SHAPES.items())
    }


def write_updates(root: Path, seed: int) -> list[Path]:
    return [
        write_adapter(
            root / f"m{place}", random_factors(MODULES, 2 + place % 3, 100 * seed + place), lora_alpha=4 + place
        )
        for place in range(NUM_MODELS)
    ]


def dense_stacks(source: ez.Zoo) -> dict[str, np.ndarray]:
    """Every layer of a zoo as (N, O, I) float64, by the readers that other tests have compared with the files."""
    found = {}
    for name in source.layers:
        stack = source.stack(name)
        matrices = [
            torch.mm(*stack.factors(place)) if hasattr(stack, "factors") else stack.matrix(place)
            for place in range(len(source))
        ]
        found[name] = torch.stack(matrices).double().numpy()
    return found


@pytest.fixture(params=SEEDS)
def seed(request) -> int:
    return request.param


@pytest.fixture(params=["full weights", "updates"])
def zoo(request, tmp_path, seed) -> ez.Zoo:
    if request.param == "full weights":
        return ez.open_zoo(write_stacks(tmp_path / "zoo", random_stacks(seed)))
    return ez.open_zoo(write_updates(tmp_path / "zoo", seed))


@pytest.mark.parametrize("axes", AXES, ids="+".join)
@pytest.mark.parametrize("center", ["models", "none"])
def test_whole_model_residual_is_one_number_three_ways(zoo, axes, center):
    space = ez.fit(zoo, rank=2, axes=axes, center=center)
    dense = dense_stacks(zoo)
    rebuilt = {name: rebuilt_stack(space, name) for name in dense}
    projected = space.project_many(zoo)
    # The stored figure comes from the moments, in float64; the others from bases and coefficients rounded to float32.
    bound = tolerance(1, dtype=torch.float32)
    lost_in_all = whole_in_all = 0.0
    for place, name in enumerate(zoo.names):
        lost = {layer: energy(dense[layer][place] - rebuilt[layer][place]) for layer in dense}
        whole = {layer: energy(dense[layer][place]) for layer in dense}
        lost_in_all, whole_in_all = lost_in_all + sum(lost.values()), whole_in_all + sum(whole.values())
        share = sum(lost.values()) / sum(whole.values())
        assert share > 1e-4
        kept = space.coefficients(name)
        assert kept.residual == pytest.approx(share, rel=bound)
        assert projected[name].residual == pytest.approx(share, rel=bound)
        for layer in dense:
            assert kept.residuals[layer] == pytest.approx(lost[layer] / whole[layer], rel=bound, abs=bound)
            assert projected[name].residuals[layer] == pytest.approx(lost[layer] / whole[layer], rel=bound, abs=bound)
    assert space.report["residual"] == pytest.approx(lost_in_all / whole_in_all, rel=bound)


@pytest.mark.parametrize("axes", AXES, ids="+".join)
def test_what_lies_in_the_subspace_comes_back_and_projects_to_itself(zoo, axes, tmp_path):
    space = ez.fit(zoo, rank=2, axes=axes, dtype="float64")
    name = zoo.names[1]
    inside = space.rebuild(name, max_lora_rank="full")
    folder = inside.save(tmp_path / "inside")
    again = space.project(folder)
    # The saved model is float32: what lies outside is its rounding, squared; updates may leave out TRUNCATION besides.
    assert again.residual <= tolerance(1, dtype=torch.float32) ** 2 + TRUNCATION * (zoo.view == "update")
    for layer in space.layers:
        first, second = space.coefficients(name).values[layer], again.values[layer]
        scale = sqrt(energy(inside.layer(layer).numpy()))
        room = tolerance(1, dtype=torch.float32) + sqrt(TRUNCATION) * (zoo.view == "update")
        assert float((first - second).abs().max()) <= room * scale


@pytest.mark.parametrize("axes", AXES, ids="+".join)
def test_error_never_rises_with_rank(zoo, axes):
    residuals = [
        ez.fit(zoo, rank=dict.fromkeys(axes, rank), center="models").report["residual"] for rank in (0, 1, 2, 4, 7)
    ]
    for lower, higher in zip(residuals[1:], residuals, strict=False):
        assert lower <= higher + tolerance(1)
    # Seven directions hold eight centred models; of sides seven are not always all.
    if axes == ("models",):
        assert residuals[-1] <= tolerance(10)
    assert residuals[0] > 10 * max(residuals[-1], 1e-3) or axes != ("models",)


def test_order_of_models_does_not_matter(zoo):
    order = torch.randperm(NUM_MODELS, generator=seeded(5)).tolist()
    other = zoo.select(names=[zoo.names[place] for place in order])
    for axes in AXES:
        first, second = ez.fit(zoo, rank=2, axes=axes), ez.fit(other, rank=2, axes=axes)
        assert second.names == tuple(zoo.names[place] for place in order)
        for layer in first.layers:
            one, two = rebuilt_stack(first, layer)[order], rebuilt_stack(second, layer)
            room = tolerance(3, dtype=torch.float32) + sqrt(TRUNCATION) * (zoo.view == "update")
            assert np.linalg.norm(one - two) <= room * np.linalg.norm(one)
        assert first.report["residual"] == pytest.approx(second.report["residual"], abs=tolerance(100))


@pytest.mark.parametrize("exact", [True, False])
def test_block_size_does_not_matter(zoo, monkeypatch, exact):
    if not exact:
        monkeypatch.setattr("eigenzoo.zoo.stack.EXACT_VALUES", 0)
    for axes in AXES:
        found = []
        for block_bytes in (1500, 2**26):
            monkeypatch.setattr("eigenzoo.zoo.stack.SPAN_BYTES", block_bytes)
            monkeypatch.setattr("eigenzoo.subspace.moments.update_moments.TILE_BYTES", block_bytes)
            monkeypatch.setattr("eigenzoo.subspace.bases.flat.BLOCK_BYTES", block_bytes)
            space = ez.fit(zoo, rank=2, axes=axes)
            found.append({layer: rebuilt_stack(space, layer) for layer in space.layers})
        for layer, whole in found[-1].items():
            for part in found[:-1]:
                room = tolerance(3, dtype=torch.float32) + sqrt(TRUNCATION) * (zoo.view == "update")
                assert np.linalg.norm(part[layer] - whole) <= room * np.linalg.norm(whole)


@pytest.mark.parametrize("axes", AXES, ids="+".join)
def test_saving_and_loading_changes_no_bit(zoo, axes, tmp_path):
    space = ez.fit(zoo, rank=2, axes=axes)
    loaded = ez.load(space.save(tmp_path / "bundle"))
    assert list(loaded.verify()) == []
    assert loaded.names == space.names
    for name in space.names:
        first, second = space.coefficients(name), loaded.coefficients(name)
        assert first.residuals == second.residuals
        assert first.residual == second.residual
        for layer in space.layers:
            assert torch.equal(first.values[layer], second.values[layer])
            assert torch.equal(space.rebuild(name).layer(layer), loaded.rebuild(name).layer(layer))
    for layer in space.layers:
        assert torch.equal(space.moments(layer).raw_NN, loaded.moments(layer).raw_NN)
    measured = {"bytes", "seconds", "peak_memory"}
    assert not {"seconds", "peak_memory"} & set(loaded.report), "a bundle says nothing of the run that made it"
    assert {key: value for key, value in loaded.report.items() if key not in measured} == {
        key: value for key, value in space.report.items() if key not in measured
    }


def test_as_many_directions_as_models_are_called_trivial(zoo):
    whole, part = (ez.fit(zoo, rank=rank) for rank in (NUM_MODELS - 1, NUM_MODELS - 2))
    for layer, shape in SHAPES.items() if zoo.view == "weight" else MODULES.items():
        # Six values hold no more than six directions, which do not hold any eight models.
        enough = np.prod(shape) >= NUM_MODELS - 1
        trivial = f"trivial: {NUM_MODELS - 1} directions hold any {NUM_MODELS} models"
        assert (whole.report["layers"][layer]["note"] == trivial) == enough
        assert part.report["layers"][layer]["note"] == ""
        assert whole.report["layers"][layer]["captured"] == pytest.approx(1, abs=tolerance(10))


def test_reported_held_out_share_is_that_of_models_left_out_of_the_fit(tmp_path, seed):
    stacks = random_stacks(seed)
    folders = write_stacks(tmp_path / "zoo", stacks)
    report = ez.fit(folders, rank=2, seed=seed).report
    order = torch.randperm(NUM_MODELS, generator=seeded(seed))
    lost = dict.fromkeys(stacks, 0.0)
    total = dict.fromkeys(stacks, 0.0)
    for held in order.tensor_split(5):
        rest = [place for place in range(NUM_MODELS) if place not in held]
        space = ez.fit([folders[place] for place in rest], rank=2, dtype="float64")
        for place in held.tolist():
            coefficients = space.project(folders[place])
            for layer, stack in stacks.items():
                values_NOI = stored(stack, torch.float32)
                lost[layer] += coefficients.residuals[layer] * energy(values_NOI[place])
                total[layer] += energy(values_NOI[place] - values_NOI[rest].mean(0))
    for layer in stacks:
        assert report["layers"][layer]["heldout"] == pytest.approx(1 - lost[layer] / total[layer], abs=tolerance(1000))


@pytest.mark.parametrize("axis", ["models", "outputs", "inputs"])
def test_a_share_keeps_the_least_rank_that_reaches_it(tmp_path, seed, axis):
    stacks = random_stacks(seed)
    zoo = write_stacks(tmp_path / "zoo", stacks)
    for share in (0.3, 0.8, 0.99):
        space = ez.fit(zoo, rank={axis: share})
        for layer, stack in stacks.items():
            values_NOI = stored(stack, torch.float32)
            centered_NOI = values_NOI - values_NOI.mean(0)
            mode = ("models", "outputs", "inputs").index(axis)
            values = (
                np.linalg.svd(
                    np.moveaxis(centered_NOI, mode, 0).reshape(centered_NOI.shape[mode], -1), compute_uv=False
                )
                ** 2
            )
            reached = np.cumsum(values) / values.sum()
            rank = space.report["layers"][layer]["rank"][axis]
            assert rank == int((reached < share).sum()) + 1
            assert space.report["layers"][layer]["captured"] == pytest.approx(reached[rank - 1], abs=tolerance(100))


def test_auto_finds_what_was_planted_and_nothing_else(tmp_path, seed):
    draw = seeded(seed)
    noise = torch.randn(24, 20, 15, generator=draw, dtype=torch.float64)
    weights = torch.linalg.qr(torch.randn(24, 5, generator=draw, dtype=torch.float64))[0]
    # Five times the noise's largest singular value, √24 + √300.
    planted = noise + torch.tensordot(
        5 * (sqrt(24) + sqrt(300)) * weights,
        torch.linalg.qr(torch.randn(300, 5, generator=draw, dtype=torch.float64))[0].T.view(5, 20, 15),
        1,
    )
    uneven = noise * torch.logspace(-0.5, 0.5, 24, dtype=torch.float64)[:, None, None]
    space = ez.fit(
        write_stacks(tmp_path, {"planted": planted, "noise": noise, "uneven": uneven, "scaled": 1e-6 * planted})
    )
    assert {name: layer["rank"]["models"] for name, layer in space.report["layers"].items()} == {
        "planted": 5,
        "noise": 0,
        "uneven": 0,
        "scaled": 5,
    }


@pytest.mark.parametrize(
    ("rank", "axes", "text"),
    [
        (8, None, r"rank 8, but 8 models span at most 7 directions after centering\. Ask for rank <= 7 or add models"),
        ({"models": 99}, None, r"rank 99, but 8 models span at most 7 directions"),
        ({"outputs": 2}, ["models"], r"a rank for axis 'outputs'\. The truncated axes are models"),
        (
            {"outputs": 2},
            ["outputs", "inputs"],
            r"no rank for axis 'inputs'\. A rank per axis names every truncated axis",
        ),
        (-2, None, r"rank -2 is negative"),
        (2.0, None, r"rank 2\.0 is not a share"),
        ("all", None, r"'all' is not a rank"),
    ],
)
def test_ranks_that_cannot_be(tmp_path, rank, axes, text):
    zoo = write_stacks(tmp_path, random_stacks(0))
    with pytest.raises(RankError, match=text):
        ez.fit(zoo, rank=rank, axes=axes)


def test_without_centering_one_more_direction_can_be_asked_for(tmp_path):
    zoo = write_stacks(tmp_path, random_stacks(0))
    assert ez.fit(zoo, rank=8, center="none").report["residual"] <= tolerance(10)
    with pytest.raises(RankError, match=r"rank 9, but 8 models span at most 8 directions\. Ask for rank <= 8"):
        ez.fit(zoo, rank=9, center="none")
