"""Subspace: a fitted zoo. Projects, rebuilds, grows, saves; never changes once made."""

from __future__ import annotations

import os
from pathlib import Path

from eigenzoo.formats.model import Model
from eigenzoo.passes.settings import own_settings
from eigenzoo.records import Progress, no_progress
from eigenzoo.subspace.bundles.saving import save
from eigenzoo.subspace.stored import StoredSubspace
from eigenzoo.zoo.sources import Source
from eigenzoo.zoo.verification import Loader, Verification
from eigenzoo.zoo.zoo import Zoo


class Subspace(StoredSubspace):
    """The shared subspace of a zoo, with every model's coefficients in it; made by `fit`, `load` or `add`.

    It lies in a folder (a temporary one until `save`) and reads bases, coefficients and moments on demand.

    Attributes:
        path: the folder.
        manifest: everything about it but the values.
        checksums: of a saved subspace's files, and of those that another took over from it.
        snapshot: of the bundle that it was loaded or grown from, which others may replace at any time.
    """

    def add(
        self,
        source: Source | Zoo,
        *,
        refresh: bool = False,
        old: Source | None = None,
        allow_pickle: bool = False,
        workspace: str | os.PathLike[str] | None = None,
        progress: Progress = no_progress,
    ) -> Subspace:
        """Return a new Subspace with more models; see `eigenzoo.subspace.growth.add`."""
        # Imported where it is needed, as `push` and `verify` are: most who load a bundle need none of them.
        from eigenzoo.subspace.growth import add

        return add(
            self, source, refresh=refresh, old=old, allow_pickle=allow_pickle, workspace=workspace, progress=progress
        )

    @own_settings()
    def save(self, folder: str | os.PathLike[str], *, force: bool = False, moments: bool = True) -> Path:
        """Save as a bundle in a new folder, which appears whole or not at all; returns the folder.

        Checksums of everything, and of the models' files that are still there, are taken now. `moments=False` leaves out
        the Grams, which evidence, plan and exact growth need.
        """
        return save(self, Path(folder), force=force, moments=moments)

    @own_settings()
    def push(
        self,
        repo: str,
        *,
        revision: str | None = None,
        private: bool = False,
        force: bool = False,
        moments: bool = False,
        message: str | None = None,
    ) -> str:
        """Push as a bundle to a model repository of the Hugging Face hub, in one commit; returns `org/name@commit`.

        It is verified before. A repository that is not there is made (`private` or not), and so is the branch `revision`;
        another bundle there is replaced with `force` only, anything else never. `moments` (large; evidence, plan and exact
        growth need them) are pushed where they are asked for. Of paths of this machine only the last part is told.
        """
        from eigenzoo.subspace.bundles.pushing import push

        return push(self, repo, revision=revision, private=private, force=force, moments=moments, message=message)

    @own_settings()
    def verify(
        self,
        *,
        against: str | os.PathLike[str] | Model | None = None,
        loader: Loader | None = None,
        progress: Progress = no_progress,
    ) -> Verification:
        """Check all that a bundle promises: checksums, finite values, orthonormal bases, coefficients that match layers.

        With a base in `against`, whether the adapters that it rebuilds take effect there, which `loader` decides and is undecided
        without it (see `eigenzoo.verify_adapter`); of full weights, whether the base has the layers, and how far the mean is from
        it. Cost: all files and the base's weights are read once, and each adapter is rebuilt once.
        """
        from eigenzoo.subspace.bundles.verifying import verify

        return verify(self, against, loader, progress)
