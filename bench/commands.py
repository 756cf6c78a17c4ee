"""Every command that touches weights, as a whole process: time, memory and bytes read, alone and beside a busy neighbour.

    python -m bench --only commands

The collection's first models are the zoo; the others are projected, added and evaluated. Each run begins with an empty cache of
moments and with the files in memory. The neighbour keeps every processor busy for as long as a command runs.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.child import NO_LIMITS, ROOT, Limits
from bench.collection import Collection, make
from bench.machine import thread_environment
from bench.peers import PEERS
from bench.sizes import LONG, CommandsPlan
from bench.suite import WARM, Record, prepare, tell

VIEW = ("--view", "factors")
BUSY = "while True: pass"
READ_BYTES = 2**22


@dataclass(frozen=True)
class Inputs:
    """What commands are given.

    Attributes:
        old, new: folders of models: the zoo, and those that come later.
        folder: holds `bundle`, a fit of the zoo that nothing changes, and `vlora`, what vLoRA saved of the later models.
    """

    old: Sequence[Path]
    new: Sequence[Path]
    folder: Path
    rank: int

    @property
    def bundle(self) -> Path:
        return self.folder / "bundle"

    @property
    def zoo(self) -> Path:
        """A list of the zoo's models: a hundred paths are too many for some command lines."""
        return self.folder / "zoo.txt"


def _eigenzoo(*words: object) -> list[str]:
    return ["-m", "eigenzoo", *map(str, words), "--quiet"]


READ_ONCE, START = "read every file once", "start: inspect one adapter"
COMMANDS: dict[str, Callable[[Inputs, Path], list[str]]] = {
    READ_ONCE: lambda has, out: ["-m", "bench.commands", "read", *map(str, has.old)],
    START: lambda has, out: _eigenzoo("inspect", has.old[0], *VIEW, "--json"),
    "inspect": lambda has, out: _eigenzoo("inspect", has.zoo, *VIEW, "--json"),
    "fit": lambda has, out: _eigenzoo("fit", has.zoo, "-o", out, "--rank", has.rank, *VIEW),
    "plan": lambda has, out: _eigenzoo("plan", has.zoo, *VIEW),
    "evidence": lambda has, out: _eigenzoo("evidence", has.zoo, "--rank", has.rank, *VIEW),
    "verify": lambda has, out: _eigenzoo("verify", has.bundle),
    "project": lambda has, out: _eigenzoo("project", has.bundle, *has.new),
    "rebuild": lambda has, out: _eigenzoo("rebuild", has.bundle, has.old[0].name, "-o", out),
    "add": lambda has, out: _eigenzoo("add", has.bundle, *has.new, "-o", out),
    "evaluate": lambda has, out: _eigenzoo(
        "evaluate", has.bundle, "--metric", "os.path:getsize", *(f"--models={path}" for path in has.new)
    ),
    "import": lambda has, out: _eigenzoo("import", has.folder / "vlora", "-o", out, "--like", has.new[0]),
}
"""What is run, in this order: Python's arguments. `os.path:getsize` is a metric that reads nothing."""


def run_commands(plan: CommandsPlan, threads: int, home: Path, repeats: int, limits: Limits) -> list[Record]:
    """Run every command alone and beside a neighbour; the fastest run of each counts."""
    collection = make(plan.recipe, plan.old + plan.new, home, tell)
    with tempfile.TemporaryDirectory(dir=home, prefix=".bench-") as name:
        has = _inputs(collection, plan, threads, Path(name))
        rows = []
        for command in COMMANDS:
            if command == "import" and PEERS["vlora"].missing:
                tell(f"commands: import is left out, {PEERS['vlora'].missing}")
                continue
            tell(f"commands, threads {threads}: {command}")
            alone = _fastest(command, has, threads, collection, repeats, limits)
            shares = {"bytes": sum(_size(path) for path in has.old), "basis": _basis_bytes(has.bundle)}
            row = {"command": command, "threads": threads, "old": plan.old, "new": plan.new, **shares, **alone}
            if command in plan.beside or not plan.beside:
                with neighbour():
                    beside = _fastest(command, has, threads, collection, repeats, limits)
                row |= {"beside": beside, "times_alone": beside["wall"] / alone["wall"]}
            rows.append(row)
    # Of the process that reads, the reading alone; of a command, all but what it takes on one adapter: the imports.
    once, start = (next(row for row in rows if row["command"] == name) for name in (READ_ONCE, START))
    seconds = float(once["said"])
    return [
        row if row in (once, start) else row | {"times_read": max(row["wall"] - start["wall"], 0) / seconds}
        for row in rows
    ]


