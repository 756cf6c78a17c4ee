"""Print notes on files beside models that are not carried."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from eigenzoo.cli.console import say
from eigenzoo.display import counted

if TYPE_CHECKING:
    from eigenzoo.records import ZeroUpdates
    from eigenzoo.subspace.coefficients import Coefficients
    from eigenzoo.subspace.subspace import Subspace
    from eigenzoo.zoo.left_files import LeftFile
    from eigenzoo.zoo.zoo import Zoo

MOST = 12
"""Largest number of names on one line."""


def say_left_files(files: Sequence[LeftFile], num_models: int) -> None:
    """Name the files that rebuilt models lack, on one line. A zoo's warnings name those with weights again."""
    if files:
        say(
            "not carried: "
            + _listed(
                [
                    item.file if item.num_models == num_models else f"{item.file} ({counted(item.num_models, 'model')})"
                    for item in files
                ]
            )
        )


def say_hidden(paths: Sequence[str]) -> None:
    """Name the models that were skipped because of their names."""
    if paths:
        say(f"not read, because their names begin with '.' or '_': {_listed(paths)}; give the full path to read one")


def say_left_of_model(names: Sequence[str], weights: Collection[str]) -> None:
    """Name the files beside the original that one rebuilt model lacks. Those with weights have their own warning."""
    others = [name for name in names if name not in weights]
    if others:
        say(f"not carried: {_listed(others)}")
    if weights:
        say(
            f"warning: these weights beside the original were not written: {_listed(list(weights))}; copy them yourself if the "
            "model needs them"
        )


def not_in_subspace(space: Subspace, models: Zoo) -> list[str]:
    """Return the layers of new models that a subspace lacks, except those that its own models have too."""
    from eigenzoo.zoo.matching import EXCLUDED

    left_out = {item["tensor"] for item in space.report.get("left_out", ())}
    return [item.tensor for item in models.left_out if item.reason == EXCLUDED and item.tensor not in left_out]


def say_not_in_subspace(layers: Sequence[str], names: Sequence[str]) -> None:
    """Name layers of new models that are not in any number."""
    if layers:
        whose = names[0] if len(names) == 1 else "these models"
        say(
            f"note: the subspace lacks {counted(len(layers), 'layer')} of {whose}; they are not counted here and are carried "
            f"unchanged: {_listed(layers)}"
        )


def say_beyond(projected: Mapping[str, Coefficients]) -> None:
    """Say why more than all of a model's energy can lie outside."""
    beyond = [name for name, found in projected.items() if max(found.residual, *found.residuals.values()) > 1]
    if beyond:
        say(
            f"more than 100 %: {_listed(beyond)}. Each rebuilt model contains the zoo's mean, which is farther from these weights "
            "than zero is. Such a model is probably not one of this zoo, or its changes are much smaller"
        )


def say_zero_updates(zeros: Sequence[ZeroUpdates]) -> None:
    """Name the modules that new adapters lack, each of which counts as an update of zero."""
    for zero in zeros:
        say(
            f"note: {zero.model} lacks {counted(len(zero.modules), 'module')}, counted as updates of zero: {_listed(zero.modules)}"
        )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST} more" if len(names) > MOST else ""
    return ", ".join(names[:MOST]) + more
