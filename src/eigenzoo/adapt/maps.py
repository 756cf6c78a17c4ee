"""What coefficients are to a weight: the linear map L of ΔW = M + L(c), one class for each form of a fitted layer.

    flat      L(c) = Σ c_k V_k                     dense: k whole-layer directions
    tucker    L(c) = U · C · Vᵀ                    through the small side; C = c, or Σ c_k D_k with axis `models`
    stacked   L(c) = Bᵀ · diag(w) · A, w = W c      through the ranks of the zoo's own factors

A map is a module whose bases are buffers that no state dict holds: they are the bundle's, and come from there.

Legend: O outputs, I inputs, K directions, P and Q kept outputs and inputs, R ranks of all updates of a zoo.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn.functional import linear

from eigenzoo.adapt.trained import KeepsDtype
from eigenzoo.subspace.bases.basis import LayerBasis
from eigenzoo.subspace.bases.flat import FlatBasis
from eigenzoo.subspace.bases.stacked import StackedBasis
from eigenzoo.subspace.bases.tucker import TuckerBasis


class Map(KeepsDtype, ABC):
    """The map from one layer's coefficients to a matrix (O, I); its bases keep their dtype when the model is moved to another.

    Attributes:
        shape: (O, I).
        dtype: of the bases.
    """

    def __init__(self, basis: LayerBasis, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape, self.dtype = basis.layer.shape, dtype

    def _keep(self, name: str, values: Tensor | None) -> None:
        self.register_buffer(name, None if values is None else values.to(self.dtype), persistent=False)

    @abstractmethod
    def matrix(self, coefficients: Tensor) -> Tensor:
        """Return L(c) as a matrix (O, I); linear and differentiable."""

    @abstractmethod
    def mean(self) -> Tensor:
        """Return M as a matrix (O, I)."""

    @abstractmethod
    def randomize(self, generator: torch.Generator) -> None:
        """Put random bases of the same sizes in the place of the zoo's, the mean kept: the control of every comparison."""

    def factors(self, coefficients: Tensor, mean: bool) -> tuple[Tensor, Tensor] | None:
        """Return M + L(c), or L(c), as a product of (O, ·) and (·, I) matrices where that is cheaper than the matrix itself."""
        return None

    def apply_to(self, inputs: Tensor, coefficients: Tensor, mean: bool) -> Tensor:
        """Return x · (M + L(c))ᵀ for inputs (…, I), or x · L(c)ᵀ, through the small side where there is one."""
        factors = self.factors(coefficients, mean)
        if factors is None:
            matrix = self.matrix(coefficients)
            return linear(inputs, matrix + self.mean() if mean else matrix)
        return linear(linear(inputs, factors[1]), factors[0])


class FlatMap(Map):
    """Whole-layer directions."""

    directions: Tensor
    center: Tensor

    def __init__(self, basis: FlatBasis, dtype: torch.dtype) -> None:
        super().__init__(basis, dtype)
        self._keep("directions", basis.directions())
        self._keep("center", basis.removed())

    def matrix(self, coefficients: Tensor) -> Tensor:
        """Return L(c) (O, I)."""
        matrix: Tensor = torch.tensordot(coefficients, self.directions, 1)
        return matrix

    def mean(self) -> Tensor:
        """Return M (O, I)."""
        return self.center.expand(self.shape)

    def randomize(self, generator: torch.Generator) -> None:
        """Draw orthonormal directions."""
        self.directions = _orthonormal(self.directions.flatten(1), generator).view_as(self.directions)


