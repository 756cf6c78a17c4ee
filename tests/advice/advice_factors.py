"""Messages about files of LoRA factors by themselves, as tools write them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from advice_case import Case
from safetensors.torch import load_file, save_file
from tiny_llama import (
    TOLERANCE,
    adapter_answers,
    add_adapter,
    answers,
    assert_same,
    checkpoint_answers,
    make_llama,
    quiet,
    save_adapter,
    write_zoo,
)
from torch import Tensor

import eigenzoo as ez
from builders import PREFIX
from eigenzoo.formats.opening import open_model

CONFIG, WEIGHTS, MLX = "adapter_config.json", "adapter_model.safetensors", "adapters.safetensors"
RANK, SCALE = 2, 3.0
"""Of the adapters of `tiny_llama`: α is 6."""


def factors(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """B and A of every module of an adapter that PEFT saved."""
    tensors = load_file(folder / WEIGHTS)
    modules = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]
    return {
        module.removeprefix(PREFIX): (tensors[f"{module}.lora_B.weight"], tensors[f"{module}.lora_A.weight"])
        for module in modules
    }


def assert_rebuilt(root: Path, source: object, expected: Mapping[str, Tensor]) -> None:
    """Every model of a zoo, rebuilt at full rank, answers in PEFT as expected of its name."""
    space = ez.fit(ez.open_zoo(source), rank=1.0)
    assert set(space.names) == set(expected)
    for name, answer in expected.items():
        assert_same(adapter_answers(space.rebuild(name).save(root / "rebuilt" / name)), answer)


def open_bare_factors(root: Path) -> None:
    for path in write_zoo(root / "kept"):
        (root / "zoo").mkdir(exist_ok=True)
        shutil.copy(path / WEIGHTS, root / "zoo" / f"{path.name}.safetensors")
    ez.open_zoo(root / "zoo")


def put_them_beside_a_config(root: Path) -> None:
    """The test kept one with the config that PEFT saved and wrote the other's; both, rebuilt, answer in PEFT as the originals."""
    shutil.rmtree(root / "zoo" / "a0", ignore_errors=True)
    for name in ("a0", "a1"):
        (root / "zoo" / name).mkdir()
        shutil.move(root / "zoo" / f"{name}.safetensors", root / "zoo" / name / WEIGHTS)
    shutil.copy(root / "kept" / "a0" / CONFIG, root / "zoo" / "a0" / CONFIG)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"]}
    (root / "zoo" / "a1" / CONFIG).write_text(json.dumps(config))
    assert_rebuilt(root, root / "zoo", {name: adapter_answers(root / "kept" / name) for name in ("a0", "a1")})


def write_mlx(folder: Path, original: Path, **parameters: float) -> None:
    """Write an adapter of PEFT as mlx-lm holds it: a = Aᵀ, b = Bᵀ, and the scale that is added with."""
    folder.mkdir(parents=True)
    tensors = {}
    for module, (b_OR, a_RI) in factors(original).items():
        tensors |= {f"{module}.lora_a": a_RI.T.contiguous(), f"{module}.lora_b": b_OR.T.contiguous()}
    save_file(tensors, folder / MLX)
    stated = {"rank": RANK, "scale": SCALE, "dropout": 0.0, **parameters}
    (folder / CONFIG).write_text(json.dumps({"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": stated}))


def mlx_answers(folder: Path, scale: float) -> Tensor:
    """What the base answers with mlx-lm's fused weights: W + (scale · lora_bᵀ) · lora_aᵀ (`LoRALinear.fuse`)."""
    model, tensors = make_llama(), load_file(folder / MLX)
    with torch.no_grad():
        for key in tensors:
            if key.endswith(".lora_a"):
                module = key.removesuffix(".lora_a")
                model.get_submodule(module).weight += (scale * tensors[f"{module}.lora_b"].T) @ tensors[key].T
    return answers(model)


def open_bare_mlx(root: Path) -> None:
    for path in write_zoo(root / "kept"):
        write_mlx(root / "zoo" / path.name, path)
        shutil.move(root / "zoo" / path.name / CONFIG, root / f"{path.name}.json")
    ez.open_zoo(root / "zoo")


def put_mlx_beside_its_config(root: Path) -> None:
    """The test put the config that mlx-lm wrote beside them; the rebuilt adapters answer in PEFT as mlx-lm's formula."""
    for name in ("a0", "a1"):
        shutil.move(root / f"{name}.json", root / "zoo" / name / CONFIG)
    assert_rebuilt(root, root / "zoo", {name: mlx_answers(root / "zoo" / name, SCALE) for name in ("a0", "a1")})


