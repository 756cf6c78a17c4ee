"""The bundle as files: opening, checking, and writing its parts. The rules are in docs/bundle-format.md."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import torch
from torch import Tensor

from eigenzoo.errors import BundleError, FormatError, UnsafePathError
from eigenzoo.formats import tree
from eigenzoo.formats.bundle.basis_files import BasisFiles
from eigenzoo.formats.bundle.contents import VALUE, tensor_id
from eigenzoo.formats.bundle.manifest import FileRecord, Manifest, parse_manifest
from eigenzoo.formats.json_file import read_json
from eigenzoo.formats.output.own import OTHER_KIND, find_stranger, list_files
from eigenzoo.formats.paths import did_you_mean, inside, is_regular
from eigenzoo.formats.safetensors.dtypes import dtype_name
from eigenzoo.formats.safetensors.file import SafetensorsFile
from eigenzoo.formats.writers import TensorLayout, write_tensors

MANIFEST, CARD, MOMENTS = "manifest.json", "README.md", "moments.safetensors"
HUB_FILE = ".gitattributes"
"""What the hub puts into each repository, and so beside a bundle that is one."""

MAX_MANIFEST_BYTES = 64 * 2**20


def is_bundle(folder: Path) -> bool:
    """Tell by names alone whether a folder is meant to be a bundle."""
    return folder.is_dir() and tree.is_bundle(tree.Disk(str(folder)))


def foreign_files(folder: Path) -> str:
    """Name a file of a folder that is not part of its bundle; "" if there is none."""
    if not is_bundle(folder):
        return OTHER_KIND
    try:
        files = read_json(folder / MANIFEST, where=MANIFEST, max_bytes=MAX_MANIFEST_BYTES).get("files")
    except FormatError as error:
        return f"may be a folder of another kind ({error.where}: {error.what})"
    return find_stranger(folder, {*files, MANIFEST, CARD, HUB_FILE}) if isinstance(files, dict) else OTHER_KIND


def read_manifest(path: Path) -> Manifest:
    """Read and check a bundle's manifest, and that every file that it names is there."""
    if not (path / MANIFEST).is_file():
        raise BundleError(
            f"there is no {MANIFEST}" if path.exists() else "there is no such folder",
            where=str(path),
            rule="a bundle is a folder that eigenzoo fit wrote",
            next_step="write one with eigenzoo fit ZOO -o BUNDLE" if path.exists() else did_you_mean(path),
        )
    document = read_json(inside(path, MANIFEST), where=f"{path}/{MANIFEST}", max_bytes=MAX_MANIFEST_BYTES)
    manifest = parse_manifest(document, str(path))
    plain = file_sizes(path)
    for name in manifest.files:
        if name != MOMENTS and name not in plain and not inside(path, name).is_file():
            raise BundleError(f"the file {name!r} is missing", where=str(path), next_step="copy the whole bundle again")
    unlisted = [model.coefficients for model in manifest.models if model.coefficients not in manifest.files]
    if unlisted:
        raise BundleError(f"{unlisted[0]!r} is not listed in the manifest", where=str(path))
    return manifest


def open_basis(path: Path) -> BasisFiles:
    """Open the shards of a bundle's basis."""
    return BasisFiles(sorted(path.glob("basis*.safetensors")), path)


class StoredCoefficients(NamedTuple):
    """One model's small file.

    Attributes:
        values: the coefficients of all layers in one vector.
        residuals_L, energies_L: of each layer, the share that is outside, and ‖X‖² of a model that the moments do not hold.
    """

    values: Tensor
    residuals_L: Tensor
    energies_L: Tensor | None = None


def read_coefficients(
    root: Path,
    file: str,
    model: str,
    basis_id: str,
    num_coefficients: int,
    num_layers: int,
    dtype: str = "float32",
) -> StoredCoefficients:
    """Read one model's small file, checked against the layers and the dtype of coefficients; they come in float32."""
    where = f"{root}/{file}"
    try:
        opened = SafetensorsFile(root / file, root)
    except UnsafePathError:
        raise
    except FormatError as error:
        raise BundleError(error.what, where=where, rule=error.rule, next_step=error.next_step) from error
    expected = {
        "coefficients": (dtype_name(getattr(torch, dtype)), (num_coefficients,)),
        "residual": ("F32", (num_layers,)),
    }
    tensors = {name: (dtype_name(info.dtype), info.shape) for name, info in opened.tensors.items()}
    if tensors != expected and tensors != expected | {"energy": ("F64", (num_layers,))}:
        raise BundleError(f"holds {tensors}", where=where, rule=f"the layers of this bundle need tensors {expected}")
    if opened.metadata.get("basis") != basis_id:
        raise BundleError("belongs to another basis", where=where, rule=f"its basis is {basis_id}")
    if opened.metadata.get("model") != model:
        raise BundleError(
            f"holds the coefficients of {opened.metadata.get('model')!r}",
            where=where,
            rule=f"the manifest says {model!r}",
        )
    found = [opened.read(name) for name in ("coefficients", "residual", "energy") if name in tensors]
    return StoredCoefficients(found[0].float(), *found[1:])