def _inputs(collection: Collection, plan: CommandsPlan, threads: int, folder: Path) -> Inputs:
    """Make what commands are given."""
    has = Inputs(collection.paths[: plan.old], collection.paths[plan.old :], folder, plan.recipe.planted)
    has.zoo.write_text("\n".join(map(str, has.old)), encoding="utf-8")
    made = [COMMANDS["fit"](has, has.bundle)]
    if not PEERS["vlora"].missing:
        made.append(["-m", "bench.commands", "vlora", *map(str, has.new), str(folder / "vlora")])
    for arguments in made:
        measured(arguments, _environment(threads, folder, folder), NO_LIMITS)
    return has


def _fastest(command: str, has: Inputs, threads: int, collection: Collection, repeats: int, limits: Limits) -> Record:
    best: Record = {}
    for _ in range(repeats):
        prepare(collection.files, WARM)
        with tempfile.TemporaryDirectory(dir=has.folder) as scratch:
            found = measured(
                COMMANDS[command](has, Path(scratch) / "out"), _environment(threads, has.folder, Path(scratch)), limits
            )
        best = found if not best or found["wall"] < best["wall"] else best
        if found["wall"] > LONG:
            break
    return best


def measured(arguments: Sequence[str], environment: dict[str, str], limits: Limits) -> Record:
    """Run Python with these arguments; returns wall and processor seconds, peak memory, and bytes that it asked the system for.

    Bytes are of `read` and its like, wherever they came from (`rchar`), Python's own files included; None where the system
    does not say. `said` is the last line that it printed. Raises RuntimeError for a command that fails or takes too long.
    """
    with tempfile.TemporaryFile() as output:
        started = time.perf_counter()
        process = subprocess.Popen([sys.executable, *arguments], stdout=output, stderr=output, env=environment)
        try:
            while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                if time.perf_counter() - started > limits.seconds:
                    raise RuntimeError(f"{' '.join(arguments[:4])} …: stopped after {limits.seconds:.0f} s")
                time.sleep(0.002)
            wall = time.perf_counter() - started
            read = _bytes_read(process.pid)
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        finally:
            if process.returncode is None:
                process.kill()
                process.wait()
        output.seek(0)
        said = output.read().decode(errors="replace").strip()
        if process.returncode:
            raise RuntimeError(f"{' '.join(arguments[:4])} …: exit status {process.returncode}\n{said[-2000:]}")
    peak = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "wall": wall,
        "cpu": used.ru_utime + used.ru_stime,
        "peak_rss": peak,
        "read": read,
        "said": said.rpartition("\n")[2],
    }


def _bytes_read(process: int) -> int | None:
    """Bytes that a process has read, ended but not waited for."""
    try:
        lines = Path(f"/proc/{process}/io").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return int(dict(line.split(": ") for line in lines)["rchar"])


@contextmanager
def neighbour() -> Iterator[None]:
    """Keep every processor busy with other work while inside."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    busy = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(processors)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def _environment(threads: int, folder: Path, scratch: Path) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    # Python keeps what it has compiled, as it does for users, whatever the environment says.
    kept = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(folder / "bytecode")}
    return {**thread_environment(threads), **kept, "PYTHONPATH": path, "EIGENZOO_CACHE": str(scratch / "cache")}


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _basis_bytes(bundle: Path) -> int:
    return sum(path.stat().st_size for path in bundle.glob("basis*.safetensors"))


def read_all(folders: Sequence[Path]) -> None:
    """Read every file of some folders once, into memory that is used again."""
    room = bytearray(READ_BYTES)
    for path in (path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()):
        with path.open("rb", buffering=0) as file:
            while file.readinto(room):
                pass


def save_vlora(folders: Sequence[Path], target: Path) -> None:
    """Let vLoRA fit some adapters, and save what it found."""
    import vlora

    adapters = [vlora.load_adapter(path) for path in folders]
    vlora.SharedSubspace.from_adapters(adapters, num_components=len(folders) - 1).save(target)


def main() -> None:
    """Run one of the two jobs that are not commands of eigenzoo, in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["read", "vlora"])
    parser.add_argument("paths", type=Path, nargs="+")
    asked = parser.parse_args()
    if asked.what == "read":
        started = time.perf_counter()
        read_all(asked.paths)
        print(time.perf_counter() - started)
    else:
        save_vlora(asked.paths[:-1], asked.paths[-1])


if __name__ == "__main__":
    main()
