"""Write the report as Markdown: verdict, controls, all tables, and figures' summaries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from eigenzoo.display import markdown_text
from eigenzoo.report import summary
from eigenzoo.report.document import Report, read_document
from eigenzoo.report.figures import all_figures
from eigenzoo.report.sections import all_sections
from eigenzoo.report.sizes import size_table
from eigenzoo.report.tables import Table, control_table, verdict_table


def render_markdown(document: Mapping[str, Any]) -> str:
    """Write a document as Markdown, with names escaped.

    Raises:
        UsageError: the document holds no evidence.
    """
    return "\n".join(_lines(read_document(document))) + "\n"


def _lines(report: Report) -> Iterator[str]:
    verdict = report.evidence["verdict"]
    yield f"# {markdown_text(report.title)}: {summary.headline(report)}"
    yield f"\n**{markdown_text(verdict['text'])}**\n"
    yield f"Decided by: {markdown_text(summary.decider(report))}.\n"
    for warning in report.evidence["warnings"]:
        yield f"> {markdown_text(warning)}\n"
    for key in summary.keys(report):
        yield f"- {markdown_text(key.label)}: {key.value} {markdown_text(key.of)}"
    for made in (verdict_table(report), control_table(report)):
        if made is not None:
            yield from table_lines(made)
    yield "\n## The zoo\n"
    for fact in [*summary.facts(report), *summary.provenance(report)]:
        yield f"- {markdown_text(fact.label)}: {markdown_text(fact.value)}{f' ({markdown_text(fact.note)})' if fact.note else ''}"
    sizes = size_table(report)
    for section in all_sections(report, all_figures(report, sizes), sizes):
        yield f"\n## {section.title}\n"
        yield markdown_text(section.lead)
        for figure in section.figures:
            yield f"\n*{markdown_text(figure.title)}.* {markdown_text(figure.summary)}"
        for made in section.tables:
            yield from table_lines(made)


def table_lines(table: Table) -> Iterator[str]:
    """Write a table with its name above and its note below."""
    yield f"\n**{markdown_text(table.title)}**\n"
    rules = ["---:" if kind == "number" else "---" for kind in table.kinds]
    yield f"| {' | '.join(map(markdown_text, table.columns))} |"
    yield f"|{'|'.join(rules)}|"
    for row in table.rows:
        yield f"| {' | '.join(map(markdown_text, row))} |"
    if table.note:
        yield f"\n{markdown_text(table.note)}"