def file_fault(path: Path, manifest: Manifest, name: str) -> str | None:
    """Check one file against the manifest: its size, checksum, and the id of its content."""
    file, record = inside(path, name), manifest.files[name]
    if name == MOMENTS and not file.exists():
        return None
    if file.stat().st_size != record.bytes:
        return f"{name}: {file.stat().st_size} bytes, but the manifest says {record.bytes}"
    if file_sha256(file) != record.sha256:
        return f"{name}: the checksum differs from the manifest's"
    if name.startswith("rest/") and not name.endswith(".safetensors") and record.sha256[:32] != Path(name).stem:
        return f"{name}: the name is not the hash of the content"
    return None


def content_faults(path: Path, manifest: Manifest) -> Iterator[str]:
    """Check that every tensor of rest/ is the one that its name is the hash of."""
    for name in manifest.files:
        if not (name.startswith("rest/") and name.endswith(".safetensors")):
            continue
        try:
            file = SafetensorsFile(path / name, path)
            actual_id = tensor_id(file.read(VALUE))
        except FormatError as error:
            yield f"{name}: {error}"
            continue
        if actual_id != Path(name).stem:
            yield f"{name}: the name is not the hash of the content"


def unknown_files(path: Path, manifest: Manifest) -> Iterator[str]:
    """Find the files that nobody names."""
    listed = {*manifest.files, MANIFEST, CARD, HUB_FILE}
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path).as_posix()
        if (file.is_symlink() or not file.is_dir()) and name not in listed:
            yield f"{name}: the manifest does not list it"


def model_faults(path: Path, manifest: Manifest) -> Iterator[str]:
    """Check that every model's file names it, and that the contents of its record are files of the bundle."""
    for model in manifest.models:
        try:
            named = SafetensorsFile(path / model.coefficients, path).metadata.get("model")
        except FormatError:
            named = model.name  # what cannot be read is another check's
        if named != model.name:
            yield f"{model.coefficients}: belongs to model {named!r}, not {model.name!r}"
        contents = [f"rest/{model.layout}.json"]
        contents += [f"rest/{model.config}.json"] if model.config else []
        contents += [f"rest/{content}.bin" for content in model.side_files.values()]
        contents += [f"rest/{content}.safetensors" for content in model.carried.values()]
        for content in contents:
            if content not in manifest.files:
                yield f"{content}: model {model.name!r} needs it, but the manifest does not list it"


def coefficient_file(model: str) -> str:
    """Return the file of a model's coefficients; names are percent-encoded, long ones cut and marked by their hash.

    >>> coefficient_file("run 1/last")
    'coefficients/run%201%2Flast.safetensors'
    """
    encoded = quote(model, safe="", errors="surrogatepass")
    if model.strip(".") == "":
        encoded = encoded.replace(".", "%2E")
    if len(encoded) > 150:
        encoded = f"{encoded[:100]}-{hashlib.sha256(model.encode('utf-8', 'surrogatepass')).hexdigest()[:32]}"
    return f"coefficients/{encoded}.safetensors"


def write_coefficients(
    path: Path, model: str, basis_id: str, stored: StoredCoefficients, dtype: str = "float32"
) -> None:
    """Write one model's small file, coefficients in `dtype`; it need not be on the disk yet when this returns."""
    values = {"coefficients": stored.values.to(getattr(torch, dtype)), "residual": stored.residuals_L.float()}
    if stored.energies_L is not None:
        values["energy"] = stored.energies_L.double()
    layout = [TensorLayout(name, dtype_name(tensor.dtype), tuple(tensor.shape)) for name, tensor in values.items()]
    path.parent.mkdir(exist_ok=True)
    write_tensors(path, layout, values.__getitem__, {"model": model, "basis": basis_id}, sync=False)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json."""
    text = json.dumps(manifest.model_dump(mode="json"), separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    # Names of files that are no UTF-8 hold half surrogates, which only an escape can write; JSON's is Python's.
    (folder / MANIFEST).write_bytes((text + "\n").encode("utf-8", "backslashreplace"))


def record_files(folder: Path, records: Mapping[str, FileRecord] | None = None) -> dict[str, FileRecord]:
    """Return bytes and checksums of every file of a folder but the manifest and the card, those that are known unread."""
    names = (name for name in file_sizes(folder) if name not in (MANIFEST, CARD))
    records = records or {}
    return {name: records.get(name) or file_record(folder / name) for name in names}


def file_sizes(folder: Path) -> dict[str, int]:
    """Return the bytes of every plain file below a folder, by its name relative to it; links are left out."""
    statuses = {name: os.lstat(folder / name) for name in list_files(folder)}
    return {name: status.st_size for name, status in statuses.items() if stat.S_ISREG(status.st_mode)}


def file_record(path: Path) -> FileRecord:
    """Return bytes and checksum of a file."""
    return FileRecord(bytes=path.stat().st_size, sha256=file_sha256(path))


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    if not is_regular(path):
        raise FormatError("is not a regular file", where=str(path))
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise FormatError(f"cannot be read ({error.strerror})", where=str(path)) from error
