"""Load classifiers on disk as torch modules: checkpoints of transformers, and the small networks of the nursery.

Nothing is downloaded, no pickle is read, and no code that comes with a model is run.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from eigenzoo import errors
from eigenzoo.errors import EigenzooError, FormatError, MismatchError, UsageError, install
from eigenzoo.formats.json_file import read_json
from eigenzoo.formats.opening import open_model
from eigenzoo.formats.side_files import CONFIG
from eigenzoo.integrations.model_limits import MOST_COUNTED, check_counts, no_larger_than
from eigenzoo.integrations.transformers_names import saved_names
from eigenzoo.passes.draws import preserve_generators, seed_generators
from eigenzoo.passes.process import quietly
from eigenzoo.weights.roles import glob_of

EXTRA = install("adapt")
IMAGE, TEXT = "image", "text"
LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}

Made = TypeVar("Made")


@dataclass(frozen=True)
class Classifier:
    """A classifier without coefficients.

    Attributes:
        module: the module in eval mode.
        names: parameter names in the module by tensor names in the files.
        num_classes: number of its classes.
        file_bytes: bytes of its weight files.
    """

    module: nn.Module
    names: Mapping[str, str]
    num_classes: int
    file_bytes: int


def logits(module: nn.Module, inputs: Any) -> Tensor:
    """Return a classifier's logits for one batch: (n, classes)."""
    answer: Any = module(**inputs) if isinstance(inputs, Mapping) else module(inputs)
    found: Tensor = answer if isinstance(answer, Tensor) else answer.logits
    return found


def require(*libraries: str) -> None:
    """Raise UsageError that names the extra where one of these is not installed."""
    errors.require(*libraries, where="eigenzoo adapt", extra="adapt")


def read_config(folder: Path) -> Any:
    """Read the config of a local transformers checkpoint. Raises UsageError or FormatError for anything else."""
    if not (folder / CONFIG).is_file():
        raise UsageError(
            f"this is not a folder with a {CONFIG}",
            where=str(folder),
            rule="the model must be a local transformers checkpoint",
            next_step="save it with save_pretrained and name that folder",
        )
    check_counts(read_json(folder / CONFIG, where=str(folder / CONFIG)), MOST_COUNTED, folder)
    require("transformers")
    from transformers import AutoConfig

    with quietly():
        return told("its config cannot be read", folder, lambda: AutoConfig.from_pretrained(folder, **LOCAL))


def read_classifier(
    folder: Path, kind: str, num_classes: int, besides: Sequence[str] = (), seed: int = 0
) -> Classifier:
    """Load a transformers checkpoint as a classifier of texts or images, in float32.

    Args:
        kind: `text` or `image`.
        num_classes: number of classes. A head of another size is replaced by a random one.
        besides: name patterns of other parameters to train. Only these can be random.
        seed: seed of random parameters.

    Raises UsageError if a random parameter would not be trained, and FormatError for files that are not such a model.
    """
    config = read_config(folder)
    from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

    files = open_model(folder)
    if files.format != "checkpoint":
        # An adapter's config sends transformers to whatever folder it names.
        raise UsageError(
            f"this is a {files.format}", where=str(folder), rule="the model must be a transformers checkpoint"
        )
    reader: Any = AutoModelForImageClassification if kind == IMAGE else AutoModelForSequenceClassification
    if config.num_labels != num_classes:
        config.num_labels = num_classes
    if kind == TEXT and getattr(config, "pad_token_id", None) is None:
        # Models that classify at the last token need the padding token to find the end of a text.
        config.pad_token_id = pad_token(read_tokenizer(folder))[1]
    with quietly(), preserve_generators(), no_larger_than(files, folder):
        seed_generators(seed)
        module, found = told(
            f"is not a classifier of {kind}s",
            folder,
            lambda: reader.from_pretrained(
                folder,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **LOCAL,
            ),
        )
        _check_drawn(folder, found, besides)
        return Classifier(module.eval(), saved_names(module), num_classes, files.nbytes)


def read_tokenizer(folder: Path) -> Any:
    """Read the tokenizer in a checkpoint's folder."""
    require("transformers")
    from transformers import AutoTokenizer

    with quietly():
        return told(
            "has no tokenizer",
            folder,
            lambda: AutoTokenizer.from_pretrained(folder, **LOCAL),
            next_step=f"save it there: tokenizer.save_pretrained({str(folder)!r})",
        )


def pad_token(tokenizer: Any) -> tuple[str, int]:
    """Return the padding token and its number: the tokenizer's own, else its end-of-text token."""
    for name in ("pad_token", "eos_token", "sep_token"):
        if getattr(tokenizer, name, None) is not None:
            return getattr(tokenizer, name), int(getattr(tokenizer, f"{name}_id"))
    raise UsageError("the tokenizer has no padding token", next_step="set its pad_token")


def read_nursery(path: Path) -> Classifier:
    """Load a model of the nursery: a transformers checkpoint or the safetensors file of a digits-cnn."""
    if not path.is_file():
        return read_classifier(path, IMAGE, 2)
    from eigenzoo.nursery.cnn import Cnn

    with preserve_generators():  # its initial weights are random before they are read
        model, net = open_model(path), Cnn()
    expected = {name: tuple(values.shape) for name, values in net.state_dict().items()}
    if {name: info.shape for name, info in model.tensors.items()} != expected:
        raise MismatchError(
            "these are not the weights of a digits-cnn",
            where=str(path),
            rule="a bare file must be a model of the nursery",
        )
    net.load_state_dict({name: model.read(name) for name in expected})
    return Classifier(net.eval(), {}, 2, model.nbytes)


def told(what: str, where: Path, call: Callable[[], Made], *, next_step: str = "") -> Made:
    """Call another library on the user's files. Any error of it is reported in one line."""
    try:
        return call()
    except EigenzooError:
        raise
    # For broken files these libraries raise KeyError, TypeError or errors of their own.
    except Exception as error:
        said = " ".join(str(error).split())
        raise FormatError(
            f"{what} ({type(error).__name__}: {said[:300]})", where=str(where), next_step=next_step
        ) from error


def _check_drawn(folder: Path, found: Mapping[str, Any], besides: Sequence[str]) -> None:
    """Raise if a weight is missing in the files or has another shape, and its random replacement is not trained."""
    mismatched = [str(entry if isinstance(entry, str) else entry[0]) for entry in found.get("mismatched_keys", ())]
    drawn = sorted({*map(str, found.get("missing_keys", ())), *mismatched})
    left = [name for name in drawn if not any(fnmatch.fnmatch(name, pattern) for pattern in besides)]
    if left:
        raise UsageError(
            f"{', '.join(left[:4])}{', …' if len(left) > 4 else ''}: missing in the checkpoint, or of another size",
            where=str(folder),
            rule="a head that does not fit the data is initialised at random and must be trained",
            next_step=f"add --besides '{glob_of(left[0].rpartition('.')[0])}.*'",
        )
