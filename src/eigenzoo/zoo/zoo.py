"""Zoo: many models as one collection, read lazily."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from types import MappingProxyType

from torch import Tensor

from eigenzoo.errors import EigenzooError, MismatchError, UsageError, ZooError
from eigenzoo.formats.carried import carried_values
from eigenzoo.formats.file_identity import identify_file
from eigenzoo.formats.lora.unfused import unfuse
from eigenzoo.formats.lora.zero_updates import unfilled, zero_modules
from eigenzoo.formats.model import Model
from eigenzoo.formats.opening import open_model
from eigenzoo.formats.pickles.file import PickleModel
from eigenzoo.formats.remote import remote_url, source_url
from eigenzoo.formats.remote.address import below
from eigenzoo.formats.remote.hub_id import find_id
from eigenzoo.formats.splitting import split_model
from eigenzoo.passes.process import seldom_collecting
from eigenzoo.passes.settings import own_settings
from eigenzoo.records import Layer, LeftOut, Progress, SkippedModel, ZeroUpdates, no_progress
from eigenzoo.weights.splits import parse_split
from eigenzoo.weights.views import VIEWS, check_choice
from eigenzoo.zoo.layers import default_view, layer_sources
from eigenzoo.zoo.matching import Match, Selection, fill_models, match_models
from eigenzoo.zoo.prefixes import as_layers
from eigenzoo.zoo.sources import Source, Unreadable, look_for_models, name_models, shown_source
from eigenzoo.zoo.stack import DenseStack, Stack, UpdateStack

MOST_NAMED = 6
"""Files that one warning names."""

MISSING = ("error", "zero")
"""What becomes of a module that some adapters lack."""

_WITH_ZEROS = "--missing zero (missing='zero'), which counts an update that an adapter lacks as zero"


class Zoo:
    """N models of one architecture, matched layer by layer; made by `open_zoo`.

    Only headers are held. Reading values goes through `stack`.

    Attributes:
        models: the opened models.
        names: their names, unique.
        view: how a layer becomes a matrix: `weight`, `delta`, `update` or `factors`.
        base: the model that view `delta` subtracts.
        layers: every layer by name.
        left_out: the tensors that are not layers, with reasons.
        skipped: the models that could not be read, with `allow_missing`.
        hidden: paths of models that were skipped because their names begin with `.` or `_`.
        zeros: the modules that count as zero updates, by model, with `missing` = `zero`.
        warnings: warnings that apply to all results.
    """

    def __init__(
        self,
        models: Sequence[Model],
        names: Sequence[str],
        selection: Selection,
        base: Model | None = None,
        skipped: Sequence[SkippedModel] = (),
        hidden: Sequence[str] = (),
    ) -> None:
        self.names = tuple(names)
        # A part of a zoo, also in another process, reads its models in the same way as the whole zoo.
        models, parts = unfuse(models, selection.parts | (selection.only or frozenset()))
        selection = replace(selection, parts=selection.parts | parts)
        models = as_layers(models, selection.only or frozenset())
        cut = [split_model(model, selection.split) for model in models]
        self.models, selection = fill_models(cut, self.names, selection)
        self.base = None if base is None else split_model(base, selection.split)
        self.selection, self.skipped, self.hidden = selection, tuple(skipped), tuple(hidden)
        if selection.view == "delta" and base is None:
            raise _without_base()
        repeated = [name for name, count in Counter(self.names).items() if count > 1]
        if repeated:
            raise ZooError(
                f"the name {repeated[0]!r} is used by more than one model", rule="names of models must be unique"
            )
        self._match: Match = match_models(self.models, self.names, selection, self.base)
        self.zeros = tuple(
            ZeroUpdates(name, zero_modules(model))
            for name, model in zip(self.names, self.models, strict=True)
            if zero_modules(model)
        )
        self.warnings = tuple(_warnings(self.models, self.names, self.zeros))

    def __reduce__(self) -> tuple[Callable[[ZooSource], Zoo], tuple[ZooSource]]:
        """Pickle as paths and choices. The other process opens the files again, once for all tasks."""
        return reopen, (self.source(),)

    def source(self) -> ZooSource:
        """Return what this zoo was opened from."""
        return ZooSource(
            tuple(_address(model) for model in self.models),
            self.names,
            self.selection,
            None if self.base is None else _address(self.base),
            self.skipped,
            any(isinstance(model, PickleModel) for model in (*map(unfilled, self.models), self.base)),
            self._files,
        )

    @cached_property
    def _files(self) -> str:
        return hashlib.sha256(repr(self.identities()).encode()).hexdigest()

    def identities(self) -> list[list[object]]:
        """Return what each weight file is (`identify_file`), the base's included, without reading it."""
        models = self.models if self.base is None else (*self.models, self.base)
        return [identify_file(path) for model in models for path in model.weight_files()]

    @property
    def view(self) -> str:
        """How a layer becomes a matrix."""
        return self.selection.view

    @property
    def layers(self) -> Mapping[str, Layer]:
        """Every layer by name, in the order of the files."""
        return MappingProxyType(self._match.layers)

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """Tensors that are no layer, and why."""
        return self._match.left_out

    def __len__(self) -> int:
        return len(self.models)

    def __repr__(self) -> str:
        return f"Zoo({len(self)} models, {len(self.layers)} layers, view={self.view!r})"

    @property
    def num_bytes(self) -> int:
        """Bytes of all weight files."""
        return sum(model.nbytes for model in self.models)

    @property
    def layer_bytes(self) -> int:
        """Bytes of the analysed layers in the files of all models."""
        zeros = {zero.model: frozenset(zero.modules) for zero in self.zeros}
        return sum(
            source.layer.num_bytes
            for name, sources in zip(self.names, self._match.sources, strict=True)
            for source in sources.values()
            if source.key not in zeros.get(name, ())
        )

    def stack(self, layer: str, *, precision: str = "default") -> Stack:
        """Return one layer across all models, unread; `precision` is that of products: `high` is float64 whatever its size."""
        spec = self._match.layers[layer]
        sources = [sources[layer] for sources in self._match.sources]
        if spec.kind == "update":
            return UpdateStack(spec, self.models, self.names, sources, precision)
        base = self.base if self.view == "delta" else None
        return DenseStack(spec, self.models, self.names, sources, base, precision)

    def keys(self, layer: str) -> list[tuple[str, float]]:
        """Return where each model keeps a layer, and by what its values are multiplied."""
        return [(sources[layer].key, sources[layer].scale) for sources in self._match.sources]

    def select(
        self,
        *,
        view: str | None = None,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        names: Sequence[str] | None = None,
    ) -> Zoo:
        """Return the same models under another view or choice of layers, or only some of the models."""
        chosen = Selection(
            self.view if view is None else check_choice(view, VIEWS, "view"),
            self.selection.include if include is None else tuple(include),
            self.selection.exclude if exclude is None else tuple(exclude),
            self.selection.allow_missing,
            self.selection.only if view is None and include is None and exclude is None else None,
            self.selection.split,
            self.selection.missing,
            self.selection.modules,
            self.selection.parts,
        )
        _check_missing(chosen.missing, chosen.view)
        indices = range(len(self)) if names is None else [self.place(name) for name in names]
        return Zoo(
            [self.models[index] for index in indices],
            [self.names[index] for index in indices],
            chosen,
            self.base,
            self.skipped,
            self.hidden,
        )

    def renamed(self, names: Sequence[str]) -> Zoo:
        """Return the same zoo with other names for its models."""
        return Zoo(self.models, names, self.selection, self.base, self.skipped, self.hidden)

    def place(self, name: str) -> int:
        """Return the number of the model with this name."""
        if name not in self.names:
            raise UsageError(f"no model is called {name!r}", rule=f"the zoo has: {', '.join(self.names[:5])}, …")
        return self.names.index(name)

    def require(self, layers: Mapping[str, Layer], what: str) -> None:
        """Raise MismatchError unless this zoo has these layers in these shapes and no others."""
        for name, layer in layers.items():
            if name not in self.layers:
                as_zero = layer.kind == "update" and self.selection.missing != "zero"
                raise MismatchError(
                    f"{self.names[0]} has no such layer",
                    where=f"layer '{name}'",
                    rule=f"{what} has it",
                    next_step=f"fit {what} with {_WITH_ZEROS}" if as_zero else "",
                )
            if self.layers[name].tensor_shape != layer.tensor_shape:
                raise MismatchError(
                    f"has shape {list(self.layers[name].tensor_shape)} in {self.names[0]}",
                    where=f"layer '{name}'",
                    rule=f"{what} has {list(layer.tensor_shape)}",
                )

    def carried(self, index: int) -> tuple[str, ...]:
        """Names of the tensors of one model that no layer holds."""
        stays = set(self.left_at_source(index))
        return tuple(name for name in self._outside_layers(index) if name not in stays)

    def left_at_source(self, index: int) -> tuple[str, ...]:
        """Names of the tensors of a model in a store that were excluded: they stay there, and are read from there to rebuild it."""
        model = self.models[index]
        if remote_url(model.path) is None:
            return ()
        sources = layer_sources(model, self.view)
        excluded = [sources[name].key for name in self._match.excluded if name in sources]
        for key in list(excluded):
            if key in model.updates:
                excluded += [model.updates[key].key_a, model.updates[key].key_b]
        return tuple(name for name in self._outside_layers(index) if name in set(excluded))

    def _outside_layers(self, index: int) -> list[str]:
        model, sources = self.models[index], self._match.sources[index]
        in_layers = {source.key for source in sources.values()}
        for module, update in model.updates.items():
            if module in in_layers:
                in_layers |= update.keys
            if update.key_alpha is not None:
                in_layers.add(update.key_alpha)  # a layout says the scale
        return [name for name in model.tensors if name not in in_layers]

    def read_carried(self, index: int, name: str) -> Tensor:
        """Read a carried tensor; the B of a LoRA update comes with its scale, since a rebuilt adapter has scale 1."""
        return carried_values(self.models[index], name)


