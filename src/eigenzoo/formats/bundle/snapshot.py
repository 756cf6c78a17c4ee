"""Which of the bundles that have had a name was opened: bundles are replaced as a whole while others read them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from eigenzoo.errors import BundleError

ATTEMPTS = 20
"""How often a bundle that other processes replace meanwhile is looked at anew."""


@dataclass(frozen=True)
class Snapshot:
    """A bundle's folder and the identity of its manifest, which is written once and never changed.

    What is opened by name and is followed by `check` is of the bundle whose snapshot it is: names only ever move on.
    """

    path: Path
    identity: tuple[int, ...] | None

    @classmethod
    def of(cls, path: Path) -> Snapshot:
        """Take the snapshot of what has this name now."""
        return cls(path, _identity(path))

    @property
    def is_current(self) -> bool:
        """Whether the name still is that bundle's."""
        return _identity(self.path) == self.identity

    def check(self) -> None:
        """Raise BundleError where another bundle, or none, has the name by now."""
        if not self.is_current:
            raise BundleError(
                "another process has replaced the bundle since it was opened",
                where=str(self.path),
                rule="an output never mixes parts of two bundles",
                next_step="open it again, or run the command again",
            )


def _identity(path: Path) -> tuple[int, ...] | None:
    try:
        status = os.stat(path / "manifest.json")
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
