"""Checkpoints merge into a checkpoint: real networks of transformers, their base, everything beside the weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import eigenzoo as ez
from builders import seeded
from eigenzoo.errors import DataError, MismatchError, OutputError, UsageError
from tolerance import tolerance

CONFIG = LlamaConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
    vocab_size=64,
)
WEIGHTS = (0.7, -0.3, 1.1)
SINGLE = tolerance(64, dtype=torch.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and three fine-tunes of it, two of three shards."""
    root = tmp_path_factory.mktemp("llamas")
    torch.manual_seed(0)
    base = LlamaForCausalLM(CONFIG)
    base.save_pretrained(root / "base")
    for number in range(3):
        tuned = LlamaForCausalLM(CONFIG)
        draw = seeded(number)
        with torch.no_grad():
            for name, values in tuned.state_dict().items():
                values.copy_(base.state_dict()[name] + 0.05 * torch.randn(values.shape, generator=draw))
        tuned.save_pretrained(root / f"m{number}", max_shard_size="20kB" if number < 2 else "1GB")
    return root


def models(folder: Path, num: int = 3) -> list[Path]:
    return [folder / f"m{number}" for number in range(num)]


def weights_of(folder: Path) -> dict[str, Tensor]:
    return {
        name: values.double()
        for file in sorted(folder.glob("*.safetensors"))
        for name, values in load_file(file).items()
    }


def differences(folder: Path) -> dict[str, Tensor]:
    """(T, …) of each tensor."""
    base = weights_of(folder / "base")
    tuned = [weights_of(path) for path in models(folder)]
    return {name: torch.stack([each[name] - base[name] for each in tuned]) for name in base}


def test_a_weighted_sum_is_the_dense_one_and_loads(folder: Path, tmp_path: Path) -> None:
    merged = ez.merge(models(folder), "task_arithmetic", weights=WEIGHTS, scale=0.5, base=folder / "base")
    merged.save(tmp_path / "out")
    base, found = weights_of(folder / "base"), weights_of(tmp_path / "out")
    for name, difference in differences(folder).items():
        wanted = base[name] + 0.5 * torch.tensordot(torch.tensor(WEIGHTS, dtype=torch.float64), difference, 1)
        assert float((found[name] - wanted).norm()) <= SINGLE * float(wanted.norm()), name
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors")) == sorted(
        path.name for path in (folder / "m0").glob("*.safetensors")
    )
    model, info = LlamaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.isfinite(model(torch.arange(8)[None]).logits).all()
    document = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert document["models"].keys() == {"m0", "m1", "m2"}
    assert document["loss"]["frobenius"] < SINGLE
    assert "m1 |" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("method", ["tsv", "iso_c", "iso_cts", "cart", "ctm", "wudi"])
def test_methods_on_singular_values_average_norms(folder: Path, tmp_path: Path, method: str) -> None:
    ez.merge(models(folder), method, base=folder / "base").save(tmp_path / "out")
    base, found = weights_of(folder / "base"), weights_of(tmp_path / "out")
    for name, difference in differences(folder).items():
        assert torch.isfinite(found[name]).all()
        if name.endswith("norm.weight"):
            assert torch.allclose(found[name], base[name] + difference.mean(0), rtol=SINGLE, atol=0)


def test_iso_c_of_a_weight_is_its_formula(folder: Path, tmp_path: Path) -> None:
    ez.merge(models(folder), "iso_c", base=folder / "base").save(tmp_path / "out")
    name = "model.layers.1.self_attn.q_proj.weight"
    u, values, vt = torch.linalg.svd(differences(folder)[name].sum(0), full_matrices=False)
    wanted = weights_of(folder / "base")[name] + u @ vt * values.mean()
    assert float((weights_of(tmp_path / "out")[name] - wanted).norm()) < SINGLE * float(wanted.norm())


def test_ties_trims_over_the_whole_model(folder: Path, tmp_path: Path) -> None:
    """As the authors' code does with all weights in one vector, in this order: any."""
    ez.merge(models(folder), "ties", keep=0.3, base=folder / "base").save(tmp_path / "out")
    tau = differences(folder)
    flat = torch.cat([each.flatten(1) for each in tau.values()], 1)
    count = int(0.3 * flat.shape[1])
    least = flat.abs().sort(descending=True).values[:, count - 1]
    base, found = weights_of(folder / "base"), weights_of(tmp_path / "out")
    for name, each in tau.items():
        bound = least.view(3, *[1] * (each.dim() - 1))
        trimmed = torch.where(each.abs() >= bound, each, 0.0)
        agree = (trimmed.sign() == trimmed.sum(0).sign()) & (trimmed != 0)
        wanted = base[name] + (trimmed * agree).sum(0) / agree.sum(0).clamp_min(1)
        assert float((found[name] - wanted).norm()) <= SINGLE * float(wanted.norm()), name