@dataclass(frozen=True)
class ZooSource:
    """Where a zoo's models lie and what was chosen of them: from this it is opened again in another process.

    `files` says which contents the files had, so that nobody takes an earlier zoo of the same paths for this one.
    """

    paths: tuple[str, ...]
    names: tuple[str, ...]
    selection: Selection
    base: str | None
    skipped: tuple[SkippedModel, ...]
    allow_pickle: bool
    files: str


@lru_cache(maxsize=4)
def reopen(source: ZooSource) -> Zoo:
    """Open a zoo again from where it was opened; a process opens it once."""
    models = open_models(source.paths, allow_pickle=source.allow_pickle).models
    base = None if source.base is None else open_models([source.base], allow_pickle=source.allow_pickle).models[0]
    return Zoo(models, source.names, source.selection, base, source.skipped)


def _address(model: Model) -> str:
    """A model's URL, or its absolute path."""
    return remote_url(model.path) or str(model.path.absolute())


@own_settings()
def open_zoo(
    source: Source,
    *,
    view: str | None = None,
    base: str | os.PathLike[str] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    split: Sequence[str] = (),
    allow_missing: bool = False,
    missing: str = "error",
    allow_pickle: bool = False,
    progress: Progress = no_progress,
) -> Zoo:
    """Open many models as one zoo; reads headers and configs, no values.

    Args:
        source: a folder of models, a glob, a list of paths, or a .txt file with one path per line. A path can also be a URL
            (`s3://…`, `hf://…`, anything that fsspec opens), of which only the required parts are read, or a hub id
            (`org/name@revision`), which is downloaded into the hub's cache.
        view: `weight`, `delta` (weight minus `base`), `update` (scaled ΔW of LoRA adapters) or `factors`. Default: `update`
            for adapters, `delta` with a base, otherwise `weight`.
        base: checkpoint to subtract from every model (view `delta`).
        include, exclude: globs of layer names or roles. Excluded layers are carried unchanged.
        split: rules that split fused weights into separate layers, such as `"*.attn.qkv.*=q,k,v"` (docs/formats.md). A
            rule that matches nothing, or does not divide the outputs, is an error.
        allow_missing: skip models that cannot be read and layers that some models lack, and count them.
        missing: `zero` treats a module that some LoRA adapters do not train as a zero update in these adapters, which is exact;
            `warnings` and `zeros` list them. `error` (the default) refuses such a zoo.
        allow_pickle: also read torch's .pt and .bin files (only tensors are unpickled).

    Raises:
        FormatError, ZooError: with the model, the layer, the rule and the next step.
    """
    rules = tuple(parse_split(rule) for rule in ([split] if isinstance(split, str) else split))
    check_choice(missing, MISSING, "missing")
    if view is not None:
        _check_missing(missing, view)
        _check_base(check_choice(view, VIEWS, "view"), base)
    # A base that is not downloaded completely is opened first, so that its errors are raised before a zoo is downloaded.
    base_model = open_model(base, allow_pickle=allow_pickle) if base is not None and find_id(base) is None else None
    with seldom_collecting():
        opened = _open_named(source, allow_missing, allow_pickle, progress)
    chosen = view if view is not None else default_view(opened.models[0], base is not None)
    if chosen == "update" and view is None and base is not None:
        raise UsageError(
            "a base for adapters",
            where=f"--base {base}",
            rule="adapters are read without it: their files have the differences from the base",
            next_step="leave out --base (base=)",
        )
    _check_base(chosen, base)
    _check_missing(missing, chosen)
    if base is not None and base_model is None:
        base_model = open_model(base, allow_pickle=allow_pickle)
    selection = Selection(chosen, tuple(include), tuple(exclude), allow_missing, split=rules, missing=missing)
    return Zoo(opened.models, opened.names, selection, base_model, opened.skipped, opened.hidden)