def open_mlx_under_other_names(root: Path) -> None:
    for path in write_zoo(root / "kept"):
        write_mlx(root / "zoo" / path.name, path)
    shutil.copytree(root / "zoo", root / "written")
    old, numbered = (root / "zoo" / name / MLX for name in ("a0", "a1"))
    np.savez(old.with_suffix(".npz"), **{key: values.numpy() for key, values in load_file(old).items()})
    old.unlink()
    numbered.rename(numbered.with_name(f"0000100_{MLX}"))
    ez.open_zoo(root / "zoo")


def name_the_file_and_save_the_arrays(root: Path) -> None:
    """The test named the one file and saved the other's arrays; the rebuilt adapters answer in PEFT as mlx-lm's formula."""
    old, named = root / "zoo" / "a0", root / "zoo" / "a1" / f"0000100_{MLX}"
    with np.load(old / "adapters.npz") as arrays:
        save_file({key: torch.from_numpy(arrays[key]) for key in arrays}, old / MLX)
    expected = {
        "a0": mlx_answers(root / "written" / "a0", SCALE),
        named.stem: mlx_answers(root / "written" / "a1", SCALE),
    }
    assert_rebuilt(root, [old, named], expected)


def open_early_mlx(root: Path) -> None:
    for path in write_zoo(root / "kept"):
        write_mlx(root / "zoo" / path.name, path, scale=10.0, alpha=0.6)
    ez.open_zoo(root / "zoo")


def put_alpha_into_the_scale(root: Path) -> None:
    """The test set scale to scale · alpha / rank; the rebuilt adapters answer in PEFT as the early formula."""
    for name in ("a0", "a1"):
        path = root / "zoo" / name / CONFIG
        config = json.loads(path.read_text())
        config["lora_parameters"] |= {"scale": 10.0 * 0.6 / RANK}
        del config["lora_parameters"]["alpha"]
        path.write_text(json.dumps(config))
    assert_rebuilt(root, root / "zoo", {name: mlx_answers(root / "zoo" / name, 3.0) for name in ("a0", "a1")})


def open_torchtune(root: Path) -> None:
    """torchtune's FullModelHFCheckpointer (0.6) saves its own factors and PEFT's into one folder, with a config of four entries."""
    for path in write_zoo(root / "zoo"):
        own = {f"layers.0.attn.q_proj.lora_{side}.weight": torch.ones(2, 2) for side in "ab"}
        torch.save(own, path / "adapter_model.pt")
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"]}
        (path / CONFIG).write_text(json.dumps(config))
    open_model(root / "zoo" / "a0" / "adapter_model.pt", allow_pickle=True)


def open_torchtunes_folder(root: Path) -> None:
    """The test opened the folders; the rebuilt adapters answer in PEFT as the originals."""
    assert_rebuilt(root, root / "zoo", {name: adapter_answers(root / "zoo" / name) for name in ("a0", "a1")})


def open_loralib(root: Path) -> None:
    (root / "zoo").mkdir()
    for path in write_zoo(root / "kept"):
        tensors = {}
        for module, (b_OR, a_RI) in factors(path).items():
            tensors |= {f"{module}.lora_A": a_RI, f"{module}.lora_B": b_OR}
        save_file(tensors, root / "zoo" / f"{path.name}.safetensors")
    ez.open_zoo(root / "zoo")


def give_loralib_pefts_names(root: Path) -> None:
    """The test renamed the factors and wrote configs; the rebuilt adapters answer in PEFT as W + α/r · lora_B · lora_A."""
    expected = {}
    for name in ("a0", "a1"):
        tensors = load_file(root / "zoo" / f"{name}.safetensors")
        (root / "zoo" / f"{name}.safetensors").unlink()
        (root / "zoo" / name).mkdir()
        save_file({f"{PREFIX}{key}.weight": values for key, values in tensors.items()}, root / "zoo" / name / WEIGHTS)
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"]}
        (root / "zoo" / name / CONFIG).write_text(json.dumps(config))
        model = make_llama()
        with torch.no_grad():
            for module, (b_OR, a_RI) in factors(root / "kept" / name).items():
                model.get_submodule(module).weight += 6 / RANK * b_OR @ a_RI
        expected[name] = answers(model)
    assert_rebuilt(root, root / "zoo", expected)


def open_unmerged(root: Path) -> None:
    """What accelerate writes of a PEFT model."""
    peft = add_adapter(make_llama())
    (root / "accelerate").mkdir()
    state = {name: values.clone() for name, values in peft.state_dict().items()}
    save_file(state, root / "accelerate" / "model.safetensors")
    ez.open_zoo(root / "accelerate")


