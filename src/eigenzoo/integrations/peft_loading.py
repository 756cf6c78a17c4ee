"""What PEFT itself does with an adapter: the base is built without weights, and PEFT loads the adapter's names and shapes into it.

Nothing is downloaded, no code that comes with a model is run, and no value is read: all tensors are on torch's meta device.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from eigenzoo.errors import EigenzooError, FormatError, UnsupportedError
from eigenzoo.formats.model import Model
from eigenzoo.formats.side_files import CONFIG
from eigenzoo.integrations.model_limits import check_counts, no_larger_than
from eigenzoo.integrations.models import quietly, read_config, told
from eigenzoo.weights.lora_targets import targeting
from eigenzoo.zoo.verification import Loading

CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""The class by which PEFT's AutoPeftModel loads a base, for each task of a config."""

ADAPTER = "default"

_AUTO = frozenset(CLASSES.values())
# How factors are drawn says nothing about where they lie, and may want data or weights.
_OF_INITIALISATION = frozenset({"eva_config", "corda_config", "loftq_config", "lora_ga_config", "runtime_config"})


def load_dry(base: Model, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Loading | str:
    """Try to load an adapter into a base with PEFT; a `Loader` of `eigenzoo.verify_adapter`.

    The base is built by the class that the adapter's config names, else the one of its task, else that of the base's own config.
    A text says why nothing was tried: a library that is missing, a base that is no checkpoint of transformers. Cost: building the
    base without weights, about a second for a large one.
    """
    missing = [name for name in ("transformers", "peft") if find_spec(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (pip install 'eigenzoo[peft]')"
    if CONFIG not in base.side_files:
        return f"the base has no {CONFIG}, without which transformers cannot build it"
    import peft

    try:
        # Before PEFT tries the patterns of a stranger's config on every module.
        is_target = targeting(config)
        for name in base.tensors:
            is_target(name.rpartition(".")[0])
        _check_lists(config, base)
        with warnings.catch_warnings(), quietly():
            warnings.simplefilter("ignore")
            model = _built(base, _named_class(config))
            names = _names_in(base, model)
    except EigenzooError as error:
        return str(error)
    what = f"PEFT {peft.__version__}, loading into {type(model).__name__},"
    try:
        with warnings.catch_warnings(), quietly():
            warnings.simplefilter("ignore")
            dropped, absent = told("refused", base.folder, lambda: _load(model, config, shapes))
    except FormatError as error:
        return Loading(what, names, error=error.what)
    return Loading(what, names, dropped, absent)


def _named_class(config: Mapping[str, Any]) -> str:
    mapping = config.get("auto_mapping")
    if isinstance(mapping, dict) and str(mapping.get("parent_library", "")).startswith("transformers."):
        return str(mapping.get("base_model_class"))
    return CLASSES.get(str(config.get("task_type")), "")


def _built(base: Model, named: str) -> nn.Module:
    """Build the base without weights, by the first of the classes in question that transformers has."""
    import transformers

    config = read_config(base.folder)
    check_counts(config.to_dict(), max(len(base.tensors), 256), base.folder)
    for name in (named, *(getattr(config, "architectures", None) or ()), "AutoModel"):
        found: Any = getattr(transformers, str(name), None) if name else None
        if name in _AUTO or _is_class_of(config, found, transformers.PreTrainedModel):
            break
    make = partial(found.from_config, config, trust_remote_code=False) if name in _AUTO else partial(found, config)
    with torch.device("meta"), no_larger_than(base, base.folder):
        model: nn.Module = told(f"{name} cannot be built", base.folder, make)
    return model


def _is_class_of(config: Any, found: Any, models: type) -> bool:
    """Tell whether what a file names is a class of models, and of models with such a config."""
    return (
        isinstance(found, type) and issubclass(found, models) and isinstance(config, getattr(found, "config_class", ()))
    )


def _check_lists(config: Mapping[str, Any], base: Model) -> None:
    """Refuse an adapter's lists of far more modules than there are: PEFT compares each entry with every other."""
    for key in ("target_modules", "exclude_modules", "layers_to_transform"):
        names, most = config.get(key), max(len(base.tensors), 1000)
        if isinstance(names, list) and len(names) > most:
            raise UnsupportedError(
                f"{key} has {len(names)} entries", rule=f"PEFT is given at most {most} for this base"
            )


def _names_in(base: Model, model: Any) -> dict[str, str]:
    """Names in memory by names in the files; as in transformers, the base's prefix may be there or not."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    found = {}
    for file, name in _saved_names(model).items():
        for tried in (file, prefix + file, file.removeprefix(prefix)):
            if tried in base.tensors:
                found[tried] = name
                break
    return found


def _saved_names(model: Any) -> dict[str, str]:
    """As `transformers_names.saved_names`, by objects: what is on the meta device has no address."""
    held: dict[str, Tensor] = dict(model.state_dict())
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # before version 5 the names were the same
        return {name: name for name in held}
    places = {id(values): name for name, values in held.items()}
    saved: dict[str, Tensor] = revert_weight_conversion(model, dict(held))
    return {name: places[id(values)] for name, values in saved.items() if id(values) in places}


def _load(
    model: nn.Module, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Give the adapter's names that PEFT drops, and those that it misses."""
    from peft import LoraConfig, get_peft_model
    from peft.utils import set_peft_model_state_dict

    known = {field.name for field in fields(LoraConfig)} - _OF_INITIALISATION
    chosen: dict[str, Any] = {key: value for key, value in config.items() if key in known}
    chosen |= {"init_lora_weights": True, "inference_mode": True}
    wrapped: Any = get_peft_model(model, LoraConfig(**chosen), ADAPTER, low_cpu_mem_usage=True)
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    result = set_peft_model_state_dict(wrapped, state, ADAPTER, low_cpu_mem_usage=True)
    missing = [name for name in result.missing_keys if "lora_" in name and ADAPTER in name]
    return _plain(result.unexpected_keys), _plain(missing)


def _plain(names: Sequence[str]) -> tuple[str, ...]:
    """Take PEFT's name of the adapter out of names."""
    return tuple(name.replace(f".{ADAPTER}.", ".").removesuffix(f".{ADAPTER}") for name in names)
