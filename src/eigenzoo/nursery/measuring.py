"""Measure one saved model, read back from disk by the library of its format."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import load_peft_weights
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import AutoTokenizer, BertForSequenceClassification, ViTForImageClassification

from eigenzoo.errors import FormatError, MismatchError, UsageError
from eigenzoo.nursery import arranged, digits, docstrings
from eigenzoo.nursery.cnn import Cnn
from eigenzoo.nursery.digits import Task
from eigenzoo.nursery.recipe import PARENT, PASSAGES
from eigenzoo.nursery.training import share
from eigenzoo.passes.draws import preserve_generators
from eigenzoo.passes.process import quietly

_ADAPTER = "adapter_model.safetensors"
_CHECKPOINT = "model.safetensors"
_AT_ONCE = 250


def measure(path: Path, task: str | None, base: Path | None) -> float:
    """Return the accuracy; see `eigenzoo.nursery.accuracy`."""
    weights = _weight_file(path)
    recorded = _recorded_task(weights)
    asked = task if task is not None else recorded
    if asked is None:
        raise UsageError("the file's metadata has no task", where=str(weights), next_step="pass task='5-against-5:...'")
    if docstrings.is_task(asked):
        return _measure_texts(weights, docstrings.Task.parse(asked), base)
    if arranged.is_task(asked):
        one = arranged.Task.parse(asked)
        return measure_tasks(path, base, arranged.TEST, [one])[one.name]
    data, wanted = digits.load(), Task.parse(asked)
    images, labels = data.test_set(wanted) if wanted.labels_seed is None else data.training_set(wanted)
    # Models are built with random weights before they are loaded. The caller's random state must not change.
    with preserve_generators(), torch.no_grad():
        model = _load(weights, base)
        answer = model(images)
    logits = answer if isinstance(answer, torch.Tensor) else answer.logits
    return share(logits.argmax(-1), labels)


def measure_tasks(
    path: Path, base: Path | None, part: str, tasks: Sequence[arranged.Task] | None = None
) -> dict[str, float]:
    """Return a model's accuracy on tasks of arranged digits, by default all that have a head; see `nursery.tasks_metric`."""
    weights = _weight_file(path)
    if base is None:
        base = _recorded_base(weights.parent) if weights.name == _ADAPTER else weights.parent.parent / PARENT
    heads = arranged.read_heads(base)
    with preserve_generators(), torch.no_grad():
        model = _load(weights, base)
        return arranged.accuracies(model, heads, tasks or arranged.tasks_of(heads), part)


def _measure_texts(weights: Path, task: docstrings.Task, base: Path | None) -> float:
    """Return the accuracy of an adapter of an encoder of texts, or of the encoder itself, on the zoo's own passages."""
    from eigenzoo.nursery.encoder import label, tokens_of

    is_adapter = weights.name == _ADAPTER
    parent = base if base is not None else (_recorded_base(weights.parent) if is_adapter else weights.parent)
    passages, part = docstrings.read_passages(parent / PASSAGES), task.part("test")
    with preserve_generators(), torch.no_grad():
        reader: Any = BertForSequenceClassification
        folder = weights.parent
        model = _load_adapter(folder, parent, reader) if is_adapter else _load_checkpoint(folder, reader)
        with quietly():
            tokenizer = AutoTokenizer.from_pretrained(parent, local_files_only=True, trust_remote_code=False)
            tokens = tokens_of(tokenizer, passages.texts[part])
            parts = tokens.split(_AT_ONCE)  # type: ignore[no-untyped-call]
            answers = [model(input_ids=each).logits for each in parts]
    return share(torch.cat(answers).argmax(-1), label(task, torch.tensor(passages.groups[part])))


def _weight_file(path: Path) -> Path:
    """Return the one file with weights of a checkpoint, adapter or bare state dict."""
    found = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    if len(found) != 1:
        raise FormatError(
            f"{len(found)} safetensors files instead of one model",
            where=str(path),
            rule="a model is one .safetensors file, or a folder with one",
        )
    return found[0]


def _recorded_task(weights: Path) -> str | None:
    try:
        with safe_open(weights, framework="pt") as file:
            recorded: str | None = (file.metadata() or {}).get("task")
    except SafetensorError as error:
        raise FormatError(f"this is not a safetensors file ({error})", where=str(weights)) from error
    return recorded


def _load(weights: Path, base: Path | None) -> Any:
    folder = weights.parent
    if weights.name == _ADAPTER:
        return _load_adapter(folder, base if base is not None else _recorded_base(folder))
    if weights.name == _CHECKPOINT and (folder / "config.json").is_file():
        return _load_checkpoint(folder)
    net = Cnn()
    try:
        net.load_state_dict(load_file(weights))
    except RuntimeError as error:
        raise MismatchError("these are not the weights of a digits-cnn", where=str(weights), rule=str(error)) from error
    return net.eval()


def _load_checkpoint(folder: Path, reader: Any = ViTForImageClassification) -> Any:
    """Load with transformers, and raise if it would fill weights with random values."""
    with quietly():
        model, found = reader.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    wrong = {problem: sorted(map(str, names)) for problem, names in found.items() if names}
    if wrong:
        raise MismatchError(f"this model is incomplete: {wrong}", where=str(folder))
    return model.eval()


def _load_adapter(folder: Path, base: Path, reader: Any = ViTForImageClassification) -> Any:
    """Load with PEFT, and raise if some of the adapter's layers keep their initial values."""
    with quietly():
        parent = _load_checkpoint(base, reader)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found missing adapter keys")
            model = PeftModel.from_pretrained(parent, str(folder))
    held = set(load_peft_weights(str(folder), device="cpu"))
    wanted = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    if held != wanted:
        raise MismatchError(f"adapter weights missing or too many: {sorted(held ^ wanted)}", where=str(folder))
    return model.eval()


def _recorded_base(folder: Path) -> Path:
    """Return the parent in the adapter's config, relative to the adapter's own folder."""
    named = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
    base = folder / str(named)
    if not named or not base.is_dir():
        raise UsageError(
            f"its parent {named!r} does not exist",
            where=str(folder),
            rule="the parent is a folder, named relative to the adapter's",
            next_step="pass base=, or measure with eigenzoo.nursery.metric(zoo), zoo being the folder that holds it; on the "
            "command line with --metric eigenzoo.nursery:metric --metric-arg ZOO",
        )
    return base
