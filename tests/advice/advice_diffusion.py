"""Messages about diffusion models: their LoRAs beyond s·B·A, by other names or in several formats, and pipelines."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from advice_case import Case
from advice_factors import RANK, convert_by_diffusers, random
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_llama import quiet
from torch import Tensor

import eigenzoo as ez
from builders import PREFIX, random_factors, write_adapter
from eigenzoo.formats.opening import open_model
from tolerance import tolerance

KOHYA = {"lora_unet_mid_block_attentions_0_proj_in": (6, 4)}
(STEM,) = KOHYA
kohya = partial(random, KOHYA, ".lora_down.weight", ".lora_up.weight")


def product(tensors: Mapping[str, Tensor], scale: float = 1.0) -> Tensor:
    return scale * tensors[f"{STEM}.lora_up.weight"] @ tensors[f"{STEM}.lora_down.weight"]


def assert_update(file: Path, expected: Tensor) -> None:
    """The only update of a file is this one."""
    model = open_model(file)
    ((module, update),) = model.updates.items()
    b_OR, a_RI = model.read_factors(module)
    found = update.scale * b_OR.double() @ a_RI.double()
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance(100, dtype=torch.float32, scale=float(expected.abs().max()))


def open_alpha_twice(root: Path) -> None:
    text = f'{{"unet.r": {RANK}, "unet.lora_alpha": 4, "unet.target_modules": ["proj_in"]}}'
    tensors = {**kohya(), f"{STEM}.alpha": torch.tensor(1.0)}
    save_file(tensors, root / "style.safetensors", {"lora_adapter_metadata": text})
    ez.open_zoo(root / "style.safetensors")


def remove_one(root: Path) -> None:
    """The test removed each in turn: the scale is then α over rank of the one that is left."""
    tensors = load_file(root / "style.safetensors")
    with safe_open(root / "style.safetensors", "pt") as file:
        header = file.metadata()
    save_file(tensors, root / "tensors.safetensors")
    assert_update(root / "tensors.safetensors", product(tensors, 1.0 / RANK))
    del tensors[f"{STEM}.alpha"]
    save_file(tensors, root / "header.safetensors", header)
    assert_update(root / "header.safetensors", product(tensors, 4.0 / RANK))


def open_codes(root: Path) -> None:
    save_file({key: (100 * values).to(torch.int8) for key, values in kohya().items()}, root / "style.safetensors")
    ez.open_zoo(root / "style.safetensors")


def save_as_floats(root: Path) -> None:
    """The test divided the codes by their scale and saved them as float32; the update that is read is that of these factors."""
    tensors = {key: values.float() / 100 for key, values in load_file(root / "style.safetensors").items()}
    save_file(tensors, root / "style.safetensors")
    assert_update(root / "style.safetensors", product(tensors))


def open_a_spare_alpha(root: Path) -> None:
    save_file({**kohya(), "lora_unet_conv_in.alpha": torch.tensor(1.0)}, root / "style.safetensors")
    ez.open_zoo(root / "style.safetensors")


def save_without_it(root: Path) -> None:
    """The test saved the file without it, which belongs to no factor; the update that is read is that of the file's own values."""
    tensors = load_file(root / "style.safetensors")
    del tensors["lora_unet_conv_in.alpha"]
    save_file(tensors, root / "style.safetensors")
    assert_update(root / "style.safetensors", product(kohya()))


