"""What a model has besides its layers in the subspace: heads, biases, excluded weights, updates of excluded modules."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from math import prod

from torch import Tensor

from eigenzoo.errors import UnsupportedError
from eigenzoo.formats.bundle.contents import Template

LORA_BIAS = ".lora_B.bias"
UNUSED = "num_batches_tracked"
"""A counter of training, which no output depends on."""


@dataclass(frozen=True)
class CarriedUpdate:
    """A LoRA update of a module that the subspace does not have: B (O, R) with its scale, and A (R, I)."""

    module: str
    b_OR: Tensor
    a_RI: Tensor


def carried_updates(layers: Collection[str], template: Template) -> Iterator[CarriedUpdate]:
    """Yield a model's LoRA updates that no layer holds."""
    for name, update in template.layout.updates.items():
        if name in layers or update.key_a not in template.carried:
            continue
        b, a = template.read_carried(update.key_b), template.read_carried(update.key_a)
        if b.ndim > 2 and prod(b.shape[2:]) != 1:
            raise UnsupportedError(
                "an excluded update has a B with a kernel",
                where=f"module '{update.module}'",
                rule="B is a matrix, or a convolution of size 1",
                next_step="fit the zoo with this module",
            )
        yield CarriedUpdate(name, b.flatten(1), a.flatten(1))


def carried_tensors(template: Template) -> dict[str, Tensor]:
    """Return all other tensors of a model that no layer holds, by their names in its files."""
    factors = {key for update in template.layout.updates.values() for key in update.keys}
    return {
        name: template.read_carried(name)
        for name in template.carried
        if name not in factors and not name.endswith(UNUSED)
    }


def own_tensors(layers: Collection[str], template: Template) -> dict[str, Tensor]:
    """Return what a model has besides its layers, by name; factors of excluded updates as `<module>.a` and `<module>.b`."""
    tensors = carried_tensors(template)
    for update in carried_updates(layers, template):
        tensors |= {f"{update.module}.a": update.a_RI, f"{update.module}.b": update.b_OR}
    return tensors
