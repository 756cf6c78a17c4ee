"""The keys of LoRA files for diffusion models: which tensor is which factor of which layer.

Four families of keys occur in single `.safetensors` files:

* kohya's: `lora_unet_<module, flattened>.lora_down.weight`, `.lora_up.weight` and `.alpha`; of text encoders `lora_te_`,
  `lora_te1_`, `lora_te2_`;
* diffusers': `unet.<module>.lora_A.weight` and `.lora_B.weight` with the pipeline's component in front (`text_encoder.`,
  `transformer.`), or nothing where one model saved its own adapter;
* diffusers' older: `.lora.down.weight`, `.lora_linear_layer.down.weight`, `.processor.to_q_lora.down.weight`, and `.up.`;
* the network's own names: ComfyUI's `diffusion_model.<module>`, `text_encoders.clip_l.transformer.<module>`, and DiffSynth's
  `<module>.lora_A.default.weight`, with the adapter's name.

A flattened name cannot be given its dots back without the model, so what a layer is called here is made of the flattened
name: the component, a dot, the name with underscores, and dots about each number. Layers of Stable Diffusion, Wan and Flux
have diffusers' names (`sgm_blocks`, `dit_blocks`). `lora_unet_`, `diffusion_model.` and no component at all mean the network
that denoises: diffusers' `unet`, or its `transformer` where the names are a transformer's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from eigenzoo.errors import FormatError, UnsupportedError
from eigenzoo.formats.lora import dit_blocks
from eigenzoo.formats.lora.sgm_blocks import to_diffusers

ALPHA = ".alpha"


def name_pattern(pattern: str) -> re.Pattern[str]:
    """Compile a pattern of tensors' names, in which a newline is a character like any other.

    >>> bool(name_pattern(".+[.]weight").fullmatch("a" + chr(10) + "b.weight"))
    True
    """
    return re.compile(pattern, re.DOTALL)


_FACTOR = name_pattern(
    r"(?P<stem>.+?)"
    r"(?:\.lora_(?P<ab>[AB])(?:\.(?P<adapter>[^.]+))?|\.lora_(?P<kohya>down|up)|\.(?:lora|lora_linear_layer)\.(?P<way>down|up)"
    r"|(?<=\.to_[qkv])_lora\.(?P<old>down|up)|(?<=\.to_out)_lora\.(?P<out>down|up))\.weight"
)
_SIDES = {"A": "A", "B": "B", "down": "A", "up": "B"}
_KOHYA = name_pattern(r"lora_(?P<part>unet|transformer|te[123]?)_(?P<name>.+)")
_KOHYA_COMPONENTS = {
    "unet": "unet",
    "transformer": "transformer",
    "te": "text_encoder",
    "te1": "text_encoder",
    "te2": "text_encoder_2",
    "te3": "text_encoder_3",
}
_COMPONENTS = frozenset(
    {*_KOHYA_COMPONENTS.values(), "transformer_2", "diffusion_model", "prior", "controlnet", "connectors"}
)
_COMFYUI_TEXT = {
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
}
_NETWORK = frozenset({"unet", "diffusion_model", ""})
"""Components that mean the network that denoises, whatever it is."""

_UNET = re.compile(r"(down|up|input|output)_blocks_\d|mid_block_|middle_block_", re.ASCII)
_PEFT = "base_model."

# What a text encoder's attention is called in diffusers' oldest files, after the name of the UNet's.
_OLD_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}

_MERGE = "merge it into its base model, save that with save_pretrained, and open it as a checkpoint"
# Of a file without a plain factor these names alone say that it is some LoRA; `diff` or `scale` may be anybody's.
_HINT = re.compile(r"^lora_|^lycoris_|\.lora_|\.hada_w|\.lokr_w|\.dora_scale$|\.on_input$")
_VARIANTS = (
    (name_pattern(r".+\.hada_[wt]\d(_[ab])?"), "LoHa, a product of two low-rank matrices entry by entry"),
    (name_pattern(r".+\.lokr_[wt]\d(_[ab])?"), "LoKr, a Kronecker product"),
    (name_pattern(r".+\.lora_mid\.weight"), "a convolution in Tucker form, with a core between the factors"),
    (name_pattern(r".+\.(dora_scale|lora_magnitude_vector(\..+)?)"), "DoRA: a magnitude per output rescales the whole weight"),
    (name_pattern(r".+\.(b?oft_[A-Za-z]+\d?(\..+)?|rescale)"), "OFT, a rotation of the base weights"),
    (name_pattern(r"(lora|lycoris)_.+\.(a1|a2|b1|b2|bm)\.weight"), "GLoRA, whose update depends on the base weights"),
    (name_pattern(r".+\.on_input"), "IA3, which scales the base weights"),
    (name_pattern(r".+\.(diff|diff_b|set_weight)"), "a whole weight's difference"),
    (name_pattern(r".+\.[wb]_norm"), "a norm's difference"),
    (name_pattern(r".+\.(lora_up|lora_down|lora_[AB])\.bias"), "a bias of its own on a factor"),
    (name_pattern(r"(lora|lycoris)_.+\.(scalar|scale)"), "a trained scale beside α"),
)  # fmt: skip


@dataclass(frozen=True)
class FactorKey:
    """One factor's key, taken apart.

    Attributes:
        side: A or B.
        stem: what the names of this layer's tensors have in common.
        component: the pipeline's component that the key names, empty where it names none.
        name: the module in that component as PEFT calls it; of kohya's keys, flattened.
        adapter: PEFT's name of the adapter, empty where the key has none.
        plain: whether the factor is called as PEFT does, `lora_A` or `lora_B`, which others than diffusion models' have too.
    """

    side: str
    stem: str
    component: str
    name: str
    adapter: str = ""
    plain: bool = False

    @property
    def module_stem(self) -> str:
        """The module as the key names it, its component included."""
        return self.stem.removesuffix("_lora")

    def module(self, network: str) -> str:
        """Return what the layer is called in every zoo; `network`, where known, is what denoises: `unet` or `transformer`."""
        component = self.component
        if component in _NETWORK:
            component = network or component.replace("diffusion_model", "unet")
        return _module(component, self.name)


# A zoo asks the same names again for each of its files.
@lru_cache(maxsize=16384)
def _module(component: str, name: str) -> str:
    flat = name.replace(".", "_")
    if component == "unet":
        flat = to_diffusers(flat)
    elif component.startswith("transformer"):
        flat = dit_blocks.to_diffusers(flat)
    elif component.startswith("text_encoder"):
        # Newer transformers have no such level in CLIP, and the same layers.
        flat = flat.removeprefix("text_model_")
    flat = f"{component}.{flat}" if component else flat
    return re.sub(r"(\.\d+)_", r"\1.", re.sub(r"_(\d+)(?=_|$)", r".\1", flat))


@dataclass
class FactorPair:
    """The keys of one layer, and how they name it."""

    component: str
    name: str
    keys: dict[str, str] = field(default_factory=dict)
    alpha: str | None = None


@lru_cache(maxsize=16384)
def split_key(key: str) -> FactorKey | None:
    """Take a factor's key apart; None for any other key.

    >>> split_key("lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight").module("")
    'text_encoder.encoder_layers.0.mlp_fc1'
    >>> split_key("unet.mid_block.attentions.0.proj_in.lora_A.weight").module("")
    'unet.mid_block_attentions.0.proj_in'
    """
    match = _FACTOR.fullmatch(key)
    if match is None or key.startswith(_PEFT):
        return None
    stem = match["stem"]
    side = _SIDES[match["ab"] or match["kohya"] or match["way"] or match["old"] or match["out"]]
    if (flat := _KOHYA.fullmatch(stem)) is not None and "." not in stem:
        return FactorKey(side, stem, _KOHYA_COMPONENTS[flat["part"]], flat["name"])
    component, name = _split_component(stem)
    name = name.replace(".processor.", ".")
    if match["old"] or match["out"]:
        parent, _, last = name.rpartition(".")
        if component.startswith("text_encoder"):
            last = _OLD_TEXT[last]
        name = f"{parent}.{last}.0" if last == "to_out" else f"{parent}.{last}"
        stem = f"{stem}_lora"
    return FactorKey(side, stem, component, name, match["adapter"] or "", match["ab"] is not None)


def _split_component(stem: str) -> tuple[str, str]:
    for prefix, component in _COMFYUI_TEXT.items():
        if stem.startswith(prefix):
            return component, stem.removeprefix(prefix)
    first, _, rest = stem.partition(".")
    return (first, rest) if first in _COMPONENTS and rest else ("", stem)


def is_refused_kind(names: Iterable[str]) -> bool:
    """Tell whether a file without a plain factor is another kind of adapter of a diffusion model, which is refused by name."""
    hints = [name for name in names if _HINT.search(name) and not name.startswith(_PEFT)]
    return any(pattern.fullmatch(name) for name in hints for pattern, _ in _VARIANTS)


def pair_factors(names: Iterable[str]) -> dict[str, FactorPair]:
    """Pair the factors of a file by what their layer is called; refuses whatever else belongs to a LoRA.

    Raises UnsupportedError for LyCORIS's and others' variants, FormatError for factors without their partner.
    """
    names = tuple(names)
    keys = {name: key for name in names if (key := split_key(name)) is not None}
    for name in names:
        if name not in keys and not name.endswith(ALPHA):
            _refuse_variant(name)
    adapters = sorted({key.adapter for key in keys.values()})
    if len(adapters) > 1:
        raise UnsupportedError(
            f"the file has factors of several adapters: {', '.join(map(repr, adapters[:5]))}",
            next_step="save each adapter to its own file",
        )
    network = _network_of(keys.values())
    pairs: dict[str, FactorPair] = {}
    stems: dict[str, str] = {}
    for name, key in keys.items():
        module = key.module(network)
        pair = pairs.setdefault(module, FactorPair(key.component, key.name))
        if key.side in pair.keys:
            raise FormatError(f"module {module!r} has two factors {key.side}: {pair.keys[key.side]!r} and {name!r}")
        pair.keys[key.side] = name
        stems[key.stem] = module
    for module, pair in pairs.items():
        if len(pair.keys) < 2:
            missing = "A (down)" if "B" in pair.keys else "B (up)"
            raise FormatError(
                f"the factor {missing} is missing",
                where=f"module {module[:200]!r}",
                rule="an update needs both factors",
            )
    _add_alphas([name for name in names if name not in keys], pairs, stems)
    return pairs


def weights_as_layers(names: Iterable[str]) -> dict[str, str]:
    """Return what LoRAs call the weights of a diffusion model, `<layer>.weight`, by the model's own names.

    >>> weights_as_layers(["unet.mid_block.attentions.0.proj_in.weight", "unet.conv_in.bias"])
    {'unet.mid_block.attentions.0.proj_in.weight': 'unet.mid_block_attentions.0.proj_in.weight'}
    """
    keys = {
        name: key
        for name in names
        if name.endswith(".weight") and (key := split_key(f"{name.removesuffix('.weight')}.lora_A.weight")) is not None
    }
    network = _network_of(keys.values())
    return {name: f"{key.module(network)}.weight" for name, key in keys.items()}


def _network_of(keys: Iterable[FactorKey]) -> str:
    """Tell by names what denoises: unet, transformer, or nothing where they do not say."""
    keys = list(keys)
    names = {key.name.replace(".", "_") for key in keys if key.component in _NETWORK}
    if any(key.component == "transformer" for key in keys):
        return "transformer"
    if any(_UNET.match(name) for name in names):
        return "unet"
    return "transformer" if any(map(dit_blocks.is_transformer, names)) else ""


def _add_alphas(others: Iterable[str], pairs: Mapping[str, FactorPair], stems: Mapping[str, str]) -> None:
    """Give every α to its layer; a key of a LoRA's own that is left is refused, and all other tensors are carried."""
    for name in others:
        stem = name.removesuffix(ALPHA)
        if stem != name and stem in stems:
            pairs[stems[stem]].alpha = name
        elif stem != name or "lora" in name.lower() or name.startswith("lycoris_"):
            raise UnsupportedError(
                f"{name[:200]!r} is not a factor of an update",
                rule="only updates of the form s·B·A are read",
                next_step="save it again without this tensor if the tensor has no effect; otherwise merge it into its base model",
            )


def _refuse_variant(name: str) -> None:
    meaning = _variant(name)
    if meaning is not None:
        raise UnsupportedError(
            f"{name[:200]!r} belongs to {meaning}", rule="only updates of the form s·B·A are read", next_step=_MERGE
        )


def _variant(name: str) -> str | None:
    """Return what other kind of adapter a tensor belongs to."""
    return next((meaning for pattern, meaning in _VARIANTS if pattern.fullmatch(name)), None)
