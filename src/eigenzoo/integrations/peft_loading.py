"""Load an adapter with PEFT itself, by names and shapes into a base that is built without weights.

Nothing is downloaded, no code of a model runs, and no value is read: all tensors are on torch's meta device.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Mapping
from dataclasses import fields, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eigenzoo.errors import EigenzooError, FormatError, UnsupportedError, install
from eigenzoo.formats.lora.peft_folder import PREFIX
from eigenzoo.formats.model import Model
from eigenzoo.formats.side_files import CONFIG
from eigenzoo.integrations.dry_tensors import Origins, dropped_of, places_of, refuse_undecided, without_values
from eigenzoo.integrations.model_limits import check_counts, no_larger_than
from eigenzoo.integrations.models import read_config, told
from eigenzoo.passes.process import quietly
from eigenzoo.weights.lora_targets import targeting
from eigenzoo.zoo.adapter import Adapter
from eigenzoo.zoo.verification import Loading

CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""The class of the base in PEFT's AutoPeftModel, for each task in a config."""

ADAPTER = "default"

MOST_CLASSES = 10
"""Largest number of classes in a config. Each is looked up in transformers, and real configs have one."""

_AUTO = frozenset(CLASSES.values())
_OTHERS = ("AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText")
# Tried if no class in a config loads everything, only to name one that would.
# The initialisation of factors does not change their modules, and may need data or weights.
_OF_INITIALISATION = frozenset({"eva_config", "corda_config", "loftq_config", "lora_ga_config", "runtime_config"})


def load_dry(base: Model, adapter: Adapter) -> Loading | str:
    """Try to load an adapter into a base with PEFT; a `Loader` of `eigenzoo.verify_adapter`.

    The base is built by the class in `architectures` of its own config. If PEFT does not load everything then, the class in the
    adapter's config and that of its task are tried, as in PEFT's AutoPeftModel classes. The result is that of the first class that
    loads everything, else of the first.

    Returns a text if loading was not tried: a library is missing, or the base is not a checkpoint of transformers. Cost: building
    the base without weights, about a second for a large one and each class.
    """
    missing = [name for name in ("transformers", "peft") if find_spec(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)} ({install('peft')})"
    if CONFIG not in base.side_files:
        return f"the base has no {CONFIG}, without which transformers cannot build it"
    try:
        # Checked before PEFT matches the patterns of an untrusted config with every module.
        is_target = targeting(adapter.config or {})
        for name in base.tensors:
            is_target(name.rpartition(".")[0])
        _check_lists(adapter.config or {}, base)
        with warnings.catch_warnings(), quietly():
            warnings.simplefilter("ignore")
            return _load_by_classes(base, adapter)
    except EigenzooError as error:
        return str(error)


def _load_by_classes(base: Model, adapter: Adapter) -> Loading:
    """Load into the base built by each candidate class, until one loads everything."""
    config = read_config(base.folder)
    found: dict[str, Loading] = {}
    failed: EigenzooError | None = None
    for name in _named_classes(config, adapter.config or {}):
        try:
            built = build(config, name, base, base.folder)
            loading = found.setdefault(type(built).__name__, _load(built, base, adapter))
        except EigenzooError as error:
            # A task's class may not exist for such a base. The first class that exists decides the error.
            failed = failed or error
            continue
        if loading.is_whole:
            return _beside(loading, found)
    if not found:
        assert failed is not None
        raise failed
    first = next(iter(found.values()))
    return replace(first, advice=_other_class(config, base, adapter, found))


def _beside(loading: Loading, found: Mapping[str, Loading]) -> Loading:
    """Name the classes with which the adapter would be lost, if the base's own is among them."""
    *others, name = found
    if not others:
        return loading
    lost = f"{', '.join(others)}: PEFT drops tensors of this adapter where the base is loaded so; load it as {name}"
    return replace(loading, note=lost)


def _other_class(config: Any, base: Model, adapter: Adapter, found: Mapping[str, Loading]) -> str:
    """Name another class with which PEFT loads everything, into modules whose weights are in the files."""
    for name in _OTHERS:
        try:
            built = build(config, name, base, base.folder)
            if type(built).__name__ in found:
                continue
            loading = _load(built, base, adapter)
        except EigenzooError:
            continue
        weights = {name.removesuffix(".weight") for name in loading.names.values()}
        if loading.is_whole and all(place in weights for places in loading.modules.values() for place in places):
            by = f" (transformers.{name})" if name != type(built).__name__ else ""
            return f"load the base by {type(built).__name__}{by}: then {loading.what} takes up all of them"
    return ""


def architectures_of(config: Any) -> list[str]:
    """Return the class names in a config, which may contain anything."""
    named = getattr(config, "architectures", None)
    return [str(name) for name in named[:MOST_CLASSES]] if isinstance(named, list | tuple) else []


