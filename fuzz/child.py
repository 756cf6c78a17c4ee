"""One target under atheris: `python -m fuzz.child TARGET CORPUS FINDINGS -max_total_time=60 …`. Only eigenzoo is instrumented.

An exception that no reader raises on purpose is written down once, by its type and place, and the run goes on; what ends the
process (a crash of native code, no answer, too much memory) libFuzzer writes down itself.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from random import Random

import atheris
import torch

with atheris.instrument_imports(include=["eigenzoo"]):
    from fuzz.targets import TARGETS

from fuzz.limits import limited_memory
from fuzz.mutations import mutate


class Findings:
    """A folder of inputs, one for each kind of failure that this run has met."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: set[str] = set()

    def note(self, data: bytes, error: BaseException) -> None:
        """Keep an input, unless one that fails in the same way is kept."""
        own = [frame for frame in traceback.extract_tb(error.__traceback__) if "/eigenzoo/" in frame.filename]
        place = f"{own[-1].filename.rpartition('/')[2]}:{own[-1].name}" if own else "outside"
        kind = f"{type(error).__name__} {place}"
        if kind in self._known:
            return
        self._known.add(kind)
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"{type(error).__name__}-{hashlib.sha256(data).hexdigest()[:12]}"
        path.write_bytes(data)
        print(f"FINDING {kind}: {str(error)[:200]!r} in {path}", file=sys.stderr, flush=True)
        traceback.print_exception(error)


def main() -> None:
    """Fuzz one target until libFuzzer has had enough."""
    name, corpus, findings = sys.argv[1], Path(sys.argv[2]), Findings(Path(sys.argv[3]))
    logging.disable()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="eigenzoo-fuzz-", dir=place) as folder:
        os.environ["EIGENZOO_CACHE"] = f"{folder}/cache"
        parser = TARGETS[name](Path(folder))
        corpus.mkdir(parents=True, exist_ok=True)
        for number, seed in enumerate(parser.seeds):
            (corpus / f"seed-{number}").write_bytes(seed)

        def changed(data: bytes, max_size: int, seed: int) -> bytes:
            def bytewise(given: bytes) -> bytes:
                return bytes(atheris.Mutate(given, max(len(given) + 64, 256)))

            return mutate(data, parser.kind, Random(seed), bytewise)[:max_size]

        def test(data: bytes) -> None:
            try:
                parser.survives(data)
            except Exception as error:
                findings.note(data, error)

        with limited_memory():
            atheris.Setup([sys.argv[0], str(corpus), *sys.argv[4:]], test, custom_mutator=changed)
            atheris.Fuzz()


if __name__ == "__main__":
    main()
