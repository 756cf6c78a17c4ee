"""What a pass takes from each run of values of a layer before it lets them go: sums that add up over runs, in a fixed order.

A run comes as *extended* rows: one row per model, and room for the models' mean and for ones (and for zeros, up to a number of
rows that products like). After the mean is subtracted one symmetric product of all rows holds the Gram, the inner products with
the mean, the mean's energy and every model's sum.

Legend: N models, E extended rows, D values of one run, I inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from eigenzoo.linalg import kernels

DEFAULT, HIGH, FAST = "default", "high", "fast"
PRECISIONS = (DEFAULT, HIGH, FAST)
"""`high`: float64 throughout. `default`: float32 products of rows whose mean is removed, summed in float64; small layers float64.
`fast`: bfloat16 products with float32 sums, summed in float64; faster on GPUs only."""


ROWS, SPARE = 8, 1.04
"""Products run in tiles of so many rows: 104 rows take less time than 102, but 48 more than 42; so few are added at most."""


def num_extended(num_models: int) -> int:
    """Return E.

    >>> num_extended(100), num_extended(40)
    (104, 42)
    """
    whole = -(-(num_models + 2) // ROWS) * ROWS
    return whole if whole <= SPARE * (num_models + 2) else num_models + 2


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
    """Sums over the runs so far, in float64.

    Attributes:
        num_models: N.
        gram_EE: of the models about the mean that was subtracted, of that mean, of ones, and of zeros.
        squares: Σ v² over the entries, v an entry's sum of squares over the models of `sample`.
        columns_NI: sums of each model's columns about that mean, where they are asked for.
        inputs_II: Σ YᵀY over the models and outputs, where it is asked for.
    """

    num_models: int
    gram_EE: Tensor
    squares: float = 0.0
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
        ones_E = self.gram_EE[:, self.num_models + 1]
        return ones_E[: self.num_models] + ones_E[self.num_models]

    @property
    def is_finite(self) -> bool:
        """Whether all values were finite, and no product overflowed: any other value reaches the diagonal."""
        return bool(torch.isfinite(self.gram_EE.diagonal()).all())

    def add(self, other: BlockSums) -> None:
        """Add the sums of later runs."""
        self.gram_EE += other.gram_EE
        self.squares += other.squares
        if self.columns_NI is not None and other.columns_NI is not None:
            self.columns_NI += other.columns_NI
        if self.inputs_II is not None and other.inputs_II is not None:
            self.inputs_II += other.inputs_II


def center_rows(extended_ED: Tensor, num_models: int) -> None:
    """Subtract the models' mean from their rows, and put it, ones and zeros into the others; in place.

    The mean is rounded to the rows' dtype; what is subtracted is what is kept, so nothing is lost by that.
    """
    rows_ND = extended_ED[:num_models]
    kernels.mean_rows(rows_ND, extended_ED[num_models])
    kernels.subtract(rows_ND, extended_ED[num_models])
    extended_ED[num_models + 1] = 1
    extended_ED[num_models + 2 :] = 0


def exact_mean(extended_ED: Tensor, num_models: int) -> Tensor:
    """Return the mean of centred rows in float64: what was subtracted, and what its rounding left in the rows."""
    return extended_ED[num_models].double() + kernels.mean_rows(extended_ED[:num_models]).double()


def empty_sums(num_models: int, inputs: int, *, columns: bool = False, sides: bool = False) -> BlockSums:
    """Return sums over no run, of what is asked for."""
    size = num_extended(num_models)
    return BlockSums(
        num_models,
        torch.zeros(size, size, dtype=torch.float64),
        0.0,
        torch.zeros(num_models, inputs, dtype=torch.float64) if columns else None,
        torch.zeros(inputs, inputs, dtype=torch.float64) if sides else None,
    )


def add_block(sums: BlockSums, extended_ED: Tensor, inputs: int, precision: str = DEFAULT) -> None:
    """Add one run of whole output rows, centred by `center_rows`. Cost N²·D, and N·D·I for the inputs' moment.

    Products are summed one by one in float64, in the order of the values, so that the Gram does not depend on how a layer is
    cut into runs of whole products.
    """
    num_rows, num_values = extended_ED.shape
    device, on_cpu = extended_ED.device, extended_ED.device.type == "cpu"
    gram_EE = sums.gram_EE if on_cpu else torch.zeros_like(sums.gram_EE, device=device)
    partial = torch.empty(num_rows, num_rows, dtype=extended_ED.dtype, device=device)
    step = max(1, kernels.PRODUCT_COLUMNS // inputs) * inputs
    for start in range(0, num_values, step):
        part = extended_ED[:, start : start + step]
        fast = precision == FAST and part.dtype == torch.float32
        gram_EE += _fast_gram(part, sums.num_models) if fast else kernels.gram(part, partial)
    if not on_cpu:
        sums.gram_EE += gram_EE.cpu()
    rows_ND = extended_ED[: sums.num_models]
    variances_D = kernels.column_energies(rows_ND[sample(sums.num_models)]).double()
    sums.squares += float(variances_D @ variances_D)
    wide = rows_ND.reshape(-1, inputs)
    if sums.columns_NI is not None:
        sums.columns_NI += wide.view(sums.num_models, -1, inputs).sum(1).double().cpu()
    if sums.inputs_II is not None:
        sums.inputs_II += _transposed_gram(wide).cpu()


def _fast_gram(part_ED: Tensor, num_models: int) -> Tensor:
    """Return the Gram with bfloat16 products among the models, and float32 ones with their mean and with ones."""
    gram_EE = part_ED.new_empty(part_ED.shape[0], part_ED.shape[0])
    gram_EE[:num_models, :num_models] = kernels.bfloat16_gram(part_ED[:num_models])
    gram_EE[num_models:] = kernels.product(part_ED[num_models:], part_ED.T)
    gram_EE[:, num_models:] = gram_EE[num_models:].T
    return gram_EE


def _transposed_gram(rows_RI: Tensor) -> Tensor:
    """Return rowsᵀ · rows in float64, run by run of rows."""
    moment_II = torch.zeros(rows_RI.shape[1], rows_RI.shape[1], dtype=torch.float64, device=rows_RI.device)
    for start in range(0, rows_RI.shape[0], kernels.PRODUCT_COLUMNS):
        moment_II += kernels.gram(rows_RI[start : start + kernels.PRODUCT_COLUMNS].T)
    return moment_II
