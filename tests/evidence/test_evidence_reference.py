"""Everything that is said from the Gram of a layer, against the same on its dense weights, fold by fold and fit by fit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from evidence_zoos import (
    MODULES,
    NUM_MODELS,
    STACKS,
    Measured,
    dimensions,
    directions,
    folds_of,
    hold_out,
    measure,
    slack,
    unrelated_share,
    up_to,
    without,
)
from scipy.linalg import subspace_angles
from torch import Tensor

from eigenzoo.evidence.growth import NUM_DRAWS, NUM_SPLITS, RANK, sizes
from eigenzoo.evidence.layer_evidence import LayerEvidence
from eigenzoo.linalg.spectrum import effective_rank
from tolerance import tolerance

ZOOS = [(view, seed) for view in ("weight", "delta", "update") for seed in (0, 1)]
LAYERS = [(view, seed, name) for view, seed in ZOOS for name in (MODULES if view == "update" else STACKS)]
every_layer = pytest.mark.parametrize(
    ("zoo", "name"), [((view, seed), name) for view, seed, name in LAYERS], indirect=["zoo"]
)
every_zoo = pytest.mark.parametrize("zoo", ZOOS, indirect=True)


@pytest.fixture(scope="module")
def known() -> dict[tuple[str, int], Measured]:
    """Every zoo is written and measured once."""
    return {}


@pytest.fixture
def zoo(request: pytest.FixtureRequest, known: dict[tuple[str, int], Measured], tmp_path_factory) -> Measured:
    if request.param not in known:
        known[request.param] = measure(tmp_path_factory.mktemp("zoo"), *request.param)
    return known[request.param]


def near(found: object, expected: object, rows_ND: Tensor) -> bool:
    """Shares that agree to round-off, times what round-off grows by."""
    return np.asarray(found) == pytest.approx(
        np.asarray(expected), abs=tolerance(rows_ND.shape[1], scale=slack(rows_ND))
    )


def layer_of(zoo: Measured, name: str) -> tuple[LayerEvidence, Tensor]:
    return zoo.found.layers[name], zoo.rows[name]


@every_layer
def test_the_spectrum_is_that_of_the_weights(zoo: Measured, name: str) -> None:
    layer, rows_ND = layer_of(zoo, name)
    values = np.linalg.svd((rows_ND - rows_ND.mean(0)).numpy(), compute_uv=False) ** 2
    ratio = np.pad(values / values.sum(), (0, NUM_MODELS))[: NUM_MODELS - 1]
    assert near(layer.chance.explained_variance_ratio, ratio, rows_ND)
    assert near(layer.chance.effective_rank, effective_rank(torch.from_numpy(ratio[ratio > 1e-12])), rows_ND)
    assert layer.chance.var90 == int((np.cumsum(ratio) < 0.9).sum()) + 1
    assert near(layer.mean.share, NUM_MODELS * float(rows_ND.mean(0).square().sum() / rows_ND.square().sum()), rows_ND)
    assert layer.variance == pytest.approx(values.sum(), rel=1e-9)
    assert layer.energy == pytest.approx(float(rows_ND.square().sum()), rel=1e-9)


@every_layer
def test_held_out_shares_are_those_of_fits_to_the_weights(zoo: Measured, name: str) -> None:
    layer, rows_ND = layer_of(zoo, name)
    assert layer.unseen is not None
    folds = folds_of(NUM_MODELS, zoo.seed)
    found = [hold_out(rows_ND, without(NUM_MODELS, held), held) for held in folds]
    largest = min(NUM_MODELS - max(map(len, folds)) - 1, rows_ND.shape[1])
    assert layer.unseen.rank[-1] == largest
    assert layer.unseen.rank[:-1] == tuple(2**power for power in range(6) if 2**power < largest)
    for place, rank in enumerate(layer.unseen.rank):
        in_sample = sum(up_to(fold[0], rank) for fold in found) / sum(fold[1] for fold in found)
        captured = sum(up_to(fold[2], rank) for fold in found) / sum(fold[3] for fold in found)
        assert near(layer.unseen.in_sample[place], in_sample, rows_ND)
        assert near(layer.unseen.captured[place], captured, rows_ND)


@every_layer
def test_leaving_out_one_model_is_fitting_without_it(zoo: Measured, name: str) -> None:
    layer, rows_ND = layer_of(zoo, name)
    assert layer.unseen is not None
    found = [hold_out(rows_ND, without(NUM_MODELS, [left]), [left]) for left in range(NUM_MODELS)]
    energy = sum(fold[3] for fold in found)
    assert layer.unseen.left_out_rank[:2] == (1, 2)
    expected = [sum(up_to(fold[2], rank) for fold in found) / energy for rank in layer.unseen.left_out_rank]
    # Directions turn by round-off over the distances of eigenvalues, of which the least here are some thousandths.
    assert layer.unseen.left_out == pytest.approx(expected, abs=1e3 * tolerance(NUM_MODELS, scale=slack(rows_ND)))


@every_layer
def test_halves_are_compared_as_explicit_bases_are(zoo: Measured, name: str) -> None:
    layer, rows_ND = layer_of(zoo, name)
    assert layer.halves is not None
    rank = layer.halves.rank
    assert rank == min(max(layer.chance.auto, 1), NUM_MODELS // 2 - 1, rows_ND.shape[1])
    draw, cosines = torch.Generator().manual_seed(zoo.seed), np.zeros((NUM_SPLITS, rank))
    for split in range(NUM_SPLITS):
        order = torch.randperm(NUM_MODELS, generator=draw)
        first, second = (
            directions(rows_ND[part].numpy())[1][:rank] for part in (order[: NUM_MODELS // 2], order[NUM_MODELS // 2 :])
        )
        angles = np.sort(subspace_angles(first.T, second.T))
        cosines[split, : len(angles)] = np.cos(angles)
    # Bases of neighbouring eigenvalues turn: over twenty random splits the least relative gap is some ten-thousandth.
    bound = 1e4 * tolerance(rows_ND.shape[1], scale=slack(rows_ND))
    assert layer.halves.cosines == pytest.approx(cosines.mean(0), abs=bound)
    assert layer.halves.low == pytest.approx(np.quantile(cosines, 0.05, axis=0), abs=bound)
    assert layer.halves.high == pytest.approx(np.quantile(cosines, 0.95, axis=0), abs=bound)


@every_layer
def test_the_mean_is_measured_by_explicit_means(zoo: Measured, name: str) -> None:
    layer, rows_ND = layer_of(zoo, name)
    energy = float(rows_ND.square().sum())
    removed = null = products = spread = pairs = 0.0
    for held in torch.randperm(NUM_MODELS, generator=torch.Generator().manual_seed(zoo.seed)).tensor_split(5):
        rest = without(NUM_MODELS, held)
        mean_D = rows_ND[rest].mean(0)
        removed += float(rows_ND[held].square().sum() - (rows_ND[held] - mean_D).square().sum())
        # The mean of unrelated models has their energies over their number squared, and adds it to every model.
        null -= len(held) * float(rows_ND[rest].square().sum()) / len(rest) ** 2
        inner = rows_ND[held] @ rows_ND[rest].T
        products, pairs = products + float(inner.sum()), pairs + inner.numel()
        spread += float(torch.outer(rows_ND[held].square().sum(1), rows_ND[rest].square().sum(1)).sum())
    assert near(layer.mean.heldout, removed / energy, rows_ND)
    assert near(layer.mean.null, null / energy, rows_ND)
    assert near(layer.mean.common, products / pairs / (energy / NUM_MODELS), rows_ND)
    assert layer.weighed is not None
    share = max(layer.weighed.sums.cloud / layer.weighed.sums.contrast_energy, 1 / rows_ND.shape[1])
    deviations = products / np.sqrt(2 * spread * share)
    assert layer.mean.deviations == pytest.approx(deviations, abs=1e3 * tolerance(99, scale=slack(rows_ND)))


@every_layer
def test_the_secondary_subspace_is_what_follows_the_top_directions(zoo: Measured, name: str) -> None:
    layer, _ = layer_of(zoo, name)
    assert layer.unseen is not None
    rank, auto = layer.unseen.rank, max(layer.chance.auto, 1)
    top = max(place for place, known in enumerate(rank) if known <= auto)
    if top + 1 == len(rank):
        assert layer.secondary is None
        return
    assert layer.secondary is not None
    assert (layer.secondary.rank, layer.secondary.upto) == rank[top : top + 2]
    for part in ("in_sample", "captured", "null"):
        values = getattr(layer.unseen, part)
        assert getattr(layer.secondary, part) == pytest.approx(values[top + 1] - values[top], abs=tolerance(99))
    assert layer.weighed is not None
    sums = layer.weighed.sums
    held = (sums.contrast[top + 1] - sums.contrast[top]) / ((rank[top + 1] - rank[top]) * sums.cloud)
    assert layer.secondary.ratio == pytest.approx(held, abs=tolerance(99, scale=held))


@every_zoo
def test_growth_is_that_of_fits_to_the_weights(zoo: Measured) -> None:
    grown = zoo.found.growth
    assert grown is not None
    looked = sizes(NUM_MODELS)
    assert grown.num_models == looked
    draw, weights = torch.Generator().manual_seed(zoo.seed), {name: rows.shape[1] for name, rows in zoo.rows.items()}
    total = sum(weights.values())
    in_sample = np.zeros((NUM_DRAWS, len(looked), NUM_MODELS))
    captured, null = np.zeros((2, NUM_DRAWS, len(looked)))
    for number in range(NUM_DRAWS):
        order = torch.randperm(NUM_MODELS, generator=draw)
        for place, size in enumerate(looked):
            for name, rows_ND in zoo.rows.items():
                fold = hold_out(rows_ND, order[:size], order[looked[-1] :])
                shares = np.pad(fold[0] / fold[1], (0, NUM_MODELS), constant_values=1.0)[:NUM_MODELS]
                in_sample[number, place] += weights[name] / total * shares
                kept = min(RANK, size - 1)
                captured[number, place] += weights[name] / total * up_to(fold[2], kept) / fold[3]
                size_of = float(rows_ND.shape[1]) if zoo.view == "update" else dimensions(rows_ND)
                chance = unrelated_share(rows_ND, order[:size], order[looked[-1] :], kept, size_of)
                null[number, place] += weights[name] / total * chance
    bound = tolerance(99, scale=max(slack(rows_ND) for rows_ND in zoo.rows.values()))
    assert grown.captured == pytest.approx(captured.mean(0), abs=bound)
    assert grown.spread == pytest.approx(captured.std(0, ddof=1), abs=bound)
    assert grown.null == pytest.approx(null.mean(0), abs=bound)
    kept = [min(RANK, size - 1) - 1 for size in looked]
    assert grown.in_sample == pytest.approx([in_sample[:, place, k].mean() for place, k in enumerate(kept)], abs=bound)
    # Sums that reach 90 % to the last bit do not occur in random weights.
    assert grown.var90_rank == pytest.approx(((in_sample < 0.9).sum(-1) + 1).mean(0), abs=tolerance(1))


@every_zoo
def test_the_map_is_the_principal_components_of_all_layers_side_by_side(zoo: Measured) -> None:
    whole_ND = torch.cat(list(zoo.rows.values()), 1)
    left, values, _ = np.linalg.svd((whole_ND - whole_ND.mean(0)).numpy(), full_matrices=False)
    found = np.array([zoo.document["map"][name] for name in zoo.found.names])
    for place in range(3):
        expected = left[:, place] * values[place]
        sign = np.sign(expected @ found[:, place])
        assert np.abs(sign * expected - found[:, place]).max() <= 1e-6 * values[0]
    assert zoo.document["map_shares"] == pytest.approx(values[:3] ** 2 / (values**2).sum(), abs=1e-9)
