"""Cores cut to a low rank and kept as two factors: against numpy's SVD of the cores, and by the laws of the best approximation."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from reference_algebra import Array, axis_basis
from safetensors.torch import load_file

import eigenzoo as ez
from builders import random_factors, random_stack, read_update, write_adapter, write_stacks
from eigenzoo.errors import RankError, UsageError
from eigenzoo.linalg.heldout import NUM_FOLDS, make_folds
from eigenzoo.subspace.fitting.alone import against_alone
from tolerance import tolerance

AXES = ("outputs", "inputs")
MODULES = {"a.q": (14, 12), "a.v": (12, 10)}
RANKS = {"outputs": 7, "inputs": 6}
NUM_MODELS, LORA_RANK = 7, 3


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    shared = random_factors(MODULES, LORA_RANK, 100)
    found = []
    for place in range(NUM_MODELS):
        own = random_factors(MODULES, LORA_RANK, place)
        mixed = {name: tuple(0.6 * x + 0.4 * y for x, y in zip(own[name], shared[name], strict=True)) for name in own}
        found.append(write_adapter(root / f"m{place}", mixed))
    return found


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    stacks = {"w": random_stack(NUM_MODELS, (14, 12), 3), "kernel": random_stack(NUM_MODELS, (6, 3, 2, 2), 4)}
    return write_stacks(tmp_path_factory.mktemp("weights"), stacks)


def bases(space: ez.Subspace, layer: str) -> tuple[Array, Array]:
    """U and V as they are stored; the unit matrix for a side kept whole."""
    found = space.layers[layer]
    sides = (found.side(axis) for axis in AXES)
    return tuple(
        np.eye(size) if side is None else side.numpy() for side, size in zip(sides, found.layer.shape, strict=True)
    )


def best(matrix: Array, rank: int) -> Array:
    """numpy's best approximation of a rank."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


def expected_update(space: ez.Subspace, layer: str, update: Array, rank: int) -> Array:
    left, right = bases(space, layer)
    return left @ best(left.T @ update @ right, rank) @ right.T


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_rebuilt_updates_are_the_best_of_their_rank_between_the_sides(adapters, rank):
    space = ez.fit(adapters, axes=AXES, rank=RANKS, core_rank=rank)
    for module in MODULES:
        lost = energy = 0.0
        for path in adapters:
            update = read_update(path, module).numpy()
            rebuilt = space.rebuild(path.name)
            found = expected_update(space, module, update, rank)
            scale = np.abs(update).max()
            bound = tolerance(4, dtype=torch.float32, scale=scale)
            assert np.abs(rebuilt.layer(module).numpy() - found).max() <= bound
            assert rebuilt.factors(module)[1].shape[0] == rank
            stated = space.coefficients(path.name).residuals[module]
            truth = float(((update - found) ** 2).sum())
            assert stated == pytest.approx(truth / float((update**2).sum()), abs=tolerance(4, dtype=torch.float32))
            lost, energy = lost + truth, energy + float((update**2).sum())
        assert space.manifest.discarded[module] == pytest.approx(
            lost, abs=tolerance(4, dtype=torch.float32, scale=energy)
        )
        assert space.report["layers"][module]["rank"] == {**RANKS, "cores": rank}


@pytest.mark.parametrize("rank", [1, 2])
def test_full_weights_lose_what_the_best_cut_of_the_centred_cores_loses(weights, rank):
    space = ez.fit(weights, axes=AXES, rank=5, core_rank=rank)
    for layer in ("w", "kernel"):
        shape = space.layers[layer].layer.shape
        stack_NOI = np.stack(
            [load_file(path / "model.safetensors")[layer].double().reshape(shape).numpy() for path in weights]
        )
        mean_OI = stack_NOI.mean(0)
        left, right = bases(space, layer)
        kept = 0.0
        for path, matrix in zip(weights, stack_NOI, strict=True):
            found = mean_OI + left @ best(left.T @ (matrix - mean_OI) @ right, rank) @ right.T
            bound = tolerance(4, dtype=torch.float32, scale=np.abs(stack_NOI).max())
            assert np.abs(space.rebuild(path.name).layer(layer).reshape(shape).numpy() - found).max() <= bound
            kept += float(((matrix - mean_OI) ** 2).sum() - ((matrix - found) ** 2).sum())
        variance = float(((stack_NOI - mean_OI) ** 2).sum())
        stated = space.report["layers"][layer]["captured"]
        assert stated == pytest.approx(kept / variance, abs=tolerance(4, dtype=torch.float32))


