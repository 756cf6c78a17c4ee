"""Bundles that someone made to harm: they are refused by an EigenzooError, before memory is taken or a file is written."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bundle_files import (
    edit_manifest,
    edit_tensors,
    read_manifest,
    replace_file,
    touch_everything,
    write_bundle,
    write_manifest,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import eigenzoo as ez

Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {form: write_bundle(tmp_path_factory.mktemp(form), form) for form in ("flat", "tucker", "stacked")}


@pytest.fixture
def flat(sound: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound["flat"], tmp_path / "flat"))


def test_a_newer_version_is_refused_by_name(flat: Path) -> None:
    edit_manifest(flat, lambda document: document.update(schema_version=3, something_new={}))
    with pytest.raises(ez.BundleError, match=r"schema version 3\..*Upgrade eigenzoo"):
        ez.load(flat)


CHANGES: dict[str, tuple[Change, str]] = {
    "extra key": (lambda d: d.update(more=1), "more: Extra inputs are not permitted"),
    "extra key within": (lambda d: d["layers"][0].update(more=1), r"layers\.0\.more: Extra inputs"),
    "no version": (lambda d: d.pop("schema_version"), "schema_version: Field required"),
    "version 0": (lambda d: d.update(schema_version=0), "schema_version: Input should be 1 or 2"),
    "file above": (lambda d: d["files"].update({"../secret": d["files"]["basis.safetensors"]}), r"holds '\.\.'"),
    "absolute file": (lambda d: d["files"].update({"/etc/passwd": d["files"]["basis.safetensors"]}), "is absolute"),
    "drive": (lambda d: d["files"].update({"C:/x": d["files"]["basis.safetensors"]}), "is absolute"),
    "backslash": (lambda d: d["files"].update({"rest\\x": d["files"]["basis.safetensors"]}), "holds a backslash"),
    "control": (lambda d: d["files"].update({"rest/\x1b[2J": d["files"]["basis.safetensors"]}), "control characters"),
    "coefficients above": (lambda d: d["models"][0].update(coefficients="../../m0.safetensors"), r"holds '\.\.'"),
    "coefficients unlisted": (
        lambda d: d["models"][0].update(coefficients="m0.safetensors"),
        "is not listed in the manifest",
    ),
    "content above": (lambda d: d["models"][0].update(layout="../../../etc/passwd"), r"layout: String should match"),
    "content of a side file": (
        lambda d: d["models"][0].update(side_files={"config.json": "../x"}),
        "String should match",
    ),
    "config above": (lambda d: d["models"][0].update(config="../x"), "String should match"),
    "model twice": (lambda d: d["models"].append(d["models"][0]), "a model is listed twice"),
    "no layer": (lambda d: d.update(layers=[], discarded={}), r"layers: List should have at least 1 item"),
    "layer twice": (lambda d: d["layers"].append(d["layers"][0]), "a layer is listed twice"),
    "shape of 10¹⁸": (lambda d: d["layers"][0].update(shape=[10**9, 10**9], tensor_shape=[10**18]), "at most"),
    "shape of nothing": (lambda d: d["layers"][0].update(shape=[0, 5], tensor_shape=[0]), "both positive"),
    "negative shape": (lambda d: d["layers"][0].update(shape=[-5, -1]), "greater than or equal to 0"),
    "shapes apart": (lambda d: d["layers"][0].update(tensor_shape=[4]), "different numbers of values"),
    "rank beyond the outputs": (
        lambda d: d["layers"][0].update(form="tucker", ranks={"outputs": 10**12}),
        "rank 1000000000000 of 5 outputs",
    ),
    "rank beyond the layer": (lambda d: d["layers"][0].update(ranks={"models": 10**12}), "1000000000000 directions"),
    "rank of an unknown axis": (lambda d: d["layers"][0].update(ranks={"heads": 1}), "ranks"),
    "negative rank": (lambda d: d["layers"][0].update(ranks={"models": -1}), "greater than or equal to 0"),
    "stacked full weights": (lambda d: d["layers"][0].update(form="stacked"), "form stacked is for updates"),
    "flat updates": (lambda d: d["layers"][0].update(kind="update"), "form flat is for full weights"),
    "checksum": (lambda d: d["files"]["basis.safetensors"].update(sha256="x"), "String should match"),
    "discarded nan": (lambda d: d["discarded"].update({"block.weight": float("nan")}), "finite number"),
    "discarded negative": (lambda d: d["discarded"].update({"block.weight": -1.0}), "greater than or equal to 0"),
    "discarded of no layer": (lambda d: d["discarded"].pop("block.weight"), "discarded does not name the layers"),
    "report without bytes": (lambda d: d["report"].pop("bytes"), "bytes"),
    "layers without variance": (
        lambda d: [layer.pop("variance") for layer in d["report"]["layers"].values()],
        r"variance: Field required",
    ),
    "provenance of text": (lambda d: d["report"].update(provenance="mit"), r"report\.provenance: Input should be"),
    "no provenance but null": (lambda d: d["report"].update(provenance=None), r"report\.provenance: Input should be"),
    "licences of a list": (lambda d: d["report"]["provenance"].update(licences=[]), r"provenance\.licences: Input"),
    "bases of a number": (lambda d: d["report"]["provenance"].update(bases=1), r"provenance\.bases: Input"),
    "imported of text": (lambda d: d["report"].update(imported="vlora"), r"report\.imported: Input should be"),
    "imported by nothing": (lambda d: d["report"].update(imported={}), r"report\.imported\.tool: Field required"),
    "options without axes": (lambda d: d["options"].pop("axes"), "axes"),
    "options of text": (lambda d: d["options"]["rules"].update(models="many"), "rules"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_manifests_that_break_a_rule_are_refused(flat: Path, name: str) -> None:
    change, message = CHANGES[name]
    edit_manifest(flat, change)
    with pytest.raises(ez.BundleError, match=message):
        ez.load(flat)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"schema_version": 1, "schema_version": 1}', "the key 'schema_version' occurs twice"),
        ("[]", "A JSON object is expected"),
        ("", "not valid JSON"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "nested too deeply"),
        ('{"schema_version": ' + "9" * 5000 + "}", "not valid JSON"),
        ("\udcff", "not valid JSON"),
    ],
    ids=["duplicate key", "list", "empty", "deep", "long number", "not UTF-8"],
)
def test_what_is_no_json_object_is_refused(flat: Path, text: str, message: str) -> None:
    (flat / "manifest.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ez.EigenzooError, match=message):
        ez.load(flat)


@pytest.mark.parametrize("name", ["manifest.json", "basis.safetensors", "coefficients/m0.safetensors", "rest"])
def test_links_out_of_the_folder_are_refused(flat: Path, name: str) -> None:
    away = flat.parent / "away"
    (flat / name).rename(away)
    (flat / name).symlink_to(away)
    with pytest.raises(ez.UnsafePathError, match="leads out of the folder"):
        ez.load(flat)


def test_a_pipe_in_the_place_of_a_file_does_not_hang(flat: Path) -> None:
    for name in ("coefficients/m0.safetensors", "basis.safetensors", "manifest.json"):
        (flat / name).unlink()
        os.mkfifo(flat / name)
        with pytest.raises(ez.EigenzooError, match=r"missing|not a regular file|there is no manifest"):
            ez.load(flat)


def test_a_device_in_the_place_of_an_old_model_does_not_hang(flat: Path) -> None:
    """Growth looks at the sources that a manifest names: a stranger's may name anything."""
    source = {"path": "/dev", "files": {"zero": {"bytes": 0, "mtime_ns": 1, "sha256": "0" * 64}}}
    edit_manifest(flat, lambda document: document["models"][0].update(source=source))
    new = shutil.copytree(flat.parent / "zoo" / "m0", flat.parent / "new") if (flat.parent / "zoo").exists() else None
    space = ez.load(flat)
    model = new or space.rebuild("m1").save(flat.parent / "new")
    # No safetensors by its name, so without permission it counts as gone and is never opened.
    assert space.add([model]).report["growth"]["exact"] is False
    with pytest.raises(ez.EigenzooError, match="zero"):
        space.add([model], allow_pickle=True)


