"""A PEFT LoRA adapter: `adapter_config.json` and `adapter_model.safetensors`.

The factors of a module are `<module>.lora_A.weight` (rank, inputs) and `<module>.lora_B.weight` (outputs, rank); of a
convolution A is (rank, channels, *kernel) and B (outputs, rank, 1, …); of an embedding `<module>.lora_embedding_A`
(rank, rows) and `<module>.lora_embedding_B` (dim, rank), whose product is the transposed update. The adapter's name
may stand behind `lora_A`. Module names are those of the base model: PEFT's prefix `base_model.model.` is cut off.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

from torch import Tensor

from eigenzoo.errors import FormatError, UnsupportedError
from eigenzoo.formats.checkpoint import SafetensorsModel
from eigenzoo.formats.json_file import read_json
from eigenzoo.formats.lora.config import AS_FLOATS, CONFIG_FILE, MERGE, check_config
from eigenzoo.formats.lora.diffusion_keys import name_pattern
from eigenzoo.formats.model import LoraUpdate, TensorInfo
from eigenzoo.formats.partitioned import refuse_partitioned
from eigenzoo.formats.paths import final_name, inside
from eigenzoo.formats.pickles.contents import check_tensors
from eigenzoo.formats.pickles.file import PickleModel, load_pickle, refuse_pickle
from eigenzoo.formats.safetensors.file import SafetensorsFile
from eigenzoo.formats.safetensors.header import HeaderContents
from eigenzoo.formats.side_files import list_side_files
from eigenzoo.weights.lora_scale import DEFAULT_RANK, lora_rank, lora_scale

WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
PREFIX = "base_model.model."
READ_ENTRIES = ("r", "rank_pattern", "lora_alpha", "alpha_pattern", "use_rslora", "lora_bias")
"""The entries of a config that say which rank and scale an update has, and whether a bias belongs to it."""

MAX_LOOKED_AT = 10_000
"""Names in a folder that are looked at for weights that lie one level below."""

_WEIGHTS = frozenset({WEIGHTS_FILE, CONFIG_FILE})

_FACTOR = name_pattern(
    r"(?P<module>.+)\.(?:lora_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?\.weight"
    r"|lora_embedding_(?P<embedding>[AB])(?:\.(?P<name>[^.]+))?)"
)
# What `lora_bias` adds to s·B·A: it is s times this, and carried like any other bias that was trained.
_BIAS = name_pattern(r".+\.lora_B(\.[^.]+)?\.bias")
_ANY_LORA = re.compile(r"(?:^|\.)(?:lora_|trainable_tokens)")
# Inside PEFT's wrapper of nn.MultiheadAttention, whose own name is what the patterns are matched against.
ATTENTION_OUT = ".base_layer.out_proj"


class LoraAdapter(SafetensorsModel):
    """One LoRA adapter; its updates are given by module, everything else in the file is carried through.

    `path` is the folder, or a file of another name with the config beside it: such a file is taken alone, for its neighbours may be
    other models.

    Attributes:
        config: the parsed `adapter_config.json`.
    """

    format = "lora"

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        is_folder = not self.path.is_file()
        self.name = final_name(self.path) if is_folder else self.path.stem
        weights = WEIGHTS_FILE if is_folder else self.path.name
        try:
            self.config: dict[str, Any] = read_json(inside(self.folder, CONFIG_FILE), where=CONFIG_FILE)
            self.warnings = check_config(self.config)
            if not os.path.exists(self.folder / weights):
                raise FormatError(
                    f"the folder has {CONFIG_FILE}, but no {WEIGHTS_FILE}", next_step=_where_weights_are(self.folder)
                )
            if is_folder:
                self.take_beside(list_side_files(self.path, _WEIGHTS))
            file = SafetensorsFile(self.folder / weights, self.folder if is_folder else None)
            refuse_partitioned(file.tensors)
            parsed = _parsed_updates(file.contents, self.config)
        except FormatError as error:
            raise error.at(str(self.path)) from error.__cause__
        self._updates = parsed.updates
        self.take_files({weights: file})
        self.likeness = parsed

    @property
    def updates(self) -> Mapping[str, LoraUpdate]:
        """The updates by module, in the order of the file."""
        return self._updates

    def read_factors(self, module: str) -> tuple[Tensor, Tensor]:
        """Read B (outputs, rank) and A (rank, inputs) of one module in their own dtype, the scale not applied."""
        update = self._updates.get(module)
        if update is None:
            raise FormatError(f"there is no update of module {module[:200]!r}", where=str(self.path))
        outputs, inputs = update.shape
        factor_a = self.read(update.key_a).reshape(update.rank, inputs)
        return self.read(update.key_b).reshape(outputs, update.rank), factor_a

    def under_names(self, names: Mapping[str, str]) -> LoraAdapter:
        """Return this adapter with other names for its modules; its tensors keep theirs."""
        updates = {names.get(module, module): update for module, update in self._updates.items()}
        view = _Updates(
            MappingProxyType({module: replace(update, module=module) for module, update in updates.items()}),
            next(iter(self.files.values())).contents,
        )
        seen = copy.copy(self)
        seen._updates, seen.likeness = view.updates, view
        return seen


def _where_weights_are(folder: Path) -> str:
    """What to do about a config without weights: trainers such as axolotl leave those in folders below, one per checkpoint."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in islice(entries, MAX_LOOKED_AT)]
    whole = [
        name
        for name in names
        if os.path.isfile(folder / name / CONFIG_FILE)
        and any(os.path.isfile(folder / name / file) for file in (WEIGHTS_FILE, PICKLE_FILE))
    ]
    if not whole:
        return "also download the weights"
    # The later of `checkpoint-9` and `checkpoint-20` is the longer name.
    latest = max(whole, key=lambda name: (len(name), name))
    others = sorted(set(whole) - {latest})[:3]
    beside = f"; beside it: {', '.join(others)}{', …' if len(whole) > 4 else ''}" if others else ""
    return f"name {folder / latest}, which has both{beside}"


