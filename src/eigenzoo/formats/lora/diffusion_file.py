"""A LoRA of a diffusion model: one `.safetensors` file with kohya's or diffusers' keys (`diffusion_keys`), and no config.

The scale of a layer is α / rank, with α the tensor `<layer>.alpha`; where the file has none, what `lora_adapter_metadata` in
the header says, a LoraConfig of PEFT for each component, which diffusers writes since 0.34; without that α = rank.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch

from eigenzoo.errors import FormatError, UnsupportedError
from eigenzoo.formats.checkpoint import SafetensorsModel, StateDict
from eigenzoo.formats.json_file import parse_json
from eigenzoo.formats.lora.config import AS_FLOATS, check_config
from eigenzoo.formats.lora.diffusion_keys import FactorPair, pair_factors
from eigenzoo.formats.model import LoraUpdate, TensorInfo
from eigenzoo.formats.safetensors.header import HeaderContents
from eigenzoo.weights.lora_scale import lora_rank, lora_scale

METADATA_KEY = "lora_adapter_metadata"
"""Under which diffusers keeps the components' configs in the header."""

MAX_TEXT = 4096
"""Characters of an entry of the header that is carried: a trainer's settings are short, its statistics of captions are not."""

ALPHA_DTYPES = (
    *(torch.float64, torch.float32, torch.bfloat16, torch.float16),
    *(torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8),
)
"""Of an α; diffusers writes integers."""


class DiffusionLora(SafetensorsModel):
    """One LoRA of a diffusion model; its updates are given by module, everything else in the file is carried through.

    Modules are called alike whatever the file's keys: `unet.down_blocks.0.attentions.1.…attn1_to_q`. Of the header's strings the
    short ones are carried.

    Args:
        opened: the file, opened as plain tensors.
    """

    format = "diffusion-lora"

    def __init__(self, opened: StateDict) -> None:
        self.path, self.name = opened.path, opened.name
        self.take_beside(opened.beside)
        self.take_files(opened.files)
        (only,) = opened.files.values()
        texts = {key: text for key, text in only.metadata.items() if len(text) <= MAX_TEXT or key == METADATA_KEY}
        self.metadata = MappingProxyType({only.file: texts})
        try:
            pairs = pair_factors(only.tensors)
            keys = [pair.alpha for pair in pairs.values() if pair.alpha is not None]
            for key in keys:
                _check_alpha(only.tensors[key])
            alphas = dict(zip(keys, only.read_scalars(keys), strict=True))
            parsed = _parsed_updates(only.contents, pairs, alphas)
        except FormatError as error:
            raise error.at(str(self.path)) from error.__cause__
        self.take_updates(parsed)

    def take_updates(self, parsed: ParsedUpdates) -> None:
        """Take the updates of the file, or those that another view of its header has."""
        self.parsed = self.likeness = parsed
        self.warnings = (*self.beside.notes, *parsed.warnings)

    @property
    def updates(self) -> Mapping[str, LoraUpdate]:
        """The updates by module, in the order of the file."""
        return self.parsed.updates


@dataclass(frozen=True, eq=False)
class ParsedUpdates:
    """The updates of all files whose headers and α agree."""

    updates: Mapping[str, LoraUpdate]
    contents: HeaderContents
    warnings: tuple[str, ...]


_parsed: WeakKeyDictionary[HeaderContents, WeakValueDictionary[str, ParsedUpdates]] = WeakKeyDictionary()


def _parsed_updates(
    contents: HeaderContents, pairs: Mapping[str, FactorPair], alphas: Mapping[str, float]
) -> ParsedUpdates:
    """Find the updates of a file, or give those that an open file of the same header and α has."""
    by_text = _parsed.setdefault(contents, WeakValueDictionary())
    text = json.dumps(alphas)
    parsed = by_text.get(text)
    if parsed is None:
        updates, warnings = find_updates(contents.tensors, contents.metadata, pairs, alphas)
        parsed = by_text[text] = ParsedUpdates(MappingProxyType(updates), contents, warnings)
    return parsed


