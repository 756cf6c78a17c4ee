"""LoRAs of a tiny SDXL go through a subspace of full rank and come back as files that diffusers loads: the same answers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusion_adapters import (
    ALL_OF_UNET,
    NAMES,
    OUTPUT,
    TOLERANCE,
    add_lora,
    answers,
    deltas,
    kohya_tensors,
    load_by_diffusers,
    make,
    make_all,
    quiet,
    save_by_diffusers,
    save_kohya,
    state_of,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import eigenzoo as ez
from eigenzoo.formats.lora.diffusion_keys import split_key
from eigenzoo.formats.opening import open_model
from eigenzoo.formats.paths import OUTPUT_RECORD
from eigenzoo.integrations.dry_loading import load_dry

KINDS = ("diffusers", "before-0.34", "kohya", "sgm")
"""By its own metadata; without any, α = rank; kohya's keys with diffusers' blocks; with SGM's."""

AXES = [("models",), ("outputs", "inputs"), ("models", "outputs", "inputs")]


@dataclass(frozen=True)
class Zoo:
    """Files of every kind, what their models answered and their ΔW by peft; the base's answers."""

    folder: Path
    answers: Mapping[str, Mapping[str, Tensor]]
    deltas: Mapping[str, Mapping[str, Tensor]]
    base: Mapping[str, Tensor]

    def path(self, kind: str) -> Path:
        return self.folder / f"{kind}.safetensors"


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """One file of each kind; of the same layers, all of them of other ranks."""
    root = tmp_path_factory.mktemp("diffusion")
    (root / "zoo").mkdir()
    found, updates = {}, {}
    for number, kind in enumerate(KINDS):
        alpha = 3 if kind == "before-0.34" else 6
        models = add_lora(make_all(), number, rank=3 if kind == "before-0.34" else 2 + number, alpha=alpha)
        found[kind], updates[kind] = answers(models), deltas(models)
        path = root / "zoo" / f"{kind}.safetensors"
        if kind in ("kohya", "sgm"):
            save_kohya(kohya_tensors(models, sgm=kind == "sgm"), path)
        else:
            save_by_diffusers(models, root / kind, metadata=kind == "diffusers").rename(path)
    return Zoo(root / "zoo", found, updates, answers(make_all()))


@pytest.fixture(scope="module")
def space(zoo: Zoo) -> ez.Subspace:
    return ez.fit(zoo.folder, rank=1.0)


FEW = {"target_modules": ["to_q", "conv1", "proj_in"]}
"""Enough kinds of layers where the naming of all of them is not the question."""


def few(seed: int, **settings: Any) -> Mapping[str, nn.Module]:
    return add_lora(make_all(("unet", "text_encoder")), seed, **FEW, **settings)


def assert_same_updates(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = 1e-6) -> None:
    assert set(found) == set(expected)
    for name, delta in expected.items():
        assert (found[name] - delta).norm() <= tolerance * delta.norm(), name


def assert_same_answers(zoo: Zoo, kind: str, models: Mapping[str, nn.Module]) -> None:
    """They answer as the model did whose file was saved, and the base alone is far from that."""
    found = answers(models)
    for component in NAMES:
        expected = zoo.answers[kind][component]
        assert (expected - zoo.base[component]).abs().max() > 1000 * TOLERANCE
        assert (found[component] - expected).abs().max() <= TOLERANCE * max(1.0, float(expected.abs().max())), component


@pytest.mark.parametrize("kind", KINDS)
def test_the_files_are_what_diffusers_reads(zoo: Zoo, kind: str) -> None:
    """Else equal answers of the rebuilt ones would say nothing of the originals."""
    assert_same_answers(zoo, kind, load_by_diffusers(zoo.path(kind)))


def test_every_family_of_keys_is_one_zoo(zoo: Zoo) -> None:
    opened = ez.open_zoo(zoo.folder)
    assert opened.view == "update"
    assert {model.format for model in opened.models} == {"diffusion-lora"}
    assert len(opened.layers) == len(zoo.deltas["kohya"]) == 53
    assert opened.left_out == ()
    assert opened.warnings == ()


