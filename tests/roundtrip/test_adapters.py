"""Adapters that peft saved go through a subspace of full rank and come back as adapters that peft loads: same logits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import eigenzoo as ez
from builders import read_update, write_adapter
from real_models import ADAPTERS, TOLERANCE, add_adapter, load_adapter, logits, make, save_adapter

AXES = [("models",), ("outputs", "inputs"), ("outputs",), ("models", "outputs", "inputs")]


def assert_same_answers(kind: str, folder: Path, expected: torch.Tensor, base: torch.Tensor) -> None:
    """The adapter in `folder` answers as expected, and the base alone is far from that: else nothing was tested."""
    assert (expected - base).abs().max() > 1000 * TOLERANCE
    torch.testing.assert_close(logits(load_adapter(kind, folder), kind), expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("axes", AXES, ids="+".join)
def test_rebuilt_adapters_answer_as_the_originals(
    tmp_path: Path, adapter_zoo: Callable, kind: str, axes: tuple[str, ...]
) -> None:
    zoo = adapter_zoo(kind)
    space = ez.fit(ez.open_zoo(zoo.folder), rank=1.0, axes=axes)
    assert space.view == "update"
    assert set(space.names) == set(zoo.logits)
    for name, expected in zoo.logits.items():
        assert_same_answers(kind, space.rebuild(name).save(tmp_path / name), expected, zoo.base_logits)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_factors_of_adapters_of_one_rank_answer_as_the_originals(tmp_path: Path, kind: str) -> None:
    settings = [{**ADAPTERS[kind][0], "r": 4, "lora_alpha": alpha, "use_rslora": alpha == 6} for alpha in (8, 6, 3)]
    answers = {}
    for number, chosen in enumerate(settings):
        peft = add_adapter(make(kind), number, **chosen)
        answers[f"a{number}"] = logits(peft, kind)
        save_adapter(peft, tmp_path / "zoo" / f"a{number}")
    space = ez.fit(tmp_path / "zoo", rank=1.0, view="factors")
    assert all(name.endswith((".lora_A", ".lora_B")) for name in space.layers)
    for name, expected in answers.items():
        assert_same_answers(kind, space.rebuild(name).save(tmp_path / name), expected, logits(make(kind), kind))


def test_the_factors_of_mixed_ranks_are_refused(adapter_zoo: Callable) -> None:
    with pytest.raises(
        ez.MismatchError, match=r"layer '.*lora_[AB]': shape .* in a\d but .* view 'update' accepts mixed ranks"
    ):
        ez.fit(adapter_zoo("llama").folder, rank=1.0, view="factors")


@pytest.mark.parametrize("kind", ADAPTERS)
def test_peft_multiplies_out_the_same_updates(tmp_path: Path, adapter_zoo: Callable, kind: str) -> None:
    """Module by module by peft's own arithmetic: a fault that the logits average away shows here."""
    zoo = adapter_zoo(kind)
    space = ez.fit(zoo.folder, rank=1.0)
    for name in space.names:
        original, rebuilt = (
            load_adapter(kind, zoo.path(name)),
            load_adapter(kind, space.rebuild(name).save(tmp_path / name)),
        )
        deltas = {
            module: layer.get_delta_weight("default") for module, layer in original.named_modules() if is_lora(layer)
        }
        assert len(deltas) == len(space.layers)
        for module, delta in deltas.items():
            found = rebuilt.get_submodule(module).get_delta_weight("default")
            assert (found - delta).norm() <= 1e-6 * delta.norm(), module


def is_lora(module: nn.Module) -> bool:
    return hasattr(module, "get_delta_weight")


