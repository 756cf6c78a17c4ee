"""The dense float64 reference: what section and page of any textbook say, in numpy, with every matrix formed.

Legend: N models, O outputs, I inputs, D = O · I, K kept directions.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from tensorly.decomposition._tucker import initialize_tucker, partial_tucker
from tensorly.tenalg import multi_mode_dot

Array = NDArray[np.float64]
MODES = {"models": 0, "outputs": 1, "inputs": 2}


def center_of(stack_NOI: Array, center: str) -> Array:
    """What is removed, broadcastable over the stack."""
    mean_OI = stack_NOI.mean(0)
    return {
        "models": mean_OI,
        "columns": mean_OI.mean(0, keepdims=True),
        "global": mean_OI.mean(keepdims=True),
        "none": np.zeros((1, 1)),
    }[center]


def unfold(stack_NOI: Array, axis: str) -> Array:
    """The unfolding along one axis, its directions the rows."""
    return np.moveaxis(stack_NOI, MODES[axis], 0).reshape(stack_NOI.shape[MODES[axis]], -1)


def squares(stack_NOI: Array, axis: str) -> Array:
    """Squared singular values of an unfolding, as many as the axis is long."""
    values = np.linalg.svd(unfold(stack_NOI, axis), compute_uv=False) ** 2
    return np.pad(values, (0, stack_NOI.shape[MODES[axis]] - len(values)))


def ratios(stack_NOI: Array, axis: str = "models") -> Array:
    """Explained variance ratios; the total is the denominator."""
    values = squares(stack_NOI, axis)
    return values / values.sum() if values.sum() > 0 else values


def numerical_rank(stack_NOI: Array, axis: str = "models", eps: float = float(np.finfo(np.float64).eps)) -> int:
    """numpy's own rule: singular values above the largest · longest side · eps."""
    return int(np.linalg.matrix_rank(unfold(stack_NOI, axis), rtol=max(unfold(stack_NOI, axis).shape) * eps))


def axis_basis(stack_NOI: Array, axis: str, rank: int) -> Array:
    """Leading left singular vectors of an unfolding of a side, (size, rank)."""
    return np.linalg.svd(unfold(stack_NOI, axis), full_matrices=False)[0][:, :rank]


def model_directions(stack_NOI: Array, rank: int) -> Array:
    """Leading directions of flattened models, (rank, D)."""
    return np.linalg.svd(unfold(stack_NOI, "models"), full_matrices=False)[2][:rank]


def relative_gap(stack_NOI: Array, axis: str, rank: int) -> float:
    """Distance of the kept from the dropped eigenvalues, over the largest."""
    values = np.append(squares(stack_NOI, axis), 0.0)
    return float((values[rank - 1] - values[rank]) / values[0]) if rank and values[0] > 0 else 0.0


def project_models(stack_NOI: Array, rank: int) -> Array:
    """PCA of the flattened models: the stack in its `rank` leading directions."""
    directions = model_directions(stack_NOI, rank)
    flat = unfold(stack_NOI, "models")
    return (flat @ directions.T @ directions).reshape(stack_NOI.shape)


def hosvd_error(stack_NOI: Array, ranks: Mapping[str, int]) -> float:
    """‖Y − Ŷ‖² of TensorLy's truncated HOSVD."""
    modes = [MODES[axis] for axis in ranks]
    core, factors = initialize_tucker(stack_NOI, list(ranks.values()), modes, 0, init="svd")
    return float(((stack_NOI - multi_mode_dot(core, factors, modes)) ** 2).sum())


def hooi_error(stack_NOI: Array, ranks: Mapping[str, int]) -> float:
    """‖Y − Ŷ‖² of TensorLy's Tucker decomposition, iterated: no less than the best there is."""
    modes = [MODES[axis] for axis in ranks]
    (core, factors), _ = partial_tucker(stack_NOI, list(ranks.values()), modes, init="svd", tol=1e-10, random_state=0)
    return float(((stack_NOI - multi_mode_dot(core, factors, modes)) ** 2).sum())


def largest_sine(first: Array, second: Array) -> float:
    """Sine of the largest angle between the columns' spans."""
    return float(np.linalg.norm(first - second @ (second.T @ first), 2)) if first.size else 0.0
