"""Copies in large zoos, whose float32 products alone cannot tell a copy from a near one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from scale_zoos import planted, read_in_float32

import eigenzoo as ez
from builders import Factors, random_factors, regauge, write_adapter, write_stacks
from eigenzoo.subspace.moments import duplicates
from eigenzoo.zoo.stack import DenseStack, UpdateStack
from tolerance import tolerance

MODULES = {"block.0.q": (60, 50), "block.1.q": (50, 40)}


@pytest.fixture(autouse=True)
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    read_in_float32(monkeypatch)


def moved(factors: dict[str, Factors], share: float, seed: int) -> dict[str, Factors]:
    """Updates that differ by a share of their norm."""
    others = random_factors({module: MODULES[module] for module in factors}, 4, seed)
    found = {}
    for module, (b_OR, a_RI) in factors.items():
        b_other, a_other = others[module]
        scale = share * float((b_OR.double() @ a_RI.double()).norm() / (b_other.double() @ a_other.double()).norm())
        found[module] = torch.cat([b_OR, scale * b_other], 1), torch.cat([a_RI, a_other])
    return found


def write(root: Path, models: Sequence[dict[str, Factors]]) -> list[Path]:
    return [
        write_adapter(root / f"m{n}", factors, r=rank, lora_alpha=rank)
        for n, factors in enumerate(models)
        for rank in [next(iter(factors.values()))[1].shape[0]]
    ]


def test_other_factors_of_one_update_are_found_and_near_ones_are_not(tmp_path: Path) -> None:
    first, second = (random_factors(MODULES, 4, seed) for seed in (1, 2))
    zoo = ez.open_zoo(
        write(
            tmp_path,
            [
                first,
                second,
                regauge(first, 3),
                moved(first, 1e-3, 4),
                moved(first, 1e-4, 5),
                regauge(second, 6),
                regauge(first, 7, scale=1e3),
                random_factors(MODULES, 4, 8),
            ],
        )
    )
    assert zoo.stack("block.0.q").dtype == torch.float32
    wanted = [["m0", "m2"], ["m0", "m6"], ["m1", "m5"], ["m2", "m6"]]
    assert ez.fit(zoo, 2).report["duplicates"] == wanted
    # Evidence names each copy once, with the first of its kind.
    assert [list(pair) for pair in ez.evidence(zoo).lineage.duplicates] == wanted[:3]


def test_full_weights_that_differ_by_little_are_no_copies(tmp_path: Path) -> None:
    stack = planted(5, (60, 50))
    stack[3] = stack[1]
    stack[4] = stack[1] * (1 + 1e-4)
    paths = write_stacks(tmp_path, {"w": stack})
    assert ez.fit(paths, 2).report["duplicates"] == [["m1", "m3"]]


def test_copies_are_told_over_all_layers(tmp_path: Path) -> None:
    """Equal in one layer and not in the other: no copies, however large the equal one."""
    large, small = planted(4, (80, 70)), 1e-3 * planted(4, (12, 10), 1)
    large[2] = large[0]
    paths = write_stacks(tmp_path, {"large": large, "small": small})
    assert ez.fit(paths, 2).report["duplicates"] == []
    small[2] = small[0]
    assert ez.fit(write_stacks(tmp_path / "same", {"large": large, "small": small}), 2).report["duplicates"] == [
        ["m0", "m2"]
    ]


def test_only_models_that_products_cannot_tell_apart_are_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = random_factors(MODULES, 4, 1)
    others = [random_factors(MODULES, 4, seed) for seed in range(10, 16)]
    zoo = ez.open_zoo(write(tmp_path, [first, *others, regauge(first, 3)]))
    asked = []
    monkeypatch.setattr(duplicates, "_agree", lambda zoo, first, other, energy: asked.append((first, other)) or True)
    assert ez.fit(zoo, 2).report["duplicates"] == [["m0", "m7"]]
    assert asked == [(0, 7)]


def test_a_group_of_copies_is_read_once_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = random_factors(MODULES, 4, 1)
    zoo = ez.open_zoo(write(tmp_path, [regauge(first, seed) for seed in range(6)]))
    agree, asked = duplicates._agree, []
    monkeypatch.setattr(
        duplicates,
        "_agree",
        lambda zoo, first, other, energy: asked.append((first, other)) or agree(zoo, first, other, energy),
    )
    assert len(ez.fit(zoo, 2).report["duplicates"]) == 15
    assert asked == [(0, other) for other in range(1, 6)]


def test_of_a_bundle_alone_the_nearest_count_as_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No weights are at hand: to the precision of its products near models are the same, and farther ones are not."""
    first = random_factors(MODULES, 4, 1)
    models = [first, regauge(first, 3), moved(first, 1e-4, 4), moved(first, 1e-2, 5), random_factors(MODULES, 4, 6)]
    zoo = ez.open_zoo(write(tmp_path / "zoo", models))
    ez.fit(zoo, 2).save(tmp_path / "bundle")
    assert ez.load(tmp_path / "bundle").report["duplicates"] == [["m0", "m1"]]

    def untouched(*args: object) -> None:
        raise AssertionError("a bundle's evidence reads no weights")

    for stack in (DenseStack, UpdateStack):
        monkeypatch.setattr(stack, "__init__", untouched)
    assert ez.evidence(tmp_path / "bundle").lineage.duplicates == (("m0", "m1"), ("m0", "m2"))


def test_fine_tunes_that_hardly_differ_from_their_parent_are_no_duplicates(tmp_path: Path, monkeypatch: Any) -> None:
    """Float32 products are about the mean: their round-off is a share of what models differ by, and not of the parent's energy."""
    monkeypatch.setattr("eigenzoo.zoo.stack.EXACT_VALUES", 0)
    draw = torch.Generator().manual_seed(0)
    parent = torch.randn(64, 64, generator=draw)
    stack = parent + 4e-4 * torch.randn(8, 64, 64, generator=draw)
    paths = write_stacks(tmp_path / "zoo", {"w": stack})
    space = ez.fit(paths[:6], 2)
    assert space.report["duplicates"] == []
    grown = space.add(paths[6:])
    assert grown.report["duplicates"] == []
    assert not ez.evidence(ez.load(grown.save(tmp_path / "bundle"))).lineage.duplicates


def test_a_border_is_as_exact_as_what_it_is_put_around(tmp_path: Path, monkeypatch: Any) -> None:
    draw = torch.Generator().manual_seed(1)
    falling = 10.0 ** -torch.arange(9.0)[:, None]
    rows = torch.linalg.qr(torch.randn(9, 9, generator=draw))[0] @ (falling * torch.randn(9, 600, generator=draw))
    paths = write_stacks(tmp_path / "zoo", {"w": rows.view(9, 20, 30)}, torch.float64)
    space = ez.fit(paths[:7], 1.0)
    monkeypatch.setattr("eigenzoo.zoo.stack.EXACT_VALUES", 0)
    for at_once, grown in ((ez.fit(paths, 1.0), space.add(paths[7:], refresh=True)),):
        assert grown.report["layers"]["w"]["rank"] == at_once.report["layers"]["w"]["rank"]
        one, two = (found.moments("w").centered_NN for found in (at_once, grown))
        assert float((one - two).abs().max()) <= tolerance(600) * float(one.diagonal().max())