def test_absurd_sizes_take_no_memory(flat: Path) -> None:
    """Layers without a basis of their own claim any size; the limit is the format's."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def huge(document: dict[str, Any]) -> None:
        layer = {"shape": [10**9, 10**9], "tensor_shape": [10**9, 10**9], "ranks": {"models": 0}, "has_mean": False}
        document["layers"][0].update(layer)

    edit_manifest(flat, huge)
    with pytest.raises(ez.BundleError, match="a layer has at most 1099511627776 values"):
        touch_everything(flat, flat.parent)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024


def replace_layout(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the layout that all models share, under a name that fits its content."""
    import hashlib

    old = read_manifest(bundle)["models"][0]["layout"]
    document = json.loads((bundle / f"rest/{old}.json").read_text())
    change(document)
    data = json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
    name = hashlib.sha256(data).hexdigest()[:32]
    replace_file(bundle, f"rest/{name}.json", data)
    edit_manifest(bundle, lambda manifest: [model.update(layout=name) for model in manifest["models"]])


@pytest.mark.parametrize(
    "file", ["../evil.safetensors", "/evil.safetensors", "a/../../evil.safetensors", "x\\evil.safetensors"]
)
def test_a_layout_that_names_files_elsewhere_writes_nothing(flat: Path, file: str) -> None:
    replace_layout(flat, lambda layout: layout.update(files={file: next(iter(layout["files"].values()))}))
    before = sorted(flat.parent.rglob("*"))
    with pytest.raises(ez.UnsafePathError, match=r"holds|is absolute"):
        ez.load(flat).rebuild("m0").save(flat.parent / "out")
    assert sorted(flat.parent.rglob("*")) == before


