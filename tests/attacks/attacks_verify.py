"""`eigenzoo verify PATH --against BASE`: hostile adapters and bases, and configs by which PEFT would build and match."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from attack_runner import ANY, SAFE, Attack, Sandbox, Words
from attacks_configs import CANARY_MODULE, LONG, PATTERNS
from attacks_names import SCRIPT
from attacks_pickle import torch_pickle
from safetensors.torch import load_file, save_file

WEIGHTS = "adapter_model.safetensors"
DRY = "--no-dry-load"
UNDECIDED = frozenset({1})
"""What verify answers to a sound adapter that no library was asked about."""


def against(*flags: str, **changes: Any) -> Callable[[Sandbox], Sequence[Words]]:
    """An adapter whose config is changed, against a sound base; only its files are looked at."""

    def build(sandbox: Sandbox) -> Sequence[Words]:
        adapter = sandbox.copy("adapters") / "m0"
        path = adapter / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        return [("verify", adapter, "--against", sandbox.copy("base"), DRY, *flags)]

    return build


def long_names(**changes: Any) -> Callable[[Sandbox], Sequence[Words]]:
    """The same, with a module whose name makes a bad pattern slow, in the adapter and in the base."""

    def build(sandbox: Sandbox) -> Sequence[Words]:
        (words,) = against(**changes)(sandbox)
        for path in (sandbox.files / "adapters" / "m0" / WEIGHTS, sandbox.files / "base" / "model.safetensors"):
            tensors = load_file(path)
            save_file({name.replace("block.q", f"block.{LONG}!"): old for name, old in tensors.items()}, path)
        return [words]

    return build


def tensors_of(which: str, edit: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Sandbox], Sequence[Words]]:
    """An adapter or a base with other tensors."""

    def build(sandbox: Sandbox) -> Sequence[Words]:
        (words,) = against()(sandbox)
        path = sandbox.files / "adapters" / "m0" / WEIGHTS
        path = path if which == "adapter" else sandbox.files / "base" / "model.safetensors"
        tensors = load_file(path)
        edit(tensors)
        save_file(tensors, path, {"format": "pt"})
        return [words]

    return build


def many_modules(tensors: dict[str, torch.Tensor]) -> None:
    """Ten thousand modules that nobody has, each with a name that is near to others."""
    for number in range(10_000):
        name = f"base_model.model.block{number}.q{number}"
        tensors |= {f"{name}.lora_A.weight": torch.ones(2, 6), f"{name}.lora_B.weight": torch.ones(7, 2)}


def many_of_both(sandbox: Sandbox) -> Sequence[Words]:
    """Ten thousand modules, of a base too, and as many names and layers for them."""
    targets = [f"x{number}" for number in range(10_000)]
    layers = {"layers_to_transform": list(range(10_000)), "exclude_modules": [f"y{number}" for number in range(10_000)]}
    (words,) = tensors_of("adapter", many_modules)(sandbox)
    against(target_modules=targets, **layers)(sandbox)
    path = sandbox.files / "base" / "model.safetensors"
    more = {f"block{number}.q{number}.weight": torch.ones(7, 6) for number in range(10_000)}
    save_file({**load_file(path), **more}, path, {"format": "pt"})
    return [words]


def base_is(name: str) -> Callable[[Sandbox], Sequence[Words]]:
    """A base that is something else."""

    def build(sandbox: Sandbox) -> Sequence[Words]:
        adapter, base = sandbox.copy("adapters") / "m0", sandbox.files / "other"
        if name == "a pipe":
            os.mkfifo(base)
        elif name == "a pickle":
            base = base.with_suffix(".pt")
            torch_pickle(sandbox, base)
        elif name == "a link to a secret":
            base.mkdir()
            (base / "model.safetensors").symlink_to(sandbox.secret)
        elif name == "itself":
            base = adapter
        elif name == "a bundle":
            base = sandbox.copy("bundle")
        flags = ("--allow-pickle",) * (name == "a pickle")
        return [("verify", adapter, "--against", name if name.startswith(("/", "\x1b")) else base, *flags)]

    return build


def dry(
    changes: dict[str, Any] | None = None, base: dict[str, Any] | None = None, *, text: str | None = None
) -> Callable[[Sandbox], Sequence[Words]]:
    """A real adapter and base, with other entries in the configs of either, loaded by PEFT."""

    def build(sandbox: Sandbox) -> Sequence[Words]:
        adapter, model = sandbox.copy("llama_adapter"), sandbox.copy("llama")
        for path, entries in ((adapter / "adapter_config.json", changes), (model / "config.json", base)):
            path.write_text(json.dumps({**json.loads(path.read_text()), **(entries or {})}))
            for folder in (adapter, model, sandbox.work):
                if folder != sandbox.work:
                    (folder / "evil.py").write_text(CANARY_MODULE.format(canary=str(sandbox.canary)))
        if text is not None:
            (model / "config.json").write_text(text)
        return [("verify", adapter, "--against", model)]

    return build


def towers(sandbox: Sandbox) -> Sequence[Words]:
    """Two thousand modules, each below a name of its own, and a base with twenty thousand more names."""
    (words,) = dry()(sandbox)
    for path, names in (
        (sandbox.files / "llama_adapter" / WEIGHTS, None),
        (sandbox.files / "llama" / "model.safetensors", [f"t.x{n}.q_proj.weight" for n in range(20_000)]),
    ):
        held = load_file(path)
        if names is None:
            held = {
                f"base_model.model.t{n}.q_proj.lora_{side}.weight": torch.ones(*shape)
                for n in range(1_900)
                for side, shape in (("A", (2, 3)), ("B", (3, 2)))
            }
        else:
            held |= {name: torch.ones(3, 3) for name in names}
        save_file(held, path, {"format": "pt"})
    path = sandbox.files / "llama_adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "r": 2, "rank_pattern": {}}))
    return [words]


def pickled_base_of_adapter(sandbox: Sandbox) -> Sequence[Words]:
    """An adapter whose base is a folder of pickles and modules, which nobody is to follow."""
    other = sandbox.copy("llama", "other")
    torch_pickle(sandbox, other / "pytorch_model.bin")
    (other / "model.safetensors").unlink()
    (words,) = dry({"base_model_name_or_path": str(other), "revision": "../../.."})(sandbox)
    return [words]


def bundle_against(sandbox: Sandbox) -> Sequence[Words]:
    """A bundle of adapters whose names and config are hostile."""
    bundle = sandbox.copy("adapters_bundle")
    path = bundle / "manifest.json"
    document = json.loads(path.read_text())
    document["models"][0]["name"] = SCRIPT + "\x1b[2J"
    path.write_text(json.dumps(document))
    return [("verify", bundle, "--against", sandbox.copy("base"))]


BUILT: dict[str, dict[str, Any]] = {
    "10^8 layers": {"num_hidden_layers": 10**8},
    "as many layers as its tensors": {"num_hidden_layers": 256},
    "10^9 layers, listed by kind": {"model_type": "qwen2", "num_hidden_layers": 10**9, "architectures": []},
    "layers of 5000 digits": {"num_hidden_layers": int("9" * 4000)},
    "nine hundred levels": {"a": json.loads('{"a":' * 400 + "[" * 400 + "1" + "]" * 400 + "}" * 400)},
    "10^9 labels": {"num_labels": 10**9},
    "a width of 2^62": {"hidden_size": 2**62},
    "a width of 2^31": {"hidden_size": 2**31},
    "10^12 words": {"vocab_size": 10**12},
    "10^10 places": {"max_position_embeddings": 10**10},
    "10^9 heads": {"num_attention_heads": 10**9, "head_dim": 2},
    "no heads": {"num_attention_heads": 0},
    "negative sizes": {"hidden_size": -8, "intermediate_size": -8},
    "texts as sizes": {"hidden_size": "\x1b[2J"},
    "layers by stages": {
        "model_type": "swin",
        "architectures": ["SwinModel"],
        "depths": [10**9, 1],
        "num_heads": [1, 1],
    },
    "attention of 10^9 layers": {
        "model_type": "gpt_neo",
        "attention_types": [[["global", "local"], 10**9]],
        "num_layers": 2 * 10**9,
    },
    "layers of a part": {"model_type": "clip", "text_config": {"num_hidden_layers": 10**9}, "architectures": []},
    "an unknown kind with code": {
        "model_type": "evil",
        "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
        "trust_remote_code": True,
    },
    "a known kind with code": {
        "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil--x/y.Model"},
        "trust_remote_code": True,
    },
    "architectures that are functions": {"architectures": ["pipeline", "__import__", "os.system", "utils"]},
    "architectures of no text": {"architectures": [{"a": 1}, None, 7]},
    "architectures that are a number": {"architectures": 5},
    "architectures that are a text": {"architectures": "LlamaForCausalLM" * 1000},
    "10^5 architectures": {"architectures": [f"LlamaModel{n}" for n in range(10**5)]},
    "attention by a kernel of the hub": {"_attn_implementation": "evil/kernel"},
    "quantised by a library": {"quantization_config": {"quant_method": "awq", "bits": 4}},
    "an adapter of transformers' own": {"_name_or_path": "/etc", "adapter": "x", "base_model": "/etc/passwd"},
    "a type that is no torch dtype": {"torch_dtype": "system", "dtype": "load"},
    "rotations without end": {
        "rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 10**5, "factor": 1e308}
    },
}
"""Entries of a base's config that PEFT's own loading would build by."""

ADAPTERS: dict[str, dict[str, Any]] = {
    "a mapping to a module": {"auto_mapping": {"base_model_class": "Model", "parent_library": "evil"}},
    "a mapping to a function": {"auto_mapping": {"base_model_class": "pipeline", "parent_library": "transformers.x"}},
    "a task of no kind": {"task_type": "\x1b[2J"},
    "target modules that are slow": {"target_modules": "(a+)+$"},
    "10^5 target modules": {"target_modules": [f"m{number}" for number in range(100_000)]},
    "10^5 layers to transform": {"layers_to_transform": list(range(100_000))},
    "10^5 modules to save": {"modules_to_save": [f"m{number}" for number in range(100_000)]},
    "layers pattern that is slow": {
        "layers_to_transform": [0],
        "layers_pattern": "(l|l)*x",
        "target_modules": ["q_proj"],
    },
    "an expression in modules_to_save": {"modules_to_save": ["(.*)*x"]},
    "an expression in exclude_modules": {"exclude_modules": "(.*)*x"},
    "a rank of 10^12": {"r": 10**12},
    "a rank pattern of 10^12": {"rank_pattern": {"q_proj": 10**12}},
    "an embedding of rank 2·10^7 that no factor is for": {
        "rank_pattern": {"embed_tokens": 2 * 10**7},
        "target_modules": ["q_proj", "v_proj", "embed_tokens"],
    },
    "10^4 rank patterns": {"rank_pattern": {f"m{number}": 2 for number in range(10_000)}},
    "10^4 layers": {"layers_to_transform": list(range(900)), "layers_pattern": [f"x{n}" for n in range(100)]},
    "a dropout of a text": {"lora_dropout": "x"},
    "a config of Megatron": {"megatron_config": {}, "megatron_core": "evil"},
    "a runtime config": {"runtime_config": {"ephemeral_gpu_offload": True}},
    "eva with data": {"eva_config": {"rho": 10**9}, "init_lora_weights": "eva"},
    "parameters that are no modules": {"target_modules": [], "modules_to_save": ["lm_head"] * 1000},
}
"""Entries of an adapter's config that PEFT's own loading reads."""

WAN: dict[str, Any] = {
    "_class_name": "WanTransformer3DModel",
    "num_layers": 1,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 8,
    "freq_dim": 8,
    "ffn_dim": 16,
    "patch_size": [1, 2, 2],
    "rope_max_seq_len": 32,
}
"""The config of a transformer of Wan's, small."""


