"""The record of all controls of one zoo, for the other files of the package."""

from __future__ import annotations

from dataclasses import dataclass, field

from eigenzoo.evidence.growth import Growth
from eigenzoo.evidence.layer_evidence import LayerEvidence
from eigenzoo.evidence.lineage import Lineage
from eigenzoo.evidence.source import AxisSpectrum
from eigenzoo.evidence.suitability import Thresholds
from eigenzoo.evidence.summary import Summary, Verdict
from eigenzoo.subspace.fitting.heldout_sides import SideShares


@dataclass(frozen=True)
class EvidenceRecord:
    """Results of all controls. The public record `evidence.Evidence` describes the fields and adds methods."""

    names: tuple[str, ...]
    view: str
    center: str
    seed: int
    layers: dict[str, LayerEvidence]
    axes: dict[str, dict[str, AxisSpectrum]]
    lineage: Lineage
    growth: Growth | None
    summary: Summary
    map: tuple[tuple[float, ...], ...]
    map_shares: tuple[float, ...]
    thresholds: Thresholds
    verdict: Verdict
    warnings: tuple[str, ...]
    seconds: float
    runs: tuple[tuple[str, ...], ...] = ()
    sides: dict[str, SideShares] = field(default_factory=dict)
