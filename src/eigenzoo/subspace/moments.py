"""Second moments of a layer's stack: one streaming pass over the weights, after which none is read again to learn from.

Legend: N models, D values of one flattened layer, O outputs, I inputs, P stacked LoRA ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from eigenzoo.linalg import lora
from eigenzoo.linalg.gram import center_gram, shift_gram, split_gram
from eigenzoo.linalg.side import SideMoment
from eigenzoo.linalg.spectrum import FLOAT32_ROUND_OFF, NO_VARIANCE, NUMERICAL_RANK
from eigenzoo.zoo.stack import BLOCK_BYTES, Block, DenseStack, Stack, UpdateStack

DENSE, FACTOR = "dense", "factor"

LARGEST_SIDE = 16384
"""More outputs or inputs than this are kept whole: their moment would take gigabytes, and its eigenvectors minutes."""


@dataclass(frozen=True)
class LayerMoments:
    """The second moments of one layer's stack X (N × O × I), in float64.

    With R the mean of the first `num_reference` models (all of them, until models are added), Y = X − R, and M the center
    that is removed (the models' mean, its column means, zero, or a scalar):

    Attributes:
        gram_NN: ⟨Y_i, Y_j⟩.
        cross_N: ⟨R, Y_i⟩.
        reference_energy: ⟨R, R⟩.
        num_values: D.
        round_off: share of the largest eigenvalue below which eigenvalues are the products' round-off.
        num_reference: how many models R is the mean of; the first ones.
        removed: M, broadcastable over (O, I); None for center `models`, where only a pass over the weights can give it.
        shift_N: ⟨R − M, Y_i⟩, and shift_energy: ⟨R − M, R − M⟩; for center `models` zero and unused.
        outputs, inputs: Σ (X_n − M)(X_n − M)ᵀ and its mirror, where an axis asked for them; for LoRA updates they
            are taken about zero, so that the bases hold the mean too (see `tucker`).
        entries: in how many dimensions the models would lie if their entries varied independently, each as it does: (Σ v)² / Σ v²
            with v the entries' variances; D where all vary alike. None for LoRA updates, which are never multiplied out, and
            where growth from a bundle alone could not know it, as all below.
        sums_N: the sum of each model's entries, ⟨1, X_n⟩.
        singular_NR: for LoRA updates, their singular values, descending, padded with zeros.
        starts_NN: for LoRA updates, the inner products of their A-factors (of the rows that all have): what tells a
            shared initialisation, which the update itself need not show.
    """

    gram_NN: Tensor
    cross_N: Tensor
    reference_energy: float
    num_values: int
    num_reference: int
    round_off: float = NUMERICAL_RANK
    removed: Tensor | None = None
    shift_N: Tensor | None = None
    shift_energy: float = 0.0
    outputs: SideMoment | None = None
    inputs: SideMoment | None = None
    entries: float | None = None
    sums_N: Tensor | None = None
    singular_NR: Tensor | None = None
    starts_NN: Tensor | None = None

    @property
    def num_models(self) -> int:
        """N."""
        return self.gram_NN.shape[0]

    @property
    def centered_NN(self) -> Tensor:
        """Gram of X_n − M, the second moment of the models axis."""
        if self.shift_N is None:
            return center_gram(self.gram_NN)
        return shift_gram(self.gram_NN, self.shift_N, self.shift_energy)

    @property
    def raw_NN(self) -> Tensor:
        """Gram of X_n, nothing removed."""
        return shift_gram(self.gram_NN, self.cross_N, self.reference_energy)

    @property
    def energies_N(self) -> Tensor:
        """‖X_n‖² of each model."""
        return (self.gram_NN.diagonal() + 2 * self.cross_N + self.reference_energy).clamp_min(0)

    @property
    def variance(self) -> float:
        """Energy of X − M, summed over models; zero where it is no more than round-off of the whole energy."""
        centered = float(self.centered_NN.diagonal().sum())
        return centered if centered > NO_VARIANCE * float(self.energies_N.sum()) else 0.0

    @property
    def mean_share(self) -> float:
        """Share of the stack's energy that lies in the mean over all models."""
        total = float(self.energies_N.sum())
        return self.num_models * float(self.raw_NN.mean()) / total if total > 0 else 0.0


def collect(
    stack: Stack, axes: tuple[str, ...] = ("models",), center: str = "models", block_bytes: int = BLOCK_BYTES
) -> LayerMoments:
    """Collect a layer's moments in one pass (a second one where the outputs' moment of a stack larger than a block is asked).

    Products run in the stack's dtype on rows whose mean has been removed inside the block, and are summed in float64:
    relative error of the centred spectrum about 1e-7 in float32. Cost N²·D products and one read for the Gram, and
    N·D·O (or I) more for an output (input) moment. For LoRA updates nothing dense is formed: P²·(O + I) products.
    """
    if isinstance(stack, UpdateStack):
        return _collect_updates(stack, axes, center, block_bytes)
    return _collect_dense(stack, axes, center, block_bytes)


def _collect_dense(stack: DenseStack, axes: tuple[str, ...], center: str, block_bytes: int) -> LayerMoments:
    num_models, (outputs, inputs) = len(stack), stack.layer.shape
    gram_NN = torch.zeros(num_models, num_models, dtype=torch.float64)
    cross_N = torch.zeros(num_models, dtype=torch.float64)
    columns_NI = torch.zeros(num_models, inputs, dtype=torch.float64) if center in ("columns", "global") else None
    needs_mean = bool({"outputs", "inputs"} & set(axes)) or columns_NI is not None
    mean_OI = torch.empty(outputs, inputs, dtype=torch.float64) if needs_mean else None
    inputs_II = torch.zeros(inputs, inputs, dtype=torch.float64) if side_form(stack, "inputs", axes) == DENSE else None
    sums_N = torch.zeros(num_models, dtype=torch.float64)
    mean_energy = squares = 0.0
    for block in stack.blocks(block_bytes):
        rows, mean_D = centered_rows(block)
        squares += squared_variances(rows)
        sums_N += rows.sum(1, dtype=torch.float64) + mean_D.sum()
        gram_NN += (rows @ rows.T).double()
        cross_N += (rows @ mean_D.to(rows.dtype)).double()
        mean_energy += float(mean_D.square().sum())
        if mean_OI is not None:
            mean_OI.view(-1)[block.start : block.stop] = mean_D
        if columns_NI is not None:
            columns_NI += rows.view(num_models, -1, inputs).sum(1)
        if inputs_II is not None:
            wide = rows.view(-1, inputs)
            inputs_II += (wide.T @ wide).double()
    round_off = NUMERICAL_RANK if stack.dtype == torch.float64 else FLOAT32_ROUND_OFF
    moments = LayerMoments(center_gram(gram_NN), cross_N, mean_energy, stack.layer.num_values, num_models, round_off)
    moments = replace(moments, sums_N=sums_N, entries=entry_dimensions(moments.gram_NN, squares))
    if mean_OI is None:
        return moments if center == "models" else _shifted_to_zero(moments)
    removed = center_of(mean_OI, center)
    shift_OI = mean_OI - removed
    if inputs_II is not None:
        # Σ(Y + d)ᵀ(Y + d) = ΣYᵀY + N·dᵀd, for Σ Y = 0.
        moments = replace(moments, inputs=SideMoment(inputs_II + num_models * shift_OI.T @ shift_OI))
    moments = replace(
        moments,
        inputs=moments.inputs or _side_moment(stack, "inputs", axes, removed),
        outputs=_side_moment(stack, "outputs", axes, removed),
    )
    return moments if center == "models" else _shifted(moments, mean_OI, shift_OI, columns_NI, center)


def squared_variances(rows: Tensor) -> float:
    """Return Σ v² over the columns of centred rows, with v their sums of squares over the models."""
    return float(torch.linalg.vector_norm(rows, dim=0).double().pow(4).sum())


def entry_dimensions(centered_NN: Tensor, squares: float) -> float:
    """Return (Σ v)² / Σ v², without the part of Σ v² that a variance from N values has by chance, E v² = v²·(1 + 2/(N − 1))."""
    num_models = centered_NN.shape[0]
    chance = (num_models + 1) / (num_models - 1) if num_models > 1 else 1.0
    return float(centered_NN.diagonal().sum()) ** 2 / squares * chance if squares > 0 else 0.0


def side_form(stack: DenseStack, axis: str, axes: tuple[str, ...]) -> str:
    """Say how a side's moment is held: dense, as a factor where all columns together are fewer than the side, or not at all."""
    if axis not in axes:
        return ""
    side, other = stack.layer.shape if axis == "outputs" else stack.layer.shape[::-1]
    if len(stack) * other < side:
        return FACTOR
    return DENSE if side <= LARGEST_SIDE else ""


def _side_moment(stack: DenseStack, axis: str, axes: tuple[str, ...], removed: Tensor) -> SideMoment | None:
    """Σ (X_n − M)(X_n − M)ᵀ or its mirror, model by model: rows of one block see only their own outputs."""
    form = side_form(stack, axis, axes)
    if not form or (form == DENSE and axis == "inputs"):
        return None
    matrices = ((stack.matrix(place) - removed).to(stack.dtype) for place in range(len(stack)))
    if form == FACTOR:
        columns = [(matrix if axis == "outputs" else matrix.T).double() for matrix in matrices]
        return SideMoment(factor_SP=torch.cat(columns, 1))
    moment_OO = torch.zeros(stack.layer.shape[0], stack.layer.shape[0], dtype=torch.float64)
    for matrix_OI in matrices:
        moment_OO += (matrix_OI @ matrix_OI.T).double()
    return SideMoment(moment_OO)


def centered_rows(block: Block) -> tuple[Tensor, Tensor]:
    """Remove the mean over models from a block in place; returns the rows and the mean in float64."""
    mean_D = block.rows.mean(0, dtype=torch.float64)
    block.rows.sub_(mean_D.to(block.rows.dtype))
    return block.rows, mean_D


def center_of(mean_OI: Tensor, center: str) -> Tensor:
    """Return M, broadcastable over (O, I), for a center: the mean, its column means, zero, or its one mean."""
    if center == "models":
        return mean_OI
    if center == "columns":
        return mean_OI.mean(0, keepdim=True)
    if center == "global":
        return mean_OI.mean().view(1, 1)
    return mean_OI.new_zeros(1, 1)


def _shifted_to_zero(moments: LayerMoments) -> LayerMoments:
    zero = torch.zeros(1, 1, dtype=torch.float64)
    return replace(moments, shift_N=moments.cross_N, shift_energy=moments.reference_energy, removed=zero)


def _shifted(
    moments: LayerMoments, mean_OI: Tensor, shift_OI: Tensor, columns_NI: Tensor | None, center: str
) -> LayerMoments:
    """Say where the center lies from the mean: ⟨R − M, Y⟩ from the sums of Y's columns, since M is constant along them."""
    if columns_NI is None:
        return _shifted_to_zero(moments)
    removed = center_of(mean_OI, center)
    shift_N = moments.cross_N - columns_NI @ removed.expand(1, mean_OI.shape[1])[0]
    return replace(moments, removed=removed, shift_N=shift_N, shift_energy=float(shift_OI.square().sum()))


def _collect_updates(stack: UpdateStack, axes: tuple[str, ...], center: str, block_bytes: int) -> LayerMoments:
    raw_NN, starts_NN = update_grams(stack, block_bytes)
    moments = replace(from_raw_gram(raw_NN, stack.layer.num_values), starts_NN=starts_NN, **update_traits(stack))
    if center == "none":
        moments = _shifted_to_zero(moments)
    for axis in ("outputs", "inputs"):
        if axis in axes:
            moment = _update_moment(stack, axis)
            moments = replace(moments, outputs=moment) if axis == "outputs" else replace(moments, inputs=moment)
    return moments


def update_traits(stack: UpdateStack) -> dict[str, Any]:
    """Return each update's sum of entries and singular values, from its factors alone."""
    sums_N = torch.zeros(len(stack), dtype=torch.float64)
    singular_NR = torch.zeros(len(stack), max(stack.ranks), dtype=torch.float64)
    for place in range(len(stack)):
        b_OR, a_RI = stack.factors(place)
        sums_N[place] = b_OR.sum(0) @ a_RI.sum(1)
        values = lora.singular_values((b_OR, a_RI))
        singular_NR[place, : values.numel()] = values
    return {"sums_N": sums_N, "singular_NR": singular_NR}


def from_raw_gram(raw_NN: Tensor, num_values: int) -> LayerMoments:
    """Return moments about the models' mean from the Gram of the models as they are."""
    gram_NN, cross_N, energy = split_gram(raw_NN)
    return LayerMoments(gram_NN, cross_N, energy, num_values, raw_NN.shape[0])


def recentered(moments: LayerMoments) -> LayerMoments:
    """Return the same moments about the mean of all models; nothing but sums of what is known, and no large mean cancels."""
    cross_N = moments.cross_N - moments.cross_N.mean() + moments.gram_NN.mean(1) - moments.gram_NN.mean()
    energy = moments.reference_energy + 2 * float(moments.cross_N.mean()) + float(moments.gram_NN.mean())
    return replace(
        moments,
        gram_NN=center_gram(moments.gram_NN),
        cross_N=cross_N,
        reference_energy=energy,
        num_reference=moments.num_models,
        removed=None,
        shift_N=None,
        shift_energy=0.0,
        outputs=None,
        inputs=None,
    )


def update_grams(stack: UpdateStack, block_bytes: int = BLOCK_BYTES) -> tuple[Tensor, Tensor]:
    """Return ⟨X_i, X_j⟩ of all updates, and of the leading rows of their A-factors, tile by tile of models.

    The factors of a tile fill half a block. The rows are as many as the smallest rank has: PEFT draws A row by row, so that
    one seed gives the same leading rows at any rank.
    """
    raw_NN, starts_NN = torch.zeros(2, len(stack), len(stack), dtype=torch.float64)
    num_rows = min(stack.ranks)
    tiles = _tiles(stack, block_bytes // 2)
    for number, tile in enumerate(tiles):
        left = [stack.factors(place) for place in tile]
        for other in tiles[number:]:
            right = left if other == tile else [stack.factors(place) for place in other]
            columns, rows = slice(other[0], other[-1] + 1), slice(tile[0], tile[-1] + 1)
            raw_NN[rows, columns] = lora.inner_products(left, right)
            starts_NN[rows, columns] = leading_rows(left, num_rows) @ leading_rows(right, num_rows).T
    return raw_NN.triu() + raw_NN.triu(1).T, starts_NN.triu() + starts_NN.triu(1).T


def leading_rows(factors: list[lora.Factors], num_rows: int) -> Tensor:
    """Return the leading rows of each A-factor, flattened."""
    return torch.stack([a_RI[:num_rows].flatten() for _, a_RI in factors])


def _tiles(stack: UpdateStack, tile_bytes: int) -> list[range]:
    """Cut the models into runs whose float64 factors, and products of two runs, fit in `tile_bytes`."""
    width = max(stack.ranks)
    per_model = 8 * width * sum(stack.layer.shape)
    num_tile = max(1, min(tile_bytes // per_model, int((tile_bytes / 16) ** 0.5) // width))
    return [range(start, min(start + num_tile, len(stack))) for start in range(0, len(stack), num_tile)]


def _update_moment(stack: UpdateStack, axis: str) -> SideMoment:
    """Σ s²B(AAᵀ)Bᵀ, or its mirror Σ s²Aᵀ(BᵀB)A, about zero; as a factor while all ranks together are fewer than the side."""
    size = stack.layer.shape[0 if axis == "outputs" else 1]
    fits = sum(stack.ranks) < size
    moment_SS = torch.zeros(0 if fits else size, 0 if fits else size, dtype=torch.float64)
    columns: list[Tensor] = []
    for place in range(len(stack)):
        b_OR, a_RI = stack.factors(place)
        columns.append(lora.output_factor((b_OR, a_RI) if axis == "outputs" else (a_RI.T, b_OR.T)))
        # One product of many thin factors: each alone would only move the moment through memory.
        if not fits and (place + 1 == len(stack) or sum(column.shape[1] for column in columns) >= size // 4):
            factor = torch.cat(columns, 1)
            moment_SS.addmm_(factor, factor.T)
            columns = []
    return SideMoment(factor_SP=torch.cat(columns, 1)) if fits else SideMoment(moment_SS)
