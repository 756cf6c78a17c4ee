"""Adapt a classifier on disk to a task on disk, and return the record of the training: the work of `eigenzoo adapt`."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eigenzoo.adapt import adapter_file, unfinished
from eigenzoo.adapt.adapter_file import LORA_RANK, lora_bytes
from eigenzoo.adapt.attach import Adapted, attach
from eigenzoo.adapt.trained import LEARNING_RATE, MEAN, ZERO
from eigenzoo.adapt.training import Data, TensorData, check_options, moved, train
from eigenzoo.errors import UsageError
from eigenzoo.formats.output.whole import check_free_file
from eigenzoo.integrations.classification_data import read_labelled
from eigenzoo.integrations.models import (
    Classifier,
    logits,
    read_classifier,
    read_config,
    read_nursery,
    require,
)
from eigenzoo.passes.resources import check_device
from eigenzoo.records import Progress, no_progress, plain
from eigenzoo.subspace.bundles.loading import load
from eigenzoo.subspace.coefficient_file import is_coefficient_file

NURSERY = "5-against-5:"
STEPS, BATCH_SIZE = 200, 64
_AT_ONCE = 256
"""Number of items in a batch of a measurement."""


@dataclass(frozen=True)
class Accuracy:
    """Accuracies on held-out data.

    Attributes:
        start: before training.
        mean: with the zoo's mean and without coefficients.
        adapted: after training.
    """

    start: float
    mean: float
    adapted: float


@dataclass(frozen=True)
class Adaptation:
    """Record of an adaptation.

    Attributes:
        output: the file; None for the control, which is not saved.
        start, random_basis: the given options.
        classes: class names in the order of the model's outputs.
        num_train, num_test: number of training items and of held-out items.
        num_trained: number of trained values; `num_besides` of them are not coefficients.
        file_bytes: bytes of the file; None without one.
        checkpoint_bytes: bytes of the adapted model's weight files.
        lora_bytes: bytes of an adapter of rank `lora_rank` of the same layers, with the other trained parameters.
        taken_up_at: number of steps of an earlier, interrupted call.
        first_loss, last_loss: losses of single batches.
        notes: remarks on changes of the data.
    """

    output: str | None
    data: str
    start: str
    random_basis: bool
    classes: tuple[str, ...]
    num_train: int
    num_test: int
    num_trained: int
    num_besides: int
    file_bytes: int | None
    checkpoint_bytes: int
    lora_bytes: int
    lora_rank: int
    accuracy: Accuracy
    steps: int
    taken_up_at: int
    first_loss: float
    last_loss: float
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain JSON values."""
        return dict(plain(self))


@dataclass(frozen=True)
class _Task:
    train: Data
    test: Data
    classes: tuple[str, ...]
    classifier: Classifier
    about: Mapping[str, str]
    notes: tuple[str, ...] = ()


