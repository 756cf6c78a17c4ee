"""The document: the keys that others rely on, lengths, plain finite values; the same from a bundle, again, and on any threads."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evidence_zoos import (
    MODULES,
    NUM_MODELS,
    STACKS,
    assert_alike,
    families,
    find,
    layers,
    measure,
    noise,
    normal,
    planted,
    write_updates,
)
from safetensors.torch import load_file

import eigenzoo as ez
from builders import write_stacks
from eigenzoo.evidence.suitability import Thresholds
from tolerance import tolerance

PAGE = Path(__file__).parents[2] / "docs" / "evidence.md"

CONTRACT = {
    "num_models", "num_layers", "view", "center", "layers", "lineage", "growth", "verdict",
}  # fmt: skip
LAYER_CONTRACT = {
    "shape", "explained_variance_ratio", "effective_rank", "mean_energy", "null", "heldout", "split_half", "axes", "rank",
    "verdict",
}  # fmt: skip
INNER_CONTRACT = {
    "null": {"norm_matched", "permuted", "spectrum_matched"},
    "heldout": {"rank", "in_sample", "captured"},
    "split_half": {"rank", "cosines", "null_cosines"},
    "rank": {"auto", "var90"},
}


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """One per view, and one with families."""
    found = {view: measure(tmp_path_factory.mktemp(view), view, 5).document for view in ("weight", "delta", "update")}
    paths, _ = write_updates(tmp_path_factory.mktemp("updates"), 2, 6)
    found["families"] = find(
        tmp_path_factory.mktemp("families"), layers(lambda seed: families((9, 9), seed=seed))
    ).to_dict()
    found["one pass"] = ez.evidence(paths, axes=("inputs", "outputs")).to_dict()
    return found


KINDS = ["weight", "delta", "update", "families", "one pass"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_key_of_the_contract_is_there(documents: dict[str, Any], kind: str) -> None:
    document = documents[kind]
    assert document.keys() >= CONTRACT
    assert document["lineage"].keys() >= {"groups", "duplicates"}
    assert document["growth"].keys() >= {"num_models", "var90_rank", "captured"}
    assert document["verdict"].keys() >= {"code", "text"}
    assert document["num_layers"] == len(document["layers"])
    for layer in document["layers"].values():
        assert layer.keys() >= LAYER_CONTRACT
        for key, names in INNER_CONTRACT.items():
            assert layer[key].keys() >= names
    if kind == "one pass":
        assert {tuple(layer["axes"]) for layer in document["layers"].values()} == {("outputs", "inputs")}
        assert all(
            side.keys() >= {"explained_variance_ratio", "null"}
            for layer in document["layers"].values()
            for side in layer["axes"].values()
        )


@pytest.mark.parametrize("kind", KINDS)
def test_lengths_are_those_of_the_zoo(documents: dict[str, Any], kind: str) -> None:
    document = documents[kind]
    num_models = document["num_models"]
    assert len(document["names"]) == len(document["lineage"]["cosines"]) == len(document["map"]) == num_models
    assert {len(row) for row in document["lineage"]["cosines"]} == {num_models}
    for layer in document["layers"].values():
        spectra = {key: value for key, value in layer["null"].items() if value is not None}
        assert spectra.keys() >= {"norm_matched", "low", "high", "iid", "permuted"}
        assert (layer["null"]["spectrum_matched"] is None) == (document["view"] != "update")
        for spectrum in (layer["explained_variance_ratio"], *spectra.values()):
            assert len(spectrum) == num_models - 1
        for spectrum in (
            layer["explained_variance_ratio"],
            spectra["norm_matched"],
            spectra["permuted"],
            spectra["iid"],
        ):
            assert sum(spectrum) == pytest.approx(1.0, abs=1e-9)
            assert spectrum == sorted(spectrum, reverse=True)
        for axis, side in layer["axes"].items():
            assert len(side["explained_variance_ratio"]) == len(side["null"]) == layer["shape"][axis == "inputs"]
        halves = layer["split_half"]
        assert {len(halves[key]) for key in ("cosines", "low", "high", "null_cosines", "null_high")} == {halves["rank"]}
        assert layer["num_values"] == layer["shape"][0] * layer["shape"][1]
    grown = document["growth"]
    assert {len(grown[key]) for key in ("num_models", "var90_rank", "in_sample", "captured", "null", "spread")} == {
        len(grown["num_models"])
    }


def leaves(value: Any) -> Iterator[Any]:
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    if children is None:
        yield value
        return
    for child in children:
        yield from leaves(child)


@pytest.mark.parametrize("kind", KINDS)
def test_all_values_are_plain_and_finite(documents: dict[str, Any], kind: str) -> None:
    """Types to the letter: a number of numpy's would print as one, and fail where it is compared or pickled."""
    document = documents[kind]
    assert {type(value) for value in leaves(document)} <= {float, int, str, bool, type(None)}
    assert json.loads(json.dumps(document, allow_nan=False)) == document