def of_diffusion(
    entries: dict[str, Any] | None = None,
    change: Callable[[dict[str, torch.Tensor]], object] = dict,
    index: dict[str, Any] | None = None,
) -> Callable[[Sandbox], Sequence[Words]]:
    """A LoRA and the transformer that it changes, with other entries in its config, other tensors, or as a pipeline."""

    def build(sandbox: Sandbox) -> Sequence[Words]:
        base = sandbox.files / "wan"
        folder = base if index is None else base / "transformer"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({**WAN, **(entries or {})}))
        weights = {"blocks.0.attn1.to_q.weight": torch.ones(24, 24), "blocks.0.attn1.to_k.weight": torch.ones(24, 24)}
        save_file(weights, folder / "diffusion_pytorch_model.safetensors")
        if index is not None:
            (base / "model_index.json").write_text(json.dumps(index))
            (base / "evil.py").write_text(CANARY_MODULE.format(canary=str(sandbox.canary)))
        stem = "transformer.blocks.0.attn1.to_q"
        factors = {f"{stem}.lora_A.weight": torch.ones(2, 24), f"{stem}.lora_B.weight": torch.ones(24, 2)}
        change(factors)
        save_file(factors, sandbox.files / "lora.safetensors")
        return [("verify", sandbox.files / "lora.safetensors", "--against", base)]

    return build


