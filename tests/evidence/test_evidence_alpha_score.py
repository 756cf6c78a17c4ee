"""The authors' alpha score: exponents against `powerlaw`, q by hand, and where it is not measured."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from evidence_zoos import layers, noise
from test_evidence_suitability import fit
from torch import Tensor

import eigenzoo as ez
from builders import random_factors, write_adapter, write_model, write_stacks
from eigenzoo.evidence.alpha_score import AlphaScore, OwnSpectra, alpha_score, families
from eigenzoo.evidence.source import open_source
from eigenzoo.evidence.suitability import MIN_TAIL
from eigenzoo.records import no_progress
from eigenzoo.zoo.stack import EXACT_VALUES
from tolerance import tolerance


def heavy(num_models: int, shape: tuple[int, int], exponent: float, seed: int = 0) -> Tensor:
    """Matrices whose eigenvalues are drawn from a power law."""
    draw, found = np.random.default_rng(seed), []
    for _ in range(num_models):
        left, _ = np.linalg.qr(draw.standard_normal((shape[0], min(shape))))
        right, _ = np.linalg.qr(draw.standard_normal((shape[1], min(shape))))
        values = draw.pareto(exponent - 1, min(shape)) + 1
        found.append((left * np.sqrt(values)) @ right.T)
    return torch.from_numpy(np.stack(found))


def expected(matrix: Tensor) -> float | None:
    """α by numpy's SVD and `powerlaw`; None where its tail is shorter than ours may be."""
    values = np.sort(np.linalg.svd(matrix.double().numpy(), compute_uv=False) ** 2)
    values = values[values > values[-1] * 1e-20]
    alpha, start = fit(values)
    return alpha if (values >= start * (1 - 1e-12)).sum() >= MIN_TAIL else None


def test_q_by_hand() -> None:
    """Three models: φ = 1, e^(−1/2), 0; σ² = 14/9 − … of 2, 3, 7 is 14/3; N = 3."""
    score = AlphaScore((2.0, 3.0, None, 7.0))
    assert (score.mean, score.share) == (4.0, 2 / 3)
    assert score.spread == pytest.approx(math.sqrt(14 / 3), rel=1e-12)
    by_hand = (1 - math.exp(-3 / 20)) * (1 + math.exp(-0.5) + 0) / 3 * math.exp(-math.sqrt(14 / 3))
    assert score.q == pytest.approx(by_hand, rel=1e-12)
    assert not score.is_retained
    alike = AlphaScore((2.5,) * 40)
    assert alike.q == pytest.approx((1 - math.exp(-2)) * math.exp(-0.25), rel=1e-12)
    assert alike.is_retained


@pytest.mark.parametrize(
    ("exponents", "retained"),
    [
        ((2.0,) * 40, True),
        ((6.0,) * 40, False),  # q = 0.865 · e^(−2) = 0.117
        ((5.0,) * 40, False),  # 0.193
        ((4.9,) * 40, True),  # 0.203
        ((1.99,) * 40, False),
        ((2.0, 4.0) * 20, True),  # σ = 1, q = 0.865 · 0.684 · e^(−1) = 0.2176
        ((2.0, 4.01) * 20, False),
        ((1.9, 2.3) * 20, True),  # half in range: q = 0.865 · 0.43 · e^(−0.2) = 0.305
        ((1.9, 1.9, 2.3) * 14, False),
        ((2.0,) * 4, False),  # q = 1 − e^(−0.2) = 0.18
        ((2.0,) * 5, True),
        ((None,) * 4, False),
    ],
)
def test_the_rule_is_theirs(exponents: tuple[float | None, ...], retained: bool) -> None:
    assert AlphaScore(exponents).is_retained is retained


def test_a_family_has_the_geometric_mean_of_its_layers() -> None:
    scores = {f"h.{place}.q_proj.weight": AlphaScore((alpha,) * 20) for place, alpha in enumerate((2.0, 3.0, 4.0))}
    found = families({**scores, "h.0.k_proj.weight": AlphaScore((2.0,) * 20), "h.1.k_proj.weight": AlphaScore((7.0,))})
    values = [score.q for score in scores.values()]
    assert found == pytest.approx(
        {"h.*.q_proj.weight": float(np.prod(values)) ** (1 / 3), "h.*.k_proj.weight": 0.0}, rel=1e-12
    )


@pytest.mark.parametrize("exponent", [2.2, 3.0, 5.0])
def test_exponents_of_known_spectra_are_those_of_the_package(exponent: float) -> None:
    stack = heavy(6, (60, 90), exponent)
    found = alpha_score(OwnSpectra(torch.linalg.svdvals(stack), 1e-24)).exponents
    close = tolerance(60, scale=100)
    assert found == pytest.approx([expected(matrix) for matrix in stack], rel=close)


def test_spectra_too_short_to_fit_have_no_score(tmp_path: Path) -> None:
    stacks = {"wide.weight": noise(12, (3, 30)), "bias": noise(12, (12,), seed=5)}
    document = ez.evidence(write_stacks(tmp_path, stacks), suitability=True).to_dict()
    for name in stacks:
        score = document["layers"][name]["suitability"]["alpha_score"]
        assert (score["exponents"], score["num_models"], score["mean"], score["q"]) == ([None] * 12, 0, None, 0.0)
    assert document["suitability"]["alpha_score"] is None
    assert "needs longer spectra" in sentence(document)


def sentence(document: dict) -> str:
    return next(control["sentence"] for control in document["controls"] if control["name"] == "suitability")


