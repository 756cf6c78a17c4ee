"""Merge checkpoints into a checkpoint: base + the merge of their differences from it, layer by layer while it is written."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from eigenzoo.errors import UnsupportedError
from eigenzoo.formats.json_file import parse_json
from eigenzoo.formats.layout import ModelLayout, TensorLayout
from eigenzoo.formats.output.own import recorded, write_record
from eigenzoo.formats.output.whole import new_folder
from eigenzoo.formats.safetensors.dtypes import dtype_name, dtype_of
from eigenzoo.formats.writers import DEFAULT_METADATA, cast_to, weights_bytes, write_checkpoint
from eigenzoo.merge.certificate import Certificate, LayerSums, certify
from eigenzoo.merge.dense_layer import OF_MATRICES, SPECTRAL_VALUES, UpdatesInTiles, merge_rows, write_rows
from eigenzoo.merge.files import MERGED, write_certificate
from eigenzoo.merge.heads import check_agreement, find_owner, read_head
from eigenzoo.merge.request import Job
from eigenzoo.merge.trimming import with_thresholds
from eigenzoo.passes.settings import own_settings
from eigenzoo.passes.workers import Workers, local_workers
from eigenzoo.records import Progress, no_progress
from eigenzoo.weights.roles import VARIANCE
from eigenzoo.zoo.stack import DenseStack
from eigenzoo.zoo.template import ZooTemplate
from eigenzoo.zoo.zoo import Zoo

CONFIG = "config.json"


class MergedCheckpoint:
    """Checkpoints merged into one, which is computed when it is saved.

    Attributes:
        certificate: what the file loses by its dtype, and what is left of each source. Before `save` it takes a pass of its own.
        recipe: the recipe, which is written beside the checkpoint, if there was one.
    """

    recipe: bytes | None = None

    def __init__(self, zoo: Zoo, jobs: Mapping[str, Job], heads: str, dtype: torch.dtype | None) -> None:
        owner = find_owner(zoo, heads)
        self._zoo, self._template = zoo, ZooTemplate(zoo, owner)
        self._own = self._template.layout
        self._layout = _output_layout(self._own, zoo, dtype)
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
            with local_workers(num=self._num_workers) as workers:
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
        thread the written layer and some rows of all models. Methods on singular values run on one thread, and take one layer in
        float64 and one model's more; `ctm`, `wudi` and `regmean` those of all.
        """
        started, sums = time.perf_counter(), dict[str, LayerSums]()
        sizes = {name: tensor.nbytes for name, tensor in self._layout.tensors.items()}

        def read(name: str) -> Tensor:
            if name not in self._zoo.layers:
                return self._others(name)
            values, sums[name] = self._merged(name)
            return values

        with (
            new_folder(Path(folder), force=force, foreign=recorded(MERGED)) as staging,
            local_workers(num=self._num_workers) as workers,
        ):
            self._trim()

            def run(read_one: Callable[[str], Tensor], names: Sequence[str]) -> Iterator[Tensor]:
                for _, values in workers.each("merging layers", read_one, names, progress, weight=sizes.__getitem__):
                    yield values

            metadata, side_files = self._template.metadata, self._side_files()
            write_checkpoint(staging, self._layout, read, metadata=metadata, side_files=side_files, run=run)
            write_certificate(staging, self._certify(sums, started), self._zoo, self.recipe)
            write_record(staging, MERGED)
        return Path(folder)

    def _side_files(self) -> dict[str, bytes]:
        """Read the files beside the weights; where the layers have another dtype than there, a config states it."""
        files = {name: self._template.read_side_file(name) for name in self._template.side_files}
        written, own = ({each.tensors[name].dtype for name in self._zoo.layers} for each in (self._layout, self._own))
        if CONFIG in files and len(written) == 1 and written != own:
            files[CONFIG] = _stating(files[CONFIG], dtype_of(written.pop()))
        return files

    @property
    def _num_workers(self) -> int | None:
        """One where a method takes whole layers of several models, so that no more than one of them is in memory."""
        method = next(iter(self._jobs.values())).request.method
        return 1 if method.kind in OF_MATRICES else None

    def _trim(self) -> None:
        if not self._trimmed:
            self._jobs, self._trimmed = with_thresholds(self._jobs, self._updates), True

    def _certify(self, sums: Mapping[str, LayerSums], started: float) -> Certificate:
        jobs = list(self._jobs.values())
        weights = torch.stack([job.context.weights_T for job in jobs]).mean(0).tolist()
        metadata = self._template.metadata
        num_bytes = sum(
            weights_bytes(tensors, metadata.get(file) or DEFAULT_METADATA)
            for file, tensors in self._layout.files.items()
        )
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
        stack = self._zoo.stack(job.context.layer, precision="high")
        assert isinstance(stack, DenseStack)
        return UpdatesInTiles(job.context, stack)

    def _merged(self, name: str) -> tuple[Tensor, LayerSums]:
        """Return a merged tensor as it is written, and the terms of its certificate."""
        layer, job, piece = self._zoo.layers[name], self._jobs[name], self._layout.tensors[name]
        updates = self._updates(job)
        base, start = self._zoo.base if self._zoo.view == "delta" else None, 0
        written = torch.empty(layer.num_values, dtype=piece.torch_dtype)

        def write(merged: Tensor) -> Tensor:
            nonlocal start
            stop = start + merged.numel()
            from_base = torch.zeros(stop - start, dtype=torch.float64)
            if base is not None:
                base.read_flat(name, start, stop, out=from_base)
            exact = from_base + merged.reshape(-1)
            if VARIANCE.search(name):
                # The square root of a negative variance is NaN, and so would be all outputs of the model.
                exact.clamp_min_(torch.finfo(torch.float32).tiny)
            rows = cast_to(TensorLayout(name, piece.dtype, (stop - start,)), exact)
            written[start:stop] = rows
            start = stop
            return (rows.double() - from_base).view(merged.shape)

        spectral = max(each.num_values for each in self._zoo.layers.values()) <= SPECTRAL_VALUES
        sums = write_rows(updates, merge_rows(updates, job, layer.unfolding), write, spectral=spectral)
        return written.view(layer.tensor_shape), sums


