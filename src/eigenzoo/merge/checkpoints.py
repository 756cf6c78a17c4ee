"""Merge checkpoints into a checkpoint: base + the merge of their differences from it, layer by layer while it is written."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from eigenzoo.errors import MismatchError
from eigenzoo.formats.layout import ModelLayout, layout_of
from eigenzoo.formats.output.own import recorded, write_record
from eigenzoo.formats.output.whole import new_folder
from eigenzoo.formats.safetensors.dtypes import dtype_name
from eigenzoo.formats.writers import cast_to, write_checkpoint
from eigenzoo.merge.certificate import Certificate, LayerSums, certify
from eigenzoo.merge.dense_layer import UpdatesInTiles, compare_dense, merge_dense
from eigenzoo.merge.files import MERGED, write_certificate
from eigenzoo.merge.request import Job
from eigenzoo.merge.trimming import with_thresholds
from eigenzoo.passes.settings import own_settings
from eigenzoo.passes.workers import Workers, local_workers
from eigenzoo.records import Progress, no_progress
from eigenzoo.weights.roles import VARIANCE
from eigenzoo.zoo.stack import DenseStack
from eigenzoo.zoo.template import ZooTemplate
from eigenzoo.zoo.zoo import Zoo


class MergedCheckpoint:
    """Checkpoints merged into one, which is computed when it is saved.

    Attributes:
        certificate: what the file loses by its dtype, and what is left of each source. Before `save` it takes a pass of its own.
    """

    def __init__(self, zoo: Zoo, jobs: Mapping[str, Job], owner: int, heads: str, dtype: torch.dtype | None) -> None:
        self._zoo, self._template = zoo, ZooTemplate(zoo, owner)
        self._layout = _in_dtype(layout_of(zoo.models[owner]), dtype)
        self._others = _others(zoo, owner, heads)
        self._jobs, self._trimmed = jobs, False
        self._certificate: Certificate | None = None

    def __repr__(self) -> str:
        method = next(iter(self._jobs.values())).request.method.name
        return f"MergedCheckpoint({method}, {len(self._zoo)} models, {len(self._jobs)} layers)"

    @property
    def certificate(self) -> Certificate:
        """The loss of the file by its dtype, and the part of each source that is left."""
        if self._certificate is None:
            with local_workers() as workers:
                self.check(workers, no_progress)
        assert self._certificate is not None
        return self._certificate

    @own_settings()
    def check(self, workers: Workers, progress: Progress) -> Certificate:
        """Compute the certificate and write nothing. Cost: that of `save` without writing."""
        started, sums = time.perf_counter(), dict[str, LayerSums]()
        self._trim()
        for name, (_, layer) in workers.each("merging layers", self._merged, list(self._zoo.layers), progress):
            sums[name] = layer
        return self._certify(sums, started)

    @own_settings()
    def save(self, folder: str | os.PathLike[str], *, force: bool = False, progress: Progress = no_progress) -> Path:
        """Write the checkpoint with the shards, names and side files of the first source into a new folder, and return the folder.

        It appears complete or not at all. `force` replaces a folder that contains only a merged model, unchanged. Memory: for each
        thread one layer in float64 and a block of rows of all models; methods on singular values take one model's layer more, and
        `ctm`, `wudi` and `regmean` those of all.
        """
        started, sums = time.perf_counter(), dict[str, LayerSums]()
        sizes = {name: tensor.nbytes for name, tensor in self._layout.tensors.items()}

        def read(name: str) -> Tensor:
            if name not in self._zoo.layers:
                return self._others(name)
            values, sums[name] = self._merged(name)
            return values

        with new_folder(Path(folder), force=force, foreign=recorded(MERGED)) as staging, local_workers() as workers:
            self._trim()

            def run(read_one: Callable[[str], Tensor], names: Sequence[str]) -> Iterator[Tensor]:
                for _, values in workers.each("merging layers", read_one, names, progress, weight=sizes.__getitem__):
                    yield values

            side_files = {name: self._template.read_side_file(name) for name in self._template.side_files}
            write_checkpoint(
                staging, self._layout, read, metadata=self._template.metadata, side_files=side_files, run=run
            )
            write_certificate(staging, self._certify(sums, started), self._zoo)
            write_record(staging, MERGED)
        return Path(folder)

    def _trim(self) -> None:
        if not self._trimmed:
            self._jobs, self._trimmed = with_thresholds(self._jobs, self._updates), True

    def _certify(self, sums: Mapping[str, LayerSums], started: float) -> Certificate:
        jobs = list(self._jobs.values())
        weights = torch.stack([job.context.weights_T for job in jobs]).mean(0).tolist()
        num_bytes = sum(tensor.nbytes for tensor in self._layout.tensors.values())
        self._certificate = certify(
            jobs[0].request,
            dict(zip(self._zoo.names, weights, strict=True)),
            {name: sums[name] for name in self._zoo.layers},
            num_bytes,
            started,
            warnings=self._zoo.warnings,
        )
        return self._certificate

    def _updates(self, job: Job) -> UpdatesInTiles:
        stack = self._zoo.stack(job.context.layer)
        assert isinstance(stack, DenseStack)
        return UpdatesInTiles(job.context, stack)

    def _merged(self, name: str) -> tuple[Tensor, LayerSums]:
        """Return a merged tensor as it is written, and the terms of its certificate."""
        layer, job = self._zoo.layers[name], self._jobs[name]
        updates = self._updates(job)
        merged_OI = merge_dense(updates, job, layer.unfolding)
        base = (
            self._zoo.base.read(name).double().view(layer.shape)
            if self._zoo.view == "delta" and self._zoo.base
            else 0.0
        )
        exact = (merged_OI + base).reshape(layer.tensor_shape)
        if VARIANCE.search(name):
            # The square root of a negative variance is NaN, and so would be all outputs of the model.
            exact = exact.clamp_min(torch.finfo(torch.float32).tiny)
        written = cast_to(self._layout.tensors[name], exact)
        return written, compare_dense(updates, merged_OI, written.double().view(layer.shape) - base)


def _in_dtype(layout: ModelLayout, dtype: torch.dtype | None) -> ModelLayout:
    """Return a layout whose floating-point tensors have another dtype."""
    if dtype is None:
        return layout
    files = {
        file: tuple(
            replace(tensor, dtype=dtype_name(dtype)) if tensor.torch_dtype.is_floating_point else tensor
            for tensor in tensors
        )
        for file, tensors in layout.files.items()
    }
    return replace(layout, files=files)


def _others(zoo: Zoo, owner: int, heads: str) -> Callable[[str], Tensor]:
    """Return a reader of all other tensors: counts and buffers come from the base, the rest from the owner.

    Raises MismatchError where models differ in one of these, unless `heads` chooses a model.
    """
    from_base = {
        name
        for name in zoo.carried(owner)
        if zoo.base is not None
        and name in zoo.base.tensors
        and not zoo.base.tensors[name].dtype.is_floating_point
        and zoo.base.tensors[name].shape == zoo.models[owner].tensors[name].shape
    }
    if heads == "refuse":
        for name in (name for name in zoo.carried(owner) if name not in from_base):
            own = zoo.models[owner].read(name)
            for model, other in zip(zoo.models, zoo.names, strict=True):
                if name in model.tensors and torch.equal(model.read(name), own):
                    continue
                raise MismatchError(
                    f"{other} and {zoo.names[owner]} differ in it",
                    where=f"tensor '{name}'",
                    rule="only layers that all models have are merged",
                    next_step=f"choose whose is written: --heads first, or --heads {other} (heads=)",
                )

    def read(name: str) -> Tensor:
        if name in from_base:
            assert zoo.base is not None
            return zoo.base.read(name)
        return zoo.models[owner].read(name)

    return read
