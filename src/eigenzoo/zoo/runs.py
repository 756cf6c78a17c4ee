"""Recognise checkpoints of one training run by their folders. They are steps of one path, not independent models."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from eigenzoo.formats.model import Model
from eigenzoo.formats.remote import source_url
from eigenzoo.formats.side_files import RUN_STATE

_CHECKPOINT = re.compile(r"(?P<run>.*?)/?checkpoint-\d{1,12}", re.ASCII)

RunPath = tuple[str, str, Collection[str]]
"""A model's name, the path or URL of its folder, and the files beside its weights."""


def run_paths(models: Iterable[Model], names: Iterable[str]) -> list[RunPath]:
    """Return the name, path and side files of opened models."""
    return [
        (name, source_url(model.path) or str(model.path.absolute()), model.ignored_files)
        for model, name in zip(models, names, strict=True)
    ]


def training_runs(paths: Iterable[RunPath]) -> tuple[tuple[str, ...], ...]:
    """Group the models whose folders are `checkpoint-N` of one folder and hold the state of transformers' Trainer; two or more.

    >>> training_runs([(f"m{n}", f"run/checkpoint-{n}", ["trainer_state.json"]) for n in (10, 20)])
    (('m10', 'm20'),)
    """
    runs: dict[str, list[str]] = {}
    for name, path, beside in paths:
        match = _CHECKPOINT.fullmatch(path.rstrip("/"))
        if match is not None and RUN_STATE in beside:
            runs.setdefault(match["run"], []).append(name)
    return tuple(tuple(names) for names in runs.values() if len(names) > 1)


def say_runs(runs: Collection[Collection[str]], num_models: int) -> str:
    """Say that models are steps of one run; nothing where there is no run.

    >>> say_runs([("a", "b")], 5)
    '2 of the 5 models are checkpoints of one training run (a, b): steps of one path, which share what the run had learnt before.'
    """
    if not runs:
        return ""
    count, first = sum(map(len, runs)), list(next(iter(runs)))
    shown = ", ".join(first[:3]) + (", …" if count > 3 else "")
    which = "one training run" if len(runs) == 1 else f"{len(runs)} training runs"
    return (
        f"{count} of the {num_models} models are checkpoints of {which} ({shown}): steps of one path, which share what the run "
        "had learnt before."
    )
