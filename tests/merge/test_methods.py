"""Every method: alone, with twins, opposites and nothing; in any factoring and any order."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from merging_cases import (
    ALL,
    ELEMENTS,
    GRAM,
    IN_CORE,
    INPUTS,
    NAMES,
    NEUTRAL,
    OUTPUTS,
    PAIRS,
    WEIGHTS,
    dense,
    distance,
    merge_updates,
    merged,
    random_updates,
)
from torch import Tensor

from builders import seeded
from eigenzoo.errors import UsageError
from eigenzoo.linalg.lora import Factors
from eigenzoo.merge.methods import METHODS, find_method
from tolerance import tolerance

ALONE_CHANGES = ("iso_c", "iso_cts")
"""Methods that change a model that is alone: all its singular values become their mean."""

EXACT = tolerance(OUTPUTS + INPUTS)
SPECTRAL = 1e-10
"""Of methods that divide by singular values: their condition is that of the updates, about a hundred, squared in places."""

GAUGE = 1e-8


def test_every_method_stands_in_the_tables_of_these_tests() -> None:
    assert set(METHODS) == set(ALL)
    assert {name for name, method in METHODS.items() if method.kind == "gram"} == {*GRAM, *PAIRS}
    assert {name for name, method in METHODS.items() if method.kind == "core"} == set(IN_CORE)
    assert {name for name, method in METHODS.items() if method.kind == "elements"} == set(ELEMENTS)


def chosen(method: str, updates: list[Factors]) -> list[Factors]:
    """As many updates as the method takes."""
    return updates[: METHODS[method].models[1]]


def weights_of(method: str, num: int) -> list[float] | None:
    return list(WEIGHTS[:num]) if METHODS[method].weighted else None


@pytest.mark.parametrize("method", ALL)
def test_a_model_alone_comes_back(method: str) -> None:
    update = random_updates((4,))
    found = merged(update, method, **NEUTRAL.get(method, {}))
    (own,) = dense(update)
    if method in ALONE_CHANGES:
        u, values, vt = torch.linalg.svd(own, full_matrices=False)
        own = u[:, :4] @ vt[:4] * values[:4].mean()
    assert distance(found, own) < SPECTRAL


@pytest.mark.parametrize("space", ["core", "columns", "rows", "full"])
@pytest.mark.parametrize("method", [name for name in ELEMENTS if name != "knots_ties"])
def test_a_model_alone_comes_back_in_every_space(method: str, space: str) -> None:
    update = random_updates((4,))
    found = merged(update, method, space=space, **NEUTRAL[method])
    # The full space takes singular vectors from a Gram: its small values are right to the root of eps.
    assert distance(found, dense(update)[0]) < (1e-7 if space == "full" else EXACT)


def test_ranks_and_weights_give_the_dense_sum() -> None:
    updates = random_updates()
    wanted = torch.tensordot(torch.tensor(WEIGHTS, dtype=torch.float64), dense(updates), 1)
    assert distance(merged(updates, "task_arithmetic", weights=WEIGHTS), wanted) < EXACT
    assert distance(merged(updates, "task_arithmetic", weights=WEIGHTS, scale=-0.4), -0.4 * wanted) < EXACT
    assert distance(merged(updates, "linear", weights=WEIGHTS), wanted / sum(WEIGHTS)) < EXACT
    assert distance(merged(updates, "mean"), dense(updates).mean(0)) < EXACT


@pytest.mark.parametrize("method", ALL)
def test_another_factoring_of_an_update_changes_nothing(method: str) -> None:
    updates = chosen(method, random_updates())
    options: dict[str, Any] = {"weights": weights_of(method, len(updates)), "names": NAMES[: len(updates)]}
    before = merged(updates, method, **options)
    for factor in (1.0, 4.0, 1e3):
        other = [regauged(update, place, factor if place == 1 else 1.0) for place, update in enumerate(updates)]
        assert distance(merged(other, method, **options), before) < GAUGE


@pytest.mark.parametrize("method", [name for name in ALL if name not in PAIRS])
def test_the_order_of_models_changes_nothing(method: str) -> None:
    updates = random_updates()
    weights = weights_of(method, 3)
    before = merged(updates, method, weights=weights, names=NAMES)
    order = (2, 0, 1)
    after = merged(
        [updates[place] for place in order],
        method,
        weights=None if weights is None else [weights[place] for place in order],
        names=[NAMES[place] for place in order],
    )
    assert distance(after, before) < GAUGE


def regauged(update: Factors, seed: int, scale: float) -> Factors:
    """(B·G, G⁻¹·A) of a random G."""
    b, a = update
    rank = a.shape[0]
    matrix = torch.eye(rank).double() + 0.5 * torch.randn(rank, rank, generator=seeded(seed), dtype=torch.float64)
    return b @ matrix / scale, scale * torch.linalg.solve(matrix, a)


def test_the_basis_of_stacked_factors_depends_on_the_factoring() -> None:
    """Others' core space: singular vectors of the factors B, and of A, side by side. TIES in it is no function of ΔW."""

    def published(updates: list[Factors]) -> Tensor:
        left = torch.linalg.svd(torch.cat([b for b, _ in updates], 1), full_matrices=False)[0]
        right = torch.linalg.svd(torch.cat([a for _, a in updates], 0), full_matrices=False)[2]
        cores = left.T @ dense(updates) @ right.T
        count = int(0.2 * cores[0].numel())
        least = cores.flatten(1).abs().sort(descending=True).values[:, count - 1, None, None]
        trimmed = torch.where(cores.abs() >= least, cores, 0.0)
        agree = trimmed.sign() == trimmed.sum(0).sign()
        return left @ ((trimmed * agree).sum(0) / agree.sum(0).clamp_min(1)) @ right

    updates = random_updates((4, 4, 4))
    other = [(b / 4, 4 * a) if place == 0 else (b, a) for place, (b, a) in enumerate(updates)]
    assert distance(dense(other), dense(updates)) < EXACT
    assert distance(published(other), published(updates)) > 0.5
    assert distance(merged(other, "ties"), merged(updates, "ties")) < GAUGE


