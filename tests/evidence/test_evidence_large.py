"""Large zoos, of which fewer draws, splits and directions are taken: what is still said is exact."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from evidence_zoos import directions, folds_of, hold_out, noise, up_to, without
from scipy.linalg import subspace_angles

from eigenzoo.evidence import growth, unseen
from eigenzoo.evidence.layer_evidence import LayerEvidence, measure_layer
from eigenzoo.records import Layer
from eigenzoo.subspace.moments.layer_moments import from_raw_gram

NUM_MODELS, SHAPE, SEED = unseen.LARGE_ZOO + 3, (12, 10), 4
ROWS = noise(NUM_MODELS, SHAPE, 1, spread=0.5).flatten(1)
LAYER = Layer("w", "dense", SHAPE, SHAPE, "none", "float64", 8 * ROWS.shape[1])


@pytest.fixture(scope="module")
def found() -> LayerEvidence:
    return measure_layer(LAYER, from_raw_gram(ROWS @ ROWS.T, ROWS.shape[1]), None, None, [], "auto", SEED)


def test_fewer_directions_are_left_out_one_by_one_and_exactly(found: LayerEvidence) -> None:
    assert found.unseen is not None
    ranks = found.unseen.left_out_rank
    assert ranks[-1] == unseen.LEFT_OUT_RANK_LARGE < unseen.LEFT_OUT_RANK
    folds = [hold_out(ROWS, without(NUM_MODELS, [left]), [left]) for left in range(NUM_MODELS)]
    energy = sum(fold[3] for fold in folds)
    assert found.unseen.left_out == pytest.approx(
        [sum(up_to(fold[2], rank) for fold in folds) / energy for rank in ranks], abs=1e-10
    )


def test_folds_are_held_out_as_of_any_zoo(found: LayerEvidence) -> None:
    assert found.unseen is not None
    folds = [hold_out(ROWS, without(NUM_MODELS, held), held) for held in folds_of(NUM_MODELS, SEED)]
    assert found.unseen.rank == (1, 2, 4, 8, 16, 32, 64, 120)
    for place, rank in enumerate(found.unseen.rank):
        captured = sum(up_to(fold[2], rank) for fold in folds) / sum(fold[3] for fold in folds)
        assert found.unseen.captured[place] == pytest.approx(captured, abs=1e-10)
    # The null is that of one fold, which is as large as the others.
    assert found.unseen.null == pytest.approx(found.unseen.captured, abs=0.02)


def test_fewer_splits_are_compared_and_exactly(found: LayerEvidence) -> None:
    assert found.halves is not None
    assert found.halves.num_splits == growth.NUM_SPLITS_LARGE < growth.NUM_SPLITS
    draw, cosines = torch.Generator().manual_seed(SEED), []
    for _ in range(found.halves.num_splits):
        order = torch.randperm(NUM_MODELS, generator=draw)
        bases = [
            directions(ROWS[part].numpy())[1][: found.halves.rank]
            for part in (order[: NUM_MODELS // 2], order[NUM_MODELS // 2 :])
        ]
        cosines.append(np.sort(np.cos(subspace_angles(bases[0].T, bases[1].T)))[::-1])
    assert found.halves.cosines == pytest.approx(np.mean(cosines, 0), abs=1e-8)


def test_growth_has_fewer_orders_of_the_models_and_exactly(found: LayerEvidence) -> None:
    grown = growth.growth([(found.growth, 1.0)], NUM_MODELS) if found.growth is not None else None
    assert grown is not None
    assert grown.num_draws == growth.NUM_DRAWS_LARGE < growth.NUM_DRAWS
    assert grown.num_models == growth.sizes(NUM_MODELS)
    most = grown.num_models[-1]
    assert most == NUM_MODELS - NUM_MODELS // growth.HELD_OUT
    draw, captured = torch.Generator().manual_seed(SEED), []
    for _ in range(grown.num_draws):
        order = torch.randperm(NUM_MODELS, generator=draw)
        folds = [hold_out(ROWS, order[:size], order[most:]) for size in grown.num_models]
        captured.append(
            [
                up_to(fold[2], min(growth.RANK, size - 1)) / fold[3]
                for fold, size in zip(folds, grown.num_models, strict=True)
            ]
        )
    assert grown.captured == pytest.approx(np.mean(captured, 0), abs=1e-10)


def test_noise_is_noise_in_a_large_zoo_too(found: LayerEvidence) -> None:
    assert found.code == "no-shared-structure"
    assert found.chance.auto == 0
    assert found.chance.permuted is None, "the sums of entries are not in a bare Gram"
    assert found.chance.explained_variance_ratio[:5] == pytest.approx(found.chance.norm_matched[:5], rel=0.1)
    assert len(found.suitability.exponents) == 4
