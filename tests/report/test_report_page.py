from __future__ import annotations

import ast
import base64
import csv
import gzip
import hashlib
import io
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from page_parser import read
from report_documents import HOSTILE, make_document

import eigenzoo.report
from eigenzoo.display import in_percent
from eigenzoo.errors import UsageError
from eigenzoo.report import render_html
from eigenzoo.report.document import read_document
from eigenzoo.report.figures import all_figures
from eigenzoo.report.payload import payload
from eigenzoo.report.similarity import clustered
from eigenzoo.report.tables import layer_table

KINDS = ("subspace", "nothing", "lineage", "hostile", "small")
ROOM = Path(eigenzoo.report.__file__).parent


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_names_nothing_outside_itself(page, kind):
    found = read(page(kind)[1])
    assert found.addresses
    assert all(address.startswith(("data:", "#")) for address in found.addresses)
    assert not {"link", "iframe", "object", "embed", "base", "form"} & set(found.tags)
    styles = "".join(found.styles)
    assert styles
    assert "url(" not in styles
    assert "@import" not in styles


@pytest.mark.parametrize("kind", KINDS)
def test_links_within_the_page_lead_somewhere_and_no_id_is_there_twice(page, kind):
    found = read(page(kind)[1])
    assert len(found.ids) == len(set(found.ids))
    assert {address[1:] for address in found.addresses if address.startswith("#")} <= set(found.ids)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_pages_own_scripts_may_run(page, kind):
    found = read(page(kind)[1])
    rules = dict(rule.strip().split(" ", 1) for rule in found.policy.split(";"))
    allowed = set(re.findall(r"'sha256-([^']+)'", rules["script-src"]))
    run = [text for attributes, text in found.scripts if "type" not in attributes]
    assert {base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in run} == allowed
    assert "unsafe" not in rules["script-src"]
    assert rules["default-src"] == "'none'"
    assert rules["img-src"] == "data: blob:"
    assert not any(name.startswith("on") for _, name, _ in found.attributes)


def test_hostile_names_are_text_and_nothing_else(page):
    text = page("hostile")[1]
    found = read(text)
    shown = found.text
    for name in HOSTILE:
        assert "".join(char if char.isprintable() else "�" for char in name) in shown
    assert all(
        value.startswith("data:image/svg+xml;base64,")
        for tag, name, value in found.attributes
        if tag == "img" and name == "src"
    )
    assert "onerror" not in {name for _, name, _ in found.attributes}
    assert "\u202e" not in text
    assert "\x1b" not in text
    # A script element ends at the first `</script`, whatever stands around it.
    assert text.count("</script") == len(found.scripts)
    assert text.count("</noscript>") == found.tags.count("noscript")


def test_what_scripts_draw_from_cannot_end_their_element(page):
    found = read(page("hostile")[1])
    assert not re.search("[<>&\u2028\u2029]", found.block("report-data"))
    assert HOSTILE[1] in {layer["name"] for layer in found.data["layers"]}


def test_the_same_document_gives_the_same_page(page):
    document, text = page("small")
    assert render_html(document) == text


@pytest.mark.parametrize("kind", ["subspace", "hostile", "lineage"])
def test_every_figure_has_its_numbers_to_take_away(page, kind):
    found = read(page(kind)[1])
    links = [value for tag, name, value in found.attributes if tag == "a" and value.startswith("data:text/csv")]
    tables = {base64.b64decode(link.partition("base64,")[2]).decode() for link in links}
    packs = [str(attributes["id"]) for attributes, _ in found.scripts if str(attributes.get("id")).startswith("csv-")]
    tables |= {gzip.decompress(base64.b64decode(found.block(name))).decode() for name in packs}
    sections = set()
    for table in tables:
        rows = list(csv.DictReader(io.StringIO(table)))
        assert rows
        assert all(len(row) == 6 and None not in row.values() for row in rows)
        sections |= {row["section"] for row in rows}
    assert sections >= {
        "spectrum",
        "heldout",
        "mean",
        "layers",
        "similarity",
        "map",
        "growth",
        "halves",
        "sizes",
        "suitability",
    }
    buttons = {value for tag, name, value in found.attributes if tag == "button" and name == "data-section"}
    assert {f"csv-{section}" for section in buttons} == set(packs)