class PickleAdapter(PickleModel):
    """One LoRA adapter whose factors are pickled (`adapter_model.bin`); it is written back as safetensors."""

    format = "lora"
    written_as = ("lora", WEIGHTS_FILE)

    def __init__(self, path: str | Path, *, allow_pickle: bool = False) -> None:
        self.path = Path(path)
        self.name = final_name(self.path)
        try:
            config = read_json(inside(self.path, CONFIG_FILE), where=CONFIG_FILE)
            self.config, self.warnings = config, check_config(config)
            refuse_pickle(allow_pickle)
            self.take_beside(list_side_files(self.path, frozenset({PICKLE_FILE, CONFIG_FILE})))
            state = load_pickle(inside(self.path, PICKLE_FILE))
            check_tensors(state)
            self.take(dict(state), dict.fromkeys(state, PICKLE_FILE), self.path)
            self._updates = MappingProxyType(find_updates(self.tensors, config))
        except FormatError as error:
            raise error.at(str(self.path)) from error.__cause__

    @property
    def updates(self) -> Mapping[str, LoraUpdate]:
        """The updates by module, in the order of the file."""
        return self._updates


@dataclass(frozen=True, eq=False)
class _Updates:
    """The updates of all adapters whose headers and scales agree."""

    updates: Mapping[str, LoraUpdate]
    contents: HeaderContents


_parsed: WeakKeyDictionary[HeaderContents, WeakValueDictionary[str, _Updates]] = WeakKeyDictionary()


def _parsed_updates(contents: HeaderContents, config: Mapping[str, Any]) -> _Updates:
    """Find the updates of a file, or give those that an open adapter of the same header and scales has."""
    # Nothing else of the config is handed on, so that nothing else can matter.
    chosen = {key: config[key] for key in READ_ENTRIES if key in config}
    by_text = _parsed.setdefault(contents, WeakValueDictionary())
    text = json.dumps(chosen)
    parsed = by_text.get(text)
    if parsed is None:
        parsed = by_text[text] = _Updates(MappingProxyType(find_updates(contents.tensors, chosen)), contents)
    return parsed


