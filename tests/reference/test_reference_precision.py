"""Fine-tunes that differ from their parent by a thousandth of its norm: what their small differences keep of their digits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from reference_algebra import ratios, squares
from reference_cases import rebuilt_stack, stored
from torch import Tensor

import eigenzoo as ez
from builders import seeded, write_stacks
from eigenzoo.formats.bundle.basis_files import BasisWriter
from eigenzoo.linalg.block_sums import center_rows
from eigenzoo.linalg.spectrum import eigenpairs, explained_variance_ratio
from eigenzoo.passes.resources import Resources
from eigenzoo.subspace.bases.flat import FlatBasis, orthonormalized, span_basis, write_flat
from eigenzoo.subspace.moments.collecting import collect, loaded_spans
from eigenzoo.zoo.zoo import Zoo
from tolerance import tolerance

NUM_MODELS, OUTPUTS, INPUTS = 16, 48, 40


@pytest.fixture(params=["float64", "float32"])
def path(request, monkeypatch) -> torch.dtype:
    """Both ways of reading a stack, in many blocks each."""
    if request.param == "float32":
        monkeypatch.setattr("eigenzoo.zoo.stack.EXACT_VALUES", 0)
    monkeypatch.setattr("eigenzoo.zoo.stack.SPAN_BYTES", 4 * NUM_MODELS * INPUTS * 5)
    return getattr(torch, request.param)


def fine_tunes() -> Tensor:
    """A parent and small differences of a falling spectrum, 1, 1/2, … in norm."""
    draw = seeded(0)
    parent = torch.randn(OUTPUTS, INPUTS, generator=draw, dtype=torch.float64)
    weights = torch.linalg.qr(torch.randn(NUM_MODELS, NUM_MODELS, generator=draw, dtype=torch.float64))[0]
    directions = torch.linalg.qr(torch.randn(OUTPUTS * INPUTS, NUM_MODELS, generator=draw, dtype=torch.float64))[0].T
    falling = 2.0 ** -torch.arange(NUM_MODELS, dtype=torch.float64)[:, None]
    changes = (weights @ (falling * directions)).view(NUM_MODELS, OUTPUTS, INPUTS)
    norms = changes.flatten(1).norm(dim=1).view(-1, 1, 1)
    return parent + 1e-3 * parent.norm() * changes / norms


def check_path(zoo: Zoo, path: torch.dtype) -> None:
    stack = zoo.stack("w")
    assert stack.dtype == path
    assert sum(1 for _ in stack.blocks(4 * NUM_MODELS * INPUTS * 5)) > 5


def test_float32_storage_moves_the_centred_spectrum_by_its_rounding_alone(tmp_path, path):
    wanted = fine_tunes()
    zoo = ez.open_zoo(write_stacks(tmp_path, {"w": wanted}))
    check_path(zoo, path)
    space = ez.fit(zoo, rank=8)
    found = explained_variance_ratio(space.moments("w").centered_NN).numpy()
    stored_NOI = stored(wanted, torch.float32)
    as_stored = ratios(stored_NOI - stored_NOI.mean(0))
    as_meant = ratios((wanted - wanted.mean(0)).numpy())
    # Rounding is white: of a singular value it moves uᵀEv, a normal number of the spread of E's entries, and five of them at
    # most; to second order the whole of E. A square moves twice as far. The path's own products round in its dtype.
    rounding_ND = (stored_NOI - wanted.numpy()).reshape(NUM_MODELS, -1)
    values = np.linalg.svd((wanted - wanted.mean(0)).flatten(1).numpy(), compute_uv=False)[:8]
    moved = 2 * 5 * rounding_ND.std() / values + (np.linalg.norm(rounding_ND, 2) / values) ** 2
    assert moved.max() < 3e-4, "float32 keeps three digits of the eighth eigenvalue"
    assert (np.abs(found / as_meant - 1)[:8] <= moved + tolerance(1, dtype=path) / as_meant[:8]).all()
    # Beside what is stored the path itself loses less: of a share, products of differences in its own dtype.
    assert np.abs(found - as_stored).max() <= tolerance(np.sqrt(OUTPUTS * INPUTS), dtype=path)


def test_bfloat16_storage_gives_the_spectrum_of_what_is_stored(tmp_path, path):
    zoo = ez.open_zoo(write_stacks(tmp_path, {"w": fine_tunes()}, torch.bfloat16))
    check_path(zoo, path)
    space = ez.fit(zoo, rank=8)
    stored_NOI = stored(fine_tunes(), torch.bfloat16)
    found = explained_variance_ratio(space.moments("w").centered_NN).numpy()
    assert np.abs(found - ratios(stored_NOI - stored_NOI.mean(0))).max() <= tolerance(
        np.sqrt(OUTPUTS * INPUTS), dtype=path
    )


def test_a_delta_keeps_its_digits(tmp_path, path):
    draw = seeded(1)
    parent = torch.randn(OUTPUTS, INPUTS, generator=draw, dtype=torch.float64).float().double()
    (base,) = write_stacks(tmp_path / "base", {"w": parent[None]})
    models = write_stacks(tmp_path / "models", {"w": fine_tunes() - fine_tunes().mean(0) + parent})
    space = ez.fit(models, rank=4, base=base, center="none")
    found = explained_variance_ratio(space.moments("w").centered_NN).numpy()
    expected = stored(fine_tunes() - fine_tunes().mean(0) + parent, torch.float32) - parent.numpy()
    assert np.abs(found - ratios(expected)).max() <= tolerance(np.sqrt(OUTPUTS * INPUTS), dtype=path)


@pytest.mark.parametrize("axes", [("models",), ("outputs", "inputs"), ("models", "outputs", "inputs")])
def test_stored_residual_is_the_true_one(tmp_path, path, axes):
    zoo = ez.open_zoo(write_stacks(tmp_path, {"w": fine_tunes()}))
    space = ez.fit(zoo, rank=dict.fromkeys(axes, 4))
    stored_NOI = stored(fine_tunes(), torch.float32)
    lost = float(((stored_NOI - rebuilt_stack(space, "w")) ** 2).sum())
    variance = float(squares(stored_NOI - stored_NOI.mean(0), "models").sum())
    whole = float((stored_NOI**2).sum())
    # A Gram's round-off is a share of the variance; the mean and the bases are rounded to float32.
    bound = tolerance(np.sqrt(OUTPUTS * INPUTS), dtype=path, scale=variance) + tolerance(
        1, dtype=torch.float32, scale=lost
    )
    assert abs(space.report["residual"] * whole - lost) <= bound + 1e-13 * whole


@pytest.mark.parametrize("span", [2, 4, 6])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_stored_directions_are_orthonormal_down_a_steep_spectrum(tmp_path, path, span, dtype):
    draw = seeded(2)
    weights = torch.linalg.qr(torch.randn(NUM_MODELS, NUM_MODELS, generator=draw, dtype=torch.float64))[0]
    directions = torch.linalg.qr(torch.randn(OUTPUTS * INPUTS, NUM_MODELS, generator=draw, dtype=torch.float64))[0].T
    falling = torch.logspace(0, -span, NUM_MODELS, dtype=torch.float64)[:, None]
    stack = (weights @ (falling * directions)).view(NUM_MODELS, OUTPUTS, INPUTS)
    zoo = ez.open_zoo(write_stacks(tmp_path, {"w": stack}))
    space = ez.fit(zoo, rank=1.0, dtype=dtype)
    basis = space.layers["w"]
    vectors = basis.tensors.read("w/models").double().flatten(1)
    # The file's own rule: what is above 1e-6 is corrected, and float32 storage alone moves an entry by its eps.
    assert float((vectors @ vectors.T - torch.eye(len(vectors))).abs().max()) <= 2e-6
    assert basis.orthonormality() <= 2e-6
    assert list(space.verify()) == []
    stored_NOI = stored(stack, torch.float32)
    # The correction hands the inverse to the coefficients, so that what is rebuilt stays what it was.
    room = tolerance(1, dtype=torch.float32)
    if 100.0**-span < torch.finfo(path).eps:
        # Directions whose energy is below the Gram's round-off are not found, and may be lost whole.
        room = np.sqrt(torch.finfo(path).eps)
    assert np.linalg.norm(stored_NOI - rebuilt_stack(space, "w")) <= room * np.linalg.norm(stored_NOI)


def test_without_the_correction_small_directions_would_lean_on_each_other(tmp_path, path, monkeypatch):
    """The case above reaches the Cholesky step: with it switched off the float32 path is not orthonormal."""
    monkeypatch.setattr("eigenzoo.subspace.bases.flat.ORTHONORMAL", 10.0)
    draw = seeded(2)
    stack = (
        torch.logspace(0, -4, NUM_MODELS, dtype=torch.float64)[:, None]
        * torch.randn(NUM_MODELS, OUTPUTS * INPUTS, generator=draw, dtype=torch.float64)
    ).view(NUM_MODELS, OUTPUTS, INPUTS)
    space = ez.fit(ez.open_zoo(write_stacks(tmp_path, {"w": stack})), rank=NUM_MODELS - 1)
    assert (space.layers["w"].orthonormality() > 1e-4) == (path == torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_directions_that_lean_on_each_other_are_corrected_and_the_models_stay(tmp_path, dtype):
    stack = ez.open_zoo(write_stacks(tmp_path / "zoo", {"w": fine_tunes()})).stack("w")
    moments = collect(stack)
    values_K, vectors_NK = (part[..., :4] for part in eigenpairs(moments.centered_NN))
    # V' = TᵀV and C' = C·T⁻ᵀ make the same models as V and C, with directions that are far from orthogonal.
    mixing_KK = torch.eye(4, dtype=torch.float64) + 0.3 * torch.randn(4, 4, generator=seeded(4), dtype=torch.float64)
    weights_NK = vectors_NK / values_K.sqrt() @ mixing_KK
    coefficients_NK = vectors_NK * values_K.sqrt() @ torch.linalg.inv(mixing_KK).T
    writer = BasisWriter(tmp_path, ["w"])
    with loaded_spans(stack, Resources()) as loaded:
        spans = []
        for start, _, rows in loaded:
            center_rows(rows, NUM_MODELS, INPUTS)
            spans.append(span_basis(rows, start, INPUTS, weights_NK, None, dtype))
    found_NK = write_flat(stack.layer, None, spans, coefficients_NK, dtype, writer)
    turned, in_memory_NK = orthonormalized(spans, coefficients_NK, dtype)
    assert float((in_memory_NK - found_NK).abs().max()) <= tolerance(1) * float(found_NK.abs().max())
    basis = FlatBasis(stack.layer, {"models": 4}, "models", writer.finish())
    writer.close()
    directions = torch.cat([span.directions_KD for span in turned], 1).view(4, OUTPUTS, INPUTS)
    assert torch.allclose(directions, basis.tensors.read("w/models"), atol=tolerance(4, dtype=dtype))
    assert basis.orthonormality() <= tolerance(1, dtype=dtype)
    expected = (
        (vectors_NK * values_K.sqrt())
        @ (vectors_NK / values_K.sqrt()).T
        @ torch.stack(
            [stack.matrix(place) - fine_tunes().float().double().mean(0) for place in range(NUM_MODELS)]
        ).flatten(1)
    )
    rebuilt = torch.stack([basis.rebuild(found_K) - basis.removed() for found_K in found_NK]).flatten(1)
    # Differences are taken from weights a thousand times as large, whose float64 round-off they carry.
    bound = tolerance(4, dtype=dtype, scale=float(expected.norm())) + tolerance(1, scale=1e3 * float(expected.norm()))
    assert float((rebuilt - expected).norm()) <= bound


def test_exact_low_rank_is_told_in_float32_too(tmp_path, monkeypatch):
    monkeypatch.setattr("eigenzoo.zoo.stack.EXACT_VALUES", 0)
    draw = seeded(3)
    weights = torch.randn(NUM_MODELS, 4, generator=draw, dtype=torch.float64)
    low = torch.tensordot(weights, torch.randn(4, OUTPUTS, INPUTS, generator=draw, dtype=torch.float64), 1)
    space = ez.fit(write_stacks(tmp_path, {"w": low}), rank=1.0)
    record = space.report["layers"]["w"]
    assert record["rank"] == {"models": 4}
    assert record["heldout"] <= 1


def test_stored_residual_of_bases_in_bfloat16_is_the_true_one(tmp_path):
    space = ez.fit(write_stacks(tmp_path, {"w": fine_tunes()}), rank=8, dtype="bfloat16")
    stored_NOI = stored(fine_tunes(), torch.float32)
    lost = float(((stored_NOI - rebuilt_stack(space, "w")) ** 2).sum() / (stored_NOI**2).sum())
    assert space.report["residual"] == pytest.approx(lost, rel=0.1)


@pytest.mark.parametrize("num_kept", [1, 8, 16])
def test_directions_have_the_same_bits_however_a_span_is_cut(num_kept: int) -> None:
    draw = seeded(0)
    rows_ED = torch.randn(43, 24_100, generator=draw)
    weights_NK = torch.randn(40, num_kept, generator=draw, dtype=torch.float64)
    removed = torch.zeros(1, 1, dtype=torch.float64)

    def directions(start: int, stop: int) -> Tensor:
        return span_basis(rows_ED[:, start:stop], start, 100, weights_NK, removed, torch.float32).directions_KD

    whole = directions(0, 24_100)
    exact = weights_NK.T @ rows_ED[:40].double() + weights_NK.sum(0)[:, None] * rows_ED[40].double()
    assert (whole.double() - exact).abs().max() < tolerance(60, dtype=torch.float32, scale=float(exact.abs().max()))
    for place in (8_100, 16_200):
        assert torch.equal(torch.cat([directions(0, place), directions(place, 24_100)], 1), whole)