SUMS = ("task_arithmetic", "dare_linear", "breadcrumbs", "iso_c", "cart")


@pytest.mark.parametrize("method", [name for name in ALL if name not in ("cart", "iso_cts")])
def test_twins_merge_into_one_of_them_or_into_their_sum(method: str) -> None:
    """Of Iso-CTS each twin's own directions beside the common ones are nothing but round-off; CART's differences too."""
    (update,) = random_updates((4,))
    options = NEUTRAL.get(method, {})
    found, alone = merged([update, update], method, **options), merged([update], method, **options)
    if method == "regmean":
        alone = dense([update])[0]
    assert distance(found, 2 * alone if method in SUMS else alone) < GAUGE


OPPOSITES_VANISH = (
    "mean",
    "task_arithmetic",
    "model_stock",
    "slerp",
    "iso_c",
    "iso_cts",
    "breadcrumbs",
    "wudi",
    "ties",
)


@pytest.mark.parametrize("method", ALL)
def test_opposites_vanish_or_give_numbers(method: str) -> None:
    b, a = random_updates((4,))[0]
    pair = [(b, a), (-b, a)]
    if method == "linear":
        pair[1] = (-2 * b, a)
    found = merged(pair, method)
    assert bool(torch.isfinite(found).all())
    if method in OPPOSITES_VANISH:
        assert float(found.norm()) < GAUGE * float((b @ a).norm())


@pytest.mark.parametrize("method", ALL)
def test_an_update_of_zero_gives_numbers(method: str) -> None:
    (update,) = random_updates((4,))
    zero = (torch.zeros_like(update[0][:, :3]), torch.zeros_like(update[1][:3]))
    assert bool(torch.isfinite(merged([update, zero], method)).all())
    assert float(merged([zero, zero], method).norm()) == 0


