"""How records, numbers and names are written for people: in a terminal, in a `repr`, and as a table of a notebook."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape

NONE = "–"
SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

ROUND_OFF = 1e-8
"""Shares below this are round-off, for the most part."""

BOUNDLESS = 1e4
"""Shares above this have a denominator that is zero but for round-off."""


def printable(text: object) -> str:
    """Make text from files harmless for a terminal: no control characters but line ends, no escape sequences."""
    shown = str(text)
    return shown if shown.isprintable() else "".join(c if c.isprintable() or c == "\n" else "�" for c in shown)


def one_line(text: object) -> str:
    """Make text printable on one line: a name with line ends could say what the command says."""
    return printable(text).replace("\n", "�")


def html_text(text: object) -> str:
    """Make text mean nothing in HTML, on one line.

    >>> html_text("<b>")
    '&lt;b&gt;'
    """
    return escape(one_line(text))


def markdown_text(text: object) -> str:
    """Make text mean nothing in Markdown and in HTML inside it, on one line.

    >>> markdown_text("<b>*a*|_b_")
    '&lt;b&gt;\\\\*a\\\\*\\\\|\\\\_b\\\\_'
    """
    inert = re.sub(r"([\\`*_{}\[\]#!|~$@])", r"\\\1", escape(one_line(text), quote=False))
    # A web address alone would become a link. So would a mail address, which GitHub looks for when escapes are gone.
    inert = re.sub(r"\\@(?=[\w\\-]+\.)", r"<!-- -->\\@", inert)
    return re.sub(r"(?i)://|(?<=www)\.", r"\\\g<0>", inert)


def natural_order(name: str) -> list[tuple[int, int, str]]:
    """Return a key that sorts names by their words and by the values of their numbers.

    >>> sorted(["h.10.w", "h.9.w", "a", "1²2"], key=natural_order)
    ['1²2', 'a', 'h.9.w', 'h.10.w']
    """
    parts = [part for part in re.split("([0-9]+)", name + "\0") if part]
    return [(0, int(part[:18]), part) if part[0] in "0123456789" else (1, 0, part) for part in parts]


def in_percent(share: float | None) -> str:
    """Write a share: to a tenth of a percent, and below ten percent with three significant digits.

    >>> in_percent(0.1234), in_percent(0.0021), in_percent(-0.0208), in_percent(None)
    ('12.3 %', '0.210 %', '−2.08 %', '–')
    >>> in_percent(1e-17), in_percent(1e9)
    ('< 10⁻⁶ %', '> 10⁶ %')
    """
    if share is None:
        return NONE
    if share > BOUNDLESS:
        return "> 10⁶ %"
    if 0 < share < ROUND_OFF:
        return "< 10⁻⁶ %"
    text = f"{100 * share:#.3g}" if 0 < abs(share) < 0.1 else f"{100 * share:.1f}"
    return f"{_plain_exponent(text)} %"


def in_number(value: float | None) -> str:
    """Write a number in up to four significant digits, counts in full.

    >>> in_number(1234567), in_number(0.123456), in_number(1.5e12), in_number(16.0)
    ('1,234,567', '0.1235', '1.5 × 10¹²', '16')
    """
    if value is None:
        return NONE
    if isinstance(value, int):
        return f"{value:,}".replace("-", "−")
    return _plain_exponent(f"{value:.4g}")


def in_bytes(count: float | None) -> str:
    """Write a byte count in three significant digits.

    >>> in_bytes(1_234_567), in_bytes(12)
    ('1.23 MB', '12 B')
    """
    if count is None:
        return NONE
    value, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while value >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.3g} {units[0]}"


def counted(count: int, noun: str) -> str:
    """Write a count with its noun.

    >>> counted(1, "model"), counted(1200, "layer")
    ('1 model', '1,200 layers')
    """
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _plain_exponent(text: str) -> str:
    mantissa, _, power = text.partition("e")
    written = f"{mantissa} × 10{str(int(power)).translate(SUPERSCRIPT)}" if power else mantissa
    return "−" + written[1:] if written.startswith("-") else written


def html_table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[object]], note: str = "") -> str:
    """Write a table for a notebook's `_repr_html_`. Every text is escaped.

    >>> html_table("<b>", ["layer"], [["a"]])
    '<table><caption>&lt;b&gt;</caption><thead><tr><th>layer</th></tr></thead><tbody><tr><td>a</td></tr></tbody></table>'
    """
    head = "".join(f"<th>{html_text(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{html_text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    table = f"<caption>{html_text(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f"<table>{table}</table>" + (f"<p>{html_text(note)}</p>" if note else "")
