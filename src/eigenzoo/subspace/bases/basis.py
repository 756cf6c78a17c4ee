"""Interface of a fitted layer: project a model onto its basis, rebuild a model, and count its coefficients.

Three forms, one file each:

    flat      (flat.py)      full weights, axis `models` alone: k directions, each a whole layer
    tucker    (tucker.py)    anything with axis `outputs` or `inputs`: bases of the sides and small cores between them
    stacked   (stacked.py)   LoRA updates, axis `models` alone: directions as weights over the zoo's own factors
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from eigenzoo.errors import BundleError, DataError
from eigenzoo.formats.bundle.basis_files import BasisFiles
from eigenzoo.formats.writers import all_finite
from eigenzoo.linalg.lora import Cut, Factors
from eigenzoo.linalg.low_rank import LowRank
from eigenzoo.records import Layer
from eigenzoo.zoo.stack import BLOCK_BYTES, Stack

MODEL_BYTES = 256 * 2**20
"""Bytes of models that a projection keeps in memory at once."""

CORES = "cores"
"""The name of the cores in ranks and rules, beside the axes: the rank of each model's core."""

FLAT, TUCKER, STACKED = "flat", "tucker", "stacked"
MAX_TENSORS = {FLAT: 2, TUCKER: 4, STACKED: 6}
"""Largest number of tensors of a layer, by form."""


def form_of(layer_kinds: Iterable[str], axes: Sequence[str]) -> str:
    """Return the form in which a fit stores layers of these kinds for these axes."""
    if tuple(axes) != ("models",):
        return TUCKER
    return STACKED if "update" in layer_kinds else FLAT


