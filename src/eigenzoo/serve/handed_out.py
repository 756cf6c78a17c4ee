"""Plain adapters for engines that know nothing of subspaces: rebuilt from a bundle on demand, kept in a cache folder.

    <cache>/handed-out/<model>-<hash of the base, the basis and everything of the model>/

Engines read an adapter's files again after they have evicted it, and some keep results by its name and path. So a folder never
changes, its name depends on all numbers in it, and no folder is deleted while a process that hands out adapters lives.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import threading
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from eigenzoo.errors import MismatchError, OutputError, RankError, ResourceError, UnsupportedError
from eigenzoo.formats.bundle.contents import Template
from eigenzoo.formats.cache_folder import cache_folder
from eigenzoo.formats.file_identity import identify_file
from eigenzoo.formats.json_file import read_json
from eigenzoo.formats.lora.config import CONFIG_FILE
from eigenzoo.formats.lora.peft_folder import WEIGHTS_FILE
from eigenzoo.formats.output.held_folder import TemporaryFolder
from eigenzoo.formats.output.own import recorded
from eigenzoo.formats.output.renaming import rename_new
from eigenzoo.formats.side_files import CONFIG
from eigenzoo.subspace.rebuilt import MODEL
from eigenzoo.subspace.subspace import Subspace
from eigenzoo.zoo.adapter_verifying import verify_adapter
from eigenzoo.zoo.base_modules import open_base
from eigenzoo.zoo.verification import LOADING, Loader

FOLDER, LOCK = "handed-out", ".lock"

MAX_BYTES = 20 * 10**9
"""Default bound of the folder's size."""

MAX_ADAPTERS = 10_000
"""Bound of the number of adapters in the folder."""

SHOWN = 60
"""Characters of a model's name in the name of its folder."""


