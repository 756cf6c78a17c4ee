"""`ez.merge`: models into one model."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from eigenzoo.errors import UsageError
from eigenzoo.formats.adapter_writer import other_tensors
from eigenzoo.linalg.selection import thresholds
from eigenzoo.merge.adapters import CORE, SPACES, MergedLayer, Request, as_space, merge_layer
from eigenzoo.merge.certificate import Certificate, LayerCertificate, SourceCertificate, summarise
from eigenzoo.merge.in_bundle import MergedCoefficients, merge_in_bundle
from eigenzoo.merge.merged import Merged
from eigenzoo.merge.methods import METHODS, find_method
from eigenzoo.passes.machine import peak_memory
from eigenzoo.passes.settings import own_settings
from eigenzoo.passes.workers import Workers, opened_workers
from eigenzoo.records import Progress, no_progress
from eigenzoo.seeds import check_seed
from eigenzoo.subspace.subspace import Subspace
from eigenzoo.weights.views import check_choice
from eigenzoo.zoo.sources import Source
from eigenzoo.zoo.stack import UpdateStack
from eigenzoo.zoo.template import ZooTemplate
from eigenzoo.zoo.zoo import Zoo, open_zoo

FULL_RANK = "full"

Weights = Mapping[str, float] | Sequence[float] | None
RankChoice = int | float | str


@own_settings()
def merge(
    models: Source | Zoo | tuple[Subspace, Sequence[str]],
    method: str = "mean",
    *,
    weights: Weights = None,
    scale: float = 1.0,
    rank: RankChoice = FULL_RANK,
    space: str = CORE,
    missing: str = "refuse",
    seed: int = 0,
    workers: Workers | None = None,
    progress: Progress = no_progress,
    **options: Any,
) -> Merged | MergedCoefficients:
    """Merge adapters into one adapter, without their base.

    Args:
        models: LoRA adapters of one base: a folder of them, a glob, a list of paths, or an opened zoo. Ranks, alphas and rsLoRA may
            differ. Or a subspace and names of its models, whose coefficients are merged.
        method: a name of docs/merge.md.
        weights: a number per model, in their order or by name; 1 each by default. They may be negative.
        scale: what the result of the method is multiplied by.
        rank: of the merged updates: a number, a share of each layer's energy such as 0.99, or `full`, which loses nothing.
        space: for methods that work entry by entry, what the entries are those of (docs/merge.md).
        missing: `zero` counts a layer that an adapter lacks as a zero update; `refuse` is an error.
        seed: of random masks.
        options: those of the method.

    Raises:
        UsageError: for unknown methods, options and weights.
        FormatError, ZooError, MismatchError: as `open_zoo` does.
    """
    started = time.perf_counter()
    options = {name: value for name, value in options.items() if value is not None}
    chosen = find_method(method)
    resolved = chosen.options(options)
    choose_rank = rank_choice(rank)
    check_choice(space, SPACES, "space")
    check_choice(missing, ("refuse", "zero"), "missing")
    if isinstance(models, tuple):
        names: Sequence[str] = models[1]
    else:
        zoo = (
            models
            if isinstance(models, Zoo)
            else open_zoo(models, view="update", missing="zero" if missing == "zero" else "error", progress=progress)
        )
        names = zoo.names
    weights_T = as_weights(weights, names)
    least, most = chosen.models
    if not least <= len(names) <= most:
        raise UsageError(f"{len(names)} models for method {method}", rule=f"it takes {least} to {most}")
    if weights is not None and not chosen.weighted:
        raise UsageError(f"method {method} takes no weights", next_step="leave them out, or use method linear")
    request = Request(chosen, resolved, weights_T, scale, space, choose_rank, check_seed(seed))
    if isinstance(models, tuple):
        return merge_in_bundle(models[0], names, request, progress)
    template = ZooTemplate(zoo, 0)
    with opened_workers(workers) as opened:
        share = chosen.over_model(resolved)
        thresholds_T = None if share is None else thresholds(partial(_entries, zoo, request), share)
        task = partial(_layer_task, zoo, request, template, thresholds_T)
        layers = dict(opened.each("merging layers", task, list(zoo.layers), progress))
        others = {name: template.read_carried(name) for name in other_tensors(template)}
    loss, norms, kept = summarise({name: layer.sums for name, layer in layers.items()})
    sources = {
        name: SourceCertificate(weight, norm, share)
        for name, weight, norm, share in zip(zoo.names, weights_T.tolist(), norms, kept, strict=True)
    }
    factors = {name: layer.factors for name, layer in layers.items()}
    certificate = Certificate(
        method=method,
        semantics=resolved.get("semantics"),
        space=space if chosen.kind == "elements" else None,
        scale=scale,
        options=resolved,
        models=sources,
        layers={name: LayerCertificate(layer.sums.rank, layer.sums.loss) for name, layer in layers.items()},
        loss=loss,
        bytes=sum(factor.nbytes for pair in factors.values() for factor in pair),
        seconds=time.perf_counter() - started,
        peak_memory=peak_memory(),
    )
    return Merged(template, factors, others, certificate)


def _with_options(function: Callable[..., Any]) -> inspect.Signature:
    """Return the signature with the options of all methods instead of `**options`; None is the method's default."""
    own = [each for each in inspect.signature(function).parameters.values() if each.kind is not each.VAR_KEYWORD]
    names = dict.fromkeys(name for method in METHODS.values() for name in method.parameters)
    added = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in names]
    return inspect.Signature([*own, *added], return_annotation="Merged")


