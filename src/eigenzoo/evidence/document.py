"""Convert evidence to plain JSON values, with exactly the keys in docs/evidence.md."""

from __future__ import annotations

from math import isinf
from typing import Any

from eigenzoo.evidence.alpha_score import AlphaScore, families
from eigenzoo.evidence.controls import controls, measured_scores
from eigenzoo.evidence.layer_evidence import LayerEvidence
from eigenzoo.evidence.record import EvidenceRecord
from eigenzoo.evidence.source import AxisSpectrum
from eigenzoo.evidence.suitability import Thresholds
from eigenzoo.evidence.summary import Pooled
from eigenzoo.evidence.unseen import num_folds
from eigenzoo.evidence.verdict import Measures
from eigenzoo.records import plain
from eigenzoo.weights.roles import depth, role

TESTED = ("distinct", "material", "rank", "share", "over_chance", "p_chance", "ratio", "p_cloud")


def document(record: EvidenceRecord) -> dict[str, Any]:
    """Return the evidence as JSON values."""
    summary = record.summary
    return {
        "num_models": len(record.names),
        "num_layers": len(record.layers),
        "view": record.view,
        "center": record.center,
        "names": list(record.names),
        "seed": record.seed,
        "folds": num_folds(len(record.names)),
        "seconds": record.seconds,
        "verdict": plain(record.verdict),
        "layers": {
            name: _layer(layer, record.axes.get(name, {}), record.thresholds) for name, layer in record.layers.items()
        },
        "lineage": _lineage(record),
        "growth": None if record.growth is None else plain(record.growth),
        "map": dict(zip(record.names, plain(record.map), strict=True)),
        "map_shares": list(record.map_shares),
        "suitability": _suitability(record),
        "summary": {
            **_pooled(summary.dealt),
            "mean_energy": summary.mean_energy,
            "mean_heldout": summary.mean_heldout,
            "mean_null": summary.mean_null,
            "variance": summary.variance,
            "energy": summary.energy,
            "test": _test(summary.measures),
            "test_across": _test(summary.across_measures),
            "sides": {axes: plain(shares) for axes, shares in record.sides.items()},
        },
        "controls": [plain(control) for control in controls(record)],
        "runs": [list(group) for group in record.runs],
        "warnings": list(record.warnings),
    }


def _layer(layer: LayerEvidence, axes: dict[str, AxisSpectrum], thresholds: Thresholds) -> dict[str, Any]:
    spectrum, unseen = layer.chance, layer.unseen
    return {
        "shape": list(layer.layer.shape),
        "role": role(layer.layer.name),
        "depth": depth(layer.layer.name),
        "num_values": layer.layer.num_values,
        "energy": layer.energy,
        "variance": layer.variance,
        "explained_variance_ratio": list(spectrum.explained_variance_ratio),
        "effective_rank": spectrum.effective_rank,
        "mean_energy": layer.mean.share,
        "null": {
            key: plain(getattr(spectrum, key))
            for key in ("norm_matched", "low", "high", "iid", "permuted", "spectrum_matched")
        },
        "heldout": {
            "rank": list(unseen.rank) if unseen else [],
            "in_sample": list(unseen.in_sample) if unseen else [],
            "captured": list(unseen.captured) if unseen else [],
            "null": list(unseen.null) if unseen else [],
            "leave_one_out": {
                "rank": list(unseen.left_out_rank) if unseen else [],
                "captured": list(unseen.left_out) if unseen else [],
            },
        },
        "mean": {key: getattr(layer.mean, key) for key in ("heldout", "null", "common", "deviations")},
        "split_half": None if layer.halves is None else plain(layer.halves),
        "secondary": None if layer.secondary is None else plain(layer.secondary),
        "suitability": {
            **{key: getattr(layer.suitability, key) for key in ("exponent", "xmin", "num_values", "mean", "spread")},
            "exponents": list(layer.suitability.exponents),
            "share": layer.suitability.share(thresholds),
            "q": layer.suitability.q(thresholds),
            "alpha_score": _alpha_score(layer.alpha_score),
        },
        "axes": {axis: plain(side) for axis, side in axes.items()},
        "rank": {"auto": spectrum.auto, "var90": spectrum.var90},
        "test": plain(layer.dealt.directions),
        "test_across": None if layer.across is None else plain(layer.across.directions),
        "verdict": layer.code,
        "decided_by": layer.decided_by,
    }


def _test(measures: Measures | None) -> dict[str, Any] | None:
    """Return the rule's test on all layers together, with the figures of the verdict's text; None without held-out models."""
    if measures is None:
        return None
    figures = {key: getattr(measures, key) for key in TESTED}
    return {**figures, "effective": None if isinf(measures.effective or 0.0) else measures.effective}


def _pooled(pooled: Pooled) -> dict[str, Any]:
    return {key: list(getattr(pooled, key)) for key in ("rank", "in_sample", "captured", "null")}


def _lineage(record: EvidenceRecord) -> dict[str, Any]:
    origin, summary = record.lineage, record.summary
    grouped = sum(map(len, origin.groups))
    across = None
    if summary.across is not None:
        across = {
            **_pooled(summary.across),
            "mean": summary.mean_across,
            "num_lineages": len(origin.groups) + len(record.names) - grouped,
        }
    large = [group for group in origin.groups if len(group) < len(record.names)]
    return {
        **plain(origin),
        "across": across,
        "within": [
            {"num_models": len(group), **_pooled(inside.pooled), "mean": inside.mean, "verdict": inside.code}
            for group, inside in zip(large, summary.within, strict=False)
        ],
    }


def _suitability(record: EvidenceRecord) -> dict[str, Any]:
    layers = [(name, layer.suitability) for name, layer in record.layers.items()]
    suited = [name for name, layer in layers if layer.is_suited(record.thresholds)]
    fitted = [layer for _, layer in layers if layer.exponents]
    return {
        "thresholds": plain(record.thresholds),
        "retained": suited,
        "num_layers": len(fitted),
        "share": len(suited) / len(fitted) if fitted else 0.0,
        "alpha_score": _alpha_scores(record),
    }


def _alpha_score(score: AlphaScore | None) -> dict[str, Any] | None:
    """Return the authors' score of a layer; None if the models' own spectra were not measured."""
    if score is None:
        return None
    return {
        "exponents": list(score.exponents),
        "num_models": len(score.fitted),
        **{key: getattr(score, key) for key in ("mean", "spread", "share", "q")},
        "retained": score.is_retained,
    }


def _alpha_scores(record: EvidenceRecord) -> dict[str, Any] | None:
    layers = measured_scores(record)
    if not layers:
        return None
    retained = [name for name, layer in layers.items() if layer.is_retained]
    return {
        "retained": retained,
        "num_layers": len(layers),
        "share": len(retained) / len(layers),
        "families": families(layers),
    }