def test_without_a_base_whole_weights_are_averaged(folder: Path, tmp_path: Path) -> None:
    ez.merge(models(folder), "linear", weights=WEIGHTS).save(tmp_path / "out")
    tuned = [weights_of(path) for path in models(folder)]
    found = weights_of(tmp_path / "out")
    for name in found:
        wanted = sum(w * each[name] for w, each in zip(WEIGHTS, tuned, strict=True)) / sum(WEIGHTS)
        assert float((found[name] - wanted).norm()) <= SINGLE * float(wanted.norm())
    with pytest.raises(UsageError, match="method ties without a base"):
        ez.merge(models(folder), "ties")


def test_half_precision_is_certified(folder: Path, tmp_path: Path) -> None:
    merged = ez.merge(models(folder), "task_arithmetic", base=folder / "base", dtype="bfloat16")
    merged.save(tmp_path / "out")
    written = [load_file(file) for file in (tmp_path / "out").glob("*.safetensors")]
    assert {values.dtype for tensors in written for values in tensors.values()} == {torch.bfloat16}
    base, found, tau = weights_of(folder / "base"), weights_of(tmp_path / "out"), differences(folder)
    lost = {name: float((found[name] - base[name] - tau[name].sum(0)).square().sum()) for name in tau}
    energy = {name: float(tau[name].sum(0).square().sum()) for name in tau}
    stated = merged.certificate
    assert stated.loss.frobenius == pytest.approx((sum(lost.values()) / sum(energy.values())) ** 0.5, rel=1e-8)
    for name, layer in stated.layers.items():
        assert layer.loss == pytest.approx((lost[name] / energy[name]) ** 0.5, rel=1e-8)
    name = max(energy, key=lambda each: energy[each])
    assert ez.merge(models(folder), base=folder / "base").certificate.models["m0"].kept == pytest.approx(
        float(sum((tau[n][0] * tau[n].mean(0)).sum() for n in tau) / sum(tau[n][0].square().sum() for n in tau)),
        rel=1e-6,
    )


def test_integers_come_from_the_base_and_other_tensors_are_chosen(tmp_path: Path) -> None:
    def write(name: str, seed: int, steps: int, head: int) -> Path:
        path = tmp_path / name
        path.mkdir()
        tensors = {
            "body.weight": torch.randn(6, 5, generator=seeded(seed)),
            "num_batches_tracked": torch.tensor(steps),
            "head.weight": torch.randn(head, 6, generator=seeded(seed)),
        }
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
        return path

    base = write("base", 0, 7, 2)
    tuned = [write("a", 1, 8, 3), write("b", 2, 9, 4)]
    with pytest.raises(MismatchError, match=r"tensor 'head\.weight': b and a differ in it"):
        ez.merge(tuned, base=base).save(tmp_path / "refused")
    ez.merge(tuned, base=base, heads="b").save(tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert int(found["num_batches_tracked"]) == 7
    assert torch.equal(found["head.weight"], load_file(tuned[1] / "model.safetensors")["head.weight"])


def test_what_is_wrong_is_said_before_anything_is_written(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="rank 4 for full weights"):
        ez.merge(models(folder), rank=4, base=folder / "base")
    with pytest.raises(UsageError, match="space 'columns' for full weights"):
        ez.merge(models(folder), "ties", space="columns", base=folder / "base")
    with pytest.raises(UsageError, match="scale nan"):
        ez.merge(models(folder), scale=float("nan"), base=folder / "base")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        ez.merge(models(folder), base=folder / "base").save(tmp_path / "taken")
    broken = tmp_path / "broken"
    broken.mkdir()
    tensors = load_file(folder / "m2" / "model.safetensors")
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match=r"layer 'model.norm.weight' of broken: 1 values are NaN or Inf"):
        ez.merge([folder / "m2", broken], base=folder / "base").save(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "taken" / "mine.txt").read_text() == "mine"
