"""Second moments of the inputs of layers, for method regmean: collected from a model, kept in files.

Legend: I inputs of a layer.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eigenzoo.errors import FormatError, UsageError
from eigenzoo.formats.safetensors.file import SafetensorsFile
from eigenzoo.passes.settings import own_settings
from eigenzoo.weights.renames import find_prefixes


def _call(module: nn.Module, batch: Any) -> Any:
    return module(**batch) if isinstance(batch, Mapping) else module(batch)


@own_settings()
@torch.no_grad()
def collect(
    module: nn.Module,
    layers: Collection[str],
    batches: Iterable[Any],
    call: Callable[[nn.Module, Any], Any] = _call,
) -> dict[str, Tensor]:
    """Run a model on batches, and return for each layer Σ x xᵀ of the inputs x of its module, (I, I) float64.

    Args:
        module: the model with the adapter, which is only read.
        layers: names of the adapter's modules, such as `zoo.layers`. One prefix may be missing from them.
        batches: mappings of keyword arguments, or single arguments.
        call: another way to run a batch.

    Raises UsageError if the module does not have these layers, or if no batch reaches one.
    """
    modules = dict(module.named_modules())
    names = list(layers)
    found = find_prefixes(names, modules, lambda name, other: hasattr(modules[other], "weight"))
    if len(found) != 1 and not all(name in modules for name in names):
        raise UsageError(
            f"{len(found)} prefixes fit", where=f"layer '{names[0]}'", rule="each layer is a module of the model"
        )
    places = {name: name if name in modules else found[0](name) for name in names}
    grams: dict[str, Tensor] = {}

    def add(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, given: tuple[Any, ...]) -> None:
            rows = given[0].reshape(-1, given[0].shape[-1]).double().cpu()
            gram = rows.T @ rows
            grams[name] = grams[name] + gram if name in grams else gram

        return hook

    hooks = [modules[place].register_forward_pre_hook(add(name)) for name, place in places.items()]
    try:
        for batch in batches:
            call(module, batch)
    finally:
        for hook in hooks:
            hook.remove()
    missing = [name for name in names if name not in grams]
    if missing:
        raise UsageError("no batch reaches this layer", where=f"layer '{missing[0]}'", rule="every layer needs inputs")
    return grams


def read_grams(
    folder: str | os.PathLike[str], models: Sequence[str], layers: Mapping[str, tuple[int, int]]
) -> dict[str, dict[str, Tensor]]:
    """Read moments by model and layer: files NAME.safetensors in a folder, with an (I, I) tensor for each layer.

    Args:
        models: their names.
        layers: shapes (O, I) by name.
    """
    if not os.path.isdir(folder):
        raise FormatError(
            "there is no such folder",
            where=str(folder),
            rule="--grams names a folder with NAME.safetensors for each model",
            next_step="write it with eigenzoo.merge.input_grams.collect (docs/merge.md)",
        )
    found = {}
    for model in models:
        path = Path(folder) / f"{model}.safetensors"
        file = SafetensorsFile(path)
        for layer, (_, inputs) in layers.items():
            shape = file.tensors[layer].shape if layer in file.tensors else None
            if shape != (inputs, inputs):
                raise FormatError(
                    f"has shape {shape}", where=f"layer '{layer}' of {path}", rule=f"it is a moment of {inputs} inputs"
                )
        found[model] = {layer: file.read(layer).double() for layer in layers}
        bad = [layer for layer, gram in found[model].items() if not bool(torch.isfinite(gram).all())]
        if bad:
            raise FormatError("holds NaN or Inf", where=f"layer '{bad[0]}' of {path}")
    return found
