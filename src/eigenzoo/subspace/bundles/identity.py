"""What a zoo is, to the byte, without reading it: by which kept work is known to be of the same files."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property

import numpy as np
import torch

from eigenzoo.zoo.zoo import Zoo

VERSIONS = (2, np.__version__, torch.__version__)
"""The first is raised whenever the same files give other moments or bases than before; other libraries round otherwise."""


class ZooIdentity:
    """Keys of a zoo's layers, by the identity of its files (`formats.file_identity`)."""

    def __init__(self, zoo: Zoo) -> None:
        self._zoo = zoo

    @cached_property
    def files(self) -> str:
        """Digest of all models' files, the base's included."""
        return digest(self._zoo.identities())

    def layer(self, name: str, *details: object) -> str:
        """Key of one layer under a choice of what is done with it."""
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
                # The same name and shape may be other rows.
                *map(str, self._zoo.selection.split),
                *details,
            ]
        )

    def whole(self, *details: object) -> str:
        """Key of all layers under a choice of what is done with them."""
        names = list(self._zoo.layers)
        return digest(
            [*VERSIONS, self.files, self._zoo.names, self._zoo.view, [self.layer(name) for name in names], *details]
        )


def digest(value: object) -> str:
    """Return the hash of plain values."""
    return hashlib.sha256(json.dumps(value, default=str, sort_keys=True).encode()).hexdigest()
