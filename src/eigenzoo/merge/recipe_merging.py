"""Merge by a recipe: mergekit's methods and parameters in this project's terms, layer by layer."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from eigenzoo.errors import FormatError, UnsupportedError, UsageError
from eigenzoo.merge.adapters import AdapterChoices, merge_adapters
from eigenzoo.merge.checkpoints import MergedCheckpoint
from eigenzoo.merge.files import is_adapter
from eigenzoo.merge.heads import REFUSE
from eigenzoo.merge.layer_updates import Context
from eigenzoo.merge.merged import Merged
from eigenzoo.merge.methods import find_method
from eigenzoo.merge.recipe import Number, Recipe, RecipeModel, check_parameters, depths, read_recipe
from eigenzoo.merge.request import FULL, Job, RankChoice, Request, check_budget, rank_choice
from eigenzoo.passes.settings import own_settings
from eigenzoo.passes.workers import Workers, opened_workers
from eigenzoo.records import Progress, no_progress
from eigenzoo.seeds import check_seed
from eigenzoo.zoo.zoo import Zoo, open_zoo

WEIGHT, LAMBDA, NORMALIZE = "weight", "lambda", "normalize"

SMALL = 1e-8
"""Sums of weights below this do not divide (as in mergekit)."""


@dataclass(frozen=True)
class Translation:
    """One of mergekit's methods in this project's terms.

    Attributes:
        parameters: our option for each of its parameters.
        defaults: its values for options of ours that a recipe does not give.
        only: values of parameters that are read, but supported at this value alone.
        weighted: whether it needs a weight for each model.
        normalize: whether it divides by the weights by default; None where a recipe cannot say it.
        of_weights: whether it merges whole weights, and not their differences from a base.
    """

    parameters: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    only: Mapping[str, Number] = field(default_factory=dict)
    weighted: bool = True
    normalize: bool | None = None
    of_weights: bool = False

    @property
    def known(self) -> list[str]:
        """The parameters that a recipe may give."""
        own = [*self.parameters, *self.only, *([WEIGHT] if self.weighted else []), "int8_mask"]
        return [*own, *([] if self.normalize is None else [NORMALIZE, LAMBDA])]


_TIES = {"semantics": "mergekit"}
TRANSLATIONS: Mapping[str, Translation] = {
    "linear": Translation(only={NORMALIZE: True}, of_weights=True),
    "slerp": Translation({"t": "t"}, weighted=False, of_weights=True),
    "nuslerp": Translation(only={"nuslerp_row_wise": False, "nuslerp_flatten": True}),
    "karcher": Translation({"max_iter": "rounds", "tol": "tolerance"}, weighted=False, of_weights=True),
    "model_stock": Translation(only={"filter_wise": False}, weighted=False),
    "task_arithmetic": Translation(only={"rescale": False}, normalize=False),
    "ties": Translation({"density": "keep"}, {"keep": 1.0, **_TIES}, {"rescale": False}, normalize=True),
    "dare_linear": Translation({"density": "keep"}, {"keep": 1.0, **_TIES}, {"rescale": True}, normalize=False),
    "dare_ties": Translation({"density": "keep"}, {"keep": 1.0, **_TIES}, {"rescale": True}, normalize=False),
    "della": Translation(
        {"density": "keep", "epsilon": "window"},
        {"keep": 1.0, "window": 0.15, **_TIES},
        {"rescale": True},
        normalize=True,
    ),
    "breadcrumbs": Translation(
        {"density": "keep", "gamma": "outliers"}, {"keep": 1.0, "outliers": 0.01}, {"rescale": False}, normalize=False
    ),
    "sce": Translation({"select_topk": "keep"}, {"keep": 1.0}, weighted=False),
}


@own_settings()
def merge_recipe(
    path: str | os.PathLike[str],
    *,
    rank: RankChoice = None,
    budget: int | None = None,
    dtype: str | None = None,
    heads: str = REFUSE,
    allow_pickle: bool = False,
    seed: int = 0,
    workers: Workers | None = None,
    progress: Progress = no_progress,
) -> Merged | MergedCheckpoint:
    """Merge by a recipe in mergekit's YAML (`merge.recipe`), with mergekit's definitions of the methods.

    Args:
        path: the recipe. Sources that are all `base+adapter` on one base are merged into an adapter, which needs no base.
        rank, budget, heads, seed, allow_pickle: as in `merge`.
        dtype: of the written weights, instead of the recipe's `out_dtype` or `dtype`.

    Raises:
        FormatError, UnsupportedError: for what is not in a recipe, or not supported, with its name.
        UsageError: for parameters that the method does not have.
    """
    started, recipe = time.perf_counter(), read_recipe(path)
    where, translation = str(path), TRANSLATIONS.get(recipe.method)
    if translation is None:
        raise UnsupportedError(
            f"method {recipe.method[:40]!r}", where=where, rule=f"recipes have {', '.join(TRANSLATIONS)}"
        )
    check_parameters(recipe, translation.known)
    choose_rank, room, written = (
        rank_choice(rank),
        check_budget(budget, rank),
        dtype or recipe.out_dtype or recipe.dtype,
    )
    as_dtype = None if written is None else getattr(torch, written)
    zoo, recipe = _open(recipe, translation, where, allow_pickle=allow_pickle, progress=progress)
    jobs = _jobs(zoo, recipe, translation, where, check_seed(seed))
    request = next(iter(jobs.values())).request
    if zoo.view == "update":
        if rank is None and room is None and request.chosen_space == FULL:
            raise UsageError(
                "no rank is given",
                where=where,
                rule="a recipe's method works entry by entry in the full space: its result has the rank of a dense matrix",
                next_step="give a rank (--rank 16), a share (0.99), or full",
            )
        choices = AdapterChoices(choose_rank, isinstance(rank, float), room, heads, as_dtype)
        with opened_workers(workers) as opened:
            merged: Merged | MergedCheckpoint = merge_adapters(zoo, jobs, choices, started, opened, progress)
    elif rank is not None or room is not None:
        raise UsageError(
            "a rank or budget for full weights", where=where, rule="only updates of adapters are cut to a rank"
        )
    else:
        merged = MergedCheckpoint(zoo, jobs, heads, as_dtype)
    merged.recipe = Path(path).read_bytes()
    return merged


def _open(
    recipe: Recipe, translation: Translation, where: str, *, allow_pickle: bool, progress: Progress
) -> tuple[Zoo, Recipe]:
    """Open the sources, and return the recipe with the models in the order of the zoo: with the base where it is one of them."""
    bases = {model.path for model in recipe.models if model.adapter is not None} | (
        {recipe.base} if recipe.base else set()
    )
    if recipe.is_of_adapters:
        if len(bases) > 1:
            raise UnsupportedError(
                f"adapters on {len(bases)} bases",
                where=where,
                rule="adapters of one base are merged",
                next_step="use mergekit",
            )
        if translation.of_weights and recipe.method != "linear":
            raise UnsupportedError(
                f"method {recipe.method} of adapters",
                where=where,
                rule="in a recipe it merges whole weights, of which an adapter is a small part",
                next_step="merge the adapters' updates: eigenzoo merge ADAPTER… --method " + recipe.method,
            )
        paths = [model.adapter for model in recipe.models if model.adapter is not None]
        zoo = open_zoo(paths, view="update", allow_pickle=allow_pickle, progress=progress)
        return zoo, recipe
    if any(model.adapter is not None for model in recipe.models):
        raise UnsupportedError(
            "adapters and whole models in one recipe",
            where=where,
            rule="sources are of one kind",
            next_step="merge each adapter into its base first, with PEFT's merge_and_unload",
        )
    plain = next((model.path for model in recipe.models if is_adapter(model.path)), None)
    if plain is not None and recipe.base is not None:
        raise FormatError(
            f"{plain} is an adapter beside base_model",
            where=where,
            rule="with a base_model the models are whole ones, or adapters written as BASE+ADAPTER",
            next_step=f"write model: {recipe.base}+{plain}",
        )
    if recipe.base is None and not translation.of_weights and recipe.method != "nuslerp":
        raise FormatError(
            "names no base_model", where=where, rule=f"method {recipe.method} merges differences from a base"
        )
    if translation.of_weights:
        if recipe.base is not None:
            # As mergekit, which adds a base that is not listed, and goes from it to the other model in slerp.
            own = RecipeModel(recipe.base, None, recipe.base_parameters or {})
            recipe = replace(
                recipe, models=(own, *recipe.models) if recipe.method == "slerp" else (*recipe.models, own)
            )
        base = None
    else:
        base = recipe.base
    zoo = open_zoo([model.path for model in recipe.models], base=base, allow_pickle=allow_pickle, progress=progress)
    return zoo, recipe


def _jobs(zoo: Zoo, recipe: Recipe, translation: Translation, where: str, seed: int) -> dict[str, Job]:
    """Return what the recipe says of each layer."""
    method = find_method(recipe.method)
    least, most = method.models
    if not least <= len(zoo) <= most:
        raise UsageError(f"{len(zoo)} models for method {method.name}", where=where, rule=f"it takes {least} to {most}")
    jobs, places = {}, depths(zoo.layers)
    for layer, depth in places.items():
        tensor = layer if zoo.view != "update" else f"{layer}.weight"

        def shared(name: str, tensor: str = tensor, depth: float = depth) -> Number | None:
            return recipe.shared(name, tensor, depth)

        for name, value in translation.only.items():
            if shared(name) not in (None, value):
                raise UnsupportedError(
                    f"{name}: {shared(name)}", where=f"{where}, tensor '{tensor}'", rule=f"only {value} is supported"
                )
        options = dict(translation.defaults)
        for name, option in translation.parameters.items():
            values = [recipe.of_model(model, name, tensor, depth) for model in recipe.models]
            if method.parameters[option].per_model:
                given = [options[option] if value is None else float(value) for value in values]
                options[option] = given[0] if len(set(given)) == 1 else tuple(given)
            elif shared(name) is not None:
                options[option] = shared(name)
        weights = _weights(recipe, translation, tensor, depth, where)
        scale = float(shared(LAMBDA) if shared(LAMBDA) is not None else 1.0)  # type: ignore[arg-type]
        normalize = translation.normalize if shared(NORMALIZE) is None else bool(shared(NORMALIZE))
        if "combine" in method.parameters:
            options["combine"] = "mean" if normalize else "sum"
        elif normalize and translation.normalize is not None:
            scale /= sum(weights) if abs(sum(weights)) >= SMALL else 1.0
        if recipe.method == "linear" and zoo.view == "update" and recipe.base is not None:
            # The base is one of the models, with an update of zero: Σ w τ over the weights of all.
            own = RecipeModel(recipe.base, None, recipe.base_parameters or {})
            total = sum(weights) + _weight(recipe, own, tensor, depth, where)
            if total == 0:
                raise UsageError(
                    "the weights sum to 0", where=f"{where}, tensor '{tensor}'", rule="linear divides by them"
                )
            request = Request(find_method("task_arithmetic"), {}, scale / total, FULL)
        else:
            request = Request(method, method.options(options), scale, FULL)
        weights_T = torch.tensor(weights, dtype=torch.float64)
        jobs[layer] = Job(Context(layer, zoo.names, weights_T, seed), request)
    return jobs


def _weights(recipe: Recipe, translation: Translation, tensor: str, depth: float, where: str) -> list[float]:
    if not translation.weighted:
        return [1.0] * len(recipe.models)
    return [_weight(recipe, model, tensor, depth, where) for model in recipe.models]


def _weight(recipe: Recipe, model: RecipeModel, tensor: str, depth: float, where: str) -> float:
    value = recipe.of_model(model, WEIGHT, tensor, depth)
    if value is None:
        raise FormatError(
            f"{model.path} has no weight",
            where=f"{where}, tensor '{tensor}'",
            rule=f"method {recipe.method} needs the parameter weight for every model",
        )
    return float(value)
