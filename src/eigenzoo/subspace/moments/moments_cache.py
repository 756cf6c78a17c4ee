"""Cache moments on disk, so that an interrupted pass resumes and a repeated one reads no weights.

Each layer has one file in the user's cache folder. Its name identifies the zoo's files and the options (`ZooIdentity`). Missing or
damaged moments are collected again.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from eigenzoo.errors import EigenzooError
from eigenzoo.formats.cache_folder import OFF, VARIABLE, cache_folder
from eigenzoo.formats.safetensors.file import SafetensorsFile
from eigenzoo.formats.safetensors.tensor_bytes import as_bytes
from eigenzoo.subspace.bundles.storage import moment_tensors, read_moments, write_moment_tensors
from eigenzoo.subspace.moments.layer_moments import LayerMoments
from eigenzoo.zoo.zoo import Zoo

VERSIONS = (2, np.__version__, torch.__version__)
"""The first number is raised when the same files give other moments or bases. Other library versions round differently.
"""


class ZooIdentity:
    """Keys of a zoo's layers, by the identity of its files (`formats.file_identity`)."""

    def __init__(self, zoo: Zoo) -> None:
        self._zoo = zoo

    @cached_property
    def files(self) -> str:
        """Digest of all models' files, including the base."""
        return digest(self._zoo.identities())

    def layer(self, name: str, *details: object) -> str:
        """Return the key of one layer for given options."""
        layer = self._zoo.layers[name]
        return digest(
            [
                *VERSIONS,
                self.files,
                self._zoo.view,
                name,
                layer.shape,
                layer.dtype,
                self._zoo.keys(name),
                # Layers with the same name and shape may be other rows of the tensor.
                *map(str, self._zoo.selection.split),
                *details,
            ]
        )

    def zoo_key(self, *details: object) -> str:
        """Return the key of all layers for given options."""
        names = list(self._zoo.layers)
        return digest(
            [*VERSIONS, self.files, self._zoo.names, self._zoo.view, [self.layer(name) for name in names], *details]
        )


def digest(value: object) -> str:
    """Return the hash of plain values."""
    return hashlib.sha256(json.dumps(value, default=str, sort_keys=True).encode()).hexdigest()


CHECKSUM = "sha256"
"""Metadata key of a cached file: the hash of its values."""

CACHE_BYTES = 4 * 2**30
"""Largest size of the cache in bytes. The least recently used moments are removed first."""


class MomentsCache:
    """The cached moments of a zoo's layers about the models' mean. With `folder` None nothing is cached."""

    def __init__(self, zoo: Zoo, folder: Path | None, device: str = "cpu") -> None:
        self._zoo, self._folder, self.identity = zoo, folder, ZooIdentity(zoo)
        self._device = device.partition(":")[0]
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError:
                self._folder = None

    def get(self, name: str, center: str, precision: str) -> LayerMoments | None:
        """Return a layer's moments, or None if they are not cached."""
        path = self._path(name, center, precision)
        if path is None or not path.is_file():
            return None
        try:
            file = SafetensorsFile(path)
            moments = read_moments(file, self._zoo.layers[name], len(self._zoo))
        except (EigenzooError, OSError):
            _remove(path)
            return None
        # After a power loss a file may have the right size and wrong values.
        if file.metadata.get(CHECKSUM) != checksum(moment_tensors(name, moments)):
            _remove(path)
            return None
        with suppress(OSError):
            os.utime(path)
        return moments

    def put(self, name: str, center: str, precision: str, moments: LayerMoments) -> None:
        """Cache a layer's moments. If they cannot be written, they are not cached."""
        path = self._path(name, center, precision)
        if path is None or path.exists():
            return
        staging = path.with_name(f".{path.name}.tmp-{secrets.token_hex(4)}")
        try:
            values = moment_tensors(name, moments)
            write_moment_tensors(staging, values, moments.num_reference, metadata={CHECKSUM: checksum(values)})
            staging.replace(path)
        except (EigenzooError, OSError):
            _remove(staging)

    def _path(self, name: str, center: str, precision: str) -> Path | None:
        if self._folder is None or center != "models":
            return None
        return self._folder / f"{self.identity.layer(name, precision, self._device)}.safetensors"


def _remove(path: Path) -> None:
    """Remove a file if the folder permits it."""
    with suppress(OSError):
        path.unlink()


def checksum(values: Mapping[str, Tensor]) -> str:
    """Return the hash of tensors by name."""
    total = hashlib.sha256()
    for name in sorted(values):
        total.update(name.encode())
        total.update(as_bytes(values[name].contiguous()))
    return total.hexdigest()


@contextmanager
def opened_cache(zoo: Zoo, enabled: bool, device: str = "cpu") -> Iterator[MomentsCache]:
    """Open the cached moments of a zoo in the user's cache folder. At the end the cache is trimmed."""
    if not enabled or os.environ.get(VARIABLE) == OFF or not all(model.path.exists() for model in zoo.models):
        yield MomentsCache(zoo, None)
        return
    folder = cache_folder() / "moments"
    cache = MomentsCache(zoo, folder, device)
    # The identity is computed before any value is read, so that a file that is replaced meanwhile gets another key.
    _ = cache.identity.files
    yield cache
    trim(folder, CACHE_BYTES)


def trim(folder: Path, num_bytes: int) -> None:
    """Remove the least recently used files, also unfinished ones, until the others take at most `num_bytes`."""
    try:
        files = sorted(
            ((path.stat(), path) for path in folder.glob("*.safetensors*")), key=lambda item: item[0].st_mtime
        )
    except OSError:
        return
    total = sum(status.st_size for status, _ in files)
    for status, path in files:
        if total <= num_bytes:
            return
        _remove(path)
        total -= status.st_size
