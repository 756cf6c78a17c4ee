"""`verify_adapter`: whether a LoRA adapter will take effect on a base."""

from __future__ import annotations

import os
from pathlib import Path

from eigenzoo.errors import FormatError, UnsupportedError, UsageError
from eigenzoo.formats.lora.config import CONFIG_FILE
from eigenzoo.formats.lora.diffusion_keys import weights_as_layers
from eigenzoo.formats.model import Model
from eigenzoo.formats.opening import open_model, whole_model
from eigenzoo.formats.remote import is_url
from eigenzoo.formats.remote.address import shown_url
from eigenzoo.passes.settings import own_settings
from eigenzoo.passes.workers import local_workers
from eigenzoo.records import Progress, no_progress
from eigenzoo.zoo.adapter_effect import effect_checks
from eigenzoo.zoo.adapter_names import Adapter, adapter_of, base_checks, loading_check, name_checks
from eigenzoo.zoo.base_modules import BaseModules, open_base, shown_base
from eigenzoo.zoo.verification import Check, Loader, Loading, Verification


@own_settings()
def verify_adapter(
    path: str | os.PathLike[str],
    base: str | os.PathLike[str] | Model | None = None,
    *,
    loader: Loader | None = None,
    allow_pickle: bool = False,
    progress: Progress = no_progress,
) -> Verification:
    """Check whether a LoRA adapter takes effect on a base, which adapters that load without a word often do not.

    Args:
        path: the adapter: a folder of PEFT's, or its URL.
        base: the model that it changes: a checkpoint's folder, file or URL. Without it the adapter alone is checked.
        loader: a library that tries to load it, such as `eigenzoo.integrations.peft_loading.load_dry`.
        allow_pickle: whether the base may be a pickle.
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
        found = Check("file", "cannot be read", (str(error),))
        return Verification(text, "adapter", None if base is None else shown_base(base), (found,))
    if not model.updates:
        raise UsageError(
            "is no adapter", where=text, rule="what is verified is a bundle or a LoRA adapter", next_step="name one"
        )
    opened = None if base is None else open_base(base, allow_pickle=allow_pickle)
    adapter = adapter_of(model)
    ranks = sorted({update.rank for update in adapter.updates.values()})
    detail = f"{len(adapter.updates)} modules, rank {ranks[0]}" + (f" to {ranks[-1]}" if len(ranks) > 1 else "")
    agrees = "" if adapter.config is None else "; the config agrees"
    file = Check("file", detail + agrees, notes=model.warnings)
    with local_workers() as workers:
        structure, modules = structure_checks(adapter, opened, loader)
        effect, changes = effect_checks(adapter, modules, workers, progress)
    shown = None if base is None else shown_base(base)
    return Verification(shown_url(text), "adapter", shown, (file, *structure, *effect), {adapter.name: changes})


def structure_checks(
    adapter: Adapter,
    base: Model | None,
    loader: Loader | None,
    norms: dict[tuple[str, bool], float] | None = None,
) -> tuple[list[Check], BaseModules | None]:
    """Run the checks that read no values; gives the base's modules, under a library's names where it was asked.

    `norms` are what was found of the base already.
    """
    checks = name_checks(adapter)
    if base is None:
        return checks, None
    loading: Loading | str | None = None
    if loader is not None and adapter.config is not None:
        loading = loader(base, adapter.config, adapter.shapes)
    known = loading if isinstance(loading, Loading) else None
    names = known.names if known else weights_as_layers(base.tensors) if adapter.config is None else None
    modules = BaseModules(base, names, norms)
    checks += base_checks(adapter, modules, known)
    if loading is not None:
        checks.append(loading_check(loading, adapter))
    return checks, modules
