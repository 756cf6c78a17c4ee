"""Verify that a LoRA adapter takes effect on a base (`verify_adapter`)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

from eigenzoo.errors import FormatError, UnsupportedError, UsageError
from eigenzoo.formats.lora.config import CONFIG_FILE
from eigenzoo.formats.lora.diffusion_keys import weights_as_layers
from eigenzoo.formats.lora.mlx_folder import MlxAdapter
from eigenzoo.formats.model import Model
from eigenzoo.formats.opening import open_model, whole_model
from eigenzoo.formats.remote import is_url
from eigenzoo.formats.remote.address import shown_url
from eigenzoo.passes.settings import own_settings
from eigenzoo.passes.workers import local_workers
from eigenzoo.records import Progress, no_progress
from eigenzoo.zoo.adapter import Adapter, adapter_of
from eigenzoo.zoo.adapter_changes import config_changes, key_changes
from eigenzoo.zoo.adapter_effect import effect_checks
from eigenzoo.zoo.adapter_names import base_checks, loading_check, name_checks
from eigenzoo.zoo.base_modules import ATTENTION, WEIGHT, BaseModules, open_base, shown_base
from eigenzoo.zoo.verification import Check, Loader, Loading, Verification

TRIED = 2_000
"""Modules of an adapter for which changes are tried: each is one more load."""

MOST_TRIES = 32
"""Changes that are tried in one verification, over all adapters of a bundle: a single adapter has up to seventeen."""

NO_LIBRARY = "no library was selected"
"""Why nothing decides, where the caller gives no loader."""

ONLY_MLX = "only mlx-lm loads such files, and verify does not run it; rebuild can write them as a PEFT adapter, which PEFT can load"
"""Why nothing decides of an adapter of mlx-lm."""

AS_PEFTS = "the files are mlx-lm's: names and config are those of the PEFT adapter that they equal"


@own_settings()
def verify_adapter(
    path: str | os.PathLike[str],
    base: str | os.PathLike[str] | Model | None = None,
    *,
    loader: Loader | None = None,
    allow_pickle: bool = False,
    progress: Progress = no_progress,
) -> Verification:
    """Check whether a LoRA adapter takes effect on a base. Adapters that load without an error often do not.

    Args:
        path: the adapter: a PEFT folder, or its URL.
        base: the model that it changes: a checkpoint's folder, file or URL. Without it only the adapter is checked.
        loader: function that tries to load the adapter, such as `eigenzoo.integrations.dry_loading.load_dry`. Without it the
            result is undecided, and `ok` is None unless another check fails.
        allow_pickle: allow the base to be a pickle.
        progress: called as progress(stage, done, total).

    Raises UsageError for what is no adapter, UnsupportedError for kinds of adapters that are not read, FormatError for a base that
    cannot be read. An adapter that is damaged is a fault. Cost: the factors and each weight that they change are read once.
    """
    text = os.fspath(path)
    try:
        model = open_model(path)
    except UnsupportedError:
        raise
    except FormatError as error:
        if is_url(text) or not (whole_model(Path(text)) / CONFIG_FILE).is_file():
            raise
        fault = Check("file", "cannot be read", (str(error),))
        return Verification(text, "adapter", None if base is None else shown_base(base), (fault,))
    if not model.updates:
        raise UsageError(
            "is not an adapter",
            where=text,
            rule="verify checks a bundle or a LoRA adapter",
            next_step="name a bundle, or the folder of an adapter",
        )
    opened = None if base is None else open_base(base, allow_pickle=allow_pickle)
    adapter = adapter_of(model)
    ranks = sorted({update.rank for update in adapter.updates.values()})
    detail = f"{len(adapter.updates)} modules, rank {ranks[0]}" + (f" to {ranks[-1]}" if len(ranks) > 1 else "")
    agrees = "" if adapter.config is None else "; the config agrees"
    notes = model.warnings
    if isinstance(model, MlxAdapter):
        notes, loader = (*notes, AS_PEFTS), _only_mlx
    file = Check("file", detail + agrees, notes=notes)
    with local_workers() as workers:
        structure, modules = structure_checks(adapter, opened, loader)
        effect, changes = effect_checks(adapter, modules, workers, progress)
    shown = None if base is None else shown_base(base)
    return Verification(shown_url(text), "adapter", shown, (file, *structure, *effect), {adapter.name: changes})


def _only_mlx(base: Model, adapter: Adapter) -> str:
    """A `Loader` that runs no library, because PEFT reads only its own files."""
    return ONLY_MLX


def structure_checks(
    adapter: Adapter,
    base: Model | None,
    loader: Loader | None,
    norms: dict[tuple[str, bool], float] | None = None,
    tries: Iterator[object] | None = None,
) -> tuple[list[Check], BaseModules | None]:
    """Run the checks that read no values; gives the base's modules, under a library's names where it was asked.

    What a library does decides; names and shapes say why it drops a factor. Where it was not asked they decide nothing, and what
    they say against the adapter are notes. `norms` are what was found of the base already, and of `tries` one is taken for each
    change that is loaded.
    """
    everything = tuple(adapter.updates)
    if base is None:
        return name_checks(adapter, everything), None
    loading = NO_LIBRARY if loader is None else loader(base, adapter)
    if isinstance(loading, str):
        modules = BaseModules(base, _names_of(adapter, base, {}), norms)
        checks = [*name_checks(adapter, everything), *base_checks(adapter, modules, everything, None)]
        return [*(_undecided(check) for check in checks), loading_check(loading, adapter)], modules
    lost = lost_modules(adapter, loading)
    modules = BaseModules(base, _names_of(adapter, base, loading.names), norms, _loaded_modules(adapter, base, loading))
    advice = "" if loading.is_whole or loader is None else _advice(adapter, base, modules, lost, loading, loader, tries)
    return [
        *name_checks(adapter, lost),
        *base_checks(adapter, modules, lost, loading),
        loading_check(loading, adapter, advice),
    ], modules


def lost_modules(adapter: Adapter, loading: Loading) -> tuple[str, ...]:
    """Return the modules with a factor that the library does not take up."""
    dropped = set(loading.dropped)
    return tuple(
        module for module, update in adapter.updates.items() if loading.error or not dropped.isdisjoint(update.keys)
    )


def _undecided(check: Check) -> Check:
    """Turn faults of names and shapes into notes, because a library may translate them."""
    return replace(check, faults=(), notes=(*check.faults, *check.notes), done=False) if check.faults else check


def _names_of(adapter: Adapter, base: Model, names: Mapping[str, str]) -> Mapping[str, str] | None:
    """Return the names of the base's tensors under which the adapter's modules are searched."""
    return weights_as_layers(base.tensors) if adapter.config is None else names or None


def _loaded_modules(adapter: Adapter, base: Model, loading: Loading) -> dict[str, str]:
    """Return for each module of the adapter the one module of the base's files that it is loaded into."""
    files = {name.removesuffix(WEIGHT).removesuffix(ATTENTION): file for file, name in loading.names.items()}
    modules = {}
    for module, update in adapter.updates.items():
        taken = loading.modules.get(update.key_a, ())
        if len(taken) == 1:
            file = files.get(taken[0]) or files.get(taken[0].replace(".base_layer.", "."))
            modules[module] = taken[0] if file is None else file.removesuffix(WEIGHT).removesuffix(ATTENTION)
    return modules


def _advice(
    adapter: Adapter,
    base: Model,
    modules: BaseModules,
    lost: Sequence[str],
    loading: Loading,
    loader: Loader,
    tries: Iterator[object] | None,
) -> str:
    """Name the change with which the library loads all tensors. Each change is tried first."""
    if len(adapter.updates) > TRIED:
        return ""
    tries = iter(range(MOST_TRIES)) if tries is None else tries
    for change in chain(key_changes(adapter, modules, lost), config_changes(adapter, lost)):
        if next(tries, None) is None:
            return f"No more than {MOST_TRIES} changes were tried: rebuild this adapter and verify it by itself"
        tried = loader(base, change.adapter)
        if isinstance(tried, Loading) and tried.is_whole and not tried.missing:
            return f"{change.words}. Then {tried.what} takes up all of them"
    return f"{loading.advice[0].upper()}{loading.advice[1:]}" if loading.advice else ""