def make_unet() -> Any:
    """A UNet of one resolution."""
    with quiet():
        from diffusers import UNet2DModel

        torch.manual_seed(0)
        sizes = {"block_out_channels": (8,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
        return UNet2DModel(sample_size=8, layers_per_block=1, norm_num_groups=4, attention_head_dim=4, **sizes).eval()


@torch.no_grad()
def picture(unet: Any) -> Tensor:
    """What a UNet makes of fixed noise."""
    noise = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return unet(noise, 1).sample


def loha(seed: int) -> Any:
    """A UNet with a product of two low-rank matrices on one layer, by PEFT."""
    from peft import LoHaConfig, get_peft_model

    torch.manual_seed(seed)
    with quiet():
        return get_peft_model(make_unet(), LoHaConfig(r=2, target_modules=["to_q"], init_weights=False)).eval()


def open_loha(root: Path) -> None:
    (root / "zoo").mkdir()
    for seed in range(2):
        tensors = {}
        for name, value in loha(seed).state_dict().items():
            module, _, part = name.removeprefix(PREFIX).partition(".hada_")
            if part:
                key = f"lora_unet_{module.replace('.', '_')}.hada_{part.partition('.')[0]}"
                tensors[key] = value.contiguous()
        save_file(tensors, root / "zoo" / f"m{seed}.safetensors")
    ez.open_zoo(root / "zoo")


def merge_loha(root: Path) -> None:
    """The test merged them by PEFT; the rebuilt UNets make of noise what the UNets with the adapters make."""
    from diffusers import UNet2DModel

    expected = {}
    for seed in range(2):
        adapted = loha(seed)
        expected[f"m{seed}"] = picture(adapted)
        adapted.merge_and_unload().save_pretrained(root / "merged" / f"m{seed}")
    space = ez.fit(ez.open_zoo(root / "merged"), rank=1.0)
    for name, answer in expected.items():
        with quiet():
            found = picture(UNet2DModel.from_pretrained(space.rebuild(name).save(root / "rebuilt" / name)).eval())
        torch.testing.assert_close(found, answer, rtol=1e-4, atol=1e-5)
        assert (answer - picture(make_unet())).abs().max() > 1e-3


PLACE = "input_blocks_14_1_transformer_blocks_0_attn1_to_q"


def open_deep_blocks(root: Path) -> None:
    save_file(
        random({f"lora_unet_{PLACE}": (6, 4)}, ".lora_down.weight", ".lora_up.weight"), root / "style.safetensors"
    )
    ez.open_zoo(root / "style.safetensors")


def save_by_diffusers(root: Path) -> None:
    """The test loaded it as diffusers does for a UNet of three layers a block, and saved it; the update is that of its values."""
    with quiet():
        from diffusers import StableDiffusionXLPipeline as Pipeline

        deep = SimpleNamespace(layers_per_block=3)
        state, _ = Pipeline.lora_state_dict(str(root / "style.safetensors"), unet_config=deep)
        layers = {key.removeprefix("unet."): values for key, values in state.items()}
        Pipeline.save_lora_weights(root, unet_lora_layers=layers, weight_name="new.safetensors")
    tensors = load_file(root / "style.safetensors")
    expected = tensors[f"lora_unet_{PLACE}.lora_up.weight"] @ tensors[f"lora_unet_{PLACE}.lora_down.weight"]
    assert_update(root / "new.safetensors", expected)


QKV = {f"transformer_blocks.0.attn.to_{side}": (8, 8) for side in "qkv"}


def open_two_formats(root: Path) -> None:
    write_adapter(root / "zoo" / "peft", random_factors(QKV, RANK, 0), lora_alpha=6)
    named = {f"transformer.{module}": shape for module, shape in QKV.items()}
    save_file(random(named, ".lora_A.weight", ".lora_B.weight"), root / "zoo" / "diffusers.safetensors")
    ez.open_zoo([root / "zoo" / "peft", root / "zoo" / "diffusers.safetensors"])


def save_all_alike(root: Path) -> None:
    """The test did each; the zoos open, with the α that PEFT's config says, and the updates are those of the files."""
    peft, style = (
        load_file(root / "zoo" / "peft" / "adapter_model.safetensors"),
        load_file(root / "zoo" / "diffusers.safetensors"),
    )
    with quiet():
        from diffusers import FluxPipeline

        (root / "all-diffusers").mkdir()
        shutil.copy(root / "zoo" / "diffusers.safetensors", root / "all-diffusers")
        FluxPipeline.save_lora_weights(
            root / "all-diffusers",
            transformer_lora_layers={key.removeprefix(PREFIX): values for key, values in peft.items()},
            transformer_lora_adapter_metadata={"r": RANK, "lora_alpha": 6, "target_modules": [*QKV]},
            weight_name="peft.safetensors",
        )
    shutil.copytree(root / "zoo" / "peft", root / "all-peft" / "peft")
    factors = {module: tuple(style[f"transformer.{module}.lora_{side}.weight"] for side in "BA") for module in QKV}
    write_adapter(root / "all-peft" / "diffusers", factors)
    for folder in ("all-diffusers", "all-peft"):
        zoo = ez.open_zoo(root / folder)
        assert len(zoo.layers) == 3
        space = ez.fit(zoo, rank=1.0)
        for name, tensors, prefix, scale in (
            ("peft", peft, PREFIX, 3.0),
            ("diffusers", style, "transformer.", 1.0),
        ):
            module = next(iter(QKV))
            expected = scale * tensors[f"{prefix}{module}.lora_B.weight"] @ tensors[f"{prefix}{module}.lora_A.weight"]
            found = space.rebuild(name).layer(next(layer for layer in zoo.layers if layer.endswith("to_q")))
            assert (found - expected).abs().max() <= tolerance(
                100, dtype=torch.float32, scale=float(expected.abs().max())
            )


def open_without_a_key(root: Path) -> None:
    (root / "zoo").mkdir()
    few = {f"lora_unet_double_blocks_0_img_attn_{part}": (8, 8) for part in ("proj",)}
    save_file(random(few, ".lora_down.weight", ".lora_up.weight"), root / "zoo" / "kohya.safetensors")
    many = {"transformer.transformer_blocks.0.attn.to_out.0": (8, 8), "transformer.norm_out.linear": (16, 8)}
    save_file(random(many, ".lora_A.weight", ".lora_B.weight"), root / "zoo" / "diffusers.safetensors")
    ez.open_zoo(root / "zoo", missing="zero")


def convert_or_exclude(root: Path) -> None:
    """The test did each, the first by the lines above for Flux; the shared layer's updates are those of the files."""
    (root / "converted").mkdir()
    for name in ("kohya", "diffusers"):
        convert_by_diffusers(root / "zoo" / f"{name}.safetensors", root / "converted" / f"{name}.safetensors")
    converted = ez.open_zoo(root / "converted", missing="zero")
    assert len(converted.layers) == 2
    excluded = ez.open_zoo(root / "zoo", missing="zero", exclude=["*norm_out*"])
    tensors = load_file(root / "zoo" / "kohya.safetensors")
    stem = "lora_unet_double_blocks_0_img_attn_proj"
    expected = tensors[f"{stem}.lora_up.weight"] @ tensors[f"{stem}.lora_down.weight"]
    for zoo in (converted, excluded):
        found = ez.fit(zoo, rank=1.0).rebuild("kohya").layer("transformer.transformer_blocks.0.attn_to_out.0")
        assert (found - expected).abs().max() <= tolerance(100, dtype=torch.float32, scale=float(expected.abs().max()))


def rebuild_by_other_names(root: Path) -> None:
    (root / "zoo").mkdir()
    for seed, name in enumerate(("a", "b")):
        held = random({"lora_unet_some_network_block": (6, 4)}, ".lora_down.weight", ".lora_up.weight")
        save_file({key: values + seed for key, values in held.items()}, root / "zoo" / f"{name}.safetensors")
    ez.fit(root / "zoo", rank=1.0).rebuild("a").save(root / "new", format="diffusers")


def rebuild_as_it_came(root: Path) -> None:
    """The test left the format out; the rebuilt file has the update of the original."""
    folder = ez.fit(root / "zoo", rank=1.0).rebuild("a").save(root / "new")
    (file,) = folder.glob("*.safetensors") if folder.is_dir() else (folder,)
    tensors = load_file(root / "zoo" / "a.safetensors")
    stem = "lora_unet_some_network_block"
    assert_update(file, tensors[f"{stem}.lora_up.weight"] @ tensors[f"{stem}.lora_down.weight"])


def make_pipeline(seed: int) -> Any:
    with quiet():
        from diffusers import DDPMPipeline, DDPMScheduler

        unet = make_unet()
        with torch.no_grad():
            for parameter in unet.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
        return DDPMPipeline(unet, DDPMScheduler())


def write_pipelines(root: Path, **settings: Any) -> None:
    for seed in range(2):
        with quiet():
            make_pipeline(seed).save_pretrained(root / "zoo" / f"p{seed}", **settings)


def open_pipelines(**settings: Any) -> Any:
    def provoke(root: Path) -> None:
        write_pipelines(root, **settings)
        ez.open_zoo(root / "zoo")

    return provoke


def assert_pipelines(root: Path, zoo: Path) -> None:
    from diffusers import DDPMPipeline

    space = ez.fit(zoo, rank=1.0)
    for seed in range(2):
        rebuilt = space.rebuild(f"p{seed}").save(root / "rebuilt" / f"p{seed}")
        with quiet():
            found = picture(DDPMPipeline.from_pretrained(rebuilt).unet)
        torch.testing.assert_close(found, picture(make_pipeline(seed).unet), rtol=1e-4, atol=1e-5)


def save_as_safetensors(root: Path) -> None:
    """The test loaded and saved them so; the rebuilt pipelines make of noise what the first ones make."""
    from diffusers import DDPMPipeline

    for seed in range(2):
        with quiet():
            DDPMPipeline.from_pretrained(root / "zoo" / f"p{seed}", use_safetensors=False).save_pretrained(
                root / "new" / f"p{seed}"
            )
    assert_pipelines(root, root / "new")


def save_without_variant(root: Path) -> None:
    """The test loaded and saved them so; the rebuilt pipelines make of noise what the first ones make."""
    from diffusers import DDPMPipeline

    for seed in range(2):
        with quiet():
            loaded = DDPMPipeline.from_pretrained(root / "zoo" / f"p{seed}", variant="other")
            loaded.save_pretrained(root / "new" / f"p{seed}")
    assert_pipelines(root, root / "new")


def open_without_components(root: Path) -> None:
    write_pipelines(root)
    for seed in range(2):
        shutil.move(root / "zoo" / f"p{seed}" / "unet", root / f"unet{seed}")
    ez.open_zoo(root / "zoo")


def download_them(root: Path) -> None:
    """The test put them there, as a download does; the rebuilt pipelines make of noise what the first ones make."""
    for seed in range(2):
        shutil.move(root / f"unet{seed}", root / "zoo" / f"p{seed}" / "unet")
    assert_pipelines(root, root / "zoo")


CASES = [
    Case(
        "α said twice", open_alpha_twice, ("and lora_adapter_metadata in its header", "emove one of them"), remove_one
    ),
    Case(
        "A diffusion LoRA of whole numbers",
        open_codes,
        ("factors have dtypes torch.int8", "ave its factors as float32"),
        save_as_floats,
    ),
    Case(
        "A tensor that is not a factor",
        open_a_spare_alpha,
        ("is not a factor", "ave it again without this tensor"),
        save_without_it,
    ),
    Case(
        "A LoHa of a diffusion model",
        open_loha,
        ("belongs to LoHa", "erge it into its base model, save that"),
        merge_loha,
    ),
    Case(
        "Blocks that Stable Diffusion has not",
        open_deep_blocks,
        ("is not a module of Stable Diffusion's UNet", "save_lora_weights"),
        save_by_diffusers,
    ),
    Case(
        "Adapters of two formats",
        open_two_formats,
        ("have the same format", "ave them all with diffusers"),
        save_all_alike,
    ),
    Case(
        "A layer that files of one kind of keys lack",
        open_without_a_key,
        (
            "no file with keys of the same kind has it",
            "oad the files with diffusers",
            "leave the layer out with --exclude",
        ),
        convert_or_exclude,
    ),
    Case(
        "Names without certain dots",
        rebuild_by_other_names,
        ("has no unambiguous name", "ebuild it in its original format"),
        rebuild_as_it_came,
    ),
    Case(
        "A pipeline of pickles",
        open_pipelines(safe_serialization=False),
        ("a Python pickle", "oad the pipeline with diffusers and save it with save_pretrained"),
        save_as_safetensors,
    ),
    Case(
        "A pipeline with shards of a variant",
        open_pipelines(variant="other", max_shard_size="10KB"),
        ("shards of a variant", "with variant=… if it has one"),
        save_without_variant,
    ),
    Case(
        "A pipeline without its components",
        open_without_components,
        ("no component has weights", "ownload them too"),
        download_them,
    ),
]
