"""`ez.merge`: models into one model."""

from __future__ import annotations

import inspect
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from eigenzoo.display import counted
from eigenzoo.errors import UsageError
from eigenzoo.merge.adapters import AdapterChoices, merge_adapters
from eigenzoo.merge.checkpoints import MergedCheckpoint
from eigenzoo.merge.heads import REFUSE
from eigenzoo.merge.in_bundle import MergedCoefficients, merge_in_bundle
from eigenzoo.merge.layer_updates import Context
from eigenzoo.merge.merged import Merged
from eigenzoo.merge.method import Method
from eigenzoo.merge.methods import METHODS, find_method
from eigenzoo.merge.request import CORE, FULL, SPACES, Job, RankChoice, Request, check_budget, rank_choice
from eigenzoo.passes.settings import own_settings
from eigenzoo.passes.workers import Workers, opened_workers
from eigenzoo.records import Progress, no_progress
from eigenzoo.seeds import check_seed
from eigenzoo.subspace.subspace import Subspace
from eigenzoo.weights.views import check_choice
from eigenzoo.zoo.sources import Source
from eigenzoo.zoo.zoo import Zoo, open_zoo

OF_WHOLE_WEIGHTS = ("mean", "linear", "slerp", "nuslerp", "karcher")
"""Methods that also apply to weights without a base."""

DTYPES = ("float32", "float16", "bfloat16", "float64")

Weights = Mapping[str, float] | Sequence[float] | None
Grams = Mapping[str, Mapping[str, Tensor]]


@own_settings()
def merge(
    models: Source | Zoo | tuple[Subspace, Sequence[str]],
    method: str = "mean",
    *,
    weights: Weights = None,
    scale: float = 1.0,
    rank: RankChoice = None,
    space: str = CORE,
    base: str | os.PathLike[str] | None = None,
    dtype: str | None = None,
    budget: int | None = None,
    heads: str = REFUSE,
    missing: str = "refuse",
    grams: Grams | None = None,
    interference: bool = False,
    allow_pickle: bool = False,
    seed: int = 0,
    workers: Workers | None = None,
    progress: Progress = no_progress,
    **options: Any,
) -> Merged | MergedCheckpoint | MergedCoefficients:
    """Merge models into one: adapters without their base, checkpoints with it.

    Args:
        models: a folder of models, a glob, a list of paths, or an opened zoo. LoRA adapters of one base may have different ranks
            and alphas. Or a subspace and names of its models, whose coefficients are merged.
        method: a name of docs/merge.md.
        weights: a number per model, in their order or by name; 1 each by default. They may be negative.
        scale: what the result of the method is multiplied by.
        rank: of the merged updates: a number, a share of each layer's energy such as 0.99, or `full`, which loses nothing. Default:
            `full`, but in space `full` a rank has to be given, because the result has the rank of a dense matrix there.
        space: for methods that work entry by entry, what the entries are those of (docs/merge.md).
        base: of checkpoints, the model whose differences are merged. Without it only methods that average whole weights apply.
        dtype: of the written weights: float32, float16, bfloat16 or float64. Default: the base's, or that of the model whose file
            the new one is like.
        budget: bytes of the merged adapter's weights file. Ranks are then chosen for all layers together.
        heads: tensors that belong to no update, such as trained heads: `refuse` adapters that differ in them, take those of the
            `first`, or of the model of this name.
        missing: `zero` counts a layer that an adapter lacks as a zero update; `refuse` is an error.
        grams: for method regmean, second moments (I, I) of the inputs, by model and layer.
        interference: also measure how much the updates get in each other's way.
        allow_pickle: also read torch's .bin files (only tensors are unpickled).
        seed: of random masks.
        options: those of the method.

    Raises:
        UsageError: for unknown methods, options and weights.
        MismatchError: for adapters with different heads.
        FormatError, ZooError: as `open_zoo` does.
    """
    started = time.perf_counter()
    chosen = find_method(method)
    resolved = chosen.options({name: value for name, value in options.items() if value is not None})
    request = Request(chosen, resolved, scale, check_choice(space, SPACES, "space"))
    check_choice(missing, ("refuse", "zero"), "missing")
    _check_used(request, grams)
    if not isfinite(scale):
        raise UsageError(f"scale {scale}", rule="the scale is a finite number")
    choose_rank, room = rank_choice(rank), check_budget(budget, rank)
    if isinstance(models, tuple):
        _check_bundle_choices(
            space=space, rank=rank, budget=budget, base=base, dtype=dtype, heads=heads, missing=missing
        )
    if rank is None and room is None and request.chosen_space == FULL:
        raise UsageError(
            "no rank is given",
            where="space full",
            rule="a merge in the full space has the rank of a dense matrix",
            next_step="give a rank (--rank 16), a share (0.99), or full",
        )
    if isinstance(models, tuple):
        bundle, names = models
        jobs = _jobs(bundle.layers, names, request, weights, grams or {}, seed)
        return merge_in_bundle(bundle, names, jobs, started, progress)
    zoo = models
    if not isinstance(zoo, Zoo):
        as_zero = "zero" if missing == "zero" else "error"
        zoo = open_zoo(zoo, base=base, missing=as_zero, allow_pickle=allow_pickle, progress=progress)
    _check_view(zoo, request, rank if room is None else f"for {room:,} bytes")
    jobs = _jobs(zoo.layers, zoo.names, request, weights, grams or {}, seed)
    as_dtype = None if dtype is None else _parse_dtype(dtype)
    if zoo.view != "update":
        return MergedCheckpoint(zoo, jobs, heads, as_dtype)
    choices = AdapterChoices(choose_rank, isinstance(rank, float), room, heads, as_dtype, interference)
    with opened_workers(workers) as opened:
        return merge_adapters(zoo, jobs, choices, started, opened, progress)