def added(**tensors: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], object]:
    """More tensors; of a name `__` is a dot."""
    return lambda held: held.update({name.replace("__", "."): tensor for name, tensor in tensors.items()})


def in_blocks(*numbers: str) -> Callable[[dict[str, torch.Tensor]], object]:
    """Nothing but layers of blocks of these numbers, in Wan's own names, which diffusers converts."""

    def change(held: dict[str, torch.Tensor]) -> None:
        held.clear()
        for number in numbers:
            stem = f"diffusion_model.blocks.{number}.self_attn.q"
            held |= {f"{stem}.lora_A.weight": torch.ones(2, 24), f"{stem}.lora_B.weight": torch.ones(24, 2)}

    return change


BUILT_BY_DIFFUSERS: dict[str, dict[str, Any]] = {
    "10^9 layers": {"num_layers": 10**9},
    "10^9 heads": {"num_attention_heads": 10**9},
    "a width of 2^62": {"ffn_dim": 2**62},
    "texts as sizes": {"in_channels": "\x1b[2J"},
    "a class of another library": {"_class_name": "os.system"},
    "a class that is no model": {"_class_name": "WanPipeline"},
    "a class of all pipelines": {"_class_name": "DiffusionPipeline"},
    "code of its own": {"auto_map": {"AutoModel": "evil.Model"}, "_class_name": "evil.Model"},
    "positions without end": {"rope_max_seq_len": 10**9},
    "quantised by a library": {"quantization_config": {"quant_method": "bitsandbytes"}},
    "no class": {"_class_name": None},
}
"""Entries of a component's config that diffusers would build by."""

