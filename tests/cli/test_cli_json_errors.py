"""What a refused command leaves on standard output, on standard error and as its exit code, with `--json` as without."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_runner import Run

import eigenzoo as ez
from builders import random_factors, random_stack, write_adapter, write_stacks

SHAPES = {"q": (6, 5), "v": (5, 6)}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A zoo, its bundle, and a damaged bundle."""
    write_stacks(tmp_path / "zoo", {"w": random_stack(4, (7, 6)), "b": random_stack(4, (5,), 1)})
    ez.fit(tmp_path / "zoo", rank=1).save(tmp_path / "bundle")
    return tmp_path


@pytest.mark.parametrize(
    "words",
    [
        *(["inspect", "no"], ["fit", "no", "-o", "out"], ["plan", "no"], ["evidence", "no"], ["add", "no", "zoo/m0"]),
        *(
            ["project", "bundle", "no"],
            ["rebuild", "bundle", "no", "-o", "out"],
            ["verify", "no"],
            ["inspect", "bundle"],
        ),
    ],
    ids=" ".join,
)
def test_a_refusal_is_one_message_on_standard_error(
    place: Path, run: Run, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.chdir(place)
    for options in ([], ["--json"]):
        found = run(*words, *options)
        assert (found.code, found.out) == (2, ""), found
        kind, _, message = found.err.partition(": ")
        assert issubclass(getattr(ez.errors, kind), ez.errors.EigenzooError)
        assert message.strip()


def test_a_check_that_failed_has_a_document_and_exit_code_1(place: Path, run: Run) -> None:
    basis = place / "bundle" / "basis.safetensors"
    basis.write_bytes(basis.read_bytes()[:-1] + b"\x7f")
    found = run("verify", place / "bundle", "--json")
    assert (found.code, found.err) == (1, "")
    assert json.loads(found.out)["ok"] is False


def test_warnings_are_in_the_document(place: Path, run: Run) -> None:
    for n in range(4):
        (place / "zoo" / f"m{n}" / "value_head.safetensors").touch()
    found = run("inspect", place / "zoo", "--json")
    assert (found.code, found.err) == (0, "")
    (warning,) = json.loads(found.out)["warnings"]
    assert warning.startswith("weights beside these models are neither read nor carried: m0/value_head.safetensors")
    assert warning.endswith("; copy them yourself if a rebuilt model needs them")


def test_project_and_add_name_the_modules_that_count_as_zero(tmp_path: Path, run: Run) -> None:
    for n, names in enumerate((("q", "v"), ("q",), ("v",))):
        write_adapter(tmp_path / "zoo" / f"a{n}", random_factors({name: SHAPES[name] for name in names}, 2, n))
    new = write_adapter(tmp_path / "a3", random_factors({"q": SHAPES["q"]}, 2, 3))
    ez.fit(ez.open_zoo(tmp_path / "zoo", missing="zero"), rank=1).save(tmp_path / "bundle")
    note = "note: a3 lacks 1 module, counted as updates of zero: v"
    assert note in run("project", tmp_path / "bundle", new).out
    assert run("project", tmp_path / "bundle", new, "--json").json["zero_updates"] == {"a3": ["v"]}
    assert note in run("add", tmp_path / "bundle", new).out


def test_one_model_is_told_that_a_subspace_needs_two(tmp_path: Path, run: Run) -> None:
    write_stacks(tmp_path / "zoo", {"w": random_stack(1, (7, 6))})
    said = run("fit", tmp_path / "zoo", "-o", tmp_path / "bundle").out
    assert "note: 1 of 1 layers: no variance in one model: a subspace needs two or more" in " ".join(said.split())
