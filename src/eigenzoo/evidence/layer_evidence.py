"""All controls of one layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from eigenzoo.display import one_line
from eigenzoo.evidence import chance, suitability, verdict
from eigenzoo.evidence.alpha_score import AlphaScore, OwnSpectra, alpha_score
from eigenzoo.evidence.growth import Halves, LayerGrowth, halves, layer_growth
from eigenzoo.evidence.unseen import MeanShare, Secondary, Unseen, capture, mean_share, secondary, unseen
from eigenzoo.linalg.gram import excess_moments, scale_models
from eigenzoo.linalg.heldout import NUM_FOLDS, make_folds
from eigenzoo.linalg.rank import AUTO, RankRule, choose_rank
from eigenzoo.linalg.spectrum import NO_VARIANCE, eigenpairs
from eigenzoo.records import Layer
from eigenzoo.subspace.moments.layer_moments import LayerMoments, recentered


@dataclass(frozen=True)
class LayerEvidence:
    """One layer's controls, and the sums that are added over layers.

    Attributes:
        layer: name and shape.
        energy, variance: Σ‖X‖² and Σ‖X − mean‖² over the models, the denominators.
        chance, mean, unseen, halves, secondary, suitability, alpha_score, growth: the controls' records; None if there are too few
            models, or if `alpha_score` was not measured. `Evidence.to_dict()` has them under the names of docs/evidence.md:
            `unseen` as `heldout`, `halves` as `split_half`.
        dealt, across: the rule's test with models held out at random (`test`), and with whole lineages held out (`test_across`).
        weighed, across_weighed: the sums over folds for these tests; within: test and sums of each large group alone.
        code, decided_by: the layer's verdict and the control that decided it.
    """

    layer: Layer
    energy: float
    variance: float
    chance: chance.Chance
    mean: MeanShare
    unseen: Unseen | None
    halves: Halves | None
    secondary: Secondary | None
    suitability: suitability.Suitability
    alpha_score: AlphaScore | None
    growth: LayerGrowth | None
    dealt: verdict.Findings
    across: verdict.Findings | None
    weighed: verdict.Weighed | None
    across_weighed: verdict.Weighed | None
    within: tuple[tuple[verdict.Findings, verdict.Weighed | None], ...]
    code: str
    decided_by: str

    def __repr__(self) -> str:
        return one_line(f"LayerEvidence({self.layer.name!r}, shape={self.layer.shape}): {self.code}")


def measure_layer(
    layer: Layer,
    moments: LayerMoments,
    lineages: Sequence[Tensor] | None,
    core: Tensor | None,
    groups: Sequence[Tensor],
    rule: RankRule,
    seed: int,
    spectra: OwnSpectra | None = None,
) -> LayerEvidence:
    """Run every control on one layer's moments.

    Args:
        layer: the layer's record.
        moments: moments about any center. The spectrum is about this center, and all else about the models' mean.
        lineages: folds of whole lineages, if there are groups and more than one lineage.
        core: the models of a lineage with nearly all models. The layer is then judged by it.
        groups: the models of the largest groups, which have their own controls.
        rule: rank rule for halves and secondary subspace.
        seed: seed of draws, folds and halves.
        spectra: every model's own singular values, if they are available.
    """
    about_mean = recentered(moments)
    values_K, vectors_NK = eigenpairs(about_mean.centered_NN, about_mean.round_off)
    about_center_K = values_K if moments.shift_N is None else eigenpairs(moments.centered_NN, moments.round_off)[0]
    spectrum = chance.chance(moments, about_center_K, layer.shape, seed)
    num_values = layer.num_values
    judged = about_mean if core is None or len(core) == moments.num_models else subset(about_mean, core)
    dealt, weighed = findings(judged, num_values, None, seed)
    across, across_weighed = (None, None) if lineages is None else findings(about_mean, num_values, lineages, seed)
    inside = [findings(subset(about_mean, group), num_values, None, seed) for group in groups]
    chosen = spectrum.auto if rule == AUTO else choose_rank(rule, values_K, about_mean.variance).rank
    rank = max(chosen, 1)
    sums = None if weighed is None else weighed.sums
    code, decided_by = verdict.judge(dealt, across) if about_mean.variance > 0 else (verdict.NO_VARIANCE, "variance")
    return LayerEvidence(
        layer=layer,
        energy=float(about_mean.energies_N.sum()),
        variance=about_mean.variance,
        chance=spectrum,
        mean=dealt.mean,
        unseen=unseen(sums, values_K, vectors_NK),
        halves=halves(about_mean, rank, seed),
        secondary=secondary(sums, rank),
        suitability=suitability.suitability(about_mean, values_K, seed),
        alpha_score=None if spectra is None else alpha_score(spectra),
        growth=layer_growth(about_mean, seed),
        dealt=dealt,
        across=across,
        weighed=weighed,
        across_weighed=across_weighed,
        within=tuple(inside),
        code=code,
        decided_by=decided_by,
    )


def findings(
    moments: LayerMoments, num_values: int, lineages: Sequence[Tensor] | None, seed: int
) -> tuple[verdict.Findings, verdict.Weighed | None]:
    """Hold models out fold by fold (five random folds, or whole lineages), and test them."""
    scaled = scale_models(moments.gram_NN)
    sums = capture(moments, lineages, seed, scaled)
    weighed, cloud = None, 0.0
    # All models have about one norm here, but copies among held-out models differ by round-off.
    if sums is not None and sums.contrast_energy > NO_VARIANCE * moments.num_models and sums.cloud > 0:
        cloud = sums.cloud / sums.contrast_energy
        edges = cloud_edges = excess = None
        if lineages is None:
            edges, cloud_edges = chance.edges(scaled, sums.rank, (sums.dimensions, min(1 / cloud, sums.dimensions)))
            excess = excess_moments(*scaled, moments.num_values)
        weighed = verdict.Weighed(sums, edges, cloud_edges, excess, num_values)
    dealt = list(lineages) if lineages is not None else make_folds(moments.num_models, NUM_FOLDS, seed)
    share = mean_share(moments, dealt, cloud)
    return verdict.Findings(verdict.directions([weighed] if weighed else []), share), weighed


def subset(moments: LayerMoments, indices: Tensor) -> LayerMoments:
    """Return the moments of some of the models, about their own mean."""
    part = replace(
        moments,
        gram_NN=moments.gram_NN[indices][:, indices],
        cross_N=moments.cross_N[indices],
        entries=None,
        sums_N=None,
        singular_NR=None,
        starts_NN=None,
    )
    return recentered(part)
