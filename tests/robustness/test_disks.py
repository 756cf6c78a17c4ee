"""A disk that is full, or that nobody may write to: one clear error, exit code 2, the old output whole, nothing beside it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from killed import answer_of, command, digest, hidden, side_by_side
from operations import write_start
from safetensors import SafetensorError
from safetensors.torch import save_file

from eigenzoo.errors import OutputError
from eigenzoo.formats.output.whole import new_folder
from sampling import slow_but

ROOM = 2**20
"""Bytes of the small disk."""

COMMANDS = {
    "fit": ("fitted", ["fit", "{}/zoo", "-o", "{}/fitted", "--rank", "3", "--no-cache", "--quiet"]),
    "fit --force": ("bundle", ["fit", "{}/zoo", "-o", "{}/bundle", "--rank", "3", "--no-cache", "--quiet", "--force"]),
    "add": ("bundle", ["add", "{}/bundle", "{}/more/new", "--quiet"]),
    "add --refresh": ("bundle", ["add", "{}/bundle", "{}/more/new", "--refresh", "--quiet"]),
    "rebuild": ("model", ["rebuild", "{}/bundle", "m1", "-o", "{}/model"]),
    "report": ("page.csv", ["report", "{}/bundle", "-o", "{}/page.csv", "--no-cache", "--quiet"]),
}
_PRIVATE, _REC, _RDONLY, _REMOUNT, _NEWNS = 1 << 18, 1 << 14, 1, 1 << 5, 0x20000


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("start")
    write_start(root)
    # Once here, so that children find every module imported: another user could not read them.
    command("inspect", root / "zoo")
    for name in COMMANDS:
        command(*words_of(name, Path(shutil.copytree(root, tmp_path_factory.mktemp("once") / "root"))))
    return root


def words_of(name: str, root: Path) -> list[object]:
    return [word.format(root) for word in COMMANDS[name][1]]


@pytest.mark.parametrize("name", slow_but(COMMANDS, ["fit --force", "rebuild"]))
def test_files_that_may_not_grow(name: str, start: Path, tmp_path: Path) -> None:
    """By a limit of the process instead of a full disk, which takes no privilege: every write beyond it fails."""
    root = Path(shutil.copytree(start, tmp_path / "root"))
    output = root / COMMANDS[name][0]
    old = digest(output)

    def limited(num_bytes: int) -> Callable[[], None]:
        def limit() -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))

        return limit

    for num_bytes in (0, 100, 1000, 2500):
        (answer,) = answer_of(words_of(name, root), prepare=limited(num_bytes))
        if answer.code == 0:
            assert num_bytes > 0
            break
        assert answer.code == 2, answer
        assert "File too large" in answer.said
        assert "Traceback" not in answer.said
        assert digest(output) == old
        assert unfinished(root) == []
    (answer,) = answer_of(words_of(name, root) if answer.code else ["--version"])
    assert answer.code == 0, answer
    assert digest(output) != old
    assert hidden(root) == []


@pytest.mark.parametrize("name", slow_but(COMMANDS, ["fit --force", "rebuild"]))
def test_a_full_disk(name: str, start: Path, tmp_path: Path) -> None:
    with mounted(tmp_path / "disk") as disk:
        if not disk:
            pytest.skip("no file system can be mounted here")
        root = disk / "root"

        def fill() -> None:
            """Leave less and less room until there is none, and then more and more until the command ends well."""
            mount(disk, f"size={ROOM}")
            shutil.copytree(start, root)
            output, refused = root / COMMANDS[name][0], 0
            old = digest(output)
            for free in (0, 4, 12, 28, 60, 124, 252, 400):
                ballast(disk, free * 2**10)
                (answer,) = answer_of(words_of(name, root))
                if answer.code == 0:
                    break
                refused += 1
                assert answer.code == 2, answer
                assert "No space left" in answer.said, answer
                assert digest(output) == old, f"{free} KiB free"
                assert unfinished(root) == []
            assert refused
            assert answer.code == 0, answer
            assert digest(output) not in (old, None)
            assert hidden(root) == []

        for _ in side_by_side(fill):
            pass


@pytest.mark.parametrize("name", slow_but(COMMANDS, ["fit --force", "rebuild"]))
def test_a_disk_that_is_read_only(name: str, start: Path, tmp_path: Path) -> None:
    with mounted(tmp_path / "disk") as disk:
        if not disk:
            pytest.skip("no file system can be mounted here")
        root = disk / "root"

        def refuse() -> None:
            mount(disk, f"size={ROOM}")
            shutil.copytree(start, root)
            before = digest(root)
            mount(disk, "", _REMOUNT | _RDONLY)
            (answer,) = answer_of(words_of(name, root))
            assert answer.code == 2, answer
            assert "Read-only file system" in answer.said
            assert "Traceback" not in answer.said
            assert digest(root) == before

        for _ in side_by_side(refuse):
            pass


@pytest.mark.parametrize("name", slow_but(COMMANDS, ["fit --force", "rebuild"]))
def test_a_folder_of_somebody_else(name: str, start: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(shutil.copytree(start, f"{folder}/root"))
        os.chmod(folder, 0o755)
        for path in [root, *root.rglob("*")]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        before = digest(root)

        (answer,) = answer_of(words_of(name, root), prepare=become_nobody)
        assert answer.code == 2, answer
        assert "Permission denied" in answer.said
        assert "Traceback" not in answer.said
        assert digest(root) == before
        for path in [root, *root.rglob("*")]:
            path.chmod(0o755)


def test_a_folder_of_a_zoo_that_nobody_else_may_look_into(start: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(shutil.copytree(start, f"{folder}/root"))
        os.chmod(folder, 0o755)
        root.chmod(0o755)
        (root / "zoo" / "closed").mkdir(mode=0o000)
        (answer,) = answer_of(["inspect", root / "zoo"], prepare=become_nobody)
        assert answer.code == 2, answer
        assert "FormatError" in answer.said
        assert "cannot be listed (Permission denied)" in answer.said


def test_what_the_library_of_safetensors_says_of_a_full_disk(tmp_path: Path) -> None:
    def write(path: Path) -> None:
        before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        try:
            save_file({"w": torch.zeros(1000)}, path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, handler)

    with pytest.raises(OutputError, match=r"out: cannot be written \(File too"), new_folder(tmp_path / "out") as folder:
        write(folder / "w.safetensors")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(SafetensorError, match="os error 2"), new_folder(tmp_path / "out") as folder:
        save_file({"w": torch.zeros(4)}, folder / "none" / "w.safetensors")


def become_nobody() -> None:
    """Lose the privileges that look past a folder's mode."""
    if os.getuid() == 0:
        os.setgid(65534)
        os.setuid(65534)


