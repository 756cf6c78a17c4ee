"""Documents as evidence would make them, of any size and regime, without a zoo: written here once for all tests of reports."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

Json = dict[str, Any]

REGIMES = {
    # share of variance in structure, share of that which held-out models keep, the deciding control
    "shared-subspace": (0.72, 0.93, "unseen"),
    "no-shared-structure": (0.02, 0.05, "unseen"),
    "shared-lineage": (0.55, 0.90, "lineage"),
}

HOSTILE = (
    "<img src=x onerror=alert(1)>",
    "</script><script>alert(2)</script>",
    '<a href="javascript:alert(3)">b</a><b>bold</b>',
    "=HYPERLINK(1)",
    "$x^2$ \\frac & | `c` **d** {{ 7*7 }}",
    "\u202egnp.exe\x1b[31m",
    "</noscript><img src=x onerror=alert(4)>",
    "日本 ␀ 模型",
)

ROLES = ("attention.query", "attention.key", "attention.value", "attention.output", "mlp.up", "mlp.down")


def layer_name(place: int) -> tuple[str, str, int]:
    """Name, role and depth of the layer at a place."""
    role, depth = ROLES[place % len(ROLES)], place // len(ROLES)
    return f"encoder.layer.{depth}.{role}.weight", f"encoder.layer.*.{role}.weight", depth


def ranks_up_to(largest: int) -> list[int]:
    return sorted({*(2**power for power in range(20) if 2**power < largest), largest})


def spectra(num: int, structured: float, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """A centred spectrum and its norm-matched null, both of sum one."""
    places = np.arange(num)
    flat = (1 + 1.2 * math.sqrt(num / 400)) - 0.9 * places / num
    flat /= flat.sum()
    decay = np.exp(-places / scale)
    found = structured * decay / decay.sum() + (1 - structured) * flat
    return np.sort(found)[::-1], flat


def layer(place: int, num_models: int, regime: str, draw: np.random.Generator, *, nulls: bool = True) -> Json:
    """One layer's evidence."""
    structured, kept, decided_by = REGIMES[regime]
    _, role, depth = layer_name(place)
    structured = min(structured * draw.uniform(0.75, 1.15), 0.95)
    found, flat = spectra(num_models - 1, structured, draw.uniform(2.0, 6.0))
    ranks = ranks_up_to(num_models // 5 * 4 - 1)
    sums, null_sums = np.cumsum(found), np.cumsum(flat)
    chance = [float(null_sums[rank - 1]) * 0.3 for rank in ranks]
    captured = [
        float(structured * kept * (1 - math.exp(-rank / 4)) + share * (1 - structured))
        for rank, share in zip(ranks, chance, strict=True)
    ]
    rank = min(16, ranks[-1])
    cosines = np.clip(kept * structured * 1.3 - 0.02 * np.arange(rank), 0.05, 0.999)
    variance = float(draw.uniform(50, 400))
    energy = variance / draw.uniform(0.02, 0.3)
    outputs, inputs = (64, 256) if "down" in role else (256, 64) if "up" in role else (64, 64)
    beyond = int((found > flat * 1.15).sum())
    exponent = float(max(draw.normal(3.5 if structured > 0.3 else 7.0, 1.0), 1.3))
    return {
        "shape": [outputs, inputs],
        "role": role,
        "depth": depth,
        "num_values": outputs * inputs,
        "energy": energy,
        "variance": variance,
        "explained_variance_ratio": found.tolist(),
        "effective_rank": float(1 / (found**2).sum()),
        "mean_energy": 1 - variance / energy,
        "null": {
            "norm_matched": flat.tolist(),
            "low": (flat * 0.9).tolist(),
            "high": (flat * 1.1).tolist(),
            "iid": (flat * np.linspace(1.05, 0.95, len(flat))).tolist(),
            "permuted": (flat * np.linspace(1.1, 0.9, len(flat))).tolist() if nulls else None,
            "spectrum_matched": (flat * np.linspace(1.15, 0.85, len(flat))).tolist() if nulls else None,
        },
        "heldout": {
            "rank": ranks,
            "in_sample": [float(sums[at - 1]) for at in ranks],
            "captured": captured,
            "null": chance,
            "leave_one_out": {"rank": ranks, "captured": [share * 1.02 for share in captured]},
        },
        "mean": {"heldout": (1 - variance / energy) * 0.98, "null": 0.01},
        "split_half": {
            "rank": rank,
            "cosines": cosines.tolist(),
            "null_cosines": np.linspace(0.4, 0.05, rank).tolist() if nulls else [],
            "low": np.clip(cosines - 0.05, 0, 1).tolist(),
            "high": np.clip(cosines + 0.04, 0, 1).tolist(),
            "num_splits": 20,
        },
        "secondary": {
            "rank": rank,
            "upto": 2 * rank,
            "in_sample": float(draw.uniform(0.1, 0.2)),
            "captured": float(draw.uniform(0.02, 0.05)),
            "null": 0.03,
        },
        "suitability": suitability(exponent, num_models, draw),
        "test": {"rank": 4, "p_value": 2.3e-7 if structured > 0.3 else 0.4, "ratio": 1 + 4 * structured},
        "axes": {},
        "rank": {"auto": beyond, "var90": int(np.searchsorted(sums, 0.9)) + 1},
        "verdict": regime,
        "decided_by": decided_by,
    }


def suitability(exponent: float, num_models: int, draw: np.random.Generator) -> Json:
    """Exponents of random halves around the whole zoo's, and what the rule makes of them."""
    found = draw.normal(exponent, 0.4, 8)
    share, spread = float(((found >= 2) & (found <= 6)).mean()), float(found.std())
    return {
        "exponent": exponent,
        "xmin": 0.01,
        "num_values": num_models - 1,
        "exponents": found.tolist(),
        "mean": float(found.mean()),
        "spread": spread,
        "share": share,
        "q": share / (1 + spread),
    }


def is_suited(found: Json) -> bool:
    """The evidence's rule, at its usual thresholds."""
    if found["mean"] is None:
        return False
    return 2 <= found["mean"] <= 6 and found["spread"] <= 1 and found["share"] >= 0.5 and found["q"] >= 0.2


def still_layer(place: int) -> Json:
    """A layer that all models have alike: most of its evidence is empty."""
    _, role, depth = layer_name(place)
    empty: Json = {
        "rank": [],
        "in_sample": [],
        "captured": [],
        "null": [],
        "leave_one_out": {"rank": [], "captured": []},
    }
    return {
        "shape": [64, 64],
        "role": role,
        "depth": depth,
        "num_values": 4096,
        "energy": 12.0,
        "variance": 0.0,
        "explained_variance_ratio": [],
        "effective_rank": 0.0,
        "mean_energy": 1.0,
        "null": {"norm_matched": [], "low": [], "high": [], "iid": [], "permuted": None, "spectrum_matched": None},
        "heldout": empty,
        "mean": {"heldout": 1.0, "null": None},
        "split_half": None,
        "secondary": None,
        "suitability": {
            "exponent": None,
            "xmin": None,
            "num_values": 0,
            "exponents": [],
            "mean": None,
            "spread": None,
            "share": 0.0,
            "q": 0.0,
        },
        "test": {"rank": 0, "p_value": 1.0, "ratio": 0.0},
        "axes": {},
        "rank": {"auto": 0, "var90": 0},
        "verdict": "no-variance",
        "decided_by": "variance",
    }


def weighted(layers: dict[str, Json], part: str, key: str) -> list[float]:
    known = [layer for layer in layers.values() if layer["variance"]]
    whole = sum(layer["num_values"] for layer in known)
    return [
        sum(layer["num_values"] * layer[part][key][at] for layer in known) / whole
        for at in range(len(known[0][part][key]))
    ]


def lineage(names: list[str], regime: str, draw: np.random.Generator) -> Json:
    """Lineage groups, cosines with blocks, and what holds across and within."""
    num = len(names)
    grouped = regime == "shared-lineage"
    group_of = draw.permutation(np.arange(num) % 3) if grouped else np.arange(num)
    if num > 5 and not grouped:
        group_of[1] = group_of[0]
    cosines = np.clip(draw.normal(0.12 if regime != "no-shared-structure" else 0.0, 0.03, (num, num)), -1, 1)
    cosines = (cosines + cosines.T) / 2
    cosines[group_of[:, None] == group_of] += 0.6
    np.fill_diagonal(cosines, 1.0)
    groups = [[names[at] for at in np.flatnonzero(group_of == group)] for group in dict.fromkeys(group_of.tolist())]
    ranks = [1, 2, 4, 8]
    record = {"rank": ranks, "captured": [0.05, 0.09, 0.14, 0.2], "null": [0.03, 0.06, 0.1, 0.16], "mean": 0.4}
    return {
        "groups": [group for group in groups if len(group) > 1],
        "duplicates": [[names[0], names[1]]],
        "level": 0.5,
        "measure": "A-factors" if grouped else "weights",
        "order": [int(at) for at in np.argsort(group_of, kind="stable")],
        "cosines": cosines.tolist(),
        "across": {**record, "num_lineages": 3} if grouped else None,
        "within": [{**record, "num_models": len(group)} for group in groups if grouped],
    }


def growth(num_models: int, regime: str) -> Json:
    counts = sorted({max(4, round(num_models * share)) for share in (0.1, 0.2, 0.4, 0.7, 1.0)})
    structured, kept, _ = REGIMES[regime]
    captured = [structured * kept * (1 - math.exp(-count / 12)) + 0.02 for count in counts]
    return {
        "num_models": counts,
        "var90_rank": [int(min(count - 1, 0.9 * count * (1.1 - structured) + 4)) for count in counts],
        "captured": captured,
        "in_sample": [share + 0.2 * math.exp(-count / 60) for share, count in zip(captured, counts, strict=True)],
        "null": [0.04 for _ in counts],
        "rank": 16 if num_models > 21 else 4,
        "spread": [0.05 / math.sqrt(count / 10) for count in counts],
    }


def controls(regime: str, summary: Json) -> list[Json]:
    place = min(4, len(summary["rank"]) - 1)
    shares = {key: summary[key][place] for key in ("in_sample", "captured", "null")}

    def control(name: str, question: str, statistic: str, value: float | None, against: str, its: float | None) -> Json:
        return {
            "name": name,
            "question": question,
            "statistic": statistic,
            "value": value,
            "control": against,
            "control_value": its,
            "uncertainty": "standard error over 5 folds 0.012",
            "sentence": f"Found {value:.3g}, against {its:.3g}." if value is not None else "Not measured.",
        }

    share = "share of held-out models' variance"
    return [
        control("chance", "More than chance?", "share of variance", shares["in_sample"], "same norms", shares["null"]),
        control("mean", "Anything beyond the mean?", "energy about the mean", 0.12, "energy of the mean", 0.88),
        control(
            "unseen", "Does it hold models that were left out?", share, shares["captured"], "chance", shares["null"]
        ),
        control("universality", "Do two halves find the same subspace?", "mean cosine", 0.81, "unrelated models", 0.21),
        control("growth", "Does the rank level off?", "directions for 90 % of 40 models", 17.0, "of 4 models", 3.0),
        control("lineage", "Does it outlast whole lineages?", share, 0.2, "chance", 0.16),
        control("secondary", "Do the next directions hold less?", share, 0.03, "chance", 0.03),
        control("suitability", "Do the spectra follow a power law?", "share of layers", None, "", None),
    ]


def function_record(num_models: int) -> Json:
    ranks = [1, 2, 4, 8, 16]
    rebuilt = {str(rank): 0.95 - 0.4 * math.exp(-rank / 4) for rank in ranks}
    random_basis = {str(rank): 0.5 + 0.005 * rank for rank in ranks}
    mean: Json = {"original": 0.957, "parent": 0.51, "mean": 0.534, "head_only": None, "secondary": 0.55}
    mean |= {"rebuilt": rebuilt, "random_basis": random_basis}
    spread: Json = {"original": 0.004, "parent": 0.002, "mean": 0.01, "head_only": None, "secondary": 0.01}
    spread |= {"rebuilt": dict.fromkeys(rebuilt, 0.01), "random_basis": dict.fromkeys(random_basis, 0.008)}
    return {
        "metric": "eigenzoo.nursery:accuracy",
        "num_models": 5,
        "heldout": True,
        "num_fitted": num_models,
        "ranks": ranks,
        "secondary_rank": 16,
        "models": {f"task-{at:05d}": mean for at in range(5)},
        "mean": mean,
        "spread": spread,
        "sentence": "Rebuilt from 16 directions, held-out models reach 0.943 of 0.957; the mean alone 0.534.",
    }


def size_record(layers: dict[str, Json], num_models: int) -> Json:
    values = sum(layer["num_values"] for layer in layers.values())
    return {
        "whole_zoo": 4 * values * num_models + 20_000 * num_models,
        "num_models": num_models,
        "shared": 40_123,
        "per_model": 1_777,
        "layers": {
            name: {"fixed": 4 * layer["num_values"], "per_direction": 4 * layer["num_values"], "per_coefficient": 4}
            for name, layer in layers.items()
        },
    }


def make_document(
    num_models: int = 40,
    num_layers: int = 24,
    regime: str = "shared-subspace",
    *,
    function: bool = True,
    sizes: bool = True,
    nulls: bool = True,
    axes: bool = False,
    hostile: bool = False,
    still: bool = True,
    bundle: bool = True,
    warned: bool = False,
    seed: int = 0,
) -> Json:
    """A whole document; `still` makes its last layer one without variance, `hostile` gives it names that attack."""
    draw = np.random.default_rng(seed)
    names = [f"task-{at:05d}" for at in range(num_models)]
    layers = {layer_name(at)[0]: layer(at, num_models, regime, draw, nulls=nulls) for at in range(num_layers)}
    if still:
        layers[layer_name(num_layers - 1)[0]] = still_layer(num_layers - 1)
    if axes:
        for record in layers.values():
            found, flat = spectra(64, 0.5, 5.0)
            side = {"explained_variance_ratio": found.tolist(), "null": flat.tolist()}
            record["axes"] = {"outputs": side, "inputs": side}
    if hostile:
        names[: len(HOSTILE)] = HOSTILE
        keys = list(layers)
        layers = {(HOSTILE[at] if at < len(HOSTILE) else key): layers[key] for at, key in enumerate(keys)}
        layers[HOSTILE[0]]["role"] = HOSTILE[0]
        layers[HOSTILE[4]]["role"] = HOSTILE[4]
        layers[HOSTILE[1]]["sentence"] = HOSTILE[1]
    known = [record for record in layers.values() if record["variance"]]
    energy, variance = (sum(record[key] for record in layers.values()) for key in ("energy", "variance"))
    summary: Json = {
        "rank": known[0]["heldout"]["rank"],
        **{key: weighted(layers, "heldout", key) for key in ("in_sample", "captured", "null")},
        "mean_energy": sum(record["mean_energy"] * record["energy"] for record in layers.values()) / energy,
        "mean_heldout": sum(record["mean"]["heldout"] * record["energy"] for record in layers.values()) / energy,
        "mean_null": 0.01,
        "variance": variance,
        "energy": energy,
        "test": {"distinct": False, "material": True, "rank": 4, "share": 0.25, "p_chance": 0.0, "effective": None},
        "test_across": None,
    }
    centres = draw.normal(0, 3, (3, 3)) if regime == "shared-lineage" else np.zeros((3, 3))
    found_lineage = lineage(names, regime, draw)
    group_of = {name: at for at, group in enumerate(found_lineage["groups"]) for name in group}
    codes = [record["verdict"] for record in layers.values()]
    varying = [code for code in codes if code != "no-variance"]
    retained = [name for name, record in layers.items() if is_suited(record["suitability"])]
    evidence: Json = {
        "num_models": num_models,
        "num_layers": num_layers,
        "view": "update" if regime == "shared-lineage" else "delta",
        "center": "models",
        "names": names,
        "seed": seed,
        "folds": 5,
        "seconds": 12.3,
        "layers": layers,
        "lineage": found_lineage,
        "growth": growth(num_models, regime),
        "map": {
            name: (draw.normal(0, 1, 3) * [3, 2, 1] + centres[group_of.get(name, 0) % 3] * 3).tolist() for name in names
        },
        "map_shares": [0.21, 0.12, 0.07],
        "suitability": {
            "retained": retained,
            "num_layers": len(known),
            "share": len(retained) / max(len(known), 1),
            "thresholds": {"low": 2, "high": 6, "spread": 1, "share": 0.5, "q": 0.2},
        },
        "summary": summary,
        "controls": controls(regime, summary),
        "warnings": ["Weights are stored in bfloat16: small differences from the base are rounded."] if warned else [],
        "verdict": {
            "code": regime,
            "text": {
                "shared-subspace": "Sixteen directions hold most of what held-out models need, far beyond chance.",
                "no-shared-structure": "Models that were left out keep no more of their variance than unrelated ones would.",
                "shared-lineage": "Models of one lineage share directions; lineages that were left out keep no more than chance.",
            }[regime],
            "decided_by": REGIMES[regime][2],
            "layers": {code: codes.count(code) for code in dict.fromkeys(codes)},
            "values": {code: varying.count(code) / len(varying) for code in dict.fromkeys(varying)},
        },
    }
    return {
        "title": HOSTILE[0] if hostile else "digits-vit",
        "evidence": evidence,
        "function": function_record(num_models) if function else None,
        "sizes": size_record(layers, num_models) if sizes else None,
        "models": {
            name: {
                "residual": float(draw.beta(2, 20)) if bundle else None,
                "energy": float(draw.uniform(80, 120)),
                "source": f"zoo/{name}",
            }
            for name in names
        },
        "made_by": {
            "command": "eigenzoo report bundle -o report.html",
            "versions": {"eigenzoo": "0.1.0", "torch": "2.13.0", "numpy": "2.4.6"},
            "date": "2026-11-22",
            "seed": seed,
        },
    }
