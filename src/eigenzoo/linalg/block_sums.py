"""Compute the sums of one span of a layer's values. A pass adds them over the spans in a fixed order.

A span has *extended* rows: one row per model, and rows for the models' mean, its rounding error and ones. Rows of zeros fill up
to a number of rows for which products are fast. After the mean is subtracted, one symmetric product of all rows contains the
Gram, the inner products with the mean, the mean's energy and every model's sum.

Legend: N models, E extended rows, D values of one span, I inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import isfinite

import torch
from torch import Tensor

from eigenzoo.linalg import kernels

DEFAULT, HIGH, FAST = "default", "high", "fast"
PRECISIONS = (DEFAULT, HIGH, FAST)
"""`high`: float64 throughout. `default`: float32 products of rows whose mean is removed, summed in float64; small layers float64.
`fast`: bfloat16 products with float32 sums, summed in float64; faster on GPUs only."""


ROWS, SPARE = 8, 1.04
"""Products run in tiles of so many rows: 104 rows take less time than 103, but 48 more than 43; so few are added at most."""


def num_extended(num_models: int) -> int:
    """Return E.

    >>> num_extended(100), num_extended(40)
    (104, 43)
    """
    whole = -(-(num_models + 3) // ROWS) * ROWS
    return whole if whole <= SPARE * (num_models + 3) else num_models + 3


FAR = 2.0
"""What rounding left of the mean is looked for in products where some entry's mean, times this, is larger than its spread.

Elsewhere the mean is no less right than the rows are after it is subtracted: to the rounding of the values themselves."""


SAMPLED = 64
"""Entries' variances are taken from about so many models: only their distribution over the entries is asked for."""


