"""eigenzoo and its peers on the same collections in the same run, beside what the machine allows.

    python -m bench [--size small] [--threads 1 2] [--only NAME …] [--folder FOLDER] [--json FILE] [--write]

See bench/README.md for what is measured and how.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench.adding import run_adding
from bench.child import Limits
from bench.commands import run_commands
from bench.growth import run_growth
from bench.machine import describe
from bench.pages import with_tables
from bench.peers import PEERS
from bench.sizes import SIZES, Size
from bench.stored_bytes import run_bytes
from bench.suite import Record, run_case
from bench.tables import (
    Table,
    adding_table,
    bytes_table,
    case_table,
    commands_table,
    console,
    growth_table,
    machine_line,
    rates_table,
)
from eigenzoo.formats.output.whole import check_free_file, write_file

PAGE = Path(__file__).parent / "README.md"
PARTS = ("growth", "adding", "commands", "bytes")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run what is asked, print it, and return the raw numbers."""
    asked = _asked(arguments)
    if asked.json is not None:
        check_free_file(asked.json, force=True, own=_is_ours)
    size = SIZES[asked.size]
    raw: dict[str, Any] = {"size": asked.size, "machine": describe(), "cases": [], **{part: [] for part in PARTS}}
    screen, tables = console(), dict[str, list[Table]]()
    screen.print(machine_line(raw["machine"]))
    with ExitStack() as stack:
        home = Path(asked.folder or stack.enter_context(tempfile.TemporaryDirectory())).resolve()
        home.mkdir(parents=True, exist_ok=True)
        for part, name, found in _measured(asked, size, home):
            raw[part].append(found)
            made = [make(found) for make in MAKERS[part]]
            tables.setdefault(name, []).extend(made)
            for table in made:
                table.show(screen)
            if asked.json is not None:
                write_file(asked.json, json.dumps(raw, indent=1), force=True, own=_is_ours)
            if asked.write:
                _write({name: tables[name]}, raw["machine"])
    return raw


def _is_ours(path: Path) -> bool:
    """Tell whether a file holds the numbers of an earlier run, which may be replaced."""
    try:
        found = json.loads(path.read_bytes())
    except ValueError:
        return False
    return isinstance(found, dict) and {"size", "machine", "cases", *PARTS} <= set(found)


MAKERS: dict[str, tuple[Callable[[Any], Table], ...]] = {
    "cases": (case_table,),
    "growth": (growth_table,),
    "adding": (adding_table,),
    "commands": (commands_table,),
    "bytes": (rates_table, bytes_table),
}


def _measured(asked: argparse.Namespace, size: Size, home: Path) -> Iterator[tuple[str, str, Any]]:
    """Measure part after part: which part, the name of its place on the page, what was found."""
    only = set(asked.only)
    peers = [name for name in PEERS if name in only]
    cases = [case for case in size.cases if case.name in only]
    limits = Limits(size.seconds)
    if not only or peers or cases:
        for case in cases or size.cases:
            chosen = [name for name in peers or case.peers if case.recipe.kind in PEERS[name].kinds]
            for threads in asked.threads if chosen else ():
                yield "cases", case.name, run_case(case, chosen, threads, home, size.repeats, limits)
    parts = (
        ("growth", run_growth, size.growth),
        ("adding", run_adding, size.adding),
        ("commands", run_commands, size.commands),
    )
    for part, run, plan in parts:
        if not only or part in only:
            for threads in asked.threads:
                yield part, part, run(plan, threads, home, size.repeats, limits)
    if not only or "bytes" in only:
        for plan in size.bytes:
            yield "bytes", "bytes", run_bytes(plan, home)


def _asked(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--size", choices=SIZES, default="small", help="ci: seconds; small: a minute or two; full: the tables"
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[1], metavar="T")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="NAME",
        help=f"peers ({', '.join(PEERS)}), collections, {', '.join(PARTS)}",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        help="where collections are made and found again (collections/; at size ci a temporary one)",
    )
    parser.add_argument("--json", type=Path, help="write all raw numbers to this file, after every table")
    parser.add_argument("--write", action="store_true", help="put the tables into bench/README.md (size full)")
    asked = parser.parse_args(arguments)
    known = {*PEERS, *PARTS, *(case.name for case in SIZES[asked.size].cases)}
    if unknown := sorted(set(asked.only) - known):
        parser.error(f"--only: {', '.join(unknown)} is none of {', '.join(sorted(known))}")
    if asked.write and (asked.size != "full" or set(asked.only) & set(PEERS)):
        parser.error("--write puts whole tables of size full on the page: without peers named by --only")
    if asked.folder is None and asked.size != "ci":
        asked.folder = Path("collections")
    return asked


def _write(tables: dict[str, list[Table]], machine: Record) -> None:
    """Put what was measured between its marks; what was not stays."""
    blocks = {
        name: ["", *(line for table in found for line in table.markdown()), f"{machine_line(machine)}.", ""]
        for name, found in tables.items()
    }
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8"), blocks, PAGE), encoding="utf-8")
    print(f"wrote {', '.join(blocks)} into {PAGE.name}", file=sys.stderr)


if __name__ == "__main__":
    main()
