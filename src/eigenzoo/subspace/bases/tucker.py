"""Form `tucker`: shared bases U of the outputs and V of the inputs, and a small core per model between them.

    full weights:   X̂ = M + U · C · Vᵀ          updates:   X̂ = U · (C̄ + C) · Vᵀ

An axis that is not truncated has no basis (U = 1). With axis `models` every core is a sum of k shared cores, C = Σ c_k D_k, and a
model is k numbers. U and V come from the moments of the stack, the shared cores from the cores. This is a sequentially truncated
higher-order SVD (Vannieuwenhoven et al. 2012). Its error is never larger than with every axis truncated from the full stack.

Without axis `models` each core can be cut to a low rank and stored as two factors (`linalg.low_rank`): C of full weights, the whole
C̄ + C of updates, so that a rebuilt update has this rank.

The mean of updates is stored as a core, C̄ = UᵀX̄V, which needs no dense matrix. So their bases come from moments about zero, which
contain the directions of the mean with their energy.

Legend: N models, O outputs, I inputs, P kept outputs, Q kept inputs, K shared cores.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from eigenzoo.linalg import lora, low_rank
from eigenzoo.linalg.lora import Cut, Factors
from eigenzoo.linalg.low_rank import LowRank
from eigenzoo.subspace.bases.basis import (
    CORES,
    TUCKER,
    LayerBasis,
    Operator,
    Projection,
    StoredAs,
    WholeTensorWriter,
    deviation_from_identity,
    rounded,
)
from eigenzoo.subspace.moments.layer_moments import LayerMoments
from eigenzoo.zoo.stack import DenseStack, Stack, UpdateStack


@dataclass(frozen=True)
class Cores:
    """All models' centred cores (N, P, Q), and the mean as the bundle stores it."""

    cores_NPQ: Tensor
    mean: Tensor | None

    @property
    def shape(self) -> tuple[int, int]:
        """(P, Q)."""
        return self.cores_NPQ.shape[1], self.cores_NPQ.shape[2]


@dataclass(frozen=True)
class LeadingCores:
    """All models' cores between the leading eigenvectors of the sides: at any smaller ranks they are their first rows and columns.

    Attributes:
        outputs_OP, inputs_IQ: the eigenvectors; None for a side that is not truncated.
        cores: between these.
        is_update: whether the mean is a core too.
    """

    outputs_OP: Tensor | None
    inputs_IQ: Tensor | None
    cores: Cores
    is_update: bool

    def holds(self, ranks: Mapping[str, int]) -> bool:
        """Tell whether there are so many eigenvectors."""
        sides = {"outputs": self.outputs_OP, "inputs": self.inputs_IQ}
        return all(side is None or ranks.get(axis, side.shape[0]) <= side.shape[1] for axis, side in sides.items())

    def at(self, ranks: Mapping[str, int]) -> LeadingCores:
        """Return bases and cores at these ranks of the sides; a side that they do not name is whole, and needs no basis."""
        cores_NPQ, mean = self.cores.cores_NPQ, self.cores.mean if self.is_update else None
        parts = [cores_NPQ] if mean is None else [cores_NPQ, mean]
        outputs_OP, inputs_IQ = self.outputs_OP, self.inputs_IQ
        if outputs_OP is not None:
            rank = ranks.get("outputs")
            parts = [outputs_OP @ part if rank is None else part[..., :rank, :] for part in parts]
            outputs_OP = None if rank is None else outputs_OP[:, :rank]
        if inputs_IQ is not None:
            rank = ranks.get("inputs")
            parts = [part @ inputs_IQ.T if rank is None else part[..., :rank] for part in parts]
            inputs_IQ = None if rank is None else inputs_IQ[:, :rank]
        cores = Cores(parts[0], parts[1] if mean is not None else self.cores.mean)
        return LeadingCores(outputs_OP, inputs_IQ, cores, self.is_update)


def stack_mean(stack: DenseStack) -> Tensor:
    """Return the mean over models as an (O, I) float64 matrix. Cost: one pass."""
    mean_OI = torch.empty(stack.layer.shape, dtype=torch.float64)
    for block in stack.blocks():
        mean_OI.view(-1)[block.start : block.stop] = block.rows.mean(0, dtype=torch.float64)
    return mean_OI