def test_the_verdict_and_every_sentence_stand_in_the_page(page):
    for kind in KINDS:
        document, text = page(kind)
        evidence, shown = document["evidence"], read(text).text
        assert evidence["verdict"]["text"] in shown
        for sentence in (
            *(control["sentence"] for control in evidence["controls"]),
            *evidence["warnings"],
            *([document["function"]["sentence"]] if document["function"] else []),
        ):
            assert sentence in shown
        assert kind == "hostile" or "`" not in shown, "a page shows the marks of Markdown as they are"


def test_what_was_not_measured_is_said(page):
    shown = read(page("nothing")[1]).text
    assert "has no file sizes" in shown
    assert "No metric was run" in shown
    assert "No subspace was fitted" in shown
    assert "plot-sizes" not in read(page("nothing")[1]).ids


def test_in_sample_is_never_without_held_out_chance_and_the_mean(page):
    document, text = page("subspace")
    summary, found = document["evidence"]["summary"], read(text)
    place = summary["rank"].index(16)
    keys = re.search(r'<dl class="keys">(.*?)</dl>', text, re.DOTALL)
    assert keys
    shown = re.findall(r'<dd class="value">([^<]*)</dd>', keys[1])
    values = [summary[key][place] for key in ("captured", "in_sample", "null")] + [summary["mean_heldout"]]
    rebuilt = document["function"]["mean"]["rebuilt"]["16"]
    assert shown == [f"{100 * value:.1f}\u00a0%" for value in values] + [f"{rebuilt:.4g}"]
    assert f"original {document['function']['mean']['original']:.4g}" in keys[1]
    unmeasured = re.search(r'<dl class="keys">(.*?)</dl>', page("nothing")[1], re.DOTALL)
    assert unmeasured
    assert len(re.findall(r'<dd class="value">', unmeasured[1])) == 4
    assert "share of the layer's variance about the mean" in found.text


@pytest.mark.slow
def test_a_large_zoo_stays_below_fifteen_megabytes(page):
    size = len(page("large")[1].encode())
    print(f"500 models x 200 layers: {size / 1e6:.1f} MB")
    assert size < 15e6


def test_curves_on_the_page_have_about_forty_ranks(page):
    data = read(page("large")[1]).data
    for curves in (data["spectra"]["all"], *data["spectra"]["layers"]):
        assert len(curves["rank"]) <= 40
    assert data["spectra"]["all"]["rank"][:3] == [1, 2, 3]
    assert data["spectra"]["all"]["rank"][-1] == 499


def test_the_matrix_of_cosines_comes_in_clustered_order_to_two_digits(page):
    document, text = page("lineage")
    found, lineage = read(text).data["similarity"], document["evidence"]["lineage"]
    order, names = lineage["order"], document["evidence"]["names"]
    assert found["names"] == [names[place] for place in order]
    values, (low, high) = base64.b64decode(found["cosines"]), found["range"]
    for row in (0, 7, 59):
        for column in (1, 3, 58):
            cosine = lineage["cosines"][order[row]][order[column]]
            shown = low + (high - low) * values[row * len(names) + column] / 255
            assert shown == pytest.approx(cosine, abs=(high - low) / 500)
    # Three groups in clustered order: three outlines.
    assert sorted(last - first + 1 for _, first, last in found["runs"]) == [20, 20, 20]


def test_colours_run_over_the_cosines_that_there_are():
    document = make_document(num_models=6, num_layers=2)
    draw = np.random.default_rng(0).uniform(0.93, 0.989, (6, 6))
    cosines = (draw + draw.T) / 2
    np.fill_diagonal(cosines, 1.0)
    document["evidence"]["lineage"]["cosines"] = cosines.tolist()
    between = cosines[~np.eye(6, dtype=bool)]
    report = read_document(document)
    low, high = payload(report, all_figures(report, None), None)["similarity"]["range"]
    assert low <= between.min() < low + 0.01
    assert high - 0.01 < between.max() <= high
    assert f"Colours run from {low:g} to {high:g}" in all_figures(report, None)["similarity"].what
    cosines[0, 1] = cosines[1, 0] = -0.3
    document["evidence"]["lineage"]["cosines"] = cosines.tolist()
    shown = clustered(read_document(document))
    assert shown.low == -shown.high
    assert shown.low <= -0.3


