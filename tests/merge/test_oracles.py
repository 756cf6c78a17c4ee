"""Methods against mergekit and PEFT in the full space, and against dense float64 by their formulas."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from merging_cases import INPUTS, NAMES, OUTPUTS, WEIGHTS, dense, distance, input_grams, merged, random_updates
from peft.utils import merge_utils
from torch import Tensor

from eigenzoo.linalg.lora import Factors
from eigenzoo.merge.layer_updates import Context
from tolerance import tolerance

merge_tensors = pytest.importorskip("mergekit.merge_methods").merge_tensors

EXACT = tolerance(OUTPUTS + INPUTS)
BY_GRAM = 1e-7
"""In the full space, singular vectors are those of a Gram: what is rebuilt of them is right to the root of eps."""

PEFT_SINGLE = 1e-6
"""PEFT's masks are those of float32."""


def with_zero_sums() -> list[Factors]:
    """Three updates: half of the outputs of the second are exactly the negatives of the first's."""
    first, _, third = random_updates((4, 4, 7))
    signs = torch.tensor([1.0, -1.0] * (OUTPUTS // 2), dtype=torch.float64)[:, None]
    return [first, (signs * first[0], first[1]), third]


def by_mergekit(
    updates: list[Factors], method: str, *, dtype: torch.dtype = torch.float64, **parameters: Any
) -> Tensor:
    matrices = [torch.zeros(OUTPUTS, INPUTS, dtype=dtype), *dense(updates).to(dtype)]
    return merge_tensors(matrices, method, parameters=parameters, base_index=0).double()


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), WEIGHTS])
@pytest.mark.parametrize("updates", [random_updates(), with_zero_sums()], ids=["random", "zero sums"])
@pytest.mark.parametrize("keep", [0.2, 0.55, 1.0])
def test_ties_is_mergekits(updates: list[Factors], weights: tuple[float, ...], keep: float) -> None:
    wanted = by_mergekit(updates, "ties", weight=list(weights), density=[keep] * 3)
    found = merged(updates, "ties", weights=weights, keep=keep, semantics="mergekit", space="full")
    assert distance(found, wanted) < BY_GRAM


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), WEIGHTS])
@pytest.mark.parametrize("updates", [random_updates(), with_zero_sums()], ids=["random", "zero sums"])
@pytest.mark.parametrize("keep", [0.2, 0.55])
def test_ties_is_pefts(updates: list[Factors], weights: tuple[float, ...], keep: float) -> None:
    wanted = merge_utils.ties(list(dense(updates)), torch.tensor(weights, dtype=torch.float64), keep)
    found = merged(updates, "ties", weights=weights, keep=keep, semantics="peft", space="full")
    assert distance(found, wanted) < BY_GRAM


def test_ties_is_the_papers() -> None:
    """As its authors' code: trim over the whole model, which is one layer here; a sum of zero takes the sign of the majority."""
    updates, keep = with_zero_sums(), 0.4
    matrices = dense(updates)
    count = int(keep * matrices[0].numel())
    least = matrices.flatten(1).abs().sort(descending=True).values[:, count - 1, None, None]
    trimmed = torch.where(matrices.abs() >= least, matrices, 0.0)
    sign = trimmed.sum(0).sign()
    assert bool(((sign == 0) & (trimmed != 0).any(0)).any())
    majority = sign.sum().sign()
    sign[sign == 0] = majority
    agree = torch.where(sign > 0, trimmed > 0, trimmed < 0)
    wanted = (trimmed * agree).sum(0) / agree.sum(0).clamp_min(1)
    assert distance(merged(updates, "ties", keep=keep, space="full", majority=float(majority)), wanted) < BY_GRAM


def test_the_three_definitions_of_ties_differ() -> None:
    updates = random_updates()
    found = [
        merged(updates, "ties", weights=WEIGHTS, semantics=each, space="full") for each in ("paper", "mergekit", "peft")
    ]
    assert distance(found[0], found[1]) > 0.1
    assert distance(found[0], found[2]) > 0.1
    assert distance(found[1], found[2]) > 0.1


