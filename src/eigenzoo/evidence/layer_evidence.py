"""All controls of one layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from eigenzoo.evidence import chance, growth, mean, secondary, suitability, universality, unseen, verdict
from eigenzoo.linalg.heldout import deal
from eigenzoo.records import Layer
from eigenzoo.subspace.moments import LayerMoments, recentered


@dataclass(frozen=True)
class LayerEvidence:
    """One layer's controls, and what adds up over layers.

    Attributes:
        layer: what it is.
        energy, variance: Σ‖X‖² and Σ‖X − mean‖² over the models, the denominators.
        dealt, across: findings on models held out at random, and on whole lineages held out.
        sums, across_sums: the energies behind them.
        code, decided_by: the verdict on the layer and the control that decided.
    """

    layer: Layer
    energy: float
    variance: float
    chance: chance.Chance
    mean: mean.MeanShare
    unseen: unseen.Unseen | None
    halves: universality.Halves | None
    secondary: secondary.Secondary | None
    suitability: suitability.Suitability
    growth: growth.LayerGrowth | None
    dealt: verdict.Findings
    across: verdict.Findings | None
    sums: unseen.Capture | None
    across_sums: unseen.Capture | None
    within_sums: tuple[unseen.Capture | None, ...]
    within_means: tuple[mean.MeanShare, ...]
    code: str
    decided_by: str


def measure_layer(
    layer: Layer,
    moments: LayerMoments,
    lineages: Sequence[Tensor] | None,
    groups: Sequence[Tensor],
    seed: int,
) -> LayerEvidence:
    """Run every control on one layer's moments.

    Args:
        layer: what it is.
        moments: about any center: the spectrum is taken about it, all else about the models' mean.
        lineages: folds of whole lineages, where there are groups and more than one lineage.
        groups: the models of the largest groups, which are looked at on their own.
        seed: of draws, folds and halves.
    """
    about_mean = recentered(moments)
    spectrum = chance.chance(moments, layer.shape, seed)
    dealt, sums = findings(about_mean, None, seed)
    across, across_sums = (None, None) if lineages is None else findings(about_mean, lineages, seed)
    inside = [findings(subset(about_mean, group), None, seed) for group in groups]
    rank = max(spectrum.auto, 1)
    code, decided_by = verdict.judge(dealt, across) if about_mean.variance > 0 else (verdict.NO_VARIANCE, "variance")
    return LayerEvidence(
        layer=layer,
        energy=float(about_mean.energies_N.sum()),
        variance=about_mean.variance,
        chance=spectrum,
        mean=dealt.mean,
        unseen=unseen.unseen(about_mean, sums),
        halves=universality.halves(about_mean, rank, seed),
        secondary=secondary.secondary(sums, rank),
        suitability=suitability.suitability(about_mean, seed),
        growth=growth.layer_growth(about_mean, seed),
        dealt=dealt,
        across=across,
        sums=sums,
        across_sums=across_sums,
        within_sums=tuple(found for _, found in inside),
        within_means=tuple(found.mean for found, _ in inside),
        code=code,
        decided_by=decided_by,
    )


def findings(
    moments: LayerMoments, folds: Sequence[Tensor] | None, seed: int
) -> tuple[verdict.Findings, unseen.Capture | None]:
    """Hold models out, fold by fold (five random ones where none are given), and say what they show."""
    sums = unseen.capture(moments, folds, seed)
    cloud = sums.cloud / sums.contrast_energy if sums is not None and sums.contrast_energy > 0 else 0.0
    dealt = list(folds) if folds is not None else deal(moments.num_models, unseen.NUM_FOLDS, seed)
    share = mean.mean_share(moments, dealt, cloud)
    return verdict.Findings(verdict.directions([(sums, 1.0)]) if sums is not None else verdict.NOWHERE, share), sums


def subset(moments: LayerMoments, places: Tensor) -> LayerMoments:
    """Return the moments of some of the models, about their own mean."""
    part = replace(
        moments,
        gram_NN=moments.gram_NN[places][:, places],
        cross_N=moments.cross_N[places],
        sums_N=None,
        singular_NR=None,
        starts_NN=None,
    )
    return recentered(part)
