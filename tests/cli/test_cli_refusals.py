"""Exit codes, messages, and what is left behind when something goes wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_runner import Run

from builders import edit_model, random_stack, write_stacks
from guard import HANG

Refused = Callable[..., str]
QUIET = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(*words: object, **options: object) -> subprocess.CompletedProcess[str]:
    """Run the installed program as a user's shell does."""
    return subprocess.run(  # type: ignore[call-overload,no-any-return]
        [sys.executable, "-m", "eigenzoo", *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        env=QUIET,
        **options,
    )


def test_the_program_as_a_user_runs_it(zoo: Path, tmp_path: Path) -> None:
    """Out of a pipe: results on standard output, nothing on standard error, no colours; then codes 1 and 2."""
    done = command("fit", zoo, "-o", tmp_path / "bundle", "--rank", 2)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    assert "\r" not in done.stdout
    assert "6 models, 3 layers" in done.stdout
    (tmp_path / "bundle" / "extra").write_text("")
    done = command("verify", tmp_path / "bundle", "--json")
    assert (done.returncode, done.stderr) == (1, "")
    assert json.loads(done.stdout)["ok"] is False
    done = command("verify", tmp_path / "bundel")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("UsageError: ")
    assert len(done.stderr.splitlines()) == 1


def test_a_reader_that_leaves_is_no_failure(zoo: Path) -> None:
    program = f"{sys.executable} -m eigenzoo inspect {zoo} --json | head -c 10"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", program], capture_output=True, text=True, check=False, env=QUIET
    )
    assert done.stdout.startswith("{")
    assert done.stderr == ""


def test_bad_input_is_one_message(refused: Refused, zoo: Path, bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "note.md").write_text("no model")
    out = tmp_path / "out"
    assert "no model was found" in refused("inspect", tmp_path / "empty")
    assert "no model was found" in refused("fit", tmp_path / "empty", "-o", out)
    assert "there is no such file or folder" in refused("inspect", tmp_path / "nowhere")
    assert "no model was found" in refused("inspect", f"{tmp_path}/nowhere/*")
    for nothing in (tmp_path / "empty", f"{tmp_path}/nowhere/*"):
        assert "no model was found" in refused("fit", zoo, nothing, "-o", out), (
            "beside others it would be missed by nobody"
        )
    assert "names axis 'models' twice" in refused("fit", zoo, "-o", out, "--rank", "models=1,models=2")
    assert "there is no model here: a file with the ending '.md'" in refused("plan", tmp_path / "note.md")
    assert "three folders deep" in refused("inspect", tmp_path / "empty")
    assert "is neither a bundle nor an adapter" in refused("verify", tmp_path / "empty")
    assert "there is no manifest.json" in refused("project", zoo / "m0", zoo / "m1")
    assert "there is no such file or folder" in refused("project", bundle, tmp_path / "nowhere")
    assert "no model is called 'm9'" in refused("rebuild", bundle, "m9", "-o", out)
    assert "a model called 'm0' is in the subspace already" in refused("add", bundle, zoo / "m0")
    assert "Missing option '--output'" in refused("fit", zoo)
    assert not out.exists()


def test_a_name_that_no_file_can_have_is_refused(refused: Refused, bundle: Path, tmp_path: Path) -> None:
    assert refused("rebuild", bundle, "x" * 300, "-o", tmp_path / "out")
    assert refused("rebuild", bundle, "m0", "-o", tmp_path / ("y" * 300))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "zoo"]


def test_no_command_at_all_is_bad_usage(run: Run, refused: Refused) -> None:
    assert "No such command" in refused("fti")
    assert run().code == 2


def test_existing_outputs_need_force(run: Run, refused: Refused, zoo: Path, bundle: Path, tmp_path: Path) -> None:
    before = (bundle / "manifest.json").read_bytes()
    assert "exists already" in refused("fit", zoo, "-o", bundle, "--rank", 3)
    assert (bundle / "manifest.json").read_bytes() == before
    assert run("fit", zoo, "-o", bundle, "--rank", 3, "--force").code == 0
    assert (bundle / "manifest.json").read_bytes() != before
    assert "is a folder of another kind" in refused("fit", zoo, "-o", zoo, "--rank", 3, "--force")
    assert "has no record" in refused("rebuild", bundle, "m0", "-o", bundle, "--force")
    assert run("rebuild", bundle, "m0", "-o", tmp_path / "m0").code == 0
    assert "exists already" in refused("rebuild", bundle, "m0", "-o", tmp_path / "m0")
    assert run("rebuild", bundle, "m1", "-o", tmp_path / "m0", "--force").code == 0
    (tmp_path / "file").write_text("")
    assert refused("fit", zoo, "-o", tmp_path / "file" / "bundle", "--rank", 3)
    assert "is not a folder" in refused("fit", zoo, "-o", tmp_path / "file", "--rank", 3, "--force")