class TuckerMap(Map):
    """Bases of the sides, and a core between them.

    Attributes:
        core_shape: (P, Q).
        mean_is_core: whether M is a core between the sides too, or a whole matrix.
    """

    outputs: Tensor | None
    inputs: Tensor | None
    shared: Tensor | None
    center: Tensor

    def __init__(self, basis: TuckerBasis, dtype: torch.dtype) -> None:
        super().__init__(basis, dtype)
        for name, part in (
            ("outputs", basis.side("outputs")),
            ("inputs", basis.side("inputs")),
            ("shared", basis.shared()),
        ):
            self._keep(name, part)
        self._keep("center", basis.removed())
        self.core_shape, self.mean_is_core = basis.core_shape, basis.layer.kind == "update"

    def matrix(self, coefficients: Tensor) -> Tensor:
        """Return L(c) (O, I)."""
        return self._expanded(self._core(coefficients))

    def mean(self) -> Tensor:
        """Return M (O, I)."""
        if self.mean_is_core:
            return self._expanded(self.center.expand(self.core_shape))
        return self.center.expand(self.shape)

    def factors(self, coefficients: Tensor, mean: bool) -> tuple[Tensor, Tensor] | None:
        """Return the two sides of M + L(c), or of L(c)."""
        if self.inputs is None or (mean and not self.mean_is_core):
            return None
        core = self._core(coefficients)
        core = core + self.center if mean else core
        return core if self.outputs is None else self.outputs @ core, self.inputs.T

    def _core(self, coefficients: Tensor) -> Tensor:
        return coefficients if self.shared is None else torch.tensordot(coefficients, self.shared, 1)

    def _expanded(self, core: Tensor) -> Tensor:
        left = core if self.outputs is None else self.outputs @ core
        return left if self.inputs is None else left @ self.inputs.T

    def randomize(self, generator: torch.Generator) -> None:
        """Draw orthonormal sides and shared cores; a mean that was a core is kept as the matrix it was."""
        self.center, self.mean_is_core = self.mean().clone(), False
        for name in ("outputs", "inputs"):
            side = getattr(self, name)
            if side is not None:
                setattr(self, name, _orthonormal(side.T, generator).T.contiguous())
        if self.shared is not None:
            self.shared = _orthonormal(self.shared.flatten(1), generator).view_as(self.shared)


class StackedMap(Map):
    """Weights over the factors of all of a zoo's updates."""

    factors_b: Tensor
    factors_a: Tensor
    weights: Tensor
    center: Tensor | None

    def __init__(self, basis: StackedBasis, dtype: torch.dtype) -> None:
        super().__init__(basis, dtype)
        b_PO, a_PI, weights_KP = basis.table()
        self._keep("factors_b", b_PO.T.contiguous())
        self._keep("factors_a", a_PI)
        self._keep("weights", weights_KP)
        self._keep("center", None)

    def matrix(self, coefficients: Tensor) -> Tensor:
        """Return L(c) (O, I)."""
        return self._product(coefficients @ self.weights[1:])

    def mean(self) -> Tensor:
        """Return M (O, I)."""
        return self._product(self.weights[0]) if self.center is None else self.center

    def factors(self, coefficients: Tensor, mean: bool) -> tuple[Tensor, Tensor] | None:
        """Return the two sides of M + L(c), or of L(c)."""
        if mean and self.center is not None:
            return None
        combined_P = coefficients @ self.weights[1:]
        return self.factors_b * (combined_P + self.weights[0] if mean else combined_P), self.factors_a

    def _product(self, combined_P: Tensor) -> Tensor:
        return (self.factors_b * combined_P) @ self.factors_a

    def randomize(self, generator: torch.Generator) -> None:
        """Draw factors of the size of the zoo's, and keep the table: sums of as many random updates, about the same mean."""
        self.center = self.mean()
        for name in ("factors_b", "factors_a"):
            factor = getattr(self, name)
            drawn = torch.randn(factor.shape, generator=generator).to(factor)
            setattr(self, name, drawn * (factor.norm() / drawn.norm()))


def _orthonormal(rows_KD: Tensor, generator: torch.Generator) -> Tensor:
    """Draw as many orthonormal rows as there are."""
    drawn_DK = torch.randn(rows_KD.shape[::-1], generator=generator, dtype=torch.float64)
    rows: Tensor = torch.linalg.qr(drawn_DK)[0].T.contiguous()
    return rows.to(rows_KD)


def map_of(basis: LayerBasis, dtype: torch.dtype = torch.float32) -> Map:
    """Return the map of a fitted layer, its bases read into memory in this dtype."""
    if isinstance(basis, FlatBasis):
        return FlatMap(basis, dtype)
    if isinstance(basis, TuckerBasis):
        return TuckerMap(basis, dtype)
    assert isinstance(basis, StackedBasis)
    return StackedMap(basis, dtype)
