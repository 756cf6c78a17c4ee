"""`digits-vit`: fine-tunes of one tiny vision transformer, saved as transformers checkpoints.

The parent (17,954 weights with its head) is trained on all ten digits. Then its ten-class head is replaced by one random two-class
head that all models share. That head is frozen by default, since a trained head hides the effect of the other weights: a linear
probe on the unchanged parent reaches 95 %.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from transformers import ViTConfig, ViTForImageClassification

from eigenzoo.nursery import digits
from eigenzoo.nursery.recipe import Plan
from eigenzoo.nursery.training import Weights, predict, share, train
from eigenzoo.passes.draws import seed_generators
from eigenzoo.passes.process import quietly

HEAD_SCALE = 0.3
_HEAD = "classifier."


class VitKind:
    """Starts, runs and saves the models of a `digits-vit` zoo."""

    def __init__(self, plan: Plan, parent: Any) -> None:
        self.model: Any = parent.eval()
        self._trained = [name for name, _ in parent.named_parameters() if plan.train_head or not name.startswith(_HEAD)]

    def forward(self, weights: Weights, images: Tensor) -> Tensor:
        """Return one model's logits. Weights that `weights` lacks are the parent's."""
        return run(self.model, weights, images)

    def start(self, seed: int) -> Weights:
        """Return the initial weights: those of the parent for every seed."""
        weights = dict(self.model.named_parameters())
        return {name: weights[name].detach() for name in self._trained}

    def save(self, weights: Weights, folder: Path, name: str) -> Path:
        """Write one checkpoint with transformers and return its weight file."""
        child = copy.deepcopy(self.model)
        child.load_state_dict(weights, strict=False)
        return save_checkpoint(child, folder / name)


def run(model: torch.nn.Module, weights: Weights, images: Tensor) -> Tensor:
    """Return the logits of a transformers classifier with these weights instead of its own."""
    logits: Tensor = functional_call(model, weights, (images,)).logits
    return logits


def save_checkpoint(model: Any, folder: Path) -> Path:
    """Write the model with transformers and return its weight file."""
    with quietly():
        model.save_pretrained(folder)
    return folder / "model.safetensors"


def build(num_labels: int, seed: int) -> Any:
    """Return a newly initialised tiny `ViTForImageClassification`. Seeds and uses torch's global random state."""
    settings: dict[str, Any] = {
        "image_size": 8,
        "patch_size": 2,
        "num_channels": 1,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "num_labels": num_labels,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        # vmap splits the fused attention, which takes twice the time of the plain one.
        "attn_implementation": "eager",
    }
    seed_generators(seed)
    model: Any = ViTForImageClassification(ViTConfig(**settings))
    return model.eval()


def pretrain(plan: Plan, tick: Callable[[int], None] | None = None) -> tuple[Any, float]:
    """Train a parent on the ten digits and give it the shared random two-class head.

    Also returns its ten-class test accuracy with its own head.
    """
    if plan.pretraining is None:
        raise ValueError("a plan without pretraining has no parent")
    data, learner = digits.load(), build(10, plan.seed)
    start = {name: tensor.detach().unsqueeze(0) for name, tensor in learner.named_parameters()}

    def forward(weights: Weights, images: Tensor) -> Tensor:
        return run(learner, weights, images)

    weights = train(forward, start, data.train_images, data.train_digits[None], plan.pretraining, [plan.seed], tick)
    correct = share(predict(forward, weights, data.test_images)[0], data.test_digits)
    parent = build(2, plan.seed)
    body = {name: tensor[0] for name, tensor in weights.items() if not name.startswith(_HEAD)}
    head = torch.empty_like(parent.classifier.weight)
    head.normal_(std=HEAD_SCALE, generator=torch.Generator().manual_seed(plan.seed))
    parent.load_state_dict({**body, _HEAD + "weight": head, _HEAD + "bias": torch.zeros(2)})
    return parent, correct
