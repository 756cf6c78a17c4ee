"""Models read back from a bundle, as if they were files: what a zoo is made of when its own files are gone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from eigenzoo.errors import BundleError
from eigenzoo.formats.model import LoraUpdate, Model, TensorInfo
from eigenzoo.subspace.coefficients import Coefficients
from eigenzoo.subspace.rebuilt import RebuiltModel


class RecalledModel(Model):
    """A rebuilt model behind the interface of a model on disk; the scale of its LoRA updates is in their B."""

    format = "recalled"

    def __init__(self, coefficients: Coefficients, rebuilt: RebuiltModel, path: Path) -> None:
        self._rebuilt, self._template = rebuilt, coefficients.template
        layout = self._template.layout
        self.name, self.path = coefficients.name, path
        self.tensors = {
            tensor.name: TensorInfo(tensor.name, tensor.torch_dtype, tensor.shape, file)
            for file, tensors in layout.files.items()
            for tensor in tensors
        }
        self.metadata = self._template.metadata
        self.side_files, self.ignored_files = self._template.side_files, ()
        self._updates = {module: replace(update, scale=1.0) for module, update in layout.updates.items()}
        self._held: tuple[str, Tensor] = ("", torch.empty(0))

    @property
    def updates(self) -> Mapping[str, LoraUpdate]:
        """The LoRA updates by module, at scale 1."""
        return MappingProxyType(self._updates)

    def read(self, name: str) -> Tensor:
        """Rebuild one tensor whole, in float64 where it is a layer."""
        if name in self._template.carried:
            return self._template.read_carried(name)
        if self._held[0] != name:
            self._held = (name, self._rebuilt.exact(self._layer_of(name)))
        return self._held[1]

    def read_flat(self, name: str, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Rebuild a run of one tensor; the tensor is kept until another is asked for."""
        values = self.read(name).reshape(-1)[start:stop]
        return values if out is None else out.copy_(values)

    def read_factors(self, module: str) -> tuple[Tensor, Tensor]:
        """Rebuild B and A of one update in float64."""
        return self._rebuilt.factors(module)

    def read_side_file(self, file: str) -> bytes:
        """Read one of `side_files` from the bundle."""
        return self._template.read_side_file(file)

    def weight_files(self) -> tuple[Path, ...]:
        """No file of its own."""
        return ()

    def _layer_of(self, key: str) -> str:
        """The layer that a tensor is: itself, or the factor that it holds."""
        for module, update in self._updates.items():
            if key in (update.key_a, update.key_b):
                return f"{module}.{'lora_A' if key == update.key_a else 'lora_B'}"
        if key not in self.tensors:
            raise BundleError(f"no tensor {key!r}", where=self.name)
        return key
