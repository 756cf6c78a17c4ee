"""Rebuild a model: layers from the subspace, all other contents from its template, saved in the zoo's format."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from eigenzoo.display import counted, one_line
from eigenzoo.errors import BundleError, DataError, EigenzooError, RankError, UsageError
from eigenzoo.formats.adapter_writer import OTHER_FORMATS, other_tensors, write_adapter
from eigenzoo.formats.bundle.contents import Template
from eigenzoo.formats.layout import ModelLayout
from eigenzoo.formats.model import Model, part_name
from eigenzoo.formats.output.own import recorded, write_record
from eigenzoo.formats.output.whole import new_folder
from eigenzoo.formats.remote.address import shown_url
from eigenzoo.formats.side_files import weights_among
from eigenzoo.formats.writers import cast_to, write_checkpoint
from eigenzoo.linalg import lora
from eigenzoo.linalg.lora import Cut, Factors
from eigenzoo.passes.settings import own_settings
from eigenzoo.passes.workers import Workers, local_workers
from eigenzoo.records import Progress, UpdateRank, UpdateRanks, no_progress
from eigenzoo.subspace.bases.basis import LayerBasis
from eigenzoo.weights.roles import VARIANCE

MODEL = "model"
"""Kind of output in a saved model's record; see `formats.output.own`."""

FULL: Literal["full"] = "full"
"""As `max_lora_rank`: write every update at its whole rank."""

MaxRank = int | Literal["full"] | None

FLOAT32 = 1e-9
"""Share of an update's energy that float32 coefficients and bases may change: thousands of eps², for sums of many directions."""


@dataclass(frozen=True)
class OwnRanks:
    """The ranks that a projected adapter is written at unless a rank is asked for.

    The original X has at most these ranks, so that the best approximation of X̂ of such a rank is not farther from X̂ than X is
    (Eckart and Young 1936): the cut loses no more than the projection. Coefficients that were changed since have no such bound.

    Attributes:
        ranks: of each layer, the largest rank of the zoo's updates.
        outside: of each layer ‖X − X̂‖²; nothing where energies are not known.
        residuals: of each layer ‖X − X̂‖² / ‖X‖².
    """

    ranks: Mapping[str, int]
    outside: Mapping[str, float]
    residuals: Mapping[str, float]

    def allows(self, cuts: Mapping[str, Cut]) -> bool:
        """Tell whether cuts to these ranks lose no more than the projection, but for round-off."""
        lost, energy = sum(cut.lost for cut in cuts.values()), sum(cut.energy for cut in cuts.values())
        return lost <= sum(self._outside(name, cut) for name, cut in cuts.items()) + FLOAT32 * energy

    def _outside(self, name: str, cut: Cut) -> float:
        if self.outside:
            return self.outside[name]
        # ‖X̂‖ ≥ ‖X‖ − ‖X − X̂‖ bounds the energy that the share is one of.
        root = self.residuals[name] ** 0.5
        return inf if root >= 1 else (root / (1 - root)) ** 2 * cut.energy


