"""Export an adapter of a bundle as a plain PEFT LoRA, which needs neither the bundle nor eigenzoo.

ΔW is already a product of thin matrices. Its least rank comes from the SVD of the middle between their orthonormal bases.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eigenzoo.adapt.maps import Stages, freeze, sides
from eigenzoo.adapt.trained import ZERO
from eigenzoo.errors import FormatError, UnsupportedError, UsageError
from eigenzoo.formats.layout import ModelLayout, TensorLayout
from eigenzoo.formats.lora.peft_folder import PREFIX as MODEL
from eigenzoo.formats.lora.peft_folder import WEIGHTS_FILE
from eigenzoo.formats.model import LoraUpdate
from eigenzoo.formats.output.whole import new_folder
from eigenzoo.formats.safetensors.dtypes import dtype_name
from eigenzoo.formats.safetensors.file import SafetensorsFile
from eigenzoo.formats.writers import write_lora
from eigenzoo.integrations.peft_tuner.config import EigenzooConfig, open_bundle
from eigenzoo.integrations.peft_tuner.layer import CONV, CONV1D, EMBEDDING, LINEAR, OTHER_CONV, PARTS, EigenzooLayer
from eigenzoo.integrations.peft_tuner.places import Place, parts_of
from eigenzoo.integrations.peft_tuner.registration import PeftModel, get_peft_model_state_dict
from eigenzoo.linalg import lora
from eigenzoo.linalg.lora import Factors


def export_lora(
    peft_model_or_path: PeftModel | str | os.PathLike[str],
    out: str | os.PathLike[str],
    adapter_name: str = "default",
    rank: int | None = None,
    *,
    bundle: str | os.PathLike[str] | None = None,
) -> Path:
    """Write an adapter as a plain PEFT LoRA. It gives the same outputs with PEFT, vLLM and all other LoRA loaders.

    Args:
        peft_model_or_path: a model with the adapter, or the folder of the saved adapter, which needs the bundle.
        out: a new folder, which appears complete or not at all.
        adapter_name: the adapter of a model.
        rank: the largest rank. Default: that of ΔW, exact to 1e-5 of its norm. All layers have one rank, and alpha = r.
        bundle: the current path of a saved adapter's bundle.

    Raises UnsupportedError for convolutions with groups, dilation or another padding mode, which PEFT computes differently. Raises
    UsageError for a saved adapter that starts from the mean of full weights: its ΔW is relative to the base, so export it from the
    model. Such a ΔW can have any rank. For others the rank is at most that of the middle. Cost: per layer (O + I)·P² + P³ for a
    middle of P; float64.
    """
    if isinstance(peft_model_or_path, nn.Module):
        model: Any = peft_model_or_path
        config = model.peft_config.get(adapter_name)
        if not isinstance(config, EigenzooConfig) or config.modules is None:
            raise UsageError(f"the model has no adapter of eigenzoo called {adapter_name!r}")
        state = get_peft_model_state_dict(model, adapter_name=adapter_name)
        updates = _of_model(model, adapter_name)
    else:
        folder = Path(peft_model_or_path)
        config = EigenzooConfig.from_pretrained(str(folder), bundle=bundle)
        file = SafetensorsFile(folder / WEIGHTS_FILE, folder)
        state = {name: file.read(name) for name in file.tensors}
        updates = _of_files(config, state, folder)
    target = Path(out)
    with new_folder(target) as staging:
        _write(staging, config, dict(updates), state, rank)
    return target


def _of_model(model: nn.Module, adapter: str) -> Iterator[tuple[str, Stages]]:
    prefix = "base_model.model."
    for name, module in model.named_modules():
        if isinstance(module, EigenzooLayer) and adapter in module.eigenzoo_uses:
            with torch.no_grad():
                yield name.removeprefix(prefix), module.stages(adapter)


def _of_files(config: EigenzooConfig, state: Mapping[str, Tensor], folder: Path) -> Iterator[tuple[str, Stages]]:
    space = open_bundle(config)
    if space.view == "weight" and config.start != ZERO:
        raise UsageError(
            "the weights are the zoo's, not a change of a base",
            where=str(folder),
            next_step="export it from the model",
        )
    if config.random_basis:
        raise UsageError(
            "an adapter in a random basis is only a control", where=str(folder), next_step="export it from the model"
        )
    if config.modules is None:
        raise FormatError("the config names no modules", where=str(folder), rule="EigenzooModel fills them in")
    parts = parts_of(space)
    for module, (kind, name) in config.modules.items():
        place = Place(kind, name, parts[name])
        stages = []
        for part, layer in place.parts.items():
            key = f"{MODEL}{module}.{part}.coefficients"
            mean = config.start != ZERO or part == "eigenzoo_a"
            form = space.layers[layer].low_rank(mean=mean)
            expected = space.layers[layer].coefficient_shape if form is None else (form.num_numbers,)
            if key not in state or tuple(state[key].shape) != expected:
                raise FormatError(f"{key} is missing, or of another shape", where=str(folder))
            numbers = state[key].double()
            frozen = freeze(space.layers[layer], transposed=place.transposed(space.view), dtype=torch.float64)
            offset = space.layers[layer].removed() if space.layers[layer].layer.kind != "update" else None
            frozen.offset = offset.expand(space.layers[layer].layer.shape) if mean and offset is not None else None
            stages.append(frozen.chains(numbers if form is None else form.matrices(numbers), mean))
        yield module, stages


def _write(
    folder: Path, config: EigenzooConfig, updates: Mapping[str, Stages], state: Mapping[str, Tensor], rank: int | None
) -> None:
    kinds = {module: kind for module, (kind, _) in (config.modules or {}).items() if module in updates}
    factors = {module: _factors(stages, rank) for module, stages in updates.items()}
    others = {name: values.detach().cpu() for name, values in state.items() if not _is_ours(name)}
    laid_out = {module: _laid_out(module, kinds[module], factors[module]) for module in updates}
    tensors = [
        TensorLayout(key, "F32", shape)
        for update in laid_out.values()
        for key, shape in zip((update.key_a, update.key_b), update.factor_shapes, strict=True)
    ]
    tensors += [TensorLayout(name, dtype_name(values.dtype), tuple(values.shape)) for name, values in others.items()]
    layout = ModelLayout("lora", {WEIGHTS_FILE: tuple(tensors)}, updates=laid_out)
    write_lora(folder, layout, _lora_config(config, kinds), factors, others=others)


def _is_ours(name: str) -> bool:
    return any(f".{part}." in name for part in PARTS)


def _factors(stages: Stages, rank: int | None) -> Factors:
    left, right = sides([[[part.detach().cpu() for part in chain] for chain in chains] for chains in stages])
    if not left.shape[1]:
        left, right = left.new_zeros(left.shape[0], 1), right.new_zeros(1, right.shape[1])
    (factor_b, factor_a), _ = lora.truncated(left, right, rank)
    return factor_b, factor_a


def _laid_out(module: str, kind: str, factors: Factors) -> LoraUpdate:
    """Return PEFT's keys and shapes for the factors of a module of this kind."""
    b_OR, a_RI = factors
    shape_a, shape_b = tuple(a_RI.shape), tuple(b_OR.shape)
    keys = [f"{MODEL}{module}.lora_{side}.weight" for side in "AB"]
    name, _, sizes = kind.partition(":")
    if name == EMBEDDING:
        keys = [f"{MODEL}{module}.lora_embedding_{side}" for side in "AB"]
    elif name == OTHER_CONV:
        raise UnsupportedError(
            "convolutions with groups, dilation or padding other than zeros cannot be exported",
            where=f"module '{module}'",
            rule="PEFT's LoRA computes something else for such layers",
            next_step="merge_and_unload() the model, or leave the layer out with exclude_modules",
        )
    elif name == CONV:
        kernel = tuple(int(size) for size in sizes.split("x"))
        if prod(kernel) != a_RI.shape[1]:
            raise FormatError(f"kernel {sizes} for {a_RI.shape[1]} inputs", where=f"module '{module}'")
        shape_a, shape_b = (shape_a[0], *kernel), (*shape_b, *(1 for _ in kernel[1:]))
    elif name not in (LINEAR, CONV1D):
        raise FormatError(f"modules of kind {kind[:40]!r} are not supported", where=f"module '{module}'")
    return LoraUpdate(module, keys[0], keys[1], (b_OR.shape[0], a_RI.shape[1]), a_RI.shape[0], 1.0, (shape_a, shape_b))


def _lora_config(config: EigenzooConfig, kinds: Mapping[str, str]) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": config.task_type,
        "auto_mapping": config.auto_mapping,
        "base_model_name_or_path": config.base_model_name_or_path,
        "revision": config.revision,
        "inference_mode": True,
        "bias": "none",
        "fan_in_fan_out": CONV1D in kinds.values(),
        "lora_dropout": 0.0,
        "target_modules": sorted(kinds),
        "modules_to_save": config.modules_to_save,
    }