@pytest.mark.parametrize("kind", ["adapters", "weights"])
def test_a_rank_that_saves_nothing_is_a_fit_without_one(request, kind, tmp_path):
    zoo = request.getfixturevalue(kind)
    cut, plain = (ez.fit(zoo, axes=AXES, rank=5, core_rank=rank) for rank in (4, None))
    cut.save(tmp_path / "cut")
    plain.save(tmp_path / "plain")
    for layer in plain.layers:
        assert "cores" not in cut.layers[layer].ranks
        assert cut.report["layers"][layer]["rank"]["cores"] == min(cut.layers[layer].core_shape)
        assert "take no fewer numbers" in cut.report["layers"][layer]["reason"]["cores"]
    assert json.loads((tmp_path / "cut/manifest.json").read_text())["schema_version"] == 1
    for name in plain.names:
        file = f"coefficients/{name}.safetensors"
        assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()


def test_a_larger_core_rank_never_loses_more(adapters, weights):
    for zoo in (adapters, weights):
        lost = [ez.fit(zoo, axes=AXES, rank=6, core_rank=rank).report["residual"] for rank in (1, 2, 3)]
        lost.append(ez.fit(zoo, axes=AXES, rank=6).report["residual"])
        assert lost == sorted(lost, reverse=True)


def test_cores_of_the_rank_of_the_adapters_lose_nothing_more(adapters):
    cut = ez.fit(adapters, axes=AXES, rank=RANKS, core_rank=LORA_RANK)
    plain = ez.fit(adapters, axes=AXES, rank=RANKS)
    assert cut.layers["a.q"].ranks["cores"] == LORA_RANK
    assert cut.report["residual"] == pytest.approx(plain.report["residual"], abs=tolerance(4, dtype=torch.float32))


def test_files_hold_two_factors_row_by_row(adapters, tmp_path):
    space = ez.fit(adapters, axes=AXES, rank=RANKS, core_rank=2)
    space.save(tmp_path / "b")
    document = json.loads((tmp_path / "b/manifest.json").read_text())
    assert document["schema_version"] == 2
    assert document["layers"][0]["ranks"] == {**RANKS, "cores": 2}
    numbers = load_file(tmp_path / "b/coefficients/m0.safetensors")["coefficients"].double().numpy()
    assert numbers.size == 2 * 2 * (7 + 6)
    left, right = numbers[:14].reshape(7, 2), numbers[14:26].reshape(2, 6)
    basis = space.layers["a.q"]
    found = basis.side("outputs").numpy() @ left @ right @ basis.side("inputs").numpy().T
    assert np.abs(found - space.rebuild("m0").layer("a.q").numpy()).max() <= tolerance(10, dtype=torch.float32)
    # Orthogonal, and of the same lengths: neither needs a wider range than the other.
    grams = left.T @ left, right @ right.T
    assert np.abs(grams[0] - grams[1]).max() <= tolerance(10, dtype=torch.float32, scale=np.abs(grams[0]).max())


