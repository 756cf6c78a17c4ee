"""Give layers what a method has to know of the whole model before it merges any of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from torch import Tensor

from eigenzoo.linalg.selection import least_of_largest
from eigenzoo.merge.layer_updates import Context, LayerUpdates
from eigenzoo.merge.methods.elementwise import vote
from eigenzoo.merge.request import FULL, Job

Updates = Callable[[Job], LayerUpdates]
"""Gives a layer's updates in the space that the method acts in."""


def with_thresholds(jobs: Mapping[str, Job], updates: Updates) -> dict[str, Job]:
    """Return the jobs with the least value that each model keeps, where the method trims over the whole model (`over_model`).

    In the full space they also have the sign of most entries, which decides where a sum is exactly zero. Two passes over all
    updates, and a third in the full space; none where each layer is trimmed by itself.
    """
    first = next(iter(jobs.values()))
    share = first.request.method.over_model(first.request.options)
    if share is None:
        return dict(jobs)

    def entries() -> Iterator[Tensor]:
        for job in jobs.values():
            yield from (block.flatten(1) for block in updates(job).blocks())

    total = sum(updates(job).num_values for job in jobs.values())
    shares = [share] * len(first.context.models) if isinstance(share, int | float) else share
    least = least_of_largest(entries, [int(each * total) for each in shares])
    trimmed = {name: _with(job, replace(job.context, thresholds_T=least)) for name, job in jobs.items()}
    if first.request.chosen_space != FULL:
        return trimmed
    votes = sum(vote(updates(job)) for job in trimmed.values())
    majority = float((votes > 0) - (votes < 0))
    return {name: _with(job, replace(job.context, majority=majority)) for name, job in trimmed.items()}


def _with(job: Job, context: Context) -> Job:
    return replace(job, context=context)
