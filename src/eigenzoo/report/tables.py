"""Make the tables of a report from text cells, for page and Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from eigenzoo.display import NONE, in_bytes, in_number, in_percent
from eigenzoo.report import curves
from eigenzoo.report.document import Report
from eigenzoo.report.numbers import at_rank
from eigenzoo.report.sizes import THRESHOLDS, SizeRow, SizeTable
from eigenzoo.report.suitability import limits

VERDICTS = {
    "no-shared-structure": "nothing shared beyond chance",
    "shared-mean": "only the mean is shared",
    "shared-lineage": "shared within lineages",
    "shared-subspace": "a shared subspace",
    "no-variance": "the models do not differ",
}
"""Verdicts' codes in words."""

FOLDED = 24
"""Number of rows from which on the page folds a table."""

LONG_NAME = 20
"""Number of letters from which on a name needs a wide column."""


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        title: its title, also for screen readers.
        columns: headers; a header ends with its denominator or unit where it has one.
        kinds: kind of each column: `words`, `number`, or `prose`, which needs a wide column.
        rows: cells.
        note: a remark, as a sentence.
    """

    title: str
    columns: tuple[str, ...]
    kinds: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    @property
    def folded(self) -> bool:
        """Whether it is long enough to be folded."""
        return len(self.rows) > FOLDED

    @property
    def long_names(self) -> bool:
        """Whether its first column needs to be wide."""
        return max(len(row[0]) for row in self.rows) > LONG_NAME


def table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    words: int = 1,
    prose: bool = False,
    note: str = "",
) -> Table | None:
    """Make a table of `words` columns of words, then numbers and one column of prose; None without rows.

    Empty columns are left out.
    """
    made = [tuple(row) for row in rows]
    if not made:
        return None
    last = len(columns) - 1
    kinds = ["prose" if prose and at == last else "words" if at < words else "number" for at in range(last + 1)]
    kept = [at for at in range(last + 1) if at == 0 or any(row[at] not in ("", NONE) for row in made)]
    return Table(
        title,
        tuple(columns[at] for at in kept),
        tuple(kinds[at] for at in kept),
        tuple(tuple(row[at] for at in kept) for row in made),
        note,
    )


def in_words(code: str) -> str:
    """Write a verdict's code in words."""
    return VERDICTS.get(code, code.replace("-", " ") or NONE)


def shape_text(shape: Sequence[Any]) -> str:
    """Write a layer's outputs × inputs."""
    return " × ".join(in_number(length) for length in shape) or NONE


def layer_table(report: Report) -> Table | None:
    """Make the table of every layer's single numbers and sentence."""
    rank = report.rank
    columns = (
        "layer",
        "verdict",
        "outputs × inputs",
        "mean's share of energy",
        "effective rank",
        "rank above chance",
        "rank for 90 % of variance",
        f"in-sample, rank {rank}",
        f"held out, rank {rank}",
        f"chance, rank {rank}",
        "mean alone, held out",
        "over an average direction",
        "p",
        "exponent",
        "finding",
    )
    rows = [_layer_row(name, layer, rank) for name, layer in report.by_name.items()]
    note = (
        f"In-sample, held out and chance: share of the layer's variance about the mean that {rank} directions keep (the largest "
        "evaluated rank up to it). Mean alone: share of a held-out model's energy that the others' mean removes. Over an "
        "average direction: the share of held-out models in leading directions, divided by that in an average one. p: p-value "
        "against chance, at the rank with the clearest result."
    )
    return table("All layers", columns, rows, words=2, note=note, prose=True)


