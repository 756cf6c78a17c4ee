from __future__ import annotations

import csv
import io
import re
from typing import Any

import pytest
from report_documents import HOSTILE, make_document

from eigenzoo.errors import UsageError
from eigenzoo.report import render_csv, render_markdown
from eigenzoo.report.csv_text import safe_cell

Rows = list[dict[str, str]]


def rows_of(document: dict[str, Any]) -> Rows:
    rows = list(csv.DictReader(io.StringIO(render_csv(document))))
    assert list(rows[0]) == ["section", "layer", "model", "series", "x", "y"]
    return rows


def select(rows: Rows, **wanted: str) -> Rows:
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return make_document(num_models=14, num_layers=5, axes=True)


@pytest.fixture(scope="module")
def rows(document) -> Rows:
    return rows_of(document)


def test_csv_holds_the_documents_numbers_in_full(document, rows):
    name, layer = next(iter(document["evidence"]["layers"].items()))
    series = {
        ("spectrum", "spectrum"): layer["explained_variance_ratio"],
        ("spectrum", "norm_matched"): layer["null"]["norm_matched"],
        ("spectrum", "low"): layer["null"]["low"],
        ("heldout", "in_sample"): layer["heldout"]["in_sample"],
        ("heldout", "heldout"): layer["heldout"]["captured"],
        ("heldout", "null"): layer["heldout"]["null"],
        ("heldout", "leave_one_out"): layer["heldout"]["leave_one_out"]["captured"],
        ("halves", "cosine"): layer["split_half"]["cosines"],
        ("axes", "outputs"): layer["axes"]["outputs"]["explained_variance_ratio"],
        ("suitability", "exponent_of_half"): layer["suitability"]["exponents"],
    }
    for (section, kind), values in series.items():
        found = select(rows, section=section, layer=name, series=kind)
        assert [float(row["y"]) for row in found] == values
    ranks = [int(row["x"]) for row in select(rows, section="heldout", layer=name, series="heldout")]
    assert ranks == layer["heldout"]["rank"]


def test_csv_of_models_growth_function_and_sizes(document, rows):
    evidence = document["evidence"]
    captured = [float(row["y"]) for row in select(rows, section="growth", series="captured")]
    assert captured == evidence["growth"]["captured"]
    place = [float(row["y"]) for row in select(rows, section="map", model="task-00003", series="coefficient")]
    assert place == evidence["map"]["task-00003"]
    (residual,) = select(rows, section="residuals", model="task-00003", series="residual")
    assert float(residual["y"]) == document["models"]["task-00003"]["residual"]
    (rebuilt,) = select(rows, section="function", model="(mean)", series="rebuilt", x="8")
    assert float(rebuilt["y"]) == document["function"]["mean"]["rebuilt"]["8"]
    (cosine,) = select(rows, section="similarity", model="task-00002", series="task-00005")
    assert float(cosine["y"]) == evidence["lineage"]["cosines"][2][5]
    assert len(select(rows, section="similarity")) == 14 * 13 // 2
    assert len(select(rows, section="sizes", series="bytes_by_rank")) == 14
    (code,) = select(rows, section="verdict", series="code")
    assert code["y"] == evidence["verdict"]["code"]
    test = {row["series"]: row["y"] for row in select(rows, section="verdict") if row["series"].startswith("test_")}
    known = {f"test_{key}": str(value) for key, value in evidence["summary"]["test"].items() if value is not None}
    assert test == known


def test_csv_leaves_out_what_is_not_known(rows):
    assert all(row["y"] for row in rows)
    assert not select(rows, section="function", series="head_only")


def test_no_text_of_a_csv_is_a_formula():
    document = make_document(num_models=12, num_layers=12, hostile=True)
    table = render_csv(document)
    cells = [cell for row in csv.reader(io.StringIO(table)) for cell in row]
    for cell in cells:
        if cell.startswith(("=", "+", "-", "@", "\t", "\r")):
            float(cell)
    assert "'=HYPERLINK(1)" in cells
    assert "=HYPERLINK(1)" not in cells


@pytest.mark.parametrize("text", ["=1", "+1", "-1", "@x", "\tx", "\rx"])
def test_guarded_cells(text):
    assert safe_cell(text) == "'" + text


def test_numbers_are_not_guarded():
    assert safe_cell(-1.5) == -1.5
    assert safe_cell(None) is None


def test_markdown_says_verdict_controls_and_numbers(document):
    text = render_markdown(document)
    evidence = document["evidence"]
    captured = evidence["summary"]["captured"][evidence["summary"]["rank"].index(4)]
    assert text.startswith(
        "# digits-vit: These models share directions, but 4 directions per layer keep only "
        f"{100 * captured:.1f} % of held-out models' variance."
    )
    assert evidence["verdict"]["text"] in text
    assert "Decided by: models held out of the fit." in text
    for control in evidence["controls"]:
        assert control["sentence"] in text
    place = evidence["summary"]["rank"].index(4)
    assert (
        f"- held out: {100 * evidence['summary']['captured'][place]:.1f} % of held-out models' variance about the mean, rank 4"
        in text
    )
    name, layer = next(iter(evidence["layers"].items()))
    (row,) = [line for line in text.splitlines() if line.startswith(f"| {name} | a shared subspace |")]
    assert f"| {100 * layer['heldout']['captured'][place]:.1f} % |" in row
    assert f"| {layer['rank']['var90']} |" in row


def test_no_subspace_is_called_low_dimensional_that_keeps_less_than_half_of_held_out_models(document):
    summary = {**document["evidence"]["summary"]}
    for share, start in ((0.5, "a low-dimensional subspace: "), (0.1, "directions, but ")):
        summary["captured"] = [share] * len(summary["rank"])
        text = render_markdown({**document, "evidence": {**document["evidence"], "summary": summary}})
        kept = f"4 directions per layer keep {'' if share == 0.5 else 'only '}{100 * share:.1f} % of held-out models' variance."
        assert text.startswith(f"# digits-vit: These models share {start}{kept}")
    text = render_markdown({**document, "evidence": {**document["evidence"], "summary": {**summary, "captured": []}}})
    assert text.startswith("# digits-vit: These models share directions.\n")


def test_markdown_tables_are_whole(document):
    width = None
    for line in render_markdown(document).splitlines():
        if line.startswith("|"):
            cells = len(re.findall(r"(?<!\\)\|", line))
            assert width in (None, cells), line
            width = cells
        else:
            width = None


def test_names_are_inert_in_markdown():
    text = render_markdown(make_document(hostile=True, num_models=12, num_layers=12))
    assert "<" not in text
    assert not re.search(r"(?<!\\)\*\*d", text)
    assert not re.search(r"(?<!\\)`c", text)
    assert "\u202e" not in text
    assert "\x1b" not in text
    assert r"\$x^2\$" in text
    assert all(HOSTILE[0] not in line for line in text.splitlines())


def test_what_was_not_measured_is_said_in_markdown():
    text = render_markdown(make_document(num_models=6, num_layers=2, function=False, sizes=False, bundle=False))
    assert "No metric was run" in text
    assert "has no file sizes" in text
    assert "No subspace was fitted" in text


def test_text_without_evidence_is_refused():
    for render in (render_markdown, render_csv):
        with pytest.raises(UsageError, match="no evidence with layers"):
            render({"title": "zoo"})