@pytest.mark.parametrize("method", ALL)
def test_more_ranks_than_the_side_has(method: str) -> None:
    updates = chosen(method, random_updates((9, 9, 9), shape=(12, 14)))
    found = merge_updates(updates, method)
    product = found.factors[0] @ found.factors[1]
    assert bool(torch.isfinite(product).all())
    assert found.sums.rank <= 12
    if method == "task_arithmetic":
        assert distance(product, dense(updates).sum(0)) < EXACT


def test_random_masks_depend_on_the_seed_and_the_names_alone() -> None:
    updates = random_updates()
    before = merged(updates, "dare_linear", names=NAMES)
    assert torch.equal(merged(updates, "dare_linear", names=NAMES), before)
    assert distance(merged(updates, "dare_linear", names=NAMES, seed=1), before) > 0.1
    assert distance(merged(updates, "dare_linear", names=("a", "b", "c")), before) > 0.1


def test_equal_singular_values_are_told() -> None:
    left, _ = torch.linalg.qr(torch.randn(OUTPUTS, 4, generator=seeded(0), dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(INPUTS, 4, generator=seeded(1), dtype=torch.float64))
    same = [(left[:, :2], right[:, :2].T), (left[:, 2:], right[:, 2:].T)]
    assert merge_updates(same, "ties").gap < 1e-12
    assert merge_updates(random_updates(), "ties").gap > 1e-6
    assert merge_updates(same, "tsv").gap == 1.0


def test_options_are_checked() -> None:
    ties = find_method("ties")
    assert ties.options({}) == {"keep": 0.2, "semantics": "paper", "combine": "auto"}
    assert ties.options({"keep": [0.1, 0.5]})["keep"] == (0.1, 0.5)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"keep": 1.5}, "keep is '1.5'. It is a number from 0 to 1"),
        ({"semantics": "mine"}, "semantics is 'mine'. It is one of paper, mergekit, peft"),
        ({"density": 0.5}, "there is no option 'density'. It has keep, semantics, combine"),
        ({"keep": float("nan")}, "keep is 'nan'"),
        ({"keep": True}, "keep is 'True'"),
    ]
    for given, message in wrong:
        with pytest.raises(UsageError, match=re.escape(f"method ties: {message}")):
            ties.options(given)
    with pytest.raises(UsageError, match=r"rounds is '2.5'\. It is a whole number"):
        find_method("karcher").options({"rounds": 2.5})
    with pytest.raises(UsageError, match=r"method 'average' is unknown\. It is one of mean, linear"):
        find_method("average")
    with pytest.raises(UsageError, match="Keep ± window lies between 0 and 1"):
        merged(random_updates(), "della", keep=0.95)


def test_a_share_for_each_model() -> None:
    updates = random_updates()
    both = merged(updates[:2], "ties", keep=[1.0, 0.0], semantics="mergekit")
    assert distance(both, dense(updates)[0]) < EXACT
    with pytest.raises(UsageError, match="2 values for 3 models"):
        merged(updates, "ties", keep=[1.0, 0.5])


def test_every_method_is_described() -> None:
    for method in METHODS.values():
        assert method.summary.endswith("."), method.name
        assert method.formula, method.name
        assert method.source, method.name
        assert all(parameter.help for parameter in method.parameters.values()), method.name


@pytest.mark.parametrize("method", ALL)
def test_small_updates_merge_as_large_ones_do(method: str) -> None:
    """No constant of a method is one of size: f·τ gives f times the merge."""
    updates = chosen(method, random_updates())
    before = merged(updates, method, names=NAMES[: len(updates)])
    small = merged([(1e-6 * b, a) for b, a in updates], method, names=NAMES[: len(updates)])
    # What is iterated stops at the same step, and what is compared with a constant (a share, a cosine) has no size.
    assert distance(1e6 * small, before) < 1e-6


def test_weights_that_a_method_divides_by_may_be_large() -> None:
    updates = random_updates()
    before = merged(updates, "linear", weights=(1.0, 2.0, 1.0))
    assert distance(merged(updates, "linear", weights=(1e15, 2e15, 1e15)), before) < EXACT


def test_small_cores_keep_an_entry() -> None:
    """A fifth of four entries is none: one is kept."""
    found = merged(random_updates((2,)), "ctm")
    assert float(found.norm()) > 0