def collect_cores(stack: Stack, moments: LayerMoments, outputs_OP: Tensor | None, inputs_IQ: Tensor | None) -> Cores:
    """Reduce every model to its core Uᵀ(X − M)V. Cost: one pass over the weights, or two for center `models` of full weights."""
    if isinstance(stack, UpdateStack):
        cores_NPQ = torch.stack(
            [_reduce_update(stack.factors(index), outputs_OP, inputs_IQ) for index in range(len(stack))]
        )
        if moments.removed is not None:
            return Cores(cores_NPQ, None)
        mean_PQ = cores_NPQ.mean(0)
        return Cores(cores_NPQ - mean_PQ, mean_PQ)
    removed = stack_mean(stack) if moments.removed is None else moments.removed
    matrices = (stack.matrix(index).double() - removed for index in range(len(stack)))
    cores_NPQ = torch.stack([_reduce(matrix_OI, outputs_OP, inputs_IQ) for matrix_OI in matrices])
    return Cores(cores_NPQ, removed if float(removed.abs().max()) > 0 else None)


def cut_cores(cores_NPQ: Tensor, rank: int, dtype: str, layer: str) -> tuple[Tensor, Tensor]:
    """Return the factors (N, R·(P + Q)) of every core's best approximation as `dtype` stores them, and the cores that they make.

    Raises DataError for factors that half precision cannot hold.
    """
    numbers = rounded(low_rank.factor(cores_NPQ, rank).float(), dtype, layer)
    return numbers, low_rank.multiply(numbers.double(), (cores_NPQ.shape[1], cores_NPQ.shape[2]), rank)


def _reduce(matrix_OI: Tensor, outputs_OP: Tensor | None, inputs_IQ: Tensor | None) -> Tensor:
    core = matrix_OI if outputs_OP is None else outputs_OP.T @ matrix_OI
    return core if inputs_IQ is None else core @ inputs_IQ


def _reduce_update(factors: Factors, outputs_OP: Tensor | None, inputs_IQ: Tensor | None) -> Tensor:
    b_OR, a_RI = factors
    left = b_OR if outputs_OP is None else outputs_OP.T @ b_OR
    return left @ (a_RI if inputs_IQ is None else a_RI @ inputs_IQ)


def write_tucker(
    name: str,
    cores: Cores,
    outputs_OP: Tensor | None,
    inputs_IQ: Tensor | None,
    shared_KPQ: Tensor | None,
    dtype: torch.dtype,
    writer: WholeTensorWriter,
) -> None:
    """Write the mean, the bases of the sides, and the shared cores."""
    for part, tensor in (("mean", cores.mean), ("outputs", outputs_OP), ("inputs", inputs_IQ), ("models", shared_KPQ)):
        if tensor is not None and tensor.numel():
            # The mean stays float32, because its rounding error would exceed the gain of the directions.
            stored_dtype = torch.promote_types(dtype, torch.float32) if part == "mean" else dtype
            writer.append(f"{name}/{part}", tensor.to(stored_dtype).contiguous())


