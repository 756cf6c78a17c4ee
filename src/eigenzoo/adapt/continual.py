"""Learn a stream of tasks over one bundle. Each task is a small file, and the basis can grow without losing old tasks.

    stream = Stream(space, "stream")
    stream.learn("cats", adapted)                  # after each training
    stream.refresh(["new-model"])                  # now and then: a basis of all models, the tasks' among them
    print(stream.report(accuracy, make_module).mean_forgetting)

With a frozen basis nothing is forgotten, because every task has its own coefficients. A refresh changes the basis, and every old
task gets new coefficients: exact ones if its weights are in the new span, else those of the nearest weights, with the lost share.

    folder/
      basis-000/bundle/              the bundle that the stream began with
      basis-000/tasks/0000-cats.safetensors
      basis-001/…                    after the first refresh: its bundle, and all tasks in its coefficients
      models/cats/                   the tasks as models of the zoo, written when a basis is refreshed for them

A folder of a basis appears complete or not at all. Older ones stay, so that earlier states can be measured again.
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
"""Called with a task's name and its module. Larger is better."""


@dataclass(frozen=True)
class Report:
    """The metric of every task after every step.

    Attributes:
        steps: the steps in order: `learn cats`, `refresh 1`.
        tasks: the tasks in the order of learning.
        values: the metric of each task (second) after each step (first); None before it was learnt.
    """

    steps: tuple[str, ...]
    tasks: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]

    @cached_property
    def forgetting(self) -> dict[str, float]:
        """For each task except the last step's, its best metric minus the current one (Chaudhry et al. 2018), at least 0."""
        losses = {}
        for task, column in zip(self.tasks, zip(*self.values, strict=True), strict=True):
            measured = [value for value in column if value is not None]
            if len(measured) > 1:
                losses[task] = max(measured) - measured[-1]
        return losses

    @property
    def mean_forgetting(self) -> float:
        """The mean of `forgetting`; 0 if no task is older than one step."""
        return sum(self.forgetting.values()) / len(self.forgetting) if self.forgetting else 0.0


