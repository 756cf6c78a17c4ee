"""Methods that work entry by entry. Their result depends on the space that the entries belong to, which is therefore named.

Where authors and libraries define a method differently, `semantics` says whose definition is meant:

* paper: the article's. A sum of exactly zero takes the sign of most entries of the model, as in its authors' code; in other spaces
  than the full one, where a basis vector has no sign of its own, such an entry is zero;
* mergekit: of mergekit 0.1.5. Weights come before the election of signs, a sum of zero counts as positive, the result is divided by
  the weights of the entries that agree;
* peft: of PEFT's `merge_utils`. Signs are elected without weights, the result is divided by the number of entries that agree.

Legend: T models, P rows and Q columns of the space, p some of the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import sqrt
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from eigenzoo.errors import UsageError
from eigenzoo.linalg.core_frame import EPSILON
from eigenzoo.linalg.selection import least_of_largest
from eigenzoo.merge.layer_updates import LayerUpdates, RowWise
from eigenzoo.merge.method import Range, method

PAPER, MERGEKIT, PEFT = "paper", "mergekit", "peft"
Semantics = Annotated[Literal["paper", "mergekit", "peft"], Range("whose definition to follow")]
TwoSemantics = Annotated[Literal["paper", "mergekit"], Range("whose definition to follow")]
Keep = Annotated[float, Range("share of each model's entries that is kept", 0, 1, per_model=True)]

Combine = Annotated[
    Literal["auto", "mean", "sum"],
    Range("whether entries that agree are averaged or added; auto: as the definition says"),
]

SMALL = 1e-7
"""Sums of absolute values below this are not rescaled (as in mergekit)."""

LEAST_WEIGHT = 1e-6
"""Least sum of weights that a merged entry is divided by (as in mergekit's SCE)."""


def _over_model(options: Mapping[str, Any]) -> Any:
    """The paper trims over the whole model, the libraries over each tensor."""
    return options["keep"] if options["semantics"] == PAPER else None


def _always_over_model(options: Mapping[str, Any]) -> Any:
    return options["keep"]


@method(
    "elements", formula="mean of the entries with the elected sign", source="Yadav et al. 2023", over_model=_over_model
)
def ties(
    layer: LayerUpdates, *, keep: Keep = 0.2, semantics: Semantics = "paper", combine: Combine = "auto"
) -> RowWise:
    """Trim small entries, elect a sign for each, and average those that agree."""
    least = layer.thresholds(keep, at_least=1 if semantics == MERGEKIT else 0)[:, None, None]
    elect = _election(layer, semantics, combine)
    return RowWise(lambda rows_TPQ: elect(torch.where(rows_TPQ.abs() >= least, rows_TPQ, 0.0)))


@method(
    "elements",
    formula="ties on Σ V_tᵀ of [τ₁ … τ_T] = U Σ [V₁ … V_T]ᵀ",
    source="Stoica et al. 2025",
    over_model=_always_over_model,
    space="columns",
)
def knots_ties(layer: LayerUpdates, *, keep: Keep = 0.2) -> RowWise:
    """TIES on the right factors of a joint SVD of all updates side by side."""
    least = layer.thresholds(keep)[:, None, None]
    elect = _election(layer, PAPER, "mean")
    return RowWise(lambda rows_TPQ: elect(torch.where(rows_TPQ.abs() >= least, rows_TPQ, 0.0)))


@method("elements", formula="Σ w (mask ∘ τ) / keep", source="Yu et al. 2024")
def dare_linear(layer: LayerUpdates, *, keep: Keep = 0.5, semantics: Semantics = "paper") -> RowWise:
    """Drop random entries, enlarge the others, and add."""
    weights = layer.weights_T[:, None, None]
    dropped = _random(layer, lambda rows, share: torch.full_like(rows, share), keep, semantics)
    return RowWise(lambda rows_TPQ: (dropped(rows_TPQ) * weights).sum(0))


@method("elements", formula="election of signs over (mask ∘ τ) / keep", source="Yu et al. 2024")
def dare_ties(
    layer: LayerUpdates, *, keep: Keep = 0.5, semantics: Semantics = "paper", combine: Combine = "auto"
) -> RowWise:
    """Drop random entries, enlarge the others, elect signs, and average those that agree."""
    dropped = _random(layer, lambda rows, share: torch.full_like(rows, share), keep, semantics)
    elect = _election(layer, semantics, "sum" if combine == "auto" and semantics == MERGEKIT else combine)
    return RowWise(lambda rows_TPQ: elect(dropped(rows_TPQ)))


@method("elements", formula="as dare_ties, keeping larger entries of a row more often", source="Deep et al. 2024")
def della(
    layer: LayerUpdates,
    *,
    keep: Keep = 0.5,
    window: Annotated[float, Range("largest difference of a probability from `keep`", 0, 0.5)] = 0.15,
    semantics: TwoSemantics = "paper",
    combine: Combine = "auto",
) -> RowWise:
    """Drop entries at random, small ones of a row more often, elect signs, and average those that agree."""
    for share in layer.each(keep):
        if share < 1 and not (share - window > 0 and share + window < 1) and share > 0:
            raise UsageError(
                f"keep {share:g} with window {window:g}",
                where="method della",
                rule="keep ± window lies between 0 and 1",
            )

    def probabilities(rows_pQ: Tensor, share: float) -> Tensor:
        if not 0 < share < 1:
            return torch.full_like(rows_pQ, share)
        places = rows_pQ.abs().argsort(1).argsort(1).double()
        return share - window + 2 * window * places / max(rows_pQ.shape[1] - 1, 1)

    dropped = _random(layer, probabilities, keep, semantics)
    elect = _election(layer, semantics, combine)
    return RowWise(lambda rows_TPQ: elect(dropped(rows_TPQ)))


@method("elements", formula="Σ w τ without the largest and the smallest entries", source="Davari & Belilovsky 2024")
def breadcrumbs(
    layer: LayerUpdates,
    *,
    keep: Keep = 0.85,
    outliers: Annotated[
        float, Range("share of each model's largest entries that is dropped", 0, 1, per_model=True)
    ] = 0.01,
) -> RowWise:
    """Drop outliers and small entries, and add."""
    weights, num = layer.weights_T[:, None, None], layer.num_values
    kept = [int(share * num) for share in layer.each(keep)]
    # Fewer outliers are dropped where the entries would not suffice.
    above = [min(int(share * num), num - count) for share, count in zip(layer.each(outliers), kept, strict=True)]
    most = layer.largest(above)[:, None, None]
    least = layer.largest([first + count for first, count in zip(above, kept, strict=True)])[:, None, None]

    def merge(rows_TPQ: Tensor) -> Tensor:
        sizes = rows_TPQ.abs()
        return (torch.where((sizes >= least) & (sizes < most), rows_TPQ, 0.0) * weights).sum(0)

    return RowWise(merge)


@method(
    "elements",
    formula="Σ ‖τ_t‖² τ_t over entries of large variance and elected sign",
    source="Wan et al. 2024",
    weighted=False,
)
def sce(
    layer: LayerUpdates,
    *,
    keep: Annotated[float, Range("share of entries, by their variance, that is kept", 0, 1)] = 1.0,
) -> RowWise:
    """Keep the entries in which models differ most, weigh models by their energy, and average those of the elected sign."""
    if layer.num_models == 1:
        return RowWise(lambda rows_TPQ: rows_TPQ[0])
    least, energies = 0.0, layer.gram_TT.diagonal()
    if keep < 1:
        varying = sum(int(_variance(block).count_nonzero()) for block in layer.blocks())
        least = float(_least_variance(layer, int(varying * keep)))
        kept = [torch.where(_variance(block) >= least, block, 0.0).square().sum((1, 2)) for block in layer.blocks()]
        energies = torch.stack(kept).sum(0)
    total = float(energies.sum())
    shares = torch.full_like(energies, 1 / layer.num_models) if total == 0 else energies / total
    weights = shares[:, None, None]

    def merge(rows_TPQ: Tensor) -> Tensor:
        chosen = torch.where(_variance(rows_TPQ) >= least, rows_TPQ, 0.0)
        weighted = _agreeing(chosen, chosen.sum(0) >= 0) * weights
        return (chosen * weighted).sum(0) / weighted.sum(0).clamp_min(LEAST_WEIGHT)

    return RowWise(merge)


def _variance(rows_TPQ: Tensor) -> Tensor:
    return rows_TPQ.var(0, unbiased=False)


def _least_variance(layer: LayerUpdates, count: int) -> Tensor:
    return least_of_largest(lambda: (_variance(block).reshape(1, -1) for block in layer.blocks()), [count])[0]


def _agreeing(rows_TPQ: Tensor, positive_PQ: Tensor) -> Tensor:
    """Return 1 for entries of the elected sign, and 0 for all others and for zeros."""
    return (rows_TPQ.sign() == torch.where(positive_PQ, 1.0, -1.0)).double()


def vote(layer: LayerUpdates) -> float:
    """Return how many more entries of a trimmed layer have a positive sum than a negative one: the majority of method `ties`."""
    least, weights = layer.thresholds(0)[:, None, None], layer.weights_T[:, None, None]
    round_off = _round_off(layer.gram_TT.diagonal(), layer.num_values)
    votes = [
        float(_signs((torch.where(rows.abs() >= least, rows, 0.0) * weights).sum(0), round_off).sum())
        for rows in layer.blocks()
    ]
    return float(sum(votes))


def elect_by_paper(cores_TPQ: Tensor, weights_T: Tensor, keep: float) -> Tensor:
    """Return the merge of method `ties` of matrices in memory, each trimmed by itself."""
    size = cores_TPQ[0].numel()
    count = min(size, max(int(keep * size), 1 if keep > 0 else 0))
    least = least_of_largest(lambda: [cores_TPQ.flatten(1)], [count] * len(cores_TPQ))[:, None, None]
    round_off = _round_off(cores_TPQ.square().sum((1, 2)), cores_TPQ[0].numel())
    trimmed = torch.where(cores_TPQ.abs() >= least, cores_TPQ, 0.0)
    total, divisor = _by_paper(trimmed, weights_T[:, None, None], round_off, 0.0)
    return total / divisor


def _round_off(energies_T: Tensor, num_values: int) -> float:
    """Return the size up to which a sum of entries is round-off: that of products with orthonormal bases, relative to the norms."""
    return EPSILON * sqrt(num_values) * float(energies_T.clamp_min(0).sqrt().sum())


def _signs(sums: Tensor, round_off: float) -> Tensor:
    return sums.sign() * (sums.abs() > round_off)


def _by_paper(rows_TPQ: Tensor, weights_T11: Tensor, round_off: float, majority: float) -> tuple[Tensor, Tensor]:
    weighted = rows_TPQ * weights_T11
    sign = _signs(weighted.sum(0), round_off)
    sign = sign.where(sign != 0, torch.full_like(sign, majority))
    agree = ((weighted.sign() == sign) & (weighted != 0)).double()
    return (weighted * agree).sum(0), agree.sum(0).clamp_min(1)


def _election(layer: LayerUpdates, semantics: str, combine: str) -> Callable[[Tensor], Tensor]:
    """Return what combines the entries (T, p, Q) whose sign is elected, by one of the definitions at the top of the file."""
    weights = layer.weights_T[:, None, None]
    round_off = _round_off(layer.gram_TT.diagonal(), layer.num_values)

    def by_mergekit(rows_TPQ: Tensor) -> tuple[Tensor, Tensor]:
        weighted = rows_TPQ * weights
        agree = _agreeing(weighted, _signs(weighted.sum(0), round_off) >= 0)
        divisor = (weights * agree).sum(0)
        return (weighted * agree).sum(0), divisor.where(divisor != 0, torch.ones_like(divisor))

    def by_peft(rows_TPQ: Tensor) -> tuple[Tensor, Tensor]:
        agree = _agreeing(rows_TPQ, _signs(rows_TPQ.sum(0), round_off) >= 0)
        return (rows_TPQ * weights * agree).sum(0), agree.sum(0).clamp_min(1)

    def by_paper(rows_TPQ: Tensor) -> tuple[Tensor, Tensor]:
        return _by_paper(rows_TPQ, weights, round_off, layer.context.majority)

    count = {PAPER: by_paper, MERGEKIT: by_mergekit, PEFT: by_peft}[semantics]

    def elect(rows_TPQ: Tensor) -> Tensor:
        total, divisor = count(rows_TPQ)
        return total if combine == "sum" else total / divisor

    return elect


def _random(
    layer: LayerUpdates,
    probabilities: Callable[[Tensor, float], Tensor],
    keep: float | Sequence[float],
    semantics: str,
) -> Callable[[Tensor], Tensor]:
    """Return what drops random entries of (T, p, Q) and enlarges the others.

    mergekit restores the sum of absolute values of the whole layer, for which a first pass is needed. The others divide an entry by
    its own probability of being kept.
    """
    shares = layer.each(keep)

    def draw() -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        generators = layer.context.generators()

        def masks(rows_TPQ: Tensor) -> tuple[Tensor, Tensor]:
            chances = torch.stack([probabilities(rows, share) for rows, share in zip(rows_TPQ, shares, strict=True)])
            drawn = [torch.rand(rows_TPQ.shape[1:], dtype=torch.float64, generator=each) for each in generators]
            return (torch.stack(drawn) < chances).double(), chances

        return masks

    if semantics != MERGEKIT:
        masks = draw()

        def divided(rows_TPQ: Tensor) -> Tensor:
            mask, chances = masks(rows_TPQ)
            return rows_TPQ * mask / chances.where(chances > 0, torch.ones_like(chances))

        return divided
    masks, before, after = draw(), torch.zeros(layer.num_models).double(), torch.zeros(layer.num_models).double()
    for block in layer.blocks():
        sizes = block.abs()
        before += sizes.sum((1, 2))
        after += (sizes * masks(block)[0]).sum((1, 2))
    kept = (before >= SMALL) & (after >= SMALL)
    factors = torch.where(kept, before / after.where(kept, 1.0), 1.0)[:, None, None]
    again = draw()
    return lambda rows_TPQ: rows_TPQ * again(rows_TPQ)[0] * factors