def test_lists_of_layers_are_in_natural_order():
    report = read_document(make_document(num_models=6, num_layers=66))
    found = payload(report, {}, None)
    names = [found["layers"][place]["name"] for place in found["by_name"]]
    depths = [int(name.split(".")[2]) for name in names]
    assert sorted(names) != names
    assert depths == sorted(depths)
    assert depths[-1] == 10
    table = layer_table(report)
    assert table is not None
    assert [row[0] for row in table.rows] == names


def test_shares_of_like_names_have_one_value_each_and_the_reason(page):
    document, text = page("subspace")
    evidence, found = document["evidence"], read(text)
    (rows,) = re.findall(r"aria-label=\"Why shares with similar names differ\".*?</table>", text, re.DOTALL)
    cells = [
        re.sub("<[^>]*>", "", cell).replace("\u00a0", " ") for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", rows)
    ]
    table = {cells[at]: cells[at + 1] for at in range(5, len(cells), 5)}
    assert len(table) == (len(cells) - 5) // 5
    place = evidence["summary"]["rank"].index(16)
    for name, key in (("held out", "captured"), ("in-sample", "in_sample"), ("chance, held out", "null")):
        assert table[name] == in_percent(evidence["summary"][key][place])
    layers = [layer for layer in evidence["layers"].values() if layer["variance"]]
    weights = [layer["num_values"] for layer in layers]
    sums = [sum(layer["explained_variance_ratio"][:16]) for layer in layers]
    everyone = in_percent(float(np.average(sums, weights=weights)))
    assert table["all models"] == everyone
    assert f"directions explain {everyone} of the variance of all 40 models" in found.text


@pytest.mark.parametrize(
    "document",
    [
        {"evidence": {"layers": {}}},
        {"evidence": {"layers": {"a": {}}}},
        {
            "evidence": {"layers": {"a": {"variance": 1.0}}},
            "function": {},
            "sizes": {"layers": {"a": {}}},
            "models": {"m": {}},
        },
        {"evidence": {"names": ["m"], "growth": None, "layers": {"a": {"variance": 0.0, "split_half": None}}}},
    ],
)
def test_a_page_of_what_little_there_is(document):
    assert "<h1>" in render_html(document)


@pytest.mark.slow
def test_any_part_may_be_missing(monkeypatch):
    # Half of the time of a page is taken by where letters stand in figures, which no part changes.
    monkeypatch.setattr("eigenzoo.report.static_figures._lay_out", lambda canvas, kind: canvas.set_layout_engine(None))
    document = make_document(num_models=6, num_layers=3)
    for key in list(document["evidence"]):
        if key != "layers":
            without = {**document, "evidence": {**document["evidence"], key: None}}
            assert "<h1>" in render_html(without)


def test_nan_becomes_nothing():
    document = make_document(num_models=6, num_layers=2, still=False)
    first = next(iter(document["evidence"]["layers"].values()))
    first["heldout"]["captured"][0] = float("nan")
    first["effective_rank"] = float("inf")
    found = read(render_html(document))
    assert "NaN" not in found.block("report-data")
    assert not {"nan", "inf", "nan %", "inf %"} & set(found.texts)


def test_a_document_without_evidence_is_refused():
    for document in ({}, {"evidence": None}, {"evidence": {"layers": []}}):
        with pytest.raises(UsageError, match="no evidence with layers"):
            render_html(document)


def test_missing_libraries_are_named_with_what_to_install(monkeypatch):
    monkeypatch.setattr("eigenzoo.errors.find_spec", lambda name: None if name == "plotly" else object())
    with pytest.raises(UsageError, match=r"not installed: plotly.*\[report\]"):
        render_html({"evidence": {"layers": {}}})


def test_importing_the_room_is_light():
    code = "import sys, eigenzoo.report; print(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {module.partition(".")[0] for module in done.stdout.split()}
    assert not loaded & {"torch", "plotly", "jinja2", "matplotlib", "numpy"}


def test_the_room_knows_errors_and_records_only():
    for path in ROOM.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert not name.startswith("torch"), path.name
                if name.startswith("eigenzoo"):
                    allowed = ("eigenzoo.report", "eigenzoo.errors", "eigenzoo.records", "eigenzoo.display")
                    assert name.startswith(allowed), path.name