def test_alpha_32_at_rank_16_survives(tmp_path: Path, adapter_zoo: Callable) -> None:
    """The scale 2 is in the factors of the rebuilt adapter, whose own scale is 1."""
    zoo = adapter_zoo("llama")
    config = json.loads((zoo.path("a0") / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (16, 32)
    before = load_file(zoo.path("a0") / "adapter_model.safetensors")
    space = ez.fit(zoo.folder, rank=1.0)
    rebuilt = space.rebuild("a0").save(tmp_path / "out")
    after = load_file(rebuilt / "adapter_model.safetensors")
    assert set(after) == set(before)
    for module in space.layers:
        b, a = (f"base_model.model.{module}.lora_{side}.weight" for side in "BA")
        update = before[b].double() @ before[a].double()
        assert (after[b].double() @ after[a].double() - 2 * update).norm() <= 1e-6 * update.norm()
        assert (space.rebuild("a0").layer(module) - 2 * update).norm() <= 1e-6 * update.norm()


@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_saved_config_says_what_is_in_the_file(tmp_path: Path, adapter_zoo: Callable, kind: str) -> None:
    zoo = adapter_zoo(kind)
    space = ez.fit(zoo.folder, rank=1.0)
    for name in space.names:
        before = json.loads((zoo.path(name) / "adapter_config.json").read_text())
        folder = space.rebuild(name).save(tmp_path / name)
        after = json.loads((folder / "adapter_config.json").read_text())
        rank = max([before["r"], *before["rank_pattern"].values()])
        changed = {
            "r": after["r"],
            "lora_alpha": after["r"],
            "rank_pattern": {},
            "alpha_pattern": {},
            "use_rslora": False,
            "init_lora_weights": True,
        }
        assert after == {**before, **changed}
        # No more than the original needs: round-off must not be kept as directions.
        assert after["r"] <= rank
        tensors = load_file(folder / "adapter_model.safetensors")
        ranks = {tensor.shape[0 if ".lora_A." in key else 1] for key, tensor in tensors.items()}
        assert ranks == {after["r"]}


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("axes", AXES[:2], ids="+".join)
def test_a_loaded_bundle_rebuilds_the_same_files(
    tmp_path: Path, adapter_zoo: Callable, kind: str, axes: tuple[str, ...]
) -> None:
    space = ez.fit(adapter_zoo(kind).folder, rank=1.0, axes=axes)
    loaded = ez.load(space.save(tmp_path / "bundle"))
    assert list(loaded.verify()) == []
    for name in space.names:
        first, second = (
            space.rebuild(name).save(tmp_path / name),
            loaded.rebuild(name).save(tmp_path / f"{name}-loaded"),
        )
        assert files_of(first) == files_of(second)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_bundle_rebuilds_without_its_zoo(tmp_path: Path) -> None:
    """Copied elsewhere, the originals gone: everything that an adapter needs is in the bundle."""
    answers = {}
    for number, settings in enumerate(ADAPTERS["gpt2"]):
        peft = add_adapter(make("gpt2"), number, **settings)
        answers[f"a{number}"] = logits(peft, "gpt2")
        save_adapter(peft, tmp_path / "zoo" / f"a{number}")
    ez.fit(tmp_path / "zoo", rank=1.0).save(tmp_path / "here" / "bundle")
    (tmp_path / "zoo").rename(tmp_path / "gone")
    (tmp_path / "here").rename(tmp_path / "there")
    space = ez.load(tmp_path / "there" / "bundle")
    for name, expected in answers.items():
        assert_same_answers("gpt2", space.rebuild(name).save(tmp_path / name), expected, logits(make("gpt2"), "gpt2"))


@pytest.mark.parametrize("axes", AXES, ids="+".join)
def test_an_unseen_adapter_inside_the_span_comes_back(
    tmp_path: Path, adapter_zoo: Callable, axes: tuple[str, ...]
) -> None:
    """A copy under another name, of other factors and another alpha: the same function, so the same rebuilt adapter."""
    zoo = adapter_zoo("llama")
    config = json.loads((zoo.path("a1") / "adapter_config.json").read_text())
    tensors = load_file(zoo.path("a1") / "adapter_model.safetensors")
    factors = {
        key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): (
            tensors[key.replace("lora_A", "lora_B")] / 4,
            tensors[key],
        )
        for key in tensors
        if "lora_A" in key
    }
    write_adapter(tmp_path / "unseen", factors, **{**config, "lora_alpha": 4 * config["lora_alpha"]})
    coefficients = ez.fit(zoo.folder, rank=1.0, axes=axes).project(tmp_path / "unseen")
    assert coefficients.name == "unseen"
    assert coefficients.residual < 1e-10
    assert max(coefficients.residuals.values()) < 1e-10


@pytest.mark.parametrize("axes", AXES, ids="+".join)
def test_an_unseen_adapter_between_two_others_comes_back(
    tmp_path: Path, adapter_zoo: Callable, axes: tuple[str, ...]
) -> None:
    """The mean of two updates has the ranks of both together, and lies in the span of any full-rank fit."""
    zoo = adapter_zoo("vit")
    space = ez.fit(zoo.folder, rank=1.0, axes=axes)
    first, second = load_adapter("vit", zoo.path("a0")), load_adapter("vit", zoo.path("a2"))
    first.load_adapter(zoo.path("a2"), adapter_name="second")
    first.add_weighted_adapter(["default", "second"], [0.5, 0.5], "between", combination_type="cat")
    first.set_adapter("between")
    expected = logits(first, "vit")
    first.save_pretrained(tmp_path, selected_adapters=["between"], save_embedding_layers=False)
    coefficients = space.project(tmp_path / "between")
    assert coefficients.residual < 1e-10
    assert (expected - logits(second, "vit")).abs().max() > 1000 * TOLERANCE
    assert_same_answers("vit", space.rebuild(coefficients).save(tmp_path / "out"), expected, zoo.base_logits)


def test_an_adapter_outside_the_span_has_a_residual(tmp_path: Path, adapter_zoo: Callable) -> None:
    """The counterpart without which a residual of zero says nothing: unrelated draws share no direction."""
    save_adapter(add_adapter(make("llama"), 99, **ADAPTERS["llama"][0]), tmp_path / "foreign")
    assert ez.fit(adapter_zoo("llama").folder, rank=1.0).project(tmp_path / "foreign").residual > 0.5


CARRIED = {
    "modules_to_save": ("vit", {"target_modules": ["q_proj"], "modules_to_save": ["classifier"]}, ".classifier."),
    "bias": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "lora_only"}, ".bias"),
}