LORAS: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    "escapes in names": added(**{"transformer__blocks__0__x\x1b[2J__lora_A__weight": torch.ones(2, 24)}),
    "names of kohya beside": added(lora_unet_blocks_0_self_attn_q__lora_down__weight=torch.ones(2, 24)),
    "original names beside": added(diffusion_model__blocks__0__self_attn__q__lora_A__weight=torch.ones(2, 24)),
    "a block of 10^9": added(
        diffusion_model__blocks__999999999__self_attn__q__lora_A__weight=torch.ones(2, 24),
        diffusion_model__blocks__999999999__self_attn__q__lora_B__weight=torch.ones(24, 2),
    ),
    "ten thousand modules": added(
        **{f"transformer__x{n}__lora_{side}__weight": torch.ones(2, 2) for n in range(10_000) for side in "AB"}
    ),
    "patterns in names": added(
        **{f"transformer__(a+)+(b+)+{side}__lora_{side}__weight": torch.ones(2, 2) for side in "AB"}
    ),
    **{
        f"blocks from 0 to {last}": in_blocks("0", last)
        for last in ("999999999", "9_999_999_99", "+9_999_999_99", "９９９９９９９９９")
    },
    "a thousand modules, most of which are nobody's": added(
        **{f"transformer__x{n}__lora_{side}__weight": torch.ones(2, 2) for n in range(990) for side in "AB"}
    ),
}
"""Tensors beside a LoRA's own, which diffusers would sort, convert and match."""

