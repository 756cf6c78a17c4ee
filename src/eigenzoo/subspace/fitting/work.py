"""The work of a fit while it goes on: a folder beside the output that an interrupted fit leaves, and the same fit goes on from.

    .eigenzoo-fit-<key>/
        lock                     held by the fit that is at work
        bundle/basis.safetensors the basis as far as it is written
        layers/<number>.json     a finished layer: its record, and which tensors it has in the basis
        layers/<number>.safetensors  its coefficients, energies lost, and moments

The key tells the zoo's files and the options of the fit, to the byte. A layer's record is written after its tensors, under a
temporary name, so that a layer is finished or not; one whose files are damaged is not. What a killed process has written the
system still holds; after a loss of power the fit begins anew, since the folder's mark of the running system is then another.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from eigenzoo.errors import EigenzooError, FormatError, OutputError
from eigenzoo.formats.bundle.basis_files import BasisWriter
from eigenzoo.formats.output.held_folder import TemporaryFolder, locked, running_system
from eigenzoo.formats.safetensors.dtypes import dtype_name, dtype_of
from eigenzoo.formats.safetensors.file import SafetensorsFile
from eigenzoo.formats.safetensors.writer import write_file
from eigenzoo.records import Layer, LayerFit, plain
from eigenzoo.subspace.bundles.storage import REFERENCE, moment_tensors, read_moments
from eigenzoo.subspace.fitting.models_fit import FittedLayer
from eigenzoo.subspace.moments.layer_moments import LayerMoments
from eigenzoo.subspace.moments.moments_cache import checksum, digest

PREFIX = ".eigenzoo-fit-"

STALE_SECONDS = 7 * 24 * 3600
"""Work that nobody has gone on with for a week is removed when the next fit begins beside it."""


@dataclass(frozen=True)
class Kept:
    """A finished layer: its fit and moments, and its tensors in the basis in their order: name, dtype, shape."""

    fitted: FittedLayer
    moments: LayerMoments
    tensors: list[tuple[str, str, list[int]]]


class Work:
    """What is finished of a fit. Without a folder nothing is kept, and nothing is finished."""

    def __init__(self, folder: Path | None = None, layers: Sequence[Layer] = ()) -> None:
        self._folder = folder
        self._places = {layer.name: place for place, layer in enumerate(layers)}
        self._layers = {layer.name: layer for layer in layers}
        self._kept: dict[str, Kept] = {}
        if folder is not None:
            (folder / "layers").mkdir(exist_ok=True)
            self._find()

    def __contains__(self, name: str) -> bool:
        return name in self._kept

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def lasts(self) -> bool:
        """Whether what is written is kept beyond an interruption, and may be there already."""
        return self._folder is not None

    def _find(self) -> None:
        """Take the finished layers, up to the first that is not: a basis is written in the order of the layers."""
        for name, layer in self._layers.items():
            try:
                self._kept[name] = self._read(layer)
            except (EigenzooError, OSError, ValueError, KeyError, TypeError):
                return

    def _read(self, layer: Layer) -> Kept:
        """Read a finished layer; raises ValueError where it is not what was written."""
        document = json.loads(self._path(layer.name, "json").read_bytes())
        file = SafetensorsFile(self._path(layer.name, "safetensors"))
        coefficients, outside_N = file.read("coefficients"), file.read("outside")
        moments = read_moments(file, layer, outside_N.numel())
        record, tensors = document["record"], document["tensors"]
        fit = {**record["fit"], "shape": tuple(record["fit"]["shape"])}
        fitted = FittedLayer(
            layer.name, record["form"], record["ranks"], record["has_mean"], coefficients, outside_N, LayerFit(**fit)
        )
        if document["digest"] != digest([record, tensors, document["basis"], checksum(_values(fitted, moments))]):
            raise ValueError("other values than were written")
        for shard, num_bytes in document["basis"]:
            if (self._path(layer.name, "json").parents[1] / "bundle" / shard).stat().st_size < num_bytes:
                raise ValueError("less of the basis than was written")
        return Kept(fitted, moments, [tuple(item) for item in tensors])

    def keep(self, fitted: FittedLayer, moments: LayerMoments, writer: BasisWriter) -> None:
        """Note that a layer is finished, once its tensors are written."""
        if self._folder is None:
            return
        values = _values(fitted, moments)
        path = self._path(fitted.name, "safetensors")
        path.unlink(missing_ok=True)
        entries = [(name, value.dtype, value.shape) for name, value in values.items()]
        write_file(path, entries, values.values(), {REFERENCE: str(moments.num_reference)}, sync=False)
        record = {"form": fitted.form, "ranks": fitted.ranks, "has_mean": fitted.has_mean, "fit": plain(fitted.record)}
        tensors = [(name, dtype_name(dtype), list(shape)) for name, dtype, shape in writer.tensors_of(fitted.name)]
        document = {"record": record, "tensors": tensors, "basis": writer.sizes()}
        document["digest"] = digest([*document.values(), checksum(values)])
        staging = self._path(fitted.name, f"tmp-{secrets.token_hex(4)}")
        staging.write_text(json.dumps(document))
        staging.replace(self._path(fitted.name, "json"))

    def restore(self, name: str, writer: BasisWriter) -> tuple[FittedLayer, LayerMoments]:
        """Return a finished layer, and let the writer know of its tensors."""
        kept = self._kept[name]
        for tensor, dtype, shape in kept.tensors:
            writer.adopt(tensor, dtype_of(dtype), tuple(shape))
        return kept.fitted, kept.moments

    def _path(self, name: str, suffix: str) -> Path:
        assert self._folder is not None
        return self._folder / "layers" / f"{self._places[name]:05d}.{suffix}"


def _values(fitted: FittedLayer, moments: LayerMoments) -> dict[str, Tensor]:
    """The tensors of a finished layer's file."""
    own = {"outside": fitted.outside_N, "coefficients": fitted.coefficients}
    return {**moment_tensors(fitted.name, moments), **own}


