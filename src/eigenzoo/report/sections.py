"""Define the sections of a report, their order and their contents, for page and Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from eigenzoo.display import counted
from eigenzoo.report import function_tables, tables
from eigenzoo.report.document import Report
from eigenzoo.report.figures import Figure
from eigenzoo.report.sizes import SizeTable
from eigenzoo.report.tables import Table


@dataclass(frozen=True)
class Section:
    """A section: figures and tables, and the name of its control on the page, if it has one."""

    name: str
    short: str
    title: str
    lead: str
    figures: tuple[Figure, ...]
    tables: tuple[Table, ...] = ()
    widget: str = ""

    @property
    def by_layer(self) -> bool:
        """Whether one of its figures depends on the chosen layer."""
        return any(figure.by_layer for figure in self.figures)


def all_sections(report: Report, figures: Mapping[str, Figure], sizes: SizeTable | None) -> list[Section]:
    """Return all sections after verdict, controls and zoo, which have their own forms."""

    def make(
        name: str,
        short: str,
        title: str,
        lead: str,
        drawn: str,
        tabled: tuple[Table | None, ...] = (),
        widget: str = "",
    ) -> Section:
        present = tuple(figures[figure] for figure in drawn.split() if figure in figures)
        kept = tuple(table for table in tabled if table is not None)
        return Section(name, short, title, lead, present, kept, widget)

    return [
        make("spectrum", "Spectrum", "Spectrum against chance", _SPECTRUM, "scree cumulative axes"),
        make(
            "heldout",
            "Held out",
            "Held-out models against fitted ones",
            _HELDOUT,
            "heldout sides mean",
            (tables.share_table(report, sizes), tables.side_table(report)),
        ),
        make("layers", "Layers", "Layers", _layers_lead(report), "rolemap layerranks", (tables.layer_table(report),)),
        make(
            "similarity",
            "Similarity",
            "Similarity and lineage",
            _lineage_lead(report),
            "similarity",
            (tables.lineage_table(report), tables.group_table(report), tables.duplicate_table(report)),
        ),
        make("map", "Map", "Map of the models", _MAP, "map"),
        make("growth", "Growth", "Growth", _GROWTH, "growthrank growthcaptured", (tables.growth_table(report),)),
        make("halves", "Halves", "Two halves", _HALVES, "halves"),
        make(
            "sizes",
            "Sizes",
            "Size against error",
            _sizes_lead(report, sizes),
            "rates sizes",
            (tables.rate_table(report), tables.size_row_table(sizes) if sizes else None),
            "sizes" if sizes else "",
        ),
        make(
            "suitability",
            "Suitability",
            "Suitability of layers",
            _SUITABILITY,
            "suitability",
            (tables.suitability_table(report),),
            "suitability" if "suitability" in figures else "",
        ),
        make(
            "secondary", "Secondary", "Secondary subspace", _SECONDARY, "secondary", (tables.secondary_table(report),)
        ),
        make(
            "function",
            "Function",
            "Function",
            _function_lead(report),
            "function",
            (function_tables.function_table(report), function_tables.function_model_table(report)),
        ),
        make(
            "residuals",
            "Residuals",
            "Residuals",
            _residual_lead(figures),
            "residuals",
            (tables.residual_table(report),),
        ),
    ]


_SPECTRUM = (
    "The spectra show how fast the variance decreases from direction to direction, compared with chance. All models are fitted "
    "together, so the spectra do not describe new models."
)
_HELDOUT = (
    "A shared subspace must also explain models that it was not fitted to. The mean alone is the control: what it "
    "explains needs no subspace."
)
_MAP = "Models that are close together here are similar in the zoo's largest directions."
_GROWTH = "With more models, the dimension of a shared subspace levels off. Without one, every model adds a direction of its own."
_HALVES = "If all models share a subspace, each half of them gives the same one."
_SIZES = (
    "Size and error with and without sharing, and of a bundle with axis models at any rank. Geometry is not function: a small "
    "error in the weights can be a large error of the model, and the other way round."
)
_NO_SIZES = "The document has no file sizes, so bytes cannot be shown."
_SUITABILITY = (
    "After a rule from the literature: a layer suits a shared subspace where its spectrum is a power law with an exponent that "
    "trained layers have, and random halves of the zoo agree on it. The table gives the authors' own rule, the alpha score of "
    "every single model, beside it. The thresholds are conventions: move them to see what depends on them. Use the rule to choose "
    "layers for a fit: leave out those that it rejects (eigenzoo fit --exclude). Keep the choice only if eigenzoo evaluate shows "
    "no loss."
)
_SECONDARY = "If models share only the first directions, the next ones explain no more of held-out models than chance."


def _sizes_lead(report: Report, sizes: SizeTable | None) -> str:
    return _SIZES if sizes or report.rates else _NO_SIZES


def _layers_lead(report: Report) -> str:
    found = counted(len(report.layers), "layer")
    return f"{found}, each with its own result. Ranks are counted above chance (parallel analysis)."


def _lineage_lead(report: Report) -> str:
    said = {control["name"]: control["sentence"] for control in report.evidence["controls"]}
    found = report.evidence["lineage"]["sentence"] or said.get("lineage")
    return str(found or "Groups of models with a common origin, and the variance that they explain.")


def _function_lead(report: Report) -> str:
    if report.function is None:
        return (
            "No metric was run: this report is about weights only. The command eigenzoo report BUNDLE --metric module:function "
            "adds what rebuilt models can do."
        )
    return (
        report.function["sentence"]
        or "The models' function, measured with a metric, compared with controls of the same size."
    )


def _residual_lead(figures: Mapping[str, Figure]) -> str:
    if "residuals" not in figures:
        return "No subspace was fitted for this report, so models have no residuals."
    return (
        "The share of each model's weights outside the fitted subspace. These models were fitted; new models lose more."
    )