class RebuiltModel:
    """A model rebuilt from coefficients. Its values are computed on demand.

    Attributes:
        name: the model's name.
    """

    def __init__(
        self,
        name: str,
        layers: Mapping[str, LayerBasis],
        values: Mapping[str, Tensor],
        template: Template,
        view: str,
        base: Callable[[], Model],
        fetch: bool = False,
        max_lora_rank: MaxRank = None,
        own: OwnRanks | None = None,
    ) -> None:
        if max_lora_rank not in (None, FULL):
            _check_max_rank(max_lora_rank, template.layout, name)
        self.name, self._fetch = name, fetch
        self._max_rank = max_lora_rank if isinstance(max_lora_rank, int) else None
        self._own = own if max_lora_rank is None else None
        self._ranks: UpdateRanks | None = None
        self._layers, self._values, self._template = layers, values, template
        self._view, self._base = view, base

    def __repr__(self) -> str:
        kind = f"format={self._template.layout.format!r}, view={self._view!r}"
        return one_line(f"RebuiltModel({self.name!r}, {counted(len(self._layers), 'layer')}, {kind})")

    @property
    def not_carried(self) -> tuple[str, ...]:
        """Files beside the original's weights that are not written. If there are many, the first are listed, weights before
        others.
        """
        return self._template.not_carried

    @property
    def left_weights(self) -> tuple[str, ...]:
        """Those of `not_carried` that contain weights which the original's own files do not."""
        template = self._template
        return weights_among(template.not_carried, (*template.layout.files, *template.side_files))

    @own_settings()
    def layer(self, name: str) -> Tensor:
        """Return one rebuilt layer as a tensor of its shape in the files, float64; a LoRA update as the product B·A."""
        if self._layers[name].layer.kind == "update":
            b_OR, a_RI = self.factors(name)
            return b_OR @ a_RI
        return self._rebuild(name).reshape(self._layers[name].layer.tensor_shape)

    @own_settings()
    def factors(self, name: str) -> Factors:
        """Return one rebuilt LoRA update as (B, A) in float64, with the scale in B.

        It has its whole rank unless `max_lora_rank` is a number.
        """
        return self._cut(name, self._max_rank).factors

    def ranks(self) -> UpdateRanks | None:
        """Return the rank of each update of a rebuilt adapter as `save` writes it, beside the original's, and what a cut loses.

        None for a model of full weights. An adapter that was not saved before is rebuilt for it.
        """
        if self._template.layout.updates and self._ranks is None:
            with local_workers() as workers:
                self._written(workers, no_progress)
        return self._ranks

    @own_settings()
    def _cut(self, name: str, max_rank: int | None) -> Cut:
        try:
            return self._rebuild_update(name, max_rank)
        except DataError as error:
            raise error.at(f"layer '{name}' of {self.name}") from None

    def _rebuild_update(self, name: str, max_rank: int | None) -> Cut:
        return self._layers[name].rebuild_update(self._values[name], max_rank)

    def _rebuild(self, name: str) -> Tensor:
        rebuilt = self._layers[name].rebuild(self._values[name])
        assert not isinstance(rebuilt, tuple)
        return rebuilt

    @own_settings()
    def save(
        self,
        folder: str | os.PathLike[str],
        *,
        force: bool = False,
        format: str | None = None,
        progress: Progress = no_progress,
    ) -> Path:
        """Write the model in its zoo's format into a new folder and return the folder. It appears complete or not at all.

        A checkpoint has the shards, names and dtypes of the original. A PEFT adapter has α = r and one rank. A LoRA of a diffusion
        model has its keys and α, a rank for each layer, and diffusers' file name. A bare state dict keeps its file name. `force`
        replaces a folder that contains only a rebuilt model, unchanged. `format` chooses other keys: `diffusers` or `kohya` for
        LoRAs of diffusion models, `mlx-lm` for PEFT's adapters. Layers are rebuilt on one thread per core, a few ahead of the
        writer. Updates have at most the rank `max_lora_rank` of `Subspace.rebuild`, which explains the default.
        """
        target = Path(folder)
        kind = self._template.layout.format
        if format is not None and format not in OTHER_FORMATS.get(kind, ()):
            raise UsageError(
                f"format {format[:40]!r} for a {kind}",
                where=self.name,
                rule="LoRAs of diffusion models are written as diffusers or kohya too, PEFT's adapters as mlx-lm",
                next_step="leave it out",
            )
        with new_folder(target, force=force, foreign=recorded(MODEL)) as staging, local_workers() as workers:
            if self._template.layout.updates:
                self._save_adapter(staging, format, workers, progress)
            else:
                self._save_weights(staging, workers, progress)
            write_record(staging, MODEL)
        return target

    def _save_weights(self, folder: Path, workers: Workers, progress: Progress) -> None:
        template = self._template
        if self._view == "delta":
            self._base()  # opened once, before threads use it
        sizes = {name: tensor.nbytes for name, tensor in template.layout.tensors.items()}

        def run(read: Callable[[str], Tensor], names: Sequence[str]) -> Iterator[Tensor]:
            for _, values in workers.each("rebuilding tensors", read, names, progress, weight=sizes.__getitem__):
                yield values

        write_checkpoint(
            folder,
            template.layout,
            self._read,
            metadata=template.metadata,
            side_files={name: template.read_side_file(name) for name in template.side_files},
            run=run,
        )

    def _read(self, name: str) -> Tensor:
        """Read one tensor of the rebuilt checkpoint in the dtype of its layout. A fused tensor is joined from its parts."""
        layout = self._template.layout
        if name in layout.splits:
            return torch.cat([self._read_piece(part_name(name, part), layout) for part, _ in layout.splits[name]])
        return self._read_piece(name, layout)

    def _read_piece(self, name: str, layout: ModelLayout) -> Tensor:
        if name not in self._layers:
            return self._carried(name)
        return cast_to(layout.pieces[name], self.exact(name))

    @own_settings()
    def exact(self, name: str) -> Tensor:
        """Return one layer's weight in float64 before it is rounded to the files' dtype; with view `delta`, base included."""
        values = self.layer(name)
        if self._view == "delta":
            values = values + self._base().read(name).double()
        # The square root of a negative variance is NaN, and so would be all outputs of the model.
        return values.clamp_min(torch.finfo(torch.float32).tiny) if VARIANCE.search(name) else values

    def _carried(self, name: str) -> Tensor:
        if name not in self._template.carried and not self._template.left_at:
            raise BundleError("is neither a layer nor carried", where=f"tensor '{name}' of {self.name}")
        if name not in self._template.carried and not self._fetch:
            raise BundleError(
                f"was excluded from the fit, and stays at {shown_url(self._template.left_at)}",
                where=f"tensor '{name}' of {self.name}",
                rule="a bundle does not give permission to connect to the URLs that it names",
                next_step="rebuild with fetch=True (--fetch) if you trust it",
            )
        return self._template.read_carried(name)

    def _save_adapter(self, folder: Path, family: str | None, workers: Workers, progress: Progress) -> None:
        factors = self._written(workers, progress)
        others = dict(workers.each("reading what is carried", self._carried, other_tensors(self._template), progress))
        write_adapter(folder, self._template, factors, others, family)

    def _written(self, workers: Workers, progress: Progress) -> dict[str, Factors]:
        """B and A of each module as they are written, and their ranks, which are kept."""
        stage, updates, own = "rebuilding updates", self._template.layout.updates, self._own

        def run(ranks: Mapping[str, int | None]) -> dict[str, Cut]:
            cuts = workers.each(stage, lambda module: self._adapter_cut(module, ranks.get(module)), updates, progress)
            return dict(cuts)

        cuts = {}
        if own is not None:
            # Cuts first, which are small.
            cuts = run({module: max(own.ranks[module], updates[module].rank) for module in self._layers})
        if own is None or not own.allows({module: cuts[module] for module in self._layers}):
            cuts = run(dict.fromkeys(updates, self._max_rank))
        self._ranks = UpdateRanks(
            {
                module: UpdateRank(cut.factors[1].shape[0], cut.whole, updates[module].rank, cut.energy, cut.lost)
                for module, cut in cuts.items()
            }
        )
        return {module: cut.factors for module, cut in cuts.items()}

    def adapter_factors(self, module: str) -> Factors:
        """Return B and A of one module, from the subspace or, if it was excluded, from the carried tensors."""
        return self._adapter_cut(module, self._max_rank).factors

    def _adapter_cut(self, module: str, max_rank: int | None) -> Cut:
        if module in self._layers:
            return self._cut(module, max_rank)
        update = self._template.layout.updates[module]
        names = (f"{module}.lora_B", f"{module}.lora_A")
        keys, shapes = (update.key_b, update.key_a), ((update.shape[0], update.rank), (update.rank, update.shape[1]))
        b_OR, a_RI = (
            self.layer(name) if name in self._layers else self._carried(key)
            for name, key in zip(names, keys, strict=True)
        )
        factors = b_OR.reshape(shapes[0]), a_RI.reshape(shapes[1])
        if max_rank is not None and update.rank > max_rank:
            # A carried factor that has more rows than its rank is still of the rank that its file says.
            cut = lora.cut_product(factors[0].double(), factors[1].double(), max_rank)
            rest = cut.energies_P.new_zeros(update.rank - cut.whole)
            return cut._replace(energies_P=torch.cat([cut.energies_P, rest]))
        return Cut(factors, torch.zeros(update.rank), lora.energy(factors))

    def state_dict(self) -> dict[str, Tensor]:
        """Return every tensor of a rebuilt checkpoint by its name in the files, in the files' dtypes."""
        if self._template.layout.updates:
            raise EigenzooError(
                "an adapter has no state dict of full weights",
                where=self.name,
                next_step="save it, and load it with PEFT or diffusers",
            )
        layout = self._template.layout
        return {layout.names.get(name, name): self._read(name) for name in layout.tensors}


