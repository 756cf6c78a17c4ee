"""Float32 and bfloat16 products of large layers beside float64: what each precision promises of the spectrum."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from scale_zoos import SHAPE, as_stored, planted, read_in_float32, read_in_spans, spectrum, variances

import eigenzoo as ez
from builders import edit_model, random_factors, read_update, write_adapter, write_stacks
from eigenzoo.errors import DataError, UsageError
from eigenzoo.linalg.kernels import BFLOAT16_ROUND_OFF
from eigenzoo.linalg.spectrum import FLOAT32_ROUND_OFF, NUMERICAL_RANK
from tolerance import tolerance

NUM_MODELS = 24

PARENTS = {"alone": 0.0, "fine-tunes": 100.0}
"""Norm of what all models have in common, in units of what they differ by."""


@pytest.fixture(autouse=True)
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    read_in_float32(monkeypatch)


def written(folder: Path, parent: float = 0.0) -> tuple[list[Path], np.ndarray]:
    """A zoo of float32 files and the variances of what they hold."""
    stack = planted(NUM_MODELS, parent=parent)
    return write_stacks(folder, {"w": stack}), variances(as_stored(stack))


@pytest.mark.parametrize("way", ["whole", "spans"])
@pytest.mark.parametrize("parent", PARENTS.values(), ids=PARENTS)
def test_float32_products_give_the_spectrum_to_a_millionth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parent: float, way: str
) -> None:
    if way == "spans":
        read_in_spans(monkeypatch, 4 * NUM_MODELS * SHAPE[1] * 50)
    paths, wanted = written(tmp_path, parent)
    moments = ez.fit(paths, 8).moments("w")
    found = spectrum(moments)
    assert moments.round_off == FLOAT32_ROUND_OFF
    assert np.abs(found - wanted).max() <= FLOAT32_ROUND_OFF * wanted[0], "eigenvalues above it are taken for true"
    assert np.abs(found / wanted - 1)[:8].max() <= 1e-6
    assert found[16:].sum() == pytest.approx(wanted[16:].sum(), rel=1e-5)
    # Sums in float64 alone would come closer than products in float32 can: the test reads what it says.
    assert np.abs(found / wanted - 1).max() > 1e-9


@pytest.mark.parametrize("parent", PARENTS.values(), ids=PARENTS)
def test_high_precision_is_float64_throughout(tmp_path: Path, parent: float) -> None:
    paths, wanted = written(tmp_path, parent)
    moments = ez.fit(paths, 8, precision="high").moments("w")
    assert moments.round_off == NUMERICAL_RANK
    # The parent's energy is `parent`² times theirs, and its round-off enters where the mean is removed.
    room = 1e-12 + tolerance(1, scale=parent)
    assert np.abs(spectrum(moments) / wanted - 1).max() <= room
    assert float(moments.energies_N.sum()) == pytest.approx(
        float(as_stored(planted(NUM_MODELS, parent=parent)).square().sum())
    )


def test_everything_is_read_in_float64_whatever_precision_is_the_default(tmp_path: Path) -> None:
    paths, wanted = written(tmp_path)
    space = ez.fit(paths, 1.0)
    assert space.moments("w").round_off == NUMERICAL_RANK
    assert space.report["layers"]["w"]["rank"] == {"models": NUM_MODELS - 1}
    assert np.abs(spectrum(space.moments("w")) / wanted - 1).max() <= 1e-12


def test_fast_products_are_those_of_rounded_rows(tmp_path: Path) -> None:
    paths, wanted = written(tmp_path)
    moments = ez.fit(paths, 8, precision="fast").moments("w")
    assert moments.round_off == BFLOAT16_ROUND_OFF
    found = spectrum(moments)
    assert np.abs(found / wanted - 1)[:16].max() <= 1e-3
    rows = as_stored(planted(NUM_MODELS)).float()
    rounded = (rows - rows.mean(0)).bfloat16().double()
    # Their mean is rounded in its own way, and with it a value here and there falls on the other side.
    assert np.abs(found - variances(rounded)).max() <= 1e-6 * wanted[0]
    assert np.abs(found - wanted).max() > 1e-5 * wanted[0], "nothing was rounded"


def test_fast_loses_nothing_of_what_all_have_in_common(tmp_path: Path) -> None:
    """The mean's energy and its products with the models stay in float32: only differences are rounded."""
    paths, _ = written(tmp_path, 100.0)
    moments = ez.fit(paths, 8, precision="fast").moments("w")
    energies = as_stored(planted(NUM_MODELS, parent=100.0)).square().sum(1)
    assert float((moments.energies_N / energies - 1).abs().max()) <= 1e-6