def find_updates(
    tensors: Mapping[str, TensorInfo],
    metadata: Mapping[str, str],
    pairs: Mapping[str, FactorPair],
    alphas: Mapping[str, float],
) -> tuple[dict[str, LoraUpdate], tuple[str, ...]]:
    """Give each pair of factors its shape and scale; also warnings.

    Args:
        tensors: what the header says of them.
        metadata: the header's strings.
        pairs: by module (`pair_factors`).
        alphas: the values of the α by key.
    """
    configs, warnings = component_configs(metadata, {pair.component for pair in pairs.values()})
    if configs and alphas:
        raise FormatError(
            f"the file has both tensors of α and {METADATA_KEY} in its header",
            rule="a file states its scale once",
            next_step="remove one of them; diffusers also refuses a file with both",
        )
    updates = {}
    for module, pair in pairs.items():
        factor_a, factor_b = tensors[pair.keys["A"]], tensors[pair.keys["B"]]
        try:
            rank = _rank(factor_a, factor_b)
            scale = _scale(pair, rank, configs.get(pair.component), alphas)
        except FormatError as error:
            raise error.at(f"module {module[:200]!r}") from error.__cause__
        shape = (factor_b.shape[0], prod(factor_a.shape[1:]))
        shapes = (factor_a.shape, factor_b.shape)
        updates[module] = LoraUpdate(module, factor_a.name, factor_b.name, shape, rank, scale, shapes, pair.alpha)
    num_zeros = sum(alpha == 0 for alpha in alphas.values())
    if num_zeros:
        warnings += (
            f"{num_zeros} layers have α = 0, which diffusers reads as no change (kohya's trainer reads it as α = rank)",
        )
    return updates, warnings


def component_configs(
    metadata: Mapping[str, str], components: set[str]
) -> tuple[dict[str, dict[str, Any]], tuple[str, ...]]:
    """Read the components' configs out of a header; refuses one that describes more than plain LoRA.

    Returns the configs of those components that have one, and warnings.
    """
    if METADATA_KEY not in metadata:
        return {}, ()
    document = parse_json(metadata[METADATA_KEY].encode("utf-8"), where=METADATA_KEY)
    configs: dict[str, dict[str, Any]] = {}
    warnings: tuple[str, ...] = ()
    for component in sorted(components):
        prefix = f"{component}." if component else ""
        config = {key.removeprefix(prefix): value for key, value in document.items() if key.startswith(prefix)}
        if not config:
            continue
        try:
            warnings += check_config({"peft_type": "LORA", **config})
        except FormatError as error:
            raise error.at(f"{METADATA_KEY}, {component}") from error.__cause__
        configs[component] = config
    return configs, tuple(dict.fromkeys(warnings))


def _scale(pair: FactorPair, rank: int, config: Mapping[str, Any] | None, alphas: Mapping[str, float]) -> float:
    if pair.alpha is not None:
        alpha = alphas[pair.alpha]
        if not math.isfinite(alpha):
            raise FormatError(f"α is {alpha}", rule="α is a finite number")
        return alpha / rank
    if config is None:
        return 1.0
    stated = lora_rank(config, pair.name)
    if stated != rank:
        raise FormatError(f"the rank is {rank} in the file but {stated} in {METADATA_KEY}", rule="both must be equal")
    return lora_scale(config, pair.name, rank)


def _rank(factor_a: TensorInfo, factor_b: TensorInfo) -> int:
    """Give the rank that the shapes of both factors agree on."""
    a, b = factor_a.shape, factor_b.shape
    shapes = f"A (down) has shape {a} and B (up) has shape {b}"
    if not (factor_a.dtype.is_floating_point and factor_b.dtype.is_floating_point):
        raise UnsupportedError(f"the factors have dtypes {factor_a.dtype} and {factor_b.dtype}", next_step=AS_FLOATS)
    if not 2 <= len(a) <= 5 or len(a) != len(b) or 0 in a + b or any(size != 1 for size in b[2:]):
        raise FormatError(shapes, rule="A must have shape (rank, inputs, *kernel) and B (outputs, rank, 1, …)")
    if b[1] != a[0]:
        raise FormatError(shapes, rule="the second size of B must equal the first size of A, the rank")
    return a[0]


def _check_alpha(info: TensorInfo) -> None:
    if prod(info.shape) != 1 or len(info.shape) > 1 or info.dtype not in ALPHA_DTYPES:
        raise FormatError(
            f"α has shape {info.shape} and dtype {info.dtype}", where=info.name[:200], rule="α is one number per layer"
        )
