"""A stream of tasks over one bundle: each leaves a small file, and the basis can grow without the old ones being lost.

    stream = Stream(space, "stream")
    stream.learn("cats", adapted)                  # after each training
    stream.refresh(["new-model"])                  # now and then: a basis of all models, the tasks' among them
    print(stream.report(accuracy, make_module).mean_forgetting)

With a frozen basis nothing is forgotten: a task's coefficients are its own. Only a refresh changes what they mean, and then every
old task is expressed anew: exactly where its weights lie in the new span, else as the nearest there, with the share that is lost.

    folder/
      basis-000/bundle/              the bundle that the stream began with
      basis-000/tasks/0000-cats.safetensors
      basis-001/…                    after the first refresh: its bundle, and all tasks in its coefficients
      models/cats/                   the tasks as models of the zoo, written when a basis is refreshed for them

A folder of a basis appears whole or not at all; older ones stay, so what is said of the past is measured, not remembered.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from eigenzoo.adapt.adapter_file import AdapterFile, load, read, save, save_moved
from eigenzoo.adapt.attach import Adapted, attach, undo
from eigenzoo.adapt.maps import map_of
from eigenzoo.adapt.trained import Start
from eigenzoo.errors import BundleError, UsageError
from eigenzoo.formats.output.whole import new_folder
from eigenzoo.records import Progress, no_progress
from eigenzoo.subspace.bundles.loading import load as load_bundle
from eigenzoo.subspace.coefficients import Coefficients
from eigenzoo.subspace.subspace import Subspace

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_FILE = re.compile(r"(\d{4})-(.+)\.safetensors")

Metric = Callable[[str, Adapted], float]
"""Called with a task's name and the module that holds it; larger is better."""


@dataclass(frozen=True)
class Report:
    """How every task fared after every step.

    Attributes:
        steps: what was done, in order: `learn cats`, `refresh 1`.
        tasks: in the order in which they were learnt.
        values: the metric of each task (second) after each step (first); None before it was learnt.
    """

    steps: tuple[str, ...]
    tasks: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]

    @cached_property
    def forgetting(self) -> dict[str, float]:
        """Of each task that was not the last step's: its best so far less what it is now (Chaudhry et al. 2018); never below 0."""
        found = {}
        for task, column in zip(self.tasks, zip(*self.values, strict=True), strict=True):
            known = [value for value in column if value is not None]
            if len(known) > 1:
                found[task] = max(known) - known[-1]
        return found

    @property
    def mean_forgetting(self) -> float:
        """The mean of that; 0 where no task is older than a step."""
        return sum(self.forgetting.values()) / len(self.forgetting) if self.forgetting else 0.0