@pytest.mark.parametrize("kind", KINDS)
def test_an_update_as_read_is_pefts(zoo: Zoo, kind: str) -> None:
    model = open_model(zoo.path(kind))
    assert len(model.updates) == len(zoo.deltas[kind])
    for name, delta in zoo.deltas[kind].items():
        module = module_of(name)
        b_OR, a_RI = model.read_factors(module)
        found = model.updates[module].scale * b_OR.double() @ a_RI.double()
        assert (found.reshape(delta.shape) - delta).norm() <= 1e-6 * delta.norm(), name


def module_of(name: str) -> str:
    key = split_key(f"{name}.lora_A.weight")
    assert key is not None
    return key.module("")


@pytest.mark.parametrize("axes", AXES, ids="+".join)
def test_rebuilt_loras_answer_as_the_originals(tmp_path: Path, zoo: Zoo, axes: tuple[str, ...]) -> None:
    """From a bundle whose originals it does not need; every ΔW too, by peft's own arithmetic."""
    space = ez.load(ez.fit(zoo.folder, rank=1.0, axes=axes).save(tmp_path / "bundle"))
    assert list(space.verify()) == []
    for kind in KINDS:
        folder = space.rebuild(kind).save(tmp_path / kind)
        assert sorted(path.name for path in folder.iterdir()) == [OUTPUT_RECORD, OUTPUT]
        models = load_by_diffusers(folder / OUTPUT)
        assert_same_answers(zoo, kind, models)
        assert_same_updates(deltas(models), zoo.deltas[kind])


