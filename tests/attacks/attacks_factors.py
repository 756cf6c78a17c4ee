"""Files of LoRA factors by themselves: adapters of mlx-lm, PEFT's weights named by path, and layers that are cut beside others."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from attack_runner import ANY, EITHER, REFUSED, SAFE, Attack, Sandbox, Words
from attacks_diffusion import NESTED, many_keys
from attacks_names import SCRIPT
from attacks_paths import PLACES
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
NAN, INF = float("nan"), float("inf")
FUSED = "lora_unet_double_blocks_0_img_attn_qkv"


def mlx(edit: Callable[[Tensors], object] | None = None, text: str | None = None, **changes: Any) -> Callable:
    """A zoo of mlx-lm's adapters, one of which has other tensors, another config, or another text in its place."""

    def build(sandbox: Sandbox) -> Sequence[Words]:
        zoo = sandbox.copy("mlx")
        folder = zoo / "m3"
        if edit is not None:
            held = load_file(folder / "adapters.safetensors")
            edit(held)
            save_file(held, folder / "adapters.safetensors")
        path = folder / "adapter_config.json"
        known = json.loads(path.read_text())
        known["lora_parameters"] |= changes.pop("lora_parameters", {})
        path.write_text(json.dumps({**known, **changes}) if text is None else text)
        return [("inspect", folder), ("fit", zoo, "-o", "out", "--rank", 1)]

    return build


def in_place(file: str, put: Callable) -> Callable[[Sandbox], Sequence[Words]]:
    """Something else in the place of a file of an mlx-lm adapter; named by the folder and by its weights."""

    def build(sandbox: Sandbox) -> Sequence[Words]:
        folder = sandbox.copy("mlx") / "m3"
        (folder / file).unlink()
        put(sandbox, folder / file)
        return [("inspect", folder), ("inspect", folder / "adapters.safetensors")]

    return build


def beside(put: Callable[[Sandbox, Any], object]) -> Callable[[Sandbox], Sequence[Words]]:
    """PEFT's factors under another name, and something in the place of their config."""

    def build(sandbox: Sandbox) -> Sequence[Words]:
        folder = sandbox.copy("adapters") / "m3"
        (folder / "adapter_model.safetensors").rename(folder / "style.safetensors")
        path = folder / "adapter_config.json"
        path.rename(sandbox.files / "config")
        put(sandbox, path)
        return [("inspect", folder / "style.safetensors"), ("verify", folder / "style.safetensors")]

    return build


def put_back(sandbox: Sandbox, path: Any) -> None:
    """The config as it was."""
    (sandbox.files / "config").rename(path)


def bare(name: str, **tensors: torch.Tensor) -> Callable[[Sandbox], Sequence[Words]]:
    """One file of these tensors, `__` for a dot and `%` for the name."""

    def build(sandbox: Sandbox) -> Sequence[Words]:
        file = sandbox.files / "m.safetensors"
        save_file({key.replace("__", ".").replace("NAME", name): value for key, value in tensors.items()}, file)
        return [("inspect", file)]

    return build


def flux(edit: Callable[[Tensors], object]) -> Callable[[Sandbox], Sequence[Words]]:
    """A zoo of Flux LoRAs, the fused one changed."""

    def build(sandbox: Sandbox) -> Sequence[Words]:
        zoo = sandbox.copy("flux")
        held = load_file(zoo / "fused.safetensors")
        edit(held)
        save_file(held, zoo / "fused.safetensors")
        return [("inspect", zoo), ("fit", zoo, "-o", "out", "--rank", 1)]

    return build


def put(name: str, *shape: int, value: float = 1.0) -> Callable[[Tensors], object]:
    return lambda held: held.update({name: torch.full(shape, value)})


def layer(a: str, b: str, *shape: int) -> Callable[[Tensors], object]:
    """Another layer's two factors, of these names, both (shape)."""
    return lambda held: held.update({a: torch.ones(shape), b: torch.ones(shape[::-1])})


def called(name: str) -> Callable[[Tensors], object]:
    """Another layer of this name by kohya's keys."""
    return layer(f"lora_unet_{name}.lora_down.weight", f"lora_unet_{name}.lora_up.weight", 2, 2)


def as_is(held: object) -> None:
    """Leave it as it is."""


NAMES = {
    "escapes": "\x1b]52;c;YQ==\x07",
    "HTML": SCRIPT,
    "..": "../../../etc/passwd",
    "10^5 characters": "a" * 10**5,
    "50,000 dots": "a" + ".a" * 50_000,
    "50,000 levels": "a" + ".lora_a" * 10_000,
    "embeddings": "embed_" * 20_000 + "x",
    "two lines": "a\nb",
    "adapters": "a" + ".adapter" * 12_000 + "adapter" * 2_000,
    "processors": "a" + ".processor.qkv_lora" * 5_000,
}

