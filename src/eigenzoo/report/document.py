"""Read the document of a report once, fill in missing keys, and make its text safe to show.

A document has plain JSON values only: `evidence` (the result of `Evidence.to_dict()`), and optionally `function` (a metric of
rebuilt models), `sizes`, `models` and `made_by`. Missing keys are filled in here, so that the rest of the room can read every key.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from eigenzoo.display import natural_order, one_line
from eigenzoo.errors import UsageError

USUAL_RANK = 16
"""The rank of single numbers if the evidence has none: the paper's."""

_LAYER: dict[str, Any] = {
    "shape": [],
    "role": "",
    "depth": None,
    "num_values": 0,
    "energy": 0.0,
    "variance": 0.0,
    "explained_variance_ratio": [],
    "effective_rank": None,
    "mean_energy": None,
    "null": {"norm_matched": [], "low": [], "high": [], "iid": [], "permuted": [], "spectrum_matched": []},
    "heldout": {"rank": [], "in_sample": [], "captured": [], "null": [], "leave_one_out": {"rank": [], "captured": []}},
    "mean": {"heldout": None, "null": None},
    "split_half": {
        "rank": None,
        "cosines": [],
        "null_cosines": [],
        "null_high": [],
        "low": [],
        "high": [],
        "num_splits": None,
    },
    "secondary": {"rank": None, "upto": None, "in_sample": None, "captured": None, "null": None},
    "suitability": {
        "exponent": None,
        "xmin": None,
        "num_values": None,
        "exponents": [],
        "mean": None,
        "spread": None,
        "share": None,
        "q": None,
        "alpha_score": None,
    },
    "test": {"rank": None, "p_value": None, "ratio": None},
    "axes": {},
    "rank": {"auto": None, "var90": None},
    "verdict": "",
    "decided_by": "",
    "sentence": "",
}

_EVIDENCE: dict[str, Any] = {
    "num_models": 0,
    "num_layers": 0,
    "view": "",
    "center": "",
    "names": [],
    "seed": None,
    "folds": None,
    "seconds": None,
    "lineage": {
        "groups": [],
        "duplicates": [],
        "level": None,
        "threshold": None,
        "measure": "",
        "order": [],
        "cosines": [],
        "across": {"rank": [], "captured": [], "null": [], "mean": None, "num_lineages": None},
        "within": [],
        "sentence": "",
    },
    "growth": {
        "num_models": [],
        "var90_rank": [],
        "captured": [],
        "in_sample": [],
        "null": [],
        "rank": None,
        "spread": [],
    },
    "map": {},
    "map_shares": [],
    "suitability": {"thresholds": {}, "retained": [], "num_layers": None, "share": None, "alpha_score": None},
    "summary": {
        "rank": [],
        "in_sample": [],
        "captured": [],
        "null": [],
        "mean_energy": None,
        "mean_heldout": None,
        "mean_null": None,
        "variance": 0.0,
        "energy": 0.0,
        "test": None,
        "sides": {},
    },
    "controls": [],
    "warnings": [],
    "verdict": {"code": "", "text": "", "decided_by": "", "layers": {}, "values": {}},
}

_CONTROL: dict[str, Any] = {
    "name": "",
    "question": "",
    "statistic": "",
    "value": None,
    "control": "",
    "control_value": None,
    "uncertainty": "",
    "sentence": "",
}

_OUTCOME: dict[str, Any] = {
    "original": None,
    "parent": None,
    "mean": None,
    "head_only": None,
    "rebuilt": {},
    "random_basis": {},
    "secondary": None,
    "alone": {},
}

_FUNCTION: dict[str, Any] = {
    "metric": "",
    "num_models": 0,
    "heldout": False,
    "num_fitted": 0,
    "ranks": [],
    "secondary_rank": None,
    "models": {},
    "mean": _OUTCOME,
    "spread": _OUTCOME,
    "sentence": "",
    "same_bytes_rank": None,
}

_RATE: dict[str, Any] = {
    "axes": "",
    "about": "zero",
    "rank": None,
    "bytes": 0,
    "per_model": 0,
    "captured": None,
    "heldout": None,
}
_RATES: dict[str, Any] = {"num_models": 0, "rows": [], "alone": [], "bundle": None, "sentences": []}

_SIZES: dict[str, Any] = {"whole_zoo": 0, "num_models": 0, "shared": 0, "per_model": 0, "layers": {}}


@dataclass(frozen=True)
class Report:
    """A document after reading: it has every key, every number is finite or None, and every text is printable.

    Attributes:
        layers: by name, ordered by role and depth.
        rank: the rank of single numbers.
    """

    title: str
    evidence: dict[str, Any]
    layers: dict[str, dict[str, Any]]
    function: dict[str, Any] | None
    sizes: dict[str, Any] | None
    rates: dict[str, Any] | None
    models: dict[str, dict[str, Any]]
    made_by: dict[str, Any]
    rank: int

    @property
    def by_name(self) -> dict[str, dict[str, Any]]:
        """The layers ordered by name, for lists and tables."""
        return {name: self.layers[name] for name in sorted(self.layers, key=natural_order)}


