"""Each kind of damage is found by the check that is named for it, and by no other; all checks hold on a sound bundle."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from bundle_files import (
    FORMS,
    edit_manifest,
    edit_tensors,
    fit_form,
    read_manifest,
    replace_file,
    write_bundle,
    write_zoo,
)
from torch import Tensor

import eigenzoo as ez

NAMES = (
    "manifest",
    "checksums",
    "unknown files",
    "contents",
    "basis id",
    "finite basis",
    "orthonormality",
    "coefficients",
    "layouts",
    "moments",
)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {form: write_bundle(tmp_path_factory.mktemp(form), form) for form in FORMS}


@pytest.fixture(params=FORMS)
def bundle(request: pytest.FixtureRequest, sound: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound[request.param], tmp_path / "bundle"))


def failed(bundle: Path) -> list[str]:
    return [check.name for check in ez.load(bundle).verify().checks if not check.ok]


def test_every_check_is_made_and_holds(bundle: Path) -> None:
    found = ez.load(bundle).verify()
    assert tuple(check.name for check in found.checks) == NAMES
    assert found.ok
    assert (found.kind, found.path, found.against, list(found)) == ("bundle", str(bundle), None, [])
    assert all(check.detail and check.done for check in found.checks)
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["ok"] is True


def test_an_unsaved_subspace_has_no_files_to_compare(tmp_path: Path) -> None:
    found = fit_form(write_zoo(tmp_path / "zoo", "flat"), "flat").verify()
    assert found.ok
    assert not {"checksums", "unknown files"} & {check.name for check in found.checks}


def flip(name: str) -> Callable[[Path], None]:
    def change(bundle: Path) -> None:
        data = bytearray((bundle / name).read_bytes())
        data[-1] ^= 0x01
        (bundle / name).unlink()  # files may be hard links of the unsaved subspace's
        (bundle / name).write_bytes(bytes(data))

    return change


def spoil(name: str, ending: str, value: float) -> Callable[[Path], None]:
    def fill(tensors: dict[str, Tensor]) -> None:
        next(tensor for key, tensor in sorted(tensors.items()) if key.endswith(ending)).view(-1)[:1].fill_(value)

    return lambda bundle: edit_tensors(bundle, name, fill)


def rename_rest(bundle: Path) -> None:
    """A tensor of rest/ under a name that is not its hash, checksum and manifest included."""
    name = next(
        name for name in read_manifest(bundle)["files"] if name.startswith("rest/") and name.endswith("tensors")
    )
    edit_tensors(bundle, name, lambda tensors: tensors["value"].add_(1))


def other_layout(bundle: Path) -> None:
    """A layout whose tensors have other shapes, under its own hash."""
    layout = read_manifest(bundle)["models"][0]["layout"]
    document = json.loads((bundle / f"rest/{layout}.json").read_text())
    ((_, tensors),) = document["files"].items()
    document["updates"] = {}
    document["format"] = "checkpoint"
    for tensor in tensors:
        tensor[2] = [3, 3]
    data = json.dumps(document).encode()
    new = hashlib.sha256(data).hexdigest()[:32]
    replace_file(bundle, f"rest/{new}.json", data)
    edit_manifest(bundle, lambda manifest: manifest["models"][0].__setitem__("layout", new))


DAMAGE: list[tuple[str, Callable[[Path], object], set[str]]] = [
    ("moments flipped", flip("moments.safetensors"), {"checksums"}),
    ("extra file", lambda bundle: (bundle / "extra").write_text(""), {"unknown files"}),
    ("content under another name", rename_rest, {"contents"}),
    ("NaN in coefficients", spoil("coefficients/m1.safetensors", "coefficients", float("nan")), {"coefficients"}),
    ("NaN in a residual", spoil("coefficients/m1.safetensors", "residual", float("nan")), {"coefficients"}),
    ("NaN in moments", spoil("moments.safetensors", "gram", float("nan")), {"moments"}),
    ("another layout", other_layout, {"layouts"}),
]


@pytest.mark.parametrize(("damage", "names"), [case[1:] for case in DAMAGE], ids=[case[0] for case in DAMAGE])
def test_damage_is_found_by_its_check(bundle: Path, damage: Callable[[Path], object], names: set[str]) -> None:
    damage(bundle)
    assert set(failed(bundle)) == names


def test_damage_of_the_basis_is_found_by_its_checks(bundle: Path) -> None:
    part = {"flat": "models", "tucker": "outputs", "stacked": "weights"}[read_manifest(bundle)["layers"][0]["form"]]
    for change, name in (
        (lambda value: value.mul_(1.01), "orthonormality"),
        (lambda value: value.fill_(float("nan")), "finite basis"),
    ):
        copy = Path(shutil.copytree(bundle, bundle.parent / name))

        def edit(tensors: dict[str, Tensor], change: Callable[[Tensor], object] = change) -> None:
            for key, tensor in tensors.items():
                if key.endswith(part):
                    change(tensor)

        edit_tensors(copy, "basis.safetensors", edit)
        found = failed(copy)
        assert name in found
        assert "basis id" in found
        assert "checksums" not in found


def test_a_bundle_without_moments_is_whole(bundle: Path) -> None:
    (bundle / "moments.safetensors").unlink()
    found = ez.load(bundle).verify()
    assert found.ok
    assert [check.detail for check in found.checks if check.name == "moments"] == ["none are kept"]


def test_schema_faults_are_refused_on_loading(bundle: Path) -> None:
    changes: list[tuple[Callable[[dict[str, object]], object], str]] = [
        (lambda document: document.pop("axes"), "axes: Field required"),
        (lambda document: document.__setitem__("more", 1), "more: Extra inputs"),
        (lambda document: document.__setitem__("schema_version", 3), "has schema version 3"),
        (lambda document: document["discarded"].clear(), "discarded does not name the layers"),
    ]
    for place, (change, message) in enumerate(changes):
        copy = Path(shutil.copytree(bundle, bundle.parent / f"copy{place}"))
        edit_manifest(copy, change)
        with pytest.raises(ez.BundleError, match=message):
            ez.load(copy)


def test_coefficients_of_another_number_are_named(bundle: Path) -> None:
    def shorter(tensors: dict[str, Tensor]) -> None:
        tensors["coefficients"] = tensors["coefficients"][:-1].clone()

    edit_tensors(bundle, "coefficients/m2.safetensors", shorter)
    assert set(failed(bundle)) == {"coefficients"}
    assert ez.load(bundle).coefficients("m0").residual >= 0