def _layer_row(name: str, layer: dict[str, Any], rank: int) -> tuple[str, ...]:
    heldout = layer["heldout"]
    return (
        name,
        in_words(layer["verdict"]),
        shape_text(layer["shape"]),
        in_percent(layer["mean_energy"]),
        in_number(layer["effective_rank"]),
        in_number(layer["rank"]["auto"]),
        in_number(layer["rank"]["var90"]),
        *(in_percent(at_rank(heldout["rank"], heldout[key], rank)) for key in ("in_sample", "captured", "null")),
        in_percent(layer["mean"]["heldout"]),
        NONE if layer["test"]["ratio"] is None else f"{layer['test']['ratio']:.2f} ×",
        NONE if layer["test"]["p_value"] is None else in_number(float(f"{layer['test']['p_value']:.1g}")),
        in_number(layer["suitability"]["exponent"]),
        layer["sentence"],
    )


def layer_sentence(name: str, report: Report) -> str:
    """Describe a layer by the evidence's own sentence, or by its numbers."""
    layer, rank = report.layers[name], report.rank
    if layer["sentence"] or not layer["variance"]:
        return str(layer["sentence"] or "All models have the same values here.")
    held = layer["heldout"]
    shares = [in_percent(at_rank(held["rank"], held[key], rank)) for key in ("captured", "in_sample", "null")]
    verdict = in_words(layer["verdict"]).capitalize()
    return (
        f"{verdict}. {rank} directions keep {shares[0]} of held-out models' variance, {shares[1]} in-sample, {shares[2]} by "
        f"chance; the mean alone removes {in_percent(layer['mean']['heldout'])} of a held-out model's energy."
    )


def verdict_table(report: Report) -> Table | None:
    """Make the table of the number of layers and the share of values of each verdict."""
    verdict = report.evidence["verdict"]
    rows = [
        (in_words(code), in_number(count), in_percent(verdict["values"].get(code)))
        for code, count in verdict["layers"].items()
        if count
    ]
    columns = ("verdict", f"layers of {report.evidence['num_layers']:,}", "values of layers with variance")
    return table("Layers by verdict", columns, rows)


def control_table(report: Report) -> Table | None:
    """Make the table of the controls."""
    rows = [
        (
            control["name"],
            control["question"],
            control["statistic"],
            statistic_text(control, "value"),
            control["control"],
            statistic_text(control, "control_value"),
            control["uncertainty"],
            control["sentence"],
        )
        for control in report.evidence["controls"]
    ]
    columns = ("control", "question", "statistic", "value", "against", "its value", "uncertainty", "finding")
    return table("Controls", columns, rows, words=3, prose=True)


def statistic_text(control: Mapping[str, Any], key: str) -> str:
    """Write a control's value: shares in percent, others as numbers."""
    value = control[key]
    return in_percent(value) if control["statistic"].startswith("share") else in_number(value)


def group_table(report: Report) -> Table | None:
    """Make the table of the lineage groups and their members."""
    rows = [
        (f"group {number}", in_number(len(group)), ", ".join(group))
        for number, group in enumerate(report.evidence["lineage"]["groups"], 1)
    ]
    return table("Lineage groups", ("group", "models", "members"), rows, prose=True)


def duplicate_table(report: Report) -> Table | None:
    """Make the table of pairs of equal models."""
    rows = [tuple(pair[:2]) for pair in report.evidence["lineage"]["duplicates"]]
    return table("Duplicates", ("model", "the same as"), rows, words=2)


def lineage_table(report: Report) -> Table | None:
    """Make the table of results across held-out lineages, and within each lineage."""
    found, rows = report.evidence["lineage"], []
    across = found["across"]
    if across["rank"]:
        rows.append(("across, whole lineages held out", in_number(across["num_lineages"]) + " lineages", across, NONE))
    for number, within in enumerate(found["within"], 1):
        verdict = in_words(within.get("verdict") or "")
        rows.append((f"within group {number}", in_number(within.get("num_models")) + " models", within, verdict))
    cells = [(label, of, *_lineage_cells(record, report.rank), verdict) for label, of, record, verdict in rows]
    columns = ("held out", "of", "rank", "captured", "chance", "mean alone", "verdict")
    note = (
        "Captured and chance: share of held-out variance about the mean; "
        "mean alone: share of a held-out model's energy that the others' mean removes."
    )
    return table("Across and within lineages", columns, cells, words=2, note=note, prose=True)