class HandedOut:
    """A folder of rebuilt adapters. Several threads may call its methods, and several processes may share the folder.

    Args:
        space: a bundle of PEFT adapters.
        base: the model that the adapters change: a checkpoint's folder or file. Adapters without effect on it are not handed out.
        loader: decides whether an adapter has an effect, such as `eigenzoo.integrations.dry_loading.load_dry`.
        folder: where the adapters are kept. Default: in eigenzoo's cache folder.
        max_rank: the largest rank that the engine accepts. Default: any.
        max_bytes: bound of the folder's size. Old adapters are deleted only when no other process uses the folder.
        max_adapters: bound of the number of adapters in it.

    Raises UnsupportedError for a bundle of other models than PEFT adapters, and FormatError for a base that cannot be read.
    """

    def __init__(
        self,
        space: Subspace,
        base: str | os.PathLike[str],
        loader: Loader,
        *,
        folder: Path | None = None,
        max_rank: int | None = None,
        max_bytes: int = MAX_BYTES,
        max_adapters: int = MAX_ADAPTERS,
    ) -> None:
        check_plain(space)
        self.space, self.max_rank = space, max_rank
        self._base, self._loader, self._max_bytes, self._max_adapters = Path(base), loader, max_bytes, max_adapters
        self._base_identity = _identify(self._base)
        self.folder = (cache_folder() / FOLDER if folder is None else folder).absolute()
        self._guard = threading.Lock()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.folder / LOCK, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise OutputError(f"cannot be written ({error.strerror})", where=str(self.folder)) from error
        self._release = weakref.finalize(self, os.close, self._lock)
        self._share()

    def path(self, name: str) -> Path:
        """Return the folder of a model's adapter, which is rebuilt and checked if it is not there yet.

        Raises UsageError for a model that the bundle does not have, MismatchError for one that has no effect on the base,
        RankError for one of a higher rank than `max_rank`, OutputError for a folder that was changed, and ResourceError if the
        folder is full. Cost: of a new adapter one rebuild, one read of the weights that it changes, and its bytes on the disk; of
        another one a read of its coefficients.
        """
        target = self.folder / self._folder_of(name)
        with self._guard:  # one adapter after another: rebuilding uses all cores
            if not target.exists():
                self._make(name, target)
            self._check_folder(target)
            os.utime(target)  # used last: by this, old adapters are told from others
        self._check_rank(name, target)
        return target

    def close(self) -> None:
        """Allow other processes to delete these adapters."""
        self._release()

    def _share(self) -> None:
        """Take part in the folder's use. A process that is alone first deletes what is beyond half of the bounds."""
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._prune()
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS):
                raise
        try:
            fcntl.flock(self._lock, fcntl.LOCK_SH)
        except OSError as error:
            # Where nothing can be locked, nothing is ever deleted.
            if error.errno not in (errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS):
                raise

    def _folder_of(self, name: str) -> str:
        """Return the folder's name. The model's own name in it is only for people, and is not a path."""
        coefficients = self.space.coefficients(name)
        record = next(record for record in self.space.manifest.models if record.name == name)
        source = [self._base_identity, self.space.manifest.basis_id, record.model_dump(mode="json")]
        digest = hashlib.sha256(json.dumps(source, sort_keys=True).encode())
        for layer, values in sorted(coefficients.values.items()):
            digest.update(json.dumps(layer).encode())
            digest.update(values.contiguous().numpy().tobytes())
        shown = "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in name[:SHOWN])
        return f"{shown}-{digest.hexdigest()[:32]}"

    def _make(self, name: str, target: Path) -> None:
        self._check_room()
        staging = TemporaryFolder(self.folder)
        try:
            made = self.space.rebuild(name).save(Path(staging.name) / "adapter")
            self._check_effect(name, made)
            with suppress(FileExistsError):  # another process has made the same meanwhile
                rename_new(made, target)
        finally:
            staging.cleanup()

    def _check_room(self) -> None:
        sizes = [_size(entry) for entry in self._kept()]
        if sum(sizes) < self._max_bytes and len(sizes) < self._max_adapters:
            return
        raise ResourceError(
            f"{len(sizes)} adapters of {sum(sizes) / 1e9:.1f} GB are kept",
            where=str(self.folder),
            rule=f"at most {self._max_adapters} of {self._max_bytes / 1e9:.1f} GB may be, and none is deleted while a server lives",
            next_step="stop the servers that use this folder, and start them with a larger bound: the first deletes old adapters",
        )

    def _check_effect(self, name: str, adapter: Path) -> None:
        """Raise MismatchError unless an adapter takes effect on the base."""
        found = verify_adapter(adapter, self._base, loader=self._loader)
        if found.ok:
            return
        undecided = "it is not known whether its adapter has an effect on the base"
        reasons = found.faults or tuple(note for check in found.checks if check.name == LOADING for note in check.notes)
        raise MismatchError(
            f"{undecided if found.undecided else 'its adapter does not fit the base'}: {reasons[0] if reasons else found}",
            where=f"model '{name}'",
            rule=f"the base is {self._base}",
            next_step=f"run eigenzoo verify {self.space.path} --against {self._base}",
        )

    def _check_folder(self, folder: Path) -> None:
        """Raise OutputError for a folder that is not as it was written. Each file is read once by a process."""
        changed = recorded(MODEL)(folder)
        missing = [file for file in (CONFIG_FILE, WEIGHTS_FILE) if not (folder / file).is_file()]
        if changed or missing:
            raise OutputError(
                changed or f"lacks {missing[0]}",
                where=str(folder),
                rule="an adapter that was handed out never changes",
                next_step="delete this folder: the adapter is then rebuilt",
            )

    def _check_rank(self, name: str, folder: Path) -> None:
        rank = read_json(folder / CONFIG_FILE, where=str(folder)).get("r")
        if self.max_rank is not None and isinstance(rank, int) and rank > self.max_rank:
            raise RankError(
                f"its adapter has rank {rank}",
                where=f"model '{name}'",
                rule=f"the engine was started for ranks up to {self.max_rank}",
                next_step="start it with the rank that eigenzoo serve --print-command prints",
            )

    def _kept(self) -> list[Path]:
        return [entry for entry in self.folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")]

    def _prune(self) -> None:
        """Delete the adapters that were used longest ago, until the folder has half of its bounds."""
        kept = sorted(self._kept(), key=lambda entry: entry.stat().st_mtime)
        sizes = [_size(entry) for entry in kept]
        total, number = sum(sizes), len(sizes)
        for entry, size in zip(kept, sizes, strict=True):
            if total <= self._max_bytes // 2 and number <= self._max_adapters // 2:
                return
            shutil.rmtree(entry)
            total, number = total - size, number - 1


def check_plain(space: Subspace) -> None:
    """Raise UnsupportedError unless the models of a bundle are written as PEFT adapters."""
    formats = {template.layout.format for template in _templates(space)}
    if space.view == "update" and formats == {"lora"}:
        return
    raise UnsupportedError(
        f"the bundle has view {space.view!r} and models of format {', '.join(sorted(formats))}",
        where=str(space.path),
        rule="engines load PEFT adapters",
        next_step="serve it with eigenzoo serve, or rebuild whole models",
    )


def written_rank(space: Subspace, names: Sequence[str]) -> int:
    """Return the largest rank at which models are written.

    Projected adapters are written at the largest rank of the zoo. Others, such as imported ones, have no bound on what a cut loses:
    these are rebuilt to know their rank.
    """
    ranks = []
    for name in names:
        coefficients = space.coefficients(name)
        updates = coefficients.template.layout.updates
        if coefficients.outside:
            ranks += [max(update.rank, space.largest_ranks.get(module, 0)) for module, update in updates.items()]
        elif (written := space.rebuild(name).ranks()) is not None:
            ranks.append(written.rank)
    return max(ranks)


def _templates(space: Subspace) -> list[Template]:
    return [space.template(name) for name in {record.layout: record.name for record in space.manifest.models}.values()]


def _identify(base: Path) -> list[object]:
    """Return what tells this base from others and from later contents of its files."""
    model = open_base(base)
    config = model.folder / CONFIG
    files = [*model.weight_files(), *([config] if config.is_file() else [])]
    return [str(base.absolute()), [identify_file(file) for file in files]]


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