def test_every_key_stands_in_the_docs_and_the_docs_name_no_other(documents: dict[str, Any]) -> None:
    page = PAGE.read_text(encoding="utf-8").split("## JSON")[1]
    named = set(re.findall(r"`\.?([a-z_0-9]+)", page)) | set(re.findall(r"\.([a-z_0-9]+)", page))
    shown: set[str] = set()
    for kind in KINDS:
        document = documents[kind]
        layer = next(iter(document["layers"].values()))
        parts = [
            document,
            layer,
            *(value for value in layer.values() if isinstance(value, dict) and value is not layer["axes"]),
        ]
        parts += [layer["heldout"]["leave_one_out"], document["summary"], document["growth"], document["lineage"]]
        parts += [document["summary"]["test"] or {}, document["summary"]["test_across"] or {}]
        parts += [document["verdict"], document["suitability"], document["controls"][0], *layer["axes"].values()]
        shown |= {key for part in parts for key in part}
    assert shown - named == set(), "keys that docs/evidence.md does not name"


def test_the_pages_numpy_reproduces_the_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    write_stacks(tmp_path / "zoo", {"w": planted(14, 3, 0.3) + 1, "v": noise(14, (9, 7))})
    monkeypatch.chdir(tmp_path)
    exec(compile(code, PAGE.name, "exec"), {})


@pytest.mark.parametrize("form", ["flat", "stacked"])
def test_a_bundle_says_what_its_zoo_says_and_needs_no_weights(tmp_path: Path, form: str) -> None:
    if form == "flat":
        paths = write_stacks(
            tmp_path / "zoo", {**{name: make(2) for name, make in STACKS.items()}, "still": torch.ones(NUM_MODELS, 9)}
        )
    else:
        paths, _ = write_updates(tmp_path, 4, 9)
    expected = ez.evidence(paths, seed=3).to_dict()
    bundle = ez.fit(paths, 2).save(tmp_path / "bundle")
    shutil.rmtree(tmp_path / "zoo")
    for source in (bundle, str(bundle), ez.load(bundle)):
        found = ez.evidence(source, seed=3).to_dict()
        found["seconds"] = expected["seconds"]
        # The moments are float64 in the file, to the bit; a zoo's are summed anew.
        assert_alike(found, expected, 1e-12)


@pytest.mark.parametrize(
    "asked",
    [
        {"axes": ["outputs"]},
        {"center": "none"},
        {"view": "weight"},
        {"include": ["w"]},
        {"exclude": ["w"]},
        {"base": "b"},
    ],
    ids=str,
)
def test_a_bundle_refuses_what_its_moments_cannot_tell(tmp_path: Path, asked: dict[str, Any]) -> None:
    bundle = ez.fit(write_stacks(tmp_path / "zoo", {"w": noise(5, (6, 4))}), 2).save(tmp_path / "bundle")
    for source in (bundle, ez.load(bundle)):
        with pytest.raises(
            ez.UsageError,
            match=r"axes, center, view, base, include and exclude do not apply to a bundle.*Name the zoo instead",
        ):
            ez.evidence(source, **asked)


