"""Read models back from a bundle as if they were files, for a zoo whose own files are gone.

A basis of form `stacked` that is not quantised holds the fitted models' own factors, and these models come back whole. All others
come back as they are rebuilt. A rebuilt update is a sum of many updates, so that its rank is mostly larger than the original's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from eigenzoo.errors import BundleError
from eigenzoo.formats.bundle.folder import StoredCoefficients, write_coefficients
from eigenzoo.formats.bundle.manifest import Manifest, ModelRecord
from eigenzoo.formats.model import LoraUpdate, Model, TensorInfo, part_name
from eigenzoo.formats.side_files import Beside
from eigenzoo.subspace.bases.basis import Projection
from eigenzoo.subspace.bases.stacked import StackedBasis
from eigenzoo.subspace.bundles.source_records import Relocation
from eigenzoo.subspace.bundles.storage import link_or_copy
from eigenzoo.subspace.coefficients import Coefficients, project_layers, share_of
from eigenzoo.subspace.fitting.options import recorded_options
from eigenzoo.subspace.rebuilt import RebuiltModel
from eigenzoo.subspace.stored import StoredSubspace
from eigenzoo.zoo.zoo import Zoo

SAME = 1e-4
"""Share of a layer's energy in which stored factors may differ from what the bundle states of their model: round-off of float32
products and coefficients is less, and what a refresh on rebuilt models has lost is mostly more."""


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
        self._updates = {module: self._recalled(module, update) for module, update in layout.updates.items()}
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

    def _recalled(self, module: str, update: LoraUpdate) -> LoraUpdate:
        """The update as it is rebuilt; one that the subspace does not hold as an update has the rank that it had."""
        rank = self._rebuilt.factors(module)[1].shape[0] if module in self._layer_updates else update.rank
        return replace(update, scale=1.0, rank=rank)

    def _layer_of(self, key: str) -> str:
        """Return the layer of a tensor: its own name, or the name of its factor."""
        for module, update in self._updates.items():
            if key in (update.key_a, update.key_b):
                return f"{module}.{'lora_A' if key == update.key_a else 'lora_B'}"
        if key not in self.tensors:
            raise BundleError(f"no tensor {key!r}", where=self.name)
        return key


class StoredModel(RecalledModel):
    """A model whose own factors are in the basis, by its place there."""

    format = "stored"

    def __init__(self, space: StoredSubspace, place: int) -> None:
        name = space.names[place]
        self._bases = {layer: basis for layer, basis in space.layers.items() if isinstance(basis, StackedBasis)}
        self._place = place
        super().__init__(space.coefficients(name), space.rebuild(name), space.path)

    def read_factors(self, module: str) -> tuple[Tensor, Tensor]:
        """Read B and A of one update as they were fitted, the scale not in them."""
        b_OR, a_RI, _ = self._bases[module].stored_factors(self._place)
        return b_OR, a_RI

    def _recalled(self, module: str, update: LoraUpdate) -> LoraUpdate:
        if module not in self._bases:
            return update
        _, a_RI, scale = self._bases[module].stored_factors(self._place)
        return replace(update, scale=scale, rank=a_RI.shape[0])


@dataclass(frozen=True)
class Recalled:
    """The models that a bundle recalls, in order, and the names of those that are whole."""

    models: Sequence[Model]
    whole: frozenset[str]


def recall(space: StoredSubspace) -> Recalled:
    """Read all models back from a bundle: whole where the basis has their factors, and as they are rebuilt otherwise."""
    models: dict[str, Model] = {model.name: model for model in _stored_models(space)}
    whole = frozenset(models)
    for name in space.names:
        if name not in whole:
            models[name] = RecalledModel(space.coefficients(name), space.rebuild(name), space.path)
    return Recalled([models[name] for name in space.names], whole)


def _stored_models(space: StoredSubspace) -> list[StoredModel]:
    """The models whose factors are in the basis: their projections are the coefficients and the losses that the bundle states.

    After a refresh on rebuilt models, or an import, a basis holds other factors.
    """
    bases = [basis for basis in space.layers.values() if isinstance(basis, StackedBasis)]
    # Quantised factors are near the models', and not theirs.
    if len(bases) < len(space.layers) or space.manifest.coding:
        return []
    num_stored = min(len(space.names), *(len(basis.stored_ranks()) for basis in bases))
    models = [StoredModel(space, place) for place in range(num_stored)]
    if not models:
        return []
    zoo = Zoo(models, [model.name for model in models], space.selection, None)
    projected = project_layers(space.layers, zoo)
    return [
        model
        for place, model in enumerate(models)
        if _is_stated(space.coefficients(model.name), {layer: found[place] for layer, found in projected.items()})
    ]


def _is_stated(stated: Coefficients, projected: Mapping[str, Projection]) -> bool:
    """Tell whether a model's projections are what the bundle states of it."""
    for layer, found in projected.items():
        apart = float((found.coefficients - stated.values[layer].double()).square().sum())
        residual, now = stated.residuals[layer], share_of(found.outside, found.energy)
        if apart > SAME * found.energy or not (residual == now or abs(residual - now) <= SAME):
            return False
    return True


