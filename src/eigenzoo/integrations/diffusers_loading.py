"""Load a LoRA of a diffusion model with diffusers itself, by names and shapes into a pipeline without weights.

So diffusers recognises the tool that wrote the names, and converts them. Nothing is downloaded, no code of a model runs, and no
value is read: all tensors are on torch's meta device.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from eigenzoo.errors import EigenzooError, FormatError, UnsupportedError, install
from eigenzoo.formats.json_file import parse_json
from eigenzoo.formats.kinds import MODEL_INDEX
from eigenzoo.formats.model import Model
from eigenzoo.formats.side_files import CONFIG
from eigenzoo.integrations.dry_tensors import Origins, dropped_of, places_of, refuse_undecided, without_values
from eigenzoo.integrations.model_limits import check_counts, no_larger_than
from eigenzoo.integrations.models import read_config, told
from eigenzoo.integrations.peft_loading import architectures_of, build, names_in
from eigenzoo.passes.process import quietly
from eigenzoo.zoo.adapter import Adapter
from eigenzoo.zoo.verification import Loading

PIPELINES = {
    "LTXVideoTransformer3DModel": "LTXPipeline",
    "SD3Transformer2DModel": "StableDiffusion3Pipeline",
    "UNet2DConditionModel": "StableDiffusionPipeline",
}
"""Pipelines of components whose names do not follow from the component's, as `WanPipeline` follows from `WanTransformer3DModel`."""

MOST_LAYERS = 4_000
"""Largest number of layers of a LoRA for diffusers. PEFT compares all pairs, and real LoRAs have at most two thousand layers."""

MOST_DIGITS = 9
"""Largest number of digits in a name. Longer numbers count as too high."""

_MODEL = re.compile(r"(?P<name>\w+?)Transformer\w*Model")
_ADAPTER = "default"


