"""The report as Markdown: verdict, controls, every table, and each figure's summary."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from eigenzoo.report import summary
from eigenzoo.report.document import Report, read_document
from eigenzoo.report.figures import all_figures
from eigenzoo.report.sections import all_sections
from eigenzoo.report.sizes import size_table
from eigenzoo.report.tables import Table, control_table, verdict_table


def render_markdown(document: Mapping[str, Any]) -> str:
    """Write a document as Markdown, with every name inert in it.

    Raises:
        UsageError: the document holds no evidence.
    """
    return "\n".join(_lines(read_document(document))) + "\n"


def _lines(report: Report) -> Iterator[str]:
    verdict = report.evidence["verdict"]
    yield f"# {inert(report.title)}: {summary.headline(report)}"
    yield f"\n**{inert(verdict['text'])}**\n"
    yield f"Decided by: {inert(summary.decider(report))}.\n"
    for warning in report.evidence["warnings"]:
        yield f"> {inert(warning)}\n"
    for key in summary.keys(report):
        yield f"- {inert(key.label)}: {key.value} {inert(key.of)}"
    for made in (verdict_table(report), control_table(report)):
        if made is not None:
            yield from table_lines(made)
    yield "\n## The zoo\n"
    for fact in [*summary.facts(report), *summary.provenance(report)]:
        yield f"- {inert(fact.label)}: {inert(fact.value)}{f' ({inert(fact.note)})' if fact.note else ''}"
    sizes = size_table(report)
    for section in all_sections(report, all_figures(report, sizes), sizes):
        yield f"\n## {section.title}\n"
        yield inert(section.lead)
        for figure in section.figures:
            yield f"\n*{inert(figure.title)}.* {inert(figure.summary)}"
        for made in section.tables:
            yield from table_lines(made)


def table_lines(table: Table) -> Iterator[str]:
    """Write a table, its name above and its note below."""
    yield f"\n**{inert(table.title)}**\n"
    rules = ["---:" if kind == "number" else "---" for kind in table.kinds]
    yield f"| {' | '.join(map(inert, table.columns))} |"
    yield f"|{'|'.join(rules)}|"
    for row in table.rows:
        yield f"| {' | '.join(map(inert, row))} |"
    if table.note:
        yield f"\n{inert(table.note)}"


def inert(text: str) -> str:
    """Make text mean nothing in Markdown and HTML.

    >>> inert("<b>*a*|_b_")
    '&lt;b&gt;\\\\*a\\\\*\\\\|\\\\_b\\\\_'
    """
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]#!|~$@])", r"\\\1", text).replace("://", ":\u200b//").replace("www.", "www\u200b.")
