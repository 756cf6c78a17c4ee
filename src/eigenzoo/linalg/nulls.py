"""Draw spectra of stacks whose models share nothing.

Legend: N models, D values of one flattened layer.
"""

from __future__ import annotations

from functools import lru_cache
from math import floor, log, sqrt

import torch
from torch import Tensor

from eigenzoo.linalg import kernels, lora
from eigenzoo.linalg.gram import center_gram, project_out, scale_models, unit
from eigenzoo.seeds import MOST_SEEDS

EXACT_FREEDOM = 32
"""Degrees of freedom from which chi-square is drawn by Wilson and Hilferty's approximation: there its mean is right to 1e-5."""

FLOAT32_FROM = 256
"""Spectra of chance with more models than this are taken in float32."""

CACHED_MODELS = 360
"""Most models of which draws are kept from layer to layer: their bytes grow with N²."""

LARGE_NULL = 1024
"""More models than this have a null of five draws in float32: a draw takes N³ operations, and its spread falls as N^(-2/3)."""

MOST_DRAWS = 1024
"""Draws of one seed that never meet those of the next."""

GRID = 1.1
"""Ratio of neighbouring numbers of dimensions at which spectra of unrelated rows are drawn."""

EDGE_DRAWS, EDGE_DRAWS_LARGE = 150, 30
"""Draws behind an edge's mean and spread, kept for all layers of a size: the error of the mean adds up over layers."""

LARGEST_DRAW = 1024
"""Ranks of all updates together up to which random ones are drawn by their factors: P²·(O + I) products a draw."""


def norm_matched_spectra(
    energies_N: Tensor, num_values: int, *, centered: bool = True, draws: int | None = None, seed: int = 0
) -> Tensor:
    """Centred spectra of models that keep their norms and point in unrelated directions of `num_values` dimensions.

    The Gram of N unrelated unit directions in D dimensions is a Wishart matrix over D. It is drawn through Bartlett's
    factor (chi variables on the diagonal, normals below it), so that a draw costs N³ whatever D; as D grows it tends
    to eig(H diag(energies) H), the analytic form. Rows of the result are draws: eigenvalues, descending, over their sum.

    Args:
        energies_N: the models' energies about what was removed from them.
        num_values: D, the number of values of the layer.
        centered: whether that was the models' own mean; the spectra are then centred too.
        draws: by default `num_draws`.

    Returns:
        (draws, N) explained variance ratios in float64; all zero where there is no energy.

    Memory: three matrices of N² values, in float32 beyond `LARGE_NULL` models; up to `CACHED_MODELS` models one per draw stays.
    """
    draws = draws or num_draws(energies_N.numel())
    energies_N = energies_N.double().clamp_min(0)
    norms_N = (_uncentered_energies(energies_N) if centered else energies_N).sqrt()
    return _spectra(norms_N, None, num_values, centered, draws, seed)


def permuted_spectra(energies_N: Tensor, sums_N: Tensor, num_values: int, *, draws: int = 20, seed: int = 0) -> Tensor:
    """Centred spectra when the entries of each model's own part, what it has beyond the common mean, are shuffled among its places.

    A shuffle keeps a model's norm and the sum of its entries: two shuffled models have the sums' product over D in common,
    and are otherwise unrelated in D − 1 dimensions (Hoeffding's combinatorial limit; the entries' higher moments matter at
    order 1/D). So nothing but the norms and the sums needs to be known. Shapes as `norm_matched_spectra`.

    Args:
        energies_N: the models' energies about the models' mean.
        sums_N: the sum of each model's deviations from it.
        num_values: D.
    """
    level_N = sums_N.double() / num_values**0.5
    # The sums are already about the mean and stay so. Un-centring assumes unrelated models, which only shuffled ones are.
    norms_N = _uncentered_energies((energies_N.double() - level_N.square()).clamp_min(0)).sqrt()
    return _spectra(norms_N, level_N, max(num_values - 1, 1), True, draws, seed)


def num_draws(num_models: int) -> int:
    """Draws behind a null where nothing else is asked: of many models fewer, whose spread then counts (`rank.null_threshold`)."""
    return 20 if num_models <= LARGE_NULL else 5


