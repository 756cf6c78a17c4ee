"""Bundles whose bases are quantised, damaged as an attacker would: refused when opened, or named by `verify` and when read."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bundle_files import FORMS, edit_manifest, edit_tensors, fit_form, write_zoo
from torch import Tensor

import eigenzoo as ez

CODINGS = ("int8", "nf4")
PART = {"flat": "block.weight/models", "tucker": "block.weight/outputs", "stacked": "block.q/factors_b"}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    root = tmp_path_factory.mktemp("sound")
    zoos = {form: write_zoo(root / form, form) for form in FORMS}
    return {
        (form, coding): fit_form(zoos[form], form, dtype=coding).save(root / f"{form}-{coding}")
        for form in FORMS
        for coding in CODINGS
    }


Change = Callable[[dict[str, Tensor], str], object]
REFUSED: dict[str, tuple[Change, str]] = {
    "no scales": (lambda t, name: t.pop(f"{name}.scale"), "the basis has no tensor"),
    "more scales": (lambda t, name: t.update({f"{name}.scale": torch.ones(99).bfloat16()}), r"shape \[99\]"),
    "scales in float32": (lambda t, name: t.update({f"{name}.scale": t[f"{name}.scale"].float()}), "Scales are BF16"),
    "codes in float32": (lambda t, name: t.update({name: t[name].float()}), r"Codes of (int8|nf4) are [UI]8"),
    "fewer codes": (lambda t, name: t.update({name: t[name].view(-1)[1:].clone()}), "The manifest says"),
}
FOUND: dict[str, tuple[Change, str]] = {
    "scales that are NaN": (lambda t, name: t[f"{name}.scale"].fill_(float("nan")), "scales are negative, NaN or Inf"),
    "scales that are infinite": (
        lambda t, name: t[f"{name}.scale"].fill_(float("inf")),
        "scales are negative, NaN or Inf",
    ),
    "scales below zero": (lambda t, name: t[f"{name}.scale"].neg_(), "scales are negative, NaN or Inf"),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("form", FORMS)
def test_codes_and_scales_that_cannot_be_are_refused(sound, form, coding, what, tmp_path):
    bundle = Path(shutil.copytree(sound[form, coding], tmp_path / "bundle"))
    change, message = REFUSED[what]
    edit_tensors(bundle, "basis.safetensors", lambda tensors: change(tensors, PART[form]))
    with pytest.raises(ez.BundleError, match=message):
        ez.load(bundle)


@pytest.mark.parametrize("what", FOUND)
@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("form", FORMS)
def test_scales_without_a_value_are_found_and_not_used(sound, form, coding, what, tmp_path):
    bundle = Path(shutil.copytree(sound[form, coding], tmp_path / "bundle"))
    change, message = FOUND[what]
    edit_tensors(bundle, "basis.safetensors", lambda tensors: change(tensors, PART[form]))
    space = ez.load(bundle)
    faults = {check.name: check.faults for check in space.verify().checks if check.faults}
    assert any(message in fault for fault in faults["orthonormality"])
    with pytest.raises(ez.BundleError, match=message):
        list(space.rebuild("m0").ranks().layers) if form == "stacked" else space.rebuild("m0").layer("block.weight")


def test_a_code_that_quantising_never_gives_is_found(sound, tmp_path):
    bundle = Path(shutil.copytree(sound["flat", "int8"], tmp_path / "bundle"))
    edit_tensors(bundle, "basis.safetensors", lambda tensors: tensors[PART["flat"]].view(-1)[:1].fill_(-128))
    faults = {check.name: check.faults for check in ez.load(bundle).verify().checks if check.faults}
    assert any("holds the code -128" in fault for fault in faults["orthonormality"])


def test_weights_that_do_not_belong_to_the_quantised_factors_are_found(sound, tmp_path):
    bundle = Path(shutil.copytree(sound["stacked", "nf4"], tmp_path / "bundle"))
    edit_tensors(bundle, "basis.safetensors", lambda tensors: tensors["block.q/weights"].mul_(1.0001))
    faults = {check.name: check.faults for check in ez.load(bundle).verify().checks if check.faults}
    assert any("layer block.q: the basis deviates" in fault for fault in faults["orthonormality"])


@pytest.mark.parametrize("form", ["flat", "tucker"])
def test_directions_that_depend_on_each_other_are_found_and_not_used(sound, form, tmp_path):
    bundle = Path(shutil.copytree(sound[form, "nf4"], tmp_path / "bundle"))
    edit_tensors(bundle, "basis.safetensors", lambda tensors: tensors[PART[form]].fill_(0x77))
    space = ez.load(bundle)
    assert "orthonormality" in [check.name for check in space.verify().checks if check.faults]
    with pytest.raises(ez.BundleError, match=r"layer 'block\.weight': directions depend on each other"):
        space.rebuild("m0").layer("block.weight")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(schema_version=1), "schema version 1 has no low-rank cores, no bases in int8 or nf4"),
        (lambda d: d.update(dtype="int8"), "Codes of int8 are I8"),
        (lambda d: d.update(dtype="float32"), "Bases are floating-point"),
        (lambda d: d["options"].update(coefficients_dtype="float64"), "coefficients_dtype"),
    ],
)
def test_a_manifest_that_says_another_dtype_is_refused(sound, change, message, tmp_path):
    bundle = Path(shutil.copytree(sound["flat", "nf4"], tmp_path / "bundle"))
    edit_manifest(bundle, change)
    with pytest.raises(ez.BundleError, match=message):
        ez.load(bundle)


def test_coefficients_of_another_dtype_are_refused(sound, tmp_path):
    bundle = Path(shutil.copytree(sound["flat", "nf4"], tmp_path / "bundle"))
    edit_manifest(bundle, lambda document: document["options"].update(coefficients_dtype="float16"))
    space = ez.load(bundle)
    with pytest.raises(ez.BundleError, match=r"need tensors \{'coefficients': \('F16'"):
        space.coefficients("m0")