def test_values_that_are_not_finite(run: Run, refused: Refused, zoo: Path, tmp_path: Path) -> None:
    bad = torch.zeros(8, 7)
    bad[2, 3], bad[0, 0] = float("nan"), float("-inf")
    edit_model(zoo / "m2", block__weight=bad)
    result = run("inspect", zoo)
    assert result.code == 1
    assert "not finite: 2 values of m2, in block.weight" in result.out
    result = run("inspect", zoo, "--json")
    assert result.code == 1
    assert [model["num_non_finite"] for model in result.json["models"]] == [0, 0, 2, 0, 0, 0]
    message = refused("fit", zoo, "-o", tmp_path / "bundle", "--rank", 2)
    assert "layer 'block.weight' of m2: 2 values are NaN or Inf" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["zoo"]


NAMES = ["\x1b[2J\x1b]0;owned\x07", "\x9b31mred", "bold[red]", "line\rover", "two\nlines", "\u202etxt.exe"]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_names_cannot_move_the_terminal(run: Run, tmp_path: Path, name: str) -> None:
    paths = write_stacks(tmp_path / "zoo", {"w": random_stack(4, (4, 3), 0)})
    hostile = paths[0].rename(tmp_path / "zoo" / name)
    words = [
        ("inspect", tmp_path / "zoo"),
        ("inspect", tmp_path / "zoo", "--json"),
        ("fit", tmp_path / "zoo", "-o", tmp_path / "b"),
    ]
    words += [
        ("fit", tmp_path / "zoo", "-o", tmp_path / "bundle", "--rank", 1),
        ("fit", tmp_path / "zoo", "-o", tmp_path / "bundle2", "--rank", 1, "--json"),
        ("project", tmp_path / "bundle", hostile),
        ("project", tmp_path / "bundle", hostile, "--json"),
        ("rebuild", tmp_path / "bundle", name, "-o", tmp_path / "out"),
        ("rebuild", tmp_path / "bundle", name + "x", "-o", tmp_path / "out2"),
        ("add", tmp_path / "bundle", hostile),
        ("verify", tmp_path / "bundle"),
    ]
    for line in words:
        result = run(*line)
        for text in (result.out, result.err):
            assert all(char.isprintable() or char == "\n" for char in text), (line[0], text)
        if "--json" in line:
            assert result.json
    assert "[red]" not in name or "[red]" in run("inspect", tmp_path / "zoo").out, "markup is text"


SLOW = """
import sys, time
from eigenzoo.subspace.fitting import writing
step = writing.write_moments
def slow(*args, **kwargs):
    print("now", file=sys.stderr, flush=True)
    time.sleep(600)
writing.write_moments = slow
sys.argv = ["eigenzoo", *sys.argv[1:]]
from eigenzoo.cli.app import main
main()
"""


def test_an_interrupt_leaves_no_output_and_a_fit_goes_on_from_its_work(zoo: Path, tmp_path: Path) -> None:
    words = ["fit", str(zoo), "-o", str(tmp_path / "deep" / "bundle"), "--rank", "2"]
    (tmp_path / "deep").mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *words], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=QUIET
    )
    assert process.stderr is not None
    assert process.stderr.readline() == "now\n"
    assert {path.name[:9] for path in (tmp_path / "deep").iterdir()} == {".eigenzoo"}, "the work lies beside the output"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=HANG)
    assert process.returncode == 130
    assert out == ""
    assert err.startswith("interrupted: no output was written; run the same command again to resume")
    (left,) = (tmp_path / "deep").iterdir()
    assert left.name.startswith(".eigenzoo-fit-")
    subprocess.run([sys.executable, "-m", "eigenzoo", *words], check=True, capture_output=True, env=QUIET)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["bundle"]


def test_a_mistyped_path_is_told_with_the_nearest_one(
    refused: Refused, zoo: Path, bundle: Path, tmp_path: Path
) -> None:
    """Where a name of a model or a path may stand, both are looked for."""
    said = refused("rebuild", bundle, zoo / "m00", "-o", tmp_path / "out")
    assert f"no model is called '{zoo}/m00', and there is no such file or folder" in said
    assert f"Did you mean '{zoo}/m0'?" in said
    assert f"Did you mean '{zoo}'?" in refused("verify", bundle, "--against", f"{zoo}s")


def test_a_bundle_in_the_place_of_a_zoo_is_told_what_it_is_for(refused: Refused, bundle: Path, tmp_path: Path) -> None:
    for words in (["inspect"], ["plan"], ["fit", "-o", tmp_path / "out"]):
        said = refused(words[0], bundle, *words[1:])
        assert (
            "Use evidence, report, verify, project, rebuild or add on it, or name the models it was made from" in said
        )


def test_a_model_in_the_place_of_a_bundle_is_told_how_one_is_made(refused: Refused, zoo: Path, tmp_path: Path) -> None:
    assert "Write one with eigenzoo fit ZOO -o BUNDLE" in refused("project", zoo, zoo / "m1")
