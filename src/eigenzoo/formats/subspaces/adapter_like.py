"""What an adapter of a zoo tells of the others: module names, keys, the scale, and the tensors that are no factors.

Other tools' subspaces hold factors and nothing else; a model to be written needs the rest from somewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, prod
from pathlib import Path
from typing import Any

from torch import Tensor

from eigenzoo.errors import FormatError, MismatchError, UsageError
from eigenzoo.formats.bundle.contents import Template
from eigenzoo.formats.carried import carried_values
from eigenzoo.formats.json_file import read_json
from eigenzoo.formats.layout import ModelLayout, TensorLayout
from eigenzoo.formats.lora.config import CONFIG_FILE, check_config
from eigenzoo.formats.lora.peft_folder import PREFIX, WEIGHTS_FILE, LoraAdapter
from eigenzoo.formats.model import LoraUpdate, TensorInfo
from eigenzoo.formats.paths import inside
from eigenzoo.formats.safetensors.dtypes import dtype_name
from eigenzoo.formats.subspaces.factors import ForeignSubspace
from eigenzoo.weights.lora_scale import lora_rank, lora_scale

_ONE_OF_THEM = "name an adapter of the zoo that the subspace was made from"


@dataclass(frozen=True)
class AdapterLike:
    """An adapter to write others like: its config, and itself where its weights are there.

    Attributes:
        config: an `adapter_config.json`.
        model: the adapter; None where only its config is known.
        notes: what a reader of the bundle must know.
    """

    config: Mapping[str, Any]
    model: LoraAdapter | None = None
    notes: tuple[str, ...] = ()

    def scale(self, module: str, rank: int) -> float:
        """The factor s of s·B·A; raises MismatchError where the config states another rank."""
        stated = lora_rank(self.config, module)
        if stated != rank:
            raise MismatchError(
                f"the rank is {rank}, but {stated} in the adapter given by like",
                where=f"module {module[:200]!r}",
                next_step=_ONE_OF_THEM,
            )
        return lora_scale(self.config, module, rank)


def read_like(path: Path) -> AdapterLike:
    """Open an adapter folder, or an adapter_config.json alone or in a folder."""
    if path.is_dir() and (path / WEIGHTS_FILE).exists():
        model = LoraAdapter(path)
        return AdapterLike(model.config, model)
    file = inside(path, CONFIG_FILE) if path.is_dir() else path
    if path.is_dir() and not file.exists():
        raise FormatError(
            f"this is not an adapter, because there is no {CONFIG_FILE}", where=str(path), next_step=_ONE_OF_THEM
        )
    config = read_json(file, where=str(file))
    try:
        check_config(config)
    except FormatError as error:
        raise error.at(str(path)) from error.__cause__
    saved = config.get("modules_to_save")
    notes = (
        (f"the modules_to_save {saved} of its config are in no file, so rebuilt adapters lack them",) if saved else ()
    )
    return AdapterLike(config, None, notes)


def made_like(foreign: ForeignSubspace, alpha: float) -> AdapterLike:
    """Make up the config of adapters of which only alpha is known."""
    if not isfinite(alpha) or alpha < 0:
        raise UsageError(f"alpha is {alpha}", rule="alpha must be finite and at least 0")
    ranks = {module: shape_a[0] for module, (shape_a, _) in foreign.shapes.items()}
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "base_model_name_or_path": None,
        "task_type": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "r": max(ranks.values()),
        "lora_alpha": alpha,
        "rank_pattern": {},
        "target_modules": list(ranks),
    }
    if len(set(ranks.values())) > 1:
        raise UsageError(
            "the modules have several ranks, but there is only one alpha",
            next_step="name an adapter or its config (like=, --like) instead",
        )
    return AdapterLike(
        config, None, ("the config of the adapters was made from their modules, their rank and the given alpha",)
    )


def adapter_layout(
    foreign: ForeignSubspace, like: AdapterLike, others: Sequence[TensorInfo]
) -> tuple[ModelLayout, dict[str, float]]:
    """Lay out a rebuilt adapter: the subspace's factors under the names that `like` gives them, and others.

    Returns the layout and every module's scale. Raises MismatchError where `like` has not the modules or shapes of the subspace.
    """
    dtype = dtype_name(foreign.dtype)
    tensors, updates, scales = [], {}, {}
    for module, (shape_a, shape_b) in foreign.shapes.items():
        key_a, key_b = _keys(module, (shape_a, shape_b), like.model)
        rank = shape_a[0]
        scales[module] = scale = like.scale(module, rank)
        updates[module] = LoraUpdate(
            module, key_a, key_b, (shape_b[0], prod(shape_a[1:])), rank, scale, (shape_a, shape_b)
        )
        tensors += [TensorLayout(key_a, dtype, shape_a), TensorLayout(key_b, dtype, shape_b)]
    tensors += [TensorLayout(info.name, dtype_name(info.dtype), info.shape) for info in others]
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise FormatError("another tensor has the name of a factor", where=str(foreign.path))
    return ModelLayout("lora", {WEIGHTS_FILE: tuple(tensors)}, None, updates), scales


def _keys(module: str, shapes: tuple[tuple[int, ...], tuple[int, ...]], model: LoraAdapter | None) -> tuple[str, str]:
    if model is None:
        return f"{PREFIX}{module}.lora_A.weight", f"{PREFIX}{module}.lora_B.weight"
    update = model.updates.get(module)
    if update is None:
        raise MismatchError(
            "has no such module",
            where=f"{model.path}, module {module[:200]!r}",
            rule="the adapter given by like (--like) must have all modules of the subspace",
            next_step=_ONE_OF_THEM,
        )
    if update.factor_shapes != shapes:
        raise MismatchError(
            f"the factors have shapes {update.factor_shapes}",
            where=f"{model.path}, module {module[:200]!r}",
            rule=f"the subspace has {shapes}",
            next_step=_ONE_OF_THEM,
        )
    return update.key_a, update.key_b


def spare_tensors(like: AdapterLike, foreign: ForeignSubspace) -> tuple[tuple[TensorInfo, ...], tuple[str, ...]]:
    """The tensors of `like` that are no factors, for tools that keep none; and what is to be said of them."""
    if like.model is None or foreign.keeps_others:
        return (), like.notes
    notes = [*like.notes]
    more = [module for module in like.model.updates if module not in foreign.shapes]
    if more:
        notes.append(
            f"{len(more)} modules of {like.model.name} are not in the subspace and in no rebuilt adapter: {', '.join(more[:3])}"
        )
    others = tuple(like.model.tensors[name] for name in like.model.other_tensors)
    if others:
        notes.append(
            f"{len(others)} tensors other than factors come from {like.model.name} for every model: {foreign.tool} keeps none"
        )
    return others, tuple(notes)


class ForeignTemplate(Template):
    """What makes an imported model complete: a config, and tensors of its own or of the adapter that it is like."""

    side_files = ()

    def __init__(self, foreign: ForeignSubspace, index: int, like: AdapterLike, layout: ModelLayout) -> None:
        self._foreign, self._index, self._like = foreign, index, like
        self.layout, self.config, self.metadata = layout, like.config, {}
        factors = {key for update in layout.updates.values() for key in (update.key_a, update.key_b)}
        self.carried = tuple(name for name in layout.tensors if name not in factors)

    def read_carried(self, name: str) -> Tensor:
        """Read a tensor that comes unchanged."""
        if self._foreign.keeps_others or self._like.model is None:
            return self._foreign.read_other(self._index, name)
        return carried_values(self._like.model, name)

    def read_side_file(self, name: str) -> bytes:
        """Raise: side files are not carried."""
        raise FormatError(f"there is no side file {name[:100]!r}", where=str(self._foreign.path))


def templates(
    foreign: ForeignSubspace, like: AdapterLike
) -> tuple[list[ForeignTemplate], dict[str, float], tuple[str, ...]]:
    """Return every model's template, every module's scale, and what is to be said of where things come from."""
    spare, notes = spare_tensors(like, foreign)
    scales: dict[str, float] = {}
    made = []
    for index in range(len(foreign.names)):
        layout, scales = adapter_layout(foreign, like, [*spare, *foreign.others(index)])
        made.append(ForeignTemplate(foreign, index, like, layout))
    return made, scales, notes