@pytest.mark.parametrize("kind", ["adapters", "weights"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saved_loaded_projected_verified_and_grown(request, kind, dtype, tmp_path):
    zoo = request.getfixturevalue(kind)
    fitted = ez.fit(zoo[:-1], axes=AXES, rank=5, core_rank=1, dtype=dtype)
    fitted.save(tmp_path / "b")
    space = ez.load(tmp_path / "b")
    assert space.verify().ok
    assert "cores cut to rank 1 and" in (tmp_path / "b/README.md").read_text()
    assert space.report["layers"] == fitted.report["layers"]
    known, again = space.coefficients("m0"), space.project(zoo[0])
    whole = space.project(zoo[-1])
    for layer, basis in space.layers.items():
        scale = float(known.values[layer].abs().max())
        assert again.values[layer].shape == basis.core_shape
        torch.testing.assert_close(
            again.values[layer], known.values[layer], rtol=0, atol=tolerance(60, dtype=torch.float32, scale=scale)
        )
        assert again.residuals[layer] == pytest.approx(known.residuals[layer], abs=tolerance(4, dtype=torch.float32))
    grown = space.add([zoo[-1]])
    grown.save(tmp_path / "grown")
    stored = ez.load(tmp_path / "grown").coefficients(zoo[-1].name)
    assert ez.load(tmp_path / "grown").verify().ok
    for layer in space.layers:
        assert stored.residuals[layer] == pytest.approx(whole.residuals[layer], rel=1e-6)
        assert torch.equal(space.rebuild(whole).layer(layer), ez.load(tmp_path / "grown").rebuild(stored).layer(layer))
    refreshed = space.add([zoo[-1]], refresh=True)
    at_once = ez.fit(zoo, axes=AXES, rank=5, core_rank=1, dtype=dtype)
    assert refreshed.report["residual"] == pytest.approx(at_once.report["residual"], rel=1e-4)
    assert {name: basis.ranks for name, basis in refreshed.layers.items()} == {
        name: basis.ranks for name, basis in at_once.layers.items()
    }


def test_auto_cuts_where_the_cut_loses_no_more_than_the_sides(adapters):
    sides = ez.fit(adapters, axes=AXES, rank=RANKS)
    chosen = ez.fit(adapters, axes=AXES, rank=RANKS, core_rank="auto")
    for module in MODULES:
        by_sides = sides.manifest.discarded[module]
        rank = chosen.report["layers"][module]["rank"]["cores"]
        lost = [
            ez.fit(adapters, axes=AXES, rank=RANKS, core_rank=each).manifest.discarded[module]
            for each in (rank - 1, rank)
            if each
        ]
        assert lost[-1] <= 2 * by_sides
        assert len(lost) == 1 or lost[0] > 2 * by_sides


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"axes": ("models",), "core_rank": 2}, UsageError, "a core rank with axes models"),
        (
            {"axes": ("models", "outputs", "inputs"), "core_rank": 2},
            UsageError,
            "a core rank with axes models, outputs",
        ),
        ({"axes": ("outputs",), "core_rank": "auto"}, UsageError, "a core rank with axes outputs"),
        ({"axes": AXES, "core_rank": 0}, RankError, "core rank 0"),
        ({"axes": AXES, "core_rank": -1}, RankError, "rank -1 is negative"),
        ({"axes": AXES, "core_rank": 0.5}, RankError, "core rank 0.5"),
        ({"axes": AXES, "core_rank": "most"}, RankError, "'most' is not a rank"),
    ],
)
def test_what_cannot_be_cut_is_refused(adapters, options, error, match):
    with pytest.raises(error, match=match):
        ez.fit(adapters, **options)


@pytest.mark.parametrize("rank", [1, 2])
def test_held_out_models_are_cut_as_well(weights, rank):
    space = ez.fit(weights, axes=AXES, rank=5, core_rank=rank, seed=3)
    stack_NOI = np.stack([load_file(path / "model.safetensors")["w"].double().numpy() for path in weights])
    held, *rest = (fold.numpy() for fold in make_folds(NUM_MODELS, NUM_FOLDS, 3))
    fitted = stack_NOI[np.concatenate(rest)]
    mean_OI = fitted.mean(0)
    left, right = (axis_basis(fitted - mean_OI, axis, 5) for axis in AXES)
    kept = total = 0.0
    for matrix in stack_NOI[held]:
        # About the mean of the fitted models alone: that of all models already knows the held-out ones.
        core = left.T @ (matrix - mean_OI) @ right
        kept += float((core**2).sum()) - float(((core - best(core, rank)) ** 2).sum())
        total += float(((matrix - mean_OI) ** 2).sum())
    assert space.report["layers"]["w"]["heldout"] == pytest.approx(kept / total, abs=tolerance(4, dtype=torch.float32))


def test_what_the_cut_loses_of_the_mean_of_adapters_is_no_loss_of_variance(tmp_path):
    """Of adapters that are mostly their mean, a cut can lose more than all that they vary by."""
    shared = random_factors({"q": (14, 12)}, 4, 100)["q"]
    noise = [random_factors({"q": (14, 12)}, 4, place)["q"] for place in range(6)]
    updates = [{"q": tuple(x + 0.2 * y for x, y in zip(shared, own, strict=True))} for own in noise]
    paths = [write_adapter(tmp_path / f"m{place}", update) for place, update in enumerate(updates)]
    space = ez.fit(paths, axes=AXES, rank=8, core_rank=1)
    record = space.report["layers"]["q"]
    originals_NOI = np.stack([read_update(path, "q") for path in paths])
    rebuilt_NOI = np.stack([space.rebuild(name).layer("q").numpy() for name in space.names])
    lost_NOI = originals_NOI - rebuilt_NOI
    varying = float(((originals_NOI - originals_NOI.mean(0)) ** 2).sum())
    assert float((lost_NOI**2).sum()) > varying
    kept = 1 - float(((lost_NOI - lost_NOI.mean(0)) ** 2).sum()) / varying
    assert 0 < kept < 1
    assert record["captured"] == pytest.approx(kept, abs=tolerance(16, dtype=torch.float32))
    assert record["heldout"] < record["captured"]
    unseen = against_alone(space.report).unseen_residual
    assert unseen == pytest.approx(
        space.report["residual"] + (kept - record["heldout"]) * varying / float((originals_NOI**2).sum()), rel=1e-4
    )
