"""The public class Subspace: an immutable fitted zoo that projects, rebuilds, grows and saves."""

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

    Bases, coefficients and moments are read on demand from its folder, a temporary one until `save`.

    Attributes:
        path: the folder.
        manifest: everything except the values.
        checksums: checksums of the files of a saved subspace, and of files taken over from it.
        snapshot: identity of the bundle that it was loaded or grown from, because another process can replace that bundle.
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
        """Return a new Subspace with more models. This one is not changed.

        `refresh` fits the basis again to all models. Otherwise only coefficients are added. `old` is where the old models' files
        are now. Default: the paths from which they were read. `allow_pickle` also reads old models that are pickles. `workspace` is
        a folder on the disk where the bundle will be saved.

        If the old files are available the result is exact. Cost: one read of all weights and M·(N + M)·D products for M new models.
        If they are gone, a refresh uses the rebuilt old models, and their new loss ‖X̂ − X̂'‖ adds to the old one ‖X − X̂‖.
        """
        # Imported here, as in `push` and `verify`, because loading a bundle needs none of them.
        from eigenzoo.subspace.growth import add

        return add(
            self, source, refresh=refresh, old=old, allow_pickle=allow_pickle, workspace=workspace, progress=progress
        )

    @own_settings()
    def save(self, folder: str | os.PathLike[str], *, force: bool = False, moments: bool = True) -> Path:
        """Save as a bundle in a new folder and return the folder. It appears complete or not at all.

        Checksums of all files, and of the models' files that still exist, are computed now. `moments=False` leaves out
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
        """Push as a bundle to a model repository on the Hugging Face hub, in one commit. Returns `org/name@commit`.

        The bundle is verified first. A missing repository is created (`private` or not), and so is the branch `revision`.
        `force` replaces another bundle there; other content is never replaced. `moments=True` also pushes the moments (large;
        evidence, plan and exact growth need them). Local paths are reduced to their last part.
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
        """Check the bundle: checksums, finite values, orthonormal bases, coefficients that match layers.

        With a base in `against`, also check whether rebuilt adapters take effect on it. `loader` decides that; without it the
        result is undecided (see `eigenzoo.verify_adapter`). For full weights, check whether the base has the layers, and how far
        the mean is from it. Cost: all files and the base's weights are read once, and each adapter is rebuilt once.
        """
        from eigenzoo.subspace.bundles.verifying import verify

        return verify(self, against, loader, progress)