def adapt_classifier(
    bundle: str | Path,
    data: str,
    model: Path,
    output: Path | None,
    *,
    start: str = MEAN,
    steps: int = STEPS,
    batch_size: int = BATCH_SIZE,
    learning_rate: float = LEARNING_RATE,
    besides: Sequence[str] = (),
    prefix: str | None = None,
    seed: int = 0,
    random_basis: bool = False,
    test_share: float | None = None,
    checkpoint: Path | None = None,
    device: str = "cpu",
    force: bool = False,
    progress: Progress = no_progress,
) -> Adaptation:
    """Train coefficients of a classifier for a task, measure it on held-out data, and save the adapter file.

    Args:
        bundle: the subspace.
        data: a task of the nursery (`5-against-5:0,1,2,3,4`), or the path of labelled texts or images.
        model: a local checkpoint of transformers, or a model of the nursery.
        output: the file; None with `random_basis`, whose coefficients are useless without these random directions.
        checkpoint: file for unfinished work. Default: a hidden file beside the output. It is removed after the output is written.
        device: device of the model, its coefficients and the batches: `cpu`, `cuda`, `cuda:1`.

    For the other arguments see `attach` and `train`. Raises their errors, and DataError for data that cannot be used. Only a loss
    that is not finite is raised after training starts.
    """
    if (output is None) is not random_basis:
        raise UsageError(
            "a random basis has no output file" if random_basis else "no output file is named",
            rule="the control writes no file, because no bundle has its directions; everything else does",
        )
    seed = check_options(steps, batch_size, learning_rate, seed)
    check_device(device)
    if output is not None:
        check_free_file(output, force=force, own=is_coefficient_file)
        if checkpoint is not None and checkpoint.absolute() == output.absolute():
            raise UsageError(
                "output and checkpoint are the same file", where=str(output), rule="they must be different files"
            )
        checkpoint = output.parent / f".{output.name}.checkpoint" if checkpoint is None else checkpoint
    space = load(bundle)
    if space.view == "delta" and start != ZERO:
        # The zoo's mean is a change of its base, and must not be added to other weights.
        space = load(bundle, base=model)
    task = _read_task(data, model, besides, test_share, seed)
    names, module = task.classifier.names, task.classifier.module.to(device)
    mean_accuracy = None
    if start == ZERO:
        mean_accuracy = accuracy(
            attach(copy.deepcopy(module), space, names=names, prefix=prefix).module, task.test, device
        )
    adapted = attach(
        module,
        space,
        start=start,
        besides=besides,
        names=names,
        prefix=prefix,
        random_basis=random_basis,
        seed=seed,
        progress=progress,
    )
    at_start = accuracy(module, task.test, device)
    if mean_accuracy is None:
        mean_accuracy = _accuracy_of_mean(adapted, task.test, device)
    done = train(
        adapted,
        task.train,
        classification_loss,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
        checkpoint=checkpoint,
        device=device,
        progress=progress,
    )
    found = Accuracy(at_start, mean_accuracy, accuracy(module, task.test, device))
    if output is not None:
        saved = {parameter: name for name, parameter in names.items()}
        renamed = {name: saved[name] for name in adapted.besides if saved.get(name, name) != name}
        about = {**task.about, **({"names": json.dumps(renamed)} if renamed else {})}
        adapter_file.save(adapted, output, force=force, about=about)
    if checkpoint is not None:
        unfinished.remove(checkpoint)
    num_besides = sum(parameter.numel() for parameter in adapted.besides.values())
    besides_bytes = sum(parameter.numel() * parameter.element_size() for parameter in adapted.besides.values())
    return Adaptation(
        output=None if output is None else str(output),
        data=data,
        start=start,
        random_basis=random_basis,
        classes=task.classes,
        num_train=len(task.train),
        num_test=len(task.test),
        num_trained=adapted.num_trained,
        num_besides=num_besides,
        file_bytes=None if output is None else output.stat().st_size,
        checkpoint_bytes=task.classifier.file_bytes,
        lora_bytes=lora_bytes(space.layers) + besides_bytes,
        lora_rank=LORA_RANK,
        accuracy=found,
        steps=steps,
        taken_up_at=done.taken_up_at,
        first_loss=done.losses[0],
        last_loss=done.losses[-1],
        notes=task.notes,
    )


def classification_loss(module: nn.Module, batch: tuple[Any, Tensor]) -> Tensor:
    """Return the cross entropy of one batch of (inputs, labels)."""
    inputs, labels = batch
    return nn.functional.cross_entropy(logits(module, inputs), labels)


def accuracy(module: nn.Module, data: Data, device: str | None = None) -> float:
    """Return the accuracy. If a device is given, batches are moved to it."""
    right = 0
    with torch.no_grad():
        for start in range(0, len(data), _AT_ONCE):
            inputs, labels = moved(data.take(torch.arange(start, min(start + _AT_ONCE, len(data)))), device)
            right += int((logits(module, inputs).argmax(-1) == labels).sum())
    return right / len(data)


def _accuracy_of_mean(adapted: Adapted, data: Data, device: str) -> float:
    """Measure a module with coefficients at zero, and restore the same bits afterwards."""
    kept = [weight.trained.theta.detach().clone() for weight in adapted.weights.values()]
    adapted.set_coefficients({name: torch.zeros_like(values) for name, values in adapted.coefficients().items()})
    try:
        return accuracy(adapted.module, data, device)
    finally:
        with torch.no_grad():
            for weight, theta in zip(adapted.weights.values(), kept, strict=True):
                weight.trained.theta.copy_(theta)


def _read_task(data: str, model: Path, besides: Sequence[str], test_share: float | None, seed: int) -> _Task:
    if not data.startswith(NURSERY):
        labelled = read_labelled(Path(data), model, test_share)
        classifier = read_classifier(model, labelled.kind, len(labelled.classes), besides, seed)
        config = read_config(model)
        known = tuple(str(config.id2label[number]) for number in range(config.num_labels))
        about = {} if known == labelled.classes else {"classes": json.dumps(labelled.classes)}
        return _Task(labelled.train, labelled.test, labelled.classes, classifier, about, labelled.notes)
    if test_share is not None:
        raise UsageError(
            "a test share does not apply to a task of the nursery", where=data, rule="500 of its images are held out"
        )
    require("sklearn", *([] if model.is_file() else ["transformers"]))
    from eigenzoo.nursery import digits

    task, images = digits.Task.parse(data), digits.load()
    # Memorised labels can only be measured on the training images, as in `nursery.accuracy`.
    held_out = images.test_set(task) if task.labels_seed is None else images.training_set(task)
    classifier = read_nursery(model)
    first = ",".join(map(str, task.digits))
    return _Task(
        TensorData(*images.training_set(task)),
        TensorData(*held_out),
        (first, "others"),
        classifier,
        {"task": str(task)},
    )
