"""Read a fitted zoo from its folder: bases, coefficients and moments. Project models and rebuild them."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor

from eigenzoo.errors import BundleError, DataError, EigenzooError, MismatchError, UsageError
from eigenzoo.formats.bundle.contents import StoredTemplate
from eigenzoo.formats.bundle.folder import (
    MOMENTS,
    StoredCoefficients,
    file_sha256,
    file_sizes,
    open_basis,
    read_coefficients,
)
from eigenzoo.formats.bundle.manifest import FileRecord, Manifest, ModelRecord
from eigenzoo.formats.bundle.snapshot import Snapshot
from eigenzoo.formats.lora.zero_updates import ZooModule, modules_of
from eigenzoo.formats.model import Model
from eigenzoo.formats.opening import open_model
from eigenzoo.formats.paths import did_you_mean
from eigenzoo.formats.remote import is_url
from eigenzoo.formats.safetensors.file import SafetensorsFile
from eigenzoo.formats.splitting import split_model
from eigenzoo.passes.settings import own_settings
from eigenzoo.records import Progress, no_progress
from eigenzoo.subspace.bases.basis import LayerBasis, StoredAs
from eigenzoo.subspace.bundles.source_records import is_at_hand, source_path
from eigenzoo.subspace.bundles.storage import num_models_stored, read_basis, read_moments, split_coefficients
from eigenzoo.subspace.coefficients import Coefficients, outside_of, project_layers, share_of, with_templates
from eigenzoo.subspace.moments.border import extended_inside
from eigenzoo.subspace.moments.layer_moments import LayerMoments
from eigenzoo.subspace.rebuilt import MaxRank, OwnRanks, RebuiltModel, check_layout
from eigenzoo.weights.renames import nearest
from eigenzoo.zoo.matching import Selection
from eigenzoo.zoo.sources import Source
from eigenzoo.zoo.zoo import OpenedModels, Zoo, open_models

T = TypeVar("T")


class StoredSubspace:
    """A subspace in its folder, read on demand. The public class `Subspace` adds the methods that write new folders."""

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        *,
        base: Model | None = None,
        keep: tempfile.TemporaryDirectory[str] | None = None,
        checksums: Mapping[str, FileRecord] | None = None,
        snapshot: Snapshot | None = None,
    ) -> None:
        self.path, self.manifest, self.snapshot = path, manifest, snapshot
        self.checksums = manifest.files if checksums is None else checksums
        self._base = None if base is None else split_model(base, self.manifest.split)
        self._keep = keep
        if keep is not None:
            weakref.finalize(self, keep.cleanup)

    def __repr__(self) -> str:
        return f"Subspace({len(self.names)} models, {len(self.layers)} layers, view={self.view!r}, axes={self.axes})"

    @property
    def view(self) -> str:
        """How a layer becomes a matrix."""
        return self.manifest.view

    @property
    def axes(self) -> tuple[str, ...]:
        """The truncated axes."""
        return tuple(self.manifest.axes)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the models with stored coefficients."""
        return tuple(model.name for model in self.manifest.models)

    @property
    def report(self) -> dict[str, Any]:
        """Report of the fit, as plain JSON values.

        `layers.<name>` has `rank` and its `reason` by axis, and `energy` Σ‖X‖² and `variance` Σ‖X − mean‖² of all models. Shares
        of the variance in the kept directions: `captured` (in-sample, of all models), `heldout` (of models left out of five folds)
        and `null` (in-sample, of unrelated models with the same norms; for axis `models` only). Shares of the energy:
        `mean_energy` (in the mean) and `residual` (lost by the rebuilt models). In `Evidence.to_dict()`, `captured` is the share
        of held-out models.
        """
        return self.manifest.report

    @cached_property
    @own_settings()
    def layers(self) -> Mapping[str, LayerBasis]:
        """Every layer's basis by name."""
        files, stored = open_basis(self.path), StoredAs(self.manifest.coding, self.manifest.coefficients_dtype)
        return MappingProxyType(
            {record.name: read_basis(record, self.manifest.center, files, stored) for record in self.manifest.layers}
        )

    @cached_property
    def _records(self) -> Mapping[str, ModelRecord]:
        return {model.name: model for model in self.manifest.models}

    @own_settings()
    def coefficients(self, name: str) -> Coefficients:
        """Return the stored coefficients of a model. Its file is compared with its checksum."""
        record = self._record(name)
        stored = self.stored(record)
        recorded = self.manifest.files.get(record.coefficients)
        if (
            recorded is not None
            and self._current(lambda: file_sha256(self.path / record.coefficients)) != recorded.sha256
        ):
            what = f"{record.coefficients}: the checksum differs from the manifest's"
            raise BundleError(what, where=str(self.path), next_step="run verify, and copy the bundle again, whole")
        residuals = dict(zip(self.layers, stored.residuals_L.tolist(), strict=True))
        values, energies = split_coefficients(stored.values, self.layers), self._energies(name, stored)
        outside = {
            layer: outside_of(self.layers[layer], values[layer], residuals[layer], energy)
            for layer, energy in energies.items()
        }
        residual = share_of(sum(outside.values()), sum(energies.values())) if energies else fmean(residuals.values())
        return Coefficients(name, values, residuals, residual, energies, outside, self.template(name))

    def template(self, name: str) -> StoredTemplate:
        """Return the template that makes a stored model's coefficients a complete model."""
        record = self._record(name)
        return StoredTemplate(
            self.path,
            layout=record.layout,
            config=record.config,
            metadata=record.metadata,
            side_files=record.side_files,
            carried=record.carried,
            not_carried=record.not_carried,
            source=record.source,
        )

    @cached_property
    @own_settings()
    def all_coefficients(self) -> Mapping[str, Tensor]:
        """Every stored model's coefficients (N, …) by layer, read once."""
        return split_coefficients(torch.stack([stored.values for stored in self.all_stored]), self.layers)

    @cached_property
    @own_settings()
    def all_stored(self) -> Sequence[StoredCoefficients]:
        """Every model's coefficients file, read once."""
        return [self.stored(record) for record in self.manifest.models]

    def stored(self, record: ModelRecord) -> StoredCoefficients:
        """Read a model's coefficients file and check it against the layers."""
        basis, sizes = self.manifest.basis_id, (self._num_coefficients, len(self.layers))
        dtype = self.manifest.coefficients_dtype
        return self._current(
            lambda: read_coefficients(self.path, record.coefficients, record.name, basis, *sizes, dtype)
        )

    @cached_property
    def _num_coefficients(self) -> int:
        return sum(basis.num_coefficients for basis in self.layers.values())

    def _energies(self, name: str, stored: StoredCoefficients) -> dict[str, float]:
        """Return the energy of each layer of a stored model; empty if neither its file nor the moments contain it."""
        if stored.energies_L is not None:
            return dict(zip(self.layers, stored.energies_L.tolist(), strict=True))
        if not self.has_moments:
            return {}
        index = self.names.index(name)
        return {layer: float(energies_N[index]) for layer, energies_N in self._all_energies.items()}

    @cached_property
    def _all_energies(self) -> Mapping[str, Tensor]:
        """‖X_n‖² of every layer's models, read once."""
        return {layer: self.moments(layer).energies_N for layer in self.layers}

    @property
    def has_moments(self) -> bool:
        """Whether the models' Grams are stored."""
        return (self.path / MOMENTS).is_file()

    @own_settings()
    def moments(self, layer: str) -> LayerMoments:
        """Return a layer's moments. Raises BundleError if the bundle was saved without them."""
        if not self.has_moments:
            raise BundleError(
                "the bundle has no moments", where=str(self.path), next_step="fit the zoo again, or work without them"
            )
        basis = self.layers[layer]
        num_stored = min(num_models_stored(self._moments_file, basis.layer), len(self.names))
        moments = read_moments(self._moments_file, basis.layer, num_stored)
        if num_stored < len(self.names):
            moments = self._extended(layer, moments)
        return moments if moments.shift_N is None else replace(moments, removed=basis.removed())

    def _extended(self, layer: str, moments: LayerMoments) -> LayerMoments:
        """Extend moments to the models that were added without them, from their coefficients."""
        added, index = self.all_stored[moments.num_models :], list(self.layers).index(layer)
        unknown = [
            record.name
            for record, stored in zip(self.manifest.models[moments.num_models :], added, strict=True)
            if stored.energies_L is None
        ]
        if unknown:
            raise BundleError(
                f"neither the moments nor its own file tell the energies of {unknown[0]!r}",
                where=str(self.path),
                rule="see docs/bundle-format.md",
            )
        energies_M = torch.stack([stored.energies_L for stored in added if stored.energies_L is not None])[:, index]
        residuals_M = torch.stack([stored.residuals_L for stored in added])[:, index].tolist()
        values = self.all_coefficients[layer]
        models = zip(values[moments.num_models :], residuals_M, energies_M.tolist(), strict=True)
        outside = [outside_of(self.layers[layer], *model) for model in models]
        outside_M = torch.tensor(outside, dtype=torch.float64)
        return extended_inside(moments, values.flatten(1), energies_M, outside_M)

    @cached_property
    def _moments_file(self) -> SafetensorsFile:
        return self._current(lambda: SafetensorsFile(self.path / MOMENTS, self.path))

    @property
    def base(self) -> Model | None:
        """The base of view `delta`: the given one, else the one in the manifest. Raises BundleError if it is gone."""
        if self._base is None and self.manifest.base is not None:
            path = source_path(self.manifest.base, self.path)
            if path is None or not path.exists():
                where = self.manifest.base.path if is_url(self.manifest.base.path) else str(path)
                raise BundleError(
                    "the base is not at hand",
                    where=where,
                    rule="view 'delta' adds its layers to the base",
                    next_step="name the base with base=… or --base",
                )
            self._base = split_model(open_model(path), self.manifest.split)
            self.check_base(self._base)
        return self._base

    def require_base(self) -> Model:
        """Return the base. Raises BundleError for a bundle without one."""
        if self.base is None:
            raise BundleError("the bundle names no base")
        return self.base

    def check_base(self, base: Model) -> None:
        """Raise BundleError unless this is the base that was subtracted."""
        record = self.manifest.base
        if record is None or not is_at_hand(record.model_copy(update={"path": str(base.path.absolute())}), self.path):
            raise BundleError("is not the base that was subtracted: its weights differ", where=str(base.path))

    @cached_property
    def selection(self) -> Selection:
        """Selects exactly this subspace's layers of a model, with the zoo's splits and missing modules."""
        modules: list[ZooModule] = []
        if self.manifest.missing == "zero":
            layouts = [self.template(name).layout for name in self._named_layouts.values()]
            modules = [module for layout in layouts for module in modules_of(layout.format, layout.updates.values())]
        return Selection(
            self.view,
            only=frozenset(self.layers),
            split=self.manifest.split,
            missing=self.manifest.missing,
            modules=tuple({(module.family, module.update.module): module for module in modules}.values()),
        )

    @own_settings()
    def open(self, source: Source | Zoo, *, allow_pickle: bool = False) -> Zoo:
        """Open models under this subspace's view. Raises MismatchError unless they have its layers in the same shapes.

        Everything else in the models is carried unchanged.
        """
        base = self.base if self.view == "delta" else None
        opened = source if isinstance(source, Zoo) else open_models(source, allow_pickle=allow_pickle)
        if base is not None and isinstance(opened, Zoo) and opened.base is not None:
            self.check_base(opened.base)
        _check_kinds(opened, self.view)
        zoo = Zoo(opened.models, opened.names, self.selection, base, opened.skipped)
        zoo.require({name: basis.layer for name, basis in self.layers.items()}, "the subspace")
        return zoo

    @own_settings()
    def project(self, source: Source | Zoo, *, progress: Progress = no_progress) -> Coefficients:
        """Project one model onto the subspace, whether it was in the fit or not.

        With axis `models` the coefficients of a layer are c = V(x − mean), with V its directions (K, D) and x the model (D). With
        axes `outputs` and `inputs` they are the core Uᵀ(X − mean)W (P, Q), with bases U (O, P) and W (I, Q). The residual is the
        share of the model's energy ‖X‖² (center included) outside the subspace. Cost: one read of the model and two of the basis.
        """
        zoo = self.open(source)
        if len(zoo) != 1:
            raise UsageError(f"{len(zoo)} models are named", rule="project takes one", next_step="use project_many")
        return self._projected(zoo, progress)[zoo.names[0]]

    @own_settings()
    def project_many(self, source: Source | Zoo, *, progress: Progress = no_progress) -> dict[str, Coefficients]:
        """Project every model of a source onto the subspace, layer by layer. Return coefficients by model name.

        Cost: one read of each model, and two of the basis for all models together.
        """
        return self._projected(self.open(source), progress)

    def _projected(self, zoo: Zoo, progress: Progress) -> dict[str, Coefficients]:
        return with_templates(zoo, project_layers(self.layers, zoo, progress))

    @own_settings()
    def rebuild(
        self,
        model: Coefficients | str,
        *,
        mean_only: bool = False,
        fetch: bool = False,
        max_lora_rank: MaxRank = None,
    ) -> RebuiltModel:
        """Rebuild a model from its coefficients or by name.

        `mean_only` returns the zoo's mean instead, as a control. `fetch` reads excluded tensors from the model's URL.
        `max_lora_rank` truncates each update of an adapter, also of excluded modules, to its best approximation of at most that
        rank. "full" writes the whole rank. Default: `RebuiltModel.layer` and `factors` have the whole rank, and `RebuiltModel.save`
        writes each update at the largest rank that the zoo has there. For a projected model this loses no more than lies outside
        the subspace. Coefficients of which it loses more, and the mean, are written at the whole rank. `RebuiltModel.ranks` has
        ranks and loss.
        """
        coefficients = self.coefficients(model) if isinstance(model, str) else model
        values = dict(coefficients.values)
        if set(values) != set(self.layers):
            raise UsageError("the coefficients are of another subspace", where=coefficients.name)
        check_layout(self.layers, coefficients.template.layout, coefficients.name)
        for name, basis in self.layers.items():
            if tuple(values[name].shape) != basis.coefficient_shape:
                raise UsageError(
                    f"coefficients of shape {list(values[name].shape)}",
                    where=f"layer '{name}' of {coefficients.name}",
                    rule=f"this subspace has {list(basis.coefficient_shape)}",
                )
            if not bool(torch.isfinite(values[name]).all()):
                raise DataError("coefficients are NaN or Inf", where=f"layer '{name}' of {coefficients.name}")
            if mean_only:
                values[name] = torch.zeros_like(values[name])
        return RebuiltModel(
            coefficients.name,
            self.layers,
            values,
            coefficients.template,
            self.view,
            self.require_base,
            fetch,
            max_lora_rank,
            None if mean_only else self._own_ranks(coefficients),
        )

    def _own_ranks(self, coefficients: Coefficients) -> OwnRanks | None:
        """Return the ranks at which a projected adapter is written, or None for full weights and for other coefficients."""
        if self.view != "update" or not coefficients.residuals:
            return None
        return OwnRanks(self.largest_ranks, coefficients.outside, coefficients.residuals)

    @cached_property
    def largest_ranks(self) -> Mapping[str, int]:
        """The largest rank that the zoo's models have in each layer of updates."""
        updates = [self.template(name).layout.updates for name in self._named_layouts.values()]
        return {layer: max(update[layer].rank for update in updates) for layer in self.layers}

    @property
    def _named_layouts(self) -> Mapping[str, str]:
        """One model of each layout."""
        return {record.layout: record.name for record in self.manifest.models}

    @own_settings()
    def check_current(self) -> None:
        """Raise BundleError if another process has replaced the bundle."""
        if self.snapshot is not None and self.snapshot.path == self.path:
            self.snapshot.check()

    def _current(self, read: Callable[[], T]) -> T:
        """Read from the folder. The value or the error counts only if the folder still contains this subspace."""
        try:
            value = read()
        except EigenzooError:
            self.check_current()
            raise
        self.check_current()
        return value

    def files(self) -> list[str]:
        """Return every file except the manifest and the card, relative to the folder."""
        there = file_sizes(self.path)
        if self.manifest.files:
            return [file for file in self.manifest.files if file in there or (self.path / file).exists()]
        return list(there)

    def _record(self, name: str) -> ModelRecord:
        if name not in self._records:
            near = nearest(name, self.names, cutoff=0.6)
            there = (
                f"the bundle has {len(self.names)}: {', '.join(self.names[:5])}{', …' if len(self.names) > 5 else ''}"
            )
            meant = f"did you mean {near!r}?" if near else ""
            what = f"no model is called {name!r}"
            if "/" in name:
                what, meant = f"{what}, and there is no such file or folder", did_you_mean(name) or meant
            raise UsageError(what, where=str(self.path), rule=there, next_step=meant)
        return self._records[name]


def _check_kinds(opened: Zoo | OpenedModels, view: str) -> None:
    """Raise MismatchError for full weights in a subspace of adapters, and for adapters in one of full weights."""
    needed, other = (
        ("LoRA adapters", "full weights") if view in ("update", "factors") else ("full weights", "LoRA adapters")
    )
    for model, name in zip(opened.models, opened.names, strict=True):
        if bool(model.updates) != (needed == "LoRA adapters"):
            raise MismatchError(
                f"these are {other}",
                where=name,
                rule=f"the subspace is one of {needed}",
                next_step=f"name {needed} of its zoo's base",
            )
