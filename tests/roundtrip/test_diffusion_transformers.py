"""LoRAs of tiny Wan and Flux transformers under the names of four tools: one zoo, and files that the tools' own loaders read."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusion_adapters import OUTPUT, deltas, quiet, state_of
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import eigenzoo as ez
from builders import random_factors
from eigenzoo.formats.lora.diffusion_keys import split_key
from eigenzoo.formats.opening import open_model
from tolerance import tolerance

with quiet():
    from diffusers import FluxPipeline, FluxTransformer2DModel, WanPipeline, WanTransformer3DModel

RANK, ALPHA = 2, 5.0

# What the networks' authors call the places of diffusers' blocks, written down from their constructors (`wan.modules.model`,
# `flux.modules.layers`) and from DiffSynth's (`wan_video_dit`, `flux_dit`).
WAN = {
    r"attn1\.to_([qkv])": r"self_attn.\1",
    r"attn1\.to_out\.0": "self_attn.o",
    r"attn2\.to_([qkv])": r"cross_attn.\1",
    r"attn2\.to_out\.0": "cross_attn.o",
    r"attn2\.add_([kv])_proj": r"cross_attn.\1_img",
    r"ffn\.net\.0\.proj": "ffn.0",
    r"ffn\.net\.2": "ffn.2",
}
WAN_OUTSIDE = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
    "proj_out": "head.head",
}
FLUX = {
    r"attn\.to_out\.0": ("img_attn.proj", "attn.a_to_out"),
    r"attn\.to_add_out": ("txt_attn.proj", "attn.b_to_out"),
    r"norm1\.linear": ("img_mod.lin", "norm1_a.linear"),
    r"norm1_context\.linear": ("txt_mod.lin", "norm1_b.linear"),
    r"ff\.net\.0\.proj": ("img_mlp.0", "ff_a.0"),
    r"ff\.net\.2": ("img_mlp.2", "ff_a.2"),
    r"ff_context\.net\.0\.proj": ("txt_mlp.0", "ff_b.0"),
    r"ff_context\.net\.2": ("txt_mlp.2", "ff_b.2"),
}
FLUX_SINGLE = {r"proj_out": ("linear2", "proj_out"), r"norm\.linear": ("modulation.lin", "norm.linear")}


def wan() -> nn.Module:
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=20,
        num_layers=2,
        image_dim=8,
        added_kv_proj_dim=24,
        rope_max_seq_len=32,
    )


def flux() -> nn.Module:
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
    )


@cache
def _state(family: str) -> Mapping[str, Tensor]:
    with torch.random.fork_rng(), quiet():
        torch.manual_seed(3)
        model = {"wan": wan, "flux": flux}[family]()
    draw = torch.Generator().manual_seed(5)
    return {name: 0.2 * torch.randn(values.shape, generator=draw) for name, values in model.state_dict().items()}


def make(family: str) -> nn.Module:
    """The network, always of the same weights, large enough that every layer is heard."""
    with torch.random.fork_rng(), quiet():
        model = {"wan": wan, "flux": flux}[family]().eval()
    model.load_state_dict(_state(family))
    return model


def wan_name(name: str, _: str) -> str:
    for ours, theirs in WAN.items():
        match = re.fullmatch(rf"(blocks\.\d+\.){ours}", name)
        if match:
            return re.sub(ours, theirs, name)
    return WAN_OUTSIDE[name]


def flux_name(name: str, tool: str) -> str:
    """As in the network of the authors, or DiffSynth's; q, k and v, which both fuse, are not among the layers here."""
    diffsynth = tool == "DiffSynth"
    blocks = {
        r"transformer_blocks\.(\d+)\.": ("blocks" if diffsynth else "double_blocks", FLUX),
        r"single_transformer_blocks\.(\d+)\.": ("single_blocks", FLUX_SINGLE),
    }
    for pattern, (block, places) in blocks.items():
        for ours, theirs in places.items():
            match = re.fullmatch(pattern + ours, name)
            if match:
                return f"{block}.{match[1]}.{theirs[diffsynth]}"
    raise KeyError(name)


@dataclass(frozen=True)
class Family:
    """A network, which of its layers have a LoRA, their original names, and diffusers' loader."""

    targets: str
    original: Callable[[str, str], str]
    pipeline: Any