@dataclass(frozen=True)
class TuckerBasis(LayerBasis):
    """A layer as bases of its sides and a core per model."""

    form: ClassVar[str] = TUCKER
    has_mean: bool = True

    @property
    def core_shape(self) -> tuple[int, int]:
        """(P, Q)."""
        outputs, inputs = self.layer.shape
        return self.ranks.get("outputs", outputs), self.ranks.get("inputs", inputs)

    @property
    def coefficient_shape(self) -> tuple[int, ...]:
        """(K,) with axis `models`, else (P, Q)."""
        return (self.ranks["models"],) if "models" in self.ranks else self.core_shape

    @property
    def num_coefficients(self) -> int:
        """K, P·Q, or with cores of rank R the R·(P + Q) of their factors."""
        form = self.low_rank(mean=False)
        return super().num_coefficients if form is None else form.num_numbers

    def low_rank(self, *, mean: bool = True) -> LowRank | None:
        """Factors of cores; of updates that include the mean, of the cores with the mean's."""
        if CORES not in self.ranks:
            return None
        has_center = mean and self.has_mean and self.layer.kind == "update"
        return LowRank(self.core_shape, self.ranks[CORES], self.removed() if has_center else None)

    def _cut(self, core: Tensor) -> tuple[Tensor, Tensor | None]:
        """The core that is kept of a core (P, Q), and its factors where it is kept as such, as they are stored."""
        if CORES not in self.ranks:
            return core, None
        factors, kept = cut_cores(core[None], self.ranks[CORES], self.stored.coefficients_dtype, self.layer.name)
        return kept[0], factors[0]

    def project_all(self, stack: Stack) -> list[Projection]:
        """Project one model's layer after another: its core, then the core's coordinates in the shared cores.

        The basis is read once. Memory: the basis in float64 and one model's layer.
        """
        bases = self.side("outputs"), self.side("inputs"), self.shared(), self.removed()
        one = self._project_update if isinstance(stack, UpdateStack) else self._project_dense
        return [one(stack, index, *bases) for index in range(len(stack))]

    def _project_update(
        self,
        stack: Stack,
        index: int,
        outputs_OP: Tensor | None,
        inputs_IQ: Tensor | None,
        shared_KPQ: Tensor | None,
        mean: Tensor,
    ) -> Projection:
        assert isinstance(stack, UpdateStack)
        factors = stack.factors(index)
        energy = lora.energy(factors)
        full_core = _reduce_update(factors, outputs_OP, inputs_IQ)
        kept_core, numbers = self._cut(full_core)
        core = kept_core - mean
        coefficients = core if shared_KPQ is None else shared_KPQ.flatten(1) @ core.flatten()
        coefficients = coefficients if numbers is not None else self._rounded(coefficients)
        rebuilt_core = mean + (coefficients if shared_KPQ is None else torch.tensordot(coefficients, shared_KPQ, 1))
        outside = _outside(energy, full_core, rebuilt_core, outputs_OP, inputs_IQ)
        return Projection(coefficients, outside, energy, numbers)

    def _project_dense(
        self,
        stack: Stack,
        index: int,
        outputs_OP: Tensor | None,
        inputs_IQ: Tensor | None,
        shared_KPQ: Tensor | None,
        mean: Tensor,
    ) -> Projection:
        assert isinstance(stack, DenseStack)
        matrix_OI = stack.matrix(index).double()
        energy = float(matrix_OI.square().sum())
        centered = matrix_OI - mean
        core, numbers = self._cut(_reduce(centered, outputs_OP, inputs_IQ))
        coefficients = core if shared_KPQ is None else shared_KPQ.flatten(1) @ core.flatten()
        coefficients = coefficients if numbers is not None else self._rounded(coefficients)
        rebuilt_core = coefficients if shared_KPQ is None else torch.tensordot(coefficients, shared_KPQ, 1)
        outside = float((centered - _expand(rebuilt_core, outputs_OP, inputs_IQ)).square().sum())
        return Projection(coefficients, outside, energy, numbers)

    def rebuild(self, coefficients: Tensor) -> Tensor | Factors:
        """Return M + U C Vᵀ, or the balanced factors of least rank of U (C̄ + C) Vᵀ."""
        if self.layer.kind == "update":
            return self.rebuild_update(coefficients).factors
        return self.removed() + _expand(self._core(coefficients), self.side("outputs"), self.side("inputs"))

    def rebuild_update(self, coefficients: Tensor, max_rank: int | None = None) -> Cut:
        """Return U (C̄ + C) Vᵀ by balanced factors, cut to a rank."""
        core, mean = self._core(coefficients), self.removed()
        noise = lora.ROUND_OFF * float(core.square().sum() + mean.square().sum())
        whole = _update_factors(core + mean, self.side("outputs"), self.side("inputs"), noise)
        # Not of the core: stored bases are orthonormal to their own round-off alone.
        return lora.cut_product(*whole, max_rank)

    def _core(self, coefficients: Tensor) -> Tensor:
        """A model's core without the mean (P, Q), float64."""
        shared_KPQ = self.shared()
        return coefficients.double() if shared_KPQ is None else torch.tensordot(coefficients.double(), shared_KPQ, 1)

    def operator(self) -> Operator:
        """Return the bases of the sides and the shared cores between them. The mean of updates is also a core."""
        inputs_IQ, mean = self.side("inputs"), self.removed()
        is_core = self.layer.kind == "update"
        return Operator(
            before=None if inputs_IQ is None else inputs_IQ.T,
            after=self.side("outputs"),
            table=self.shared(),
            center=mean.expand(self.core_shape) if is_core else None,
            offset=None if is_core else mean,
        )

    def orthonormality(self) -> float:
        """Largest entry of |VVᵀ − 1| over the bases of the sides and the shared cores, as they are stored."""
        plain = replace(self, stored=StoredAs())
        bases = [basis.T for basis in (plain.side("outputs"), plain.side("inputs")) if basis is not None]
        shared_KPQ = plain.shared()
        bases += [shared_KPQ.flatten(1)] if shared_KPQ is not None else []
        return max((deviation_from_identity(basis @ basis.T) for basis in bases), default=0.0)

    def removed(self) -> Tensor:
        """Return the center, or for updates its core."""
        if not self.has_mean:
            return torch.zeros(1, 1, dtype=torch.float64)
        return self.tensors.read(self._name("mean")).double()

    def side(self, axis: str) -> Tensor | None:
        """Read the basis of `outputs` (O, P) or `inputs` (I, Q) in float64, or return None if that side is not truncated."""
        if axis not in self.ranks:
            return None
        size = self.layer.shape[0 if axis == "outputs" else 1]
        if not self.ranks[axis]:
            return torch.zeros(size, 0, dtype=torch.float64)
        stored_SR = self.tensors.read(self._name(axis)).double()
        if not self.stored.coding:
            return stored_SR
        return stored_SR @ self._orthonormalizer(stored_SR.T @ stored_SR).T

    def shared(self) -> Tensor | None:
        """Read the shared cores (K, P, Q) of axis `models` in float64."""
        if "models" not in self.ranks:
            return None
        if not self.ranks["models"] or 0 in self.core_shape:
            return torch.zeros(self.ranks["models"], *self.core_shape, dtype=torch.float64)
        stored_KPQ = self.tensors.read(self._name("models")).double()
        if not self.stored.coding:
            return stored_KPQ
        rows_KD = stored_KPQ.flatten(1)
        return (self._orthonormalizer(rows_KD @ rows_KD.T) @ rows_KD).view_as(stored_KPQ)