@pytest.fixture
def own_draws(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[Factors]], None]:
    """Make torch.bernoulli draw what eigenzoo draws for these updates, in their order."""

    def draw(updates: list[Factors]) -> None:
        context = Context("layer", NAMES, torch.ones(3).double())
        numbers: Iterator[Tensor] = (
            torch.rand(OUTPUTS, INPUTS, dtype=torch.float64, generator=each) for each in context.generators()
        )
        monkeypatch.setattr(torch, "bernoulli", lambda chances: (next(numbers) < chances).to(chances.dtype))

    return draw


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), WEIGHTS])
def test_dare_is_mergekits_by_its_own_draws(method: str, weights: tuple[float, ...], own_draws: Any) -> None:
    updates = random_updates()
    own_draws(updates)
    wanted = by_mergekit(updates, method, weight=list(weights), density=[0.4] * 3)
    found = merged(updates, method, names=NAMES, weights=weights, keep=0.4, semantics="mergekit", space="full")
    # mergekit multiplies masks in float32.
    assert distance(found, wanted) < PEFT_SINGLE


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), WEIGHTS])
def test_dare_is_pefts_by_its_own_draws(method: str, weights: tuple[float, ...], own_draws: Any) -> None:
    updates = random_updates()
    own_draws(updates)
    wanted = getattr(merge_utils, method)(list(dense(updates)), torch.tensor(weights, dtype=torch.float64), 0.4)
    found = merged(updates, method, names=NAMES, weights=weights, keep=0.4, semantics="peft", space="full")
    assert distance(found, wanted) < BY_GRAM


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), WEIGHTS])
def test_della_is_mergekits_by_its_own_draws(weights: tuple[float, ...], own_draws: Any) -> None:
    updates = random_updates()
    own_draws(updates)
    wanted = by_mergekit(updates, "della", weight=list(weights), density=[0.4] * 3, epsilon=[0.2] * 3)
    found = merged(
        updates, "della", names=NAMES, weights=weights, keep=0.4, window=0.2, semantics="mergekit", space="full"
    )
    assert distance(found, wanted) < PEFT_SINGLE


@pytest.mark.parametrize(("keep", "outliers"), [(0.5, 0.01), (0.9, 0.3), (0.3, 0.2)])
def test_breadcrumbs_is_mergekits(keep: float, outliers: float) -> None:
    updates = random_updates()
    wanted = by_mergekit(
        updates,
        "breadcrumbs",
        weight=list(WEIGHTS),
        density=[keep] * 3,
        gamma=[outliers] * 3,
    )
    found = merged(updates, "breadcrumbs", weights=WEIGHTS, keep=keep, outliers=outliers, space="full")
    assert distance(found, wanted) < BY_GRAM


