"""The benchmarks run, and what they say of accuracy is right. No time is asserted."""

from __future__ import annotations

import math
import os
import sys
from dataclasses import replace

import psutil
import pytest

from bench import child
from bench.__main__ import PAGE, main
from bench.commands import COMMANDS, READ_ONCE, START, measured, neighbour
from bench.pages import with_tables
from bench.peers import PEERS
from bench.sizes import SIZES
from bench.suite import faster, measure
from bench.tables import case_table, console, number
from guard import HANG

CI = SIZES["ci"]
JOBS = [(case.name, name) for case in CI.cases for name in case.peers]
OURS = tuple(name for name, peer in PEERS.items() if peer.module == "eigenzoo_fit")


@pytest.mark.parametrize(("case", "name"), JOBS)
@pytest.mark.slow
def test_each_peer_runs_and_is_as_right_as_it_claims(run, case, name):
    found = run.runs(case)[name]
    if "skipped" in found:
        pytest.skip(f"{name}: {found['skipped']}")
    assert "failed" not in found, found.get("stderr")
    errors = found["errors"]
    assert all(value is None or value >= 0 for value in errors.values())
    if name in OURS:
        assert errors["top"] < 1e-5
        assert errors["tail"] < 1e-5
        assert errors.get("angle") is None or errors["angle"] < 1e-5
        assert (errors.get("angle") is None) == ("update" in name or "unwritten" in name)
    elif PEERS[name].exact:
        # Their SVDs are float32: round-off of the largest singular value, which the smallest of the leading ones feels twice.
        assert errors["top"] < 1e-4
        assert errors["angle"] < 1e-4
    assert 0 < found["wall"] <= found["process"] / found["share"]
    assert found["imports_rss"] <= found["peak_rss"]


@pytest.mark.slow
def test_an_inexact_peer_is_seen_to_be(run):
    found = run.runs("lora-12")["vlora-streaming"]
    if "skipped" in found:
        pytest.skip(found["skipped"])
    assert found["errors"]["top"] > 0.1


@pytest.mark.slow
def test_ratios_to_the_ceiling_and_to_eigenzoo_are_printed(run):
    for case in run.raw["cases"]:
        for found in case["runs"]:
            if "wall" in found and PEERS[found["peer"]].truth != "columns":
                assert math.isfinite(found["times_ceiling"])
            title = PEERS[found["peer"]].title
            row = next(line for line in run.printed.splitlines() if line.startswith(f"| {title} |"))
            assert "skipped" in found or row.count("×") >= 1
        assert case["ceiling"]["read"]["warm"] > 0
        assert case["ceiling"]["products"]["weights"] > 0
    assert "| × ceiling | × eigenzoo |" in run.printed


@pytest.mark.slow
def test_growth_and_adding_are_measured_and_adding_with_the_files_is_exact(run):
    (growth,), (adding,) = run.raw["growth"], run.raw["adding"]
    assert {row["varied"] for row in growth} == {"models", "layers", "rank"}
    rows = {row["step"]: row for row in adding}
    assert tuple(rows) == CI.adding.steps
    assert rows["refit"]["times_refit"] == 1
    assert max(rows["add"]["errors"].values(), key=lambda error: error or 0) < 1e-5
    # What lies outside of the kept subspace is not in the bundle.
    assert rows["alone"]["errors"]["tail"] > 1e-3
    assert "| × fit of all |" in run.printed


@pytest.mark.slow
def test_every_command_is_measured_alone_and_beside_a_neighbour(run):
    (rows,) = run.raw["commands"]
    found = {row["command"]: row for row in rows}
    assert set(COMMANDS) - set(found) <= {"import"}
    for row in rows:
        assert row["wall"] > 0
        assert row["read"] is None or row["read"] > 0
        assert ("times_read" in row) == (row["command"] not in (READ_ONCE, START))
    assert {name for name, row in found.items() if "beside" in row} == set(CI.commands.beside)
    row = found["inspect"]
    assert row["times_alone"] == pytest.approx(row["beside"]["wall"] / row["wall"])
    if found[READ_ONCE]["read"] is not None:
        assert found[READ_ONCE]["read"] >= found[READ_ONCE]["bytes"]
    assert "| × alone |" in run.printed


def test_a_command_that_fails_or_takes_too_long_says_why():
    environment = {**os.environ}
    with pytest.raises(RuntimeError, match=r"exit status 3\nso it is"):
        measured(["-c", "import sys; print('so it is'); sys.exit(3)"], environment, child.Limits(60, 1.0))
    with pytest.raises(RuntimeError, match="stopped after 0 s"):
        measured(["-c", "import time; time.sleep(60)"], environment, child.Limits(0.3, 1.0))