def unfinished(root: Path) -> list[str]:
    """What is hidden in a folder, but for the work of a fit that goes on when there is room again."""
    return [name for name in hidden(root) if not name.startswith(".eigenzoo-fit-")]


def ballast(disk: Path, free: int) -> None:
    """Fill a disk up to so many bytes."""
    (disk / "ballast").unlink(missing_ok=True)
    for left in (disk / "root").glob(".eigenzoo-fit-*"):
        shutil.rmtree(left)
    status = os.statvfs(disk)
    size = status.f_bavail * status.f_frsize - free
    assert size > 0, "the disk is too small to leave so much"
    (disk / "ballast").write_bytes(bytes(size))


@contextlib.contextmanager
def mounted(place: Path) -> Iterator[Path | None]:
    """Give a folder that a child may mount a disk on, in a view of the file systems of its own; None where that is not allowed."""
    place.mkdir()
    child = os.fork()
    if child == 0:
        try:
            mount(place, f"size={ROOM}")
        except OSError:
            os._exit(1)
        os._exit(0)
    allowed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    yield place if allowed else None


def mount(place: Path, options: str, flags: int = 0) -> None:
    """Mount a disk in memory; what this process and its children see of it nobody else does."""
    libc = ctypes.CDLL(None, use_errno=True)

    def call(function: str, *given: object) -> None:
        if getattr(libc, function)(*given) != 0:
            raise OSError(ctypes.get_errno(), f"{function}: {os.strerror(ctypes.get_errno())}")

    if not flags:
        call("unshare", _NEWNS)
        call("mount", b"none", b"/", None, ctypes.c_ulong(_PRIVATE | _REC), None)
    call("mount", b"none", os.fsencode(place), b"tmpfs", ctypes.c_ulong(flags), options.encode() or None)
