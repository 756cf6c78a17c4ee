"""Growth from the bundle alone: the old models' files are gone, and the test has kept what was in them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from growth_zoos import (
    CASES,
    Case,
    base_of,
    delete,
    energy,
    lost,
    open_case,
    rebuilt,
    relative_gap,
    saved,
    truth,
    write,
)

import eigenzoo as ez
from builders import random_factors, write_adapter
from eigenzoo.subspace.fitting.alone import against_alone
from tolerance import tolerance

FLOAT32 = tolerance(64, dtype=torch.float32)


def grown_alone(root: Path, case: Case, *, refresh: bool) -> tuple[ez.Subspace, ez.Subspace, dict]:
    """Fit five models, delete them, add three in two steps; returns both subspaces and all models' true layers."""
    paths = write(root / "zoo", case.view)
    whole = open_case(root / "zoo", case, paths)
    originals = truth(whole)
    old = saved(ez.fit(whole.select(names=whole.names[:5]), **case.options), root / "old")
    delete(paths[:5])
    grown = old
    for step, places in enumerate(([5], [6, 7])):
        new = open_case(root / "zoo", case, [paths[place] for place in places])
        grown = saved(grown.add(new, refresh=refresh), root / f"grown{step}")
        delete([paths[place] for place in places])
    return old, grown, originals


