"""The certificate is that of the file: the dense SVD's tail, and the rounding of its dtype, measured on what was read again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import eigenzoo as ez
from builders import random_factors, read_update, write_adapter

MODULES = {"layers.0.q": (20, 30), "layers.1.q": (16, 24)}
WEIGHTS = (0.7, -0.3, 1.1)


def make(root: Path, dtype: torch.dtype) -> list[Path]:
    return [
        write_adapter(root / f"m{place}", random_factors(MODULES, rank, place, dtype), lora_alpha=3 + place)
        for place, rank in enumerate((2, 4, 7))
    ]


def exact(paths: list[Path]) -> dict[str, Tensor]:
    return {
        name: torch.stack([w * read_update(path, name) for w, path in zip(WEIGHTS, paths, strict=True)]).sum(0)
        for name in MODULES
    }


@pytest.mark.parametrize("rank", [1, 5, 0.9, "full"])
def test_the_loss_of_a_cut_is_the_tail_of_a_dense_svd(tmp_path: Path, rank: int | float | str) -> None:
    paths = make(tmp_path, torch.float64)
    certificate = ez.merge(paths, "task_arithmetic", weights=WEIGHTS, rank=rank).certificate
    lost = total = largest_lost = largest = 0.0
    for name, update in exact(paths).items():
        values, kept = torch.linalg.svdvals(update), certificate.layers[name].rank
        if rank == 0.9:
            shares = values.square().cumsum(0) / values.square().sum()
            assert shares[kept - 1] >= 0.9 > shares[kept - 2]
        tail = float(values[kept:].square().sum())
        assert certificate.layers[name].loss == pytest.approx((tail / float(values.square().sum())) ** 0.5, abs=1e-8)
        lost, total = lost + tail, total + float(values.square().sum())
        largest_lost, largest = max(largest_lost, float(values[kept])), max(largest, float(values[0]))
    assert certificate.loss.frobenius == pytest.approx((lost / total) ** 0.5, abs=1e-8)
    assert certificate.loss.spectral == pytest.approx(largest_lost / largest, abs=1e-8)


@pytest.mark.parametrize("method", ["task_arithmetic", "tsv", "ties"])
@pytest.mark.parametrize("rank", [4, "full"])
def test_it_holds_for_a_bfloat16_file_that_is_read_again(tmp_path: Path, method: str, rank: int | str) -> None:
    paths = make(tmp_path, torch.bfloat16)
    merged = ez.merge(paths, method, weights=WEIGHTS, rank=rank)
    folder = merged.save(tmp_path / "out")
    # The same merge without a cut or rounding is M.
    whole = ez.merge(paths, method, weights=WEIGHTS, dtype="float64")
    lost = total = 0.0
    products = dict.fromkeys((path.name for path in paths), 0.0)
    norms = dict(products)
    differences, matrices = [], []
    for name in MODULES:
        b_OR, a_RI = whole.factors(name)
        matrices.append(b_OR.double() @ a_RI.double())
        found = read_update(folder, name)
        differences.append(matrices[-1] - found)
        share = float(differences[-1].norm() / matrices[-1].norm())
        assert merged.certificate.layers[name].loss == pytest.approx(share, abs=1e-8)
        lost, total = lost + float(differences[-1].square().sum()), total + float(matrices[-1].square().sum())
        for path in paths:
            source = read_update(path, name)
            products[path.name] += float((source * found).sum())
            norms[path.name] += float(source.square().sum())
    loss = merged.certificate.loss
    assert loss.frobenius == pytest.approx((lost / total) ** 0.5, abs=1e-8)
    assert loss.frobenius > 1e-4  # bfloat16 shows
    spectral = [max(float(torch.linalg.matrix_norm(each, 2)) for each in kind) for kind in (differences, matrices)]
    assert loss.spectral == pytest.approx(spectral[0] / spectral[1], abs=1e-8)
    for name, source in merged.certificate.models.items():
        assert source.norm == pytest.approx(norms[name] ** 0.5, rel=1e-8)
        assert source.kept == pytest.approx(products[name] / norms[name], abs=1e-8)


def test_its_json_has_the_documented_names_and_lies_beside_the_model(tmp_path: Path) -> None:
    merged = ez.merge(make(tmp_path, torch.float32), "ties", keep=0.5, weights=WEIGHTS, rank=6)
    document = merged.certificate.to_dict()
    assert {"method", "semantics", "space", "scale", "num_layers", "models", "layers", "loss"} <= document.keys()
    assert {"bytes", "seconds", "peak_memory"} <= document.keys()
    assert (document["method"], document["semantics"], document["space"]) == ("ties", "paper", "core")
    assert (document["num_layers"], document["scale"]) == (2, 1.0)
    assert document["layers"].keys() == MODULES.keys()
    assert all(layer.keys() >= {"rank", "loss"} for layer in document["layers"].values())
    assert all(model.keys() >= {"weight", "norm", "kept"} for model in document["models"].values())
    assert document["loss"].keys() == {"frobenius", "spectral"}
    folder = merged.save(tmp_path / "out")
    beside = json.loads((folder / "merge.json").read_text())
    run = {"seconds", "peak_memory"}
    assert beside == json.loads(json.dumps({name: document[name] for name in document if name not in run}))
    assert document["bytes"] == (folder / "adapter_model.safetensors").stat().st_size
