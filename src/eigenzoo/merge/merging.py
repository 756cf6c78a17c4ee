"""`ez.merge`: models into one model."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from eigenzoo.display import counted
from eigenzoo.errors import UsageError
from eigenzoo.formats.adapter_writer import other_tensors
from eigenzoo.linalg.lora import Factors
from eigenzoo.linalg.selection import least_of_largest
from eigenzoo.merge.adapters import CORE, FULL, SPACES, Choose, MergedLayer, Request, merge_layer, place
from eigenzoo.merge.certificate import Certificate, LayerCertificate, SourceCertificate, summarise
from eigenzoo.merge.in_bundle import MergedCoefficients, merge_in_bundle
from eigenzoo.merge.layer_updates import Context
from eigenzoo.merge.merged import Merged
from eigenzoo.merge.method import Method
from eigenzoo.merge.methods import METHODS, find_method
from eigenzoo.merge.methods.elementwise import vote
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

NOT_UNIQUE = 1e-9
"""Relative gap of two singular values below which a basis is said not to be unique."""

Weights = Mapping[str, float] | Sequence[float] | None
RankChoice = int | float | str | None


@own_settings()
def merge(
    models: Source | Zoo | tuple[Subspace, Sequence[str]],
    method: str = "mean",
    *,
    weights: Weights = None,
    scale: float = 1.0,
    rank: RankChoice = None,
    space: str = CORE,
    missing: str = "refuse",
    grams: Mapping[str, Mapping[str, Tensor]] | None = None,
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
        rank: of the merged updates: a number, a share of each layer's energy such as 0.99, or `full`, which loses nothing. Default:
            `full`, but in space `full` a rank has to be given, because the result has the rank of a dense matrix there.
        space: for methods that work entry by entry, what the entries are those of (docs/merge.md).
        missing: `zero` counts a layer that an adapter lacks as a zero update; `refuse` is an error.
        grams: for method regmean, second moments (I, I) of the inputs, by model and layer.
        seed: of random masks.
        options: those of the method.

    Raises:
        UsageError: for unknown methods, options and weights.
        FormatError, ZooError, MismatchError: as `open_zoo` does.
    """
    started = time.perf_counter()
    chosen = find_method(method)
    resolved = chosen.options({name: value for name, value in options.items() if value is not None})
    check_choice(space, SPACES, "space")
    check_choice(missing, ("refuse", "zero"), "missing")
    choose_rank = rank_choice(rank, needed=chosen.kind == "elements" and not chosen.space and space == FULL)
    if isinstance(models, tuple):
        names: Sequence[str] = models[1]
    else:
        as_zero = "zero" if missing == "zero" else "error"
        zoo = models if isinstance(models, Zoo) else open_zoo(models, view="update", missing=as_zero, progress=progress)
        names = zoo.names
    request = Request(chosen, resolved, as_weights(weights, names, chosen), scale, space, check_seed(seed))
    if isinstance(models, tuple):
        return merge_in_bundle(models[0], names, request, progress)
    contexts = _contexts(zoo, request, grams or {})
    template = ZooTemplate(zoo, 0)
    with opened_workers(workers) as opened:
        contexts = _trimmed(zoo, request, contexts)
        task = partial(_layer_task, zoo, request, template, contexts, choose_rank)
        layers = dict(opened.each("merging layers", task, list(zoo.layers), progress))
        others = {name: template.read_carried(name) for name in other_tensors(template)}
    loss, norms, kept = summarise({name: layer.sums for name, layer in layers.items()})
    sources = {
        name: SourceCertificate(weight, norm, share)
        for name, weight, norm, share in zip(names, request.weights_T.tolist(), norms, kept, strict=True)
    }
    factors = {name: layer.factors for name, layer in layers.items()}
    certificate = Certificate(
        method=method,
        semantics=resolved.get("semantics"),
        space=chosen.space or (space if chosen.kind == "elements" else None),
        scale=scale,
        options=resolved,
        models=sources,
        layers={name: LayerCertificate(layer.sums.rank, layer.sums.loss) for name, layer in layers.items()},
        loss=loss,
        bytes=sum(factor.nbytes for pair in factors.values() for factor in pair),
        seconds=time.perf_counter() - started,
        peak_memory=peak_memory(),
        warnings=_warnings(layers),
    )
    return Merged(template, factors, others, certificate)


def _with_options(function: Callable[..., Any]) -> inspect.Signature:
    """Return the signature with the options of all methods instead of `**options`; None is the method's default."""
    own = [each for each in inspect.signature(function).parameters.values() if each.kind is not each.VAR_KEYWORD]
    names = dict.fromkeys(name for method in METHODS.values() for name in method.parameters)
    added = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in names]
    return inspect.Signature([*own, *added], return_annotation="Merged | MergedCoefficients")


merge.__signature__ = _with_options(merge)  # type: ignore[attr-defined]


