"""Keep the finished layers of a fit in a folder beside the output, so that an interrupted fit can resume.

    .eigenzoo-fit-<key>/
        lock                     locked by the running fit
        bundle/basis.safetensors the basis written so far
        layers/<number>.json     a finished layer: its record, and the names of its tensors in the basis
        layers/<number>.safetensors  its coefficients, lost energies and moments

The key identifies the zoo's files and the options of the fit. A layer's record is written after its tensors and renamed into place,
so that a layer with a record is finished. A layer whose files are damaged counts as not finished. After a killed process the system
still has all it wrote. After a power loss the fit starts from the beginning, since the folder's mark of the running system differs.
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
"""Work that was not resumed for a week is removed when the next fit in the same folder starts."""


@dataclass(frozen=True)
class FinishedLayer:
    """A finished layer: its fit and moments, and name, dtype and shape of its tensors in the basis, in order."""

    fitted: FittedLayer
    moments: LayerMoments
    tensors: list[tuple[str, str, list[int]]]


class Work:
    """The finished layers of a fit. Without a folder none are kept."""

    def __init__(self, folder: Path | None = None, layers: Sequence[Layer] = ()) -> None:
        self._folder = folder
        self._numbers = {layer.name: number for number, layer in enumerate(layers)}
        self._layers = {layer.name: layer for layer in layers}
        self._finished: dict[str, FinishedLayer] = {}
        if folder is not None:
            (folder / "layers").mkdir(exist_ok=True)
            self._find()

    def __contains__(self, name: str) -> bool:
        return name in self._finished

    def __len__(self) -> int:
        return len(self._finished)

    @property
    def lasts(self) -> bool:
        """Whether finished layers are kept after an interruption."""
        return self._folder is not None

    def _find(self) -> None:
        """Read the finished layers up to the first that is not finished. A basis is written in the order of the layers."""
        for name, layer in self._layers.items():
            try:
                self._finished[name] = self._read(layer)
            except (EigenzooError, OSError, ValueError, KeyError, TypeError):
                return

    def _read(self, layer: Layer) -> FinishedLayer:
        """Read a finished layer. Raises ValueError if its values are not the written ones."""
        document = json.loads(self._path(layer.name, "json").read_bytes())
        file = SafetensorsFile(self._path(layer.name, "safetensors"))
        coefficients, outside_N = file.read("coefficients"), file.read("outside")
        moments = read_moments(file, layer, outside_N.numel())
        record, tensors = document["record"], document["tensors"]
        fit = {**record["fit"], "shape": tuple(record["fit"]["shape"])}
        fitted = FittedLayer(
            layer.name,
            record["form"],
            record["ranks"],
            record["has_mean"],
            coefficients,
            outside_N,
            LayerFit(**fit),
            record["alone"],
        )
        if document["digest"] != digest([record, tensors, document["basis"], checksum(_values(fitted, moments))]):
            raise ValueError("other values than were written")
        for shard, num_bytes in document["basis"]:
            if (self._path(layer.name, "json").parents[1] / "bundle" / shard).stat().st_size < num_bytes:
                raise ValueError("less of the basis than was written")
        return FinishedLayer(fitted, moments, [tuple(item) for item in tensors])

    def keep(self, fitted: FittedLayer, moments: LayerMoments, writer: BasisWriter) -> None:
        """Record a layer as finished, after its tensors are written."""
        if self._folder is None:
            return
        values = _values(fitted, moments)
        path = self._path(fitted.name, "safetensors")
        path.unlink(missing_ok=True)
        entries = [(name, value.dtype, value.shape) for name, value in values.items()]
        write_file(path, entries, values.values(), {REFERENCE: str(moments.num_reference)}, sync=False)
        record = {key: plain(getattr(fitted, key)) for key in ("form", "ranks", "has_mean", "alone")}
        record["fit"] = plain(fitted.record)
        tensors = [(name, dtype_name(dtype), list(shape)) for name, dtype, shape in writer.tensors_of(fitted.name)]
        document = {"record": record, "tensors": tensors, "basis": writer.sizes()}
        document["digest"] = digest([*document.values(), checksum(values)])
        staging = self._path(fitted.name, f"tmp-{secrets.token_hex(4)}")
        staging.write_text(json.dumps(document))
        staging.replace(self._path(fitted.name, "json"))

    def restore(self, name: str, writer: BasisWriter) -> tuple[FittedLayer, LayerMoments]:
        """Return a finished layer, and register its tensors with the writer."""
        finished = self._finished[name]
        for tensor, dtype, shape in finished.tensors:
            writer.adopt(tensor, dtype_of(dtype), tuple(shape))
        return finished.fitted, finished.moments

    def _path(self, name: str, suffix: str) -> Path:
        assert self._folder is not None
        return self._folder / "layers" / f"{self._numbers[name]:05d}.{suffix}"


def _values(fitted: FittedLayer, moments: LayerMoments) -> dict[str, Tensor]:
    """Return the tensors of a finished layer's file."""
    values = {"outside": fitted.outside_N, "coefficients": fitted.coefficients}
    return {**moment_tensors(fitted.name, moments), **values}


def check_workspace(workspace: str | os.PathLike[str] | None) -> None:
    """Raise OutputError unless a workspace is a writable folder. Call this before long work starts."""
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
    """Yield the folder of a fit's work, and whether it is kept after an interruption.

    It is a temporary folder without a workspace, or if another process runs the same fit. It is removed at the end, and after an
    error that would repeat. After an interruption (a signal, a full disk, a kill) it stays.
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
        # Usually a full disk or a store that does not answer. A later attempt may succeed.
        raise
    except EigenzooError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def _claim(folder: Path) -> int | None:
    """Make the folder and lock it. Return None if another process has locked or is removing it, or if another user owns it.

    In a folder that several users can write to, another user may have made a folder of this name with links to files of others.
    """
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
            return None
        # Between opening and locking, another fit may have removed the folder.
        return locked(folder / "lock", os.O_CREAT | os.O_RDWR)
    except OSError:
        return None


def _begin_anew_after_restart(folder: Path) -> None:
    """Empty the folder if the system was restarted since it was written, because then written data may be lost."""
    mark, running = folder / "system", running_system()
    if not running or not mark.exists() or mark.read_text() != running:
        for part in ("bundle", "layers"):
            shutil.rmtree(folder / part, ignore_errors=True)
        mark.write_text(running)
    (folder / "bundle").mkdir(exist_ok=True)


def sweep(workspace: Path) -> None:
    """Remove work that no process has locked and that was not resumed for a week."""
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