def _check_bundle_choices(**given: Any) -> None:
    """Raise UsageError for a choice that a file of coefficients does not have."""
    defaults = inspect.signature(merge).parameters
    for name, value in given.items():
        if value != defaults[name].default:
            raise UsageError(
                f"{name} {str(value)[:40]!r} for models of a bundle",
                rule="their merge is a file of coefficients in the bundle's own core, with its ranks, heads and dtype",
                next_step="leave it out, or merge the models' own files",
            )


def _check_used(request: Request, grams: Grams | None) -> None:
    """Raise UsageError for a space or moments that the method does not use."""
    method, where = request.method, f"method {request.method.name}"
    if request.space != CORE and not method.has_spaces:
        with_spaces = ", ".join(name for name, each in METHODS.items() if each.has_spaces)
        raise UsageError(
            f"space {request.space!r}",
            where=where,
            rule=f"it has no choice of a space; {with_spaces} have one",
            next_step="leave out --space (space=)",
        )
    if grams is not None and method.kind != "factors":
        users = ", ".join(name for name, each in METHODS.items() if each.kind == "factors")
        raise UsageError(
            "moments of inputs",
            where=where,
            rule=f"only {users} uses them",
            next_step=f"leave out --grams (grams=), or use method {users}",
        )


def _check_view(zoo: Zoo, request: Request, rank: RankChoice) -> None:
    """Raise UsageError for options that contradict the kind of models."""
    if zoo.view == "update":
        return
    if zoo.view not in ("delta", "weight"):
        raise UsageError(f"view {zoo.view}", rule="models are merged by their weights, differences or updates")
    if rank is not None:
        raise UsageError(f"rank {rank} for full weights", rule="only updates of adapters are cut to a rank")
    if request.chosen_space not in (None, CORE, FULL):
        raise UsageError(
            f"space {request.chosen_space!r} for full weights", rule="their entries are those of the space full"
        )
    if zoo.view == "weight" and request.method.name not in OF_WHOLE_WEIGHTS:
        raise UsageError(
            f"method {request.method.name} without a base",
            rule=f"only {', '.join(OF_WHOLE_WEIGHTS)} average whole weights",
            next_step="name the model that they were fine-tuned from: --base (base=)",
        )


def _parse_dtype(name: str) -> torch.dtype:
    check_choice(name, DTYPES, "dtype")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _with_options(function: Callable[..., Any]) -> inspect.Signature:
    """Return the signature with the options of all methods instead of `**options`; None is the method's default."""
    own = [each for each in inspect.signature(function).parameters.values() if each.kind is not each.VAR_KEYWORD]
    names = dict.fromkeys(name for method in METHODS.values() for name in method.parameters)
    added = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in names]
    return inspect.Signature([*own, *added], return_annotation="Merged | MergedCheckpoint | MergedCoefficients")


merge.__signature__ = _with_options(merge)  # type: ignore[attr-defined]


def _jobs(
    layers: Iterable[str], names: Sequence[str], request: Request, weights: Weights, grams: Grams, seed: int
) -> dict[str, Job]:
    """Return the same job for each layer."""
    weights_T, checked = as_weights(weights, names, request.method), check_seed(seed)
    for option, value in request.options.items():
        if isinstance(value, tuple) and len(value) != len(names):
            raise UsageError(
                f"{option} has {counted(len(value), 'value')} for {counted(len(names), 'model')}",
                where=f"method {request.method.name}",
                rule="it is one number, or one per model in their order",
            )
    if request.method.kind == "factors" and not grams:
        raise UsageError(
            "no moments of inputs are given",
            where=f"method {request.method.name}",
            rule="it needs one (I, I) matrix per layer and model",
            next_step="collect them with eigenzoo.merge.input_grams.collect, and give them as grams= (--grams)",
        )

    def of_layer(layer: str) -> dict[str, Tensor]:
        return {model: given[layer] for model, given in grams.items() if layer in given}

    jobs = {
        layer: Job(Context(layer, tuple(names), weights_T, checked, input_grams=of_layer(layer)), request)
        for layer in layers
    }
    if request.method.kind == "factors" and not any(job.context.input_grams for job in jobs.values()):
        raise UsageError(
            "the moments of inputs are those of none of the layers",
            where=f"method {request.method.name}",
            rule=f"a layer is called {next(iter(jobs))!r}",
            next_step="give each moment under its layer's name",
        )
    return jobs


def as_weights(weights: Weights, names: Sequence[str], method: Method) -> Tensor:
    """Return one weight per model, (T,) float64; raises UsageError for other numbers of models or weights."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UsageError(f"{twice[0]!r} is named twice", next_step="name each model once, and give it a larger weight")
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
    if not isinstance(weights, Iterable) or isinstance(weights, str):
        raise UsageError(f"the weights are {weights!r}", rule="they are one number per model, or numbers by name")
    if len(weights) != len(names):
        raise UsageError(
            f"{counted(len(weights), 'weight')} for {counted(len(names), 'model')}", rule="each model has one"
        )
    if not all(isinstance(weight, int | float) and isfinite(weight) for weight in weights):
        raise UsageError(f"the weights are {list(weights)}", rule="weights are finite numbers")
    return torch.tensor([float(weight) for weight in weights], dtype=torch.float64)
