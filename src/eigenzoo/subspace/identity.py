"""What a zoo is, to the byte, without reading it: by which kept work is known to be of the same files."""

from __future__ import annotations

import hashlib
import json
import os
from functools import cached_property
from pathlib import Path

from eigenzoo.formats.remote import remote_file
from eigenzoo.zoo.zoo import Zoo

VERSION = 1
"""Raised whenever the same files give other moments or bases than before."""


class ZooIdentity:
    """Keys of a zoo's layers.

    A file is known by its number on the disk, its size, and the times at which its content and its entry last changed, the latter
    of which nobody can set; a file elsewhere by its address and the tag that its store gives to its content.
    """

    def __init__(self, zoo: Zoo) -> None:
        self._zoo = zoo

    @cached_property
    def files(self) -> str:
        """Digest of all models' files, the base's included."""
        models = [*self._zoo.models, *([self._zoo.base] if self._zoo.base is not None else [])]
        return digest([_file(path) for model in models for path in model.weight_files()])

    def layer(self, name: str, *details: object) -> str:
        """Key of one layer under a choice of what is done with it."""
        layer = self._zoo.layers[name]
        return digest(
            [VERSION, self.files, self._zoo.view, name, layer.shape, layer.dtype, self._zoo.keys(name), *details]
        )

    def whole(self, *details: object) -> str:
        """Key of all layers under a choice of what is done with them."""
        names = list(self._zoo.layers)
        return digest(
            [VERSION, self.files, self._zoo.names, self._zoo.view, [self.layer(name) for name in names], *details]
        )


def digest(value: object) -> str:
    """Return the hash of plain values."""
    return hashlib.sha256(json.dumps(value, default=str, sort_keys=True).encode()).hexdigest()


def _file(path: Path) -> list[object]:
    elsewhere = remote_file(path)
    if elsewhere is not None:
        return [elsewhere.url, elsewhere.size, elsewhere.tag]
    status = os.stat(path)
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
