"""How much updates get in each other's way, and the moments of inputs that RegMean asks for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from merging_cases import INPUTS, OUTPUTS, dense, random_updates
from safetensors.torch import save_file
from torch import nn

import eigenzoo as ez
from builders import random_factors, seeded, write_adapter
from eigenzoo.errors import FormatError, UsageError
from eigenzoo.linalg.lora import Factors
from eigenzoo.merge.input_grams import collect, read_grams
from eigenzoo.merge.interference import measure, random_like
from tolerance import tolerance

EXACT = tolerance(OUTPUTS + INPUTS)
MODULES = {"a.q_proj": (12, 10), "b.q_proj": (14, 10)}

Call = Callable[..., tuple[int, str, str]]


def total(updates: list[Factors]) -> Factors:
    return torch.cat([b for b, _ in updates], 1), torch.cat([a for _, a in updates], 0)


def orthogonal_updates() -> list[Factors]:
    left, _ = torch.linalg.qr(torch.randn(OUTPUTS, 4, generator=seeded(0), dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(INPUTS, 4, generator=seeded(1), dtype=torch.float64))
    sizes = torch.tensor([3.0, 2.0], dtype=torch.float64)
    return [(left[:, :2] * sizes, right[:, :2].T), (left[:, 2:] * sizes, right[:, 2:].T)]


def test_orthogonal_updates_do_not_interfere() -> None:
    found = measure(orthogonal_updates(), total)
    assert torch.allclose(found.outputs_TT, torch.eye(2).double(), atol=EXACT)
    assert torch.allclose(found.inputs_TT, torch.eye(2).double(), atol=EXACT)
    assert found.interference < EXACT
    assert torch.allclose(found.alignment_T, torch.ones(2).double(), atol=EXACT)


def test_twins_interfere_wholly() -> None:
    (update,) = random_updates((3,))
    found = measure([update, update], total)
    assert torch.allclose(found.outputs_TT, torch.ones(2, 2).double(), atol=EXACT)
    # (UᵀU − 1) Σ (VᵀV − 1) of [U U] and [V V] is Σ twice, over the sum of all values.
    assert found.interference == pytest.approx(1.0, abs=EXACT)


def test_figures_are_their_formulas() -> None:
    updates = random_updates((2, 4, 3))
    found = measure(updates, total)
    parts = [torch.linalg.svd(matrix, full_matrices=False) for matrix in dense(updates)]
    ranks = [a.shape[0] for _, a in updates]
    lefts = [u[:, :rank] for (u, _, _), rank in zip(parts, ranks, strict=True)]
    rights = [vt[:rank].T for (_, _, vt), rank in zip(parts, ranks, strict=True)]
    cosines = torch.linalg.svdvals(lefts[0].T @ lefts[1])
    assert float(found.outputs_TT[0, 1]) == pytest.approx(float(cosines.square().mean()), rel=1e-9)
    u, v = torch.cat(lefts, 1), torch.cat(rights, 1)
    values = torch.cat([each[:rank] for (_, each, _), rank in zip(parts, ranks, strict=True)])
    crossed = (u.T @ u - torch.eye(9).double()) @ torch.diag(values) @ (v.T @ v - torch.eye(9).double())
    assert found.interference == pytest.approx(float(torch.linalg.svdvals(crossed).sum() / values.sum()), rel=1e-9)
    merged = torch.linalg.svd(dense(updates).sum(0), full_matrices=False)
    tails = merged[1].square().flip(0).cumsum(0).flip(0).sqrt()
    leading = merged[0][:, : int((tails > 0.05 * tails[0]).sum())]
    for place, matrix in enumerate(dense(updates)):
        wanted = float((leading.T @ matrix).norm() / matrix.norm())
        assert float(found.alignment_T[place]) == pytest.approx(wanted, rel=1e-9)


def test_the_null_has_the_same_singular_values_and_no_relation() -> None:
    left, right = random_updates((3, 3), shape=(200, 300))
    shared = [left, (left[0] + 0.1 * right[0], left[1] + 0.1 * right[1])]
    drawn = random_like(shared, seeded(0))
    for own, other in zip(dense(shared), dense(drawn), strict=True):
        assert torch.allclose(torch.linalg.svdvals(own)[:3], torch.linalg.svdvals(other)[:3], rtol=1e-10)
    assert float(measure(shared, total).outputs_TT[0, 1]) > 0.9
    # Of random subspaces of 3 in 200 dimensions the mean squared cosine is 3/200.
    assert float(measure(drawn, total).outputs_TT[0, 1]) < 0.1


def test_check_prints_interference_beside_the_null(tmp_path: Path, call: Call) -> None:
    paths = [write_adapter(tmp_path / f"m{n}", random_factors(MODULES, 2, seed=n)) for n in range(3)]
    code, text, err = call("merge", *paths, "--check", "--method", "tsv")
    assert code == 0, err
    assert "overlap of two updates" in text
    assert "nothing was written: --check" in text
    code, text, _ = call("merge", *paths, "--check", "--json")
    document = json.loads(text)["interference"]
    assert document["models"] == ["m0", "m1", "m2"]
    assert len(document["outputs"]) == len(document["null_outputs"]) == 3
    assert document["interference"] >= 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m0", "m1", "m2"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.ModuleDict({"q_proj": nn.Linear(10, 12)}), nn.ModuleDict({"q_proj": nn.Linear(10, 14)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a["q_proj"](x).sum() + self.b["q_proj"](x * 2).sum()


def test_moments_are_those_of_the_inputs_and_regmean_takes_them(tmp_path: Path, call: Call) -> None:
    batches = [torch.randn(5, 10, generator=seeded(n)) for n in range(3)]
    grams = collect(Net(), list(MODULES), batches)
    rows = torch.cat(batches).double()
    assert torch.allclose(grams["a.q_proj"], rows.T @ rows, atol=1e-5)
    assert torch.allclose(grams["b.q_proj"], 4 * rows.T @ rows, atol=1e-5)
    wrapped = nn.ModuleDict({"model": Net()})
    again = collect(wrapped, list(MODULES), batches, call=lambda module, batch: module["model"](batch))  # type: ignore[index]
    assert torch.equal(again["a.q_proj"], grams["a.q_proj"])
    paths = [write_adapter(tmp_path / "zoo" / f"m{n}", random_factors(MODULES, 2, seed=n)) for n in range(2)]
    (tmp_path / "grams").mkdir()
    for path in paths:
        save_file({name: each.float() for name, each in grams.items()}, tmp_path / "grams" / f"{path.name}.safetensors")
    merged = ez.merge(paths, "regmean", grams={path.name: grams for path in paths})
    mean = ez.merge(paths, "mean")
    # With the same inputs for all models the best layer is the mean.
    for module in MODULES:
        one, other = (b.double() @ a.double() for b, a in (merged.factors(module), mean.factors(module)))
        assert float((one - other).norm()) <= 1e-4 * float(other.norm())
    code, _, err = call(
        "merge", *paths, "-o", tmp_path / "out", "--method", "regmean", "--grams", tmp_path / "grams", "--quiet"
    )
    assert code == 0, err


def test_missing_moments_are_named(tmp_path: Path) -> None:
    paths = [write_adapter(tmp_path / f"m{n}", random_factors(MODULES, 2, seed=n)) for n in range(2)]
    with pytest.raises(UsageError, match="method regmean: no moments of inputs are given"):
        ez.merge(paths, "regmean")
    with pytest.raises(UsageError, match="the moments of inputs are those of none of the layers"):
        ez.merge(paths, "regmean", grams={"m0": {"other": torch.eye(10)}})
    with pytest.raises(UsageError, match=r"layer 'a\.q_proj': m1 has no moment of its inputs"):
        ez.merge(paths, "regmean", grams={"m0": {name: torch.eye(10) for name in MODULES}})
    with pytest.raises(UsageError, match="0 prefixes fit"):
        collect(nn.Linear(3, 3), ["a.q_proj"], [])
    with pytest.raises(UsageError, match=r"no batch reaches this layer"):
        collect(Net(), list(MODULES), [])
    save_file({"a.q_proj": torch.eye(3)}, tmp_path / "m0.safetensors")
    with pytest.raises(FormatError, match=r"has shape \(3, 3\)"):
        read_grams(tmp_path, ["m0"], {"a.q_proj": (12, 10)})
    save_file({"a.q_proj": torch.full((10, 10), torch.nan)}, tmp_path / "m1.safetensors")
    with pytest.raises(FormatError, match="holds NaN or Inf"):
        read_grams(tmp_path, ["m1"], {"a.q_proj": (12, 10)})


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_a_picture_shows_overlaps_and_is_never_written_over(tmp_path: Path, call: Call, kind: str) -> None:
    paths = [write_adapter(tmp_path / f"m{n}", random_factors(MODULES, 2, seed=n)) for n in range(3)]
    file = tmp_path / f"overlaps.{kind}"
    code, text, err = call("merge", *paths, "--check", "--picture", file, "--quiet")
    assert code == 0, err
    assert f"picture: {file}" in text
    data = file.read_bytes()
    assert data.startswith(b"\x89PNG" if kind == "png" else b"<?xml")
    if kind == "svg":
        assert data.count(b">m1<") == 8  # a name beside every row and column
        assert b"Overlap of two models' updates" in data
        assert b"mean squared cosine of principal angles" in data
    code, _, err = call("merge", *paths, "--check", "--picture", file)
    assert code == 2
    assert "exists already" in err
    assert file.read_bytes() == data
    code, _, err = call("merge", *paths, "--check", "--picture", tmp_path / "overlaps.txt")
    assert code == 2
    assert "into a .png or .svg file" in err
