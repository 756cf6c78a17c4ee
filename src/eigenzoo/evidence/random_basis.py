"""Rebuild models from random directions of the same number and form as a fitted layer's, around the same mean.

The mean is removed before the projection and added back, so that the result shows what any directions capture.

Legend: D values of one flattened layer, K directions, O outputs, I inputs, P kept outputs, Q kept inputs, R ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from eigenzoo.linalg import lora
from eigenzoo.linalg.lora import Factors
from eigenzoo.linalg.low_rank import LowRank
from eigenzoo.subspace.bases.basis import CORES, LayerBasis
from eigenzoo.subspace.bases.stacked import StackedBasis
from eigenzoo.subspace.bases.tucker import TuckerBasis
from eigenzoo.zoo.stack import BLOCK_BYTES, Stack, UpdateStack


def rebuild_randomly(
    basis: LayerBasis, stack: Stack, place: int, mean: Tensor | Factors, seed: int
) -> Tensor | Factors:
    """Return M + Π(X − M) in float64: X a model's layer, M the mean as a matrix or as factors, Π a random projection.

    Π is an orthogonal projection on `basis`'s number of directions, drawn by the seed and the layer's name, so that all
    models share it. Form `flat`: K normal directions in D dimensions, two draws of K·D numbers and K²·D products, one
    block in memory. Form `stacked`: K normal low-rank updates of the zoo's mean rank, by their Gram. Form `tucker`: random
    bases of the sides that have one, and K random shared cores between them with axis `models`; low-rank
    cores have the rank of the fit.
    """
    draw = _seeded(seed, basis.layer.name)
    if isinstance(mean, tuple):
        assert isinstance(stack, UpdateStack)
        update = stack.factors(place)
        if isinstance(basis, StackedBasis):
            return _among_updates(basis, update, mean, draw)
        b_OR, a_RI = _sum([update, (-mean[0], mean[1])])
        outputs_OP, inputs_IQ, core = _random_core(basis, b_OR, a_RI, draw)
        left = core if outputs_OP is None else outputs_OP @ core
        identity = torch.eye(core.shape[1], dtype=core.dtype)
        return _least_rank([mean, (left, identity if inputs_IQ is None else inputs_IQ.T)])
    assert not isinstance(stack, UpdateStack)
    deviation_OI = stack.matrix(place).double() - mean
    if isinstance(basis, TuckerBasis):
        outputs_OP, inputs_IQ, core = _random_core(basis, deviation_OI, None, draw)
        left = core if outputs_OP is None else outputs_OP @ core
        return mean + (left if inputs_IQ is None else left @ inputs_IQ.T)
    return mean + project_randomly(deviation_OI.flatten(), basis.ranks["models"], draw).view_as(deviation_OI)


def project_randomly(
    values_D: Tensor, num_directions: int, draw: torch.Generator, block_bytes: int = BLOCK_BYTES
) -> Tensor:
    """Project a vector on `num_directions` random normal directions Z (K, D): Zᵀ(ZZᵀ)⁺Z·x, float64.

    Z is drawn twice by the same generator and is never in memory as a whole. The first sweep computes its Gram and Z·x, the second
    the sum.
    """
    if not num_directions:
        return torch.zeros_like(values_D)
    start_state = draw.get_state()
    gram_KK = torch.zeros(num_directions, num_directions, dtype=torch.float64)
    along_K = torch.zeros(num_directions, dtype=torch.float64)
    for start, stop, directions in _directions(num_directions, values_D.numel(), draw, block_bytes):
        gram_KK += directions @ directions.T
        along_K += directions @ values_D[start:stop]
    weights_K = torch.linalg.pinv(gram_KK, hermitian=True) @ along_K
    projected_D = torch.empty_like(values_D)
    draw.set_state(start_state)
    for start, stop, directions in _directions(num_directions, values_D.numel(), draw, block_bytes):
        projected_D[start:stop] = weights_K @ directions
    return projected_D


def _directions(
    num_directions: int, num_values: int, draw: torch.Generator, block_bytes: int
) -> Iterator[tuple[int, int, Tensor]]:
    """Yield (start, stop, directions (K, stop − start))."""
    per_block = max(1, block_bytes // (8 * num_directions))
    for start in range(0, num_values, per_block):
        stop = min(start + per_block, num_values)
        # Drawn in float32, which is twice as fast.
        yield start, stop, torch.randn(num_directions, stop - start, generator=draw, dtype=torch.float32).double()


def _among_updates(basis: StackedBasis, update: Factors, mean: Factors, draw: torch.Generator) -> Factors:
    """Return M + Π(X − M) with Π on K random updates of the zoo's mean rank. All inner products are of factors."""
    outputs, inputs = basis.layer.shape
    ranks_N = basis.tensors.read(f"{basis.layer.name}/ranks").double()
    rank = max(1, min(outputs, inputs, round(float(ranks_N.mean()))))
    directions = [(_normal((outputs, rank), draw), _normal((rank, inputs), draw)) for _ in range(basis.ranks["models"])]
    if not directions:
        return mean
    gram_KK = lora.inner_products(directions, directions)
    along_K2 = lora.inner_products(directions, [update, mean])
    weights_K = torch.linalg.pinv(gram_KK, hermitian=True) @ (along_K2[:, 0] - along_K2[:, 1])
    return _least_rank([mean, *((weight * b, a) for weight, (b, a) in zip(weights_K, directions, strict=True))])


def _random_core(
    basis: LayerBasis, left: Tensor, right: Tensor | None, draw: torch.Generator
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Return random U (O, P) and V (I, Q), and the core Uᵀ(left·right)V in K random shared cores.

    U or V is None for a side that is not truncated.
    """
    outputs, inputs = basis.layer.shape
    outputs_OP = _orthonormal(outputs, basis.ranks["outputs"], draw) if "outputs" in basis.ranks else None
    inputs_IQ = _orthonormal(inputs, basis.ranks["inputs"], draw) if "inputs" in basis.ranks else None
    core = left if outputs_OP is None else outputs_OP.T @ left
    if right is None:
        core = core if inputs_IQ is None else core @ inputs_IQ
    else:
        core = core @ (right if inputs_IQ is None else right @ inputs_IQ)
    if CORES in basis.ranks:
        form = LowRank((core.shape[0], core.shape[1]), basis.ranks[CORES])
        core = form.matrices(form.numbers(core))
    if "models" in basis.ranks:
        core = project_randomly(core.flatten(), basis.ranks["models"], draw).view_as(core)
    return outputs_OP, inputs_IQ, core


def _orthonormal(size: int, num_directions: int, draw: torch.Generator) -> Tensor:
    basis: Tensor = torch.linalg.qr(_normal((size, num_directions), draw))[0]
    return basis


def _normal(shape: tuple[int, int], draw: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=draw, dtype=torch.float64)


def _sum(parts: Sequence[Factors]) -> Factors:
    return torch.cat([b for b, _ in parts], 1), torch.cat([a for _, a in parts])


def _least_rank(parts: Sequence[Factors]) -> Factors:
    """Return balanced factors of a sum of updates with the least rank. Round-off does not count as rank."""
    noise = lora.ROUND_OFF * sum(lora.energy(part) for part in parts)
    factors, _ = lora.truncated(*_sum(parts), noise=noise)
    return factors


def _seeded(seed: int, layer: str) -> torch.Generator:
    """Return a generator for one layer. It is the same for every model and differs between layers."""
    digest = hashlib.sha256(f"{seed} {layer}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