def load_dry(base: Model, adapter: Adapter) -> Loading | str:
    """Try to load a LoRA into a pipeline, or into one component, with diffusers; a `Loader` of `eigenzoo.verify_adapter`.

    The pipeline has the class in `model_index.json`, or for a single component the class that is named after it. It has only the
    components that LoRAs change.

    Returns a text if loading was not tried: a library is missing, the base has no configs, or diffusers does not have the pipeline.
    Cost: building the components without weights, one or two seconds.
    """
    missing = [name for name in ("diffusers", "transformers", "peft") if find_spec(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (pip install diffusers; {install('peft')})"
    try:
        with warnings.catch_warnings(), quietly(), _quiet_diffusers():
            warnings.simplefilter("ignore")
            return _load(base, adapter)
    except EigenzooError as error:
        return str(error)


def _load(base: Model, adapter: Adapter) -> Loading:
    most = min(MOST_LAYERS, max(2 * len(base.tensors), 1_000))
    if len(adapter.updates) > most:
        raise UnsupportedError(
            f"the LoRA changes {len(adapter.updates)} layers", rule=f"diffusers is given at most {most} for this base"
        )
    high = next((name for name in adapter.shapes if _highest_number(name) > MOST_LAYERS), None)
    if high is not None:
        raise UnsupportedError(
            f"{high[:100]!r} has a number above {MOST_LAYERS:,}",
            rule="diffusers loops over all blocks up to the highest number in a LoRA's names",
        )
    pipeline, modules = _pipeline_of(base)

    def by_pipeline(tensors: dict[str, Tensor]) -> None:
        # The configs in a header have the scale, and no other modules than the tensors.
        pipeline.load_lora_weights(tensors, adapter_name=_ADAPTER, low_cpu_mem_usage=True)

    loading = _tried(base, adapter, modules, type(pipeline).__name__, by_pipeline)
    if loading.is_whole or _is_pipeline(base):
        return loading
    # A single component also loads files that it saved itself, whose names have no component prefix.
    _, modules = _pipeline_of(base)
    module: Any = next(iter(modules.values()))

    def by_component(tensors: dict[str, Tensor]) -> None:
        module.load_lora_adapter(tensors, prefix=None, adapter_name=_ADAPTER, low_cpu_mem_usage=True)

    alone = _tried(base, adapter, modules, f"{type(module).__name__} (load_lora_adapter, prefix=None)", by_component)
    if not alone.is_whole:
        return loading
    lost = f"{type(pipeline).__name__} drops tensors of this LoRA, whose names have no component before them"
    return replace(alone, note=f"{lost}; {type(module).__name__}.load_lora_adapter(…, prefix=None) loads it")


def _highest_number(name: str) -> int:
    """Return the highest number in a name. Like diffusers, read any part between dots and underscores that Python parses as one.

    >>> _highest_number("lora_unet_input_blocks_4_1_proj_in"), _highest_number("blocks.+1_000.q")
    (4, 1000)
    """
    numbers = [digits for part in name.split(".") for digits in _numbers_in(part)]
    return max((int(digits) if len(digits) < MOST_DIGITS else 10**MOST_DIGITS for digits in numbers), default=0)


def _numbers_in(part: str) -> list[str]:
    """Return the numbers in a part of a name. The whole part is a number if Python parses it."""
    whole = part.strip().removeprefix("+")
    return [whole.replace("_", "")] if re.fullmatch(r"\d[\d_]*", whole) else re.findall(r"\d+", part)


def _tried(
    base: Model,
    adapter: Adapter,
    modules: Mapping[str, nn.Module],
    into: str,
    load: Callable[[dict[str, Tensor]], None],
) -> Loading:
    """Load the tensors with diffusers, and find the components' modules that receive them."""
    import diffusers

    names: dict[str, str] = {}
    for component, module in modules.items():
        before = f"{component}." if _is_pipeline(base) else ""
        held = {name.removeprefix(before) for name in base.tensors if name.startswith(before)}
        found = names_in(held, module) if hasattr(module, "base_model_prefix") else {name: name for name in held}
        names |= {before + file: f"{component}.{name}" for file, name in found.items()}
    what = f"diffusers {diffusers.__version__}, loading into {into},"
    tensors = without_values(adapter)
    try:
        # The same limit as for PEFT, which allocates embeddings' factors in memory.
        with torch.device("meta"), Origins(tensors) as origins:
            told("refused", base.folder, lambda: load(dict(tensors)))
    except FormatError as error:
        if isinstance(error.__cause__, AttributeError) and "'NoneType'" in str(error.__cause__):
            raise UnsupportedError(
                f"diffusers needs more components than {', '.join(modules)}, and they are missing",
                where=str(base.folder),
                next_step="name the folder of the whole pipeline",
            ) from error
        refuse_undecided(error)
        return Loading(what, names, error=error.what)
    places: dict[str, tuple[str, ...]] = {}
    for component, module in modules.items():
        for tensor, taken in places_of(origins, module.named_parameters(), f"{component}.").items():
            places[tensor] = (*places.get(tensor, ()), *taken)
    return Loading(what, names, places, dropped_of(adapter, places))


def _is_pipeline(base: Model) -> bool:
    return MODEL_INDEX in base.side_files


def _pipeline_of(base: Model) -> tuple[Any, dict[str, nn.Module]]:
    """Make a pipeline with only those components of the base that LoRAs change. Return it and these components by name."""
    import diffusers

    index = _read_json(base, MODEL_INDEX) if _is_pipeline(base) else {}
    if not index and CONFIG not in base.side_files:
        raise UnsupportedError(
            f"the base has no {CONFIG} and no {MODEL_INDEX}, without which diffusers cannot build it",
            next_step="name the folder of the pipeline, or of the component that the LoRA changes",
        )
    if index:
        name = str(index.get("_class_name"))
    else:
        own = str(_read_json(base, CONFIG).get("_class_name"))
        match = _MODEL.fullmatch(own)
        name = PIPELINES.get(own) or (f"{match['name']}Pipeline" if match else own)
        if own == "UNet2DConditionModel" and _read_json(base, CONFIG).get("addition_embed_type") == "text_time":
            name = "StableDiffusionXLPipeline"
    kind: Any = (
        told("no such pipeline", base.folder, lambda: getattr(diffusers, name, None)) if name.isidentifier() else None
    )
    if name == "None":
        raise UnsupportedError(
            "its config names no class of diffusers, so it is not a pipeline or a component of one",
            where=str(base.folder),
            next_step="name the folder of the pipeline, or of the component that the LoRA changes",
        )
    if not (_is_class(kind, diffusers.DiffusionPipeline) and hasattr(kind, "load_lora_weights")):
        raise UnsupportedError(
            f"diffusers {diffusers.__version__} has no pipeline {name[:100]!r} that loads LoRAs",
            where=str(base.folder),
            next_step="name the folder of a pipeline that it has, or install a newer diffusers",
        )
    loadable = tuple(kind._lora_loadable_modules)
    listed = [part for part in loadable if _is_listed(index.get(part))] if index else loadable[:1]
    modules = {part: module for part in listed if (module := _component(base, part if index else "", index.get(part)))}
    if not modules:
        raise UnsupportedError(
            f"none of {', '.join(loadable)} is there, which LoRAs change",
            where=str(base.folder),
            next_step="download the components too, with their configs",
        )
    # The pipeline's constructor requires components that no LoRA changes.
    pipeline = kind.__new__(kind)
    expected, _ = kind._get_signature_keys(kind)
    pipeline.register_modules(**{part: modules.get(part) for part in expected})
    return pipeline, modules


def _is_listed(entry: object) -> bool:
    # [null, null] means that the pipeline does not have this component.
    return isinstance(entry, list) and bool(entry) and entry[0] is not None


def _component(base: Model, name: str, entry: object) -> nn.Module | None:
    """Build one component without weights, or return None if its folder is missing."""
    file = f"{name}/{CONFIG}" if name else CONFIG
    if file not in base.side_files:
        return None
    folder = base.folder / name
    document = _read_json(base, file)
    if isinstance(entry, list) and entry[:1] == ["transformers"]:
        config = read_config(folder)
        import transformers

        own = [str(entry[-1]), *architectures_of(config)]
        known = [part for part in own if _is_class(getattr(transformers, part, None), transformers.PreTrainedModel)]
        return build(config, (*known, "AutoModel")[0], base, folder)
    import diffusers

    kind_name = str(document.get("_class_name"))
    kind: Any = told("no such model", folder, lambda: getattr(diffusers, kind_name, None))
    if not _is_class(kind, diffusers.ModelMixin):
        raise UnsupportedError(f"diffusers has no model {kind_name[:100]!r}", where=str(folder))
    check_counts(document, max(len(base.tensors), 256), folder)
    with torch.device("meta"), no_larger_than(base, folder):
        made: nn.Module = told(f"{kind_name} cannot be built", folder, lambda: kind.from_config(document))
    return made


def _is_class(found: object, parent: type) -> bool:
    return isinstance(found, type) and issubclass(found, parent)


def _read_json(base: Model, file: str) -> Mapping[str, Any]:
    return parse_json(base.read_side_file(file), where=f"{base.folder}/{file}")


@contextmanager
def _quiet_diffusers() -> Iterator[None]:
    """Hide the output of diffusers while it loads. The checks report everything that matters."""
    from diffusers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(level)