LAYOUTS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a script": (lambda d: d.update(files={"run.sh": next(iter(d["files"].values()))}), "safetensors file"),
    "an index": (lambda d: d.update(index="../index.json"), "the index has an unknown name"),
    "huge": (
        lambda d: d["files"]["model.safetensors"].__setitem__(0, ["block.bias", "F32", [10**9, 10**9, 10]]),
        "shape",
    ),
    "grown": (lambda d: d["files"]["model.safetensors"][0].__setitem__(2, [10**9]), "shape"),
    "twice": (lambda d: d["files"]["model.safetensors"].append(d["files"]["model.safetensors"][0]), "twice"),
    "unknown": (lambda d: d["files"]["model.safetensors"].append(["ghost", "F32", [2]]), "neither a layer nor carried"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_hostile_layouts_are_refused(flat: Path, name: str) -> None:
    change, message = LAYOUTS[name]
    replace_layout(flat, change)
    with pytest.raises(ez.EigenzooError, match=message):
        ez.load(flat).rebuild("m0").save(flat.parent / "out")
    assert not (flat.parent / "out").exists()
    assert not [path for path in flat.parent.iterdir() if path.name.startswith(".out")]


@pytest.mark.parametrize(
    "name", ["modeling_evil.py", "../config.json", ".bashrc", "adapter_config.json", "model.safetensors"]
)
def test_side_files_outside_the_known_names_are_not_written(flat: Path, name: str) -> None:
    edit_manifest(
        flat, lambda d: d["models"][0].update(side_files={name: next(iter(d["models"][0]["side_files"].values()))})
    )
    before = sorted(flat.parent.rglob("*"))
    with pytest.raises(ez.FormatError, match="is not a known side file"):
        ez.load(flat).rebuild("m0").save(flat.parent / "out")
    assert sorted(flat.parent.rglob("*")) == before


# What a fuzzer tries in the place of any value: every JSON type, edges of numbers, hostile text.
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, 1, -1, 2, 7, 10**9, 2**63, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf")]),
    st.sampled_from(["", "..", "../x", "/etc/passwd", "\0", "\ud800", "m0", "models", "x" * 2000, "0" * 32, "0" * 64]),
    st.just([]),
    st.just({}),
    st.lists(st.integers(-1, 3), max_size=3),
    st.dictionaries(st.sampled_from(["models", "outputs", "inputs", "x"]), st.integers(0, 8), max_size=3),
)