FAMILIES = {
    "wan": Family(
        r"blocks\.\d+\.(attn[12]\.(to_([qkv]|out\.0)|add_[kv]_proj)|ffn\.net\.(0\.proj|2))", wan_name, WanPipeline
    ),
    "flux": Family(
        r"transformer_blocks\.\d+\.(attn\.to_(out\.0|add_out)|norm1(_context)?\.linear|ff(_context)?\.net\.(0\.proj|2))"
        r"|single_transformer_blocks\.\d+\.(proj_out|norm\.linear)",
        flux_name,
        FluxPipeline,
    ),
}
TOOLS = ("diffusers", "ComfyUI", "kohya", "DiffSynth")


def add_lora(family: str, seed: int, alpha: float) -> nn.Module:
    model, draw = make(family), torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(), quiet(), torch.no_grad():
        model.add_adapter(LoraConfig(r=RANK, lora_alpha=alpha, target_modules=FAMILIES[family].targets))
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draw))
    return model


def alpha_of(tool: str) -> float:
    """DiffSynth's files say no α, and its loader takes none (`GeneralLoRALoader.fuse_lora_to_base_model`)."""
    return RANK if tool == "DiffSynth" else ALPHA


def save_as(tool: str, family: str, model: nn.Module, path: Path, alpha: float) -> Path:
    """Write a model's adapter as a tool does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    original = FAMILIES[family].original
    for key, values in state_of(model).items():
        name, _, side = key.partition(".lora_")
        side = side[0]
        way = {"A": "down", "B": "up"}[side]
        if tool == "diffusers":
            tensors[f"transformer.{name}.lora_{side}.weight"] = values
            continue
        theirs = original(name, tool)
        if tool == "DiffSynth":
            tensors[f"{theirs}.lora_{side}.default.weight"] = values
        elif tool == "kohya":
            stem = f"lora_unet_{theirs.replace('.', '_')}"
            tensors |= {f"{stem}.lora_{way}.weight": values, f"{stem}.alpha": torch.tensor(alpha)}
        else:
            stem = f"diffusion_model.{theirs}"
            tensors |= {f"{stem}.lora_{way}.weight": values, f"{stem}.alpha": torch.tensor(alpha)}
    config = {"transformer.r": RANK, "transformer.lora_alpha": alpha, "transformer.target_modules": []}
    metadata = {"lora_adapter_metadata": json.dumps(config)} if tool == "diffusers" else {}
    save_file({key: values.contiguous() for key, values in tensors.items()}, path, {"format": "pt", **metadata})
    return path


def load_by_diffusers(family: str, path: Path) -> nn.Module:
    model, pipeline = make(family), FAMILIES[family].pipeline
    options = {"return_lora_metadata": True} | ({"return_alphas": True} if family == "flux" else {})
    with quiet():
        state, *alphas, metadata = pipeline.lora_state_dict(str(path.parent), weight_name=path.name, **options)
        alphas = {"network_alphas": alphas[0]} if family == "flux" else {}
        pipeline.load_lora_into_transformer(state, transformer=model, metadata=metadata, **alphas)
    return model


def load_as_diffsynth(family: str, path: Path) -> dict[str, Tensor]:
    """Every ΔW by `GeneralLoRALoader`'s arithmetic: mm(up, down), the adapter's name taken out of the key."""
    tensors = load_file(path)
    found = {}
    for name in original_names(family, "DiffSynth").items():
        up, down = (tensors[f"{name[1]}.lora_{side}.default.weight"] for side in "BA")
        found[f"transformer.{name[0]}"] = up @ down
    return found


@cache
def original_names(family: str, tool: str) -> dict[str, str]:
    names = [name for name, module in make(family).named_modules() if isinstance(module, nn.Linear)]
    chosen = [name for name in names if re.fullmatch(FAMILIES[family].targets, name)]
    return {name: FAMILIES[family].original(name, tool) for name in chosen}


def updates_of(tool: str, family: str, path: Path) -> dict[str, Tensor]:
    """Every ΔW by the tool's own reading of a file: diffusers' for all that it converts."""
    if tool == "DiffSynth":
        return load_as_diffsynth(family, path)
    return deltas({"transformer": load_by_diffusers(family, path)})


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], eps: float) -> None:
    assert set(found) == set(expected)
    for name, delta in expected.items():
        assert (found[name] - delta).norm() <= eps * delta.norm(), name


def module_of(name: str) -> str:
    key = split_key(f"{name}.lora_A.weight")
    assert key is not None
    return key.module("transformer")


ROUND_OFF = tolerance(RANK, dtype=torch.float32)
REBUILT = 1e-5
"""Of an update that went through float32 coefficients and a float32 basis."""


@dataclass(frozen=True)
class Zoo:
    """One file by each tool, and every ΔW by peft."""

    family: str
    folder: Path
    deltas: Mapping[str, Mapping[str, Tensor]]


@pytest.fixture(scope="module", params=FAMILIES)
def zoo(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    family, folder, found = request.param, tmp_path_factory.mktemp("zoo"), {}
    for seed, tool in enumerate(TOOLS):
        model = add_lora(family, seed, alpha_of(tool))
        found[tool] = deltas({"transformer": model})
        save_as(tool, family, model, folder / f"{tool}.safetensors", alpha_of(tool))
    return Zoo(family, folder, found)


@pytest.mark.parametrize("tool", TOOLS)
def test_the_files_are_what_the_tools_read(zoo: Zoo, tool: str) -> None:
    """Else equal updates of the rebuilt ones would say nothing of the originals."""
    assert_same(updates_of(tool, zoo.family, zoo.folder / f"{tool}.safetensors"), zoo.deltas[tool], ROUND_OFF)


def test_every_tools_names_are_one_zoo(zoo: Zoo) -> None:
    opened = ez.open_zoo(zoo.folder)
    assert sorted(opened.names) == sorted(TOOLS)
    assert (opened.view, opened.left_out, opened.warnings) == ("update", (), ())
    assert set(opened.layers) == {module_of(name) for name in zoo.deltas["diffusers"]}
    for model, name in zip(opened.models, opened.names, strict=True):
        for layer, delta in zoo.deltas[name].items():
            b_OR, a_RI = model.read_factors(module_of(layer))
            found = model.updates[module_of(layer)].scale * b_OR.double() @ a_RI.double()
            assert (found - delta).norm() <= ROUND_OFF * delta.norm(), (name, layer)


def test_rebuilt_files_are_what_the_originals_are_to_their_tools(tmp_path: Path, zoo: Zoo) -> None:
    """In their own names, from a bundle that needs no originals; and by diffusers' names, where dots come back."""
    space = ez.load(ez.fit(zoo.folder, rank=1.0).save(tmp_path / "bundle"))
    for tool in TOOLS:
        file = space.rebuild(tool).save(tmp_path / tool) / OUTPUT
        assert set(load_file(file)) == set(load_file(zoo.folder / f"{tool}.safetensors"))
        assert_same(updates_of(tool, zoo.family, file), zoo.deltas[tool], REBUILT)
        renamed = space.rebuild(tool).save(tmp_path / f"{tool}-renamed", format="diffusers") / OUTPUT
        assert_same(updates_of("diffusers", zoo.family, renamed), zoo.deltas[tool], REBUILT)