def merge_or_save_the_adapter(root: Path) -> None:
    """The test did both with PEFT; the merged checkpoint and the adapter, rebuilt, answer as the model did."""
    expected = answers(add_adapter(make_llama()))
    save_adapter(add_adapter(make_llama()), root / "adapters" / "a0")
    save_adapter(add_adapter(make_llama(), 1), root / "adapters" / "a1")
    both = {"a0": expected, "a1": answers(add_adapter(make_llama(), 1))}
    assert_rebuilt(root, root / "adapters", both)
    for seed in range(2):
        add_adapter(make_llama(), seed).merge_and_unload().save_pretrained(root / "merged" / f"m{seed}")
    space = ez.fit(ez.open_zoo(root / "merged"), rank=1.0)
    assert_same(checkpoint_answers(space.rebuild("m0").save(root / "again")), expected)


XLABS = {"double_blocks.0.processor.qkv_lora1": (24, 8), "single_blocks.3.processor.proj_lora": (8, 40)}


def random(shapes: Mapping[str, tuple[int, int]], down: str, up: str) -> dict[str, Tensor]:
    """Random factors under a tool's names."""
    draw = torch.Generator().manual_seed(0)
    tensors = {}
    for name, (outputs, inputs) in shapes.items():
        tensors[name + down] = torch.randn(RANK, inputs, generator=draw)
        tensors[name + up] = torch.randn(outputs, RANK, generator=draw)
    return tensors


def convert_by_diffusers(file: Path, new_file: Path) -> None:
    """The lines that the messages give."""
    with quiet():
        from diffusers import FluxPipeline

        state = FluxPipeline.lora_state_dict(str(file))
    save_file({key: values.clone() for key, values in state.items()}, new_file)


def assert_rows(file: Path, up: Tensor, down: Tensor) -> None:
    """The updates of q, k and v are the fused update's rows."""
    model = open_model(file)
    for place, side in enumerate("qkv"):
        module = f"transformer.transformer_blocks.0.attn_to_{side}"
        b_OR, a_RI = model.read_factors(module)
        expected = up[8 * place : 8 * (place + 1)] @ down
        assert (model.updates[module].scale * b_OR @ a_RI - expected).abs().max() <= TOLERANCE


def open_xlabs(root: Path) -> None:
    save_file(random(XLABS, ".down.weight", ".up.weight"), root / "style.safetensors")
    ez.open_zoo(root / "style.safetensors")


def convert_xlabs(root: Path) -> None:
    """The test ran these lines; the updates of q, k and v that are read are the rows of XLabs's."""
    convert_by_diffusers(root / "style.safetensors", root / "new.safetensors")
    tensors, stem = random(XLABS, ".down.weight", ".up.weight"), "double_blocks.0.processor.qkv_lora1"
    assert_rows(root / "new.safetensors", tensors[f"{stem}.up.weight"], tensors[f"{stem}.down.weight"])


FLUX = {"lora_unet_double_blocks_0_img_attn_qkv": (24, 8), "lora_unet_final_layer_adaLN_modulation_1": (16, 8)}


def open_flux_of_two_kinds(root: Path) -> None:
    (root / "zoo").mkdir()
    save_file(random(FLUX, ".lora_down.weight", ".lora_up.weight"), root / "zoo" / "kohya.safetensors")
    shapes = {f"transformer.transformer_blocks.0.attn.to_{side}": (8, 8) for side in "qkv"}
    shapes["transformer.norm_out.linear"] = (16, 8)
    save_file(random(shapes, ".lora_A.weight", ".lora_B.weight"), root / "zoo" / "diffusers.safetensors")
    ez.open_zoo(root / "zoo")


def convert_flux(root: Path) -> None:
    """The test ran these lines; the zoo opens, and the updates of q, k and v are the rows of the fused one's."""
    (root / "old").mkdir()
    shutil.move(root / "zoo" / "kohya.safetensors", root / "old" / "kohya.safetensors")
    convert_by_diffusers(root / "old" / "kohya.safetensors", root / "zoo" / "kohya.safetensors")
    assert len(ez.open_zoo(root / "zoo").layers) == 4
    tensors, stem = random(FLUX, ".lora_down.weight", ".lora_up.weight"), "lora_unet_double_blocks_0_img_attn_qkv"
    assert_rows(
        root / "zoo" / "kohya.safetensors", tensors[f"{stem}.lora_up.weight"], tensors[f"{stem}.lora_down.weight"]
    )


KOHYA = {"lora_unet_mid_block_attentions_0_proj_in": (6, 4)}