class Stream:
    """A sequence of tasks in a folder.

    Attributes:
        folder: the stream's folder.
        space: the subspace of the newest basis.
    """

    def __init__(self, space: Subspace | None, folder: str | os.PathLike[str]) -> None:
        """Begin a stream in a new folder, or continue one.

        Args:
            space: the first subspace, which is saved into the folder. To continue, None or a subspace with the newest basis.
            folder: the stream's folder.

            Raises UsageError for a folder without a stream if no subspace is given, and BundleError for a stream of another basis.
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
        """Names of the tasks in order."""
        return tuple(self._files(len(self._bases()) - 1))

    def learn(self, name: str, adapted: Adapted) -> Path:
        """Save a task's coefficients and return their file.

        Raises UsageError for a name that exists already or is not a plain name, and BundleError for a module with another basis.
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
        """Load a task into a module, in the newest basis; see `attach.attach`. After an error the module is unchanged."""
        return self._attached(len(self._bases()) - 1, self.space, name, module, names)

    def refresh(
        self,
        models: Sequence[str | os.PathLike[str]] = (),
        *,
        include_tasks: bool = True,
        like: str | None = None,
        progress: Progress = no_progress,
    ) -> dict[str, float]:
        """Fit the basis again to the zoo, to more models and to the tasks, and convert all tasks to it.

        Args:
            models: checkpoints to add to the zoo.
            include_tasks: also add the tasks as models in the zoo's format. They are written to the folder as whole models. Tasks
                with start `zero`, random directions or other trained parameters are not models of the bundle and are left out.
            like: the model of the bundle that provides all other tensors and files. Default: the first.
            progress: called as progress(stage, done, total).

        Returns for each task ‖X − X̂‖² / ‖X − M‖²: the lost share of its difference from the old mean, which is round-off if the
        task is in the new span. Ranks do not change. Cost: `space.add` with refresh, and one dense matrix (O, I) at a time in
        float64.
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
                adapter = read(file, self.space, augmented=True)
                values, lost[name] = move(adapter, self.space, grown)
                save_moved(adapter, values, grown, staging / "tasks" / file.name, {"lost": repr(lost[name])})
        self.space = load_bundle(self._basis(number) / "bundle")
        return lost

    def report(self, metric: Metric, module: Callable[[], nn.Module], names: Mapping[str, str] | None = None) -> Report:
        """Measure every task after every step. Between refreshes a task does not change, so one measurement per basis is enough.

        Args:
            metric: see `Metric`.
            module: function that makes a new module. It is called once for each task and basis.
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
            for index, task in enumerate(files):
                if task not in before:
                    steps.append(f"learn {task}")
                    rows.append([now[other] for other in list(files)[: index + 1]])
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
        adapter = read(file, space, augmented=True)
        adapted = attach(
            module,
            space,
            start=Start(adapter.mean, {}),
            besides=[glob.escape(name) for name in adapter.besides],
            names=names,
            seed=adapter.augmentation.seed,
            augment=adapter.augmentation.num,
        )
        try:
            load(file, adapted)
        except BaseException:
            undo(adapted)
            raise
        return adapted

    def _written(self, like: str | None) -> list[Path]:
        """Return the tasks that are models of the bundle and not yet in it, as checkpoints in the folder."""
        paths = []
        for name, file in self._files(len(self._bases()) - 1).items():
            adapter = read(file, self.space, augmented=True)
            if not adapter.mean or adapter.besides or adapter.augmentation.num or name in self.space.names:
                continue
            template = self.space.template(like if like is not None else self.space.names[0])
            path = self.folder / "models" / name
            rebuilt = self.space.rebuild(Coefficients(name, adapter.values, {}, 0.0, {}, {}, template))
            paths.append(rebuilt.save(path, force=True))  # it may exist, from an interrupted refresh
        return paths

    def _basis(self, number: int) -> Path:
        return self.folder / f"basis-{number:03}"

    def _bases(self) -> list[Path]:
        found: list[Path] = []
        while (path := self._basis(len(found))).is_dir():
            found.append(path)
        return found

    def _files(self, number: int) -> dict[str, Path]:
        """Return the files of the tasks in one basis by name, in the order of learning."""
        folder = self._basis(number) / "tasks"
        matched = [(path, _FILE.fullmatch(path.name)) for path in sorted(folder.iterdir())]
        return {match[2]: path for path, match in matched if match is not None}


def move(adapter: AdapterFile, old: Subspace, new: Subspace) -> tuple[dict[str, Tensor], float]:
    """Convert a file's coefficients to another basis of the same layers. Return the coefficients and the lost share.

    They are those of the nearest point of the new span, c' = L'ᵀ(M + L(c) − M') for orthonormal bases. The adjoint of a map is
    computed as the gradient of ⟨L'(c'), X⟩. Start zero does not use the means. Float64; one layer's dense matrices at a time.
    """
    values, outside, energy = {}, 0.0, 0.0
    for name, basis in old.layers.items():
        before, after = map_of(basis, torch.float64), map_of(new.layers[name], torch.float64)
        adapter.augmentation.widen(before, name)
        change = before.matrix(adapter.values[name].double())
        target = change + before.mean() - after.mean() if adapter.mean else change
        units = torch.zeros(new.layers[name].coefficient_shape, dtype=torch.float64, requires_grad=True)
        with torch.enable_grad():
            (values[name],) = torch.autograd.grad((after.matrix(units) * target).sum(), units)
        form = new.layers[name].low_rank(mean=adapter.mean)
        if form is not None:
            values[name] = form.matrices(form.numbers(values[name]))
        outside += float((target - after.matrix(values[name])).square().sum())
        energy += float(change.square().sum())
    return values, outside / energy if energy > 0 else float(outside > 0)
