"""The tables of a run: the same cells for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

from bench.adding import STEPS
from bench.pages import markdown
from bench.peers import PEERS
from bench.rates import FILES, MEAN, NUMBERS, PARENT, Row, at_number, keeps, loses, smallest
from eigenzoo.display import in_percent

Record = dict[str, Any]
NONE = "–"
REMARK = "remark"
WIDTH = 190
"""Columns of a table that is not printed to a terminal."""


@dataclass(frozen=True)
class Table:
    """A title, what stands below it, and cells."""

    title: str
    notes: Sequence[str]
    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> list[str]:
        """The lines of a page."""
        return [f"**{self.title}**", "", *markdown(self.head, self.rows), "", *(f"{note}  " for note in self.notes), ""]

    def show(self, console: Console) -> None:
        """Print it."""
        table = RichTable(title=self.title, title_justify="left", caption="\n".join(self.notes), caption_justify="left")
        for place, name in enumerate(self.head):
            table.add_column(name, justify="left" if place == 0 or name == REMARK else "right", no_wrap=place == 0)
        for row in self.rows:
            table.add_row(*row)
        console.print(table)


def console() -> Console:
    """A console whose tables are not cut where nobody looks at them."""
    found = Console(highlight=False, markup=False)
    return found if found.is_terminal else Console(highlight=False, markup=False, width=WIDTH)


HEAD = (
    "method",
    "wall s",
    "CPU s",
    "memory above imports",
    "peak memory",
    "top-k error",
    "tail error",
    "sine of angle",
    "× ceiling",
    "× eigenzoo",
    REMARK,
)


def case_table(case: Record) -> Table:
    """Every run of one case."""
    runs = case["runs"]
    ours = {run["state"]: run.get("wall") for run in runs if run["peer"] == "eigenzoo"}
    title = (
        f"{case['case']}: {case['num_models']} models of {case['title']}, {size(case['bytes'])}, k = {case['rank']}, "
        f"{threads(case['threads'])}"
    )
    notes = _ceiling_notes(case)
    if any(run.get("extrapolated") for run in runs):
        notes.append(
            "One layer, scaled: time of the largest layer times all values over its own; memory of that layer alone."
        )
    if any(PEERS[run["peer"]].truth == "columns" for run in runs):
        notes.append("Another spectrum: that of all models' rows, compared with its own truth; it has no ceiling here.")
    return Table(title, notes, HEAD, [_cells(run, ours.get(run["state"])) for run in runs])


def _cells(run: Record, ours: float | None) -> list[str]:
    peer = PEERS[run["peer"]]
    name = peer.title + (", cold" if run["state"] == "cold" else "")
    stopped = run.get("skipped") or run.get("failed")
    if stopped:
        return [name, *[NONE] * (len(HEAD) - 2), stopped]
    mark = "≈ " if run.get("extrapolated") else ""
    found = run["errors"]
    remarks = [run["note"]] if "note" in run else []
    if run.get("extrapolated"):
        remarks.append("one layer, scaled")
    if peer.truth == "columns":
        remarks.append("another spectrum")
    return [
        name,
        mark + number(run["wall"]),
        mark + number(run["cpu"]),
        size(run["memory"]),
        size(run["peak_rss"]),
        *(error(found[key]) for key in ("top", "tail", "angle")),
        ratio(run.get("times_ceiling")),
        ratio(run["wall"] / ours) if ours else NONE,
        "; ".join(remarks),
    ]


def _ceiling_notes(case: Record) -> list[str]:
    read, products = case["ceiling"]["read"], case["ceiling"]["products"]
    rates = {state: f"{read['bytes'] / read[state] / 1e9:.1f} GB/s" for state in ("warm", "cold")}
    warm = "" if read["was_warm"] else " (not all of it in memory)"
    cold = f" ({read['cold_note']})" if read["cold_note"] else ""
    parts = [
        f"read once {number(read['warm'])} s warm ({rates['warm']}){warm}",
        f"{number(read['cold'])} s cold ({rates['cold']}){cold}",
        f"best product {number(products['weights'])} s of the layers",
    ]
    if "updates" in products:
        parts.append(f"{number(products['updates'])} s of the updates")
    return [f"Ceiling: {', '.join(parts)}; what counts is the larger of the two."]


VARIED = {"models": "models N", "layers": "layers", "rank": "directions k"}


def growth_table(rows: Sequence[Record]) -> Table:
    """Fits over N, D and k, each row against the one above."""
    head = [
        "varied",
        "N",
        "values per model",
        "k",
        "wall s",
        "CPU s",
        "memory above imports",
        "wall, × row above",
        "× above",
    ]
    cells = []
    for place, row in enumerate(rows):
        before = rows[place - 1] if place and rows[place - 1]["varied"] == row["varied"] else None
        cells.append(
            [
                VARIED[row["varied"]],
                str(row["models"]),
                f"{row['values']:,}",
                str(row["rank"]),
                number(row["wall"]),
                number(row["cpu"]),
                size(row["memory"]),
                ratio(row["wall"] / before["wall"]) if before else NONE,
                ratio(row[row["varied"]] / before[row["varied"]]) if before else NONE,
            ]
        )
    title = f"Growth: eigenzoo on LoRA factors, files in memory, {threads(rows[0]['threads'])}"
    return Table(title, ["The last column is by how much what is varied grew."], head, cells)


def adding_table(rows: Sequence[Record]) -> Table:
    """Adding against fitting all."""
    head = ["step", "wall s", "CPU s", "memory above imports", "top-k error", "tail error", "× fit of all"]
    cells = [
        [
            STEPS[row["step"]],
            number(row["wall"]),
            number(row["cpu"]),
            size(row["memory"]),
            error(row["errors"]["top"]),
            error(row["errors"]["tail"]),
            ratio(row["times_refit"]),
        ]
        for row in rows
    ]
    first = rows[0]
    title = f"Adding {first['new']} models to {first['old']}: LoRA factors, {threads(first['threads'])}"
    return Table(
        title, ["Errors are of the moments' spectrum after the step, against float64 of all models."], head, cells
    )


def commands_table(rows: Sequence[Record]) -> Table:
    """Whole commands, alone and beside a neighbour."""
    head = [
        "command",
        "wall s",
        "CPU s",
        "peak memory",
        "bytes read",
        "× reading once",
        "beside: wall s",
        "CPU s",
        "× alone",
    ]
    cells = [
        [
            row["command"],
            number(row["wall"]),
            number(row["cpu"]),
            size(row["peak_rss"]),
            NONE if row["read"] is None else size(row["read"]),
            ratio(row.get("times_read")),
            *([number(row["beside"]["wall"]), number(row["beside"]["cpu"])] if "beside" in row else [NONE, NONE]),
            ratio(row.get("times_alone")),
        ]
        for row in rows
    ]
    first = rows[0]
    title = f"Commands on {first['old']} LoRA adapters, {size(first['bytes'])}, files in memory, {threads(first['threads'])}"
    notes = [
        "Whole processes, Python's start and the imports included. Bytes are all that a process reads, Python's own files too.",
        "× reading once: less the time that inspect takes on one adapter (Python, torch and the imports), over "
        f"the {number(float(first['said']))} s that reading every file takes in a process.",
        f"project, add and evaluate are given {first['new']} models more. The basis has {size(first['basis'])}.",
        "Beside: while other processes keep every processor busy.",
    ]
    return Table(title, notes, head, cells)


def bytes_table(found: Record) -> Table:
    """All ways to keep one zoo's models: bytes, energy that is lost, and what held-out models can do."""
    rows = rows_of(found)
    numbers = sorted({row.fitted for row in rows})
    head = ["kept as", "bytes of one more", *(f"bytes a model, {number}" for number in numbers)]
    head += ["lost, fitted", *(f"lost, held out, {number}" for number in numbers), "accuracy, held out"]
    cells = []
    for row in (row for row in rows if row.fitted == numbers[-1]):
        same = {other.fitted: other for other in rows if other.name == row.name}
        each = [f"{same[number].each(number):,.0f}" if number in same else NONE for number in numbers]
        losses = [in_percent(same[number].held_out) if number in same else NONE for number in numbers]
        lost = NONE if row.lost is None else in_percent(row.lost)
        score = NONE if row.score is None else f"{row.score:.3f} ± {row.spread:.3f}"
        cells.append([row.name, f"{row.per_model:,.0f}", *each, lost, *losses, score])
    title = f"{found['title']}: {found['fitted']} models fitted, {found['held_out']} held out"
    notes = [
        "Bytes a model: of all files of so many models (or of a bundle of them without its moments) over their number.",
        "Lost: share of the energy of the layers, of the fitted models and of the held-out ones by how many are fitted.",
        "Accuracy, with all fitted: of ways that no smaller one of their kind equals within a hundredth of the energy.",
    ]
    return Table(title, notes, head, cells)