INDEXES: dict[str, dict[str, Any]] = {
    "a pipeline of its own": {
        "_class_name": ["evil", "Pipeline"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
    },
    "a component of its own": {"_class_name": "WanPipeline", "transformer": ["evil", "Model"]},
    "a component of transformers": {"_class_name": "WanPipeline", "transformer": ["transformers", "pipeline"]},
    "no component": {"_class_name": "WanPipeline", "transformer": [None, None]},
}
"""Indexes of pipelines."""

ATTACKS = [
    Attack("verify: sound and undecided, as the control", against(), UNDECIDED),
    Attack("verify: sound with diffusers, as the control", of_diffusion(), SAFE, adapt=True),
    *(
        Attack(f"verify, built by diffusers: {what}", of_diffusion(entries), ANY, adapt=True)
        for what, entries in BUILT_BY_DIFFUSERS.items()
    ),
    *(
        Attack(f"verify, loaded by diffusers: {what}", of_diffusion(change=change), ANY, adapt=True)
        for what, change in LORAS.items()
    ),
    *(
        Attack(f"verify, a pipeline's index: {what}", of_diffusion(index=index), ANY, adapt=True)
        for what, index in INDEXES.items()
    ),
    Attack("verify: sound with PEFT, as the control", dry(), SAFE, adapt=True),
    *(
        Attack(f"verify: target_modules: {what}", long_names(target_modules=next(iter(pattern))), ANY)
        for what, pattern in PATTERNS.items()
    ),
    *(
        Attack(f"verify: {key}: a slow expression", long_names(target_modules=None, **{key: value}), ANY)
        for key, value in {
            "exclude_modules": "(.*a)*(.*a)*!x",
            "modules_to_save": [".*.*.*.*.*.*.*x"],
            "layers_pattern": ["(a+)+"],
        }.items()
    ),
    Attack("verify: 10^5 target modules", against(target_modules=[f"m{number}" for number in range(10**5)]), ANY),
    Attack("verify: target modules of numbers", against(target_modules=[1, None]), ANY),
    Attack("verify: escapes for target modules", against(target_modules=["\x1b]52;c;YQ==\x07", SCRIPT]), ANY),
    Attack("verify: layers of 10^400", against(layers_to_transform=[10**400], target_modules=["q"]), ANY),
    Attack("verify: NaN as alpha", against(lora_alpha=float("nan")), ANY),
    Attack(
        "verify: a base elsewhere", against(base_model_name_or_path="../../etc/passwd", revision="../.."), UNDECIDED
    ),
    Attack("verify: a base named by escapes", against("--json", base_model_name_or_path="\x1b[2J\n"), UNDECIDED),
    Attack("verify: ten thousand modules that nobody has", tensors_of("adapter", many_modules), ANY),
    Attack("verify: ten thousand modules and names", many_of_both, ANY),
    Attack(
        "verify: factors of NaN", tensors_of("adapter", lambda t: [old.fill_(float("nan")) for old in t.values()]), ANY
    ),
    Attack("verify: factors of 1e38", tensors_of("adapter", lambda t: [old.fill_(1e38) for old in t.values()]), ANY),
    Attack("verify: a base of NaN", tensors_of("base", lambda t: [old.fill_(float("nan")) for old in t.values()]), ANY),
    Attack("verify: a base of zeros", tensors_of("base", lambda t: [old.zero_() for old in t.values()]), ANY),
    Attack(
        "verify: a base of names with escapes",
        tensors_of("base", lambda t: t.update({f"\x1b[2J{n}\n.weight": torch.ones(7, 6) for n in range(50)})),
        ANY,
    ),
    Attack(
        "verify: a base of empty weights",
        tensors_of("base", lambda t: t.update({"block.q.weight": torch.ones(7, 0)})),
        ANY,
    ),
    *(
        Attack(f"verify: the base is {name}", base_is(name))
        for name in (
            *("a pipe", "a pickle", "a link to a secret", "itself", "a bundle", "nothing"),
            *("/dev/zero", "/dev", "\x1b[2J", "/" + "a" * 5000),
        )
    ),
    *(Attack(f"verify, built by PEFT: {what}", dry(base=entries), ANY, adapt=True) for what, entries in BUILT.items()),
    *(Attack(f"verify, loaded by PEFT: {what}", dry(entries), ANY, adapt=True) for what, entries in ADAPTERS.items()),
    *(
        Attack(f"verify, config.json of the base: {what}", dry(text=text), ANY, adapt=True)
        for what, text in {
            "nested without end": '{"a":' * 100_000 + "1" + "}" * 100_000,
            "15 MB of brackets": '{"model_type": "llama", "a": [' + "[]," * 5 * 10**6 + "[]]}",
            "a list": "[]",
            "a key twice": '{"model_type": "llama", "model_type": "bert"}',
            "no JSON": "\0" * 100,
        }.items()
    ),
    Attack("verify: two thousand towers", towers, ANY, adapt=True),
    Attack("verify: the adapter's base is a folder of pickles", pickled_base_of_adapter, ANY, adapt=True),
    Attack("verify: a bundle whose models have hostile names", bundle_against, ANY),
]