ATTACKS = [
    Attack("factors, mlx: sound, as the control", mlx(), SAFE),
    *(
        Attack(f"factors, mlx: {what}", mlx(**changes), codes)
        for what, changes, codes in (
            ("a rank of 2^62", {"lora_parameters": {"rank": 2**62}}, REFUSED),
            ("a rank that is no number", {"lora_parameters": {"rank": "\x1b[2J"}}, REFUSED),
            ("a rank of 3 million", {"lora_parameters": {"rank": 3 * 10**6}}, REFUSED),
            ("a scale of NaN", {"lora_parameters": {"scale": NAN}}, REFUSED),
            ("a scale of 1e299", {"lora_parameters": {"scale": 1e299}}, ANY),
            ("a scale of 5000 digits", {"lora_parameters": {"scale": 10**4000}}, REFUSED),
            ("a scale that is a list", {"lora_parameters": {"scale": [[]]}}, REFUSED),
            ("an alpha that is an object", {"lora_parameters": {"alpha": {"a": "\x1b[2J"}}}, REFUSED),
            ("a kind that is an object", {"fine_tune_type": {"lora": 1}}, REFUSED),
            ("a base that is a path", {"model": "../../../etc/passwd"}, EITHER),
            ("a base of escapes", {"model": f"\x1b[2J{SCRIPT}"}, EITHER),
            ("a base of 10^6 characters", {"model": "a" * 10**6}, EITHER),
            ("nested without end", {"text": NESTED}, REFUSED),
            ("a list", {"text": "[]"}, REFUSED),
            ("a key twice", {"text": '{"lora_parameters": {"rank": 2}, "lora_parameters": {"rank": 2}}'}, REFUSED),
            ("a million keys of no layer", {"keys": ["x"] * 10**6}, EITHER),
        )
    ),
    *(
        Attack(f"factors, mlx: {what}", mlx(edit), codes)
        for what, edit, codes in (
            ("no axis", put("block.q.lora_a"), REFUSED),
            ("nine axes", put("block.q.lora_a", 1, 1, 1, 1, 1, 1, 1, 1, 1), REFUSED),
            ("rank 0", put("block.q.lora_a", 4, 0), REFUSED),
            ("ranks that differ", put("block.q.lora_a", 4, 3), REFUSED),
            ("an update of 4·10^12 values", layer("big.lora_a", "big.lora_b", 10**6, 2), EITHER),
            ("NaN", put("block.q.lora_a", 4, 2, value=NAN), ANY - SAFE),
            ("infinite", put("block.q.lora_b", 2, 5, value=INF), ANY - SAFE),
            ("integers", lambda held: held.update({"block.q.lora_a": torch.ones(4, 2).int()}), REFUSED),
            ("a factor alone", lambda held: held.pop("block.q.lora_b"), REFUSED),
            ("something else besides", put("\x1b[2J.weight", 2, 2), REFUSED),
        )
    ),
    *(
        Attack(f"factors, mlx: a layer called {what}", mlx(layer(f"{name}.lora_a", f"{name}.lora_b", 4, 2)), EITHER)
        for what, name in NAMES.items()
    ),
    *(
        Attack(f"factors, mlx: in the place of {file}: {what}", in_place(file, there))
        for file in ("adapters.safetensors", "adapter_config.json")
        for what, there in PLACES.items()
        if what not in ("a socket", "a link out of the folder")
    ),
    Attack("factors, PEFT: its config beside it, as the control", beside(put_back), SAFE),
    *(
        Attack(f"factors, PEFT: in the place of their config: {what}", beside(there))
        for what, there in PLACES.items()
        if what not in ("a socket", "a link out of the folder")
    ),
    Attack("factors, PEFT: the config is mlx-lm's", beside(lambda box, path: path.write_text('{"lora_parameters": {"rank": 2}}'))),
    *(
        Attack(f"factors: {tool}'s of a layer called {what}", bare(name, **{key: torch.ones(2, 2) for key in keys}))
        for tool, keys in {
            "PEFT": ("base_model__model__NAME__lora_A__weight", "base_model__model__NAME__lora_B__weight"),
            "torchtune": ("NAME__lora_a__weight", "NAME__lora_b__weight"),
            "loralib": ("NAME__lora_A", "NAME__lora_B"),
            "XLabs": ("NAME__processor__qkv_lora__down__weight", "NAME__processor__qkv_lora__up__weight"),
            "NeMo": ("NAME__adapter__linear_in__weight", "NAME__adapter__linear_out__weight"),
            "DeepSpeed-Chat": ("NAME__lora_right_weight", "NAME__lora_left_weight"),
            "Keras": ("NAME__lora_kernel_a", "NAME__lora_kernel_b"),
            "a whole model": ("NAME__lora_A__weight", "NAME__lora_B__weight", "NAME__base_layer__weight"),
        }.items()
        for what, name in NAMES.items()
    ),
    *(
        Attack(f"factors: 50,000 names like {name}", many_keys(name, 50_000), EITHER)
        for name in (
            *("x{}.lora_a", "x{}.lora_A", "base_model.model.x{}.lora_A.weight", "x{}.lora_x.y", "x{}.lora.base_layer.weight"),
            "unet:{}:up",
        )
    ),
    Attack("factors, Flux: sound, as the control", flux(as_is), SAFE),
    *(
        Attack(f"factors, Flux: {what}", flux(edit), codes)
        for what, edit, codes in (
            ("outputs that are no three parts", put(f"{FUSED}.lora_up.weight", 7, 2), REFUSED),
            ("a layer fused and apart", called("transformer_blocks_0_attn_to_q"), REFUSED),
            ("an alpha of NaN", put(f"{FUSED}.alpha", value=NAN), REFUSED),
            ("a name that no grammar has", called("\x1b[2J"), REFUSED),
            ("a tensor under the name of a part", put("transformer.transformer_blocks.0.attn.to_q.lora_A.weight", 2, 2), REFUSED),
            ("3e38 in B", put(f"{FUSED}.lora_up.weight", 6, 2, value=3e38), ANY),
        )
    ),
]  # fmt: skip