def _lineage_cells(record: dict[str, Any], rank: int) -> tuple[str, ...]:
    ranks = record.get("rank") or []
    used = max((at for at in ranks if at <= rank), default=None)
    shares = (at_rank(ranks, record.get(key) or [], rank) for key in ("captured", "null"))
    return (in_number(used), *(in_percent(share) for share in shares), in_percent(record.get("mean")))


def share_table(report: Report, sizes: SizeTable | None) -> Table | None:
    """Make the table of shares of variance with similar names at one rank, each with the reason why it differs from the others."""
    rank, summary, num = report.rank, report.evidence["summary"], report.evidence["num_models"]
    folded, fitted = (at_rank(summary["rank"], summary[key], rank) for key in ("captured", "in_sample"))
    chance = at_rank(summary["rank"], summary["null"], rank)
    whole = curves.with_cumulative(curves.all_layers_spectrum(report))
    place = min(rank, len(whole["rank"])) - 1
    everyone, unrelated = (
        float(whole[name][place]) if name in whole and place >= 0 else None
        for name in ("spectrum_sum", "norm_matched_sum")
    )
    by_values, by_variance = "its number of values", "its variance"
    rows = [
        ("held out", folded, "models left out of a fold's fit", "the fold's other models", by_values),
        ("in-sample", fitted, "the models of a fold's fit", "the same models", by_values),
        ("chance, held out", chance, "unrelated models, left out", "other unrelated models", by_values),
        ("all models", everyone, f"all {num:,} models", "the same models", by_values),
        ("unrelated, in-sample", unrelated, f"{num:,} unrelated models", "the same models", by_values),
    ]
    grown = report.evidence["growth"]
    if grown["rank"] == rank and any(value is not None for value in grown["captured"]):
        last = [value for value in grown["captured"] if value is not None][-1]
        rows.append(("held out, growth", last, "the same held-out models at every size", "up to all others", by_values))
    if sizes is not None and rank < len(sizes.by_rank):
        row = sizes.by_rank[rank]
        rows.append(("all models, by size", row.in_sample, f"all {num:,} models", "the same models", by_variance))
        rows.append(("held out, by size", row.heldout, "models left out of a fold's fit", "the others", by_variance))
    cells = [(name, in_percent(share), *rest) for name, share, *rest in rows if share is not None]
    columns = ("share", f"kept at rank {rank}", "of the variance of", "directions fitted to", "a layer counts by")
    note = (
        "Fewer models are easier to fit: a fold's fit keeps more of its own models than one fit of all models does. "
        "Unrelated models have the same norms. Their own directions keep much of them in-sample, and little of held-out models."
    )
    made = table("Why shares with similar names differ", columns, cells, note=note)
    return None if made is None else replace(made, kinds=("words", "number", "words", "words", "words"))


def growth_table(report: Report) -> Table | None:
    """Make the table of rank and capture by number of models."""
    found = report.evidence["growth"]
    length = len(found["num_models"])
    keys = ("var90_rank", "in_sample", "captured", "spread", "null")
    parts = [[*found[key], *[None] * length][:length] for key in keys]
    rows = [
        (in_number(num), in_number(rank), *(in_percent(share) for share in shares))
        for num, rank, *shares in zip(found["num_models"], *parts, strict=True)
    ]
    at = f", rank {found['rank']}" if found["rank"] else ""
    columns = ("models", "rank for 90 %", f"in-sample{at}", f"held out{at}", "± over draws", f"chance{at}")
    return table("Growth with the number of models", columns, rows, words=0)