def mutate(document: Any, data: st.DataObject) -> Any:
    """Walk to a random place and change, remove, double or add something there."""
    node, path = document, []
    while isinstance(node, dict | list) and node and (not path or data.draw(st.integers(0, 4))):
        keys = sorted(node) if isinstance(node, dict) else range(len(node))
        path.append((node, data.draw(st.sampled_from(list(keys)))))
        node = node[path[-1][1]]
    parent, key = path[-1]
    kind = data.draw(st.sampled_from(["replace", "replace", "replace", "remove", "add", "swap"]))
    if kind == "remove":
        del parent[key]
    elif kind == "add":
        value = data.draw(VALUES)
        parent.append(value) if isinstance(parent, list) else parent.__setitem__(data.draw(st.text(max_size=5)), value)
    elif kind == "swap" and isinstance(parent, dict):
        other = data.draw(st.sampled_from(sorted(parent)))
        parent[key], parent[other] = parent[other], parent[key]
    else:
        parent[key] = data.draw(VALUES)
    return document


@pytest.mark.parametrize("form", ["flat", "tucker", "stacked"])
@settings(max_examples=60)
@given(data=st.data())
def test_mutated_manifests_raise_nothing_but_our_own_errors(
    sound: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, form: str, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("mutated")
    bundle = Path(shutil.copytree(sound[form], folder / "bundle"))
    document = copy.deepcopy(read_manifest(bundle))
    for _ in range(data.draw(st.integers(1, 2))):
        document = mutate(document, data)
    write_manifest(bundle, document)
    try:
        # Most changes are refused, some do no harm; whatever else is raised is what this test looks for.
        with contextlib.suppress(ez.EigenzooError):
            touch_everything(bundle, folder)
    finally:
        assert {path.name.split("model")[0] for path in folder.iterdir()} <= {"bundle", "again", ""}
        shutil.rmtree(folder)


@pytest.mark.parametrize("form", ["flat", "tucker", "stacked"])
@settings(max_examples=25)
@given(data=st.data())
def test_mutated_layouts_raise_nothing_but_our_own_errors(
    sound: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, form: str, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("mutated")
    bundle = Path(shutil.copytree(sound[form], folder / "bundle"))
    replace_layout(bundle, lambda layout: mutate(layout, data))
    try:
        # Most changes are refused, some do no harm; whatever else is raised is what this test looks for.
        with contextlib.suppress(ez.EigenzooError):
            touch_everything(bundle, folder)
    finally:
        shutil.rmtree(folder)


def test_a_stacked_basis_whose_parts_do_not_fit_is_refused(sound: dict[str, Path], tmp_path: Path) -> None:
    parts: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "ranks": lambda ranks: ranks + 1,
        "factors_b": lambda factors: factors.reshape(-1),
        "scales": lambda scales: scales[:1],
        "weights": lambda weights: weights.long(),
        "products": lambda products: products.bool(),
        "factors_a": lambda factors: factors.to(torch.int8),
    }
    parts |= {"ranks of fractions": lambda ranks: ranks.float()}
    for case, change in parts.items():
        part = case.split()[0]
        bundle = Path(shutil.copytree(sound["stacked"], tmp_path / case))
        edit_tensors(
            bundle, "basis.safetensors", lambda t, p=part, c=change: t.update({f"block.q/{p}": c(t[f"block.q/{p}"])})
        )
        with pytest.raises(ez.EigenzooError, match=r"block\.q/"):
            touch_everything(bundle, tmp_path / f"{case}-out")