def _named_classes(config: Any, adapter: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of the classes to build a base for an adapter, each once, in the order of trying."""
    import transformers

    names = architectures_of(config)
    mapping = adapter.get("auto_mapping")
    if isinstance(mapping, dict) and str(mapping.get("parent_library", "")).startswith("transformers."):
        names.append(str(mapping.get("base_model_class")))
    names = [name for name in names if _is_class_of(config, getattr(transformers, name, None))]
    task = CLASSES.get(str(adapter.get("task_type")))
    names += [] if task is None else [task]
    return tuple(dict.fromkeys(names)) or ("AutoModel",)


def build(config: Any, name: str, base: Model, folder: Path) -> nn.Module:
    """Build a model of transformers without weights, by the name of its class.

    Args:
        config: the config of transformers, read from `folder`.
        name: name of a model class for this config, or of an `AutoModel…`.
        base: the model of these files. At most a few times its number of tensors are made.

    Raises FormatError if it cannot be built.
    """
    import transformers

    check_counts(config.to_dict(), max(len(base.tensors), 256), folder)
    found: Any = getattr(transformers, name)
    is_auto = name in _AUTO or name in _OTHERS
    make = partial(found.from_config, config, trust_remote_code=False) if is_auto else partial(found, config)
    with torch.device("meta"), no_larger_than(base, folder):
        model: nn.Module = told(f"{name} cannot be built", folder, make)
    return model


def _is_class_of(config: Any, found: Any) -> bool:
    """Tell whether a name in a file is a class of models with such a config."""
    import transformers

    return (
        isinstance(found, type)
        and issubclass(found, transformers.PreTrainedModel)
        and isinstance(config, getattr(found, "config_class", None) or ())
    )


def _check_lists(config: Mapping[str, Any], base: Model) -> None:
    """Raise for an adapter's lists with far more modules than the base, because PEFT compares all pairs of entries."""
    for key in ("target_modules", "exclude_modules", "layers_to_transform"):
        names, most = config.get(key), max(len(base.tensors), 1000)
        if isinstance(names, list) and len(names) > most:
            raise UnsupportedError(
                f"{key} has {len(names)} entries", rule=f"PEFT is given at most {most} for this base"
            )


def names_in(tensors: Collection[str], model: Any) -> dict[str, str]:
    """Return names in memory by names in the files. As in transformers, the base's prefix is optional."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    found = {}
    for file, name in _saved_names(model).items():
        for tried in (file, prefix + file, file.removeprefix(prefix)):
            if tried in tensors:
                found[tried] = name
                break
    return found


def _saved_names(model: Any) -> dict[str, str]:
    """Like `transformers_names.saved_names`, but by objects, because meta tensors have no address."""
    held: dict[str, Tensor] = dict(model.state_dict())
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # before version 5 the names were the same
        return {name: name for name in held}
    places = {id(values): name for name, values in held.items()}
    saved: dict[str, Tensor] = revert_weight_conversion(model, dict(held))
    return {name: places[id(values)] for name, values in saved.items() if id(values) in places}


def _load(model: nn.Module, base: Model, adapter: Adapter) -> Loading:
    """Load an adapter into a built base, and find the modules that receive its tensors."""
    import peft

    names = names_in(base.tensors, model)
    what = f"PEFT {peft.__version__}, loading into {type(model).__name__},"
    tensors = without_values(adapter)
    try:
        with Origins(tensors) as origins:
            wrapped = told("refused", base.folder, lambda: _wrapped(model, adapter.config or {}, tensors))
    except FormatError as error:
        refuse_undecided(error)
        return Loading(what, names, error=error.what)
    places = places_of(origins, wrapped.named_parameters())
    missing = [
        _plain(name.removeprefix(PREFIX))
        for name, parameter in wrapped.named_parameters()
        if ".lora_" in name and not origins.of(parameter)
    ]
    return Loading(what, names, places, dropped_of(adapter, places), tuple(missing))


def _wrapped(model: nn.Module, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module:
    """Do the steps of `PeftModel.from_pretrained` after it has read the files."""
    from peft import LoraConfig, get_peft_model
    from peft.utils import set_peft_model_state_dict

    known = {field.name for field in fields(LoraConfig)} - _OF_INITIALISATION
    chosen: dict[str, Any] = {key: value for key, value in config.items() if key in known}
    chosen |= {"init_lora_weights": True, "inference_mode": True}
    # Models of transformers before version 5 have patterns for renaming older adapters.
    mapping: Mapping[str, str] = getattr(model, "_checkpoint_conversion_mapping", None) or {}
    # Embeddings' factors are allocated in memory before they move to the meta device, with the rank of any pattern.
    with torch.device("meta"):
        wrapped: nn.Module = get_peft_model(model, LoraConfig(**chosen), ADAPTER, low_cpu_mem_usage=True)
    state = {_mapped(name, mapping): tensor for name, tensor in tensors.items()}
    set_peft_model_state_dict(wrapped, state, ADAPTER, low_cpu_mem_usage=True)
    return wrapped


def _mapped(name: str, mapping: Mapping[str, str]) -> str:
    """Rename a tensor like `peft.utils.load_peft_weights`."""
    prefix = next((prefix for prefix in (PREFIX, "base_model.") if name.startswith(prefix)), None)
    if not mapping:
        return name
    if prefix is None:
        raise ValueError(f"{name!r} does not begin with {PREFIX!r}, as each name must where older names are converted")
    bare = name.removeprefix(prefix)
    for pattern, new in mapping.items():
        renamed, times = re.subn(pattern, new, bare)
        if times:
            return prefix + renamed
    return name


def _plain(name: str) -> str:
    """Remove PEFT's adapter name from a name."""
    return name.replace(f".{ADAPTER}.", ".").removesuffix(f".{ADAPTER}")
