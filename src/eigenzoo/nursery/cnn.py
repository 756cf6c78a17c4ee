"""`digits-cnn`: small convolutional networks trained from scratch, saved as bare safetensors state dicts."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call

from eigenzoo.nursery.recipe import Plan
from eigenzoo.nursery.training import Weights


class Cnn(nn.Module):
    """Three 3 x 3 convolutions (8, 16, 16 channels) with group norms, mean over places, two classes: 3,682 weights.

    Group norms, because batch norms mix the images of a batch and carry buffers that no gradient reaches. The stride
    stands where pooling would: half the time at the same accuracy.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1)
        self.norm1 = nn.GroupNorm(2, 8)
        self.conv2 = nn.Conv2d(8, 16, 3, padding=1, stride=2)
        self.norm2 = nn.GroupNorm(4, 16)
        self.conv3 = nn.Conv2d(16, 16, 3, padding=1)
        self.norm3 = nn.GroupNorm(4, 16)
        self.head = nn.Linear(16, 2)

    def forward(self, images: Tensor) -> Tensor:
        """Images (n, 1, 8, 8) -> logits (n, 2)."""
        hidden = torch.relu(self.norm1(self.conv1(images)))
        hidden = torch.relu(self.norm2(self.conv2(hidden)))
        hidden = torch.relu(self.norm3(self.conv3(hidden)))
        logits: Tensor = self.head(hidden.mean((2, 3)))
        return logits


class CnnKind:
    """All models of one `digits-cnn` zoo: how they start, run and are saved."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._net = Cnn()

    def forward(self, weights: Weights, images: Tensor) -> Tensor:
        """Return one model's logits."""
        logits: Tensor = functional_call(self._net, weights, (images,))
        return logits

    def start(self, seed: int) -> Weights:
        """Return torch's default initialisation from the model's own seed, or from the zoo's where all share one."""
        torch.manual_seed(seed if self._plan.own_init else self._plan.seed)
        return {name: weight.detach() for name, weight in Cnn().named_parameters()}

    def save(self, weights: Weights, folder: Path, name: str) -> Path:
        """Write one model as `<name>.safetensors`; return that file."""
        path = folder / f"{name}.safetensors"
        save_file(weights, path, metadata={"format": "pt"})
        return path