class TensorReader(Protocol):
    """Reads the tensors of a basis, from one safetensors file or several."""

    def read(self, name: str) -> Tensor:
        """Read a whole tensor."""

    def read_flat(self, name: str, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Read values start:stop of a flattened tensor."""


class WholeTensorWriter(Protocol):
    """Writes the tensors of a basis one by one."""

    def append(self, name: str, tensor: Tensor) -> None:
        """Write a whole tensor."""


class BasisTensors:
    """Collects the tensors of a basis in memory, so that a worker can send them to the writer of the bundle."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def append(self, name: str, tensor: Tensor) -> None:
        """Add a whole tensor."""
        self.tensors[name] = tensor


class TensorWriter(WholeTensorWriter, Protocol):
    """Writes the tensors of a basis whole or block by block."""

    def begin(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        """Reserve space for a tensor that is written block by block."""

    def write_flat(self, name: str, start: int, tensor: Tensor) -> None:
        """Write values of a begun tensor, from value `start` on."""

    def read_flat(self, name: str, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Read back values start:stop of a tensor."""


@dataclass(frozen=True)
class StoredAs:
    """How a bundle stores what a layer needs: `coding` of quantised bases (else ""), dtype of coefficients."""

    coding: str = ""
    coefficients_dtype: str = "float32"


@dataclass(frozen=True)
class Projection:
    """One model's layer in a basis: its coefficients, ‖X − X̂‖², and ‖X‖²; the factors of a core that is kept as two."""

    coefficients: Tensor
    outside: float
    energy: float
    factors: Tensor | None = None

    @property
    def stored(self) -> Tensor:
        """The numbers that a bundle holds."""
        return self.coefficients if self.factors is None else self.factors


@dataclass(frozen=True)
class Operator:
    """A fitted layer of any form as X̂ = M + after · middle · before. The middle is Σ c_k table_k, or c itself.

    Attributes:
        before: (Q, I), or None if the inputs are not truncated.
        after: (O, P), or None if the outputs are not truncated.
        table: terms of the middle (K, …): matrices (P, Q), or diagonals as rows. None if the coefficients are the middle.
        center: the mean M as a middle, or None.
        offset: the mean as a matrix, broadcastable over (O, I), if it is not given as a middle.
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
        ranks: number of kept directions, by truncated axis; also the rank of `cores` that are stored as two factors.
        center: the removed center; see `weights.views.CENTERS`.
        tensors: reader of the basis. Its tensors' names begin with the layer's name.
        stored: how the bundle stores bases and coefficients. Quantised bases are orthonormalised when they are read
            (`orthonormalizer`), and coefficients are rounded to their dtype.
    """

    form: ClassVar[str]

    layer: Layer
    ranks: Mapping[str, int]
    center: str
    tensors: TensorReader
    stored: StoredAs = field(default=StoredAs(), kw_only=True)

    @property
    @abstractmethod
    def coefficient_shape(self) -> tuple[int, ...]:
        """Shape of one model's coefficients."""

    @property
    def num_coefficients(self) -> int:
        """Number of coefficients of one model in this layer."""
        return prod(self.coefficient_shape)

    def low_rank(self, *, mean: bool = True) -> LowRank | None:
        """How files keep coefficients that are low-rank cores; None for all others, which are kept as they are.

        Without `mean`, of coefficients that are a change of other weights than the mean.
        """
        return None

    def read_coefficients(self, numbers: Tensor) -> Tensor:
        """Return the coefficients (…, *coefficient_shape) that the numbers of models' files (…, num_coefficients) stand for."""
        form = self.low_rank()
        if form is not None:
            return form.matrices(numbers)
        return numbers.reshape(*numbers.shape[:-1], *self.coefficient_shape)

    @abstractmethod
    def project_all(self, stack: Stack) -> list[Projection]:
        """Project every model's layer of a stack. The coefficients are float64.

        The number of reads of the basis does not depend on the number of models while their factors take at most `MODEL_BYTES`.
        """

    def project(self, stack: Stack, index: int) -> Projection:
        """Project one model's layer of a stack."""
        return self.project_all(stack.subset([index]))[0]

    @abstractmethod
    def rebuild(self, coefficients: Tensor) -> Tensor | Factors:
        """Rebuild the layer: an (O, I) matrix in float64, or (B, A) factors of a LoRA update with the scale in B."""

    def rebuild_update(self, coefficients: Tensor, max_rank: int | None = None) -> Cut:
        """Rebuild a LoRA update, cut to a rank. Raises BundleError for a layer that is not an update."""
        raise BundleError("is no LoRA update", where=f"layer '{self.layer.name}'")

    @abstractmethod
    def operator(self) -> Operator:
        """Read the whole basis into memory as an operator on coefficients."""

    @abstractmethod
    def orthonormality(self) -> float:
        """Largest entry of |VVᵀ − 1| over the layer's bases: 0 when they are orthonormal."""

    def removed(self) -> Tensor:
        """Return the stored center M, broadcastable over (O, I), or zero if none is stored."""
        return torch.zeros(1, 1, dtype=torch.float64)

    def _rounded(self, coefficients: Tensor) -> Tensor:
        """Coefficients as they are stored; float32 ones stay as they are."""
        return rounded(coefficients, self.stored.coefficients_dtype, self.layer.name)

    def _orthonormalizer(self, gram_KK: Tensor) -> Tensor:
        return orthonormalizer(gram_KK, self.layer.name)

    def _name(self, part: str) -> str:
        return f"{self.layer.name}/{part}"


def deviation_from_identity(gram_KK: Tensor) -> float:
    """Return the largest entry of |G − 1|."""
    if not gram_KK.numel():
        return 0.0
    return float((gram_KK - torch.eye(gram_KK.shape[0], dtype=gram_KK.dtype)).abs().max())


def rounded(coefficients: Tensor, dtype: str, layer: str) -> Tensor:
    """Return coefficients with the values that half precision holds, in their own dtype; those for float32 as they are."""
    if dtype == "float32":
        return coefficients
    values = coefficients.to(getattr(torch, dtype)).to(coefficients.dtype)
    if not bool(torch.isfinite(values).all()):
        largest = float(coefficients.abs().max())
        raise DataError(
            f"a coefficient of {largest:.3g}",
            where=f"layer '{layer}'",
            rule=f"the largest number in {dtype} is {torch.finfo(getattr(torch, dtype)).max:.3g}",
            next_step="store coefficients in bfloat16 or float32",
        )
    return values


def orthonormalizer(gram_KK: Tensor, layer: str) -> Tensor:
    """Return L⁻¹ (K, K), with LLᵀ the Gram of directions V that quantising has moved: the rows of L⁻¹V are orthonormal."""
    lower_KK, fault = torch.linalg.cholesky_ex(gram_KK)
    if int(fault) or not bool(torch.isfinite(lower_KK).all()):
        raise BundleError(
            "directions depend on each other",
            where=f"layer '{layer}'",
            rule="quantised directions are linearly independent",
            next_step="fit with another dtype, such as int8, or with fewer directions; copy a damaged bundle again",
        )
    identity_KK = torch.eye(len(gram_KK), dtype=gram_KK.dtype)
    inverse_KK: Tensor = torch.linalg.solve_triangular(lower_KK, identity_KK, upper=False)
    return inverse_KK


ORTHONORMAL = {"float64": 1e-5, "float32": 1e-5, "bfloat16": 1e-1, "float16": 1e-3, "int8": 1e-1, "nf4": 0.7}
"""Largest deviation from orthonormality that `verify` accepts, per dtype of the basis: about 10 · eps · √(entries).

For quantised bases it is the deviation of the stored values, before a reader orthonormalises them. It detects damage only.
"""


def is_finite(files: BasisFiles, name: str) -> bool:
    """Tell whether all values of a tensor are finite. It is read in blocks of at most `BLOCK_BYTES`."""
    num_values, step = prod(files.shape(name)), BLOCK_BYTES // 8
    starts = range(0, num_values, step)
    return all(all_finite(files.read_flat(name, start, min(start + step, num_values))) for start in starts)