def test_a_bundle_without_moments_and_options_of_an_open_zoo_are_refused(tmp_path: Path) -> None:
    paths = write_stacks(tmp_path / "zoo", {"w": noise(5, (6, 4))})
    bundle = ez.fit(paths, 2).save(tmp_path / "bundle", moments=False)
    with pytest.raises(ez.BundleError, match="the bundle has no moments"):
        ez.evidence(bundle)
    with pytest.raises(ez.UsageError, match=r"do not apply to an opened zoo\. Pass them to open_zoo"):
        ez.evidence(ez.open_zoo(paths), include=["w"])
    with pytest.raises(ez.UsageError, match="axis 'rows' is unknown"):
        ez.evidence(paths, axes=["rows"])
    with pytest.raises(ez.UsageError, match="center 'median' is unknown"):
        ez.evidence(paths, center="median")
    with pytest.raises(
        ez.UsageError, match=r"thresholds \(2, 6\) are not Thresholds\. Pass eigenzoo.*Thresholds\(low=2"
    ):
        ez.evidence(paths, thresholds=(2, 6))  # type: ignore[arg-type]


CENTERS = ("models", "columns", "none", "global")


@pytest.mark.parametrize("center", CENTERS)
def test_spectra_about_every_center_are_those_of_the_weights(tmp_path: Path, center: str) -> None:
    stack = noise(9, (7, 5), 1) + normal(1, 7, 5, seed=2) + 3
    found = find(tmp_path, {"w": stack}, axes=("inputs", "outputs", "models"), center=center)
    removed = {
        "models": stack.mean(0), "columns": stack.mean((0, 1)), "none": torch.zeros(1), "global": stack.mean(),
    }[center]  # fmt: skip
    away = (stack - removed).numpy()
    for axis, mode in (("models", 0), ("outputs", 1), ("inputs", 2)):
        values = np.linalg.svd(np.moveaxis(away, mode, 0).reshape(away.shape[mode], -1), compute_uv=False) ** 2
        ratio = values / values.sum()
        layer = found.layers["w"]
        if axis == "models":
            assert layer.chance.explained_variance_ratio == pytest.approx(
                ratio[: 8 if center == "models" else 9], abs=tolerance(315)
            )
            assert layer.chance.var90 == int((np.cumsum(ratio) < 0.9).sum()) + 1
            assert (layer.chance.permuted is None) == (center != "models")
        else:
            side = found.axes["w"][axis]
            assert side.explained_variance_ratio == pytest.approx(ratio, abs=tolerance(315))
            assert side.center == center
            assert sum(side.null) == pytest.approx(1.0, abs=1e-9)
    # Whatever the spectrum is about: held-out models are seen from the models' mean, and so is the verdict.
    plain = find(tmp_path / "again", {"w": stack}).layers["w"]
    assert found.layers["w"].variance == pytest.approx(plain.variance, rel=tolerance(stack[0].numel()))
    assert_alike(list(found.layers["w"].unseen.captured), list(plain.unseen.captured), 1e-9)


@pytest.mark.parametrize("center", ["models", "none"])
def test_the_null_of_sides_is_that_of_noise_about_the_same_center(tmp_path: Path, center: str) -> None:
    """Of three models the mean takes a third; and a side longer than all columns has zeros."""
    found = find(tmp_path, {"w": noise(3, (20, 4), 1)}, axes=("outputs", "inputs"), center=center).axes["w"]
    for axis, mode in (("outputs", 1), ("inputs", 2)):
        drawn = []
        for seed in range(60):
            stack = noise(3, (20, 4), seed + 10)
            away = (stack - stack.mean(0) * (center == "models")).movedim(mode, 0).flatten(1)
            values = torch.linalg.svdvals(away).square()
            drawn.append(torch.nn.functional.pad(values, (0, stack.shape[mode] - values.numel())) / values.sum())
        expected = torch.stack(drawn)
        side = found[axis]
        assert len(side.explained_variance_ratio) == len(side.null) == (20 if axis == "outputs" else 4)
        # Twenty draws behind the null, sixty here: five standard errors; and the models' energies are not quite even.
        error = 5 * expected.std(0) * (1 / 20 + 1 / 60) ** 0.5 + 0.005
        assert bool(((torch.tensor(side.null, dtype=torch.float64) - expected.mean(0)).abs() <= error).all())
    assert sum(share > 1e-12 for share in found["outputs"].explained_variance_ratio) == (
        8 if center == "models" else 12
    )