def find_updates(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, LoraUpdate]:
    """Pair the factors of a file and give each pair its scale; refuses whatever else belongs to LoRA."""
    pairs: dict[str, dict[str, TensorInfo]] = {}
    adapters: set[str | None] = set()
    for key, info in tensors.items():
        match = _FACTOR.fullmatch(key)
        if match is None:
            if not (config.get("lora_bias") and _BIAS.fullmatch(key)):
                _refuse_other_lora(key)
            continue
        module = match["module"].removeprefix(PREFIX)
        side = match["side"] or match["embedding"]
        adapters.add(match["adapter"] or match["name"])
        pair = pairs.setdefault(module, {})
        if side in pair and len(adapters) == 1:
            raise FormatError(f"module {module!r} has two factors {side}: {pair[side].name!r} and {key!r}")
        pair[side] = info
    if not pairs:
        raise FormatError("the file has no LoRA factors", where=WEIGHTS_FILE)
    if len(adapters) > 1:
        names = ", ".join(sorted(str(name) for name in adapters)[:5])
        raise UnsupportedError(
            f"the file has factors of several adapters: {names}", next_step="save each adapter to its own file"
        )
    return {module: _update(module, pair, config) for module, pair in pairs.items()}


def _refuse_other_lora(key: str) -> None:
    """A key of LoRA's own that is no factor belongs to a variant; all other tensors are carried through."""
    if "lora_magnitude_vector" in key:
        raise UnsupportedError(
            f"{key[:200]!r} is a DoRA magnitude",
            rule="only updates of the form s·B·A are read",
            next_step=MERGE,
        )
    if _ANY_LORA.search(key):
        raise UnsupportedError(
            f"{key[:200]!r} is not a factor of an update", rule="only updates of the form s·B·A are read"
        )


def _update(module: str, pair: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> LoraUpdate:
    try:
        if len(pair) < 2:
            missing = "A" if "B" in pair else "B"
            raise FormatError(f"the factor {missing} is missing", rule="an update needs both factors")
        factor_a, factor_b = pair["A"], pair["B"]
        rank = _rank(factor_a, factor_b)
        pattern_name = module.removesuffix(ATTENTION_OUT)
        if "base_layer" in pattern_name.split("."):
            raise UnsupportedError(
                "the file has an adapter within an adapter",
                next_step="merge the inner adapter and save the outer one again",
            )
        stated = lora_rank(config, pattern_name)
        if stated != rank and "r" not in config and lora_rank({**config, "r": rank}, pattern_name) == rank:
            raise FormatError(
                f"the rank is {rank} in the file, but {CONFIG_FILE} has no r",
                rule=f"PEFT assumes {DEFAULT_RANK} if r is missing",
                next_step=f"add r to {CONFIG_FILE}",
            )
        if stated != rank:
            raise FormatError(
                f"the rank is {rank} in the file but {stated} in {CONFIG_FILE}", rule="both must be equal"
            )
        scale = lora_scale(config, pattern_name, rank)
    except FormatError as error:
        raise error.at(f"module {module[:200]!r}") from error.__cause__
    return LoraUpdate(
        module=module,
        key_a=factor_a.name,
        key_b=factor_b.name,
        shape=(factor_b.shape[0], prod(factor_a.shape[1:])),
        rank=rank,
        scale=scale,
        factor_shapes=(factor_a.shape, factor_b.shape),
    )


def _rank(factor_a: TensorInfo, factor_b: TensorInfo) -> int:
    """Give the rank that the shapes of both factors agree on."""
    a, b = factor_a.shape, factor_b.shape
    shapes = f"A has shape {a} and B has shape {b}"
    if not (factor_a.dtype.is_floating_point and factor_b.dtype.is_floating_point):
        raise UnsupportedError(f"the factors have dtypes {factor_a.dtype} and {factor_b.dtype}", next_step=AS_FLOATS)
    if ("lora_embedding_" in factor_a.name) != ("lora_embedding_" in factor_b.name):
        raise FormatError(
            f"the factors are {factor_a.name!r} and {factor_b.name!r}",
            rule="both factors must belong to the same kind of layer",
        )
    if not 2 <= len(a) <= 5 or len(a) != len(b) or 0 in a + b or any(size != 1 for size in b[2:]):
        raise FormatError(shapes, rule="A must have shape (rank, inputs, *kernel) and B (outputs, rank, 1, …)")
    if b[1] != a[0]:
        if len(a) > 2 and a[0] % b[1] == 0:
            raise UnsupportedError(
                f"{shapes}: this is a grouped convolution", next_step="leave such layers out of the LoRA"
            )
        raise FormatError(shapes, rule="the second size of B must equal the first size of A, the rank")
    return a[0]