merge.__signature__ = _with_options(merge)  # type: ignore[attr-defined]


def _entries(zoo: Zoo, request: Request) -> Any:
    """Yield the entries of all layers in the space of the method, (T, n) at a time."""
    for name in zoo.layers:
        yield as_space(_updates(zoo, name), request.space, request.method.kind).values_TPQ.flatten(1)


def _updates(zoo: Zoo, name: str) -> list[tuple[Tensor, Tensor]]:
    stack = zoo.stack(name)
    assert isinstance(stack, UpdateStack)
    return [stack.factors(index) for index in range(len(stack))]


def _layer_task(
    zoo: Zoo, request: Request, template: ZooTemplate, thresholds_T: Tensor | None, name: str
) -> MergedLayer:
    layout = template.layout
    update = layout.updates[name]
    dtypes = layout.tensors[update.key_b].torch_dtype, layout.tensors[update.key_a].torch_dtype
    return merge_layer(name, zoo.names, _updates(zoo, name), request, dtypes, thresholds_T)


def rank_choice(rank: RankChoice) -> Callable[[Tensor], int]:
    """Return what chooses a rank from singular values.

    >>> rank_choice(0.9)(torch.tensor([3.0, 1.0]))
    1
    """
    if rank == FULL_RANK:
        return Tensor.numel
    if isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1:
        return lambda values: rank
    if isinstance(rank, float) and 0 < rank <= 1:

        def least(values: Tensor) -> int:
            energies = values.square().cumsum(0)
            return int((energies < rank * energies[-1] * (1 - 1e-12)).sum()) + 1 if values.numel() else 0

        return least
    raise UsageError(
        f"rank {str(rank)[:40]!r}", rule="it is a number of 1 or more, a share of the energy such as 0.99, or 'full'"
    )


def as_weights(weights: Weights, names: Sequence[str]) -> Tensor:
    """Return one weight per model, (T,) float64."""
    if weights is None:
        return torch.ones(len(names), dtype=torch.float64)
    if isinstance(weights, Mapping):
        unknown = sorted(set(weights) ^ set(names))
        if unknown:
            raise UsageError(f"weights and models differ in {unknown[0]!r}", rule="each model has one weight")
        weights = [weights[name] for name in names]
    if len(weights) != len(names):
        raise UsageError(f"{len(weights)} weights for {len(names)} models", rule="each model has one weight")
    if not all(isinstance(weight, int | float) and isfinite(weight) for weight in weights):
        raise UsageError(f"the weights are {list(weights)}", rule="weights are finite numbers")
    return torch.tensor([float(weight) for weight in weights], dtype=torch.float64)
