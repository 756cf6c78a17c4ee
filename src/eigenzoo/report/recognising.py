"""Recognise a report, which another report may replace."""

from __future__ import annotations

import json
from pathlib import Path

from eigenzoo.report.tidy import HEADER

START = 2**22
"""Number of first bytes that contain a page's generator or Markdown's verdict."""

MAX_BYTES = 2**28
"""Largest size of a JSON document. The largest real one has a tenth of it."""

MARKS = {
    "html": ('<meta name="generator" content="eigenzoo">',),
    "md": ("\nDecided by: ", "\n## The zoo\n"),
    "csv": (",".join(HEADER) + "\n",),
}
KEYS = frozenset({"title", "evidence", "function", "sizes", "models", "made_by"})


def is_report(path: Path, format: str) -> bool:
    """Tell whether a file is a report in this format. A file that cannot be read is not."""
    try:
        if format == "json":
            return path.stat().st_size <= MAX_BYTES and _keys(path.read_bytes()) >= KEYS
        with path.open("rb") as file:
            start = file.read(START).decode("utf-8", "replace")
    except (OSError, ValueError, RecursionError):
        return False
    return all(mark in start for mark in MARKS[format]) and (format != "csv" or start.startswith(MARKS["csv"][0]))


def _keys(data: bytes) -> frozenset[str]:
    found = json.loads(data)
    return frozenset(found) if isinstance(found, dict) else frozenset()
