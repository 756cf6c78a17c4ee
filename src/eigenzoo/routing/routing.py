"""A router's answers for inputs, and the mixture of models that answers them together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eigenzoo.display import counted, one_line
from eigenzoo.errors import UsageError
from eigenzoo.subspace.coefficients import Coefficients, share_of
from eigenzoo.subspace.subspace import Subspace

LEAST_WEIGHT = 0.01
"""Weights below this are left out of `to_dict`."""


@dataclass(frozen=True)
class Routing:
    """The models that answer X inputs, chosen among M.

    Attributes:
        names: the M models with examples.
        models: per input the model that answers it, or None where the router abstains.
        weights: (X, M) float64, how probable each model is; each row sums to 1, abstained inputs too.
        p_values: (X,) float64, share of held-out examples that fit all models no better than the input does. Uniform or larger
            for inputs that are drawn like the examples.
        alpha: the router abstains where the p-value is at most this: for at most this share of inputs drawn like the examples.
        num_calibration: held-out examples behind the p-values.
        blend: (M,) weights that sum to 1: their average of the models' means is nearest to the mean of the answered inputs. None
            where no input is answered.
    """

    names: tuple[str, ...]
    models: tuple[str | None, ...]
    weights: Tensor
    p_values: Tensor
    alpha: float
    num_calibration: int
    blend: Tensor | None

    @property
    def num_abstained(self) -> int:
        """The number of inputs that belong to none of the models."""
        return self.models.count(None)

    def __repr__(self) -> str:
        size = f"{counted(len(self.models), 'input')}, {counted(len(self.names), 'model')}"
        return one_line(f"Routing({size}): {self.num_abstained} abstained at alpha={self.alpha:g}")

    def mixture(self, index: int | None = None) -> dict[str, float]:
        """Return weights over models that sum to 1: of one input (`weights`), or of all answered inputs together (`blend`).

        Raises UsageError if the router abstains from all inputs, or if there is no such input.
        """
        if index is None:
            if self.blend is None:
                raise UsageError(
                    f"none of {counted(len(self.models), 'input')} belongs to a model",
                    rule=f"inputs with a p-value of at most alpha={self.alpha:g} are answered by no model",
                    next_step="add a model for them, or lower alpha",
                )
            row = self.blend
        elif not -len(self.models) <= index < len(self.models):
            raise UsageError(f"there is no input {index}", rule=f"there are {counted(len(self.models), 'input')}")
        else:
            row = self.weights[index]
        return dict(zip(self.names, row.tolist(), strict=True))

    def coefficients(self, space: Subspace, index: int | None = None) -> Coefficients:
        """Return the mixture of the models as coefficients, which `space.rebuild` takes; see `mix`."""
        return mix(space, self.mixture(index))

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain JSON values; weights below 0.01 are left out."""
        inputs = [
            {
                "model": model,
                "p_value": p_value,
                "weights": {
                    name: weight for name, weight in zip(self.names, row, strict=True) if weight >= LEAST_WEIGHT
                },
            }
            for model, p_value, row in zip(self.models, self.p_values.tolist(), self.weights.tolist(), strict=True)
        ]
        counts = {name: self.models.count(name) for name in self.names}
        return {
            "num_inputs": len(self.models),
            "num_models": len(self.names),
            "num_calibration": self.num_calibration,
            "alpha": self.alpha,
            "num_abstained": self.num_abstained,
            "models": counts,
            "mixture": None if self.blend is None else self.mixture(),
            "inputs": inputs,
        }


def mix(space: Subspace, weights: Mapping[str, float]) -> Coefficients:
    """Return Σ w_m c_m, the coefficients of a weighted average of models of the bundle.

    The rebuilt mixture is the same average of the rebuilt models, to float32, because the weights sum to 1. A LoRA update is
    averaged as a product, not factor by factor. All else (heads, configs, metadata) is that of the model of the largest weight.
    `outside` is Σ w_m ‖X_m − X̂_m‖², at least that of the mixture; `energies` are averaged the same way.

    Raises UsageError unless the weights are those of models of the bundle, not negative, and sum to 1.
    """
    used = {name: weight for name, weight in weights.items() if weight != 0}
    if not used or min(used.values()) < 0 or not abs(sum(used.values()) - 1) < 1e-6:
        raise UsageError(
            f"the weights sum to {sum(weights.values()):g}", rule="weights of a mixture are positive and sum to 1"
        )
    models = {name: space.coefficients(name) for name in used}
    largest = models[max(used, key=lambda name: used[name])]

    def average(field: str, layer: str) -> Any:
        return sum(weight * getattr(models[name], field)[layer] for name, weight in used.items())

    values = {
        layer: torch.stack([weight * models[name].values[layer].double() for name, weight in used.items()])
        .sum(0)
        .float()
        for layer in largest.values
    }
    known = all(model.energies for model in models.values())
    energies = {layer: average("energies", layer) for layer in largest.values} if known else {}
    outside = {layer: average("outside", layer) for layer in largest.values} if known else {}
    if known:
        residuals = {layer: share_of(outside[layer], energies[layer]) for layer in energies}
        residual = share_of(sum(outside.values()), sum(energies.values()))
    else:
        residuals = {layer: average("residuals", layer) for layer in largest.values}
        residual = sum(weight * models[name].residual for name, weight in used.items())
    name = largest.name if len(models) == 1 else f"mixture of {len(models)} models"
    return Coefficients(name, values, residuals, residual, energies, outside, largest.template)
