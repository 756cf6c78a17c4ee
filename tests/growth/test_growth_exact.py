"""Growth with the old models' files at hand: as if fitted at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from growth_zoos import CASES, Case, open_case, rebuilt, relative_gap, saved, write

import eigenzoo as ez
from eigenzoo.formats.bundle.folder import MANIFEST
from tolerance import tolerance

FLOAT32 = tolerance(64, dtype=torch.float32)
"""Bases are float32; 64 numbers and more are summed."""

ORDERS = {"at the end": ([0, 1, 2, 3, 4], [[5], [6], [7]]), "mixed": ([6, 1, 4, 3, 0], [[7], [5, 2]])}


def close(first: float, second: float) -> bool:
    return first == pytest.approx(second, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_one_by_one_is_at_once_after_a_refresh(tmp_path: Path, case: Case, order: str) -> None:
    paths = write(tmp_path / "zoo", case.view)
    first, later = ORDERS[order]
    grown = ez.fit(open_case(tmp_path / "zoo", case, [paths[place] for place in first]), **case.options)
    for step, places in enumerate(later):
        grown = saved(grown, tmp_path / f"step{step}")
        new = open_case(tmp_path / "zoo", case, [paths[place] for place in places])
        grown = grown.add(new, refresh=step == len(later) - 1)
    grown = saved(grown, tmp_path / "grown")
    whole_zoo = open_case(tmp_path / "zoo", case, paths)
    whole = saved(ez.fit(whole_zoo, **case.options), tmp_path / "whole")

    assert grown.report["growth"]["exact"]
    assert grown.report["growth"]["refreshed"]
    assert set(grown.names) == set(whole.names)
    turn = torch.tensor([grown.names.index(name) for name in whole.names])
    for layer in whole.layers:
        expected, found = whole.moments(layer).centered_NN, grown.moments(layer).centered_NN[turn][:, turn]
        assert float((expected - found).abs().max()) <= 1e-7 * float(expected.diagonal().max())
        assert grown.layers[layer].ranks == whole.layers[layer].ranks
        assert grown.report["layers"][layer]["rank"] == whole.report["layers"][layer]["rank"]
        assert close(grown.manifest.discarded[layer], whole.manifest.discarded[layer])
        assert close(grown.report["layers"][layer]["residual"], whole.report["layers"][layer]["residual"])
    assert close(grown.report["residual"], whole.report["residual"])
    assert whole.report["residual"] > 0.01, "a case in which nothing is lost would prove little"
    assert (
        relative_gap(rebuilt(whole), rebuilt(grown)) <= 10 * FLOAT32
    )  # over the gap between kept and lost eigenvalues
    assert list(grown.verify()) == []


@pytest.mark.parametrize("case", CASES, ids=str)
def test_without_a_refresh_the_basis_stays_and_the_moments_are_exact(tmp_path: Path, case: Case) -> None:
    paths = write(tmp_path / "zoo", case.view)
    old = saved(ez.fit(open_case(tmp_path / "zoo", case, paths[:5]), **case.options), tmp_path / "old")
    before = rebuilt(old)
    grown = old
    for step, places in enumerate(([5], [6, 7])):
        new = open_case(tmp_path / "zoo", case, [paths[place] for place in places])
        grown = saved(grown.add(new), tmp_path / f"grown{step}")

    assert grown.report["growth"]["statement"] == "the basis is unchanged and the moments are exact"
    assert grown.names == tuple(f"m{place}" for place in range(8))
    assert old.names == tuple(f"m{place}" for place in range(5)), "the old subspace was changed"
    for file in old.files():
        if file.startswith(("basis", "coefficients/", "rest/")):
            assert (grown.path / file).read_bytes() == (old.path / file).read_bytes(), file
    assert grown.manifest.basis_id == old.manifest.basis_id
    after = rebuilt(grown)
    assert all(torch.equal(before[name][layer], after[name][layer]) for name in before for layer in before[name])

    whole_zoo = open_case(tmp_path / "zoo", case, paths)
    whole = ez.fit(whole_zoo, **case.options)
    for layer in whole.layers:
        found = grown.moments(layer)
        raw = whole.moments(layer).raw_NN
        assert float((found.raw_NN - raw).abs().max()) <= 1e-7 * float(raw.diagonal().max())
        if grown.manifest.center in ("models", "none"):  # the other centers are numbers that the old basis has fixed
            expected = whole.moments(layer).centered_NN
            assert float((found.centered_NN - expected).abs().max()) <= 1e-7 * float(expected.diagonal().max())
    for name in ("m5", "m6", "m7"):
        projected = grown.project(open_case(tmp_path / "zoo", case, [tmp_path / "zoo" / name]))
        assert grown.coefficients(name).residual == pytest.approx(projected.residual, rel=1e-5)
        for layer in grown.layers:
            # Products of one model and of two at once differ in their last bit.
            found, expected = grown.coefficients(name).values[layer], projected.values[layer]
            assert float((found - expected).norm()) <= FLOAT32 * float(expected.norm())


def test_a_center_that_the_basis_has_fixed_stays_in_the_moments(tmp_path: Path) -> None:
    paths = write(tmp_path / "zoo", "weight")
    for center in ("columns", "global"):
        old = saved(ez.fit(paths[:5], {"models": 3}, center=center), tmp_path / f"old-{center}")
        grown = saved(old.add(paths[5:]), tmp_path / f"grown-{center}")
        zoo = ez.open_zoo(paths)
        for layer, basis in grown.layers.items():
            removed = basis.removed()
            rows = torch.stack([(zoo.stack(layer).matrix(place).double() - removed).flatten() for place in range(8)])
            expected = rows @ rows.T
            found = grown.moments(layer).centered_NN
            # The stored center is float32, the moments were taken about the float64 one.
            assert float((found - expected).abs().max()) <= 1e-6 * float(expected.diagonal().max())


def test_what_growth_reports_is_what_lies_in_the_folder(tmp_path: Path) -> None:
    paths = write(tmp_path / "zoo", "weight")
    old = saved(ez.fit(paths[:5], 3), tmp_path / "old")
    for refresh in (False, True):
        grown = saved(old.add(paths[5:], refresh=refresh), tmp_path / f"grown{refresh}")
        zoo = ez.open_zoo(paths)
        report = grown.report
        assert report["num_models"] == 8
        assert report["bytes"]["whole_zoo"] == zoo.num_bytes
        assert report["bytes"]["zoo"] == zoo.layer_bytes
        energy = sum(
            float(zoo.stack(layer).matrix(place).double().square().sum()) for layer in zoo.layers for place in range(8)
        )
        assert report["energy"] == pytest.approx(energy, rel=1e-6)
        assert report["residual"] == pytest.approx(sum(grown.manifest.discarded.values()) / energy, rel=1e-6)
        assert (grown.path / MANIFEST).is_file()


def test_a_budget_keeps_its_ranks_through_a_refresh(tmp_path: Path) -> None:
    paths = write(tmp_path / "zoo", "weight")
    for number, asked in enumerate(
        ({"budget": 14_000}, {"max_error": 0.2}, {"max_error": 0.2, "axes": ("outputs", "inputs")})
    ):
        old = saved(ez.fit(paths[:6], **asked), tmp_path / f"old{number}")
        ranks = {layer: basis.ranks for layer, basis in old.layers.items()}
        assert len({str(rank) for rank in ranks.values()}) > 1, "the budget must spend unevenly to be a test"
        grown = saved(old.add(paths[6:], refresh=True), tmp_path / f"grown{number}")
        assert {layer: basis.ranks for layer, basis in grown.layers.items()} == ranks
        again = saved(
            grown.add([_copy(paths[0], tmp_path / f"late{number}")], refresh=True), tmp_path / f"again{number}"
        )
        assert {layer: basis.ranks for layer, basis in again.layers.items()} == ranks


def _copy(path: Path, target: Path) -> Path:
    target.mkdir()
    (target / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes())
    return target
