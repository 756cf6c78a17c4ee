"""What commands print: tables and sentences on standard output, progress and complaints on standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from eigenzoo.records import Progress as ProgressCallback
from eigenzoo.records import no_progress
from eigenzoo.report.written import counted as counted
from eigenzoo.report.written import in_bytes as in_bytes
from eigenzoo.report.written import in_percent as in_percent

LONGEST = 4000
"""Characters of an error."""


def printable(text: object) -> str:
    """Make text from files harmless for a terminal: no control characters but line ends, no escape sequences."""
    return "".join(char if char.isprintable() or char == "\n" else "�" for char in str(text))


def one_line(text: object) -> str:
    """Make text printable on one line: a name with line ends could say what the command says."""
    return printable(text).replace("\n", "�")


class _Output(Console):
    """A console whose reader may leave: then the command ends quietly, as it does for plain writes."""

    def on_broken_pipe(self) -> None:
        """Say so in Python's own way."""
        raise BrokenPipeError


def output() -> Console:
    """The console for results; as wide as it takes in a pipe, so that nothing is cut."""
    return _Output(highlight=False, width=None if sys.stdout.isatty() else 160)


def say(text: str) -> None:
    """Print a sentence on a line of its own, below an empty one where it begins with a line end."""
    body = text.lstrip("\n")
    output().print(Text("\n" * (len(text) - len(body)) + one_line(body)), soft_wrap=True)


def complain(text: str) -> None:
    """Print an error: one line, whatever names it holds."""
    line = one_line(text)
    line = line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} … {line[-LONGEST // 2 :]}"
    # A terminal that is gone (SIGHUP) changes no exit code.
    with suppress(OSError):
        _Output(stderr=True, highlight=False).print(Text(line, style="red"), soft_wrap=True)


def as_json(document: Mapping[str, Any]) -> str:
    """Write a JSON document that no terminal is moved by."""
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
    # JSON escapes most of what moves a terminal; the rest (C1 controls, half surrogates of odd file names) is escaped here.
    return "".join(char if char.isprintable() or char == "\n" else json.dumps(char)[1:-1] for char in text) + "\n"


def print_json(document: Mapping[str, Any]) -> None:
    """Print one JSON document and nothing else."""
    sys.stdout.write(as_json(document))


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, left: int = 1) -> None:
    """Print a table; the first `left` columns are words, the others numbers."""
    table = Table(title=title or None, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place < left else "right", overflow="fold", header_style="dim")
    for row in rows:
        table.add_row(*(Text(one_line(cell)) for cell in row))
    output().print(table)


@contextmanager
def progress_bar(*, quiet: bool) -> Iterator[ProgressCallback]:
    """Give a progress callback that draws bars on a terminal, and does nothing in a pipe."""
    if quiet or not sys.stderr.isatty():
        yield no_progress
        return
    bars: dict[str, TaskID] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        # Imports and headers take seconds before the first stage.
        starting = progress.add_task("starting", total=None)

        def report(stage: str, done: int, total: int) -> None:
            if stage not in bars:
                progress.update(starting, visible=False)
                bars[stage] = progress.add_task(stage, total=total)
            progress.update(bars[stage], completed=done, total=total)

        yield report