def _spectra(norms_N: Tensor, level_N: Tensor | None, num_values: int, centered: bool, draws: int, seed: int) -> Tensor:
    """Draw spectra of unrelated directions with these norms, each combined with its value on a common direction if one is given."""
    spectra = torch.zeros(draws, norms_N.numel(), dtype=torch.float64)
    if float(norms_N.sum()) == 0:
        return spectra
    for draw in range(draws):
        gram_NN = _unrelated_gram(norms_N, num_values, draw, seed)
        if level_N is not None:
            gram_NN += torch.outer(level_N, level_N).to(gram_NN.dtype)
        if centered:
            # In place, because a large null is a matrix of N² values and each copy doubles it.
            gram_NN -= gram_NN.mean(0, keepdim=True)
            gram_NN -= gram_NN.mean(1, keepdim=True)
        spectra[draw] = _shares(gram_NN)
    return spectra


def _unrelated_gram(norms_N: Tensor, num_values: int, draw: int, seed: int) -> Tensor:
    """Draw the Gram of unrelated directions with these norms in D dimensions. All layers of one size use the same directions.

    With more than `CACHED_MODELS` models the directions are drawn again each time, and with more than `LARGE_NULL` in float32.
    """
    num_models = norms_N.numel()
    if num_models <= CACHED_MODELS:
        return torch.outer(norms_N, norms_N) * _cosines(num_models, num_values, draw, seed)
    dtype = torch.float64 if num_models <= LARGE_NULL else torch.float32
    factor = bartlett_factor(num_models, num_values, _generator(draw, seed), dtype)
    factor *= (norms_N / torch.linalg.vector_norm(factor, dim=1, dtype=torch.float64))[:, None].to(dtype)
    return kernels.gram(factor)


@lru_cache(maxsize=64)
def _cosines(num_models: int, num_values: int, draw: int, seed: int) -> Tensor:
    """Cosines between N unrelated directions in D dimensions; at most 64 matrices of `CACHED_MODELS`² values, 64 MB, are kept."""
    factor = bartlett_factor(num_models, num_values, _generator(draw, seed))
    factor = factor / factor.square().sum(1, keepdim=True).sqrt()
    return factor @ factor.T


def _generator(draw: int, seed: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * MOST_DRAWS + draw) % MOST_SEEDS)


def _shares(gram_NN: Tensor) -> Tensor:
    # float32 is enough: the spread of a null is thousands of times its error, and large zoos have many layers.
    gram_NN = gram_NN.float() if gram_NN.shape[0] > FLOAT32_FROM else gram_NN
    values_N: Tensor = torch.linalg.eigvalsh(gram_NN).flip(0).clamp_min_(0).double()
    return values_N / values_N.sum().clamp_min_(torch.finfo(torch.float64).tiny)


def iid_spectra(num_models: int, num_values: int, *, centered: bool = True, draws: int = 20, seed: int = 0) -> Tensor:
    """Spectra of models whose entries are independent and of one variance: what is wrong to expect of models of uneven norms."""
    generator = torch.Generator().manual_seed(seed)
    spectra = torch.zeros(draws, num_models, dtype=torch.float64)
    for draw in range(draws):
        factor = bartlett_factor(num_models, num_values, generator)
        gram_NN = factor @ factor.T
        spectra[draw] = _shares(center_gram(gram_NN) if centered else gram_NN)
    return spectra


def scaled_shares(scaled_NN: Tensor, level_N: Tensor) -> Tensor:
    """Explained variance ratios of a stack whose models are all scaled to one norm (`scale_models`): N − 1 directions at most."""
    return _shares(project_out(scaled_NN, unit(level_N)))


