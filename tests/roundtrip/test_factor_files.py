"""Files of LoRA factors as tools write them: each is read as updates, or refused by the tool's name with a next step that works."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import eigenzoo as ez
from builders import PREFIX, Factors, random_factors, regauge, write_adapter
from eigenzoo.cli.app import app
from eigenzoo.formats.model import Model
from eigenzoo.formats.opening import open_model
from real_models import TOLERANCE, load_adapter, logits, make
from tolerance import tolerance

CONFIG, WEIGHTS, MLX = "adapter_config.json", "adapter_model.safetensors", "adapters.safetensors"
MODULES = {f"model.layers.0.self_attn.{name}_proj": (12, 10) for name in "qv"}
SCALE, BASE = 2.5, "org/base"


def assert_same_update(model: Model, module: str, expected: Tensor) -> None:
    """An update as it is read is the one that the library's formula gives, to the round-off of float32."""
    b_OR, a_RI = model.read_factors(module)
    found = model.updates[module].scale * b_OR.double() @ a_RI.double()
    size = a_RI.shape[0]
    assert (found - expected).norm() <= tolerance(size, dtype=torch.float32, scale=float(expected.norm())), module


def save(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: values.contiguous() for name, values in tensors.items()}, path)
    return path


def peft_tensors(factors: Mapping[str, Factors]) -> dict[str, Tensor]:
    return {
        f"{PREFIX}{module}.lora_{side}.weight": values
        for module, (b_OR, a_RI) in factors.items()
        for side, values in (("A", a_RI), ("B", b_OR))
    }


def mlx_tensors(factors: Mapping[str, Factors]) -> dict[str, Tensor]:
    """As `mlx_lm.tuner.lora.LoRALinear` holds them: lora_a (inputs, rank), lora_b (rank, outputs)."""
    return {
        f"{module}.lora_{side}": values.T
        for module, (b_OR, a_RI) in factors.items()
        for side, values in (("a", a_RI), ("b", b_OR))
    }