def test_fast_says_which_layers_it_cannot_resolve(tmp_path: Path) -> None:
    steep = planted(NUM_MODELS, falling=0.5, noise=1e-3)
    flat = planted(NUM_MODELS, seed=1)
    paths = write_stacks(tmp_path, {"flat": flat, "steep": steep})
    space = ez.fit(paths, 20, precision="fast")
    found = {name: layer["rank"]["models"] for name, layer in space.report["layers"].items()}
    assert found["flat"] == 20
    assert found["steep"] == int(
        (variances(as_stored(steep)) > BFLOAT16_ROUND_OFF * variances(as_stored(steep))[0]).sum()
    )
    (warning,) = space.report["warnings"]
    assert "fewer than 20 directions in 1 layers (steep)" in warning
    assert "use precision 'default'" in warning
    assert ez.fit(paths, 20).report["warnings"] == []
    assert ez.fit(paths, 4, precision="fast").report["warnings"] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 1.0, "precision": "fast"}, r"'fast' with rank 1\.0.*Use precision 'high' or 'default'"),
        ({"rank": {"models": 4, "inputs": 1.0}, "precision": "fast"}, r"'fast' with rank 1\.0"),
        ({"rank": 4, "precision": "double"}, "'double'.*high"),
    ],
)
def test_precisions_that_cannot_be_meant_are_refused(tmp_path: Path, options: dict, message: str) -> None:
    paths, _ = written(tmp_path)
    with pytest.raises(UsageError, match=message):
        ez.fit(paths, **options)


@pytest.mark.parametrize("precision", ["default", "high", "fast"])
def test_updates_have_the_products_of_their_dense_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    # Five models a tile, and ranks that differ: products of tiles with themselves and with each other.
    monkeypatch.setattr("eigenzoo.subspace.moments.update_moments.TILE_RANKS", 30)
    ranks = [4, 6, 5, 6]
    folders = [
        write_adapter(tmp_path / f"m{n}", random_factors({"w": SHAPE}, ranks[n % 4], n), lora_alpha=3 + n)
        for n in range(12)
    ]
    rows = torch.stack([read_update(folder, "w").flatten() for folder in folders])
    moments = ez.fit(ez.open_zoo(folders), 4, precision=precision).moments("w")
    # Alphas grow, so that entries are of many sizes: the error of a product is a share of the two norms.
    room = {"default": 1e-6, "high": 1e-14, "fast": 1e-2}[precision]
    norms = rows.norm(dim=1)
    assert float(((moments.raw_NN - rows @ rows.T) / torch.outer(norms, norms)).abs().max()) <= room
    assert float(((moments.sums_N - rows.sum(1)) / norms / rows.shape[1] ** 0.5).abs().max()) <= min(room, 1e-6)
    for row, values in zip(rows, moments.singular_NR, strict=True):
        exact = torch.linalg.svdvals(row.view(SHAPE))[: len(values)]
        # Roots of eigenvalues: to half of the digits, and never more than of float64's products of float32 factors.
        assert float((values - exact).abs().max() / exact[0]) <= max(room, 1e-7)
    if precision == "fast":
        assert float(((moments.raw_NN - rows @ rows.T) / torch.outer(norms, norms)).abs().max()) > 1e-6


