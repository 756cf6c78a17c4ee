"""Which tool wrote a file of LoRA factors, told by the names of its tensors: factors are never read as weights.

A → MA, B → BM⁻¹ changes no update and all of its factors: means and directions of factors as if they were weights say nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from eigenzoo.errors import UnsupportedError
from eigenzoo.formats.lora import dit_blocks
from eigenzoo.formats.lora.config import CONFIG_FILE
from eigenzoo.formats.lora.diffusion_keys import ALPHA, FactorKey, is_refused_kind, name_pattern, split_key

PEFT, DIFFUSION, MLX = "PEFT", "diffusion", "mlx-lm"
"""The kinds that are read."""

_PEFT = "base_model."
# What every factor's name has in it, and few weights' names: a look at each name of a zoo has to be cheap.
_MARK = re.compile(r"lora|adapter\w{0,40}\.linear_|:\d+:", re.IGNORECASE)
_EMBEDDING = name_pattern(r"(?P<module>.+)\.lora_embedding_[AB](\.[^.]+)?")
_MLX = name_pattern(r"(?P<module>.+)\.lora_[ab]")
# PEFT's other kinds, whose config says which.
_TUNER = name_pattern(
    r".+\.(hada|lokr|ia3|b?oft|vera|randlora|vblora|fourierft|hra|c3a|miss|bone|road|waveft|shira|delora|trainable_tokens)_.+"
)
# Places in diffusion transformers alone: vision transformers have `attn.qkv`, `attn.proj` and `mlp` in `blocks`.
_BLOCK = re.compile(
    r"\w+_blocks\.\d+\.|blocks\.\d+\.(?!attn\.(qkv|proj)$|mlp\.)|(layers|\w+_refiner)\.\d+\.attention\.(to_|qkv$|out$)",
    re.ASCII,
)
# Language models whose modules begin like a component of a pipeline: GPT-2, Falcon, Bloom, ChatGLM, MPT.
_LANGUAGE = re.compile(
    r"transformer\.((h|encoder)\..+|wte|wpe|word_embeddings|blocks\.\d+\.(attn\.(Wqkv|out_proj)|ffn\.(up|down|gate)_proj))",
    re.ASCII,
)
# PEFT saves these weights whole beside the factors of an adapter that trains them.
_SAVED_WHOLE = name_pattern(r"(.+\.)?(lm_head|wte|embed_\w+|\w*embeddings?)")

_PARAMETRIZED = ".parametrizations.weight.original"
_WHOLE_NEXT = (
    "merge it, with merge_and_unload() of PEFT for instance, save the model with save_pretrained, and open that; or save the "
    "adapter alone with save_pretrained of the PEFT model"
)


@dataclass(frozen=True)
class Tool:
    """A tool whose factors are refused by name.

    Attributes:
        name: the tool's.
        pattern: of a factor's name, with the group `module`.
        next_step: what to do with such a file.
        alone: whether whole models may have modules of such names too, so that they are factors where nothing else is beside them.
    """

    name: str
    pattern: re.Pattern[str]
    next_step: str
    alone: bool = False


TOOLS = (
    Tool(
        "XLabs's trainer for Flux",
        name_pattern(r"(?P<module>.+\.processor\.(qkv|proj)_lora\d?)\.(down|up)\.weight"),
        "convert it with diffusers: state = FluxPipeline.lora_state_dict(file); "
        "save_file({key: values.clone() for key, values in state.items()}, new_file); and open that",
    ),
    Tool(
        "torchtune",
        name_pattern(r"(?P<module>.+)\.lora_[ab]\.weight"),
        f"open the folder with adapter_model.safetensors and {CONFIG_FILE}, which torchtune's FullModelHFCheckpointer saves too",
    ),
    Tool(
        "LitGPT",
        name_pattern(r"(?P<module>(transformer\.h\.\d+\..+|lm_head))\.lora_[AB]"),
        "run litgpt merge_lora and litgpt convert_from_litgpt on its folder, and open the result as a checkpoint",
    ),
    Tool(
        "loralib",
        name_pattern(r"(?P<module>.+)\.lora_[AB]"),
        "write it as PEFT's: put base_model.model. before these names, add .weight, save it as adapter_model.safetensors, "
        f'and beside it an {CONFIG_FILE} with {{"peft_type": "LORA", "r": …, "lora_alpha": …, "target_modules": […]}} as '
        "it was trained",
    ),
    Tool(
        "cloneofsimo's trainer",
        name_pattern(r"(?P<module>(unet|text_encoder):\d+):(up|down)"),
        "merge it with the tool that wrote it, whose files name no layers: lora_add BASE FILE OUT 1.0 --mode upl; and open OUT",
    ),
    Tool(
        "NeMo",
        name_pattern(r"(?P<module>.+)\.\w{0,40}adapter\w{0,40}\.linear_(in|out)(\.weight)?"),
        "export it to PEFT with NeMo (llm.export_ckpt with target='hf-peft'), and open the folder that it writes",
        alone=True,
    ),
    Tool(
        "DeepSpeed-Chat",
        name_pattern(r"(?P<module>.+)\.lora_(right|left)_weight"),
        "fuse it with DeepSpeed-Chat's convert_lora_to_linear_layer, save the model with save_pretrained, and open that",
    ),
    Tool(
        "Keras",
        name_pattern(r"(?P<module>.+)[./]lora_(kernel|embeddings)_[ab]"),
        "add each product a·b to its weight, as Keras does, and open the whole model, saved as safetensors",
    ),
)  # fmt: skip


def factor_kind(names: Collection[str], where: str) -> str | None:
    """Return which kind of LoRA factors a file holds, PEFT, DIFFUSION or MLX; None where it holds full weights.

    Raises UnsupportedError for a whole model with a LoRA that is not merged, and for factors of a tool that are not read.
    """
    marked = [name for name in names if _MARK.search(name)]
    keys = [key for name in marked if (key := split_key(name)) is not None]
    if keys and not any(name.startswith(_PEFT) for name in marked) and _is_diffusion(keys, names):
        _refuse_whole(names, {key.module_stem for key in keys}, where)
        return DIFFUSION
    for kind, module_of in _OTHERS:
        stems = [stem for name in marked if (stem := module_of(name)) is not None]
        if not stems:
            continue
        _refuse_whole(names, {stem for stem in stems if not _SAVED_WHOLE.fullmatch(stem)}, where)
        if isinstance(kind, Tool):
            if kind.alone and len(stems) < len(names):
                continue
            raise UnsupportedError(
                f"the file has LoRA factors as {kind.name} writes them",
                where=where,
                rule="factors are read only as updates, if their scale and layers are known, and never as weights",
                next_step=kind.next_step,
            )
        return kind
    if any(name.startswith(_PEFT) and _TUNER.fullmatch(name) for name in names) or list(names) == ["prompt_embeddings"]:
        return PEFT
    return DIFFUSION if is_refused_kind(names) else None


def _peft_module(name: str) -> str | None:
    """The module of a factor by PEFT's names, with or without its prefix."""
    match = _EMBEDDING.fullmatch(name)
    if match is not None:
        return match["module"]
    key = split_key(name.removeprefix(_PEFT))
    return None if key is None else name[: len(name) - len(name.removeprefix(_PEFT))] + key.module_stem