class Stream:
    """Tasks that come one after the other.

    Attributes:
        folder: where everything lies.
        space: the subspace of the newest basis.
    """

    def __init__(self, space: Subspace | None, folder: str | os.PathLike[str]) -> None:
        """Begin a stream in a new folder, or go on with one.

        Args:
            space: what the stream begins with, saved into the folder; None to go on, or a subspace that has its newest basis.
            folder: of the stream.

        Raises UsageError for a folder that holds no stream where no subspace is given, and BundleError for one of another basis.
        """
        self.folder = Path(folder)
        bases = self._bases()
        if not bases and space is None:
            raise UsageError("holds no stream", where=str(folder), next_step="begin one with a subspace")
        if not bases and space is not None:
            with new_folder(self._basis(0)) as staging:
                space.save(staging / "bundle")
                (staging / "tasks").mkdir()
        self.space = load_bundle(self._basis(len(self._bases()) - 1) / "bundle")
        if space is not None and space.manifest.basis_id != self.space.manifest.basis_id:
            raise BundleError(
                "is a stream over another basis",
                where=str(folder),
                rule=f"its newest is {self.space.manifest.basis_id}",
                next_step="begin another folder, or go on with None",
            )

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks so far."""
        return tuple(self._files(len(self._bases()) - 1))

    def learn(self, name: str, adapted: Adapted) -> Path:
        """Keep a task's coefficients; returns their file.

        Raises UsageError for a name that is taken or no plain name, and BundleError for a module that was adapted in another basis.
        """
        if not _NAME.fullmatch(name) or name in self.tasks:
            raise UsageError(
                f"{name[:100]!r} is taken, or no name for a task", rule="letters, digits, dots, dashes and underscores"
            )
        if adapted.space.manifest.basis_id != self.space.manifest.basis_id:
            raise BundleError(
                "was adapted in another basis",
                where=name,
                next_step="attach with the stream's space, which a refresh changes",
            )
        return save(adapted, self._basis(len(self._bases()) - 1) / "tasks" / f"{len(self.tasks):04}-{name}.safetensors")

    def attach(self, name: str, module: nn.Module, names: Mapping[str, str] | None = None) -> Adapted:
        """Put a task into a module, as it is in the newest basis; see `attach.attach`. Whatever fails, the module is as it was."""
        return self._attached(len(self._bases()) - 1, self.space, name, module, names)

    def refresh(
        self,
        models: Sequence[str | os.PathLike[str]] = (),
        *,
        include_tasks: bool = True,
        like: str | None = None,
        progress: Progress = no_progress,
    ) -> dict[str, float]:
        """Fit the basis anew to the zoo, to more models and to the tasks themselves, and express all tasks in it.

        Args:
            models: checkpoints that join the zoo.
            include_tasks: let the tasks join too, as models in the zoo's format. They are written to the folder, in full. Not those
                from start `zero`, of random directions or with parameters besides, which are no models of the bundle.
            like: the model of the bundle that gives what a task's coefficients do not; by default the first.
            progress: called as progress(stage, done, total).

        Returns of each task ‖X − X̂‖² / ‖X − M‖²: what the new basis leaves out as a share of what tells it from the old mean;
        round-off where it lies in the new span. Ranks stay as they were fitted. Cost: `space.add` with refresh, and one dense
        matrix (O, I) at a time in float64.
        """
        joined = [*models, *(self._written(like) if include_tasks else [])]
        if not joined:
            raise UsageError("nothing joins the zoo", rule="a refresh is for new models, or for tasks")
        number = len(self._bases())
        grown = self.space.add(joined, refresh=True, progress=progress)
        lost = {}
        with new_folder(self._basis(number)) as staging:
            grown.save(staging / "bundle")
            (staging / "tasks").mkdir()
            for name, file in self._files(number - 1).items():
                found = read(file, self.space, augmented=True)
                values, lost[name] = move(found, self.space, grown)
                save_moved(found, values, grown, staging / "tasks" / file.name, {"lost": repr(lost[name])})
        self.space = load_bundle(self._basis(number) / "bundle")
        return lost

    def report(self, metric: Metric, module: Callable[[], nn.Module], names: Mapping[str, str] | None = None) -> Report:
        """Measure every task in every basis that it has had, which is after every step: between refreshes nothing of it changes.

        Args:
            metric: see `Metric`.
            module: makes a fresh module; called once for each task and basis.
            names: see `attach.attach`.
        """
        steps: list[str] = []
        rows: list[list[float | None]] = []
        before: dict[str, Path] = {}
        for number in range(len(self._bases())):
            files, space = self._files(number), load_bundle(self._basis(number) / "bundle")
            now = {task: metric(task, self._attached(number, space, task, module(), names)) for task in files}
            if number:
                steps.append(f"refresh {number}")
                rows.append([now[task] for task in before])
            for place, task in enumerate(files):
                if task not in before:
                    steps.append(f"learn {task}")
                    rows.append([now[other] for other in list(files)[: place + 1]])
            before = files
        width = len(self.tasks)
        return Report(tuple(steps), self.tasks, tuple((*row, *[None] * (width - len(row))) for row in rows))

    def _attached(
        self, number: int, space: Subspace, task: str, module: nn.Module, names: Mapping[str, str] | None
    ) -> Adapted:
        file = self._files(number).get(task)
        if file is None:
            raise UsageError(
                f"no task is called {task[:100]!r}", where=str(self.folder), rule=", ".join(self.tasks[:5])
            )
        found = read(file, space, augmented=True)
        adapted = attach(
            module,
            space,
            start=Start(found.mean, {}),
            besides=[glob.escape(name) for name in found.besides],
            names=names,
            seed=found.augmentation.seed,
            augment=found.augmentation.num,
        )
        try:
            load(file, adapted)
        except BaseException:
            undo(adapted)
            raise
        return adapted

    def _written(self, like: str | None) -> list[Path]:
        """The tasks that are models of the bundle and not in it yet, as checkpoints in the folder."""
        paths = []
        for name, file in self._files(len(self._bases()) - 1).items():
            found = read(file, self.space, augmented=True)
            if not found.mean or found.besides or found.augmentation.num or name in self.space.names:
                continue
            template = self.space.template(like if like is not None else self.space.names[0])
            path = self.folder / "models" / name
            rebuilt = self.space.rebuild(Coefficients(name, found.values, {}, 0.0, {}, {}, template))
            paths.append(rebuilt.save(path, force=True))  # one may be there, of a refresh that did not end
        return paths

    def _basis(self, number: int) -> Path:
        return self.folder / f"basis-{number:03}"

    def _bases(self) -> list[Path]:
        found: list[Path] = []
        while (path := self._basis(len(found))).is_dir():
            found.append(path)
        return found

    def _files(self, number: int) -> dict[str, Path]:
        """The files of the tasks in one basis, by name, in the order in which they were learnt."""
        folder = self._basis(number) / "tasks"
        matched = [(path, _FILE.fullmatch(path.name)) for path in sorted(folder.iterdir())]
        return {match[2]: path for path, match in matched if match is not None}


def move(found: AdapterFile, old: Subspace, new: Subspace) -> tuple[dict[str, Tensor], float]:
    """Express what a file holds in another basis of the same layers; returns coefficients and the share that is lost.

    The nearest point of the new span, c' = L'ᵀ(M + L(c) − M'), where bases are orthonormal: the adjoint of a map is the gradient of
    ⟨L'(c'), X⟩. From start zero the means stay out of it. Float64; one layer's dense matrices at a time.
    """
    values, outside, energy = {}, 0.0, 0.0
    for name, basis in old.layers.items():
        before, after = map_of(basis, torch.float64), map_of(new.layers[name], torch.float64)
        found.augmentation.widen(before, name)
        change = before.matrix(found.values[name].double())
        target = change + before.mean() - after.mean() if found.mean else change
        units = torch.zeros(new.layers[name].coefficient_shape, dtype=torch.float64, requires_grad=True)
        with torch.enable_grad():
            (values[name],) = torch.autograd.grad((after.matrix(units) * target).sum(), units)
        outside += float((target - after.matrix(values[name])).square().sum())
        energy += float(change.square().sum())
    return values, outside / energy if energy > 0 else float(outside > 0)
