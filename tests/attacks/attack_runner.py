"""What an attack is, the sandbox that it happens in, and what is asked of every one."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from guard import HANG

MOST_BYTES = 10**9
"""Peak memory that an attack may cost, the libraries' own hundreds of megabytes in it."""

MOST_SECONDS = 25
"""Processor time after which a command counts as hung. The promise is 5: a processor may be shared with another thread."""

EVERY = 64
"""Of each kind of attack, one in so many is not slow."""

PLAIN = [
    "eigenzoo.cli.app",
    "eigenzoo.subspace.growth",
    "eigenzoo.subspace.fitting.fit",
    "eigenzoo.evidence.evidence",
    "eigenzoo.evidence.function",
    "eigenzoo.zoo.inspection",
    "eigenzoo.subspace.fitting.plan",
    "eigenzoo.report.page",
    "eigenzoo.evidence.presentation",
    "eigenzoo.adapt.rebuilding",
    "eigenzoo.merge.merging",
    "eigenzoo.routing.router",
    "eigenzoo.subspace.recall",
    "torch._weights_only_unpickler",
    "eigenzoo.integrations.cluster",
    "eigenzoo.subspace.imports.importing",
    "eigenzoo.zoo.adapter_verifying",
    "huggingface_hub",
    # Imported where they are needed: by reports, evidence, cards, and every command.
    *[
        "matplotlib.backends.backend_svg",
        "scipy.cluster.hierarchy",
        "huggingface_hub.repocard_data",
        "pydantic.type_adapter",
    ],
]
ADAPT = [
    *PLAIN,
    *["eigenzoo.integrations.classification", "transformers", "datasets", "PIL.Image", "tokenizers", "peft"],
    *["diffusers.loaders.lora_pipeline", "diffusers.pipelines.wan.pipeline_wan"],
    "transformers.models.llama.modeling_llama",
    "transformers.models.bert.modeling_bert",
    "transformers.models.auto.modeling_auto",
    "transformers.models.vit.modeling_vit",
]


@dataclass(frozen=True)
class Ran:
    """What one command left behind: `seconds` of processor time, `peak` in bytes."""

    words: tuple[str, ...]
    code: int | None
    signal: int | None
    seconds: float
    peak: int
    out: str
    err: str


class Server:
    """A process of `attack_server.py`."""

    def __init__(self, modules: Sequence[str], folder: Path) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-W",
                "ignore::DeprecationWarning",
                str(Path(__file__).with_name("attack_server.py")),
                *modules,
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert self._answer() == "ready\n"

    def _answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Run one command."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._answer())
        return answer

    def stop(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=HANG)
        assert self.process.stdout is not None
        self.process.stdout.close()


@dataclass
class Sandbox:
    """A folder of its own for one attack.

    Attributes:
        root: of everything.
        files: what the attacker wrote; the zoo and the bundle of honest models lie there as copies when they are asked for.
        work: the working folder; outputs are named `out*` in it, and nothing else may appear or change anywhere.
        canary: what an attacker's code would make.
        honest: folders that are copied into the sandbox: zoo, bundle, adapters and so on.
    """

    root: Path
    honest: Callable[[str], Path]
    server: Callable[[str], Server]
    ran: list[Ran] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in ("files", "work", "home", "temporary", "cache"):
            (self.root / name).mkdir()
        (self.root / "home" / "diary.txt").write_text("private")
        (self.root / "secret.txt").write_text("secret")

    @property
    def files(self) -> Path:
        """The attacker's files."""
        return self.root / "files"

    @property
    def work(self) -> Path:
        """The working folder."""
        return self.root / "work"

    @property
    def canary(self) -> Path:
        """What an attacker's code would make."""
        return self.root / "canary"

    @property
    def secret(self) -> Path:
        """A file of the user's."""
        return self.root / "secret.txt"

    def copy(self, name: str, to: str | None = None) -> Path:
        """Copy an honest zoo, bundle or model into the attacker's files."""
        target = self.files / (to or name)
        if not target.exists():
            source = self.honest(name)
            shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
        return target

    def run(self, *words: object, before: str = "", adapt: bool = False) -> Ran:
        """Run one command in the working folder; a memory beyond twice the promise is cut off."""
        out, err = self.root.parent / f"{self.root.name}.out", self.root.parent / f"{self.root.name}.err"
        answer = self.server("adapt" if adapt else "plain").ask(
            {
                "words": [str(word) for word in words],
                "folder": str(self.work),
                "environment": {
                    "HOME": str(self.root / "home"),
                    "TMPDIR": str(self.root / "temporary"),
                    "EIGENZOO_CACHE": str(self.root / "cache"),
                    "XDG_CACHE_HOME": str(self.root / "cache"),
                },
                "out": str(out),
                "err": str(err),
                "most_seconds": MOST_SECONDS,
                "hang": HANG,
                "most_bytes": 2 * MOST_BYTES,
                "before": before,
            }
        )
        texts = [path.read_bytes().decode("utf-8", "surrogateescape") for path in (out, err)]
        for path in (out, err):
            path.unlink()
        ran = Ran(tuple(map(str, words)), answer["code"], answer["signal"], answer["seconds"], answer["peak"], *texts)
        self.ran.append(ran)
        return ran

    def snapshot(self) -> dict[str, object]:
        """Everything but the cache and outputs, as it can be seen from outside: kinds, sizes, times, links, contents.

        Torch makes an empty folder for its compiler wherever that is imported, as diffusers does.
        """
        return {
            name: state
            for name, state in _tree(self.root)
            if not name.startswith(("cache/", "work/out"))
            and name not in ("cache", "work", "temporary")
            and not (name.startswith("temporary/torchinductor_") and name.count("/") == 1)
        }