@pytest.mark.parametrize("case", CARRIED)
@pytest.mark.parametrize("view", ["update", "factors"])
def test_what_is_trained_beside_the_factors_is_carried(tmp_path: Path, case: str, view: str) -> None:
    kind, settings, mark = CARRIED[case]
    answers = {}
    for number in range(3):
        peft = add_adapter(make(kind), number, r=4, lora_alpha=8, **settings)
        answers[f"a{number}"] = logits(peft, kind)
        save_adapter(peft, tmp_path / "zoo" / f"a{number}")
    space = ez.load(ez.fit(tmp_path / "zoo", rank=1.0, view=view).save(tmp_path / "bundle"))
    for name, expected in answers.items():
        folder = space.rebuild(name).save(tmp_path / name)
        before, after = (load_file(path / "adapter_model.safetensors") for path in (tmp_path / "zoo" / name, folder))
        carried = [key for key in before if "lora_" not in key]
        assert len(carried) >= 2
        assert all(mark in key for key in carried)
        assert set(after) == set(before)
        assert all(torch.equal(after[key], before[key]) for key in carried)
        assert_same_answers(kind, folder, expected, logits(make(kind), kind))


def test_excluded_modules_are_carried_unchanged(tmp_path: Path, adapter_zoo: Callable) -> None:
    """Under a truncated fit: what is excluded keeps its update to the last bit, what is not does not."""
    zoo = adapter_zoo("llama")
    space = ez.load(ez.fit(ez.open_zoo(zoo.folder, exclude=["*v_proj"]), rank=1).save(tmp_path / "bundle"))
    folder = space.rebuild("a0").save(tmp_path / "out")
    before, after = (load_file(path / "adapter_model.safetensors") for path in (zoo.path("a0"), folder))
    compared = 0
    for key in before:
        if "v_proj.lora_A" in key:
            rank, b = len(before[key]), key.replace("lora_A", "lora_B")
            assert torch.equal(after[key][:rank], before[key])
            # Times 2, the scale of alpha 32 at rank 16, which is exact.
            assert torch.equal(after[b][:, :rank], 2 * before[b])
            compared += 1
        elif "q_proj.lora_A" in key:
            module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            b = key.replace("lora_A", "lora_B")
            assert (read_update(folder, module) - 2 * before[b].double() @ before[key].double()).norm() > 0.01
    assert compared == 2


EXTRA: dict[str, tuple[str, dict]] = {
    "embedding": ("llama", {"target_modules": ["embed_tokens", "k_proj"]}),
    "convolution": ("resnet", {"target_modules": ["convolution"]}),
}


