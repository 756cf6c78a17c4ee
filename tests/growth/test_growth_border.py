"""Borders: products about an old model, run by run and group by group, are those of the models about their mean."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import eigenzoo as ez
from eigenzoo.linalg import kernels
from eigenzoo.linalg.block_sums import sample
from eigenzoo.linalg.gram import center_gram
from eigenzoo.subspace.moments import border
from eigenzoo.subspace.moments.border import extend
from eigenzoo.subspace.moments.collecting import collect
from eigenzoo.subspace.moments.layer_moments import LayerMoments, entry_dimensions
from eigenzoo.zoo.stack import DenseStack
from tolerance import tolerance

OUTPUTS, INPUTS = 300, 70
"""21,000 values: several runs with a rest, and with 51 models and more a stack of float32 products."""

FLOAT32 = tolerance(1, dtype=torch.float32)
"""Of the largest ‖Y‖²: float32 products of some thousand values each, summed in float64."""


def stack_of(folder: Path, rows_ND: torch.Tensor) -> DenseStack:
    for number, row_D in enumerate(rows_ND):
        (folder / f"m{number:03}").mkdir(parents=True, exist_ok=True)
        save_file({"w.weight": row_D.view(OUTPUTS, INPUTS)}, folder / f"m{number:03}" / "model.safetensors")
    stack = ez.open_zoo(folder).stack("w.weight")
    assert isinstance(stack, DenseStack)
    return stack


def models(num: int, spread: float) -> torch.Tensor:
    """Models at `spread` from a base of unit entries, the last of them far from it."""
    torch.manual_seed(num)
    base_D = torch.randn(OUTPUTS * INPUTS)
    rows_ND = base_D + spread * torch.randn(num, OUTPUTS * INPUTS)
    rows_ND[0] += 5 * spread
    return rows_ND


@pytest.fixture
def small_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(border, "PRODUCT_COLUMNS", 1024)
    monkeypatch.setattr(kernels, "PRODUCT_COLUMNS", 1024)
    monkeypatch.setattr(border, "BLOCK_VALUES", 4096)
    monkeypatch.setattr(border, "GROUP_VALUES", 7 * 4096)


def check(found: LayerMoments, rows_ND: torch.Tensor, num_reference: int, bound: float) -> None:
    rows_ND = rows_ND.double()
    reference_D = rows_ND[:num_reference].mean(0)
    about_ND = rows_ND - reference_D
    gram_NN = about_ND @ about_ND.T
    largest = float(gram_NN.diagonal().max())
    assert float((found.gram_NN - gram_NN).abs().max()) <= bound * largest
    assert torch.equal(found.gram_NN, found.gram_NN.T)
    cross = float(reference_D.norm()) * largest**0.5
    assert float((found.cross_N - about_ND @ reference_D).abs().max()) <= bound * cross
    assert float((found.sums_N - rows_ND.sum(1)).abs().max()) <= bound * float(rows_ND.abs().sum(1).max())
    variances_D = (rows_ND[sample(len(rows_ND))] - rows_ND.mean(0)).square().sum(0)
    expected = entry_dimensions(center_gram(gram_NN), float(variances_D @ variances_D))
    assert found.entries == pytest.approx(expected, rel=100 * bound)


@pytest.mark.usefixtures("small_runs")
@pytest.mark.parametrize("num_new", [1, 2, 3, 4, 9, 40])
@pytest.mark.parametrize("spread", [1.0, 1e-3])
def test_a_border_is_that_of_all_rows(tmp_path: Path, num_new: int, spread: float) -> None:
    rows_ND = models(70 + num_new, spread)
    whole = stack_of(tmp_path, rows_ND)
    assert whole.dtype == torch.float32
    known = collect(whole.subset(range(70)))
    check(extend(known, whole), rows_ND, 70, FLOAT32)


@pytest.mark.usefixtures("small_runs")
def test_a_border_of_a_border_is_one(tmp_path: Path) -> None:
    rows_ND = models(80, 1.0)
    whole = stack_of(tmp_path, rows_ND)
    known = collect(whole.subset(range(60)))
    twice = extend(extend(known, whole.subset(range(67))), whole)
    assert twice.num_reference == 60
    check(twice, rows_ND, 60, FLOAT32)


@pytest.mark.usefixtures("small_runs")
def test_small_stacks_are_exact(tmp_path: Path) -> None:
    rows_ND = models(12, 1e-3)
    whole = stack_of(tmp_path, rows_ND)
    assert whole.dtype == torch.float64
    check(extend(collect(whole.subset(range(7))), whole), rows_ND, 7, 1e-12)


@pytest.mark.usefixtures("small_runs")
def test_a_center_of_columns_is_taken_from_the_new_rows(tmp_path: Path) -> None:
    rows_ND = models(75, 1.0)
    whole = stack_of(tmp_path, rows_ND)
    known = collect(whole.subset(range(70)), center="columns")
    assert known.removed is not None
    found = extend(known, whole)
    reference_D = rows_ND[:70].double().mean(0)
    shift_D = reference_D - known.removed.double().expand(OUTPUTS, INPUTS).flatten()
    expected = (rows_ND.double() - reference_D) @ shift_D
    assert found.shift_N is not None
    largest = float(reference_D.norm()) * float((rows_ND.double() - reference_D).norm(dim=1).max())
    assert float((found.shift_N - expected).abs().max()) <= FLOAT32 * largest


@pytest.mark.usefixtures("small_runs")
@pytest.mark.parametrize("place", [3, 72])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_named(tmp_path: Path, place: int, value: float) -> None:
    rows_ND = models(75, 1.0)
    known = collect(stack_of(tmp_path, rows_ND).subset(range(70)))
    rows_ND[place, 20_999] = value
    whole = stack_of(tmp_path, rows_ND)
    with pytest.raises(ez.DataError, match=f"layer 'w.weight' of m{place:03}: 1 values are NaN or Inf"):
        extend(known, whole)


@pytest.mark.usefixtures("small_runs")
def test_products_that_overflow_are_refused(tmp_path: Path) -> None:
    rows_ND = models(75, 1.0)
    known = collect(stack_of(tmp_path, rows_ND).subset(range(70)))
    rows_ND[72] *= 1e30
    with pytest.raises(ez.DataError, match="the products of its values overflow"):
        extend(known, stack_of(tmp_path, rows_ND))


def test_a_bundle_without_sums_gets_none(tmp_path: Path) -> None:
    rows_ND = models(75, 1.0)
    whole = stack_of(tmp_path, rows_ND)
    known = replace(collect(whole.subset(range(70))), sums_N=None)
    assert extend(known, whole).sums_N is None
