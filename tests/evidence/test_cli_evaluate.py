"""`eigenzoo evaluate`: metrics by name, the table, the document, and what is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import eigenzoo as ez
from builders import random_stack, write_model, write_stacks
from eigenzoo.cli.evaluate import load_metric, parse_ranks

METRICS = """
from pathlib import Path
from safetensors.torch import load_file

print("imported")

class Holder:
    def norm(path):
        return norm(path)

def norm(path):
    print("measuring", path)
    return float(load_file(Path(path) / "model.safetensors")["block.weight"].norm())

def power(text):
    exponent = float(text)
    def powered(path):
        return norm(path) ** exponent
    return powered

def broken(path):
    raise RuntimeError("no data")

number = 3
"""

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder with metrics and a bundle of five of seven models; what was imported from it is forgotten again."""
    paths = write_stacks(
        tmp_path / "zoo", {"block.weight": random_stack(7, (8, 7), 0), "bias": random_stack(7, (5,), 1)}
    )
    ez.fit(paths[:5], 2).save(tmp_path / "bundle")
    (tmp_path / "own_metrics.py").write_text(METRICS)
    (tmp_path / "half_metrics.py").write_text("import not_a_module_at_all")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in ("own_metrics", "half_metrics"):
        sys.modules.pop(name, None)


@pytest.fixture
def run(call: Run) -> Run:
    return partial(call, "evaluate")


def test_one_fitted_model_is_not_called_models(here: Path, run: Run) -> None:
    _, out, _ = run("bundle", "--metric", "own_metrics:norm", "--models", "zoo/m0", "--ranks", "1")
    assert "norm of 1 model, not all held out; the subspace was fitted to 5 models" in out


def test_the_table_has_every_variant_and_the_sentence(here: Path, run: Run) -> None:
    code, out, err = run("bundle", "--metric", "own_metrics:norm", "--models", "zoo/m5", "--models", "zoo/m6")
    assert code == 0, err
    lines = [line for line in out.splitlines() if not line.startswith(("imported", "measuring"))]
    assert lines[0] == "norm of 2 held-out models; the subspace was fitted to 5 models"
    first_words = [line.split("  ")[0] for line in lines[2:-3]]
    assert first_words == [
        "original",
        "parent",
        "mean only",
        "head only",
        "rebuilt, rank 1",
        "rebuilt, rank 2",
        "random basis of 2",
        "without the first 1",
        "cut alone to rank 1",
        "cut alone to rank 2",
    ]
    found = ez.evaluate(ez.load("bundle"), load_metric("own_metrics:norm", None), "zoo/m[56]")
    row = next(line for line in lines if line.startswith("original"))
    assert row.split()[1:] == [f"{found.mean.original:.4g}", f"{found.spread.original:.4g}"]
    assert next(line for line in lines if line.startswith("parent")).split()[1:] == ["–", "–"]
    assert lines[-3].startswith("parent: the model before fine-tuning (of adapters: the base without an update).")
    assert lines[-1] == found.sentence


def test_json_is_one_document_whatever_the_metric_prints(here: Path, run: Run) -> None:
    words = ("bundle", "--metric", "own_metrics:norm", "--models", "zoo/m[56]", "--ranks", "1", "--seed", "3", "--json")
    code, out, err = run(*words)
    assert code == 0, err
    assert "measuring" in err
    found = ez.evaluate(ez.load("bundle"), load_metric("own_metrics:norm", None), "zoo/m[56]", ranks=[1], seed=3)
    assert json.loads(out) == json.loads(json.dumps(found.to_dict()))
    assert json.loads(out)["ranks"] == [1, 2]


def test_a_factory_is_called_once_with_its_argument(here: Path, run: Run) -> None:
    words = ("bundle", "--metric-arg", "2", "--metric", "own_metrics:power", "--json")
    code, out, err = run(*words)
    assert code == 0, err
    assert json.loads(out)["metric"] == "powered"
    assert json.loads(out)["heldout"]
    assert json.loads(out)["num_fitted"] == 4
    (figure,) = (model["original"] for model in json.loads(out)["models"].values())
    norms = [float(torch.as_tensor(random_stack(7, (8, 7), 0)[place].float().norm())) for place in range(5)]
    assert any(figure == pytest.approx(norm**2, rel=1e-6) for norm in norms)


