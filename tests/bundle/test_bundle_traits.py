"""Traits of moments in a bundle: written and read to the bit, absent where unknown, refused where they cannot be meant."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bundle_files import edit_tensors, fit_form, write_bundle, write_zoo
from torch import Tensor

import eigenzoo as ez

TRAITS = ("sums_N", "singular_NR", "starts_NN", "entries")
KEPT = {
    "flat": {"sums_N", "entries"},
    "tucker": {"sums_N", "entries"},
    "stacked": {"sums_N", "singular_NR", "starts_NN"},
}
PARTS = ("sums", "singular", "starts")


@pytest.mark.parametrize("form", KEPT)
def test_traits_are_saved_and_loaded_to_the_bit(tmp_path: Path, form: str) -> None:
    fitted = fit_form(write_zoo(tmp_path / "zoo", form), form)
    loaded = ez.load(fitted.save(tmp_path / "bundle"))
    again = ez.load(loaded.save(tmp_path / "again"))
    for layer in fitted.layers:
        first = fitted.moments(layer)
        assert {trait for trait in TRAITS if getattr(first, trait) is not None} == KEPT[form]
        for space in (loaded, again):
            for trait in TRAITS:
                expected, found = getattr(first, trait), getattr(space.moments(layer), trait)
                assert (expected is None) == (found is None)
                if trait == "entries" or expected is None:
                    assert expected == found
                else:
                    assert torch.equal(expected, found)
                    assert found.dtype == torch.float64


@pytest.mark.parametrize("form", ["flat", "stacked"])
def test_a_bundle_without_traits_is_an_older_one(tmp_path: Path, form: str) -> None:
    """Their keys may be missing, as growth from a bundle alone leaves them; evidence then says what it can."""
    bundle = write_bundle(tmp_path, form)
    before = ez.evidence(bundle).to_dict()

    def remove(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.rpartition("/")[2] in (*PARTS, "entries")]:
            del tensors[name]

    edit_tensors(bundle, "moments.safetensors", remove)
    space = ez.load(bundle)
    assert list(space.verify()) == []
    after = ez.evidence(bundle).to_dict()
    for name, layer in after["layers"].items():
        assert {getattr(space.moments(name), trait) for trait in TRAITS} == {None}
        assert layer["null"]["permuted"] is layer["null"]["spectrum_matched"] is None
        for part in ("rank", "in_sample", "captured", "leave_one_out"):
            assert layer["heldout"][part] == before["layers"][name]["heldout"][part]
        assert layer["null"]["norm_matched"] == before["layers"][name]["null"]["norm_matched"]
    assert after["verdict"]["code"] == before["verdict"]["code"]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    "change",
    [
        lambda value: value[:-1].clone(),
        lambda value: value.float(),
        lambda value: value.flatten()[:, None, None].clone(),
        lambda value: torch.zeros(0, dtype=torch.float64),
    ],
    ids=["too short", "of another dtype", "of another rank", "empty"],
)
def test_traits_of_another_shape_are_refused(tmp_path: Path, part: str, change: Callable[[Tensor], Tensor]) -> None:
    bundle = write_bundle(tmp_path, "stacked")
    layer = "block.q"

    def damage(tensors: dict[str, Tensor]) -> None:
        tensors[f"{layer}/{part}"] = change(tensors[f"{layer}/{part}"])

    edit_tensors(bundle, "moments.safetensors", damage)
    with pytest.raises(ez.BundleError, match=f"moment '{layer}/{part}'.*is missing or of another shape. Float64"):
        ez.load(bundle).moments(layer)
    with pytest.raises(ez.BundleError, match=f"moment '{layer}/{part}'"):
        ez.evidence(bundle)


def test_a_number_of_dimensions_is_one_number(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path, "flat")

    def damage(tensors: dict[str, Tensor]) -> None:
        tensors["block.weight/entries"] = torch.ones(2, dtype=torch.float64)

    edit_tensors(bundle, "moments.safetensors", damage)
    with pytest.raises(ez.BundleError, match=r"moment 'block\.weight/entries'"):
        ez.load(bundle).moments("block.weight")
