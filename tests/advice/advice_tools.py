"""Messages about factors of tools that run in none of the tests: what each tool would write is written by its formula."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from advice_case import Case
from advice_diffusion import make_unet, picture
from advice_factors import RANK, assert_rebuilt
from safetensors.torch import load_file, save_file
from tiny_llama import answers, assert_same, checkpoint_answers, make_llama, quiet, write_zoo
from torch import Tensor, nn

import eigenzoo as ez
from builders import PREFIX

SCALE = 3.0
TARGETS = ["self_attn.o_proj", "mlp.down_proj"]
NEMO = {"self_attn.o_proj": "self_attention.linear_proj.adapter", "mlp.down_proj": "mlp.linear_fc2.adapter"}


def random_pairs(seed: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Modules of the Llama, and B and A for each."""
    draw = torch.Generator().manual_seed(seed)
    for name, module in make_llama().named_modules():
        if name.endswith(tuple(TARGETS)):
            outputs, inputs = module.weight.shape
            a_RI = torch.randn(RANK, inputs, generator=draw) * 0.3
            yield name, torch.randn(outputs, RANK, generator=draw) * 0.3, a_RI


@torch.no_grad()
def merged(seed: int) -> nn.Module:
    """The Llama with SCALE · B · A added to its weights."""
    model = make_llama()
    for name, b_OR, a_RI in random_pairs(seed):
        model.get_submodule(name).weight += SCALE * b_OR @ a_RI
    return model


def writing(tensors: Callable[[str, Tensor, Tensor], dict[str, Tensor]]) -> Callable[[Path], object]:
    """Open two files of a tool's names and shapes."""

    def provoke(root: Path) -> None:
        (root / "zoo").mkdir()
        for seed in range(2):
            held = {key: v.contiguous() for pair in random_pairs(seed) for key, v in tensors(*pair).items()}
            save_file(held, root / "zoo" / f"a{seed}.safetensors")
        ez.open_zoo(root / "zoo")

    return provoke


def nemo(name: str, b_OR: Tensor, a_RI: Tensor) -> dict[str, Tensor]:
    _, _, number, module = name.split(".", 3)
    stem = f"decoder.layers.{number}.{NEMO[module]}"
    return {f"{stem}.linear_in.weight": a_RI, f"{stem}.linear_out.weight": b_OR}


def deepspeed(name: str, b_OR: Tensor, a_RI: Tensor) -> dict[str, Tensor]:
    return {f"{name}.lora_right_weight": a_RI.T, f"{name}.lora_left_weight": b_OR.T}


def keras(name: str, b_OR: Tensor, a_RI: Tensor) -> dict[str, Tensor]:
    stem = f"layers/{name.replace('.', '/')}"
    return {f"{stem}/lora_kernel_a": a_RI.T, f"{stem}/lora_kernel_b": b_OR.T}


def export_to_peft(root: Path) -> None:
    """The test wrote the factors by the names of NeMo's exporter; the rebuilt adapters answer in PEFT as W + α/r · out · in."""
    write_zoo(root / "peft", target_modules=TARGETS)
    for seed in range(2):
        tensors, found = load_file(root / "zoo" / f"a{seed}.safetensors"), {}
        for name, _, _ in random_pairs(seed):
            _, _, number, module = name.split(".", 3)
            stem = f"decoder.layers.{number}.{NEMO[module]}"
            found[f"{PREFIX}{name}.lora_A.weight"] = tensors[f"{stem}.linear_in.weight"]
            found[f"{PREFIX}{name}.lora_B.weight"] = tensors[f"{stem}.linear_out.weight"]
        save_file(found, root / "peft" / f"a{seed}" / "adapter_model.safetensors", {"format": "pt"})
    assert_rebuilt(root, root / "peft", {f"a{seed}": answers(merged(seed)) for seed in range(2)})