def _tree(root: Path) -> Iterator[tuple[str, object]]:
    for above, folders, files in os.walk(os.fsencode(root)):
        for entry in [*folders, *files]:
            path = os.path.join(above, entry)
            status = os.lstat(path)
            name = os.path.relpath(path, os.fsencode(root)).decode("utf-8", "surrogateescape")
            content: object = None
            if stat.S_ISLNK(status.st_mode):
                content = os.readlink(path)
            elif stat.S_ISREG(status.st_mode):
                # Of what is large and sparse, the ends; time and size tell of the rest.
                with open(path, "rb") as file:
                    data = file.read(2**20)
                    if status.st_size > 2**20:
                        file.seek(-(2**10), os.SEEK_END)
                        data += file.read()
                content = hashlib.sha256(data).hexdigest()
            yield name, (stat.S_IFMT(status.st_mode), status.st_size, status.st_mtime_ns, content)


Words = tuple[object, ...]


SAFE = frozenset({0})
FAILED = frozenset({1})
REFUSED = frozenset({2})
EITHER = SAFE | REFUSED
ANY = EITHER | FAILED


@dataclass(frozen=True)
class Attack:
    """One attack.

    Attributes:
        name: what it tries.
        build: writes the attacker's files, and gives the commands that a victim runs.
        codes: what the commands may answer: 2 where the input is refused, 0 where it does no harm, 1 where a check fails.
        says: what the message holds where it is refused.
        adapt: whether transformers and datasets are needed.
        after: what else must hold when everything has run.
        before: Python that the command runs first, to be an attacker who is at work at the same time.
    """

    name: str
    build: Callable[[Sandbox], Sequence[Words]]
    codes: frozenset[int] = REFUSED
    says: str = ""
    adapt: bool = False
    after: Callable[[Sandbox], None] | None = None
    before: str = ""


def thinned(attacks: Sequence[Attack]) -> list[Any]:
    """One attack in `EVERY` of each kind, and one at least; the others are slow. Its kind is what stands before the colon."""
    seen: Counter[str] = Counter()
    found = []
    for attack in attacks:
        kind = attack.name.partition(":")[0]
        slow = [pytest.mark.slow] if seen[kind] % EVERY else []
        seen[kind] += 1
        found.append(pytest.param(attack, id=attack.name, marks=slow))
    return found


def carry_out(attack: Attack, sandbox: Sandbox) -> None:
    """Run an attack's commands, and hold each to the promise."""
    for words in attack.build(sandbox):
        before, there = sandbox.snapshot(), set(sandbox.work.iterdir())
        ran = sandbox.run(*words, before=attack.before, adapt=attack.adapt)
        judge(attack, sandbox, ran)
        changed = {name for name, _ in before.items() ^ sandbox.snapshot().items()}
        assert not changed, f"{ran.words}: touched {sorted(changed)[:5]}"
        for path in set(sandbox.work.iterdir()) - there:
            if ran.code != 0:
                raise AssertionError(f"{ran.words}: an output of a command that failed: {path.name}")
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    if attack.after is not None:
        attack.after(sandbox)


def judge(attack: Attack, sandbox: Sandbox, ran: Ran) -> None:
    """Hold one command to the promise."""
    figures = f"{ran.code}, {ran.seconds:.1f} s, {ran.peak / 1e6:.0f} MB"
    told = f"{ran.words[0]} {ran.words[1:]} -> {figures}\n{ran.out[-600:]}\n{ran.err[-1500:]}"
    assert not sandbox.canary.exists(), f"code was run: {told}"
    assert ran.signal is None, f"killed by signal {ran.signal} (24: too long, 9: a hang or too much memory): {told}"
    assert ran.peak < MOST_BYTES, f"memory: {told}"
    assert "Traceback" not in ran.err, told
    for text in (ran.out, ran.err):
        odd = sorted({char for char in text if not char.isprintable() and char != "\n"})
        assert not odd, f"raw characters {odd}: {told}"
    codes = attack.codes | ({1} if ran.words[0] == "verify" and 2 in attack.codes else set())
    assert ran.code in codes, told
    if ran.code == 2:
        assert len(ran.err.strip().splitlines()) == 1, f"not one line: {told}"
        assert ran.out == "", told
        assert len(ran.err) < 8000, f"{len(ran.err)} characters of message"
    else:
        assert ran.err == "", told
    if ran.code == 2 and attack.says:
        assert re.search(attack.says, ran.err), told
