"""A process that has imported everything and forks one child per command: no imports, and a peak memory of its own.

Reads one JSON request per line ({words, folder, environment, out, err, most_seconds, most_bytes, hang}) and answers with one line
({code, signal, seconds, peak}). A child that takes more processor time than `most_seconds` or more memory than `most_bytes` is
killed, and so is one that has not ended `hang` seconds later.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from typing import Any

PAGE = os.sysconf("SC_PAGE_SIZE")


def run_child(request: dict[str, Any]) -> None:
    """Be the command: never returns."""
    for name, descriptor in (("out", 1), ("err", 2)):
        os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), descriptor)
    os.chdir(request["folder"])
    # The system counts, and stops it by SIGXCPU.
    resource.setrlimit(resource.RLIMIT_CPU, (request["most_seconds"], request["most_seconds"] + 5))
    os.environ.update(request["environment"])
    tempfile.tempdir = None
    sys.argv = ["eigenzoo", *request["words"]]
    code: Any = 0
    try:
        if request.get("before"):
            exec(request["before"], {})
        from eigenzoo.cli.app import main

        main()
    except SystemExit as leave:
        code = leave.code
    except BaseException:
        traceback.print_exc()
        code = 1
    try:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code if isinstance(code, int) else 1)


def resident(process: int) -> int:
    """Bytes of memory that a process holds now."""
    try:
        with open(f"/proc/{process}/statm", "rb") as file:
            return int(file.read().split()[1]) * PAGE
    except (OSError, IndexError):
        return 0


def serve(request: dict[str, Any]) -> dict[str, Any]:
    """Run one command in a fork and say how it went."""
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        run_child(request)
    while True:
        ended, status, usage = os.wait4(child, os.WNOHANG)
        if ended:
            break
        if time.monotonic() - started > request["hang"] or resident(child) > request["most_bytes"]:
            os.kill(child, signal.SIGKILL)
            _, status, usage = os.wait4(child, 0)
            break
        time.sleep(0.002)
    return {
        "code": os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else None,
        "signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else None,
        "seconds": usage.ru_utime + usage.ru_stime,
        "peak": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
    }


def main() -> None:
    """Import what the command line names, then serve until the input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for module in sys.argv[1:]:
        importlib.import_module(module)
    # Children share what was imported, as long as their collectors do not write into it.
    gc.collect()
    gc.freeze()
    answers.write("ready\n")
    answers.flush()
    for line in sys.stdin:
        answers.write(json.dumps(serve(json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