def side_table(report: Report) -> Table | None:
    """Shares of fitted and held-out models that sides keep, by rank."""
    sides = report.evidence["summary"]["sides"]
    ranks = sorted({rank for found in sides.values() for rank in found["rank"]})
    rows = [
        (
            f"{rank:,}",
            *(
                in_percent(at_rank(found["rank"], found[key], rank))
                for found in sides.values()
                for key in ("in_sample", "captured")
            ),
        )
        for rank in ranks
    ]
    columns = (
        "rank",
        *(f"{axes.replace(',', ' and ')}, {kind}" for axes in sides for kind in ("in-sample", "held out")),
    )
    note = (
        "Shares of the variance about the mean of fitted models, one fold held out; layers weighted by their variance."
    )
    return table("What sides keep", columns, rows, words=0, note=note) if rows else None


def rate_table(report: Report) -> Table | None:
    """Sizes and errors of sides, of models cut alone, and of the bundle, by their bytes."""
    rates = report.rates
    if rates is None:
        return None
    known = [(f"axes {row['axes'].replace(',', ', ')}", row) for row in rates["rows"]]
    about = {"zero": "each model cut alone", "mean": "each cut alone about the mean, stored once"}
    # Models cut alone are fitted to no other model, so that new ones lose as much.
    known += [(about.get(row["about"], ""), {**row, "heldout": row["captured"]}) for row in rates["alone"]]
    if rates["bundle"] is not None:
        known.append((f"this bundle, axes {rates['bundle']['axes'].replace(',', ', ')}", rates["bundle"]))
    known.sort(key=lambda pair: pair[1]["bytes"])
    rows = [
        (
            name,
            in_number(row["rank"]),
            in_bytes(row["bytes"]),
            in_bytes(row["per_model"]),
            *(in_percent(None if row[key] is None else 1 - row[key]) for key in ("captured", "heldout")),
        )
        for name, row in known
    ]
    columns = ("what", "rank", "all models", "one more model", "variance lost, in-sample", "… held out")
    note = (
        "Models cut alone are fitted to no other model: new ones lose as much. Shares of the variance about the mean."
    )
    note += " Axis models has a table of its own." if report.sizes is not None else ""
    return table("Sizes and errors, with and without sharing", columns, rows, note=note) if rows else None


def size_row_table(sizes: SizeTable) -> Table | None:
    """Make the table of sizes at the powers of two and at four thresholds."""
    largest = len(sizes.by_rank) - 1
    ranks = sorted({0, *(2**power for power in range(32) if 2**power < largest), largest})
    rows = [(f"rank {rank}" if rank else "the mean alone", *_size_cells(sizes.by_rank[rank])) for rank in ranks]
    for place, share in enumerate(THRESHOLDS[: len(sizes.by_threshold)]):
        if share in (0.5, 0.8, 0.9, 0.95, 0.99):
            rows.append((f"{100 * share:.0f} % per layer", *_size_cells(sizes.by_threshold[place])))
    columns = (
        "kept",
        "ranks",
        "bundle",
        "files ÷ bundle",
        "variance lost, all models",
        "… held out",
        "… by chance",
        "energy lost",
        "one more model",
        "smaller from",
    )
    note = (
        f"Files: {in_bytes(sizes.whole_zoo)} of {sizes.num_models:,} models. Bundle: all its files, with basis, mean and "
        "carried files. Variance lost: for all layers together, so that each layer counts by its variance and not by its number of "
        "values. Energy lost: for all models, including the mean. Held out and chance are interpolated linearly between evaluated "
        "ranks. Smaller from: the number of models from which the bundle is smaller than their files."
    )
    return table("Sizes and errors", columns, rows, note=note)


def _size_cells(row: SizeRow) -> tuple[str, ...]:
    return (
        rank_range(row.ranks),
        in_bytes(row.bytes),
        NONE if row.ratio is None else f"{row.ratio:.2f} ×",
        *(in_percent(None if kept is None else 1 - kept) for kept in (row.in_sample, row.heldout, row.null)),
        in_percent(row.residual),
        in_bytes(row.per_model),
        "never" if row.break_even_models is None else f"{row.break_even_models:,} models",
    )


