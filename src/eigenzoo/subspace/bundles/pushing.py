"""Push a subspace to a repository of the hub, verified first and without paths of the local machine."""

from __future__ import annotations

import tempfile
from pathlib import Path

from eigenzoo.errors import BundleError, UsageError
from eigenzoo.formats.bundle.folder import read_manifest
from eigenzoo.formats.bundle.manifest import Manifest, SourceRecord
from eigenzoo.formats.remote import is_url
from eigenzoo.formats.remote.hub_id import HubId, parse_id
from eigenzoo.formats.remote.hub_push import check_may_push, hashes, push_bundle
from eigenzoo.subspace.bundles.saving import save
from eigenzoo.subspace.bundles.verifying import verify
from eigenzoo.subspace.stored import StoredSubspace


def push(
    space: StoredSubspace,
    repo: str,
    *,
    revision: str | None,
    private: bool,
    force: bool,
    moments: bool,
    message: str | None,
) -> str:
    """Push a subspace; see `Subspace.push`."""
    target = check_push(repo, revision)
    with tempfile.TemporaryDirectory(prefix="eigenzoo-") as temporary:
        folder = save(space, Path(temporary) / "bundle", force=False, moments=moments, change=portable)
        saved = StoredSubspace(folder, read_manifest(folder))
        fault = next(iter(verify(saved)), None)
        if fault is not None:
            raise BundleError(
                fault,
                where=str(space.path),
                rule="a damaged bundle is not pushed",
                next_step="run verify, and fit it again",
            )
        checksums = {name: record.sha256 for name, record in saved.manifest.files.items()}
        text = message or f"A shared weight subspace of {len(space.names)} models"
        done = push_bundle(folder, target, hashes(folder, checksums), message=text, private=private, force=force)
    return str(done)


def check_push(repo: str, revision: str | None) -> HubId:
    """Return the target of a push. Errors that need no request are raised before a bundle is downloaded or written."""
    target = parse_id(repo)
    if target is None or target.folder or (revision and target.revision):
        raise UsageError(
            "is no repository of the hub",
            where=repo,
            rule="a bundle is pushed to org/name, its branch named once: org/name@branch or --revision",
        )
    target = HubId(target.repo, "", revision or target.revision)
    if target.is_commit:
        raise UsageError("a commit cannot be pushed to", where=str(target), next_step="name a branch")
    check_may_push(target)
    return target


def portable(manifest: Manifest) -> Manifest:
    """Return the manifest without folders of this machine: local paths are reduced to their last part."""

    def named(record: SourceRecord) -> SourceRecord:
        return record if is_url(record.path) else record.model_copy(update={"path": Path(record.path).name or "model"})

    models = [model.model_copy(update={"source": named(model.source)}) for model in manifest.models]
    # The reason why a model was left out contains its path.
    skipped = [{**item, "reason": "not read"} for item in manifest.report.get("skipped", [])]
    report = {**manifest.report, **({"skipped": skipped} if skipped else {})}
    return manifest.model_copy(
        update={"models": models, "base": manifest.base and named(manifest.base), "report": report}
    )