FAMILIES = (
    FILES,
    "each by zstd",
    "each rounded",
    "each cut by its own SVD",
    "axis models",
    "shared sides",
    "low-rank cores",
    "sides by --max-error",
)


def rates_table(found: Record) -> Table:
    """The fewest bytes a model by kind of way, number of models, and what must be kept; the fewest of all in bold."""
    rows = rows_of(found)
    last = at_number(rows, NUMBERS[-1])
    floor = max(row.score or 0.0 for row in last if row.family in (PARENT, MEAN))
    top = next(row.score or 0.0 for row in last if row.family == FILES)
    criteria = {f"{share:.0%} of the gain": keeps(share, floor, top) for share in (0.99, 0.95)}
    criteria |= {f"≤ {share:.0%} lost": loses(share) for share in (0.1, 0.3)}
    cells = []
    for criterion, meets in criteria.items():
        for number in NUMBERS:
            near = at_number(rows, number)
            best = [smallest([row for row in near if row.family == name], number, meets) for name in FAMILIES]
            winner = smallest([row for row in best if row is not None], number, lambda row: True)
            bare = smallest([row for row in near if row.family in FAMILIES], number, meets, Row.each_values)
            assert winner is not None
            assert bare is not None
            sizes = [NONE if row is None else f"{row.each(number):,.0f}" for row in best]
            sizes = [f"**{text}**" if row is winner else text for row, text in zip(best, sizes, strict=True)]
            cells.append([criterion, str(number), *sizes, winner.name, f"{bare.name}: {bare.each_values(number):,.0f}"])
    title = f"{found['title']}: fewest bytes a model"
    notes = [
        f"Gain: of accuracy on {found['held_out']} held-out models, from {floor:.3f} (the parent or the mean) to {top:.3f}. "
        "Lost: of the energy of held-out models.",
        f"For more models than {last[0].fitted} shared bytes, bytes of one more and the loss on held-out models stay.",
        "Two dtypes: of bases + of coefficients. By values alone: without headers, configs and records.",
    ]
    return Table(title, notes, ["kept", "models", *FAMILIES, "winner", "by values alone"], cells)