def _check_max_rank(max_lora_rank: int | str | None, layout: ModelLayout, name: str) -> None:
    if not layout.updates:
        raise UsageError(
            f"a largest LoRA rank of {max_lora_rank} for a {layout.format}",
            where=name,
            rule="only LoRA updates have a rank",
            next_step="leave out max_lora_rank (--max-lora-rank)",
        )
    if not isinstance(max_lora_rank, int) or max_lora_rank < 1:
        raise RankError(
            f"max_lora_rank is {max_lora_rank}",
            where=name,
            rule="an update has a rank of 1 or more",
            next_step="name one, or 'full' for the whole rank",
        )


def check_layout(layers: Mapping[str, LayerBasis], layout: ModelLayout, model: str) -> None:
    """Raise unless the model's files have every layer in its shape, before any layer is computed."""
    tensors = {name: tensor.shape for name, tensor in layout.pieces.items()}
    shapes = {**tensors, **{module: update.shape for module, update in layout.updates.items()}}
    for module, update in layout.updates.items():
        shapes |= {f"{module}.lora_A": tensors[update.key_a], f"{module}.lora_B": tensors[update.key_b]}
    for name, basis in layers.items():
        if shapes.get(name) != basis.layer.tensor_shape:
            raise BundleError(
                f"{model} has shape {shapes.get(name)}",
                where=f"layer '{name}'",
                rule=f"the basis has {basis.layer.tensor_shape}",
            )
