"""`eigenzoo evidence`: one document, or the verdict first; what is refused."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from evidence_zoos import assert_alike, families, layers, noise, normal, planted

import eigenzoo as ez
from builders import write_model, write_stacks
from eigenzoo.cli.app import main
from eigenzoo.evidence.controls import controls

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["eigenzoo", "evidence", *map(str, words)])
        out, err = io.StringIO(), io.StringIO()
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.raises(SystemExit, match=r"\d") as leave,
        ):
            main()
        assert isinstance(leave.value.code, int)
        return leave.value.code, out.getvalue(), err.getvalue()

    return call


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    """Two families of models in three layers, one of them the same in all."""
    stacks = layers(lambda seed: families((7, 6), seed=seed), 2)
    write_stacks(tmp_path / "zoo", {**stacks, "still.weight": normal(1, 4, 4, seed=1).expand(13, 4, 4)})
    return tmp_path / "zoo"


def test_json_is_one_document_and_nothing_else(run: Run, zoo: Path) -> None:
    code, out, err = run(zoo, "--json", "--seed", 4, "--axes", "outputs,inputs")
    assert (code, err) == (0, "")
    document = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    expected = ez.evidence(zoo, seed=4, axes=("outputs", "inputs")).to_dict()
    assert_alike({**document, "seconds": 0}, {**json.loads(json.dumps(expected)), "seconds": 0})
    assert document["verdict"]["code"] == "shared-lineage"
    assert set(document["layers"]["block.0.weight"]["axes"]) == {"outputs", "inputs"}


def test_people_read_the_verdict_first(run: Run, zoo: Path) -> None:
    code, out, err = run(zoo, "--quiet")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    found = ez.evidence(zoo)
    assert lines[0] == "verdict: shared-lineage"
    assert lines[1] == found.verdict.text
    controls = {control["name"]: control["sentence"] for control in found.to_dict()["controls"]}
    for name, sentence in controls.items():
        assert any(line.split(None, 1) == [name, sentence] for line in lines if line.strip()), name
    assert "13 models, 3 layers, view weight, center models" in out
    assert lines[-3].endswith("A shared subspace need not save bytes: run `eigenzoo plan` to compare sizes.")
    assert "common origin: m0, m1, m2, m3, m4, m5, … (7 models)" in out
    rows = [line.split() for line in lines]
    assert any(row[:3] == ["block.*.weight", "2", "shared-lineage"] for row in rows)
    assert any(row[:3] == ["still.weight", "1", "no-variance"] for row in rows)


def test_what_to_do_next_depends_on_the_verdict(run: Run, tmp_path: Path) -> None:
    write_stacks(tmp_path / "noise", {"w": noise(26, seed=0)})
    _, out, _ = run(tmp_path / "noise", "--quiet")
    assert out.startswith("verdict: no-shared-structure")
    assert (
        "A subspace of these models is of no use for new ones. `eigenzoo plan` compares what bundles, and cuts of"
        in out
    )
    assert "A shared subspace need not save bytes" not in out


def test_one_direction_is_not_called_directions(tmp_path: Path) -> None:
    write_stacks(tmp_path / "zoo", {"w": planted(40, 1, 3.0)})
    found = ez.evidence(tmp_path / "zoo")
    for rank, words in ((1, " at 1 direction, all layers together"), (4, " at 4 directions, all layers together")):
        summary = replace(found.summary, directions=replace(found.summary.directions, rank=rank))
        unseen = next(control for control in controls(replace(found, summary=summary)) if control.name == "unseen")
        assert unseen.uncertainty.endswith(words)


def test_sides_are_shown_where_they_are_asked_for(run: Run, tmp_path: Path) -> None:
    paths = write_stacks(tmp_path / "zoo", {"w": noise(9, (40, 6), 1)})
    code, out, _ = run(*paths, "--axes", "outputs")
    assert code == 0
    found = ez.evidence(paths, axes=("outputs",)).axes["w"]["outputs"]
    assert sum(found.null[:16]) < 0.9, "a side that sixteen directions hold would prove little"
    shares = [f"{100 * sum(values[:16]):.1f}" for values in (found.explained_variance_ratio, found.null)]
    row = next(line.split() for line in out.splitlines() if line.split()[:3] == ["w", "outputs", "models"])
    assert found.heldout is not None
    held = f"{100 * found.heldout.at('captured', 16):.1f}"
    assert row == ["w", "outputs", "models", "40", shares[0], "%", shares[1], "%", held, "%"]
    table = out[out.index("sides, models held out") :]
    row = next(line.split() for line in table.splitlines() if line.startswith("16 "))
    assert row == ["16", held, "%", "–"]
    assert "outputs" not in run(*paths)[1]


def test_copies_are_named_and_the_rest_counted(run: Run, tmp_path: Path) -> None:
    stack = noise(9, (20, 6), 1)
    stack[[3, 4, 5, 6, 7, 8]] = stack[0].clone()
    code, out, _ = run(*write_stacks(tmp_path / "zoo", {"w": stack}))
    assert code == 0
    assert out.count("copies: m0 and m") == 5
    assert "… and 1 more pair of copies" in out


def test_a_bundle_is_enough(run: Run, zoo: Path, tmp_path: Path) -> None:
    _, expected, _ = run(zoo, "--json")
    ez.fit(zoo, 2).save(tmp_path / "bundle")
    shutil.rmtree(zoo)
    code, out, err = run(tmp_path / "bundle", "--json")
    assert (code, err) == (0, "")
    assert_alike({**json.loads(out), "seconds": 0.0}, {**json.loads(expected), "seconds": 0.0})
    code, out, _ = run(tmp_path / "bundle")
    assert code == 0
    assert out.startswith("verdict: shared-lineage\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--axes", "rows"], "axis 'rows' is unknown. Choose one of: models, outputs, inputs."),
        (["--center", "median"], "center 'median' is unknown"),
        (["--view", "sum"], "view 'sum' is unknown"),
        (["--device", "cuda"], "device 'cuda'"),
        (["--seed", "-1"], "--seed: seed -1. A seed is a whole number from 0 to 2**63 - 1"),
        (["--include", "nothing.*"], "no layer is left to analyse"),
        (["--base", "nowhere"], "nowhere"),
    ],
)
def test_wrong_options_are_refused(run: Run, zoo: Path, words: list[str], message: str) -> None:
    code, out, err = run(zoo, "--json", *words)
    assert (code, out) == (2, "")
    assert message in " ".join(err.split())
    assert "Traceback" not in err


def test_options_that_a_bundle_cannot_follow_are_refused(run: Run, zoo: Path, tmp_path: Path) -> None:
    bundle = ez.fit(zoo, 2).save(tmp_path / "bundle")
    for words in (["--axes", "outputs"], ["--center", "none"], ["--view", "weight"], ["--exclude", "still*"]):
        code, out, err = run(bundle, *words)
        assert (code, out) == (2, "")
        assert "Name the zoo instead." in " ".join(err.split())


def test_a_single_model_is_refused(run: Run, zoo: Path) -> None:
    code, out, err = run(zoo / "m0", "--json")
    assert (code, out) == (2, "")
    assert "one model. Evidence compares models. Name two or more." in " ".join(err.split())


def test_options_reach_the_library(run: Run, zoo: Path, tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", {name: weight.float() for name, weight in _first(zoo).items()})
    _, out, _ = run(zoo, "--json", "--view", "delta", "--base", base, "--exclude", "block.1.*", "--center", "none")
    document = json.loads(out)
    assert (document["view"], document["center"]) == ("delta", "none")
    assert set(document["layers"]) == {"block.0.weight", "still.weight"}
    assert len(document["layers"]["block.0.weight"]["explained_variance_ratio"]) == 13
    _, out, _ = run(zoo, "--json", "--include", "block.1.*")
    assert set(json.loads(out)["layers"]) == {"block.1.weight"}


def _first(zoo: Path) -> dict:
    from safetensors.torch import load_file

    return {name: tensor * 0.5 for name, tensor in load_file(zoo / "m0" / "model.safetensors").items()}


def test_the_largest_seed_that_the_command_takes_is_one(run: Run, tmp_path: Path) -> None:
    write_stacks(tmp_path / "zoo", layers(lambda seed: planted(20, 3, 0.5, seed=seed), 1))
    code, out, err = run(tmp_path / "zoo", "--seed", 2**63 - 1)
    assert (code, err) == (0, "")
    assert out.startswith("verdict: shared-subspace\n")


def test_a_rank_is_what_halves_and_the_secondary_subspace_are_asked_of(run: Run, tmp_path: Path) -> None:
    paths = write_stacks(tmp_path / "zoo", {"w": noise(16, seed=1)})
    for word in ("3", "0.5", "auto"):
        code, out, _ = run(*paths, "--rank", word, "--max-memory", "20MB", "--json")
        assert code == 0
        layer = json.loads(out)["layers"]["w"]
        shares = layer["explained_variance_ratio"]
        half = next(k for k in range(1, 16) if sum(shares[:k]) >= 0.5)
        expected = {"3": 3, "0.5": half, "auto": max(layer["rank"]["auto"], 1)}[word]
        assert layer["split_half"]["rank"] == min(expected, 7)  # a half of 16 models spans seven directions
    code, _, err = run(*paths, "--rank", "many")
    assert code == 2
    assert "is not a rank" in err