def rows_of(found: Record) -> list[Row]:
    """The rows of a record."""
    return [Row(**row) for row in found["rows"]]


def machine_line(machine: Record) -> str:
    """What it was measured on."""
    versions = ", ".join(f"{name} {found}" for name, found in machine["versions"].items() if found)
    return (
        f"{machine['processor']}, {machine['cores']} cores, {size(machine['memory'])}, {machine['system']}; other work took "
        f"{machine['busy']:.0%} of the processors when it began; {machine['date']}; {versions}"
    )


def threads(count: int) -> str:
    """A number of threads in words."""
    return "1 thread" if count == 1 else f"{count} threads"


def number(seconds: float) -> str:
    """Three digits.

    >>> number(0.01234), number(1.234), number(123.4)
    ('0.0123', '1.23', '123')
    """
    return f"{seconds:.0f}" if seconds >= 100 else f"{seconds:#.3g}"


def size(num_bytes: float) -> str:
    """Bytes in decimal units."""
    if num_bytes >= 1e9:
        return f"{num_bytes / 1e9:.2f} GB"
    return f"{num_bytes / 1e6:.0f} MB" if num_bytes >= 1e6 else f"{num_bytes / 1e3:.0f} kB"


def error(value: float | None) -> str:
    """One digit and a power of ten."""
    return NONE if value is None else f"{value:.0e}"


def ratio(value: float | None) -> str:
    """A factor."""
    return NONE if value is None else f"{number(value)}×"