def save_as_mlx(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    """As `mx.save_safetensors` writes: metadata that are null, and places that do not begin with those of the first name."""
    data = save(path, tensors).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = {"__metadata__": None, **dict(reversed(json.loads(data[8 : 8 + length]).items()))}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    return path


def write_mlx(
    folder: Path, factors: Mapping[str, Factors], scale: float = SCALE, file: str = MLX, **others: Any
) -> Path:
    """As `mlx_lm.lora` saves: the trained values, and the command's whole configuration."""
    rank = next(iter(factors.values()))[1].shape[0]
    parameters = {"rank": rank, "dropout": 0.0, "scale": scale, **others.pop("lora_parameters", {})}
    config = {"model": BASE, "train": True, "fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters}
    save_as_mlx(folder / file, mlx_tensors(factors))
    (folder / CONFIG).write_text(json.dumps({**config, **others}))
    return folder


def common_updates(num_models: int) -> list[dict[str, Factors]]:
    """Adapters with nearly all of their update in common, each in a gauge of its own."""
    shared = random_factors(MODULES, 4, 0)
    models = []
    for seed in range(1, num_models + 1):
        own = random_factors(MODULES, 4, seed)
        near = {module: (b + 0.15 * own[module][0], a + 0.15 * own[module][1]) for module, (b, a) in shared.items()}
        models.append(regauge(near, seed))
    return models


def the_same_by(way: str, root: Path, models: list[dict[str, Factors]]) -> ez.Zoo:
    """Write the adapters in one of the ways in which they occur, and name them so."""
    rank = models[0][next(iter(MODULES))][1].shape[0]
    for number, factors in enumerate(models):
        if way == "files":
            save(root / f"a{number}.safetensors", peft_tensors(factors))
        elif way == "mixed" and number % 3 == 0:
            write_mlx(root / f"a{number}", factors)
        else:
            write_adapter(root / f"a{number}", factors, lora_alpha=SCALE * rank, base_model_name_or_path=BASE)
    if way == "files":
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": SCALE * rank, "base_model_name_or_path": BASE}
        (root / CONFIG).write_text(json.dumps(config))
        return ez.open_zoo(str(root / "*.safetensors"))
    if way == "glob":
        return ez.open_zoo(str(root / "*" / "*.safetensors"))
    if way == "mixed":
        return ez.open_zoo(
            [root / f"a{n}" / (MLX if n % 3 == 0 else WEIGHTS if n % 3 == 1 else "") for n in range(len(models))]
        )
    return ez.open_zoo(root)


def test_evidence_is_the_same_by_folder_by_files_and_by_mixed_names(tmp_path: Path) -> None:
    """As weights, the same factors have next to nothing in common: a rotation of each is another mean."""
    models = common_updates(24)
    found = {}
    for way in ("folders", "glob", "files", "mixed"):
        zoo = the_same_by(way, tmp_path / way, models)
        assert (zoo.view, len(zoo)) == ("update", 24)
        assert zoo.names == tuple(f"a{number}" for number in range(24))
        document = {**ez.evidence(zoo, seed=0).to_dict(), "seconds": 0}
        found[way] = json.dumps(document, sort_keys=True).replace(str(tmp_path / way), "zoo")
    document = json.loads(found["folders"])
    assert all(text == found["folders"] for text in found.values())
    factors = ez.evidence(ez.open_zoo(tmp_path / "folders", view="factors"), seed=0).to_dict()
    assert all(layer["mean_energy"] > 0.8 for layer in document["layers"].values())
    assert all(layer["mean_energy"] < 0.2 for layer in factors["layers"].values())


RANK = 3
FACTORS = random_factors(MODULES, RANK, 0)
REFUSED: dict[str, tuple[dict[str, Tensor], str]] = {
    "PEFT": (peft_tensors(FACTORS), r"factors of a PEFT adapter, but no adapter_config.json.*save_pretrained"),
    "PEFT's names without their prefix": (
        {key.removeprefix(PREFIX): values for key, values in peft_tensors(FACTORS).items()},
        r"factors of a PEFT adapter, but no adapter_config.json",
    ),
    "mlx-lm": (mlx_tensors(FACTORS), r"factors of an mlx-lm adapter, but no adapter_config.json.*mlx_lm.lora"),
    "torchtune": (
        {f"layers.0.attn.q_proj.lora_{side}.weight": torch.ones(3, 3) for side in "ab"},
        r"the file has LoRA factors as torchtune writes them.*FullModelHFCheckpointer",
    ),
    "LitGPT": (
        {f"transformer.h.0.attn.qkv.lora_{side}": torch.ones(3, 3) for side in "AB"},
        r"the file has LoRA factors as LitGPT writes them.*litgpt merge_lora",
    ),
    "loralib, as fairseq uses it": (
        {f"decoder.layers.0.self_attn.q_proj.lora_{side}": torch.ones(3, 3) for side in "AB"},
        r"the file has LoRA factors as loralib writes them.*base_model.model. before these names",
    ),
    "XLabs": (
        {f"double_blocks.0.processor.qkv_lora1.{side}.weight": torch.ones(3, 3) for side in ("down", "up")},
        r"the file has LoRA factors as XLabs's trainer for Flux writes them.*FluxPipeline.lora_state_dict",
    ),
    "a whole model": (
        {**peft_tensors(FACTORS), f"{PREFIX}{next(iter(MODULES))}.base_layer.weight": torch.ones(12, 10)},
        r"the LoRA of this whole model is not merged.*merge_and_unload",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_factors_are_refused_under_every_name_of_weights(tmp_path: Path, kind: str) -> None:
    """A bare file, a checkpoint (accelerate saves a PEFT model so), its shards, a pickle, a component of a pipeline."""
    tensors, message = REFUSED[kind]
    first, *_ = tensors
    save(tmp_path / "bare.safetensors", tensors)
    save(tmp_path / "folder" / "any.safetensors", tensors)
    save(tmp_path / "checkpoint" / "model.safetensors", tensors)
    save(tmp_path / "shards" / "model-00001-of-00002.safetensors", {first: tensors[first]})
    save(
        tmp_path / "shards" / "model-00002-of-00002.safetensors", {key: tensors[key] for key in tensors if key != first}
    )
    index = {key: f"model-0000{1 if key == first else 2}-of-00002.safetensors" for key in tensors}
    (tmp_path / "shards" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    torch.save(tensors, tmp_path / "m.pt")
    torch.save({"state_dict": tensors, "epoch": 3}, tmp_path / "m.ckpt")
    save(tmp_path / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors", tensors)
    (tmp_path / "pipeline" / "model_index.json").write_text('{"unet": ["diffusers", "UNet2DConditionModel"]}')
    for path in sorted(tmp_path.iterdir()):
        # A component's name stands before these, and that may make another tool's names of them.
        with pytest.raises(ez.UnsupportedError, match="LoRA|mlx-lm" if path.name == "pipeline" else message):
            open_model(path, allow_pickle=True)


def test_no_command_reads_factors_as_weights(tmp_path: Path) -> None:
    """One place opens models, whatever the command."""
    bundle = ez.fit([write_adapter(tmp_path / f"a{n}", random_factors(MODULES, RANK, n)) for n in range(3)], rank=2)
    bundle.save(tmp_path / "bundle")
    file = save(tmp_path / "zoo" / "x.safetensors", peft_tensors(FACTORS))
    zoo, out = str(file.parent), str(tmp_path / "out")
    for words in (
        *(
            ["inspect", zoo],
            ["fit", zoo, "-o", out],
            ["plan", zoo],
            ["evidence", zoo],
            ["report", zoo, "-o", f"{out}.html"],
        ),
        *(["verify", str(file)], ["project", str(tmp_path / "bundle"), str(file)]),
        ["add", str(tmp_path / "bundle"), str(file)],
        ["verify", str(tmp_path / "a0"), "--against", str(file)],
    ):
        with pytest.raises(ez.UnsupportedError, match=REFUSED["PEFT"][1]):
            app(words, standalone_mode=False)
    assert not Path(out).exists()


def test_pefts_factors_are_read_once_a_config_is_beside_them(tmp_path: Path) -> None:
    """Both next steps: the folder as save_pretrained writes it, and a config that is written by hand."""
    alone = save(tmp_path / "alone" / "style.safetensors", peft_tensors(FACTORS))
    with pytest.raises(ez.UnsupportedError, match=REFUSED["PEFT"][1]):
        open_model(alone)
    whole = write_adapter(tmp_path / "whole", FACTORS, lora_alpha=7)
    minimal = tmp_path / "minimal"
    minimal.mkdir()
    shutil.copy(alone, minimal / WEIGHTS)
    (minimal / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": 7}))
    shutil.copy(minimal / CONFIG, alone.parent / CONFIG)
    for path in (whole, whole / WEIGHTS, minimal, alone):
        model = open_model(path)
        assert (model.format, model.name) == ("lora", path.parent.name if path.name == WEIGHTS else path.stem)
        for module, (b_OR, a_RI) in FACTORS.items():
            assert_same_update(model, module, 7 / RANK * b_OR.double() @ a_RI.double())


@pytest.mark.parametrize("tool", ["PEFT", "mlx-lm"])
def test_files_beside_one_config_go_through_every_command(tmp_path: Path, tool: str) -> None:
    """Files of other names have no files beside them: their neighbours are other models."""
    models = [random_factors(MODULES, RANK, seed) for seed in range(3)]
    for seed, factors in enumerate(models):
        if tool == "PEFT":
            save(tmp_path / "run" / f"a{seed}.safetensors", peft_tensors(factors))
            (tmp_path / "run" / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": 7}))
        else:
            write_mlx(tmp_path / "run", factors, scale=7 / RANK, file=f"a{seed}.safetensors")
    (tmp_path / "run" / "tokenizer.json").write_text("{}")
    zoo = ez.open_zoo(str(tmp_path / "run" / "*.safetensors"))
    assert [model.ignored_files for model in ez.inspect(zoo).models] == [(), (), ()]
    space = ez.load(ez.fit(zoo, rank=1.0).save(tmp_path / "bundle"))
    assert list(space.verify()) == []
    assert space.project(tmp_path / "run" / "a1.safetensors").residual <= 1e-10
    for seed, factors in enumerate(models):
        rebuilt = open_model(space.rebuild(f"a{seed}").save(tmp_path / "out" / f"a{seed}"))
        for module, (b_OR, a_RI) in factors.items():
            expected = 7 / RANK * b_OR.double() @ a_RI.double()
            b_OR, a_RI = rebuilt.read_factors(module)
            found = rebuilt.updates[module].scale * b_OR.double() @ a_RI.double()
            assert (found - expected).norm() <= 1e-6 * expected.norm()


def test_a_pickled_adapter_is_named_by_its_file_too(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", FACTORS)
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    with pytest.raises(ez.UnsupportedError, match="--allow-pickle"):
        open_model(folder / "adapter_model.bin")
    model = open_model(folder / "adapter_model.bin", allow_pickle=True)
    assert (model.path, model.format, len(model.updates)) == (folder, "lora", len(MODULES))


def test_a_file_beside_a_config_that_is_no_lora_is_refused_by_its_type(tmp_path: Path) -> None:
    save(tmp_path / "x.safetensors", {f"{PREFIX}x.ia3_l": torch.ones(3, 1)})
    with pytest.raises(ez.UnsupportedError, match=REFUSED["PEFT"][1]):
        open_model(tmp_path / "x.safetensors")
    (tmp_path / CONFIG).write_text('{"peft_type": "IA3"}')
    with pytest.raises(ez.UnsupportedError, match="peft_type is 'IA3'"):
        open_model(tmp_path / "x.safetensors")


def test_other_files_beside_an_adapter_are_what_they_are(tmp_path: Path) -> None:
    """Trained embeddings that lie beside an adapter are no factors, and a LoRA of a diffusion model needs no config."""
    folder = write_adapter(tmp_path / "a", FACTORS)
    assert open_model(save(folder / "new_embeddings.safetensors", {"w": torch.ones(2)})).format == "state-dict"
    kohya = {f"lora_unet_x.lora_{side}.weight": torch.ones(3, 3) for side in ("down", "up")}
    assert open_model(save(folder / "style.safetensors", kohya)).format == "diffusion-lora"


def mlx_delta(tensors: Mapping[str, Tensor], module: str, scale: float) -> np.ndarray:
    """`mlx_lm.tuner.lora.LoRALinear.fuse` in numpy: (scale · lora_bᵀ) · lora_aᵀ."""
    lora_a, lora_b = (tensors[f"{module}.lora_{side}"].double().numpy() for side in "ab")
    return (scale * lora_b.T) @ lora_a.T


def test_mlx_lms_adapters_are_read_as_its_formula_says(tmp_path: Path) -> None:
    for number in range(3):
        write_mlx(tmp_path / "zoo" / f"a{number}", random_factors(MODULES, RANK + number, number))
    zoo = ez.open_zoo(tmp_path / "zoo")
    assert (zoo.names, zoo.view, zoo.warnings) == (("a0", "a1", "a2"), "update", ())
    space = ez.load(ez.fit(zoo, rank=1.0).save(tmp_path / "bundle"))
    for number, model in enumerate(zoo.models):
        tensors = load_file(tmp_path / "zoo" / f"a{number}" / MLX)
        rebuilt = open_model(space.rebuild(f"a{number}").save(tmp_path / "out" / f"a{number}"))
        assert {path.name for path in rebuilt.path.iterdir()} >= {CONFIG, WEIGHTS}
        for module in MODULES:
            expected = torch.from_numpy(mlx_delta(tensors, module, SCALE))
            assert_same_update(model, module, expected)
            b_OR, a_RI = rebuilt.read_factors(module)
            found = rebuilt.updates[module].scale * b_OR.double() @ a_RI.double()
            assert (found - expected).norm() <= 1e-6 * expected.norm()


def test_peft_answers_with_a_rebuilt_adapter_as_mlx_lms_formula(tmp_path: Path) -> None:
    """Linear layers and an embedding, whose update mlx-lm adds as rows × dims; other ranks of a view of the factors as well."""
    model = make("llama")
    sizes = {
        name: module.weight.shape for name, module in model.named_modules() if name.endswith(("q_proj", "up_proj"))
    }
    for number in range(3):
        factors = random_factors(sizes, RANK, number)
        write_mlx(tmp_path / "zoo" / f"a{number}", factors, scale=0.1)
        file = tmp_path / "zoo" / f"a{number}" / MLX
        rows, dims = model.get_input_embeddings().weight.shape
        draw = torch.Generator().manual_seed(number)
        embedding = {
            "lora_a": torch.randn(rows, RANK, generator=draw),
            "lora_b": torch.randn(RANK, dims, generator=draw),
        }
        save(file, {**load_file(file), **{f"model.embed_tokens.{side}": values for side, values in embedding.items()}})
    for view in ("update", "factors"):
        space = ez.fit(tmp_path / "zoo", rank=1.0, view=view)
        tensors = load_file(tmp_path / "zoo" / "a1" / MLX)
        fused = make("llama")
        with torch.no_grad():
            for name in sizes:
                fused.get_submodule(name).weight += torch.from_numpy(mlx_delta(tensors, name, 0.1)).float()
            # mlx_lm.tuner.lora.LoRAEmbedding.fuse.
            rows_by_dims = tensors["model.embed_tokens.lora_a"] @ tensors["model.embed_tokens.lora_b"]
            fused.get_input_embeddings().weight += 0.1 * rows_by_dims
        found = logits(load_adapter("llama", space.rebuild("a1").save(tmp_path / view)), "llama")
        assert (logits(fused, "llama") - logits(model, "llama")).abs().max() > 1000 * TOLERANCE
        torch.testing.assert_close(found, logits(fused, "llama"), rtol=TOLERANCE, atol=TOLERANCE)


def test_checkpoints_of_one_mlx_run_are_read_with_the_config_beside_them(tmp_path: Path) -> None:
    for number in (100, 200):
        write_mlx(tmp_path / "run", random_factors(MODULES, RANK, number), file=f"0000{number}_{MLX}")
    write_mlx(tmp_path / "run", random_factors(MODULES, RANK, 300))
    zoo = ez.open_zoo(str(tmp_path / "run" / "*.safetensors"))
    assert zoo.names == ("0000100_adapters", "0000200_adapters", "run")
    for model, seed in zip(zoo.models, (100, 200, 300), strict=True):
        for module, (b_OR, a_RI) in random_factors(MODULES, RANK, seed).items():
            assert_same_update(model, module, SCALE * b_OR.double() @ a_RI.double())
            for key in (model.updates[module].key_a, model.updates[module].key_b):
                flat = model.read(key).reshape(-1)
                assert torch.equal(model.read_flat(key, 3, 9), flat[3:9])
                assert torch.equal(model.read_flat(key, 3, 9, torch.empty(6, dtype=torch.float64)), flat[3:9].double())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fine_tune_type": "dora"}, r"fine_tune_type is 'dora': DoRA.*mlx_lm.fuse"),
        ({"fine_tune_type": "full"}, r"fine_tune_type is 'full': full weights.*mlx_lm.fuse"),
        ({"fine_tune_type": ["\x1b"]}, r"fine_tune_type is "),
        ({"lora_parameters": {"rank": "3"}}, r"lora_parameters.rank is '3'.*positive integer"),
        ({"lora_parameters": {"rank": True}}, r"lora_parameters.rank is True"),
        ({"lora_parameters": {"rank": 2**40}}, r"lora_parameters.rank is"),
        ({"lora_parameters": {"rank": 4}}, r"the rank is 3 in the file but 4"),
        ({"lora_parameters": {"scale": None}}, r"lora_parameters.scale is None.*finite number"),
        ({"lora_parameters": {"scale": -1}}, r"lora_parameters.scale is -1"),
        ({"lora_parameters": {"scale": float("inf")}}, r"lora_parameters.scale is inf.*finite"),
        ({"lora_parameters": {"alpha": 16}}, r"both alpha 16 and scale 2.5.*Remove alpha"),
    ],
)
def test_configs_of_mlx_lm_that_are_not_plain_lora_are_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ez.FormatError, match=message):
        open_model(write_mlx(tmp_path / "a", FACTORS, **change))


def test_an_alpha_of_mlx_lm_that_is_the_rank_says_the_same_either_way(tmp_path: Path) -> None:
    model = open_model(write_mlx(tmp_path / "a", FACTORS, lora_parameters={"alpha": float(RANK)}))
    for module, (b_OR, a_RI) in FACTORS.items():
        assert_same_update(model, module, SCALE * b_OR.double() @ a_RI.double())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x.m": torch.ones(3)}, r"'x.m' is not a factor of an update.*mlx_lm.fuse"),
        ({"x.lora_a": torch.ones(4, 2, 3)}, r"module 'x'.*mixture-of-experts"),
        ({"x.lora_a": torch.ones(4, 3)}, r"module 'x'.*the factor B is missing"),
        ({"x.lora_a": torch.ones(4, 3), "x.lora_b": torch.ones(2, 4)}, r"module 'x'"),
    ],
)
def test_tensors_that_are_no_factors_of_mlx_lm_are_refused(
    tmp_path: Path, change: dict[str, Tensor], message: str
) -> None:
    folder = write_mlx(tmp_path / "a", FACTORS)
    save(folder / MLX, {**load_file(folder / MLX), **change})
    with pytest.raises(ez.FormatError, match=message):
        open_model(folder)
    (folder / CONFIG).write_text("{}")
    with pytest.raises(ez.FormatError, match=r"the config has no lora_parameters.*mlx_lm.lora wrote"):
        open_model(folder)


def test_litgpts_file_is_refused_by_its_ending(tmp_path: Path) -> None:
    torch.save({"model": REFUSED["LitGPT"][0]}, tmp_path / "lit_model.pth.lora")
    for path in (tmp_path, tmp_path / "lit_model.pth.lora"):
        with pytest.raises(ez.UnsupportedError, match=r"LoRA factors, as LitGPT writes them.*litgpt merge_lora"):
            open_model(path, allow_pickle=True)


def test_adapters_are_written_as_mlx_lm_holds_them(tmp_path: Path) -> None:
    """PEFT's and mlx-lm's, of several ranks: what is read again, and mlx-lm's formula on the files, give the updates."""
    expected = {}
    for number in range(3):
        factors = random_factors({**MODULES, "model.embed_tokens": (6, 20)}, RANK + number, number)
        expected[f"a{number}"] = {module: SCALE * b.double() @ a.double() for module, (b, a) in factors.items()}
        if number:
            write_mlx(tmp_path / "zoo" / f"a{number}", factors)
        else:
            del factors["model.embed_tokens"], expected["a0"]["model.embed_tokens"]
            write_adapter(tmp_path / "zoo" / "a0", factors, lora_alpha=SCALE * RANK, base_model_name_or_path=BASE)
    space = ez.fit(ez.open_zoo(tmp_path / "zoo", exclude=["*embed*"], allow_missing=True), rank=1.0)
    for name, updates in expected.items():
        folder = space.rebuild(name).save(tmp_path / name, format="mlx-lm")
        config, tensors = json.loads((folder / CONFIG).read_text()), load_file(folder / MLX)
        assert config["model"] == BASE
        assert set(config["lora_parameters"]["keys"]) == set(updates)
        model, scale = open_model(folder), config["lora_parameters"]["scale"]
        for module, update in updates.items():
            found = torch.from_numpy(mlx_delta(tensors, module, scale))
            assert (found - update).norm() <= 1e-5 * update.norm(), (name, module)
            b_OR, a_RI = model.read_factors(module)
            assert torch.allclose(model.updates[module].scale * b_OR.double() @ a_RI.double(), found)
    with pytest.raises(ez.UsageError, match=r"format 'kohya' for a lora.*PEFT's adapters as mlx-lm"):
        space.rebuild("a0").save(tmp_path / "other", format="kohya")


@pytest.mark.parametrize(
    ("shape", "others", "message"),
    [
        ((4, 3, 3, 3), {}, r"module 'x' is a convolution|module 'x': is a convolution"),
        (
            (4, 3),
            {"base_model.model.head.weight": torch.ones(2, 2)},
            r"1 tensors are not LoRA factors, such as 'base_model",
        ),
    ],
)
def test_what_mlx_lm_has_no_place_for_is_not_written_so(
    tmp_path: Path, shape: tuple[int, ...], others: dict[str, Tensor], message: str
) -> None:
    for number in range(2):
        kernel = torch.randn(RANK, *shape[1:], generator=torch.Generator().manual_seed(number))
        b_OR = torch.ones(shape[0], RANK, *[1] * (len(shape) - 2))
        write_adapter(tmp_path / "zoo" / f"a{number}", {"x": (b_OR, kernel)}, others=others)
    with pytest.raises(ez.UnsupportedError, match=message):
        ez.fit(tmp_path / "zoo", rank=1.0).rebuild("a0").save(tmp_path / "out", format="mlx-lm")
    assert not (tmp_path / "out").exists()
