"""One weight of a module as coefficients make it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from eigenzoo.adapt.maps import Map
from eigenzoo.adapt.trained import Coefficients, without_autocast


class AdaptedWeight(nn.Module):
    """The parametrization of one weight: W = (W₀ or nothing) + (M or nothing) + L(c).

    A running variance is kept above zero, as in rebuilt models. Buffers, which a batch norm has its statistics in, follow their
    coefficients, but give them no gradient: torch knows none.

    Attributes:
        layer, trained: the map L, and c.
        besides: what the same attach trains besides, which no other attach may freeze.
    """

    def __init__(
        self,
        layer: Map,
        trained: Coefficients,
        besides: tuple[nn.Parameter, ...],
        *,
        mean: bool,
        on_top: bool,
        above_zero: bool = False,
    ) -> None:
        super().__init__()
        self.layer, self.trained, self.besides, self._mean, self._on_top = layer, trained, besides, mean, on_top
        self._above_zero = above_zero

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight that the module computes with, in the dtype of the one that is there."""
        with without_autocast(weight.device):
            matrix = self.layer.matrix(self.trained().to(self.layer.dtype))
            if self._mean:
                matrix = matrix + self.layer.mean()
        made = matrix.reshape(weight.shape)
        made = weight + made if self._on_top else made
        if self._above_zero:
            made = made.clamp_min(torch.finfo(torch.float32).tiny)
        return (made if isinstance(weight, nn.Parameter) else made.detach()).to(weight.dtype)
