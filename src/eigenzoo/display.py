"""How records, numbers and names are written for people: in a terminal, in a `repr`, and as a table of a notebook."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


def printable(text: object) -> str:
    """Make text from files harmless for a terminal: no control characters but line ends, no escape sequences."""
    return "".join(char if char.isprintable() or char == "\n" else "�" for char in str(text))


def one_line(text: object) -> str:
    """Make text printable on one line: a name with line ends could say what the command says."""
    return printable(text).replace("\n", "�")


def in_bytes(count: int) -> str:
    """Write a byte count as people read it.

    >>> in_bytes(1_234_567)
    '1.23 MB'
    """
    value, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while value >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.3g} {units[0]}"


def counted(number: int, thing: str) -> str:
    """Write how many there are of a thing.

    >>> counted(1, "model"), counted(1200, "layer")
    ('1 model', '1,200 layers')
    """
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def in_percent(share: float | None) -> str:
    """Write a share; a dash where there is none.

    >>> in_percent(0.1234), in_percent(1e-17), in_percent(1e9), in_percent(None)
    ('12.3 %', '< 1e-06 %', '> 1e+06 %', '–')
    """
    if share is None:
        return "–"
    if share > 1e4:
        return "> 1e+06 %"  # of a model that is zero, or zero but for round-off
    if 0 < share < 1e-8:
        return "< 1e-06 %"  # round-off, for the most part
    return f"{100 * share:.3g} %" if 0 < share < 0.1 else f"{100 * share:.1f} %"


def html_table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[object]], note: str = "") -> str:
    """Write a table for a notebook's `_repr_html_`. Every text is escaped.

    >>> html_table("<b>", ["layer"], [["a"]])
    '<table><caption>&lt;b&gt;</caption><thead><tr><th>layer</th></tr></thead><tbody><tr><td>a</td></tr></tbody></table>'
    """
    head = "".join(f"<th>{_escaped(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{_escaped(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    table = f"<caption>{_escaped(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f"<table>{table}</table>" + (f"<p>{_escaped(note)}</p>" if note else "")


def _escaped(text: object) -> str:
    return escape(one_line(text))