def fuse(root: Path) -> None:
    """The test added scale · (right · left)ᵀ to the weights, as it does; the rebuilt checkpoints answer as these models."""
    for seed in range(2):
        model, tensors = make_llama(), load_file(root / "zoo" / f"a{seed}.safetensors")
        with torch.no_grad():
            for name, _, _ in random_pairs(seed):
                right, left = (tensors[f"{name}.lora_{side}_weight"] for side in ("right", "left"))
                model.get_submodule(name).weight += SCALE * (right @ left).T
        model.save_pretrained(root / "fused" / f"a{seed}")
    space = ez.fit(ez.open_zoo(root / "fused"), rank=1.0)
    for seed in range(2):
        rebuilt = space.rebuild(f"a{seed}").save(root / "rebuilt" / f"a{seed}")
        assert_same(checkpoint_answers(rebuilt), answers(merged(seed)))


def add_products(root: Path) -> None:
    """The test added a·b to each kernel and saved the models; the rebuilt ones hold these kernels."""
    kernels = {}
    for seed in range(2):
        tensors, model = load_file(root / "zoo" / f"a{seed}.safetensors"), make_llama()
        for name, _, _ in random_pairs(seed):
            stem = f"layers/{name.replace('.', '/')}"
            kernel = model.get_submodule(name).weight.detach().T
            kernels[seed, f"{stem}/kernel"] = (
                kernel + tensors[f"{stem}/lora_kernel_a"] @ tensors[f"{stem}/lora_kernel_b"]
            )
        (root / "merged").mkdir(exist_ok=True)
        held = {name: values.contiguous() for (place, name), values in kernels.items() if place == seed}
        save_file(held, root / "merged" / f"a{seed}.safetensors")
    space = ez.fit(ez.open_zoo(root / "merged"), rank=1.0)
    for (seed, name), expected in kernels.items():
        torch.testing.assert_close(space.rebuild(f"a{seed}").layer(name).float(), expected, rtol=1e-5, atol=1e-5)


def attention_layers(unet: Any) -> list[nn.Linear]:
    """The layers that cloneofsimo's trainer puts factors on, in its order."""
    return [module for name, module in unet.named_modules() if "attentions" in name and isinstance(module, nn.Linear)]


def open_by_number(root: Path) -> None:
    """Layers are named by their number alone."""
    (root / "zoo").mkdir()
    for seed in range(2):
        draw, tensors = torch.Generator().manual_seed(seed), {}
        for number, layer in enumerate(attention_layers(make_unet())):
            outputs, inputs = layer.weight.shape
            tensors[f"unet:{number}:up"] = torch.randn(outputs, RANK, generator=draw)
            tensors[f"unet:{number}:down"] = torch.randn(RANK, inputs, generator=draw)
        save_file(tensors, root / "zoo" / f"p{seed}.safetensors")
    ez.open_zoo(root / "zoo")


def add_to_the_pipeline(root: Path) -> None:
    """The test added up · down to the layers of a pipeline, as it does; the rebuilt pipelines make of noise what these make."""
    with quiet():
        from diffusers import DDPMPipeline, DDPMScheduler
    expected = {}
    for seed in range(2):
        unet, tensors = make_unet(), load_file(root / "zoo" / f"p{seed}.safetensors")
        with torch.no_grad():
            for number, layer in enumerate(attention_layers(unet)):
                layer.weight += tensors[f"unet:{number}:up"] @ tensors[f"unet:{number}:down"]
        expected[f"p{seed}"] = picture(unet)
        with quiet():
            DDPMPipeline(unet, DDPMScheduler()).save_pretrained(root / "merged" / f"p{seed}")
    space = ez.fit(root / "merged", rank=1.0)
    for name, answer in expected.items():
        rebuilt = space.rebuild(name).save(root / "rebuilt" / name)
        with quiet():
            found = picture(DDPMPipeline.from_pretrained(rebuilt).unet)
        torch.testing.assert_close(found, answer, rtol=1e-4, atol=1e-5)
        assert (answer - picture(make_unet())).abs().max() > 1e-3
    shutil.rmtree(root / "merged")


CASES = [
    Case("NeMo's factors", writing(nemo), ("as NeMo writes them", "target='hf-peft'"), export_to_peft),
    Case("DeepSpeed-Chat's factors", writing(deepspeed), ("as DeepSpeed-Chat writes them", "use it with"), fuse),
    Case("Keras's factors", writing(keras), ("as Keras writes them", "dd each product a·b"), add_products),
    Case(
        "cloneofsimo's factors", open_by_number, ("as cloneofsimo's trainer writes", "--mode upl"), add_to_the_pipeline
    ),
]