def _outside(
    energy: float, full_core: Tensor, rebuilt_core: Tensor, outputs_OP: Tensor | None, inputs_IQ: Tensor | None
) -> float:
    """Return ‖X − U·K·Vᵀ‖² = ‖X‖² − 2⟨UᵀXV, K⟩ + ⟨K, UᵀU·K·VᵀV⟩, which also holds for bases that are not exactly orthonormal."""
    product = rebuilt_core if outputs_OP is None else (outputs_OP.T @ outputs_OP) @ rebuilt_core
    product = product if inputs_IQ is None else product @ (inputs_IQ.T @ inputs_IQ)
    return max(energy - 2 * float((full_core * rebuilt_core).sum()) + float((rebuilt_core * product).sum()), 0.0)


def _expand(core: Tensor, outputs_OP: Tensor | None, inputs_IQ: Tensor | None) -> Tensor:
    left = core if outputs_OP is None else outputs_OP @ core
    return left if inputs_IQ is None else left @ inputs_IQ.T


def _update_factors(core_PQ: Tensor, outputs_OP: Tensor | None, inputs_IQ: Tensor | None, noise: float) -> Factors:
    """Balanced factors of U·C·Vᵀ: those of the core, carried to the sides."""
    identity = torch.eye(core_PQ.shape[0], dtype=core_PQ.dtype)
    if core_PQ.numel():
        left, right = lora.cut_product(identity, core_PQ, noise=noise).factors
    else:
        left, right = core_PQ.new_zeros(core_PQ.shape[0], 1), core_PQ.new_zeros(1, core_PQ.shape[1])
    b_OR = left if outputs_OP is None else outputs_OP @ left
    return b_OR, right if inputs_IQ is None else right @ inputs_IQ.T
