"""Signals, with real processes: exit codes, what stays ignored, and what a process that calls `main` gets back."""

from __future__ import annotations

import builtins
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from cli_runner import Run

from eigenzoo.__main__ import main
from guard import HANG
from sampling import slow_but

QUIET = {**os.environ, "OMP_NUM_THREADS": "1"}

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}

WAITING = f"""
import sys, time
from eigenzoo.subspace.fitting import writing
def wait(*args, **kwargs):
    print("now", file=sys.stderr, flush=True)
    deadline = time.monotonic() + {HANG}
    while time.monotonic() < deadline:
        time.sleep(0.01)
writing.write_moments = wait
sys.argv = ["eigenzoo", *sys.argv[1:]]
from eigenzoo.cli.app import main
main()
"""
"""A fit that waits for a signal when it is nearly done.

It sleeps for short times: the second of two signals may reach another thread, and then Python 3.11 looks for both only when the
main thread takes the GIL again.
"""

SWALLOWING = WAITING.replace(
    """    print("now", file=sys.stderr, flush=True)
""",
    f"""\
    class Swallowing:
        def __del__(self):
            print("now", file=sys.stderr, flush=True)
            time.sleep({HANG})
    sys.unraisablehook = lambda error: print("swallowed", file=sys.stderr, flush=True)
    Swallowing()
    print("past the finalizer", file=sys.stderr, flush=True)
""",
)
"""Such a fit, whose first signal comes while a finalizer runs."""


def _start(
    zoo: Path, output: Path, ignored: Sequence[signal.Signals] = (), fit: str = WAITING
) -> subprocess.Popen[str]:
    """Begin such a fit with signals ignored, as `nohup` and shells' jobs in the background begin it; returns while it waits."""
    code = (
        f"import signal\nfor number in {[int(number) for number in ignored]}: signal.signal(number, signal.SIG_IGN)\n"
    )
    code += "import os, sys\nos.execv(sys.executable, [sys.executable, '-c', *sys.argv[1:]])"
    process = subprocess.Popen(
        [sys.executable, "-c", code, fit, "fit", str(zoo), "-o", str(output), "--rank", "2", "--no-cache"],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=QUIET,
    )
    assert process.stderr is not None
    assert process.stderr.readline() == "now\n", process.communicate()
    return process


@pytest.mark.parametrize("number", slow_but(CODES, [signal.SIGINT]))
def test_the_exit_code_says_which_signal_ended_the_command(zoo: Path, tmp_path: Path, number: signal.Signals) -> None:
    process = _start(zoo, tmp_path / "out")
    process.send_signal(number)
    out, err = process.communicate(timeout=HANG)
    assert (process.returncode, out) == (CODES[number], "")
    assert err.startswith("interrupted: no output was written")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "ignored",
    slow_but([(signal.SIGHUP,), (signal.SIGINT,), (signal.SIGHUP, signal.SIGINT)], [(signal.SIGHUP, signal.SIGINT)]),
)
def test_a_signal_that_the_process_ignores_stays_ignored(
    zoo: Path, tmp_path: Path, ignored: tuple[signal.Signals, ...]
) -> None:
    """Had one of them a handler, it would be the first to be handled, and the exit code its own."""
    process = _start(zoo, tmp_path / "out", ignored)
    for number in ignored:
        process.send_signal(number)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=HANG)
    assert process.returncode == 143
    assert err.startswith("interrupted")


def test_the_second_of_two_signals_does_not_end_the_cleaning_up(zoo: Path, tmp_path: Path) -> None:
    """systemd sends SIGTERM and SIGHUP at once."""
    process = _start(zoo, tmp_path / "out")
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=HANG)
    assert process.returncode == 129
    assert "Traceback" not in err


def test_a_command_whose_finalizer_swallowed_the_first_signal_ends_by_the_third(zoo: Path, tmp_path: Path) -> None:
    process = _start(zoo, tmp_path / "out", fit=SWALLOWING)
    process.send_signal(signal.SIGTERM)
    assert process.stderr is not None
    assert process.stderr.readline() == "swallowed\n"
    # Until here another signal could be swallowed too.
    assert process.stderr.readline() == "past the finalizer\n"
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=HANG)
    assert process.returncode == 143
    assert err.startswith("interrupted")


def test_a_terminal_that_is_gone_is_no_error(zoo: Path, tmp_path: Path) -> None:
    with _start(zoo, tmp_path / "out") as process:
        assert process.stderr is not None
        process.stderr.close()
        process.send_signal(signal.SIGHUP)
        process.wait(timeout=HANG)
    assert process.returncode == 129


def test_handlers_and_the_path_of_imports_are_given_back(
    run: Run, zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def own(number: int, frame: object) -> None:
        """Nothing."""

    (tmp_path / "measures.py").write_text("def one(path):\n    return 1.0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, own) for number in numbers}
    path = list(sys.path)
    try:
        for words in (
            ("fit", zoo, "-o", tmp_path / "bundle", "--rank", 2),
            ("evaluate", tmp_path / "bundle", "--metric", "measures:one", "--models", zoo / "m0"),
            ("fit", tmp_path / "nothing", "-o", tmp_path / "no"),
        ):
            assert run(*words).code in (0, 2)
            assert [signal.getsignal(number) for number in numbers] == [own] * 3
            assert sys.path == path
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_command_runs_in_any_thread(zoo: Path, tmp_path: Path, run: Run) -> None:
    """Only a process's first thread may set handlers."""
    codes: list[object] = []
    thread = threading.Thread(target=lambda: codes.append(run("inspect", zoo).code))
    thread.start()
    thread.join()
    assert codes == [0]


def test_an_interruption_while_modules_load_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    imported = builtins.__import__

    def interrupted(name: str, *words: Any, **options: Any) -> Any:
        if name == "eigenzoo.cli.app":
            raise KeyboardInterrupt
        return imported(name, *words, **options)

    monkeypatch.setattr(builtins, "__import__", interrupted)
    with pytest.raises(SystemExit, match="130"):
        main()
    assert capsys.readouterr().err == "interrupted: no output was written\n"
