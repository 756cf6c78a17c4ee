"""`digits-cnn`: small convolutional networks trained from scratch, saved as bare safetensors state dicts."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call

from eigenzoo.nursery.recipe import Plan
from eigenzoo.nursery.training import Weights
from eigenzoo.passes.draws import seed_generators

# Channels that are normalised together.
GROUP_SIZE = 4


class Cnn(nn.Module):
    """Three 3 x 3 convolutions (8, 16, 16 channels) with group norms, mean over places, two classes: 3,682 weights.

    Group norms are used because batch norms mix the images of a batch and have buffers without gradients. A stride replaces
    pooling: half the time at the same accuracy.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1)
        self.norm1 = nn.GroupNorm(8 // GROUP_SIZE, 8)
        self.conv2 = nn.Conv2d(8, 16, 3, padding=1, stride=2)
        self.norm2 = nn.GroupNorm(16 // GROUP_SIZE, 16)
        self.conv3 = nn.Conv2d(16, 16, 3, padding=1)
        self.norm3 = nn.GroupNorm(16 // GROUP_SIZE, 16)
        self.head = nn.Linear(16, 2)

    def forward(self, images: Tensor) -> Tensor:
        """Images (n, 1, 8, 8) -> logits (n, 2)."""
        hidden = torch.relu(self.norm1(self.conv1(images)))
        hidden = torch.relu(self.norm2(self.conv2(hidden)))
        hidden = torch.relu(self.norm3(self.conv3(hidden)))
        logits: Tensor = self.head(hidden.mean((2, 3)))
        return logits


_HIDDEN = (("conv1", "norm1", "conv2"), ("conv2", "norm2", "conv3"), ("conv3", "norm3", "head"))
"""The layers that write, normalise and read a hidden layer's channels."""


def permute(weights: Weights, seed: int) -> Weights:
    """Permute the channels of all three hidden layers by a seed. The returned weights of the `Cnn` give the same function.

    Groups are permuted, and channels within a group. A group norm takes mean and variance over a group, so any other permutation
    would change the function. Exact up to the order of sums inside a product.
    """
    generator = torch.Generator().manual_seed(seed)
    moved = dict(weights)
    for writer, norm, reader in _HIDDEN:
        order = _draw_order(len(weights[f"{norm}.weight"]), generator)
        for name in (f"{writer}.weight", f"{writer}.bias", f"{norm}.weight", f"{norm}.bias"):
            moved[name] = moved[name].index_select(0, order)
        moved[f"{reader}.weight"] = moved[f"{reader}.weight"].index_select(1, order)
    return moved


def _draw_order(num_channels: int, generator: torch.Generator) -> Tensor:
    """Draw an order of the channels that keeps each group together."""
    groups = torch.arange(num_channels).view(-1, GROUP_SIZE)
    shuffled = groups[torch.randperm(len(groups), generator=generator)]
    return torch.cat([group[torch.randperm(GROUP_SIZE, generator=generator)] for group in shuffled])


class CnnKind:
    """Starts, runs and saves the models of a `digits-cnn` zoo."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._net = Cnn()

    def forward(self, weights: Weights, images: Tensor) -> Tensor:
        """Return one model's logits."""
        logits: Tensor = functional_call(self._net, weights, (images,))
        return logits

    def start(self, seed: int) -> Weights:
        """Return torch's default initialisation, from the model's own seed or from the zoo's if all models share one."""
        seed_generators(seed if self._plan.own_init else self._plan.seed)
        return {name: weight.detach() for name, weight in Cnn().named_parameters()}

    def save(self, weights: Weights, folder: Path, name: str) -> Path:
        """Write one model as `<name>.safetensors` and return the file."""
        path = folder / f"{name}.safetensors"
        save_file(weights, path, metadata={"format": "pt"})
        return path
