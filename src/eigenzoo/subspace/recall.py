"""Read models back from a bundle as if they were files, for a zoo whose own files are gone.

A rebuilt update is a sum of many models' updates. Its rank is usually larger than the original's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from eigenzoo.errors import BundleError
from eigenzoo.formats.bundle.folder import StoredCoefficients, write_coefficients
from eigenzoo.formats.bundle.manifest import Manifest, ModelRecord
from eigenzoo.formats.model import LoraUpdate, Model, TensorInfo, part_name
from eigenzoo.formats.side_files import Beside
from eigenzoo.subspace.bundles.source_records import Relocation
from eigenzoo.subspace.bundles.storage import link_or_copy
from eigenzoo.subspace.coefficients import Coefficients, share_of
from eigenzoo.subspace.rebuilt import RebuiltModel
from eigenzoo.subspace.stored import StoredSubspace


class RecalledModel(Model):
    """A rebuilt model with the interface of a model on disk. The scale of its LoRA updates is in their B."""

    format = "recalled"

    def __init__(self, coefficients: Coefficients, rebuilt: RebuiltModel, path: Path) -> None:
        self._rebuilt, self._template = rebuilt, coefficients.template
        layout = self._template.layout
        pieces = layout.pieces
        self.name, self.path = coefficients.name, path
        self._layer_updates = frozenset(coefficients.values)
        self.tensors = {
            tensor.name: TensorInfo(tensor.name, tensor.torch_dtype, tensor.shape, file)
            for file, tensors in layout.files.items()
            for whole in tensors
            for tensor in (
                [pieces[part_name(whole.name, part)] for part, _ in layout.splits[whole.name]]
                if whole.name in layout.splits
                else [whole]
            )
        }
        self.splits, self.names = layout.splits, layout.names
        self.metadata = self._template.metadata
        self.take_beside(Beside(self._template.side_files, self._template.not_carried))
        self._updates = {
            module: replace(update, scale=1.0, rank=self._rank(module, update))
            for module, update in layout.updates.items()
        }
        self._cached: tuple[str, Tensor] = ("", torch.empty(0))

    @property
    def updates(self) -> Mapping[str, LoraUpdate]:
        """The LoRA updates by module, at scale 1."""
        return MappingProxyType(self._updates)

    def read(self, name: str) -> Tensor:
        """Rebuild one whole tensor. Layers are float64."""
        if name in self._template.carried:
            return self._template.read_carried(name)
        # Another thread may replace the cached tensor meanwhile.
        cached = self._cached
        if cached[0] != name:
            self._cached = cached = (name, self._rebuilt.exact(self._layer_of(name)))
        return cached[1]

    def read_flat(self, name: str, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Rebuild values start:stop of one tensor. The tensor stays in memory until another one is read."""
        values = self.read(name).reshape(-1)[start:stop]
        return values if out is None else out.copy_(values)

    def read_factors(self, module: str) -> tuple[Tensor, Tensor]:
        """Rebuild B and A of one update in float64."""
        return self._rebuilt.factors(module)

    def read_side_file(self, file: str) -> bytes:
        """Read one of `side_files` from the bundle."""
        return self._template.read_side_file(file)

    def weight_files(self) -> tuple[Path, ...]:
        """Return (): the model has no files."""
        return ()

    def _rank(self, module: str, update: LoraUpdate) -> int:
        """Return the rank of a rebuilt update, or its old rank if it is not an update in the subspace."""
        return self._rebuilt.factors(module)[1].shape[0] if module in self._layer_updates else update.rank

    def _layer_of(self, key: str) -> str:
        """Return the layer of a tensor: its own name, or the name of its factor."""
        for module, update in self._updates.items():
            if key in (update.key_a, update.key_b):
                return f"{module}.{'lora_A' if key == update.key_a else 'lora_B'}"
        if key not in self.tensors:
            raise BundleError(f"no tensor {key!r}", where=self.name)
        return key


def restore_records(space: StoredSubspace, manifest: Manifest, root: Path) -> list[ModelRecord]:
    """Restore the records of the original models in a bundle in `root` that was fitted to recalled models.

    Layouts, configs and sources are the old ones. Residuals are upper bounds relative to the originals, per layer: ‖X − X̂'‖ ≤ ‖X −
    X̂‖ + ‖X̂ − X̂'‖.
    """
    refitted, relocation = StoredSubspace(root, manifest), Relocation(space.path, root)
    old = {model.name: model for model in space.manifest.models}
    models = []
    for record in manifest.models:
        if record.name in old:
            source = relocation.moved(old[record.name].source)
            update = {"source": source, "coefficients": record.coefficients}
            record = old[record.name].model_copy(update=update)
            _bound_residuals(space, refitted, record)
        models.append(record)
    needed = {file for model in models for file in _contents(model)}
    for path in list((root / "rest").iterdir()):
        if f"rest/{path.name}" not in needed:
            path.unlink()
    for file in sorted(needed):
        if not (root / file).exists():
            link_or_copy(space.path / file, root / file)
    return models


def _bound_residuals(space: StoredSubspace, refitted: StoredSubspace, record: ModelRecord) -> None:
    before, after = space.coefficients(record.name), refitted.coefficients(record.name)
    bounds = []
    for layer in after.residuals:
        # Without the old moments the originals' energy is unknown, and that of the rebuilt models is used.
        energy = before.energies.get(layer, after.energies[layer])
        lost = share_of(after.outside[layer], energy)
        bounds.append((before.residuals[layer] ** 0.5 + lost**0.5) ** 2)
    flat = torch.cat([after.values[layer].reshape(-1) for layer in refitted.layers])
    bounds_L = torch.tensor(bounds, dtype=torch.float32)
    path = refitted.path / record.coefficients
    path.unlink()
    stored, manifest = StoredCoefficients(flat, bounds_L), refitted.manifest
    write_coefficients(path, record.name, manifest.basis_id, stored, manifest.coefficients_dtype)


def _contents(model: ModelRecord) -> Iterator[str]:
    """Yield the files in rest/ that a model's record refers to."""
    yield f"rest/{model.layout}.json"
    if model.config is not None:
        yield f"rest/{model.config}.json"
    yield from (f"rest/{content}.bin" for content in model.side_files.values())
    yield from (f"rest/{content}.safetensors" for content in model.carried.values())
