"""Methods that work entry by entry. Their result depends on the space that the entries belong to, which is therefore named."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from eigenzoo.merge.layer_updates import LayerUpdates, RowWise
from eigenzoo.merge.method import Range, method

Semantics = Literal["paper", "mergekit", "peft"]
Keep = Annotated[float, Range("share of the largest entries of each model that is kept", 0, 1)]
Meaning = Annotated[Semantics, Range("whose definition to follow where they differ")]


def _over_model(options: Mapping[str, Any]) -> float | None:
    """The paper trims over the whole model, the libraries over each tensor."""
    return float(options["keep"]) if options["semantics"] == "paper" else None


@method(
    "elements", formula="mean of the entries with the elected sign", source="Yadav et al. 2023", over_model=_over_model
)
def ties(layer: LayerUpdates, *, keep: Keep = 0.2, semantics: Meaning = "paper") -> RowWise:
    """Trim small entries, elect a sign for each, and average those that agree."""
    thresholds = layer.thresholds(keep)[:, None, None]
    weights = layer.weights_T[:, None, None]

    def merge(rows_TPQ: Tensor) -> Tensor:
        trimmed = torch.where(rows_TPQ.abs() >= thresholds, rows_TPQ, 0.0)
        return elect(trimmed, weights, semantics)

    return RowWise(merge)


def elect(trimmed_TPQ: Tensor, weights_T11: Tensor, semantics: Semantics) -> Tensor:
    """Return the mean of the entries whose sign is elected.

    paper: the sign of Σ w τ, where it is zero that of most other entries; divided by the number of entries that agree.
    mergekit: zero counts as positive; divided by the sum of the weights of those that agree.
    peft: the sign of Σ τ without weights; divided by the number of those that agree.
    """
    weighted = trimmed_TPQ * weights_T11
    total = (trimmed_TPQ if semantics == "peft" else weighted).sum(0)
    if semantics == "paper":
        sign = total.sign()
        majority = sign.sum().sign()
        sign = torch.where(sign == 0, majority if majority != 0 else 1.0, sign)
        agree = (weighted * sign > 0).double()
        return (weighted * agree).sum(0) / agree.sum(0).clamp_min(1)
    raise NotImplementedError
