"""Merge adapters into an adapter, by their factors and without their base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from eigenzoo.display import counted
from eigenzoo.errors import BudgetError, MismatchError
from eigenzoo.formats.adapter_writer import adapter_bytes, as_written, other_tensors, with_dtype
from eigenzoo.linalg.greedy import ranks_within
from eigenzoo.linalg.lora import Factors
from eigenzoo.merge.adapter_layer import MergedLayer, merge_layer, place
from eigenzoo.merge.certificate import certify
from eigenzoo.merge.heads import REFUSE, check_agreement, find_owner, read_head
from eigenzoo.merge.interference import LayerInterference, average, measure, random_like
from eigenzoo.merge.merged import Merged
from eigenzoo.merge.request import ChooseRank, Job, rank_choice
from eigenzoo.merge.trimming import with_thresholds
from eigenzoo.passes.workers import Workers
from eigenzoo.records import Progress
from eigenzoo.zoo.stack import UpdateStack
from eigenzoo.zoo.template import ZooTemplate
from eigenzoo.zoo.zoo import Zoo

NOT_UNIQUE = 1e-9
"""Relative gap of two singular values below which a basis is said not to be unique."""

Measured = tuple[LayerInterference, LayerInterference]


@dataclass(frozen=True)
class AdapterChoices:
    """Choices for the file of a merged adapter.

    Attributes:
        choose_rank: gives the rank that is kept from the singular values of a layer's merged update.
        own_ranks: whether each module has its own rank in the file.
        budget: bytes of the weights file, by which ranks are chosen instead.
        heads: `refuse`, `first`, or the name of the model whose heads are taken.
        dtype: of the factors; by default those of the model that the file is like.
        interference: whether to measure it.
    """

    choose_rank: ChooseRank
    own_ranks: bool = False
    budget: int | None = None
    heads: str = REFUSE
    dtype: torch.dtype | None = None
    interference: bool = False


def merge_adapters(
    zoo: Zoo, jobs: Mapping[str, Job], choices: AdapterChoices, started: float, workers: Workers, progress: Progress
) -> Merged:
    """Merge the adapters of a zoo of view `update`. With a budget each layer is merged twice: for its spectrum, and at its rank.

    Memory: the merged factors, and the factors of one layer per worker. Raises MismatchError if the adapters have different heads,
    and `heads` does not say whose are written.
    """
    owner = find_owner(zoo, choices.heads)
    template = ZooTemplate(zoo, owner)
    if choices.dtype is not None:
        template.layout = with_dtype(template.layout, choices.dtype)
    others = _others(zoo, template, owner, choices.heads)
    names = list(zoo.layers)
    # On a worker, whose memory the layers' tasks use again.
    ((_, jobs),) = workers.each("finding thresholds", partial(_with_thresholds, zoo, jobs), [""])
    choose: Mapping[str, ChooseRank] = dict.fromkeys(names, choices.choose_rank)
    if choices.budget is not None:
        spectrum = partial(_spectrum, zoo, jobs, template)
        values = dict(workers.each("merging layers for their spectra", spectrum, names, progress))
        ranks = _ranks_for(choices.budget, template, values, others)
        choose = {name: rank_choice(rank) for name, rank in ranks.items()}
    task = partial(_layer_task, zoo, jobs, template, choose, choices.interference)
    done = dict(workers.each("merging layers", task, names, progress))
    layers = {name: layer for name, (layer, _) in done.items()}
    job = next(iter(jobs.values()))
    weights = torch.stack([each.context.weights_T for each in jobs.values()]).mean(0).tolist()
    kept = {name: layer.sums.rank for name, layer in layers.items()}
    own_ranks = choices.own_ranks or choices.budget is not None
    certificate = certify(
        job.request,
        dict(zip(zoo.names, weights, strict=True)),
        {name: layer.sums for name, layer in layers.items()},
        adapter_bytes(template, kept, others, own_ranks=own_ranks),
        started,
        warnings=(*zoo.warnings, *_warnings(layers)),
    )
    measured = {name: pair for name, (_, pair) in done.items() if pair is not None}
    sizes = {name: zoo.layers[name].num_values for name in measured}
    return Merged(
        zoo,
        template,
        {name: layer.factors for name, layer in layers.items()},
        others,
        certificate,
        average(zoo.names, measured, sizes) if measured else None,
        own_ranks=own_ranks,
    )


def _others(zoo: Zoo, template: ZooTemplate, owner: int, heads: str) -> dict[str, Tensor]:
    """Return the tensors that belong to no update. Raises MismatchError for updates that would be of one adapter alone."""
    left = [module for module in template.layout.updates if module not in zoo.layers]
    if left:
        raise MismatchError(
            f"{counted(len(left), 'update')} of {zoo.names[owner]} would not be merged",
            where=f"layer '{left[0]}'",
            rule="a merged adapter has all updates of its sources",
            next_step="open the zoo without include, exclude and allow_missing; missing='zero' counts missing updates as zero",
        )
    every = dict.fromkeys(name for index in range(len(zoo)) for name in zoo.carried(index))
    check_agreement(zoo, every, owner, heads)
    return {name: read_head(zoo, owner, name) for name in other_tensors(template)}


def _with_thresholds(zoo: Zoo, jobs: Mapping[str, Job], _: str) -> dict[str, Job]:
    return with_thresholds(jobs, lambda job: place(_updates(zoo, job.context.layer), job).updates)


def _spectrum(zoo: Zoo, jobs: Mapping[str, Job], template: ZooTemplate, name: str) -> Tensor:
    """Return the singular values of a merged update; one zero for a zero update."""
    found = [torch.zeros(1, dtype=torch.float64)]

    def look(values: Tensor) -> int:
        found.append(values)
        return 1

    merge_layer(_updates(zoo, name), jobs[name], look, partial(as_written, template.layout, name))
    return found[-1]


def _ranks_for(
    budget: int, template: ZooTemplate, values: Mapping[str, Tensor], others: Mapping[str, Tensor]
) -> dict[str, int]:
    """Choose ranks with which the file takes at most so many bytes; raises BudgetError where rank 1 takes more."""
    layout = template.layout
    costs = {}
    for name in values:
        update = layout.updates[name]
        sizes = (layout.tensors[key].torch_dtype.itemsize for key in (update.key_b, update.key_a))
        costs[name] = sum(side * size for side, size in zip(update.shape, sizes, strict=True))

    def size(ranks: Mapping[str, int]) -> int:
        return adapter_bytes(template, ranks, others, own_ranks=True)

    least = size(dict.fromkeys(values, 1))
    if least > budget:
        raise BudgetError(
            f"a budget of {budget:,} bytes, but updates of rank 1, heads and the header take {least:,}",
            next_step=f"raise it to at least {least:,}",
        )
    room = float(budget - least)
    while True:
        ranks = ranks_within(values, costs, room)
        excess = size(ranks) - budget
        if excess <= 0:
            return ranks
        room = max(0.0, room - excess)  # longer numbers in the header


def _updates(zoo: Zoo, name: str) -> list[Factors]:
    stack = zoo.stack(name)
    assert isinstance(stack, UpdateStack)
    return [stack.factors(index) for index in range(len(stack))]


def _layer_task(
    zoo: Zoo,
    jobs: Mapping[str, Job],
    template: ZooTemplate,
    choose: Mapping[str, ChooseRank],
    interference: bool,
    name: str,
) -> tuple[MergedLayer, Measured | None]:
    job, updates = jobs[name], _updates(zoo, name)
    merged = merge_layer(updates, job, choose[name], partial(as_written, template.layout, name))
    if not interference:
        return merged, None

    def merge(those: Sequence[Factors]) -> Factors:
        return merge_layer(those, job, choose[name], lambda b, a: (b, a)).factors

    return merged, (measure(updates, merge), measure(random_like(updates, job.context.generators()[0]), merge))


def _warnings(layers: Mapping[str, MergedLayer]) -> tuple[str, ...]:
    unsure = sum(layer.gap < NOT_UNIQUE for layer in layers.values())
    if not unsure:
        return ()
    return (
        f"{counted(unsure, 'layer')} of {len(layers)}: singular values coincide: the basis is not unique, nor is the result of a "
        "method that works entry by entry (docs/merge.md)",
    )