@pytest.mark.parametrize("family", FAMILIES)
def test_evidence_of_the_same_adapters_is_the_same_by_every_name(tmp_path: Path, family: str) -> None:
    found = []
    for kinds in (["diffusers"], ["kohya"], list(TOOLS)):
        folder = tmp_path / "-".join(kinds)
        for seed in range(4):
            model = add_lora(family, seed, RANK)
            save_as(kinds[seed % len(kinds)], family, model, folder / f"m{seed}.safetensors", RANK)
        document = ez.evidence(ez.open_zoo(folder, include=["*.0.*ff*"]), seed=0).to_dict()
        found.append(dict(sorted(leaves({**document, "seconds": 0}))))
    # A file's order of layers is the order of the sums over layers.
    for leaf, value in found[0].items():
        expected = pytest.approx(value, rel=1e-9, abs=1e-12) if isinstance(value, float) else value
        assert [other[leaf] for other in found] == [expected] * len(found), leaf
    assert all(other.keys() == found[0].keys() for other in found)


def leaves(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a document by their place in it."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from leaves(inner, f"{place}/{key}")
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from leaves(inner, f"{place}/{number}")
    else:
        yield place, value


def test_wans_layers_outside_its_blocks_are_called_as_diffusers_converts_them() -> None:
    names = {**WAN_OUTSIDE, "blocks.0.attn1.to_q": "blocks.0.self_attn.q"}
    state = {
        f"diffusion_model.{theirs}.lora_{side}.weight": torch.tensor([[float(number)]])
        for number, theirs in enumerate(names.values())
        for side in "AB"
    }
    with quiet():
        converted = WanPipeline.lora_state_dict(dict(state))
    ours = {int(values): split_key(key).module("transformer") for key, values in state.items() if "lora_A" in key}
    theirs = {int(values): split_key(key).module("") for key, values in converted.items() if "lora_A" in key}
    assert ours == theirs
    assert set(ours.values()) == {module_of(f"transformer.{name}") for name in names}


HIDDEN = 8
FUSED = {
    "double_blocks.0.img_attn.qkv": (3 * HIDDEN, HIDDEN),
    "double_blocks.0.txt_attn.qkv": (3 * HIDDEN, HIDDEN),
    "double_blocks.0.img_attn.proj": (HIDDEN, HIDDEN),
    "single_blocks.1.linear1": (3 * HIDDEN + 20, HIDDEN),
    "single_blocks.1.linear2": (HIDDEN, HIDDEN + 20),
}
"""Places of Flux by its authors' names, with what they fuse."""

SINGLE = "transformer.single_transformer_blocks.1"
APART = {
    "double_blocks.0.img_attn.qkv": [f"transformer.transformer_blocks.0.attn.to_{side}" for side in "qkv"],
    "double_blocks.0.txt_attn.qkv": [f"transformer.transformer_blocks.0.attn.add_{side}_proj" for side in "qkv"],
    "double_blocks.0.img_attn.proj": ["transformer.transformer_blocks.0.attn.to_out.0"],
    "single_blocks.1.linear1": [*(f"{SINGLE}.attn.to_{side}" for side in "qkv"), f"{SINGLE}.proj_mlp"],
    "single_blocks.1.linear2": [f"{SINGLE}.proj_out"],
}


def write_fused(path: Path, seed: int, tool: str = "kohya") -> dict[str, Tensor]:
    """A Flux LoRA with q, k and v in one; returns every ΔW by diffusers' names, its rows cut as its authors' forward cuts them."""
    tensors, found = {}, {}
    for name, (b_OR, a_RI) in random_factors(FUSED, RANK, seed).items():
        stem = f"lora_unet_{name.replace('.', '_')}" if tool == "kohya" else f"diffusion_model.{name}"
        tensors |= {
            f"{stem}.lora_down.weight": a_RI,
            f"{stem}.lora_up.weight": b_OR,
            f"{stem}.alpha": torch.tensor(ALPHA),
        }
        delta, outputs = ALPHA / RANK * b_OR.double() @ a_RI.double(), FUSED[name][0]
        names = APART[name]
        rows = [HIDDEN] * 3 + [outputs - 3 * HIDDEN] * (len(names) - 3) if len(names) > 1 else [outputs]
        found |= dict(zip(names, delta.split(rows), strict=True))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    return found


def write_apart(path: Path, seed: int) -> dict[str, Tensor]:
    """The same layers by diffusers' names, each with factors of its own."""
    shapes = {name: tuple(delta.shape) for name, delta in write_fused(path, seed).items()}
    factors = random_factors(shapes, RANK + 1, seed)
    tensors = {
        f"{name}.lora_{side}.weight": values
        for name, pair in factors.items()
        for side, values in zip("BA", pair, strict=True)
    }
    save_file(tensors, path)
    return {name: b_OR.double() @ a_RI.double() for name, (b_OR, a_RI) in factors.items()}


def layered(space: ez.Subspace, name: str, deltas_of: Mapping[str, Tensor]) -> None:
    rebuilt = space.rebuild(name)
    for layer, delta in deltas_of.items():
        b_OR, a_RI = rebuilt.factors(module_of(layer))
        assert (b_OR @ a_RI - delta).norm() <= REBUILT * delta.norm(), (name, layer)


def test_fused_layers_of_flux_are_cut_beside_files_that_have_them_apart(tmp_path: Path) -> None:
    """Bundles, projections, growth and processes see a model alike; what is written is diffusers', and loads there."""
    zoo = tmp_path / "zoo"
    expected = {"a": write_apart(zoo / "a.safetensors", 0), "b": write_fused(zoo / "b.safetensors", 1)}
    expected["c"] = write_fused(zoo / "c.safetensors", 2, "ComfyUI")
    opened = ez.open_zoo(zoo)
    assert opened.left_out == ()
    assert set(opened.layers) == {module_of(name) for name in expected["a"]}
    for model, name in zip(opened.models, opened.names, strict=True):
        for layer, delta in expected[name].items():
            b_OR, a_RI = model.read_factors(module_of(layer))
            found = model.updates[module_of(layer)].scale * b_OR.double() @ a_RI.double()
            assert (found - delta).norm() <= ROUND_OFF * delta.norm()
    alone = pickle.loads(pickle.dumps(opened.select(names=["b"])))
    assert set(alone.layers) == set(opened.layers)
    space = ez.load(ez.fit(opened, rank=1.0).save(tmp_path / "bundle"))
    expected["new"] = write_fused(tmp_path / "new.safetensors", 3)
    grown = space.add([tmp_path / "new.safetensors"], refresh=True)
    for name, deltas_of in expected.items():
        layered(grown, name, deltas_of)
        file = grown.rebuild(name).save(tmp_path / name) / OUTPUT
        assert sorted(load_file(file)) == sorted(f"{layer}.lora_{side}.weight" for layer in deltas_of for side in "AB")
        again = open_model(file)
        for layer, delta in deltas_of.items():
            b_OR, a_RI = again.read_factors(module_of(layer))
            assert (
                again.updates[module_of(layer)].scale * b_OR.double() @ a_RI.double() - delta
            ).norm() <= REBUILT * delta.norm()


def test_the_cut_of_a_fused_layer_is_diffusers_own(tmp_path: Path) -> None:
    """Of the blocks whose sizes diffusers' converter takes from the file; the others' it knows by the published model's."""
    deltas_of = write_fused(tmp_path / "b.safetensors", 1)
    tensors = {key: values for key, values in load_file(tmp_path / "b.safetensors").items() if "linear1" not in key}
    save_file(tensors, tmp_path / "b.safetensors")
    with quiet():
        state = FluxPipeline.lora_state_dict(str(tmp_path / "b.safetensors"))
    names = {key.partition(".lora_")[0] for key in state}
    assert names == {name for name in deltas_of if "single" not in name} | {f"{SINGLE}.proj_out"}
    for name in names:
        delta = state[f"{name}.lora_B.weight"].double() @ state[f"{name}.lora_A.weight"].double()
        assert (delta - deltas_of[name]).norm() <= ROUND_OFF * delta.norm()


def test_a_zoo_of_fused_files_alone_keeps_them_fused(tmp_path: Path) -> None:
    for seed in range(3):
        write_fused(tmp_path / "zoo" / f"m{seed}.safetensors", seed, ("kohya", "ComfyUI", "kohya")[seed])
    space = ez.fit(tmp_path / "zoo", rank=1.0)
    assert len(space.layers) == len(FUSED)
    written = load_file(space.rebuild("m1").save(tmp_path / "out") / OUTPUT)
    assert set(written) == set(load_file(tmp_path / "zoo" / "m1.safetensors"))


@pytest.mark.parametrize(
    "extra", ["lora_unet_final_layer_adaLN_modulation_1", "lora_te3_encoder_block_0_layer_0_SelfAttention_q"]
)
def test_a_fused_file_whose_names_are_not_all_certain_is_refused_with_a_step_that_works(
    tmp_path: Path, extra: str
) -> None:
    write_apart(tmp_path / "zoo" / "a.safetensors", 0)
    file = tmp_path / "zoo" / "b.safetensors"
    write_fused(file, 1)
    known = load_file(file)
    more = {f"{extra}.lora_down.weight": torch.ones(RANK, 4), f"{extra}.lora_up.weight": torch.ones(6, RANK)}
    save_file({**known, **more}, file)
    with pytest.raises(
        ez.UnsupportedError, match=r"b.safetensors: q, k and v are one layer in this file.*FluxPipeline.lora_state"
    ):
        ez.open_zoo(tmp_path / "zoo")
    # diffusers knows the sizes of `linear1` by the published model's.
    save_file({key: values for key, values in {**known, **more}.items() if "linear1" not in key}, file)
    with quiet():
        state = FluxPipeline.lora_state_dict(str(file))
    save_file({key: values.clone() for key, values in state.items()}, tmp_path / "new.safetensors")
    updates = open_model(tmp_path / "new.safetensors").updates
    assert set(updates) >= {module_of(name) for name in APART["double_blocks.0.img_attn.qkv"]}
    assert ("transformer.norm_out_linear" in updates) == ("adaLN" in extra)