def _contexts(zoo: Zoo, request: Request, grams: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Context]:
    def of_layer(name: str) -> Mapping[str, Tensor]:
        return {model: given[name] for model, given in grams.items() if name in given}

    return {
        name: Context(name, zoo.names, request.weights_T, request.seed, input_grams=of_layer(name))
        for name in zoo.layers
    }


def _trimmed(zoo: Zoo, request: Request, contexts: dict[str, Context]) -> dict[str, Context]:
    """Give layers what a method needs to know of the whole model: thresholds, and the sign of most entries."""
    share = request.method.over_model(request.options)
    if share is None:
        return contexts

    def entries() -> Iterator[Tensor]:
        for name, context in contexts.items():
            for block in place(_updates(zoo, name), context, request).updates.blocks():
                yield block.flatten(1)

    placed = (place(_updates(zoo, name), context, request).updates for name, context in contexts.items())
    total = sum(layer.num_values for layer in placed)
    shares = [share] * len(zoo) if isinstance(share, int | float) else share
    least = least_of_largest(entries, [int(each * total) for each in shares])
    contexts = {name: replace(context, thresholds_T=least) for name, context in contexts.items()}
    if request.space != FULL or request.method.space:
        return contexts
    votes = sum(vote(place(_updates(zoo, name), context, request).updates) for name, context in contexts.items())
    majority = float((votes > 0) - (votes < 0))
    return {name: replace(context, majority=majority) for name, context in contexts.items()}


def _updates(zoo: Zoo, name: str) -> list[Factors]:
    stack = zoo.stack(name)
    assert isinstance(stack, UpdateStack)
    return [stack.factors(index) for index in range(len(stack))]


def _layer_task(
    zoo: Zoo,
    request: Request,
    template: ZooTemplate,
    contexts: Mapping[str, Context],
    choose_rank: Choose,
    name: str,
) -> MergedLayer:
    layout = template.layout
    update = layout.updates[name]
    dtypes = layout.tensors[update.key_b].torch_dtype, layout.tensors[update.key_a].torch_dtype
    return merge_layer(_updates(zoo, name), contexts[name], request, choose_rank, dtypes)


def _warnings(layers: Mapping[str, MergedLayer]) -> tuple[str, ...]:
    unsure = sum(layer.gap < NOT_UNIQUE for layer in layers.values())
    if not unsure:
        return ()
    return (
        f"{counted(unsure, 'layer')} of {len(layers)}: singular values coincide: the basis is not unique, nor is what a method "
        "gives that works entry by entry in it (docs/merge.md)",
    )


def rank_choice(rank: RankChoice, *, needed: bool = False) -> Choose:
    """Return what chooses a rank from singular values.

    >>> rank_choice(0.9)(torch.tensor([3.0, 1.0]))
    1
    """
    if rank is None and needed:
        raise UsageError(
            "no rank is given",
            where="space full",
            rule="a merge in the full space has the rank of a dense matrix",
            next_step="give a rank (--rank 16), a share (0.99), or full",
        )
    if rank is None or rank == FULL_RANK:
        return Tensor.numel
    if isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1:
        return lambda values: rank
    if isinstance(rank, float) and 0 < rank <= 1:
        return partial(_least_rank, rank)
    raise UsageError(
        f"rank {str(rank)[:40]!r}", rule="it is a number of 1 or more, a share of the energy such as 0.99, or 'full'"
    )


def _least_rank(share: float, values: Tensor) -> int:
    """Return the least rank that keeps a share of the energy, up to the round-off of its sum."""
    energies = values.square().cumsum(0)
    return min(int((energies < share * (1 - 1e-12) * energies[-1]).sum()) + 1, values.numel())


def as_weights(weights: Weights, names: Sequence[str], method: Method) -> Tensor:
    """Return one weight per model, (T,) float64; raises UsageError for other numbers of models or weights."""
    least, most = method.models
    if not least <= len(names) <= most:
        raise UsageError(
            counted(len(names), "model"), where=f"method {method.name}", rule=f"it takes {least} to {most}"
        )
    if weights is None:
        return torch.ones(len(names), dtype=torch.float64)
    if not method.weighted:
        raise UsageError("weights", where=f"method {method.name}", rule="it takes none", next_step="use method linear")
    if isinstance(weights, Mapping):
        unknown = sorted(set(weights) ^ set(names))
        if unknown:
            raise UsageError(f"weights and models differ in {unknown[0]!r}", rule="each model has one weight")
        weights = [weights[name] for name in names]
    if len(weights) != len(names):
        raise UsageError(
            f"{counted(len(weights), 'weight')} for {counted(len(names), 'model')}", rule="each model has one"
        )
    if not all(isinstance(weight, int | float) and isfinite(weight) for weight in weights):
        raise UsageError(f"the weights are {list(weights)}", rule="weights are finite numbers")
    return torch.tensor([float(weight) for weight in weights], dtype=torch.float64)