def num_orthogonal(space: StoredSubspace) -> int:
    """Return how many models' losses add up over refreshes without the files: Σ‖X − X̂'‖² = Σ‖X − X̂‖² + Σ‖X̂ − X̂'‖².

    Those that a basis of axis `models` was fitted to, because what PCA leaves out of them is uncorrelated with their coefficients:
    Σₙ cₙ (Xₙ − X̂ₙ) = 0, and X̂ₙ − X̂'ₙ is an affine function of cₙ. Sides have no such law, and neither have models that
    were projected later, or rounded bases and coefficients, whose loss is correlated with the coefficients.
    """
    if space.axes != ("models",) or space.manifest.center not in ("models", "none"):
        return 0
    if recorded_options(space.manifest.options).rounds:
        return 0
    counts = [len(basis.stored_ranks()) for basis in space.layers.values() if isinstance(basis, StackedBasis)]
    if counts:
        return min(counts)
    if "growth" not in space.report:
        return len(space.names)
    return min((space.moments(layer).num_reference for layer in space.layers), default=0) if space.has_moments else 0


@dataclass(frozen=True)
class Restored:
    """A bundle's old records, and per layer the energies of the originals and what they have lost besides the last fit's loss."""

    models: list[ModelRecord]
    energies: Mapping[str, float]
    lost: Mapping[str, float]


def restore_records(space: StoredSubspace, manifest: Manifest, root: Path, whole: frozenset[str]) -> Restored:
    """Make a bundle in `root` that was fitted to recalled models speak of the models themselves again.

    Their records, with layouts, configs and sources, are the old ones. The residuals of those that were not recalled `whole` are
    bounds against the originals: ‖X − X̂'‖ ≤ ‖X − X̂‖ + ‖X̂ − X̂'‖, per layer.
    """
    refitted, relocation = StoredSubspace(root, manifest), Relocation(space.path, root)
    old = {model.name: model for model in space.manifest.models}
    losses = {layer: _Losses(space.manifest.discarded[layer]) for layer in space.layers}
    added_up = set(space.names[: num_orthogonal(space)])
    models = []
    for record in manifest.models:
        after = refitted.coefficients(record.name)
        energies: Mapping[str, float] = after.energies
        if record.name in old:
            source = relocation.moved(old[record.name].source)
            record = old[record.name].model_copy(update={"source": source, "coefficients": record.coefficients})
            before = space.coefficients(record.name)
            if record.name not in whole:
                energies = before.energies
                _write_bounds(refitted, record, before, after)
            for layer, outside in after.outside.items():
                if record.name in whole:
                    losses[layer].known_again(before.residuals[layer] * energies[layer])
                elif record.name not in added_up:
                    losses[layer].add(before.outside.get(layer), outside)
        for layer in space.layers:
            losses[layer].energies.append(energies.get(layer))
        models.append(record)
    needed = {file for model in models for file in _contents(model)}
    for path in list((root / "rest").iterdir()):
        if f"rest/{path.name}" not in needed:
            path.unlink()
    for file in sorted(needed):
        if not (root / file).exists():
            link_or_copy(space.path / file, root / file)
    return Restored(
        models,
        {layer: found.energy(space.report["layers"][layer]["energy"]) for layer, found in losses.items()},
        {layer: found.total for layer, found in losses.items()},
    )


class _Losses:
    """One layer's energies and losses before a refresh."""

    def __init__(self, before: float) -> None:
        self._before = before
        self._earlier, self._later = 0.0, 0.0
        self._is_known = True
        self.energies: list[float | None] = []

    def known_again(self, before: float) -> None:
        """Take off what a model had lost that is whole again."""
        self._before = max(self._before - before, 0.0)

    def add(self, earlier: float | None, later: float) -> None:
        """Add a model whose two losses are bounded, and do not add up exactly."""
        self._later += later
        if earlier is None:
            self._is_known = False
        else:
            self._earlier += earlier

    @property
    def total(self) -> float:
        """Return the earlier loss, plus the most by which both losses together can exceed their sum (Cauchy and Schwarz)."""
        earlier = self._earlier if self._is_known else self._before
        return self._before + 2 * math.sqrt(earlier * self._later)

    def energy(self, fitted: float) -> float:
        """Return the energy of all originals; without moments that of the `fitted` ones stands in the report alone."""
        known = sum(energy for energy in self.energies if energy is not None)
        return known if None not in self.energies else known + fitted


def _write_bounds(refitted: StoredSubspace, record: ModelRecord, before: Coefficients, after: Coefficients) -> None:
    """Write a model's coefficients with bounds of what it has lost, and the energies of the original where they are known."""
    bounds = []
    for layer in refitted.layers:
        # Where the originals' energy is not known, their rebuilt selves' stands for it.
        lost = share_of(after.outside[layer], before.energies.get(layer, after.energies[layer]))
        bounds.append((before.residuals[layer] ** 0.5 + lost**0.5) ** 2)
    flat = refitted.stored(record).values
    energies_L = (
        torch.tensor([before.energies[layer] for layer in refitted.layers], dtype=torch.float64)
        if before.energies
        else None
    )
    path = refitted.path / record.coefficients
    path.unlink()
    stored = StoredCoefficients(flat, torch.tensor(bounds, dtype=torch.float32), energies_L)
    manifest = refitted.manifest
    write_coefficients(path, record.name, manifest.basis_id, stored, manifest.coefficients_dtype)


def _contents(model: ModelRecord) -> Iterator[str]:
    """Yield the files in rest/ that a model's record refers to."""
    yield f"rest/{model.layout}.json"
    if model.config is not None:
        yield f"rest/{model.config}.json"
    yield from (f"rest/{content}.bin" for content in model.side_files.values())
    yield from (f"rest/{content}.safetensors" for content in model.carried.values())
