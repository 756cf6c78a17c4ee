"""`python -m fuzz [TARGET …] --seconds 60`: fuzz every parser for a time, one after the other, and say what was found.

Inputs that fail are kept in tests/fuzz_findings/TARGET, where the tests replay them; inputs that reach new code in .fuzz/TARGET,
from which the next run goes on.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path

from fuzz.targets import TARGETS

ROOT = Path(__file__).parent.parent
FINDINGS, CORPUS = ROOT / "tests" / "fuzz_findings", ROOT / ".fuzz"
TIMEOUT, MEMORY_MB, MAX_BYTES = 10, 3000, 65536


def fuzz(name: str, seconds: float, corpus: Path, log: Path) -> tuple[int, float, int]:
    """Fuzz one target; returns how many inputs were read, in how many seconds, and how many ways to fail were found."""
    executed, found, started = 0, 0, time.monotonic()
    while (left := round(started + seconds - time.monotonic())) > 0:
        findings = FINDINGS / name
        findings.mkdir(parents=True, exist_ok=True)
        limits = [
            f"-timeout={TIMEOUT}",
            f"-rss_limit_mb={MEMORY_MB}",
            f"-max_len={MAX_BYTES}",
            f"-artifact_prefix={findings}/",
        ]
        command = [sys.executable, "-m", "fuzz.child", name, str(corpus / name), str(findings), *limits]
        command += [f"-max_total_time={left}", "-print_final_stats=1"]
        with log.open("ab") as file:
            code = subprocess.run(command, cwd=ROOT, stdout=file, stderr=file, check=False).returncode
        said = log.read_bytes()[-200_000:].decode("utf-8", "replace").rpartition("INFO: Running with entropic")[2]
        counts = re.findall(r"stat::number_of_executed_units: (\d+)|^#(\d+)\s", said, re.MULTILINE)
        executed += max([int(done or line) for done, line in counts], default=0)
        found += said.count("FINDING ")
        if code == 0:
            break
        found += 1
        if not counts:
            raise SystemExit(f"{name} does not begin, see {log}")
    if not any((FINDINGS / name).iterdir()):
        (FINDINGS / name).rmdir()
    return executed, time.monotonic() - started, found


def main() -> None:
    """Fuzz, print a table, and leave with 1 where anything was found."""
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)}; by default all")
    parser.add_argument("--seconds", type=float, default=60, help="for each target (60)")
    parser.add_argument("--corpus", type=Path, default=CORPUS, help="where inputs are kept, and the logs (.fuzz)")
    asked = parser.parse_args()
    unknown = set(asked.targets) - set(TARGETS)
    if unknown:
        parser.error(f"no target is called {', '.join(sorted(unknown))}")
    asked.corpus.mkdir(parents=True, exist_ok=True)
    total = 0
    print(f"{'target':24} {'executions':>12} {'per second':>11} {'seconds':>8} {'findings':>9}", flush=True)
    for name in asked.targets or TARGETS:
        log = asked.corpus.absolute() / f"{name}.log"
        executed, seconds, found = fuzz(name, asked.seconds, asked.corpus.absolute(), log)
        total += found
        print(f"{name:24} {executed:12,} {executed / seconds:11,.0f} {seconds:8.0f} {found:9}", flush=True)
    sys.exit(1 if total else 0)


if __name__ == "__main__":
    main()