@pytest.mark.parametrize("case", EXTRA)
def test_embeddings_and_convolutions_answer_as_the_originals(tmp_path: Path, case: str) -> None:
    kind, settings = EXTRA[case]
    answers = {}
    for number, rank in enumerate((2, 3, 5)):
        peft = add_adapter(make(kind), number, r=rank, lora_alpha=2 * rank, **settings)
        answers[f"a{number}"] = logits(peft, kind)
        save_adapter(peft, tmp_path / "zoo" / f"a{number}")
    space = ez.fit(tmp_path / "zoo", rank=1.0)
    for name, expected in answers.items():
        assert_same_answers(kind, space.rebuild(name).save(tmp_path / name), expected, logits(make(kind), kind))
    copy = shutil.copytree(tmp_path / "zoo" / "a1", tmp_path / "copy")
    coefficients = space.project(copy)
    assert coefficients.residual < 1e-10
    folder = space.rebuild(coefficients).save(tmp_path / "projected")
    assert_same_answers(kind, folder, answers["a1"], logits(make(kind), kind))
    peft = add_adapter(make(kind), 9, r=2, lora_alpha=4, **settings)
    assert space.project(save_adapter(peft, tmp_path / "foreign")).residual > 0.3


def test_bfloat16_adapters_stay_bfloat16(tmp_path: Path) -> None:
    for number, rank in enumerate((2, 4)):
        peft = add_adapter(make("llama"), number, r=rank, lora_alpha=3 * rank, target_modules=["q_proj"]).to(
            torch.bfloat16
        )
        save_adapter(peft, tmp_path / "zoo" / f"a{number}")
    space = ez.fit(tmp_path / "zoo", rank=1.0)
    for name in space.names:
        folder = space.rebuild(name).save(tmp_path / name)
        assert {tensor.dtype for tensor in load_file(folder / "adapter_model.safetensors").values()} == {torch.bfloat16}
        for module in space.layers:
            before = read_update(tmp_path / "zoo" / name, module)
            # Two factors, each rounded to 8 bits.
            assert (
                1e-5
                < (read_update(folder, module) - before).norm() / before.norm()
                < 2 * torch.finfo(torch.bfloat16).eps
            )


def test_the_mean_alone_is_another_adapter(tmp_path: Path, adapter_zoo: Callable) -> None:
    """The control: if the mean answered alike, equal logits of rebuilt models would be no evidence."""
    zoo = adapter_zoo("llama")
    folder = ez.fit(zoo.folder, rank=1.0).rebuild("a0", mean_only=True).save(tmp_path / "mean")
    assert (logits(load_adapter("llama", folder), "llama") - zoo.logits["a0"]).abs().max() > 1000 * TOLERANCE


def test_an_untrained_adapter_among_trained_ones_stays_zero(tmp_path: Path) -> None:
    """B = 0, as peft initialises it: the rebuilt update is round-off, and takes no rank for it."""
    for number in range(2):
        peft = add_adapter(make("llama"), number, r=4, lora_alpha=8, target_modules=["q_proj"])
        save_adapter(peft, tmp_path / "zoo" / f"a{number}")
    untrained = add_adapter(make("llama"), 9, r=4, lora_alpha=8, target_modules=["q_proj"])
    with torch.no_grad():
        for name, parameter in untrained.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    save_adapter(untrained, tmp_path / "zoo" / "untrained")
    space = ez.fit(tmp_path / "zoo", rank=1.0)
    folder = space.rebuild("untrained").save(tmp_path / "out")
    found, base = logits(load_adapter("llama", folder), "llama"), logits(make("llama"), "llama")
    torch.testing.assert_close(found, base, rtol=TOLERANCE, atol=TOLERANCE)
    assert json.loads((folder / "adapter_config.json").read_text())["r"] <= 4


def test_a_small_update_beside_large_ones_keeps_its_rank(tmp_path: Path) -> None:
    """A thousandth of the others' size: accurate to float32 coefficients of the others, and of its own rank."""
    for number, size in enumerate((1.0, 1.0, 1e-3)):
        peft = add_adapter(make("llama"), number, r=4, lora_alpha=8 * size, target_modules=["q_proj"])
        save_adapter(peft, tmp_path / "zoo" / f"a{number}")
    space = ez.fit(tmp_path / "zoo", rank=1.0)
    folder = space.rebuild("a2").save(tmp_path / "out")
    for module in space.layers:
        before = read_update(tmp_path / "zoo" / "a2", module)
        assert (read_update(folder, module) - before).norm() <= 1e-3 * before.norm()
    assert json.loads((folder / "adapter_config.json").read_text())["r"] <= 4