def test_the_factors_answer_as_the_originals(tmp_path: Path) -> None:
    """View `factors`: one rank in all, and the same conventions for α as in view `update`."""
    for number, sgm in enumerate((False, True, False)):
        save_kohya(kohya_tensors(few(number), sgm=sgm), tmp_path / "zoo" / f"m{number}.safetensors")
    space = ez.fit(tmp_path / "zoo", rank=1.0, view="factors")
    assert all(name.endswith((".lora_A", ".lora_B")) for name in space.layers)
    for name in space.names:
        folder = space.rebuild(name).save(tmp_path / name)
        found, expected = (
            deltas(load_by_diffusers(path, ("unet", "text_encoder")))
            for path in (folder / OUTPUT, tmp_path / "zoo" / f"{name}.safetensors")
        )
        assert_same_updates(found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_rebuilt_file_has_the_keys_and_the_scale_of_its_original(
    tmp_path: Path, zoo: Zoo, space: ez.Subspace, kind: str
) -> None:
    folder = space.rebuild(kind).save(tmp_path / "out")
    before, after = load_file(zoo.path(kind)), load_file(folder / OUTPUT)
    assert set(after) == set(before)
    for key, tensor in before.items():
        assert after[key].dtype == tensor.dtype
        # Of conv_out, which has four outputs, four directions are all that there are.
        assert after[key].shape == tensor.shape or "out" in key, key
        if key.endswith(".alpha"):
            assert torch.equal(after[key], tensor)


def test_sgm_names_are_the_layers_that_diffusers_makes_of_them(tmp_path: Path) -> None:
    """All kinds of layers of SDXL, those of the text conditions too: each ΔW is diffusers' own under diffusers' name."""
    models = add_lora(make_all(), 5, target_modules=ALL_OF_UNET)
    path = save_kohya(kohya_tensors(models, sgm=True), tmp_path / "sgm.safetensors")
    by_diffusers, model = deltas(load_by_diffusers(path)), open_model(path)
    named = open_model(save_by_diffusers(models, tmp_path))
    assert set(model.updates) == set(named.updates) == {module_of(name) for name in by_diffusers}
    assert len(by_diffusers) == 6 + sum(isinstance(layer, nn.Linear | nn.Conv2d) for layer in make("unet").modules())
    for name, delta in by_diffusers.items():
        module = module_of(name)
        for opened in (model, named):
            b_OR, a_RI = opened.read_factors(module)
            found = opened.updates[module].scale * b_OR.double() @ a_RI.double()
            assert (found.reshape(delta.shape) - delta).norm() <= 1e-6 * delta.norm(), name


@pytest.mark.parametrize("alpha", [-6.0, 0.0, 0.5, None])
def test_alpha_means_what_diffusers_makes_of_it(tmp_path: Path, alpha: float | None) -> None:
    """Negative, zero, small, none at all; the rebuilt file means the same again."""
    for number in range(2):
        own = alpha if number == 0 else 6.0
        save_kohya(kohya_tensors(few(number), alpha=own), tmp_path / "zoo" / f"m{number}.safetensors")
    path, names = tmp_path / "zoo" / "m0.safetensors", ("unet", "text_encoder")
    expected, model = deltas(load_by_diffusers(path, names)), open_model(path)
    assert {update.scale for update in model.updates.values()} == {1.0 if alpha is None else alpha / 3}
    assert any("α = 0" in text for text in model.warnings) == (alpha == 0)
    folder = ez.fit(tmp_path / "zoo", rank=1.0).rebuild("m0").save(tmp_path / "out")
    found = deltas(load_by_diffusers(folder / OUTPUT, names))
    largest = max(float(delta.norm()) for delta in expected.values())
    assert (largest > 0.1) == (alpha != 0)
    for name, delta in expected.items():
        assert (found[name] - delta).norm() <= 1e-6 * max(float(delta.norm()), 1.0), name


def test_an_alpha_for_each_layer_is_kohyas(tmp_path: Path) -> None:
    """kohya's rule, α / rank of the layer's own; the file that is written says the same α and means the same."""
    models = few(0)
    stems = [key.removesuffix(".lora_down.weight") for key in kohya_tensors(models, alpha=None) if "lora_down" in key]
    alphas = {stem: 0.5 * (1 + place % 5) for place, stem in enumerate(stems)}
    save_kohya(kohya_tensors(models, alpha=alphas), tmp_path / "zoo" / "a.safetensors")
    save_kohya(kohya_tensors(few(1)), tmp_path / "zoo" / "b.safetensors")
    folder = ez.fit(tmp_path / "zoo", rank=1.0).rebuild("a").save(tmp_path / "out")
    before, after = load_file(tmp_path / "zoo" / "a.safetensors"), load_file(folder / OUTPUT)
    for stem in stems:
        assert float(after[f"{stem}.alpha"]) == alphas[stem]
        first, second = (kohya_delta(tensors, stem) for tensors in (before, after))
        assert (first - second).norm() <= 1e-6 * first.norm()
    # diffusers takes each α too, but for attention's when α differs between layers; ours is what it takes for the others.
    by_diffusers = deltas(load_by_diffusers(tmp_path / "zoo" / "a.safetensors", ("unet",)))
    model = open_model(folder)
    for name in (name for name in by_diffusers if "attn" not in name):
        b_OR, a_RI = model.read_factors(module_of(name))
        found = model.updates[module_of(name)].scale * b_OR.double() @ a_RI.double()
        delta = by_diffusers[name]
        assert (found.reshape(delta.shape) - delta).norm() <= 1e-6 * delta.norm(), name


def kohya_delta(tensors: Mapping[str, Tensor], stem: str) -> Tensor:
    down, up = (tensors[f"{stem}.lora_{side}.weight"].double().flatten(1) for side in ("down", "up"))
    return float(tensors[f"{stem}.alpha"]) / len(down) * up @ down


def test_ranks_of_a_truncated_fit_are_each_layers_own(tmp_path: Path, zoo: Zoo) -> None:
    """Between originals of other ranks a layer needs as many as its sum has; diffusers reads the config that says so."""
    space = ez.fit(zoo.folder, rank={"outputs": 0.6, "inputs": 0.6})
    for kind in KINDS:
        file = space.rebuild(kind).save(tmp_path / kind) / OUTPUT
        model = open_model(file)
        assert len({update.rank for update in model.updates.values()}) > 1
        found = deltas(load_by_diffusers(file))
        for name, delta in found.items():
            expected = space.rebuild(kind).layer(module_of(name))
            assert (expected.reshape(delta.shape) - delta).norm() <= 1e-6 * delta.norm(), name


@pytest.mark.slow
def test_ranks_of_a_text_encoder_that_has_lost_a_level(tmp_path: Path) -> None:
    """Older files name CLIP's layers below `text_model`; diffusers takes that away, of the keys and not of the config."""
    names = ("text_encoder",)
    for number in range(3):
        path = save_by_diffusers(add_lora(make_all(names), number), tmp_path / "zoo" / f"m{number}")
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        tensors = {key.replace("r.encoder.", "r.text_model.encoder."): value for key, value in load_file(path).items()}
        assert all(".text_model." in key for key in tensors)
        save_file(tensors, path, metadata)
    space = ez.fit(ez.open_zoo(tmp_path / "zoo", include=["*fc1"]), rank={"outputs": 2})
    rebuilt = space.rebuild("m0")
    file = rebuilt.save(tmp_path / "out") / OUTPUT
    assert {update.rank for update in open_model(file).updates.values()} == {2, 3}
    before, found = (deltas(load_by_diffusers(path, names)) for path in (tmp_path / "zoo" / "m0" / OUTPUT, file))
    for name, delta in found.items():
        expected = rebuilt.layer(module_of(name)) if name.endswith("fc1") else before[name]
        assert (expected - delta).norm() <= 1e-6 * delta.norm(), name


def test_one_models_own_adapter_and_its_settings(tmp_path: Path) -> None:
    """As `save_lora_adapter` writes it: no component in front, and a config with patterns and rsLoRA."""
    settings = {"rank_pattern": {"to_q": 2, "conv1": 5}, "alpha_pattern": {"to_q": 7}, "use_rslora": True}
    expected = {}
    for number in range(2):
        models = add_lora(make_all(("unet",)), number, **settings)
        expected[f"m{number}"] = deltas(models)
        with quiet():
            models["unet"].save_lora_adapter(tmp_path / "zoo" / f"m{number}")
    space = ez.fit(tmp_path / "zoo", rank=1.0)
    for name, updates in expected.items():
        folder = space.rebuild(name).save(tmp_path / name)
        for path in (tmp_path / "zoo" / name, folder):
            models = make_all(("unet",))
            with quiet():
                models["unet"].load_lora_adapter(path, prefix=None, use_safetensors=True)
            assert_same_updates(deltas(models), updates)
        with safe_open(folder / OUTPUT, "pt") as file:
            config = json.loads(file.metadata()["lora_adapter_metadata"])
        assert config["lora_alpha"] == config["r"]
        assert config["use_rslora"] is False
        assert config["alpha_pattern"] == config["rank_pattern"]
        assert config["target_modules"]


@pytest.mark.parametrize("family", ["diffusers", "kohya"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_the_other_family_of_keys_answers_alike(
    tmp_path: Path, zoo: Zoo, space: ez.Subspace, kind: str, family: str
) -> None:
    folder = space.rebuild(kind).save(tmp_path / "out", format=family)
    file = folder / OUTPUT
    keys = load_file(file)
    assert all(key.startswith("lora_") == (family == "kohya") for key in keys)
    assert any(key.endswith(".alpha") for key in keys) == (family == "kohya")
    assert_same_answers(zoo, kind, load_by_diffusers(file))


def test_names_without_dots_that_no_grammar_has_are_refused(tmp_path: Path) -> None:
    for number in range(2):
        draw = torch.Generator().manual_seed(number)
        tensors = {
            f"lora_unet_double_blocks_0_img_attn_qkv.lora_{side}.weight": torch.randn(shape, generator=draw)
            for side, shape in (("down", (2, 6)), ("up", (9, 2)))
        }
        save_kohya(tensors, tmp_path / "zoo" / f"m{number}.safetensors")
    rebuilt = ez.fit(tmp_path / "zoo", rank=1.0).rebuild("m0")
    with pytest.raises(
        ez.EigenzooError, match=r"transformer\.transformer_blocks\.0.*has no unambiguous name.*leave out format="
    ):
        rebuilt.save(tmp_path / "out", format="diffusers")
    with pytest.raises(ez.EigenzooError, match=r"format 'ckpt' for a diffusion-lora.*diffusers or kohya"):
        rebuilt.save(tmp_path / "out", format="ckpt")
    assert not (tmp_path / "out").exists()
    assert set(load_file(rebuilt.save(tmp_path / "out") / OUTPUT)) == set(tensors)


@pytest.mark.parametrize("gone", [False, True])
@pytest.mark.slow
def test_growth_with_and_without_the_old_files(tmp_path: Path, gone: bool) -> None:
    """A bundle of two takes a third, which has other keys and another rank, and rebuilds all of them."""
    expected = {}
    for number in range(3):
        models = few(number, rank=3 + number)
        expected[f"m{number}"] = deltas(models)
        save_kohya(kohya_tensors(models, sgm=number == 2), tmp_path / f"m{number}.safetensors")
    paths = [tmp_path / f"{name}.safetensors" for name in expected]
    space = ez.load(ez.fit(paths[:2], rank=1.0).save(tmp_path / "two"))
    if gone:
        for path in paths[:2]:
            path.unlink()
    grown = ez.load(space.add(paths[2], refresh=True).save(tmp_path / "three"))
    for name, updates in expected.items():
        folder = grown.rebuild(name).save(tmp_path / name)
        found = deltas(load_by_diffusers(folder / OUTPUT, ("unet", "text_encoder")))
        assert_same_updates(found, updates, 1e-5)


def test_excluded_layers_come_back_as_they_were(tmp_path: Path, zoo: Zoo) -> None:
    """Under a fit of one direction: what is excluded keeps its update, what is not does not."""
    few_layers = ez.open_zoo(zoo.folder, include=["*to_out.0", "*conv1"])
    space = ez.load(ez.fit(few_layers, rank=1).save(tmp_path / "bundle"))
    compared = changed = 0
    for kind in KINDS:
        found = deltas(load_by_diffusers(space.rebuild(kind).save(tmp_path / kind) / OUTPUT))
        for name, delta in zoo.deltas[kind].items():
            error = float((found[name] - delta).norm() / delta.norm())
            if name.endswith(("to_out.0", "conv1")):
                changed += error > 0.1
            else:
                assert error <= 1e-6, name
                compared += 1
    assert compared == 4 * (53 - 24)
    assert changed > 46


def test_half_precision_stays_and_keeps_its_range(tmp_path: Path) -> None:
    """α = 1 at rank 3 in float16: B is as large as it was, so nothing is lost below float16's smallest number."""
    for number in range(2):
        tensors = {key: value.half() for key, value in kohya_tensors(few(number), alpha=1).items()}
        save_kohya(tensors, tmp_path / "zoo" / f"m{number}.safetensors")
    folder = ez.fit(tmp_path / "zoo", rank=1.0).rebuild("m0").save(tmp_path / "out")
    before, after = load_file(tmp_path / "zoo" / "m0.safetensors"), load_file(folder / OUTPUT)
    assert {tensor.dtype for tensor in after.values()} == {torch.float16}
    for stem in {key.partition(".")[0] for key in before}:
        first, second = (kohya_delta(tensors, stem) for tensors in (before, after))
        assert (first - second).norm() <= 2 * torch.finfo(torch.float16).eps * first.norm()


def test_state_of_is_what_was_saved(zoo: Zoo) -> None:
    """The builders write every factor: a key that they forgot would be no test at all."""
    models = add_lora(make_all(), 0)
    assert sum(len(state_of(model)) for model in models.values()) == 2 * len(zoo.deltas["diffusers"])


def test_loras_are_verified_against_the_models_that_they_change(zoo: Zoo, space: ez.Subspace, tmp_path: Path) -> None:
    models = make_all()
    parts: dict[str, list[str]] = {}
    with quiet():
        for name, model in models.items():
            model.save_pretrained(tmp_path / "base" / name)
            parts[name] = ["diffusers" if name == "unet" else "transformers", type(model).__name__]
    (tmp_path / "base" / "model_index.json").write_text(
        json.dumps({"_class_name": "StableDiffusionXLPipeline", **parts})
    )
    for kind in KINDS:
        found = ez.verify_adapter(zoo.path(kind), tmp_path / "base", loader=load_dry)
        assert found.ok, (kind, list(found), found.notes)
        assert found.typical_change is not None
        assert found.typical_change > 0.01
    assert space.verify(against=tmp_path / "base", loader=load_dry).ok
    assert space.verify(against=tmp_path / "base").ok is None

    alone = ez.verify_adapter(zoo.path("kohya"), tmp_path / "base" / "unet", loader=load_dry)
    assert alone.ok is None, "the text encoders are not there"
    assert "Name the folder of the whole pipeline" in " ".join(alone.notes)
    without = ez.verify_adapter(zoo.path("kohya"), tmp_path / "base" / "unet")
    assert "text_encoder" in " ".join(without.notes)
    assert not any("down_blocks" in note and "not in the base" in note for note in without.notes)
