"""Merge adapters into an adapter, by their factors and without their base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from eigenzoo.display import counted
from eigenzoo.errors import MismatchError
from eigenzoo.formats.adapter_writer import other_tensors
from eigenzoo.formats.safetensors.dtypes import dtype_name
from eigenzoo.linalg.lora import Factors
from eigenzoo.merge.adapter_layer import MergedLayer, merge_layer, place
from eigenzoo.merge.certificate import certify
from eigenzoo.merge.interference import LayerInterference, average, measure, random_like
from eigenzoo.merge.merged import Merged
from eigenzoo.merge.request import ChooseRank, Job
from eigenzoo.merge.trimming import with_thresholds
from eigenzoo.passes.workers import Workers
from eigenzoo.records import Progress
from eigenzoo.zoo.stack import UpdateStack
from eigenzoo.zoo.template import ZooTemplate
from eigenzoo.zoo.zoo import Zoo

REFUSE, FIRST = "refuse", "first"

NOT_UNIQUE = 1e-9
"""Relative gap of two singular values below which a basis is said not to be unique."""

Measured = tuple[LayerInterference, LayerInterference]


def merge_adapters(
    zoo: Zoo,
    jobs: Mapping[str, Job],
    choose_rank: ChooseRank,
    owner: int,
    heads: str,
    dtype: torch.dtype | None,
    started: float,
    workers: Workers,
    progress: Progress,
    *,
    interference: bool = False,
) -> Merged:
    """Merge the adapters of a zoo of view `update`.

    Raises MismatchError if the adapters have different heads, and `heads` does not say whose are written.
    """
    template = _in_dtype(ZooTemplate(zoo, owner), dtype)
    others = _others(zoo, template, heads)
    jobs = with_thresholds(jobs, lambda job: place(_updates(zoo, job.context.layer), job).updates)
    task = partial(_layer_task, zoo, jobs, template, choose_rank, interference)
    done = dict(workers.each("merging layers", task, list(zoo.layers), progress))
    layers = {name: layer for name, (layer, _) in done.items()}
    job = next(iter(jobs.values()))
    weights = torch.stack([each.context.weights_T for each in jobs.values()]).mean(0).tolist()
    factors = {name: layer.factors for name, layer in layers.items()}
    certificate = certify(
        job.request,
        dict(zip(zoo.names, weights, strict=True)),
        {name: layer.sums for name, layer in layers.items()},
        sum(factor.nbytes for pair in factors.values() for factor in pair),
        started,
        warnings=(*zoo.warnings, *_warnings(layers)),
    )
    measured = {name: pair for name, (_, pair) in done.items() if pair is not None}
    sizes = {name: zoo.layers[name].num_values for name in measured}
    return Merged(
        zoo, template, factors, others, certificate, average(zoo.names, measured, sizes) if measured else None
    )


def _updates(zoo: Zoo, name: str) -> list[Factors]:
    stack = zoo.stack(name)
    assert isinstance(stack, UpdateStack)
    return [stack.factors(index) for index in range(len(stack))]


def _layer_task(
    zoo: Zoo,
    jobs: Mapping[str, Job],
    template: ZooTemplate,
    choose_rank: ChooseRank,
    interference: bool,
    name: str,
) -> tuple[MergedLayer, Measured | None]:
    layout, job, updates = template.layout, jobs[name], _updates(zoo, name)
    update = layout.updates[name]
    dtypes = layout.tensors[update.key_b].torch_dtype, layout.tensors[update.key_a].torch_dtype
    merged = merge_layer(updates, job, choose_rank, dtypes)
    if not interference:
        return merged, None

    def merge(those: Sequence[Factors]) -> Factors:
        return merge_layer(those, job, choose_rank, (torch.float64, torch.float64)).factors

    return merged, (measure(updates, merge), measure(random_like(updates, job.context.generators()[0]), merge))


def _warnings(layers: Mapping[str, MergedLayer]) -> tuple[str, ...]:
    unsure = sum(layer.gap < NOT_UNIQUE for layer in layers.values())
    if not unsure:
        return ()
    return (
        f"{counted(unsure, 'layer')} of {len(layers)}: singular values coincide: the basis is not unique, nor is the result of a "
        "method that works entry by entry (docs/merge.md)",
    )


def _in_dtype(template: ZooTemplate, dtype: torch.dtype | None) -> ZooTemplate:
    """Write the factors in another dtype; heads stay as they are."""
    if dtype is not None:
        factors = {key for update in template.layout.updates.values() for key in update.keys}
        files = {
            file: tuple(
                replace(tensor, dtype=dtype_name(dtype)) if tensor.name in factors else tensor for tensor in tensors
            )
            for file, tensors in template.layout.files.items()
        }
        template.layout = replace(template.layout, files=files)
    return template


def _others(zoo: Zoo, template: ZooTemplate, heads: str) -> dict[str, Tensor]:
    """Return the tensors that belong to no update; raises MismatchError where models differ in them, unless `heads` chooses."""
    names = other_tensors(template)
    if heads == REFUSE:
        for index, model in enumerate(zoo.names):
            own = other_tensors(ZooTemplate(zoo, index))
            different = sorted(set(own) ^ set(names)) or [
                name
                for name in names
                if index and not torch.equal(zoo.read_carried(index, name), template.read_carried(name))
            ]
            if different:
                raise MismatchError(
                    f"{model} and {zoo.names[0]} differ in it",
                    where=f"tensor '{different[0]}'",
                    rule="heads and biases of adapters are not merged",
                    next_step=f"choose whose are written: --heads first, or --heads {model} (heads=)",
                )
    return {name: template.read_carried(name) for name in names}