@pytest.mark.parametrize("refresh", [False, True], ids=["kept", "refreshed"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_true_loss_is_never_above_the_stated_one(tmp_path: Path, case: Case, refresh: bool) -> None:
    old, grown, originals = grown_alone(tmp_path, case, refresh=refresh)
    growth = grown.report["growth"]
    # A stacked basis holds the fitted models' own factors, and a refresh makes fitted ones of all.
    is_whole = refresh and case.view == "update" and case.options["rank"] == {"models": 3}
    assert growth["exact"] is is_whole
    assert growth["refreshed"] is refresh
    assert "old files are not found" in growth["statement"] or "upper bound" in growth["statement"]
    assert growth["added"] == ["m6", "m7"]

    found, stated, whole = lost(grown, originals), grown.manifest.discarded, energy(originals)
    for layer in grown.layers:
        # Coefficients and bases are float32: their round-off is no part of what was discarded.
        assert found[layer] <= stated[layer] + FLOAT32 * whole, layer
    assert growth["discarded"] == pytest.approx(sum(stated.values()), rel=1e-9)
    assert sum(found.values()) > 0.01 * whole, "a case in which nothing is lost would prove little"
    # By the triangle inequality squared, once more per refresh, a bound is within a small factor of the truth; the losses of models
    # that an axis `models` was fitted to add up.
    adds_up = not refresh or (
        set(case.options["rank"]) == {"models"} and case.options.get("center", "models") in ("models", "none")
    )
    assert growth["discarded"] <= (1 + 1e-4 if adds_up else 9) * sum(found.values())
    assert grown.report["energy"] == pytest.approx(whole, rel=1e-5)
    assert grown.report["residual"] == pytest.approx(growth["discarded"] / whole, rel=1e-5)
    assert grown.report["residual"] <= 1
    if refresh:
        for layer, record in grown.report["layers"].items():
            assert record["energy"] * record["residual"] == pytest.approx(stated[layer], rel=1e-9)
    assert list(grown.verify()) == []
    for name, layers in rebuilt(grown).items():
        coefficients = grown.coefficients(name)
        for layer, value in layers.items():
            share = float((originals[name][layer] - value).square().sum() / originals[name][layer].square().sum())
            assert share <= coefficients.residuals[layer] + FLOAT32, (name, layer)
    back = ez.open_zoo(
        [grown.rebuild("m0", max_lora_rank="full").save(tmp_path / "back")],
        view=case.view,
        base=base_of(tmp_path / "zoo", case.view),
    )
    assert relative_gap({"back": rebuilt(grown)["m0"]}, truth(back)) <= FLOAT32

    if not refresh:
        before, after = rebuilt(old), rebuilt(grown)
        assert all(torch.equal(before[name][layer], after[name][layer]) for name in before for layer in before[name])
        for file in old.files():
            if file.startswith(("basis", "coefficients/")):
                assert (grown.path / file).read_bytes() == (old.path / file).read_bytes(), file


@pytest.mark.parametrize(
    ("view", "rank", "dtype"),
    [("weight", 3, "nf4"), ("update", 4, "nf4"), ("update", 3, "int8"), ("update", 4, "int8")],
)
def test_rounded_bundles_lose_no_more_than_they_state(tmp_path: Path, view: str, rank: int, dtype: str) -> None:
    """What rounding loses of the models is correlated with their coefficients: both losses do not add up."""
    case = Case(view, {"rank": {"models": rank}, "dtype": dtype})
    paths = write(tmp_path / "zoo", view)
    whole = open_case(tmp_path / "zoo", case, paths)
    originals = truth(whole)
    old = saved(ez.fit(whole.select(names=whole.names[:5]), **case.options), tmp_path / "old")
    new = open_case(tmp_path / "zoo", case, paths[5:])
    delete(paths[:5])
    grown = saved(old.add(new, refresh=True), tmp_path / "grown")
    assert not grown.report["growth"]["exact"]
    found, all_energy = lost(grown, originals), energy(originals)
    for layer in grown.layers:
        assert found[layer] <= grown.manifest.discarded[layer] + FLOAT32 * all_energy, layer


def test_models_without_files_have_no_control_of_models_cut_alone(tmp_path: Path) -> None:
    """The control weighs models' files. Without the old ones, the new ones' bytes are not those of the zoo."""
    modules = {"block.q": (24, 16)}
    paths = [
        write_adapter(tmp_path / "zoo" / f"m{place}", random_factors(modules, 4, seed=place)) for place in range(7)
    ]
    old = saved(ez.fit(paths[:6], 3), tmp_path / "old")
    assert old.report["alone"]
    with_files = old.add(paths[6:], refresh=True)
    assert all(0 < row["bytes"] < with_files.report["bytes"]["whole_zoo"] for row in with_files.report["alone"])
    delete(paths[:6])
    grown = saved(old.add(paths[6:], refresh=True), tmp_path / "grown")
    assert grown.report["alone"] == []
    assert against_alone(grown.report) is None


@pytest.mark.parametrize("view", ["weight", "update", "factors"])
def test_new_models_inside_the_subspace_come_back_exactly(tmp_path: Path, view: str) -> None:
    """A new model that is a rebuilt one lies inside: nothing of it is lost, with and without a refresh."""
    paths = write(tmp_path / "zoo", view)
    old = saved(ez.fit(ez.open_zoo(paths[:5], view=view), {"models": 3}), tmp_path / "old")
    new = old.rebuild("m1", max_lora_rank="full").save(tmp_path / "new")
    delete(paths)
    expected = truth(ez.open_zoo([new], view=view)) if view != "factors" else truth(ez.open_zoo([new], view="factors"))
    for refresh in (False, True):
        grown = saved(old.add(ez.open_zoo([new], view=view), refresh=refresh), tmp_path / f"grown{refresh}")
        assert relative_gap(expected, {"new": rebuilt(grown)["new"]}) <= FLOAT32
        assert grown.coefficients("new").residual <= FLOAT32**2 * 10


def test_inner_products_inside_the_subspace_are_exact(tmp_path: Path) -> None:
    """With everything kept, the bundle knows all there is to know: moments as of a fit, new models' energies always."""
    paths = write(tmp_path / "zoo", "weight")
    zoo = ez.open_zoo(paths)
    whole = ez.fit(zoo, 1.0)
    old = saved(ez.fit(paths[:5], 1.0), tmp_path / "old")
    delete(paths[:5])
    grown = saved(old.add(paths[5:]), tmp_path / "grown")
    for layer in whole.layers:
        expected, found = whole.moments(layer).raw_NN, grown.moments(layer).raw_NN
        size = float(expected.diagonal().max())
        # What two new models share outside the old models' span is the one thing that the bundle cannot know.
        assert float((expected - found)[:5].abs().max()) <= FLOAT32 * size
        assert float((expected - found).diagonal().abs().max()) <= FLOAT32 * size


def test_a_bundle_without_moments_grows_too(tmp_path: Path) -> None:
    paths = write(tmp_path / "zoo", "weight")
    originals = truth(ez.open_zoo(paths))
    ez.fit(paths[:5], 3).save(tmp_path / "old", moments=False)
    delete(paths[:5])
    for refresh in (False, True):
        grown = saved(ez.load(tmp_path / "old").add(paths[5:], refresh=refresh), tmp_path / f"grown{refresh}")
        assert grown.has_moments is refresh
        assert sum(lost(grown, originals).values()) <= sum(grown.manifest.discarded.values()) * (1 + FLOAT32)
        assert grown.report["energy"] == pytest.approx(energy(originals), rel=1e-5)


def test_files_that_come_back_make_the_moments_exact_again(tmp_path: Path) -> None:
    """A border that was taken from the bundle alone is not built upon once the files are there again."""
    paths = write(tmp_path / "zoo", "weight")
    for refresh in (False, True):
        old = saved(ez.fit(paths[:5], 3), tmp_path / f"old{refresh}")
        (tmp_path / "zoo" / "m0").rename(tmp_path / "away")
        middle = saved(old.add([paths[5]], refresh=refresh), tmp_path / f"middle{refresh}")
        assert not middle.report["growth"]["exact"]
        (tmp_path / "away").rename(tmp_path / "zoo" / "m0")
        grown = saved(middle.add(paths[6:]), tmp_path / f"grown{refresh}")
        assert grown.report["growth"]["exact"]
        whole = ez.fit(paths, 3)
        for layer in whole.layers:
            expected, found = whole.moments(layer).centered_NN, grown.moments(layer).centered_NN
            assert float((expected - found).abs().max()) <= 1e-7 * float(expected.diagonal().max())


def test_carried_tensors_and_side_files_survive_the_loss_of_the_files(tmp_path: Path) -> None:
    paths = write(tmp_path / "zoo", "weight")
    for path in paths:
        (path / "config.json").write_text(json.dumps({"model_type": path.name}))
    zoo = ez.open_zoo(paths[:5], exclude=["block.bias"])
    biases = {name: zoo.models[zoo.place(name)].read("block.bias") for name in zoo.names}
    old = saved(ez.fit(zoo, 3), tmp_path / "old")
    delete(paths[:5])
    for refresh in (False, True):
        # An opened zoo that chose its layers by exclusion, as the first one did.
        new = ez.open_zoo(paths[5:], exclude=["block.bias"])
        grown = saved(old.add(new, refresh=refresh), tmp_path / f"grown{refresh}")
        assert set(grown.layers) == {"block.weight", "block.kernel"}
        for name, bias in biases.items():
            folder = grown.rebuild(name).save(tmp_path / f"{name}{refresh}")
            assert torch.equal(ez.open_zoo([folder]).models[0].read("block.bias"), bias)
            assert json.loads((folder / "config.json").read_text()) == {"model_type": name}


@pytest.mark.parametrize("moments", [True, False], ids=["moments", "bare"])
def test_a_stacked_refresh_is_that_of_the_files(tmp_path: Path, moments: bool) -> None:
    """The basis has the fitted models' own factors: no sum of all of them, of a rank of its own, stands for a model."""
    paths = write(tmp_path / "zoo", "update")
    whole = ez.fit(paths, 3)
    ez.fit(paths[:5], 3).save(tmp_path / "old", moments=moments)
    delete(paths[:5])
    grown = saved(ez.load(tmp_path / "old").add(paths[5:], refresh=True), tmp_path / "grown")
    assert grown.report["growth"]["exact"]
    assert "the bundle holds the old models' own factors" in grown.report["growth"]["statement"]
    assert grown.report["residual"] == pytest.approx(whole.report["residual"], rel=1e-6)
    assert grown.report["bytes"]["bundle"] == whole.report["bytes"]["bundle"]
    assert relative_gap(rebuilt(whole), rebuilt(grown)) <= FLOAT32
    for layer in whole.layers:
        assert torch.allclose(grown.moments(layer).raw_NN, whole.moments(layer).raw_NN, rtol=1e-6)
    template = grown.template("m0")
    assert template.layout.updates == whole.template("m0").layout.updates
    # What a refresh on rebuilt models leaves is not taken for the models themselves.
    middle = saved(ez.load(tmp_path / "old").add(paths[5:6]), tmp_path / "middle")
    delete(paths[5:6])
    mixed = saved(middle.add(paths[6:], refresh=True), tmp_path / "mixed")
    again = saved(mixed.add(write(tmp_path / "more", "update", 9)[8:], refresh=True), tmp_path / "again")
    for space in (mixed, again):
        assert not space.report["growth"]["exact"]
        assert "upper bound" in space.report["growth"]["statement"]
    originals = truth(ez.open_zoo(write(tmp_path / "copies", "update", 9)))
    for space in (mixed, again):
        known = {name: originals[name] for name in space.names}
        found, stated = lost(space, known), space.manifest.discarded
        assert all(found[layer] <= stated[layer] * (1 + FLOAT32) for layer in found)
        assert sum(stated.values()) <= 1.5 * sum(found.values())
        assert space.report["energy"] == pytest.approx(energy(known), rel=1e-5)
        assert list(space.verify()) == []
