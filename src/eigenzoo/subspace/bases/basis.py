"""What every form of a fitted layer gives: project a model onto it, rebuild a model from it, count its bytes.

Three forms, one file each:

    flat      (flat.py)      full weights, axis `models` alone: k directions, each a whole layer
    tucker    (tucker.py)    anything with axis `outputs` or `inputs`: bases of the sides and small cores between them
    stacked   (stacked.py)   LoRA updates, axis `models` alone: directions as weights over the zoo's own factors
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from eigenzoo.formats.bundle.basis_files import BasisFiles
from eigenzoo.formats.writers import all_finite
from eigenzoo.linalg.lora import Factors
from eigenzoo.records import Layer
from eigenzoo.zoo.stack import BLOCK_BYTES, Stack

MODEL_BYTES = 256 * 2**20
"""Bytes of models that are held at once while they are projected."""

FLAT, TUCKER, STACKED = "flat", "tucker", "stacked"
PARTS = {FLAT: 2, TUCKER: 4, STACKED: 6}
"""How many tensors a layer of each form has, at most."""


def form_of(layer_kinds: Iterable[str], axes: Sequence[str]) -> str:
    """Return the form that a fit of these kinds of layers and axes writes."""
    if tuple(axes) != ("models",):
        return TUCKER
    return STACKED if "update" in layer_kinds else FLAT


class TensorReader(Protocol):
    """Where a basis lies: one safetensors file or several."""

    def read(self, name: str) -> Tensor:
        """Read a tensor whole."""

    def read_flat(self, name: str, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Read a run of a flattened tensor."""


class PartWriter(Protocol):
    """Where a fit writes a basis to, tensor by tensor."""

    def append(self, name: str, tensor: Tensor) -> None:
        """Write a tensor whole."""


class Parts:
    """Holds what is written, tensor by tensor: a basis on its way from a worker to the bundle."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def append(self, name: str, tensor: Tensor) -> None:
        """Keep a tensor whole."""
        self.tensors[name] = tensor


class TensorWriter(PartWriter, Protocol):
    """The same, tensor by tensor or block by block."""

    def begin(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        """Make room for a tensor that is written block by block."""

    def write_flat(self, name: str, start: int, tensor: Tensor) -> None:
        """Write a run of a tensor that was begun."""

    def read_flat(self, name: str, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Read back a run of what was written."""


@dataclass(frozen=True)
class Projection:
    """One model's layer in a basis: its coefficients, ‖X − X̂‖², and ‖X‖²."""

    coefficients: Tensor
    outside: float
    energy: float


@dataclass(frozen=True)
class Operator:
    """A fitted layer as X̂ = M + after · middle · before, whatever its form; the middle is Σ c_k table_k, or c itself.

    Attributes:
        before: (Q, I), or None for an inputs' side kept whole.
        after: (O, P), or None.
        table: what coefficients weigh (K, …): matrices (P, Q), or rows that are diagonals; None where coefficients are the middle.
        center: the mean M as a middle, or None.
        offset: the mean as a matrix, broadcastable over (O, I), where it is no middle.
    """

    before: Tensor | None = None
    after: Tensor | None = None
    table: Tensor | None = None
    center: Tensor | None = None
    offset: Tensor | None = None


@dataclass(frozen=True)
class LayerBasis(ABC):
    """A fitted layer.

    Attributes:
        layer: the layer's record.
        ranks: directions kept, per truncated axis.
        center: what was removed; see `weights.views.CENTERS`.
        tensors: where the basis is read from; its names begin with the layer's name.
    """

    form: ClassVar[str]

    layer: Layer
    ranks: Mapping[str, int]
    center: str
    tensors: TensorReader

    @property
    @abstractmethod
    def coefficient_shape(self) -> tuple[int, ...]:
        """Shape of one model's coefficients."""

    @property
    def num_coefficients(self) -> int:
        """Numbers that one model needs for this layer."""
        return prod(self.coefficient_shape)

    @abstractmethod
    def project_all(self, stack: Stack) -> list[Projection]:
        """Project every model's layer of a stack; the coefficients come in float64.

        How often the basis is read does not depend on the number of models, until their factors alone take `MODEL_BYTES`.
        """

    def project(self, stack: Stack, place: int) -> Projection:
        """Project one model's layer of a stack."""
        return self.project_all(stack.subset([place]))[0]

    @abstractmethod
    def rebuild(self, coefficients: Tensor) -> Tensor | Factors:
        """Rebuild the layer: an (O, I) matrix in float64, or (B, A) factors of a LoRA update with the scale in B."""

    @abstractmethod
    def operator(self) -> Operator:
        """Read the whole basis into memory, as what it does to coefficients."""

    @abstractmethod
    def orthonormality(self) -> float:
        """Largest entry of |VVᵀ − 1| over the layer's bases: 0 when they are orthonormal."""

    def removed(self) -> Tensor:
        """The center M as it is stored, broadcastable over (O, I); zero where nothing is stored."""
        return torch.zeros(1, 1, dtype=torch.float64)

    def _name(self, part: str) -> str:
        return f"{self.layer.name}/{part}"


def deviation_from_identity(gram_KK: Tensor) -> float:
    """Return the largest entry of |G − 1|."""
    if not gram_KK.numel():
        return 0.0
    return float((gram_KK - torch.eye(gram_KK.shape[0], dtype=gram_KK.dtype)).abs().max())


ORTHONORMAL = {"float64": 1e-5, "float32": 1e-5, "bfloat16": 1e-1, "float16": 1e-3}
"""Largest deviation from orthonormality that `verify` accepts, per dtype of the basis: about 10 · eps · √(entries)."""


def is_finite(files: BasisFiles, name: str) -> bool:
    """Tell whether a tensor of bases holds neither NaN nor Inf; reads it in blocks of at most `BLOCK_BYTES`."""
    num_values, step = prod(files.shape(name)), BLOCK_BYTES // 8
    starts = range(0, num_values, step)
    return all(all_finite(files.read_flat(name, start, min(start + step, num_values))) for start in starts)