def read_document(document: Mapping[str, Any]) -> Report:
    """Check, clean and complete a document.

    Raises:
        UsageError: it has no evidence, or its evidence has no layers.
    """
    evidence = document.get("evidence")
    if not isinstance(evidence, Mapping) or not isinstance(evidence.get("layers"), Mapping):
        raise UsageError(
            "no evidence with layers in the document",
            where="report",
            rule="a report shows the results of `evidence`",
            next_step="put Evidence.to_dict() under the key 'evidence'",
        )
    cleaned = clean(document)
    found = cleaned["evidence"]
    layers = in_order({name: fill(_LAYER, layer) for name, layer in found["layers"].items()})
    evidence = {**fill(_EVIDENCE, found), "layers": layers}
    evidence["controls"] = [fill(_CONTROL, control) for control in evidence["controls"]]
    evidence["num_layers"] = evidence["num_layers"] or len(layers)
    made_by = fill({"command": "", "versions": {}, "date": "", "seed": None}, cleaned.get("made_by"))
    models = {name: fill({"residual": None, "energy": None, "source": None}, model) for name, model in
              (cleaned.get("models") or {}).items()}  # fmt: skip
    return Report(
        str(cleaned.get("title") or "zoo"),
        evidence,
        layers,
        None if cleaned.get("function") is None else read_function(cleaned["function"]),
        None if cleaned.get("sizes") is None else fill(_SIZES, cleaned["sizes"]),
        None if cleaned.get("rates") is None else read_rates(cleaned["rates"]),
        models,
        made_by,
        chosen_rank(evidence),
    )


def read_function(function: Mapping[str, Any]) -> dict[str, Any]:
    """Fill a function record, model by model."""
    filled: dict[str, Any] = fill(_FUNCTION, function)
    filled["models"] = {name: fill(_OUTCOME, outcome) for name, outcome in filled["models"].items()}
    return filled


def read_rates(rates: Mapping[str, Any]) -> dict[str, Any]:
    """Fill the record of sizes and errors, row by row."""
    filled: dict[str, Any] = fill(_RATES, rates)
    for key in ("rows", "alone"):
        filled[key] = [fill(_RATE, row) for row in filled[key]]
    filled["bundle"] = None if filled["bundle"] is None else fill(_RATE, filled["bundle"])
    return filled


def clean(value: Any) -> Any:
    """Make all texts of a document printable and all numbers finite or None.

    >>> clean({"a\\x1b": [1.0, float("nan")]})
    {'a�': [1.0, None]}
    """
    if isinstance(value, str):
        return one_line(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        cleaned: dict[str, Any] = {}
        for key, item in value.items():
            name = one_line(key)
            while name in cleaned:  # two names that differ only in characters that cannot be shown
                name += "′"
            cleaned[name] = clean(item)
        return cleaned
    if isinstance(value, list | tuple):
        return [clean(item) for item in value]
    return value


def fill(template: Any, value: Any) -> Any:
    """Add missing keys of a template to a value. None is replaced by the template's value."""
    if value is None:
        return fill(template, {}) if isinstance(template, dict) else list(template) if template == [] else template
    if isinstance(template, dict) and isinstance(value, Mapping):
        return {**value, **{key: fill(default, value.get(key)) for key, default in template.items()}}
    return value


def in_order(layers: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Order layers by role, in order of first appearance, and by depth."""
    roles: dict[str, int] = {}
    for layer in layers.values():
        roles.setdefault(layer["role"], len(roles))

    def place(item: tuple[str, dict[str, Any]]) -> tuple[int, int]:
        depth = item[1]["depth"]
        return roles[item[1]["role"]], -1 if depth is None else int(depth)

    return dict(sorted(layers.items(), key=place))


def chosen_rank(evidence: Mapping[str, Any]) -> int:
    """Return the rank of growth if it was evaluated, else the largest evaluated rank up to 16."""
    ranks = evidence["summary"]["rank"]
    if evidence["growth"]["rank"] and (not ranks or evidence["growth"]["rank"] in ranks):
        return int(evidence["growth"]["rank"])
    return int(max((rank for rank in ranks if rank <= USUAL_RANK), default=min(ranks, default=1)))


def has_similarity(report: Report) -> bool:
    """Tell whether there is a complete matrix of cosines."""
    size, cosines = len(report.evidence["names"]), report.evidence["lineage"]["cosines"]
    return size > 1 and len(cosines) == size and all(len(row) == size for row in cosines)