def test_a_parent_is_measured(here: Path, run: Run) -> None:
    parent = write_model(here / "parent", {"block.weight": torch.full((8, 7), 2.0), "bias": torch.ones(5)})
    words = ("bundle", "--metric", "own_metrics:Holder.norm", "--models", "zoo/m5", "--parent", parent, "--json")
    code, out, err = run(*words)
    assert code == 0, err
    assert json.loads(out)["mean"]["parent"] == pytest.approx(2 * 56**0.5)


def test_the_base_of_deltas_is_the_parent_wherever_it_lies_now(here: Path, run: Run) -> None:
    base = write_model(here / "base", {"block.weight": torch.ones(8, 7), "bias": torch.ones(5)})
    ez.fit([here / "zoo" / f"m{place}" for place in range(5)], 2, base=base).save(here / "deltas")
    base.rename(here / "moved")
    words = ("deltas", "--metric", "own_metrics:norm", "--models", "zoo/m5", "--json")
    code, _, err = run(*words)
    assert code == 2
    assert "the base is not at hand" in err
    code, out, err = run(*words, "--base", "moved")
    assert code == 0, err
    assert json.loads(out)["mean"]["parent"] == pytest.approx(56**0.5)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ((), "Missing option '--metric'"),
        (("--metric", "own_metrics"), "'own_metrics' does not name a function. Write module:function"),
        (("--metric", ":norm"), "does not name a function"),
        (("--metric", "not_there:norm"), "module 'not_there' cannot be imported (ModuleNotFoundError: No module named"),
        (("--metric", "not_there:norm"), "Run the command in the folder with not_there.py."),
        (("--metric", "half_metrics:norm"), "No module named 'not_a_module_at_all'"),
        (("--metric", "own_metrics:nothing"), "module 'own_metrics' has no 'nothing'. Name a function of "),
        (("--metric", "own_metrics:number"), "own_metrics:number is not a function"),
        (("--metric", "own_metrics:power", "--metric-arg", "two"), "own_metrics:power failed for 'two' (ValueError"),
        (("--metric", "own_metrics:number", "--metric-arg", "two"), "TypeError: 'int' object is not callable"),
        (("--metric", "own_metrics:norm", "--ranks", "1,x"), "'1,x' is not a list of ranks. Write 1,4,16"),
        (("--metric", "own_metrics:norm", "--ranks", "0"), "rank 0"),
        (("--metric", "own_metrics:norm", "--models", "nowhere"), "nowhere: there is no such file or folder"),
        (
            ("--metric", "own_metrics:broken"),
            "original: the metric failed with RuntimeError: no data. A metric takes the path",
        ),
        (("--metric", "own_metrics:broken"), "rebuilt models have the original's name, not its other files."),
        (("--metric", "own_metrics:power", "--models", "zoo/m5"), "original: the metric failed with TypeError"),
    ],
)
def test_what_cannot_be_meant_is_refused(here: Path, run: Run, words: tuple[Any, ...], text: str) -> None:
    code, out, err = run("bundle", "--json", *words)
    assert code == 2, err
    assert out == ""
    assert "Traceback" not in err
    assert text in err


def test_a_factorys_own_refusal_is_told_as_it_is(here: Path, run: Run) -> None:
    code, _, err = run("bundle", "--metric", "eigenzoo.nursery:metric", "--metric-arg", "nowhere")
    assert code == 2
    assert err.startswith("UsageError: nowhere: this is not a zoo of the nursery")


def test_ranks_are_read() -> None:
    assert parse_ranks(None) is None
    assert parse_ranks("16,1") == [16, 1]
    for text in ("", "1,,2", "-1", "²", "9" * 20):
        with pytest.raises(ez.UsageError, match="not a list of ranks"):
            parse_ranks(text)