def test_the_bytes_that_a_command_reads_are_all_that_it_asks_for(tmp_path):
    (tmp_path / "file").write_bytes(bytes(3_000_000))
    code = f"import pathlib; [pathlib.Path({str(tmp_path / 'file')!r}).read_bytes() for _ in range(2)]"
    found = measured(["-c", code], {**os.environ}, child.Limits(60, 1.0))
    assert found["read"] is None or 6_000_000 <= found["read"] < 8_000_000
    assert found["peak_rss"] > 3_000_000


def test_a_neighbour_ends_with_its_context():
    before = set(psutil.Process().children())
    with neighbour():
        busy = set(psutil.Process().children()) - before
        assert busy
    assert not any(process.is_running() for process in busy)


@pytest.mark.slow
def test_a_peer_that_is_not_installed_is_left_out_with_its_reason(run, monkeypatch):
    monkeypatch.setitem(PEERS, "numpy", replace(PEERS["numpy"], requires=("no_such_library",)))
    case = {**run.raw["cases"][0], "runs": [measure(None, "numpy", 4, 1)]}
    assert case["runs"][0]["skipped"] == "no_such_library is not installed"
    assert case_table(case).rows[0][-1] == "no_such_library is not installed"


@pytest.mark.slow
def test_tables_are_printed_uncut(run, capsys):
    for case in run.raw["cases"]:
        case_table(case).show(console())
    printed = capsys.readouterr().out
    assert "…" not in printed
    assert all(PEERS[name].title in printed for _, name in JOBS)


def test_the_page_has_a_place_for_every_table_of_size_full():
    names = [*(case.name for case in SIZES["full"].cases), "growth", "adding", "commands", "bytes"]
    page = PAGE.read_text(encoding="utf-8")
    written = with_tables(page, {name: [f"table of {name}"] for name in names}, PAGE)
    assert all(f"<!-- {name} -->\ntable of {name}\n<!-- end of {name} -->" in written for name in names)
    assert with_tables(written, {name: [f"table of {name}"] for name in names}, PAGE) == written


def test_a_page_without_marks_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="no marks for the table 'x'"):
        with_tables("nothing here", {"x": []}, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--only", "nobody"], "nobody is none of"), (["--write"], "size full"), (["--size", "huge"], "invalid choice")],
)
def test_wrong_options_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert message in capsys.readouterr().err


MODULES = {
    "hungry": f"import time\nheld = bytearray(200_000_000)\ntime.sleep({HANG})",
    "slow": f"import time\ntime.sleep({HANG})",
    "broken": "raise SystemExit('no such thing')",
    "good": "import json, os\nfrom pathlib import Path\ncache = Path(os.environ['EIGENZOO_CACHE'])\nprint('noise')\n"
    "print(json.dumps({'threads': int(os.environ['OMP_NUM_THREADS']), 'kept': len(list(cache.iterdir()))}))\n"
    "(cache / 'moments').touch()",
}


@pytest.fixture
def modules(tmp_path, monkeypatch):
    for name, text in MODULES.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 100_000_000})())


@pytest.mark.parametrize(
    ("name", "seconds", "message"),
    [("hungry", HANG, "GB of memory"), ("slow", 0.2, "stopped after 0 s"), ("broken", HANG, "no such thing")],
)
def test_a_child_that_takes_too_much_or_fails_says_why(modules, name, seconds, message):
    found = child.run(name, [], 1, child.Limits(seconds, 1.0))
    assert message in found["failed"]


def test_a_child_has_its_threads_and_nothing_that_another_run_has_kept(modules, tmp_path):
    for _ in range(2):
        found = child.run("good", [], 3, child.Limits(HANG, 1.0), tmp_path)
        assert (found["threads"], found["kept"]) == (3, 0)


def test_the_faster_run_counts_with_the_larger_memory():
    first = faster({}, {"wall": 2.0, "imports_rss": 10, "peak_rss": 30})
    second = faster(first, {"wall": 1.0, "imports_rss": 10, "peak_rss": 20})
    assert (second["wall"], second["memory"], second["peak_rss"]) == (1.0, 20, 30)
    assert faster(second, {"wall": 3.0, "imports_rss": 10, "peak_rss": 50}) == second | {"memory": 40, "peak_rss": 50}


def test_seconds_have_three_digits():
    assert [number(seconds) for seconds in (0.01234, 1.234, 12.3, 123.4)] == ["0.0123", "1.23", "12.3", "123"]


def test_threads_beyond_those_asked_for_gain_nothing():
    code = "import os; from bench.machine import pin; pin(1); print(len(os.sched_getaffinity(0)))"
    if not hasattr(__import__("os"), "sched_setaffinity"):
        pytest.skip("this system cannot pin a process")
    import subprocess

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=child.ROOT)
    assert done.stdout.strip() == "1"
