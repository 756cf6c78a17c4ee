"""Evidence as plain JSON values: the keys that docs/evidence.md lists, and no others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from eigenzoo.evidence.alpha_score import AlphaScore, families
from eigenzoo.evidence.controls import controls, measured_scores
from eigenzoo.evidence.layer_evidence import LayerEvidence
from eigenzoo.evidence.source import AxisSpectrum
from eigenzoo.evidence.suitability import Thresholds
from eigenzoo.evidence.summary import Pooled
from eigenzoo.evidence.unseen import num_folds
from eigenzoo.records import plain
from eigenzoo.weights.roles import depth, role

if TYPE_CHECKING:
    from eigenzoo.evidence.evidence import Evidence


def document(found: Evidence) -> dict[str, Any]:
    """Return the evidence as JSON values."""
    summary = found.summary
    return {
        "num_models": len(found.names),
        "num_layers": len(found.layers),
        "view": found.view,
        "center": found.center,
        "names": list(found.names),
        "seed": found.seed,
        "folds": num_folds(len(found.names)),
        "seconds": found.seconds,
        "verdict": plain(found.verdict),
        "layers": {
            name: _layer(layer, found.axes.get(name, {}), found.thresholds) for name, layer in found.layers.items()
        },
        "lineage": _lineage(found),
        "growth": None if found.growth is None else plain(found.growth),
        "map": dict(zip(found.names, plain(found.map), strict=True)),
        "map_shares": list(found.map_shares),
        "suitability": _suitability(found),
        "summary": {
            **_pooled(summary.dealt),
            "mean_energy": summary.mean_energy,
            "mean_heldout": summary.mean_heldout,
            "mean_null": summary.mean_null,
            "variance": summary.variance,
            "energy": summary.energy,
        },
        "controls": [plain(control) for control in controls(found)],
        "runs": [list(group) for group in found.runs],
        "warnings": list(found.warnings),
    }


def _layer(found: LayerEvidence, axes: dict[str, AxisSpectrum], thresholds: Thresholds) -> dict[str, Any]:
    spectrum, held = found.chance, found.unseen
    return {
        "shape": list(found.layer.shape),
        "role": role(found.layer.name),
        "depth": depth(found.layer.name),
        "num_values": found.layer.num_values,
        "energy": found.energy,
        "variance": found.variance,
        "explained_variance_ratio": list(spectrum.explained_variance_ratio),
        "effective_rank": spectrum.effective_rank,
        "mean_energy": found.mean.share,
        "null": {
            key: plain(getattr(spectrum, key))
            for key in ("norm_matched", "low", "high", "iid", "permuted", "spectrum_matched")
        },
        "heldout": {
            "rank": list(held.rank) if held else [],
            "in_sample": list(held.in_sample) if held else [],
            "captured": list(held.captured) if held else [],
            "null": list(held.null) if held else [],
            "leave_one_out": {
                "rank": list(held.left_out_rank) if held else [],
                "captured": list(held.left_out) if held else [],
            },
        },
        "mean": {key: getattr(found.mean, key) for key in ("heldout", "null", "common", "deviations")},
        "split_half": None if found.halves is None else plain(found.halves),
        "secondary": None if found.secondary is None else plain(found.secondary),
        "suitability": {
            **{key: getattr(found.suitability, key) for key in ("exponent", "xmin", "num_values", "mean", "spread")},
            "exponents": list(found.suitability.exponents),
            "share": found.suitability.share(thresholds),
            "q": found.suitability.q(thresholds),
            "alpha_score": _alpha_score(found.alpha_score),
        },
        "axes": {axis: plain(side) for axis, side in axes.items()},
        "rank": {"auto": spectrum.auto, "var90": spectrum.var90},
        "test": plain(found.dealt.directions),
        "test_across": None if found.across is None else plain(found.across.directions),
        "verdict": found.code,
        "decided_by": found.decided_by,
    }


def _pooled(pooled: Pooled) -> dict[str, Any]:
    return {key: list(getattr(pooled, key)) for key in ("rank", "in_sample", "captured", "null")}


def _lineage(found: Evidence) -> dict[str, Any]:
    origin, summary = found.lineage, found.summary
    grouped = sum(map(len, origin.groups))
    across = None
    if summary.across is not None:
        across = {
            **_pooled(summary.across),
            "mean": summary.mean_across,
            "num_lineages": len(origin.groups) + len(found.names) - grouped,
        }
    large = [group for group in origin.groups if len(group) < len(found.names)]
    return {
        **plain(origin),
        "across": across,
        "within": [
            {"num_models": len(group), **_pooled(inside.pooled), "mean": inside.mean, "verdict": inside.code}
            for group, inside in zip(large, summary.within, strict=False)
        ],
    }


def _suitability(found: Evidence) -> dict[str, Any]:
    layers = [(name, layer.suitability) for name, layer in found.layers.items()]
    suited = [name for name, layer in layers if layer.is_suited(found.thresholds)]
    known = [layer for _, layer in layers if layer.exponents]
    return {
        "thresholds": plain(found.thresholds),
        "retained": suited,
        "num_layers": len(known),
        "share": len(suited) / len(known) if known else 0.0,
        "alpha_score": _alpha_scores(found),
    }


def _alpha_score(found: AlphaScore | None) -> dict[str, Any] | None:
    """The authors' score of a layer; None where the models' own spectra were not measured."""
    if found is None:
        return None
    return {
        "exponents": list(found.exponents),
        "num_models": len(found.fitted),
        **{key: getattr(found, key) for key in ("mean", "spread", "share", "q")},
        "retained": found.is_retained,
    }


def _alpha_scores(found: Evidence) -> dict[str, Any] | None:
    layers = measured_scores(found)
    if not layers:
        return None
    retained = [name for name, layer in layers.items() if layer.is_retained]
    return {
        "retained": retained,
        "num_layers": len(layers),
        "share": len(retained) / len(layers),
        "families": families(layers),
    }