@pytest.mark.parametrize("view", ["weight", "delta"])
def test_full_weights_are_measured_where_it_is_asked_for(tmp_path: Path, view: str) -> None:
    stacks = {f"h.{place}.q_proj.weight": heavy(8, (30, 40), 2.5, seed=place) for place in range(2)}
    paths = write_stacks(tmp_path / "zoo", stacks, torch.float64)
    base, options = torch.zeros(()), {}
    if view == "delta":
        base = heavy(1, (30, 40), 3.0, seed=9)[0]
        options = {
            "view": "delta",
            "base": write_stacks(tmp_path / "base", {name: base[None].clone() for name in stacks}, torch.float64)[0],
        }
    document = ez.evidence(paths, suitability=True, **options).to_dict()
    scores = {}
    for name, stack in stacks.items():
        found = document["layers"][name]["suitability"]["alpha_score"]
        by_package = [expected(matrix - base) for matrix in stack]
        assert found["exponents"] == pytest.approx(by_package, rel=1e-6)
        scores[name] = AlphaScore(tuple(by_package))
        assert found["q"] == pytest.approx(scores[name].q, rel=1e-6)
        assert found["mean"] == pytest.approx(np.mean(by_package), rel=1e-6)
        assert found["spread"] == pytest.approx(np.std(by_package), rel=1e-5)
    whole = document["suitability"]["alpha_score"]
    assert whole["num_layers"] == 2
    assert whole["families"]["h.*.q_proj.weight"] == pytest.approx(
        math.sqrt(math.prod(s.q for s in scores.values())), rel=1e-6
    )
    assert f"retains {len(whole['retained'])} of 2 layers" in sentence(document)
    # Kept moments have no spectra of models: they are taken anew, and are the same.
    again = ez.evidence(paths, suitability=True, **options).to_dict()
    assert again["suitability"] == document["suitability"]


def test_what_was_not_measured_is_said_and_not_invented(tmp_path: Path) -> None:
    paths = write_stacks(tmp_path / "zoo", layers(lambda seed: noise(12, (9, 8), seed)))
    bundle = ez.fit(paths, 2).save(tmp_path / "bundle")
    for source in (paths, bundle):
        document = ez.evidence(source).to_dict()
        assert document["suitability"]["alpha_score"] is None
        assert all(layer["suitability"]["alpha_score"] is None for layer in document["layers"].values())
        assert "was not measured" in sentence(document)
    with pytest.raises(ez.UsageError, match=r"own spectra, which this bundle does not have"):
        ez.evidence(bundle, suitability=True)


def test_updates_are_measured_from_their_factors_and_in_a_bundle_too(tmp_path: Path) -> None:
    """A rank of 24 leaves enough to fit; numpy's SVD of the dense update, and `powerlaw`."""
    factors = [random_factors({"h.0.q_proj": (40, 50)}, 24, place) for place in range(10)]
    paths = [write_adapter(tmp_path / f"m{place}", each) for place, each in enumerate(factors)]
    found = ez.evidence(paths).to_dict()["layers"]["h.0.q_proj"]["suitability"]["alpha_score"]
    dense = [each["h.0.q_proj"][0].double() @ each["h.0.q_proj"][1].double() for each in factors]
    # Roots of eigenvalues of products, of float32 files: half of the digits for the least of them.
    assert found["exponents"] == pytest.approx([expected(matrix) for matrix in dense], rel=1e-5)
    bundle = ez.fit(paths, 2).save(tmp_path / "bundle")
    again = ez.evidence(bundle, suitability=True).to_dict()["layers"]["h.0.q_proj"]["suitability"]["alpha_score"]
    assert again["exponents"] == pytest.approx(found["exponents"], rel=1e-9)


def test_the_command_and_the_table_say_both(tmp_path: Path, call: Callable[..., tuple[int, str, str]]) -> None:
    import json

    from eigenzoo.report.document import read_document
    from eigenzoo.report.tables import suitability_table

    write_stacks(tmp_path / "zoo", {"h.0.q_proj.weight": heavy(25, (30, 40), 2.5)}, torch.float64)
    code, out, err = call("evidence", tmp_path / "zoo", "--suitability", "--json")
    assert code == 0, err
    document = json.loads(out)
    score = document["layers"]["h.0.q_proj.weight"]["suitability"]["alpha_score"]
    table = suitability_table(read_document({"evidence": document}))
    assert table is not None
    row = dict(zip(table.columns, table.rows[0], strict=True))
    assert row["by the alpha score"] == ("retained" if score["retained"] else "left out")
    assert row["alpha score q"] != "–"
    code, out, _ = call("evidence", tmp_path / "zoo")
    assert "alpha score of every model's own spectrum was not measured" in " ".join(out.split())
    code, out, _ = call("evidence", tmp_path / "zoo", "--json")
    table = suitability_table(read_document({"evidence": json.loads(out)}))
    assert table is not None
    assert "not measured" in table.rows[0]


def test_spectra_of_large_updates_from_a_base_are_those_of_float64(tmp_path: Path) -> None:
    """The layer is too large to be read in float64 by default, and differences of float32 weights are rounded in float32."""
    shape, num_models = (4096, 33), 8
    base = torch.from_numpy(np.random.default_rng(0).standard_normal(shape)).float()
    stack = torch.from_numpy(np.random.default_rng(1).standard_normal((num_models, *shape))).float()
    assert stack.numel() > EXACT_VALUES
    paths = write_stacks(tmp_path, {"h.0.q_proj.weight": stack})
    zoo = ez.open_zoo(paths, base=write_model(tmp_path / "base", {"h.0.q_proj.weight": base}))
    found = open_source(zoo, (), "models", 0, no_progress, suitability=True, cache=False).spectra("h.0.q_proj.weight")
    assert found is not None
    dense = torch.linalg.svdvals(stack.double() - base.double())
    assert float((found.singular_NR - dense).abs().max()) <= tolerance(shape[1], scale=float(dense.max()))
