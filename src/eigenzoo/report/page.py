"""Write the page: one HTML file that can be read without network and without JavaScript.

Scripts run only if the page's own policy contains their hash, so that no name in a document can become a script.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

import plotly.offline
from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from eigenzoo.display import html_text
from eigenzoo.report import summary
from eigenzoo.report.csv_text import LINK_LIMIT, data_link, packed, section_csv
from eigenzoo.report.document import Report, read_document
from eigenzoo.report.figures import Figure, all_figures
from eigenzoo.report.payload import payload
from eigenzoo.report.sections import all_sections
from eigenzoo.report.sizes import size_table
from eigenzoo.report.static_figures import drawn
from eigenzoo.report.suitability import limits
from eigenzoo.report.tables import verdict_table

SCRIPTS = ("base.js", "lines.js", "maps.js", "sizes.js", "suitability.js", "start.js")
TEMPLATES = files("eigenzoo.report") / "templates"

POLICY = (
    "default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; "
    "base-uri 'none'; form-action 'none'"
)

ESCAPES = {ord(char): f"\\u{ord(char):04x}" for char in "<>&\u2028\u2029"}
"""Characters that could end a script element, or a line of a script, inside a JSON string."""


def render_html(document: Mapping[str, Any]) -> str:
    """Write a document as one self-contained HTML page.

    Args:
        document: plain JSON values; see `eigenzoo.report`.

    The page contains plotly.js (4.8 MB), its numbers at about forty ranks and four digits, and static figures and tables for
    readers without JavaScript. The same document gives the same page.

    Raises:
        UsageError: the document holds no evidence.
    """
    report = read_document(document)
    sizes = size_table(report)
    figures = all_figures(report, sizes)
    early, plotly_js, page_js = _read("early.js"), plotly.offline.get_plotlyjs(), _page_script()
    links, packs = downloads(report, figures)
    environment = Environment(
        loader=PackageLoader("eigenzoo.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=unbroken,
    )
    environment.filters["breakable"] = breakable
    return environment.get_template("page.html").render(
        policy=policy(early, plotly_js, page_js),
        style=Markup(_read("style.css")),
        early=Markup(early),
        plotly_js=Markup(plotly_js),
        page_js=Markup(page_js),
        data=Markup(json_text(payload(report, figures, sizes))),
        title=report.title,
        evidence=report.evidence,
        headline=summary.headline(report),
        decider=summary.decider(report),
        keys=summary.keys(report),
        verdicts=verdict_table(report),
        controls=summary.controls(report),
        facts=summary.facts(report),
        provenance=summary.provenance(report),
        sections=all_sections(report, figures, sizes),
        stills={name: still(report, figure) for name, figure in figures.items()},
        links=links,
        packs=packs,
        sizes=sizes,
        rank=min(report.rank, len(sizes.by_rank) - 1) if sizes else 0,
        limits=limits(report.evidence["suitability"]["thresholds"]),
        metric=report.function["metric"] if report.function else "",
    )


def downloads(report: Report, figures: Mapping[str, Figure]) -> tuple[dict[str, str], dict[str, str]]:
    """Return the CSV of every section with a figure: short ones as links, long ones compressed."""
    links, packs = {}, {}
    for section in dict.fromkeys(figure.section for figure in figures.values()):
        text = section_csv(report, section)
        if len(text) <= LINK_LIMIT:
            links[section] = data_link(text)
        else:
            packs[section] = packed(text)
    return links, packs


def still(report: Report, figure: Figure) -> str:
    """Return a static figure as the source of an image."""
    return "data:image/svg+xml;base64," + base64.b64encode(drawn(report, figure, "svg")).decode("ascii")


def unbroken(value: Any) -> Any:
    """Keep a number and its percent sign on one line.

    >>> unbroken("83.2 %")
    '83.2\\xa0%'
    """
    return value.replace(" %", "\u00a0%") if isinstance(value, str) and not isinstance(value, Markup) else value


def breakable(text: str) -> Markup:
    """Permit line breaks in a long name after its dots and slashes.

    >>> breakable("a.b<i>")
    Markup('a.<wbr>b&lt;i&gt;')
    """
    return Markup("<wbr>").join(Markup(unbroken(html_text(part))) for part in re.split(r"(?<=[./_])", text))


def policy(*scripts: str) -> str:
    """Return the content security policy that permits these inline scripts only."""
    hashes = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii") for script in scripts)
    return POLICY.format(hashes=" ".join(f"'sha256-{digest}'" for digest in hashes))


def json_text(value: Any) -> str:
    """Write JSON that cannot end the script element it stands in.

    >>> json_text({"a": "</script>"})
    '{"a":"\\\\u003c/script\\\\u003e"}'
    """
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).translate(ESCAPES)


def _page_script() -> str:
    return "(() => {\n'use strict';\n" + "\n".join(_read(name) for name in SCRIPTS) + "\n})();\n"


def _read(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")