def _check_missing(missing: str, view: str) -> None:
    if missing == "zero" and view != "update":
        raise UsageError(
            f"missing='zero' does not work with view {view!r}",
            rule="only an update can be zero, because an adapter leaves untrained modules of the base unchanged",
            next_step="leave out missing='zero' (--missing zero); --allow-missing leaves out layers that some models lack",
        )


def _check_base(view: str, base: str | os.PathLike[str] | None) -> None:
    if view != "delta" and base is not None:
        raise UsageError(
            f"a base does not work with view {view!r}",
            rule="only view 'delta' subtracts a base: leave --base out (base=), or choose view delta for full weights",
        )
    if view == "delta" and base is None:
        raise _without_base()


def _without_base() -> UsageError:
    return UsageError("view 'delta' needs a base", next_step="name the parent checkpoint with base=… or --base")


@dataclass(frozen=True)
class OpenedModels:
    """Models that are opened and named, and not matched yet."""

    models: tuple[Model, ...]
    names: tuple[str, ...]
    skipped: tuple[SkippedModel, ...] = ()
    hidden: tuple[str, ...] = ()


def open_models(source: Source, *, allow_pickle: bool = False) -> OpenedModels:
    """Open models without matching them: for whoever knows the layers already."""
    with seldom_collecting():
        return _open_named(source, False, allow_pickle, no_progress)


