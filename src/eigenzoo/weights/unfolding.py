"""Unfold a tensor to a matrix of outputs and inputs.

    vector    (o,)              → (o, 1)
    matrix    (o, i)            → (o, i)
    kernel    (o, c, …)         → (o, c · …)     a convolution: each output channel's whole receptive field is its input
    scalar    ()                → (1, 1)

All are reshapes of the row-major values, so the flattened layer is the flattened tensor. Names of outputs and inputs
follow torch.nn.Linear and Conv; GPT-2's Conv1D weights lie transposed in the file and keep the file's order.
"""

from __future__ import annotations

from math import prod

UNFOLDINGS = {0: "scalar", 1: "vector", 2: "matrix"}


def unfolding(shape: tuple[int, ...]) -> str:
    """Name the unfolding of a tensor's shape.

    >>> unfolding((64, 3, 7, 7))
    'kernel'
    """
    return UNFOLDINGS.get(len(shape), "kernel")


def unfolded_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return (outputs, inputs) of a tensor's shape.

    >>> unfolded_shape((64, 3, 7, 7))
    (64, 147)
    """
    if not shape:
        return 1, 1
    return shape[0], prod(shape[1:])
