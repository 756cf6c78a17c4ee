"""The products of a pass over weights, each computed by the fastest library.

On one CPU thread these are numpy's symmetric product, which does half the work (BLAS syrk), torch's general product (MKL), and
numpy's sums over models, which are 10 to 30 times as fast as torch's for long rows. With AVX-512 and AVX2 they are the fastest or
within a few percent of it (docs/log.md has the table). So nothing is measured at run time, and one machine always gives the same
bits. Other devices use torch. All libraries agree to round-off, and each gives the same bits for calls with the same shapes.

Legend: N models, D values of one block, K directions.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

PRODUCT_COLUMNS = 8192
"""Columns of one symmetric product: its float32 sums are short, and their sum over blocks is float64. Longer ones are no faster."""

SMALL_PRODUCT = 500
"""numpy holds the GIL during symmetric products of at most this many values, so other threads would wait."""

ENERGY_RUN = 512
"""Values of a row whose squares are summed in the row's dtype: their sum is right to its last digit or two."""

BFLOAT16_ROUND_OFF = 2.0**-14
"""Share of the largest eigenvalue below which eigenvalues of bfloat16 products are round-off (see docs/decisions/precision.md)."""


# Products pass NaN, Inf and overflow on without a warning. Callers check the sums (`block_sums.is_finite`).
_quiet = np.errstate(invalid="ignore", over="ignore")


@_quiet
def gram(rows_ND: Tensor, out: Tensor | None = None) -> Tensor:
    """Return rows · rowsᵀ (N, N) in the dtype of the rows; half the products of a general one. Cost N²·D."""
    if rows_ND.device.type != "cpu" or rows_ND.shape[0] ** 2 <= SMALL_PRODUCT:
        return torch.mm(rows_ND, rows_ND.T)
    rows = rows_ND.numpy()
    return torch.from_numpy(np.matmul(rows, rows.T, out=None if out is None else out.numpy()))


def long_gram(rows_ND: Tensor) -> Tensor:
    """Return rows · rowsᵀ in float64, its products in the dtype of the rows, `PRODUCT_COLUMNS` columns at a time."""
    gram_NN = torch.zeros(rows_ND.shape[0], rows_ND.shape[0], dtype=torch.float64, device=rows_ND.device)
    for start in range(0, rows_ND.shape[1], PRODUCT_COLUMNS):
        gram_NN += gram(rows_ND[:, start : start + PRODUCT_COLUMNS])
    return gram_NN


def long_product(left_KD: Tensor, right_ND: Tensor) -> Tensor:
    """Return left · rightᵀ (K, N) in float64, its products in the dtype of the rows, `PRODUCT_COLUMNS` columns at a time."""
    product_KN = torch.zeros(left_KD.shape[0], right_ND.shape[0], dtype=torch.float64, device=left_KD.device)
    for start in range(0, left_KD.shape[1], PRODUCT_COLUMNS):
        columns = slice(start, start + PRODUCT_COLUMNS)
        product_KN += product(left_KD[:, columns], right_ND[:, columns].T)
    return product_KN


def bfloat16_gram(rows_ND: Tensor) -> Tensor:
    """Return rows · rowsᵀ of float32 rows with factors rounded to bfloat16 and sums in float32.

    In bfloat16's own units on a GPU. Elsewhere the rounded rows are multiplied in float32: the same result, no faster (torch has no
    product of bfloat16 with float32 sums on a CPU but by a switch of the whole process).
    """
    rounded = rows_ND.to(torch.bfloat16)
    if rows_ND.device.type == "cuda":
        return torch.mm(rounded, rounded.T, out_dtype=torch.float32)
    return gram(rounded.to(torch.float32))


def product(left_KN: Tensor, right_ND: Tensor, out: Tensor | None = None) -> Tensor:
    """Return left · right (K, D), in memory that is given, if any. How many columns are given at once may change the last bits."""
    return torch.mm(left_KN, right_ND, out=out)


@_quiet
def mean_rows(rows_ND: Tensor, out: Tensor | None = None) -> Tensor:
    """Return the mean over models (D,) in the dtype of the rows."""
    if rows_ND.device.type != "cpu":
        mean_D = rows_ND.mean(0)
        return mean_D if out is None else out.copy_(mean_D)
    rows = rows_ND.numpy()
    weights = np.full(rows.shape[0], 1 / rows.shape[0], rows.dtype)
    return torch.from_numpy(np.matmul(weights, rows, out=None if out is None else out.numpy()))


@_quiet
def subtract(rows_ND: Tensor, row_D: Tensor) -> None:
    """Subtract one row from every row, in place."""
    if rows_ND.device.type != "cpu":
        rows_ND -= row_D
        return
    rows = rows_ND.numpy()
    np.subtract(rows, row_D.numpy(), out=rows)


@_quiet
def scale(rows_ND: Tensor, factors_N1: Tensor) -> None:
    """Multiply every row by its factor, in place."""
    rows = rows_ND.numpy()
    np.multiply(rows, factors_N1.numpy(), out=rows)


@_quiet
def column_energies(rows_ND: Tensor) -> Tensor:
    """Return the sum of squares of every column (D,)."""
    if rows_ND.device.type != "cpu":
        return rows_ND.square().sum(0)
    rows = rows_ND.numpy()
    return torch.from_numpy(np.einsum("nd,nd->d", rows, rows))


@_quiet
def row_energies(rows_ND: Tensor) -> Tensor:
    """Return the sum of squares of every row (N,) in float64: those of short runs in the rows' dtype, their sum in float64."""
    whole = rows_ND.shape[1] - rows_ND.shape[1] % ENERGY_RUN
    rows = rows_ND.numpy()
    runs, rest = rows[:, :whole].reshape(len(rows), -1, ENERGY_RUN), rows[:, whole:].astype(np.float64)
    energies = np.einsum("nrd,nrd->nr", runs, runs).astype(np.float64).sum(1) + np.einsum("nd,nd->n", rest, rest)
    return torch.from_numpy(energies)
