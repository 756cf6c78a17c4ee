"""Reports: records in, one self-contained page out.

A document is plain JSON values, with these keys:

* `title`: what the zoo is called;
* `evidence`: what `Evidence.to_dict()` gives;
* `function`: what `evaluate(...).to_dict()` gives, or None where no metric was run;
* `sizes`: what a bundle of any rank weighs, or None: `whole_zoo`, `num_models`, `shared`, `per_model`, and for each of
  `layers` its `fixed`, `per_direction`, `per_pair` and `per_coefficient` bytes;
* `rates`: bytes and shares kept of sides (`rows`), of models cut `alone`, and of the `bundle`, or None;
* `models`: for each its `residual` (None without a bundle), `energy` and `source`;
* `made_by`: `command`, `versions`, `date`, `seed`.

Needs the extra `report`; importing this package does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eigenzoo.errors import UsageError
from eigenzoo.errors import require as require_libraries

__all__ = ["check_width", "render_csv", "render_html", "render_markdown", "require", "write_figures"]

LIBRARIES = {"html": ("plotly", "jinja2", "matplotlib"), "png": ("matplotlib",), "svg": ("matplotlib",)}
"""What a format needs besides numpy."""

NARROWEST, WIDEST = 6.0, 100.0
"""Widths of a figure in centimetres; a column of a journal has about 8.5, a page 17."""

Document = Mapping[str, Any]


def render_html(document: Document) -> str:
    """Return one HTML page that needs no network: verdict, controls, tables, and figures that move.

    5 MB for a small zoo, most of it plotly.js; below 15 MB for 500 models of 200 layers. It can be read without JavaScript
    and shows every name of the document as text only. The same document gives the same page.

    Raises:
        UsageError: the document holds no evidence, or a library is missing.
    """
    require("html")
    from eigenzoo.report.page import render_html as render

    return render(document)


def render_markdown(document: Document) -> str:
    """Return verdict, controls, every table and each figure's summary as Markdown, with every name inert in it.

    Raises:
        UsageError: the document holds no evidence.
    """
    from eigenzoo.report.markdown import render_markdown as render

    return render(document)


def render_csv(document: Document) -> str:
    """Return every number as one long table: section, layer, model, series, x, y; docs/report.md lists what each holds.

    Numbers are those of the document, in full; a text cell that a spreadsheet would take for a formula gets a leading
    apostrophe.

    Raises:
        UsageError: the document holds no evidence.
    """
    from eigenzoo.report.csv_text import render_csv as render

    return render(document)


def write_figures(
    document: Document,
    folder: str | Path,
    formats: Sequence[str] = ("png", "svg"),
    width: float | None = None,
) -> list[Path]:
    """Write every figure of the page that the document has numbers for, as files for papers; return their paths.

    Args:
        width: of each figure in centimetres, from 6 to 100: 8.5 fits a column of a journal. By default 11 to 16 cm.

    Raises:
        UsageError: a format that is not png, svg or pdf; a width out of range; the document holds no evidence, or a library
            is missing.
        OutputError: a file of that name exists already.
    """
    require("png")
    if width is not None:
        check_width(width)
    from eigenzoo.report.static_figures import write_figures as write

    return write(document, folder, formats, width)


def check_width(width: float) -> None:
    """Raise UsageError for a width of figures, in centimetres, that letters do not fit into or that takes much memory."""
    if not NARROWEST <= width <= WIDEST:
        raise UsageError(f"a width of {width:g} cm", rule=f"figures are {NARROWEST:g} to {WIDEST:g} cm wide")


def require(format: str) -> None:
    """Raise UsageError where a library for this format is missing: before anything is measured for it."""
    require_libraries(*LIBRARIES.get(format, ()), where="eigenzoo.report", extra="report")
