"""Updates in memory, merged by one call: for the tests of methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from builders import seeded
from eigenzoo.linalg.lora import Factors
from eigenzoo.merge.adapter_layer import MergedLayer, merge_layer
from eigenzoo.merge.layer_updates import Context
from eigenzoo.merge.methods import find_method
from eigenzoo.merge.request import CORE, Job, Request

OUTPUTS, INPUTS, RANKS, WEIGHTS = 20, 30, (2, 4, 7), (0.7, -0.3, 1.1)
NAMES = ("first", "second", "third")

GRAM, IN_CORE, ELEMENTS = (
    ("mean", "linear", "task_arithmetic", "karcher", "model_stock"),
    ("tsv", "iso_c", "iso_cts", "cart", "ctm", "wudi"),
    ("ties", "dare_linear", "dare_ties", "della", "breadcrumbs", "sce", "knots_ties"),
)
PAIRS = ("slerp", "nuslerp")
ALL = (*GRAM, *PAIRS, *IN_CORE, *ELEMENTS, "regmean")

NEUTRAL: Mapping[str, Mapping[str, Any]] = {
    "ties": {"keep": 1.0},
    "knots_ties": {"keep": 1.0},
    "dare_linear": {"keep": 1.0},
    "dare_ties": {"keep": 1.0},
    "della": {"keep": 1.0},
    "breadcrumbs": {"keep": 1.0, "outliers": 0.0},
    "sce": {"keep": 1.0},
    "ctm": {"keep": 1.0},
}
"""Options with which a method changes nothing of a model that is alone."""


def random_updates(
    ranks: Sequence[int] = RANKS, seed: int = 0, shape: tuple[int, int] = (OUTPUTS, INPUTS)
) -> list[Factors]:
    draw = seeded(seed)
    return [
        (
            torch.randn(shape[0], rank, generator=draw, dtype=torch.float64),
            torch.randn(rank, shape[1], generator=draw, dtype=torch.float64),
        )
        for rank in ranks
    ]


def dense(updates: Sequence[Factors]) -> Tensor:
    """(T, O, I)."""
    return torch.stack([b @ a for b, a in updates])


def input_grams(names: Sequence[str], inputs: int = INPUTS) -> dict[str, Tensor]:
    """A second moment of some inputs for each model, the same for the same name."""
    grams = {}
    for name in names:
        rows = torch.randn(3 * inputs, inputs, generator=seeded(sum(name.encode())), dtype=torch.float64)
        grams[name] = rows.T @ rows
    return grams


def merge_updates(
    updates: Sequence[Factors],
    method: str,
    *,
    names: Sequence[str] | None = None,
    weights: Sequence[float] | None = None,
    scale: float = 1.0,
    space: str = CORE,
    rank: int | None = None,
    seed: int = 0,
    majority: float = 0.0,
    **options: Any,
) -> MergedLayer:
    chosen = find_method(method)
    names = tuple(f"m{place}" for place in range(len(updates))) if names is None else tuple(names)
    weights_T = torch.tensor([1.0] * len(updates) if weights is None else weights, dtype=torch.float64)
    request = Request(chosen, chosen.options(options), scale, space)
    grams = input_grams(names, updates[0][1].shape[1]) if method == "regmean" else {}
    context = Context("layer", names, weights_T, seed, majority=majority, input_grams=grams)
    choose = Tensor.numel if rank is None else lambda values: rank
    return merge_layer(updates, Job(context, request), choose, lambda b, a: (b, a))


def merged(updates: Sequence[Factors], method: str, **options: Any) -> Tensor:
    """The merged update, (O, I)."""
    b, a = merge_updates(updates, method, **options).factors
    return b @ a


def distance(one: Tensor, other: Tensor) -> float:
    """‖X − Y‖ / ‖Y‖."""
    return float((one - other).norm() / other.norm())