def spoil(folder: Path, value: float) -> None:
    """Put one value into the last row of a layer, so that only its last span has it."""
    values = planted(NUM_MODELS)[5].float()
    values[-1, 3] = value
    edit_model(folder, w=values)


@pytest.mark.parametrize("way", ["whole", "spans"])
@pytest.mark.parametrize("precision", ["default", "fast", "high"])
def test_values_whose_squares_overflow_are_refused_by_layer_and_read_in_high(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, precision: str
) -> None:
    if way == "spans":
        read_in_spans(monkeypatch, 4 * NUM_MODELS * SHAPE[1] * 50)
    paths, _ = written(tmp_path)
    spoil(paths[5], 1e30)
    if precision == "high":
        assert ez.fit(paths, 2, precision="high").moments("w").energies_N[5] == pytest.approx(1e60)
        return
    with pytest.raises(
        DataError, match=r"layer 'w': the products of its values overflow.*precision 'high', or --exclude"
    ):
        ez.fit(paths, 2, precision=precision)


def test_updates_whose_products_overflow_are_refused_by_layer_and_read_in_high(tmp_path: Path) -> None:
    factors = [random_factors({"w": SHAPE}, 2, n) for n in range(4)]
    factors[2]["w"] = (factors[2]["w"][0] * 1e20, factors[2]["w"][1] * 1e5)
    paths = [write_adapter(tmp_path / f"m{n}", each) for n, each in enumerate(factors)]
    with pytest.raises(
        DataError, match=r"layer 'w': the products of its factors overflow.*precision 'high', or --exclude"
    ):
        ez.fit(paths, 2)
    whole = float(read_update(paths[2], "w").square().sum())
    assert float(ez.fit(paths, 2, precision="high").moments("w").energies_N[2]) == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("way", ["whole", "spans", "evidence", "sides", "fast", "exact"])
def test_a_value_that_is_no_number_is_laid_at_its_models_door(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, value: float
) -> None:
    if way == "spans":
        read_in_spans(monkeypatch, 4 * NUM_MODELS * SHAPE[1] * 50)
    if way == "exact":
        monkeypatch.setattr("eigenzoo.zoo.stack.EXACT_VALUES", 2**30)
    paths, _ = written(tmp_path)
    spoil(paths[5], value)
    call = ez.evidence if way == "evidence" else partial(ez.fit, rank=4)
    if way == "sides":
        call = partial(ez.fit, rank={"outputs": 4, "inputs": 4})
    if way == "fast":
        call = partial(ez.fit, rank=4, precision="fast")
    with pytest.raises(DataError, match="layer 'w' of m5: 1 values are NaN or Inf"):
        call(paths)


@pytest.mark.parametrize("side", ["A", "B"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_factor_that_is_no_number_is_laid_at_its_models_door(tmp_path: Path, value: float, side: str) -> None:
    paths = [write_adapter(tmp_path / f"m{n}", random_factors({"w": SHAPE}, 2, n)) for n in range(4)]
    b_OR, a_RI = random_factors({"w": SHAPE}, 2, 3)["w"]
    factor = a_RI if side == "A" else b_OR
    factor[1, 1] = value
    edit_model(paths[3], "adapter_model.safetensors", **{f"base_model__model__w__lora_{side}__weight": factor})
    with pytest.raises(DataError, match="layer 'w' of m3: 1 values are NaN or Inf"):
        ez.fit(paths, 2)


def test_a_base_that_is_no_number_is_not_laid_at_a_models_door(tmp_path: Path) -> None:
    paths, _ = written(tmp_path / "zoo")
    parent = torch.zeros(1, *SHAPE)
    parent[0, 7, 7] = float("nan")
    (base,) = write_stacks(tmp_path / "base", {"w": parent})
    with pytest.raises(DataError, match="layer 'w' of the base: 1 values are NaN or Inf"):
        ez.fit(paths, 2, base=base)