@lru_cache(maxsize=4096)
def edge_spectrum(num_models: int, num_values: int, draws: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the share of the top 1, 2, … directions of N unrelated models, scaled to one norm."""
    generator = torch.Generator().manual_seed(1)
    factors = (bartlett_factor(num_models, num_values, generator) for _ in range(draws))
    cumulative = torch.stack([scaled_shares(*scale_models(factor @ factor.T)).cumsum(0) for factor in factors])
    return cumulative.mean(0), cumulative.std(0)


def edge_null(num_models: int, num_values: float) -> tuple[Tensor, Tensor]:
    """`edge_spectrum` for any real number of dimensions, between those of a grid, so that many layers share a few draws.

    Shares above 1/N fall with D^(-1/2) when D is large, and so does the interpolation.
    """
    draws = EDGE_DRAWS if num_models <= FLOAT32_FROM else EDGE_DRAWS_LARGE
    step = log(max(num_values, 2.0)) / log(GRID)
    below, above = (max(2, round(GRID**power)) for power in (floor(step), floor(step) + 1))
    low, high = edge_spectrum(num_models, below, draws), edge_spectrum(num_models, above, draws)
    inverse = [1 / sqrt(value) for value in (below, max(num_values, 2.0), above)]
    part = (inverse[0] - inverse[1]) / (inverse[0] - inverse[2]) if above > below else 0.0
    return low[0] + part * (high[0] - low[0]), low[1] + part * (high[1] - low[1])


def spectrum_matched_spectra(
    singular_NR: Tensor, shape: tuple[int, int], *, centered: bool = True, draws: int = 5, seed: int = 0
) -> Tensor:
    """Spectra of LoRA updates that keep their singular values and get random singular vectors on both sides.

    Drawn by factors up to `LARGEST_DRAW` ranks in all. Beyond, by the limit: the inner product of two such updates has mean
    zero and variance ‖X‖²‖X′‖²/(O·I) whatever their ranks, so the spectrum is that of matched norms in O·I dimensions.
    Shapes as `norm_matched_spectra`.
    """
    num_models, rank = singular_NR.shape
    energies_N = singular_NR.double().square().sum(1)
    if num_models * rank > LARGEST_DRAW or rank > min(shape):
        return _spectra(energies_N.sqrt(), None, shape[0] * shape[1], centered, draws, seed)
    generator = torch.Generator().manual_seed(seed)
    spectra = torch.zeros(draws, num_models, dtype=torch.float64)
    for draw in range(draws if float(energies_N.sum()) > 0 else 0):
        sides = [torch.randn(num_models, size, rank, dtype=torch.float64, generator=generator) for size in shape]
        outputs_NOR, inputs_NIR = (torch.linalg.qr(side)[0] for side in sides)
        outputs_NOR = outputs_NOR * singular_NR.double()[:, None, :]
        gram_NN = lora.inner_products(*(2 * [list(zip(outputs_NOR, inputs_NIR.mT, strict=True))]))
        spectra[draw] = _shares(center_gram(gram_NN) if centered else gram_NN)
    return spectra


def _uncentered_energies(energies_N: Tensor) -> Tensor:
    """Energies e of unrelated models whose energies about their mean are d: d_n = e_n·(1 − 2/N) + Σe/N².

    Without this a model of ten times the others' norm, whose part of the mean is in everyone's centred energy, would
    make the null flatter than noise is, and noise a finding.
    """
    num_models = energies_N.numel()
    if num_models < 3:
        return energies_N.clamp_min(0)
    return ((energies_N - energies_N.sum() / (num_models * (num_models - 1))) / (1 - 2 / num_models)).clamp_min(0)


def bartlett_factor(
    num_models: int, num_values: int, generator: torch.Generator, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Return a factor whose Gram is that of N rows of D unrelated normals: triangular, or the rows themselves for small D."""
    if num_values <= num_models + EXACT_FREEDOM:
        return torch.randn(num_models, num_values, dtype=dtype, generator=generator)
    factor = torch.randn(num_models, num_models, dtype=dtype, generator=generator).tril_(-1)
    # torch's gamma sampler takes no generator; the Wilson-Hilferty cube of a normal is exact enough from EXACT_FREEDOM on.
    normal = torch.randn(num_models, dtype=torch.float64, generator=generator)
    freedom = num_values - torch.arange(num_models, dtype=torch.float64)
    cube = (1 - 2 / (9 * freedom) + normal * (2 / (9 * freedom)).sqrt()) ** 3
    factor.diagonal().copy_((freedom * cube).sqrt())
    return factor


def axis_null(
    size: int,
    energies_N: Tensor,
    columns_per_model: float,
    *,
    centered: bool = False,
    draws: int | None = None,
    seed: int = 0,
) -> Tensor:
    """Spectra of an outputs' or inputs' moment (size × size) when every entry of every model is unrelated noise.

    Each model brings `columns_per_model` independent columns (a full matrix: its other side; an update: its rank), weighted
    by its energy; uneven energies count as fewer columns, (Σe)² / Σe² models' worth; centring on the models takes one model's.
    Rows of the result are draws: eigenvalues, descending, over their sum.
    """
    energies_N = energies_N.double().clamp_min(0)
    effective_models = float(energies_N.sum() ** 2 / energies_N.square().sum()) if float(energies_N.sum()) > 0 else 1.0
    freedom = max(1, round((effective_models - centered) * columns_per_model))
    generator = torch.Generator().manual_seed(seed)
    # A large side averages over itself: the spread of its largest eigenvalue falls as size^(-2/3).
    draws = draws or (20 if size <= 512 else 4)
    spectra = torch.zeros(draws, size, dtype=torch.float64)
    for draw in range(draws):
        factor = bartlett_factor(size, freedom, generator)
        values = torch.linalg.eigvalsh(factor @ factor.T).flip(0).clamp_min(0)
        spectra[draw] = values / values.sum()
    return spectra