def check_workspace(workspace: str | os.PathLike[str] | None) -> None:
    """Raise OutputError unless a workspace is a folder that may be written to; call it before long work starts."""
    if workspace is None:
        return
    if not os.path.isdir(workspace):
        what, next_step = "is not a folder", "create it, or leave the workspace out"
    elif not os.access(workspace, os.W_OK | os.X_OK):
        locked = os.statvfs(workspace).f_flag & os.ST_RDONLY
        what = f"cannot be written to ({os.strerror(errno.EROFS if locked else errno.EACCES)})"
        next_step = "choose a folder that you may write to"
    else:
        return
    rule = "a workspace is a folder on the disk where the bundle will be saved"
    raise OutputError(what, where=str(workspace), rule=rule, next_step=next_step)


@contextmanager
def work_folder(workspace: Path | None, key: str) -> Iterator[tuple[Path, bool]]:
    """Give the folder of a fit's work, and whether it lasts beyond an interruption.

    Without a workspace, and where another process is at the same fit, it is a temporary folder. It is removed at the end, and
    after an error that would come again; what interrupts (a signal, a full disk, a kill) leaves it.
    """
    if workspace is None:
        with TemporaryFolder() as name:
            yield Path(name), False
        return
    sweep(workspace)
    folder = workspace / f"{PREFIX}{key[:32]}"
    lock = _claim(folder)
    if lock is None:
        with TemporaryFolder(workspace) as name:
            yield Path(name), False
        return
    try:
        _begin_anew_after_restart(folder)
        yield folder, True
        shutil.rmtree(folder, ignore_errors=True)
    except (OutputError, FormatError):
        # A full disk, or a store that does not answer, as a rule: another day there may be room, and an answer.
        raise
    except EigenzooError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def _claim(folder: Path) -> int | None:
    """Make the folder and take its lock; None where another process has it, or is just removing it, or where it is not ours.

    In a folder that many may write to, a stranger may have put one of this name there, with links to other people's files in it.
    """
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
            return None
        # Between opening and locking, the fit that had it may have removed the folder.
        return locked(folder / "lock", os.O_CREAT | os.O_RDWR)
    except OSError:
        return None


def _begin_anew_after_restart(folder: Path) -> None:
    """Empty the folder unless the system that wrote it is still running: only then is all that was written there."""
    mark, running = folder / "system", running_system()
    if not running or not mark.exists() or mark.read_text() != running:
        for part in ("bundle", "layers"):
            shutil.rmtree(folder / part, ignore_errors=True)
        mark.write_text(running)
    (folder / "bundle").mkdir(exist_ok=True)


def sweep(workspace: Path) -> None:
    """Remove work that nobody is at, and that nobody has gone on with for a week."""
    for folder in workspace.glob(f"{PREFIX}*"):
        try:
            if folder.is_symlink() or time.time() - (folder / "layers").stat().st_mtime < STALE_SECONDS:
                continue
            lock = _claim(folder)
        except OSError:
            continue
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)