def open_pickled_style(root: Path) -> None:
    torch.save(random(KOHYA, ".lora_down.weight", ".lora_up.weight"), root / "style.pt")
    open_model(root / "style.pt", allow_pickle=True)


def save_it_safely(root: Path) -> None:
    """The test saved the tensors so; the update that is read is that of the file's own values."""
    save_file(torch.load(root / "style.pt", weights_only=True), root / "style.safetensors")
    assert_kohya(root / "style.safetensors")


def assert_kohya(file: Path) -> None:
    model, tensors = open_model(file), random(KOHYA, ".lora_down.weight", ".lora_up.weight")
    ((module, update),) = model.updates.items()
    b_OR, a_RI = model.read_factors(module)
    (stem,) = KOHYA
    expected = tensors[f"{stem}.lora_up.weight"] @ tensors[f"{stem}.lora_down.weight"]
    assert torch.equal(update.scale * b_OR @ a_RI, expected)


def open_style_as_checkpoint(root: Path) -> None:
    (root / "style").mkdir()
    save_file(random(KOHYA, ".lora_down.weight", ".lora_up.weight"), root / "style" / "model.safetensors")
    open_model(root / "style")


def name_its_file(root: Path) -> None:
    """The test named the file; the update that is read is that of the file's own values."""
    assert_kohya(root / "style" / "model.safetensors")


def open_two_in_one(root: Path) -> None:
    held = {}
    for name in ("day", "night"):
        for key, values in random({"unet.mid_block.proj": (6, 4)}, ".lora_A", ".lora_B").items():
            held[f"{key}.{name}.weight"] = values * (1 + len(name))
    save_file(held, root / "both.safetensors")
    open_model(root / "both.safetensors")


def save_them_apart(root: Path) -> None:
    """The test saved each adapter's tensors in a file; the updates that are read are those of the file's own values."""
    held = load_file(root / "both.safetensors")
    for name in ("day", "night"):
        save_file({key: values for key, values in held.items() if f".{name}." in key}, root / f"{name}.safetensors")
        model = open_model(root / f"{name}.safetensors")
        ((module, _),) = model.updates.items()
        b_OR, a_RI = model.read_factors(module)
        assert torch.equal(b_OR, held[f"unet.mid_block.proj.lora_B.{name}.weight"])
        assert torch.equal(a_RI, held[f"unet.mid_block.proj.lora_A.{name}.weight"])


CASES = [
    Case(
        "A file of PEFT's factors without its config",
        open_bare_factors,
        ("but no adapter_config.json", "as save_pretrained does", '"target_modules"'),
        put_them_beside_a_config,
    ),
    Case(
        "A file of mlx-lm's factors without its config",
        open_bare_mlx,
        ("an mlx-lm adapter, but no adapter_config.json", "that mlx_lm.lora wrote"),
        put_mlx_beside_its_config,
    ),
    Case(
        "mlx-lm's config without adapters.safetensors",
        open_mlx_under_other_names,
        ("belongs to mlx-lm, not to PEFT", "ame the file of factors", "adapters.npz"),
        name_the_file_and_save_the_arrays,
    ),
    Case(
        "mlx-lm's alpha beside scale", open_early_mlx, ("emove alpha", "scale · alpha / rank"), put_alpha_into_the_scale
    ),
    Case(
        "torchtune's own factors",
        open_torchtune,
        ("as torchtune writes them", "pen the folder"),
        open_torchtunes_folder,
    ),
    Case("loralib's factors", open_loralib, ("as loralib writes them", "dd .weight"), give_loralib_pefts_names),
    Case("XLabs's LoRA of Flux", open_xlabs, ("as XLabs's trainer", "FluxPipeline.lora_state_dict"), convert_xlabs),
    Case(
        "A whole model whose LoRA is not merged",
        open_unmerged,
        ("the LoRA of this whole model is not merged", "merge_and_unload()", "save the adapter alone"),
        merge_or_save_the_adapter,
    ),
    Case(
        "Flux's q, k and v in one layer and apart",
        open_flux_of_two_kinds,
        ("q, k and v are one layer in this file", "FluxPipeline.lora_state_dict"),
        convert_flux,
    ),
    Case(
        "A LoRA of a diffusion model in a pickle", open_pickled_style, ("safetensors.torch.save_file",), save_it_safely
    ),
    Case(
        "A LoRA of a diffusion model under a checkpoint's name",
        open_style_as_checkpoint,
        ("with the name of whole weights", "ame the file instead of the folder"),
        name_its_file,
    ),
    Case(
        "Several LoRAs of a diffusion model in one file",
        open_two_in_one,
        ("factors of several adapters", "ave each adapter to its own file"),
        save_them_apart,
    ),
]
