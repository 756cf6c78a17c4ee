"""Sizes and errors of all axes and of models cut alone, and what sides keep: page, Markdown, CSV and figures."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

import pytest
from report_documents import HOSTILE, make_document

from eigenzoo.report import render_csv, render_html, render_markdown
from eigenzoo.report.document import read_document
from eigenzoo.report.figures import all_figures
from eigenzoo.report.payload import payload
from eigenzoo.report.sizes import size_table

Json = dict[str, Any]

ALONE = [
    {"rank": 1, "residual": 0.3, "bytes": 600, "per_model": 60, "about": "zero", "captured": 0.6},
    {"rank": 2, "residual": 0.1, "bytes": 1100, "per_model": 110, "about": "zero", "captured": 0.9},
    {"rank": 1, "residual": 0.2, "bytes": 900, "per_model": 60, "about": "mean", "captured": 0.7},
]
ROWS = [
    {
        "axes": axes,
        "rank": rank,
        "bytes": 1000 * rank,
        "per_model": 10 * rank,
        "captured": 0.2 * rank,
        "heldout": 0.1 * rank,
    }
    for axes in ("outputs", "inputs", "outputs,inputs")
    for rank in (1, 2)
]
SIDES = {
    axes: {"rank": [1, 2], "in_sample": [0.3, 0.5], "captured": [0.2, 0.35]} for axes in ("outputs", "outputs,inputs")
}


@pytest.fixture(scope="module")
def document() -> Json:
    return make_document(num_models=14, num_layers=3)


@pytest.fixture
def rated(document: Json) -> Json:
    evidence = {**document["evidence"], "summary": {**document["evidence"]["summary"], "sides": SIDES}}
    bundle = {"axes": "outputs,inputs", "bytes": 1500, "per_model": 20, "captured": 0.5, "heldout": 0.4}
    rates = {"num_models": 12, "rows": ROWS, "alone": ALONE, "bundle": bundle, "sentences": ["Cut them alone."]}
    return {**document, "evidence": evidence, "rates": rates}


def columns(document: Json) -> Json:
    report = read_document(document)
    sizes = size_table(report)
    return json.loads(json.dumps(payload(report, all_figures(report, sizes), sizes), allow_nan=False))


def test_lines_are_what_is_lost_by_bytes(rated: Json) -> None:
    found = columns(rated)
    assert found["rates_outputs"]["all"] == {"bytes": [1000, 2000], "lost": [0.9, 0.8]}
    assert found["alone_zero"]["all"] == {"bytes": [600, 1100], "lost": [0.4, 0.1]}
    assert found["alone_mean"]["all"] == {"bytes": [900], "lost": [0.3]}
    assert found["bundle"]["all"] == {"bytes": [1500], "lost": [0.6]}
    assert found["kept_outputs,inputs"]["all"] == {"rank": [1, 2], "in_sample": [0.3, 0.5], "captured": [0.2, 0.35]}
    assert found["kept_inputs"]["all"] == {"rank": [], "in_sample": [], "captured": []}
    assert {"rates", "sides"} <= set(found["figures"])


def test_without_them_there_are_no_such_figures(document: Json) -> None:
    assert not {"rates", "sides"} & set(columns(document)["figures"])
    nothing = {"num_models": 12, "rows": [], "alone": [], "bundle": None, "sentences": []}
    assert "rates" not in columns({**document, "rates": nothing})["figures"]


def test_tables_and_sentences_are_in_the_markdown(rated: Json) -> None:
    text = render_markdown(rated)
    assert "*Error against size, with and without sharing.* Cut them alone." in text
    assert "| each model cut alone | 2 | 1.1 kB | 110 B | 10.0 % | 10.0 % |" in text
    assert "| each cut alone about the mean, stored once | 1 | 900 B | 60 B | 30.0 % | 30.0 % |" in text
    assert "| axes outputs, inputs | 2 | 2 kB | 20 B | 60.0 % | 80.0 % |" in text
    assert "| this bundle, axes outputs, inputs | – | 1.5 kB | 20 B | 50.0 % | 60.0 % |" in text
    assert "| 2 | 50.0 % | 35.0 % | 50.0 % | 35.0 % |" in text


def test_a_bundle_of_sides_has_no_sizes_by_rank(rated: Json) -> None:
    text = render_markdown({**rated, "sizes": None})
    assert "this bundle, axes outputs, inputs" in text
    assert "Axis models has a table of its own." not in text
    assert "lost" not in columns({**rated, "sizes": None})


def test_every_number_is_in_the_csv(rated: Json) -> None:
    rows = {
        (row["section"], row["series"], row["x"]): row["y"] for row in csv.DictReader(io.StringIO(render_csv(rated)))
    }
    assert rows["rates", "outputs_heldout", "2"] == "0.2"
    assert rows["rates", "alone_bytes", "1"] == "600"
    assert rows["rates", "alone_about_mean_captured", "1"] == "0.7"
    assert rows["rates", "bundle_heldout", ""] == "0.4"
    assert rows["sides", "outputs,inputs_captured", "2"] == "0.35"


def test_models_cut_alone_are_in_the_tables_of_function(document: Json) -> None:
    function = json.loads(json.dumps(document["function"]))
    for record in (function["mean"], function["spread"], *function["models"].values()):
        record["alone"] = {"1": 0.75, "2": 0.875}
    text = render_markdown({**document, "function": function})
    assert "| each cut alone, rank 2 | 0.875 | ± 0.875 |" in text
    rows = {
        (row["section"], row["model"], row["series"], row["x"]): row["y"]
        for row in csv.DictReader(io.StringIO(render_csv({**document, "function": function})))
    }
    assert rows["function", "(mean)", "alone", "1"] == "0.75"


def test_names_in_rates_are_inert(rated: Json) -> None:
    text = " ".join(HOSTILE)
    rates = {**rated["rates"], "sentences": [text], "rows": [{**ROWS[0], "axes": text}]}
    page = render_html({**rated, "rates": rates})
    assert "<img src=x" not in page
    assert "<script>alert" not in page
