"""`eigenzoo report`: every format, from a zoo and from a bundle, whole or not at all."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
import torch
from cli_runner import Run

import eigenzoo as ez
from builders import random_stack, write_stacks


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    stacks = {"layers.0.weight": random_stack(12, (6, 9), 0, rank=3), "layers.1.weight": random_stack(12, (6, 9), 1)}
    write_stacks(tmp_path / "zoo", stacks, torch.float64)
    return tmp_path / "zoo"


def test_a_page_says_the_verdict_and_names_the_models(run: Run, zoo: Path, tmp_path: Path) -> None:
    done = run("report", zoo, "-o", tmp_path / "report.html")
    assert done.code == 0, done
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    verdict = ez.evidence(zoo).verdict
    assert verdict.code in page
    assert all(name in page for name in ez.open_zoo(zoo).names)
    assert verdict.text in done.out.replace("\n", " ")
    assert "report (html): " in done.out


def test_terminal_and_page_have_the_same_digits(run: Run, zoo: Path, tmp_path: Path) -> None:
    said = run("evidence", zoo).out.replace("\n", " ")
    assert run("report", zoo, "-o", tmp_path / "report.html").code == 0
    keys = (
        (tmp_path / "report.html").read_text(encoding="utf-8").partition('<dl class="keys">')[2].partition("</dl>")[0]
    )
    shown = re.findall('<dd class="value">([^<]*)</dd>', keys)
    assert len(shown) == 4
    verdict = said.partition("verdict: ")[2].partition(" layers,")[0]
    assert all(value.replace("\u00a0", " ") in verdict for value in shown), (shown, verdict)


def test_json_is_the_document_of_the_evidence(run: Run, zoo: Path, tmp_path: Path) -> None:
    assert run("report", zoo, "-o", tmp_path / "report.json").code == 0
    document = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    expected = ez.evidence(zoo).to_dict()
    found = document["evidence"]
    assert {**found, "seconds": 0} == {**expected, "seconds": 0}
    assert document["made_by"]["command"].startswith("eigenzoo ")
    more = ("--axes", "outputs", "--suitability", "--rank", "2", "--seed", "1")
    assert run("report", zoo, "-o", tmp_path / "more.json", *more).code == 0
    asked = ez.evidence(zoo, axes="outputs", suitability=True, rank=2, seed=1).to_dict()
    found = json.loads((tmp_path / "more.json").read_text(encoding="utf-8"))["evidence"]
    assert {**found, "seconds": 0} == {**asked, "seconds": 0}
    assert run("report", zoo, "-o", tmp_path / "more.csv", *more).code == 0
    rows = list(csv.DictReader((tmp_path / "more.csv").read_text(encoding="utf-8").splitlines()))
    for name, layer in asked["layers"].items():
        score = layer["suitability"]["alpha_score"]
        said = {(row["model"], row["series"]): row["y"] for row in rows if row["layer"] == name}
        known = dict(zip(asked["names"], score["exponents"], strict=True))
        assert any(known.values())
        assert {model: said.get((model, "alpha")) for model in known} == {
            model: None if value is None else str(value) for model, value in known.items()
        }
        assert said["", "alpha_q"] == str(score["q"])
    plan = ez.plan(zoo, axes=["models"])
    sizes = document["sizes"]
    for row in plan.rows:
        if row.rank > 2:  # the ranks that both layers have: a rank above what a layer has means all of it
            continue
        layers = sum(
            layer["fixed"]
            + row.rank
            * (layer["per_direction"] + row.rank * layer["per_pair"] + sizes["num_models"] * layer["per_coefficient"])
            for layer in sizes["layers"].values()
        )
        assert sizes["shared"] + sizes["num_models"] * sizes["per_model"] + layers == row.bytes


def test_a_bundle_brings_residuals_and_its_own_bytes(run: Run, zoo: Path, tmp_path: Path) -> None:
    space = ez.fit(zoo, rank=2)
    space.save(tmp_path / "bundle")
    assert run("report", tmp_path / "bundle", "-o", tmp_path / "report.json").code == 0
    document = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    for name in space.names:
        assert document["models"][name]["residual"] == pytest.approx(space.coefficients(name).residual, rel=1e-6)
    sizes = document["sizes"]
    layers = sum(layer["fixed"] + 2 * layer["per_direction"] + 12 * 2 * 4 for layer in sizes["layers"].values())
    counted = ez.load(tmp_path / "bundle").report["bytes"]["whole_bundle"]
    assert sizes["shared"] + 12 * sizes["per_model"] + layers == counted


def test_tables_and_figures(run: Run, zoo: Path, tmp_path: Path) -> None:
    assert run("report", zoo, "-o", tmp_path / "report.md").code == 0
    assert "no-variance" not in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert run("report", zoo, "-o", tmp_path / "table", "--format", "csv").code == 0
    rows = list(csv.DictReader((tmp_path / "table").read_text(encoding="utf-8").splitlines()))
    assert {"section", "layer", "model", "series", "x", "y"} <= set(rows[0])
    done = run("report", zoo, "-o", tmp_path / "figures", "--format", "svg", "--width", 8.5)
    assert done.code == 0
    figures = sorted((tmp_path / "figures").glob("*.svg"))
    assert figures
    assert f"{len(figures)} svg figures: " in done.out
    assert all(f'width="{72 * 8.5 / 2.54:.4f}'[:-1] in path.read_text(encoding="utf-8") for path in figures)
    assert all(path.read_text(encoding="utf-8").lstrip().startswith("<?xml") for path in figures)


def test_a_metric_is_measured_on_the_bundle(run: Run, zoo: Path, tmp_path: Path) -> None:
    ez.fit(zoo, rank=2).save(tmp_path / "bundle")
    words = ("--metric", "os.path:getsize")
    refused = run("report", zoo, "-o", tmp_path / "a.json", *words)
    assert refused.code == 2
    assert "run `eigenzoo fit` and name the bundle" in refused.err.lower()
    assert run("report", tmp_path / "bundle", "-o", tmp_path / "b.json", *words).code == 0
    function = json.loads((tmp_path / "b.json").read_text(encoding="utf-8"))["function"]
    assert function["heldout"] is True
    assert all(measured["original"] > 0 for measured in function["models"].values())


def test_nothing_is_overwritten_and_formats_are_known(run: Run, zoo: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.html").write_text("mine")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    for words, message in (
        (("-o", tmp_path / "thesis.html"), "exists already"),
        (("-o", tmp_path / "mine", "--format", "svg", "--force"), "has no record"),
        (("-o", tmp_path / "mine", "--format", "html", "--force"), "is not a regular file"),
        (("-o", tmp_path / "report.docx"), "the formats are html, md"),
        (("-o", tmp_path / "report"), "report.html for a page, or add --format png for a folder of figures"),
        (("-o", tmp_path / "report.html", "--width", 8.5), "only png and svg figures have a width"),
        (("-o", tmp_path / "report", "--format", "png", "--width", 3), "figures are 6 to 100 cm wide"),
    ):
        refused = run("report", zoo, *words)
        assert refused.code == 2, (words, refused)
        assert message in refused.err.lower()
    assert (tmp_path / "thesis.html").read_text() == "mine"
    assert run("report", zoo, "-o", tmp_path / "thesis.html", "--force").code == 2
    assert (tmp_path / "thesis.html").read_text() == "mine"
    assert run("report", zoo, "-o", tmp_path / "report.html").code == 0
    assert run("report", zoo, "-o", tmp_path / "report.html", "--force").code == 0
    assert "<html" in (tmp_path / "report.html").read_text(encoding="utf-8")
