"""The modules of a base that an adapter refers to: the weight of each, and the size of its output for a random input.

Values are read in spans, and each weight at most once. Legend: O outputs, I inputs, T random inputs.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from eigenzoo.errors import UsageError
from eigenzoo.formats.json_file import parse_json
from eigenzoo.formats.model import LoraUpdate, Model, TensorInfo
from eigenzoo.formats.opening import open_model
from eigenzoo.formats.remote import remote_url
from eigenzoo.formats.remote.address import shown_url
from eigenzoo.formats.side_files import CONFIG

SPAN_VALUES = 2**24
"""Values of a weight that are in memory at once, in float32."""

NUM_INPUTS = 32
"""Random inputs whose answers are compared: the ratio of norms is then good to a tenth or so, whatever the rank."""

WEIGHT, ATTENTION = ".weight", ".in_proj_weight"

TIED = frozenset(
    {"lm_head", "embed_out", "output", "decoder", "proj_out"}
    | {"embed_tokens", "embed_in", "wte", "word_embeddings", "shared", "tok_embeddings", "token_embd"}
)
"""What libraries call the embedding of tokens and the head that shares its weight."""


@dataclass(frozen=True)
class BaseWeight:
    """The weight that an update changes.

    Attributes:
        tensor: where it lies.
        transposed: whether it lies as (inputs, outputs), as embeddings and GPT-2's Conv1D do.
        tied: whether it is that of another module, which shares it.
    """

    tensor: TensorInfo
    transposed: bool
    tied: bool = False


class BaseModules:
    """The modules of one base that may carry an update.

    Args:
        model: the base.
        names: what a library calls the tensors of its files in memory, where that differs.
        norms: of answers, where several look at one base.
        loaded: the module in memory that a library puts each module of the adapter on, if that is known.

    Attributes:
        weights: the weight of each module, by the module's name; in the files and, where known, in memory.
        own_names: these names once: those in memory where they are known, else those of the files.
    """

    def __init__(
        self,
        model: Model,
        names: Mapping[str, str] | None = None,
        norms: dict[tuple[str, bool], float] | None = None,
        loaded: Mapping[str, str] | None = None,
    ) -> None:
        self.model = model
        self._loaded = loaded or {}
        weights = {_module(info.name): info for info in model.tensors.values() if _is_weight(info)}
        # A name may be one of the files: libraries translate it.
        renamed = {
            _module(name): model.tensors[file]
            for file, name in (names or {}).items()
            if file in model.tensors and _is_weight(model.tensors[file])
        }
        self.own_names = tuple(renamed or weights)
        weights.update(renamed)
        self.weights: Mapping[str, TensorInfo] = weights
        self._renamed = {name: file for file, name in (names or {}).items()}
        self._norms = {} if norms is None else norms

    @cached_property
    def config(self) -> Mapping[str, object]:
        """The base's own config.json; empty where there is none."""
        if CONFIG not in self.model.side_files:
            return {}
        return parse_json(self.model.read_side_file(CONFIG), where=f"{self.model.path}/{CONFIG}")

    def find(self, module: str) -> TensorInfo | None:
        """Return the weight of a module by its place or name; within PEFT's wrapper of an attention, by the wrapped one's."""
        name = self._loaded.get(module, module)
        return self.weights.get(name) or self.weights.get(name.replace(".base_layer.", "."))

    def tensor(self, name: str) -> TensorInfo | None:
        """Return any tensor of the base by its name."""
        return self.model.tensors.get(name) or self.model.tensors.get(self._renamed.get(name, ""))

    def weight_of(self, update: LoraUpdate, *, transposed: bool) -> BaseWeight | None:
        """Return the weight that an update fits; None where there is no such module, or of another shape.

        `transposed` decides where a weight is square: only the shapes of others tell.
        """
        info = self.find(update.module)
        if info is None:
            info = self.tied(update)
            return None if info is None else BaseWeight(info, info.shape != update.shape, tied=True)
        ways = fits(update, info)
        return BaseWeight(info, transposed if len(ways) > 1 else ways[0]) if ways else None

    def tied(self, update: LoraUpdate) -> TensorInfo | None:
        """Return the weight that a module shares with another one, where the files hold it once, under the other's name."""
        if (
            self._loaded.get(update.module, update.module).rpartition(".")[2] not in TIED
            or self.find(update.module) is not None
        ):
            return None
        if self.config.get("tie_word_embeddings") is False:
            return None
        shared = [info for name, info in self.weights.items() if name.rpartition(".")[2] in TIED]
        fitting = {info.name: info for info in shared if fits(update, info)}
        return next(iter(fitting.values())) if len(fitting) == 1 else None

    def answer(self, weight: BaseWeight) -> float:
        """Return ‖W·x‖ over the random inputs, with a weight's kernel folded into its inputs."""
        key = (weight.tensor.name, weight.transposed)
        if key not in self._norms:
            columns = prod(weight.tensor.shape[1:])
            inputs = weight.tensor.shape[0] if weight.transposed else columns
            self._norms[key] = self._norm(weight, columns, random_inputs(weight.tensor.name, inputs))
        return self._norms[key]

    def _norm(self, weight: BaseWeight, columns: int, inputs_IT: Tensor) -> float:
        rows = weight.tensor.shape[0]
        step = max(1, SPAN_VALUES // columns)
        square, summed_OT = 0.0, torch.zeros(columns if weight.transposed else 0, NUM_INPUTS, dtype=torch.float64)
        for start in range(0, rows, step):
            stop = min(rows, start + step)
            span = torch.empty((stop - start) * columns, dtype=torch.float32)
            self.model.read_flat(weight.tensor.name, start * columns, stop * columns, span)
            span_RC = span.view(-1, columns)
            if weight.transposed:
                summed_OT += (span_RC.T @ inputs_IT[start:stop]).double()
            else:
                square += float((span_RC @ inputs_IT).double().square().sum())
        return float((square + summed_OT.square().sum()) ** 0.5)


def random_inputs(name: str, inputs: int) -> Tensor:
    """Draw the inputs (I, T) of a weight; the same for one name and size, wherever that is asked."""
    seed = hashlib.sha256(json.dumps([name, inputs]).encode()).digest()[:7]
    draw = torch.Generator().manual_seed(int.from_bytes(seed, "big"))
    return torch.randn(inputs, NUM_INPUTS, generator=draw, dtype=torch.float32)


def fits(update: LoraUpdate, info: TensorInfo) -> list[bool]:
    """Give how an update fits a weight: as it lies (False), transposed (True), or both where it is square."""
    if len(info.shape) > 2:
        kernel_a, kernel = update.factor_shapes[0][1:], info.shape[1:]
        return [False] if update.shape[0] == info.shape[0] and kernel_a == kernel else []
    if len(info.shape) < 2 or len(update.factor_shapes[0]) > 2:
        return []
    is_embedding = "lora_embedding_" in update.key_a
    if is_embedding:
        return [True] if update.shape[::-1] == info.shape else []
    return [way for way in (False, True) if (update.shape[::-1] if way else update.shape) == info.shape]


def _module(tensor: str) -> str:
    return tensor.removesuffix(WEIGHT).removesuffix(ATTENTION)


def _is_weight(info: TensorInfo) -> bool:
    return info.name.endswith((WEIGHT, ATTENTION)) and len(info.shape) >= 2 and info.dtype.is_floating_point


def open_base(base: str | os.PathLike[str] | Model, *, allow_pickle: bool = False) -> Model:
    """Open a base, at a path or URL; raises UsageError for what holds no weights of modules, such as another adapter."""
    model = base if isinstance(base, Model) else open_model(base, allow_pickle=allow_pickle)
    if model.updates or not any(_is_weight(info) for info in model.tensors.values()):
        raise UsageError(
            "is an adapter" if model.updates else "holds no weights of modules",
            where=str(model.path),
            rule="a base is a model of full weights",
        )
    return model


def shown_base(base: str | os.PathLike[str] | Model) -> str:
    """Say where a base lies, without the secrets of URLs."""
    if isinstance(base, Model):
        return remote_url(base.path) or str(base.path)
    return shown_url(os.fspath(base))