@pytest.mark.parametrize("keep", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("updates", [random_updates(), with_zero_sums()], ids=["random", "zero sums"])
def test_sce_is_mergekits(updates: list[Factors], keep: float) -> None:
    wanted = by_mergekit(updates, "sce", select_topk=keep)
    assert distance(merged(updates, "sce", keep=keep, space="full"), wanted) < BY_GRAM


def test_combinations_are_mergekits() -> None:
    updates = random_updates()
    pair = updates[:2]
    assert distance(merged(updates, "model_stock"), by_mergekit(updates, "model_stock")) < EXACT
    assert (
        distance(merged(pair, "nuslerp", weights=(0.7, 1.1)), by_mergekit(pair, "nuslerp", weight=[0.7, 1.1])) < EXACT
    )
    karcher = merge_tensors(list(dense(updates)), "karcher", parameters={"max_iter": 50, "tol": 1e-10})
    assert distance(merged(updates, "karcher", rounds=50, tolerance=1e-10), karcher) < EXACT
    slerp = merge_tensors(list(dense(pair)), "slerp", parameters={"t": 0.3}, base_index=0)
    assert distance(merged(pair, "slerp", t=0.3), slerp) < EXACT
    linear = merge_tensors(list(dense(updates)), "linear", parameters={"weight": list(WEIGHTS)})
    assert distance(merged(updates, "linear", weights=WEIGHTS), linear) < EXACT


def polar(matrix: Tensor) -> Tensor:
    u, values, vt = torch.linalg.svd(matrix, full_matrices=False)
    kept = values > 1e-12 * values[0]
    return u[:, kept] @ vt[kept]


def test_tsv_is_its_formula() -> None:
    updates = random_updates()
    parts = [torch.linalg.svd(matrix, full_matrices=False) for matrix in dense(updates)]
    for share in (1.0, 0.5):
        kept = [max(1, round(share * a.shape[0])) for _, a in updates]
        left = torch.cat([u[:, :k] for (u, _, _), k in zip(parts, kept, strict=True)], 1)
        right = torch.cat([vt[:k] for (_, _, vt), k in zip(parts, kept, strict=True)], 0)
        middle = torch.cat([values[:k] for (_, values, _), k in zip(parts, kept, strict=True)])
        assert distance(merged(updates, "tsv", share=share), polar(left) * middle @ polar(right)) < 1e-10


def test_iso_c_is_its_formula() -> None:
    updates = random_updates()
    total = torch.tensordot(torch.tensor(WEIGHTS, dtype=torch.float64), dense(updates), 1)
    u, values, vt = torch.linalg.svd(total, full_matrices=False)
    rank = 13
    assert float(values[rank]) < 1e-12 * float(values[0])
    wanted = u[:, :rank] @ vt[:rank] * values[:rank].mean()
    assert distance(merged(updates, "iso_c", weights=WEIGHTS), wanted) < 1e-10


def test_iso_cts_is_its_formula() -> None:
    updates = random_updates((4, 4, 4))
    matrices = dense(updates)
    u, values, vt = torch.linalg.svd(matrices.sum(0), full_matrices=False)
    num_own = (12 - round(0.5 * 12)) // 3
    common = 12 - 3 * num_own
    left, right, sizes = [u[:, :common]], [vt[:common]], [values[:common]]
    for matrix in matrices:
        own_u, own_values, own_vt = torch.linalg.svd(matrix - left[0] @ left[0].T @ matrix, full_matrices=False)
        left.append(own_u[:, :num_own])
        right.append(own_vt[:num_own])
        sizes.append(own_values[:num_own])
    wanted = polar(torch.cat(left, 1)) @ polar(torch.cat(right, 0)) * torch.cat(sizes).mean()
    assert distance(merged(updates, "iso_cts", common=0.5), wanted) < 1e-9


def test_cart_is_its_formula() -> None:
    updates = random_updates()
    matrices = dense(updates)
    mean = matrices.mean(0)
    wanted = mean.clone()
    for matrix in matrices:
        u, values, vt = torch.linalg.svd(matrix - mean, full_matrices=False)
        kept = max(1, round(0.3 * int((values > 1e-12 * values[0]).sum())))
        wanted += 0.2 * (u[:, :kept] * values[:kept]) @ vt[:kept]
    assert distance(merged(updates, "cart", share=0.3, strength=0.2), wanted) < 1e-10


def test_ctm_is_its_formula() -> None:
    updates = random_updates()
    matrices = dense(updates)
    norms = matrices.flatten(1).norm(dim=1)
    scaled = matrices * (norms ** (0.25 - 1))[:, None, None]
    left = torch.linalg.eigh(sum(each @ each.T for each in scaled)).eigenvectors.flip(1)[:, :5]
    right = torch.linalg.eigh(sum(each.T @ each for each in scaled)).eigenvectors.flip(1)[:, :5]
    cores = left.T @ matrices @ right
    assert distance(merged(updates, "ctm", directions=5, inside="sum"), left @ cores.sum(0) @ right.T) < 1e-9
    count = int(0.2 * 25)
    least = cores.flatten(1).abs().sort(descending=True).values[:, count - 1, None, None]
    trimmed = torch.where(cores.abs() >= least, cores, 0.0)
    agree = (trimmed.sign() == trimmed.sum(0).sign()) & (trimmed != 0)
    elected = (trimmed * agree).sum(0) / agree.sum(0).clamp_min(1)
    assert distance(merged(updates, "ctm", directions=5), left @ elected @ right.T) < 1e-9


def test_wudi_is_its_formula() -> None:
    updates = random_updates()
    matrices = dense(updates)
    projections = [each.T @ each / each.square().sum() for each in matrices]
    wanted = sum(m @ p for m, p in zip(matrices, projections, strict=True)) @ torch.linalg.pinv(
        sum(projections), rtol=1e-12, hermitian=True
    )
    assert distance(merged(updates, "wudi"), wanted) < 1e-8


def test_wudi_minimises_what_it_is_to_minimise() -> None:
    """Σ ‖(τ_t − M) τ_tᵀ‖² / ‖τ_t‖² is no smaller nearby."""
    updates = random_updates()
    matrices = dense(updates)

    def interference(m: Tensor) -> float:
        return sum(float(((t - m) @ t.T).square().sum() / t.square().sum()) for t in matrices)

    found = merged(updates, "wudi")
    least = interference(found)
    for seed in range(5):
        step = torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert interference(found + 1e-3 * step) > least


def test_regmean_is_its_formula() -> None:
    updates = random_updates()
    grams = [0.9 * gram + 0.1 * torch.diag(gram.diagonal()) for gram in input_grams(NAMES).values()]
    above = sum(m @ gram for m, gram in zip(dense(updates), grams, strict=True))
    wanted = above @ torch.linalg.inv(sum(grams))
    assert distance(merged(updates, "regmean", names=NAMES), wanted) < 1e-10


def test_knots_is_ties_on_the_right_factors() -> None:
    """U Σ [V₁ … V_T]ᵀ of all updates side by side; TIES on Σ V_tᵀ, and U before the result."""
    updates = random_updates()
    u, values, vt = torch.linalg.svd(torch.cat(list(dense(updates)), 1), full_matrices=False)
    rank = int((values > 1e-12 * values[0]).sum())
    rows = torch.stack(list((values[:rank, None] * vt[:rank]).split(INPUTS, 1)))
    count = int(0.2 * rows[0].numel())
    least = rows.flatten(1).abs().sort(descending=True).values[:, count - 1, None, None]
    trimmed = torch.where(rows.abs() >= least, rows, 0.0)
    agree = (trimmed.sign() == trimmed.sum(0).sign()) & (trimmed != 0)
    wanted = u[:, :rank] @ ((trimmed * agree).sum(0) / agree.sum(0).clamp_min(1))
    assert distance(merged(updates, "knots_ties"), wanted) < 1e-9