def _open_named(source: Source, allow_missing: bool, allow_pickle: bool, progress: Progress) -> OpenedModels:
    models_found = look_for_models(source, progress, allow_pickle=allow_pickle, allow_missing=allow_missing)
    models, skipped = _open_all(models_found.models, allow_missing, allow_pickle, progress)
    if not models:
        first = f"the first: {skipped[0].reason}" if skipped else ""
        raise ZooError("no model can be read", where=shown_source(source), rule=first)
    names = name_models([model.path for model in models])
    return OpenedModels(tuple(models), tuple(names), tuple(skipped), tuple(map(str, models_found.hidden)))


def _open_all(
    paths: Sequence[Path | Unreadable], allow_missing: bool, allow_pickle: bool, progress: Progress
) -> tuple[list[Model], list[SkippedModel]]:
    models: list[Model] = []
    skipped: list[SkippedModel] = []
    for number, path in enumerate(paths):
        try:
            if isinstance(path, Unreadable):
                raise path.error
            models.append(open_model(path, allow_pickle=allow_pickle))
        except EigenzooError as error:
            if not allow_missing:
                raise
            skipped.append(SkippedModel(path.name, str(error)))
        progress("opening models", number + 1, len(paths))
    return models, skipped


def _beside_warnings(models: Sequence[Model], names: Sequence[str]) -> list[str]:
    """Warn of weights beside models, and of models below them, which are not read."""
    texts = []
    for what, kind, next_step in (
        (
            "weights beside these models are neither read nor carried",
            "weights",
            "copy them yourself if a rebuilt model needs them",
        ),
        (
            "folders below these models hold models of their own, which are not read",
            "models",
            f"name them to read them, such as '{_first_below(models)}'",
        ),
    ):
        folders = [
            f"{name}/{file}" for model, name in zip(models, names, strict=True) for file in getattr(model.beside, kind)
        ]
        if folders:
            more = f" and {len(folders) - MOST_NAMED} more" if len(folders) > MOST_NAMED else ""
            texts.append(f"{what}: {', '.join(folders[:MOST_NAMED])}{more}; {next_step}")
    return texts


def _first_below(models: Sequence[Model]) -> str:
    """Return the path or URL of the first model below another; nothing where there is none."""
    for model in models:
        for folder in model.beside.models[:1]:
            url = source_url(model.path)
            return str(model.path / folder) if url is None else below(url, folder)
    return ""


def _warnings(models: Sequence[Model], names: Sequence[str], zeros: Sequence[ZeroUpdates]) -> list[str]:
    """Collect warnings: of the files, of adapters that name different base models, and of updates that count as zero."""
    names_of: dict[str, list[str]] = {}
    for model, name in zip(models, names, strict=True):
        for text in model.warnings:
            names_of.setdefault(text, []).append(name)
    texts = _beside_warnings(models, names)
    texts += [
        f"{naming[0]}{f' and {len(naming) - 1} more' if len(naming) > 1 else ''}: {text}"
        for text, naming in names_of.items()
    ]
    bases = sorted({str(model.config.get("base_model_name_or_path")) for model in models if model.config is not None})
    if len(bases) > 1:
        texts.append(
            f"the adapters name {len(bases)} different base models: {', '.join(bases[:3])}{', …' if len(bases) > 3 else ''}"
        )
    if zeros:
        counts = ", ".join(f"{zero.model} ({len(zero.modules)})" for zero in zeros[:5])
        texts.append(
            f"{len(zeros)} of {len(models)} adapters lack modules that others have, which count as updates of zero: "
            f"{counts}{', …' if len(zeros) > 5 else ''}"
        )
    return texts