def _output_layout(layout: ModelLayout, zoo: Zoo, dtype: torch.dtype | None) -> ModelLayout:
    """Return a layout whose layers have the dtype that was asked for, or the base's."""
    if layout.splits:
        raise UnsupportedError(
            "fused weights that are split", rule="checkpoints are merged as they are", next_step="leave split out"
        )
    dtypes: dict[str, str] = {}
    for name in zoo.layers:
        own = dtype if dtype is not None or zoo.base is None else zoo.base.tensors[name].dtype
        if own is not None:
            dtypes[name] = dtype_name(own)
    files = {
        file: tuple(replace(tensor, dtype=dtypes.get(tensor.name, tensor.dtype)) for tensor in tensors)
        for file, tensors in layout.files.items()
    }
    return replace(layout, files=files)


def _others(zoo: Zoo, owner: int, heads: str) -> Callable[[str], Tensor]:
    """Return a reader of all other tensors: counts come from the base, the rest from the owner.

    Raises MismatchError where models differ in one of these, unless `heads` chooses a model.
    """
    tensors, base = zoo.models[owner].tensors, zoo.base
    from_base = {
        name
        for name in zoo.carried(owner)
        if base is not None
        and name in base.tensors
        and not base.tensors[name].dtype.is_floating_point
        and (base.tensors[name].dtype, base.tensors[name].shape) == (tensors[name].dtype, tensors[name].shape)
    }
    every = dict.fromkeys(name for index in range(len(zoo)) for name in zoo.carried(index))
    check_agreement(zoo, [name for name in every if name not in from_base], owner, heads)

    def read(name: str) -> Tensor:
        if base is not None and name in from_base:
            return base.read(name)
        return read_head(zoo, owner, name)

    return read


def _stating(config: bytes, dtype: torch.dtype) -> bytes:
    """Return a config that states a dtype, if it stated one."""
    document = parse_json(config, where=CONFIG)
    stated = {key: str(dtype).removeprefix("torch.") for key in ("dtype", "torch_dtype") if key in document}
    if all(document[key] == value for key, value in stated.items()):
        return config
    return (json.dumps({**document, **stated}, indent=2) + "\n").encode()