def sample(num_models: int) -> slice:
    """Return the models whose entries' variances are taken: all, or every second, third, …

    >>> sample(500)
    slice(None, None, 8)
    """
    return slice(None, None, -(-num_models // SAMPLED))


@dataclass
class BlockSums:
    """Sums over the runs so far, in float64, on the device of the runs until `on_cpu`.

    Attributes:
        num_models: N.
        gram_EE: of the models about the mean that was subtracted, of that mean, of what its rounding left, of ones, and of zeros.
        squares: Σ v² over the entries, v an entry's sum of squares over the models of `sample`.
        columns_NI: sums of each model's columns about that mean, where they are asked for.
        inputs_II: Σ YᵀY over the models and outputs, where it is asked for.
    """

    num_models: int
    gram_EE: Tensor
    squares: Tensor
    columns_NI: Tensor | None = None
    inputs_II: Tensor | None = None

    @property
    def gram_NN(self) -> Tensor:
        """⟨Y_i, Y_j⟩ with Y the models about the mean that was subtracted."""
        return self.gram_EE[: self.num_models, : self.num_models]

    @property
    def cross_N(self) -> Tensor:
        """⟨R, Y_i⟩ with R that mean."""
        return self.gram_EE[: self.num_models, self.num_models]

    @property
    def energy(self) -> float:
        """⟨R, R⟩."""
        return float(self.gram_EE[self.num_models, self.num_models])

    @property
    def sums_N(self) -> Tensor:
        """⟨1, X_n⟩."""
        ones_E = self.gram_EE[:, self.num_models + 2]
        return ones_E[: self.num_models] + ones_E[self.num_models]

    @property
    def is_finite(self) -> bool:
        """Whether all values were finite, and no product overflowed: any other value reaches the diagonal."""
        return isfinite(float(self.gram_EE.trace()))

    def on_cpu(self) -> BlockSums:
        """Return the sums on the CPU: on another device the host waits here for all that was asked of it."""
        return replace(
            self,
            gram_EE=self.gram_EE.cpu(),
            squares=self.squares.cpu(),
            columns_NI=None if self.columns_NI is None else self.columns_NI.cpu(),
            inputs_II=None if self.inputs_II is None else self.inputs_II.cpu(),
        )

    def add(self, other: BlockSums) -> None:
        """Add the sums of later runs."""
        self.gram_EE += other.gram_EE
        self.squares += other.squares
        if self.columns_NI is not None and other.columns_NI is not None:
            self.columns_NI += other.columns_NI
        if self.inputs_II is not None and other.inputs_II is not None:
            self.inputs_II += other.inputs_II


def center_rows(extended_ED: Tensor, num_models: int, inputs: int) -> None:
    """Centre one run of whole output rows, in place.

    The models' mean is subtracted from their rows, and it, what its rounding left, ones and zeros go into the others. The mean is
    rounded to the rows' dtype; what is subtracted is what is kept, so nothing is lost by that.
    """
    for part in parts(extended_ED.shape[1], inputs):
        _center_part(extended_ED[:, part], num_models)


def parts(num_columns: int, inputs: int) -> Iterator[slice]:
    """Cut a run of whole output rows into the columns of one product after another: the same wherever a layer is cut into runs."""
    step = max(1, kernels.PRODUCT_COLUMNS // inputs) * inputs
    return (slice(start, min(start + step, num_columns)) for start in range(0, num_columns, step))


def _center_part(part_ED: Tensor, num_models: int) -> Tensor:
    """Centre the columns of one product in place, and return their `squares`."""
    rows_ND, mean_D, rest_D = part_ED[:num_models], part_ED[num_models], part_ED[num_models + 1]
    kernels.mean_rows(rows_ND, mean_D)
    kernels.subtract(rows_ND, mean_D)
    chosen_ND = rows_ND[sample(num_models)]
    energies_D = kernels.column_energies(chosen_ND)
    is_far = (mean_D.square() * (FAR**2 * len(chosen_ND)) > energies_D).any()
    if part_ED.device.type != "cpu":
        # No branch, because the host would wait for the device at every product.
        kernels.mean_rows(rows_ND, rest_D)
        rest_D.mul_(is_far)
    elif bool(is_far):
        kernels.mean_rows(rows_ND, rest_D)
    else:
        rest_D.zero_()
    part_ED[num_models + 2] = 1
    part_ED[num_models + 3 :] = 0
    energies_D = energies_D.double()
    return energies_D @ energies_D


def exact_mean(extended_ED: Tensor, num_models: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return the mean of centred rows: what was subtracted, and what its rounding left in the rows."""
    return extended_ED[num_models].to(dtype) + extended_ED[num_models + 1].to(dtype)


def empty_sums(
    num_models: int, inputs: int, *, columns: bool = False, sides: bool = False, device: str = "cpu"
) -> BlockSums:
    """Return sums over no run, of what is asked for, on the device of the runs."""
    size = num_extended(num_models)

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=device)

    return BlockSums(
        num_models,
        zeros(size, size),
        zeros(),
        zeros(num_models, inputs) if columns else None,
        zeros(inputs, inputs) if sides else None,
    )


def add_block(sums: BlockSums, extended_ED: Tensor, inputs: int, precision: str = DEFAULT) -> None:
    """Centre one run of whole output rows (`center_rows`), and add it. Cost N²·D, and N·D·I for the inputs' moment.

    Product by product, since a product's rows stay in the cache from one step to the next. Products are summed one by one in
    float64, in the order of the values, so that the Gram does not depend on how a layer is cut into runs of whole products.
    """
    num_models = sums.num_models
    num_rows = extended_ED.shape[0]
    on_cpu = extended_ED.device.type == "cpu"
    room_EE = torch.empty(num_rows, num_rows, dtype=extended_ED.dtype) if on_cpu else None
    fast = precision == FAST and extended_ED.dtype == torch.float32
    for part in parts(extended_ED.shape[1], inputs):
        part_ED = extended_ED[:, part]
        sums.squares += _center_part(part_ED, num_models)
        sums.gram_EE += _fast_gram(part_ED, num_models) if fast else kernels.gram(part_ED, room_EE)
    wide = extended_ED[:num_models].reshape(-1, inputs)
    if sums.columns_NI is not None:
        sums.columns_NI += wide.view(num_models, -1, inputs).sum(1).double()
    if sums.inputs_II is not None:
        sums.inputs_II += _transposed_gram(wide)


def _fast_gram(part_ED: Tensor, num_models: int) -> Tensor:
    """Return the Gram. Products between models are in bfloat16, products with their mean and with ones in float32."""
    gram_EE = part_ED.new_empty(part_ED.shape[0], part_ED.shape[0])
    gram_EE[:num_models, :num_models] = kernels.bfloat16_gram(part_ED[:num_models])
    gram_EE[num_models:] = kernels.product(part_ED[num_models:], part_ED.T)
    gram_EE[:, num_models:] = gram_EE[num_models:].T
    return gram_EE


def _transposed_gram(rows_RI: Tensor) -> Tensor:
    """Return rowsᵀ · rows in float64, summed over blocks of rows."""
    moment_II = rows_RI.new_zeros(rows_RI.shape[1], rows_RI.shape[1], dtype=torch.float64)
    for start in range(0, rows_RI.shape[0], kernels.PRODUCT_COLUMNS):
        moment_II += kernels.gram(rows_RI[start : start + kernels.PRODUCT_COLUMNS].T)
    return moment_II
