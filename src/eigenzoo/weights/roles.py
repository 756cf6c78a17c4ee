"""Roles: the name that a weight has in every block of a network."""

from __future__ import annotations

import re

TASK_HEAD = re.compile(
    r"(^|(^|\.)(?=classifier|lm_head|score|qa_outputs|pre_classifier))"
    r"(classifier|lm_head|score|qa_outputs|pre_classifier|head|heads|fc)(\.\d+)?(\.(weight|bias))?$"
)
"""The names by which the libraries call what maps features to one task's answers (transformers, timm, torchvision)."""

VARIANCE = re.compile(r"(^|\.)running_var$")
"""The name of a batch norm's running variance, which a sum of directions may take below zero."""

PEFT_PREFIX = "base_model.model."


def role(layer: str) -> str:
    """Return the layer's name with each block number replaced by `*`.

    >>> role("vit.encoder.layer.11.attention.query.weight")
    'vit.encoder.layer.*.attention.query.weight'
    """
    return re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)", "*", layer.removeprefix(PEFT_PREFIX))


def glob_of(layer: str) -> str:
    """Return a glob that matches a layer, to be written between quotes in a command: whatever a shell could take for more is `?`.

    >>> glob_of("block.*.weight"), glob_of("a'; rm -r x #[0]")
    ('block.*.weight', 'a???rm?-r?x???0?')
    """
    return re.sub(r"[^\w.*/:-]", "?", layer, flags=re.ASCII)


def depth(layer: str) -> int | None:
    """Return the first block number in the layer's name, or None where there is none.

    >>> depth("vit.encoder.layer.11.attention.query.weight")
    11
    """
    match = re.search(r"(?:^|\.)(\d+)(?:\.|$)", layer)
    return int(match[1]) if match else None


def is_task_head(layer: str) -> bool:
    """Tell whether a name is that of a task head, whose shape may differ from model to model.

    >>> is_task_head("classifier.weight"), is_task_head("encoder.fc1.weight")
    (True, False)
    """
    return TASK_HEAD.search(layer) is not None