def _matched(pattern: re.Pattern[str]) -> Callable[[str], str | None]:
    def module_of(name: str) -> str | None:
        match = pattern.fullmatch(name)
        return None if match is None else match["module"]

    return module_of


_OTHERS: tuple[tuple[str | Tool, Callable[[str], str | None]], ...] = (
    (PEFT, _peft_module),
    (MLX, _matched(_MLX)),
    *((tool, _matched(tool.pattern)) for tool in TOOLS),
)


def _is_diffusion(keys: Iterable[FactorKey], names: Collection[str]) -> bool:
    """Tell LoRAs of diffusion models from PEFT's factors without their prefix, whose scale only a config says."""
    keys = [key for key in keys if not (key.plain and _LANGUAGE.fullmatch(key.module_stem))]
    plain = {key.module_stem for key in keys if key.plain}
    return (
        any(key.component or not key.plain for key in keys)
        or any(f"{stem}{ALPHA}" in names for stem in plain)
        or any(_BLOCK.match(stem) or dit_blocks.is_transformer(stem.replace(".", "_")) for stem in plain)
    )


def _refuse_whole(names: Collection[str], stems: Collection[str], where: str) -> None:
    """Refuse a file that also holds the weights that its factors belong to."""
    for name in names:
        if name.endswith((".weight", _PARAMETRIZED)) and is_weight_of(name, stems):
            raise UnsupportedError(
                "the LoRA of this whole model is not merged into its weights",
                where=where,
                rule=f"weights and LoRA factors in one file, such as {name[:100]!r}, are neither a checkpoint nor an adapter",
                next_step=_WHOLE_NEXT,
            )


def is_weight_of(name: str, stems: Collection[str]) -> bool:
    """Tell whether a tensor is the weight of one of these modules, or of the module that a LoRA's wrapper holds."""
    if name.endswith(_PARAMETRIZED):
        return f"{name.removesuffix('original')}0" in stems
    module = name.removesuffix(".weight")
    return module in stems or (
        module.endswith((".base_layer", ".linear", ".to_wrap")) and module.rpartition(".")[0] in stems
    )
