"""Print tables and sentences on standard output, and progress and errors on standard error."""

from __future__ import annotations

import json
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from rich.cells import cell_len
from rich.console import Console, JustifyMethod
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from eigenzoo.display import one_line
from eigenzoo.records import Progress as ProgressCallback
from eigenzoo.records import no_progress

LONGEST = 4000
"""Largest number of characters of an error."""

SHORTEST = 16
"""Least width of a column of words."""

PIPE = 10_000
"""Width of a table outside a terminal, so that nothing is shortened."""

GAP = 2
"""Number of spaces between two columns of a table."""


class _Output(Console):
    """A console for pipes. If the reader closes the pipe, the command ends without an error, as for plain writes."""

    def on_broken_pipe(self) -> None:
        """Raise Python's BrokenPipeError."""
        raise BrokenPipeError


def output() -> Console:
    """Return the console for results. In a pipe it is so wide that nothing is shortened."""
    return _Output(highlight=False, width=None if sys.stdout.isatty() else PIPE)


def say(text: str, *, style: str = "", hang: int = 0) -> None:
    """Print a sentence on its own line, after an empty line if it begins with a newline.

    On a terminal it is wrapped, and its other lines are indented by `hang` columns.
    """
    body = text.lstrip("\n")
    _print(output(), "\n" * (len(text) - len(body)) + one_line(body), style, hang)


def _print(console: Console, text: str, style: str, hang: int = 0) -> None:
    """Print text, wrapped between words on a terminal. A number stays with its unit, and a long path is not broken."""
    if console.is_terminal:
        joined = re.sub(r"(?<=\d) (?=%|[kMGT]?B\b)", "\N{NO-BREAK SPACE}", text)
        lines = [
            textwrap.fill(
                line, console.width, subsequent_indent=" " * hang, break_long_words=False, break_on_hyphens=False
            )
            for line in joined.split("\n")
        ]
        text = "\n".join(lines)
    console.print(Text(text, style=style), soft_wrap=True)


def complain(text: str) -> None:
    """Print an error as one line, also if it contains names with line breaks."""
    line = one_line(text)
    line = line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} … {line[-LONGEST // 2 :]}"
    # A closed terminal (SIGHUP) must not change the exit code.
    with suppress(OSError):
        _print(_Output(stderr=True, highlight=False), line, "red")


def as_json(document: Mapping[str, Any]) -> str:
    """Write a JSON document without terminal control characters."""
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
    # JSON escapes most control characters. The others (C1 controls, half surrogates of odd file names) are escaped here.
    return "".join(char if char.isprintable() or char == "\n" else json.dumps(char)[1:-1] for char in text) + "\n"


def print_json(document: Mapping[str, Any]) -> None:
    """Print one JSON document and nothing else."""
    sys.stdout.write(as_json(document))


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, left: int = 1) -> None:
    """Print a table. The first `left` columns are words, the others numbers.

    If it is wider than the terminal, words are shortened in the middle. If that is not enough, it is split into tables below each
    other, each with the words, which are shortened only if this saves a table. No cell is broken.
    """
    console = output()
    cells = [[one_line(cell) for cell in row] for row in rows]
    widths = [max(map(cell_len, column)) for column in zip(*cells, strict=True)] if cells else [0] * len(columns)
    full_widths = [max(width, cell_len(column)) for width, column in zip(widths, columns, strict=True)]
    if sum(full_widths) + GAP * (len(full_widths) - 1) <= console.width:
        widths = full_widths
    else:  # headings of several words take several lines
        widths = [
            max(width, *map(cell_len, column.split() or [""])) for width, column in zip(widths, columns, strict=True)
        ]
    _shorten(widths, left, console.width)
    groups = _side_by_side(widths, left, console.width)
    for number, group in enumerate(groups):
        table = Table(
            title=title if number == 0 and title else None, title_justify="left", title_style="bold", box=None
        )
        table.pad_edge = False
        for column in group:
            side: JustifyMethod = "left" if column < left else "right"
            table.add_column(columns[column], justify=side, width=widths[column], no_wrap=False, header_style="dim")
        for row in cells:
            table.add_row(*(Text(_middle_out(row[column], widths[column]), no_wrap=True) for column in group))
        console.print(table, crop=False)


def _shorten(widths: list[int], left: int, room: int) -> None:
    """Narrow the widest columns of words as long as this saves a table."""

    def tables() -> tuple[int, bool]:
        groups = _side_by_side(widths, left, room)
        return len(groups), any(sum(widths[column] + GAP for column in group) - GAP > room for group in groups)

    full_widths = widths[:left]
    widths[:left] = [min(width, SHORTEST) for width in full_widths]
    fewest = tables()
    widths[:left] = full_widths
    while tables() > fewest:
        widths[max(range(left), key=lambda column: widths[column])] -= 1


def _side_by_side(widths: Sequence[int], left: int, room: int) -> list[list[int]]:
    """Assign columns to tables that fit the width. Each table begins with the columns of words."""
    words = list(range(left))
    start = sum(widths[column] + GAP for column in words)
    groups, width = [list(words)], start
    for column in range(left, len(widths)):
        if width + widths[column] > room and len(groups[-1]) > len(words):
            groups.append(list(words))
            width = start
        groups[-1].append(column)
        width += widths[column] + GAP
    return groups


def _middle_out(text: str, width: int) -> str:
    """Shorten text in the middle, because names differ at their ends.

    >>> _middle_out("model.layers.11.self_attn.q_proj", 15)
    'model.l….q_proj'
    """
    if cell_len(text) <= width:
        return text
    head = width // 2
    return f"{text[:head]}…{text[len(text) - (width - head - 1) :]}"


@contextmanager
def progress_bar(*, quiet: bool) -> Iterator[ProgressCallback]:
    """Yield a progress callback that draws bars on a terminal and does nothing in a pipe."""
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