def test_sides_of_updates_are_about_zero(tmp_path: Path) -> None:
    paths, rows = write_updates(tmp_path, 1, 7)
    found = ez.evidence(paths, axes=("outputs", "inputs"))
    for module, shape in MODULES.items():
        stack = rows[module].view(-1, *shape).numpy()
        for axis, mode in (("outputs", 1), ("inputs", 2)):
            values = np.linalg.svd(np.moveaxis(stack, mode, 0).reshape(shape[mode - 1], -1), compute_uv=False) ** 2
            side = found.axes[module][axis]
            assert side.explained_variance_ratio == pytest.approx(values / values.sum(), abs=tolerance(99))
            assert side.center == "none"


def test_sums_of_entries_make_the_permuted_null(tmp_path: Path) -> None:
    """A layer whose models differ by a constant: no shuffle takes that away, and the null says so."""
    stack = noise(10, (15, 12), 1) + 2 * normal(10, 1, 1, seed=2)
    layer = find(tmp_path, {"w": stack}).layers["w"]
    assert layer.chance.permuted is not None
    rows_ND, shares = stack.flatten(1), []
    for seed in range(40):
        draw = torch.Generator().manual_seed(seed)
        shuffled = torch.stack([row_D[torch.randperm(180, generator=draw)] for row_D in rows_ND])
        values = torch.linalg.svdvals(shuffled - shuffled.mean(0)).square()
        shares.append(float(values[0] / values.sum()))
    assert layer.chance.permuted[0] == pytest.approx(np.mean(shares), rel=0.03)
    assert layer.chance.permuted[0] > 2 * layer.chance.norm_matched[0]


def test_the_same_seed_gives_the_same_document_and_another_seed_another(tmp_path: Path) -> None:
    paths = write_stacks(tmp_path / "zoo", layers(lambda seed: planted(14, 2, 0.3, (9, 8), seed=seed), 2))
    first, again, other = (ez.evidence(paths, seed=seed).to_dict() for seed in (7, 7, 8))
    assert {**first, "seconds": 0} == {**again, "seconds": 0}
    assert first["layers"]["block.0.weight"]["heldout"] != other["layers"]["block.0.weight"]["heldout"]
    largest = ez.evidence(paths, seed=2**63 - 1).to_dict()
    assert largest["verdict"]["code"] == first["verdict"]["code"]


def test_threads_do_not_change_what_is_said(tmp_path: Path) -> None:
    paths = write_stacks(tmp_path / "zoo", layers(lambda seed: families((9, 8), seed=seed), 6))
    documents = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            documents.append({**ez.evidence(paths).to_dict(), "seconds": 0})
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(1)
    assert list(documents[0]["layers"]) == [f"block.{place}.weight" for place in range(6)]
    assert_alike(*documents, 1e-9)


def test_progress_counts_the_layers(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    ez.evidence(
        write_stacks(tmp_path / "zoo", layers(lambda seed: noise(6, (5, 4), seed))),
        progress=lambda *step: seen.append(step),
    )
    assert [step for step in seen if step[0] == "weighing layers"] == [
        ("weighing layers", done, 3) for done in (1, 2, 3)
    ]
    assert [step for step in seen if step[0] == "collecting moments"] == [
        ("collecting moments", done, 3) for done in (1, 2, 3)
    ]


def test_thresholds_decide_which_layers_are_retained(tmp_path: Path) -> None:
    paths = write_stacks(tmp_path / "zoo", layers(lambda seed: noise(40, (9, 8), seed)))
    strict, loose = (
        ez.evidence(paths, thresholds=thresholds).to_dict()["suitability"]
        for thresholds in (Thresholds(low=1e3, high=1e4), Thresholds(low=0, high=1e9, spread=1e9, share=0, q=0))
    )
    assert (strict["retained"], strict["share"]) == ([], 0.0)
    assert (loose["retained"], loose["share"]) == ([f"block.{place}.weight" for place in range(3)], 1.0)
    assert strict["thresholds"] == {"low": 1e3, "high": 1e4, "spread": 1.0, "share": 0.5, "q": 0.2}


def test_a_grown_bundle_says_what_a_zoo_of_all_models_says(tmp_path: Path) -> None:
    paths, _ = write_updates(tmp_path, 6, 9)
    expected = ez.evidence(paths).to_dict()
    grown = ez.fit(paths[:6], 2).add(paths[6:])
    assert_alike({**ez.evidence(grown).to_dict(), "seconds": 0}, {**expected, "seconds": 0}, 1e-9)
    starts = load_file(paths[0] / "adapter_model.safetensors")
    assert any("lora_A" in name for name in starts)