def rank_range(ranks: Sequence[int]) -> str:
    """Write the range of sorted ranks.

    >>> rank_range((3, 3)), rank_range((1, 4, 9))
    ('3', '1 to 9')
    """
    if not ranks:
        return NONE
    return str(ranks[0]) if ranks[0] == ranks[-1] else f"{ranks[0]} to {ranks[-1]}"


def suitability_table(report: Report) -> Table | None:
    """Make the table of every layer's exponents and the rule."""
    score = report.evidence["suitability"]
    limit, retained = limits(score["thresholds"]), set(score["retained"])
    rows = [
        (
            name,
            "retained" if name in retained else "left out",
            *(in_number(found[key]) for key in ("exponent", "num_values", "mean", "spread")),
            in_percent(found["share"]),
            in_number(found["q"]),
            *_alpha_cells(found["alpha_score"]),
        )
        for name, found in ((name, layer["suitability"]) for name, layer in report.by_name.items())
        if found["exponent"] is not None or found["exponents"] or found["alpha_score"]
    ]
    columns = (
        "layer",
        "by the rule",
        "exponent",
        "eigenvalues in it",
        "mean over halves",
        "spread",
        "halves in range",
        "q",
        "by the alpha score",
        "models' mean exponent",
        "… spread",
        "alpha score q",
    )
    note = (
        f"Retained: mean over random halves of the zoo from {in_number(limit['low'])} to {in_number(limit['high'])}, spread at "
        f"most {in_number(limit['spread'])}, at least {in_percent(limit['share'])} of the halves in range, and q = share in range "
        f"/ (1 + spread) at least {in_number(limit['q'])}: {len(retained)} of {len(rows)} layers that have exponents. "
        f"{_alpha_note(score['alpha_score'])}"
    )
    return table("Exponents by layer", columns, rows, words=2, note=note)


def _alpha_cells(found: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Return the cells of the authors' score of a layer."""
    if found is None:
        return "not measured", NONE, NONE, NONE
    verdict = "retained" if found["retained"] else "left out"
    return verdict, *(in_number(found[key]) for key in ("mean", "spread", "q"))


def _alpha_note(score: Mapping[str, Any] | None) -> str:
    rule = (
        "The authors' alpha score uses every model's own spectrum: q = (1 − e^(−N/20)) · mean φ(α) · e^(−σ) with "
        "φ(α) = e^(−(α − 2)/2) for α from 2 to 6, else 0. A layer is retained at a mean α from 2 to 6, σ at most 1, half of the "
        "models in range, and q at least 0.2"
    )
    if score is None:
        return f"{rule}. It was not measured."
    return f"{rule}: {len(score['retained'])} of {score['num_layers']} layers."


def secondary_table(report: Report) -> Table | None:
    """Make the table of the directions after the first k, by layer."""
    rows = [
        (name, _span(found), *(in_percent(found[key]) for key in ("in_sample", "captured", "null")))
        for name, found in ((name, layer["secondary"]) for name, layer in report.by_name.items())
        if found["rank"] is not None
    ]
    columns = ("layer", "directions", "in-sample", "held out", "chance")
    return table("Secondary subspace by layer", columns, rows, note="Shares of the layer's variance about the mean.")


def _span(found: Mapping[str, Any]) -> str:
    """Write the range of directions of a secondary subspace."""
    last = NONE if found["upto"] is None else in_number(found["upto"])
    return f"{found['rank'] + 1:,} to {last}" if found["upto"] else f"after {found['rank']:,}"


def residual_table(report: Report) -> Table | None:
    """Make the table of every model's share of energy outside the fitted subspace, largest first."""
    known = [(name, model) for name, model in report.models.items() if model["residual"] is not None]
    known.sort(key=lambda item: -item[1]["residual"])
    rows = [
        (name, in_percent(model["residual"]), in_number(model["energy"]), model["source"] or NONE)
        for name, model in known
    ]
    columns = ("model", "residual, share of its energy", "energy Σ‖X‖²", "source")
    return table("Residuals by model", columns, rows, prose=True)
