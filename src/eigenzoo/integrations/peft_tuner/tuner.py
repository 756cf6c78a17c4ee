"""The tuner of PEFT that adds an adapter of a bundle to the layers of a model."""

from __future__ import annotations

import copy
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from eigenzoo.adapt.maps import dense_mean, freeze
from eigenzoo.adapt.trained import ZERO, Start, begin, scales_of
from eigenzoo.errors import MismatchError, UnsupportedError, UsageError
from eigenzoo.integrations.peft_tuner.config import EigenzooConfig, open_bundle, start_of
from eigenzoo.integrations.peft_tuner.layer import FLOATS, EigenzooLayer, Part, base_of, layer_for
from eigenzoo.integrations.peft_tuner.mixed import AdapterNamesError, mixed_of
from eigenzoo.integrations.peft_tuner.places import Place, find_places
from eigenzoo.integrations.peft_tuner.registration import (
    PREFIX,
    BaseTuner,
    BaseTunerLayer,
    _ExcludedModule,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
    register,
)
from eigenzoo.subspace.subspace import Subspace

MOST_DRAWS = 2**61 - 1
"""Modulus of seeds of layers' random bases. It is a prime, so that two adapters' seeds give different ones."""


def layer_seed(seed: int, layer: str) -> int:
    """Return the seed of one layer's random basis. It differs for every layer and does not depend on the adapted layers."""
    return ((seed << 32) + zlib.crc32(layer.encode())) % MOST_DRAWS


class _Attaching:
    """Data of a bundle while an adapter is added to a model."""

    def __init__(self, config: EigenzooConfig, space: Subspace, places: dict[str, Place]) -> None:
        self.space, self.places = space, places
        self.start = start_of(config, space, is_known=config.modules is not None)
        self.seed = config.seed if config.random_basis else None

    def parts(self, module_name: str, module: nn.Module) -> dict[str, Part]:
        """Return the parts of an adapter in a module."""
        place = self.places[module_name]
        return {part: self._part(place, part, layer, module) for part, layer in place.parts.items()}

    def _part(self, place: Place, part: str, layer: str, module: nn.Module) -> Part:
        rows_NK, basis = self.space.all_coefficients[layer], self.space.layers[layer]
        seed = None if self.seed is None else layer_seed(self.seed, layer)
        mean = _mean(self.start, part)
        values, scales = self.start.values.get(layer, torch.zeros_like(rows_NK[0])).float(), scales_of(rows_NK)
        form, zoo = basis.low_rank(mean=mean and seed is None), basis.low_rank()
        if form is not None and zoo is not None:
            values, scales = begin(values, rows_NK, form, zoo)
        return Part(
            begin=values,
            scales=scales,
            form=form,
            mean=mean,
            key=f"{self.space.manifest.basis_id[:16]}-{part}" + ("" if seed is None else f"-{self.seed}"),
            freeze=partial(freeze, basis, transposed=place.transposed(self.space.view), seed=seed),
            offset=partial(self._offset, layer, module),
        )

    def _offset(self, layer: str, module: nn.Module) -> Tensor | None:
        """Return the change of the weight by the zoo's mean."""
        mean_OI = dense_mean(self.space.layers[layer], is_random=self.seed is not None)
        if mean_OI is None or self.space.view != "weight":
            return mean_OI
        weight: Any = base_of(module).weight
        if isinstance(module, BaseTunerLayer) and module.merged:
            raise UsageError(
                "another adapter is merged", where=f"layer '{layer}'", next_step="call unmerge_adapter() first"
            )
        if weight.dtype not in FLOATS:
            raise UnsupportedError("a quantised layer cannot start from the zoo's mean", where=f"layer '{layer}'")
        weight_OI: Tensor = weight.detach().cpu().double().reshape(mean_OI.shape)
        return mean_OI - weight_OI


def _mean(start: Start, part: str) -> bool:
    """Tell whether a part contains the zoo's mean. A LoRA without a change has B = 0, and a nonzero A, so that B has a gradient."""
    return start.mean or part == "eigenzoo_a"


class EigenzooModel(BaseTuner):  # type: ignore[misc]
    """A model with coefficients in its layers, made by PEFT's `get_peft_model` and `PeftModel.from_pretrained`.

    Raises the errors of opening the bundle, MismatchError for a model of another zoo, and UsageError for a parametrised weight.
    """

    prefix = PREFIX
    tuner_layer_cls = EigenzooLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  (PEFT's name and type)
    _attaching: _Attaching | None = None

    def inject_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Add an adapter to the model. Called by PEFT."""
        try:
            super().inject_adapter(*args, **kwargs)
        finally:
            self._attaching = None

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Use the adapters of `adapter_names`, one for each row, during a call of the model. Called by PEFT."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if self.training:
            raise AdapterNamesError(
                "adapter_names is given in training mode", next_step="call eval(), or train one adapter at a time"
            )
        layers = [layer for layer in self.modules() if isinstance(layer, EigenzooLayer)]
        known = {adapter for layer in layers for adapter in layer.eigenzoo_uses}
        device = next(self.parameters()).device
        config = kwargs.get("generation_config") or getattr(self.model, "generation_config", None)
        sizes = [kwargs.get(name) or getattr(config, name, None) or 1 for name in ("num_beams", "num_return_sequences")]
        mixed = mixed_of(names, known, device, max(sizes))
        for layer in layers:
            layer.eigenzoo_mixed = mixed
        try:
            yield
        finally:
            for layer in layers:
                layer.eigenzoo_mixed = None

    def _prepare_adapter_config(self, peft_config: EigenzooConfig, model_config: Any) -> EigenzooConfig:
        return peft_config

    def _prepare_model(self, peft_config: EigenzooConfig, model: nn.Module) -> None:
        """Open the bundle, find its layers in the model, and complete the config."""
        space = open_bundle(peft_config)
        probe = _probe(_maybe_include_all_linear_layers(peft_config, model))
        places, left_out = find_places(
            space,
            model,
            self._known(peft_config),
            lambda name: bool(check_target_module_exists(probe, name)),
            peft_config.prefix,
        )
        for name in places:
            if parametrize.is_parametrized(base_of(model.get_submodule(name)), "weight"):
                raise UsageError(
                    "its weight already has a parametrization",
                    where=f"module '{name}'",
                    rule="adapters need plain weights, into which they can be merged",
                    next_step="remove it first: eigenzoo.adapt.detach, or torch.nn.utils.parametrize.remove_parametrizations",
                )
        found = {name: [place.kind, place.name] for name, place in places.items()}
        if peft_config.modules is not None and peft_config.modules != found:
            changed = sorted(set(found) ^ set(peft_config.modules)) or ["kinds"]
            raise MismatchError(
                f"the adapter has {len(peft_config.modules)} modules, but the model has {len(found)} ({', '.join(changed[:3])})",
                rule="an adapter fits only the kind of model that it was trained with",
                next_step="load it into that model, or make a new config",
            )
        if left_out and peft_config.start != ZERO:
            warnings.warn(
                f"{len(left_out)} layers of the bundle are no weights of linear layers, convolutions or embeddings, and stay "
                f"as they are in the model: {', '.join(left_out[:3])}",
                stacklevel=2,
            )
        self._attaching = _Attaching(peft_config, space, places)
        peft_config.modules = found

    def _known(self, config: EigenzooConfig) -> dict[str, str]:
        """Return the modules of other adapters' layers, because names can only be looked up in an unchanged model."""
        others = (other.modules for other in self.peft_config.values() if other is not config)
        return {entry[1]: name for modules in others if modules for name, entry in modules.items()}

    @staticmethod
    def _check_target_module_exists(peft_config: EigenzooConfig, key: str) -> Any:
        found = check_target_module_exists(_probe(peft_config), key)
        return found if isinstance(found, _ExcludedModule) else key in (peft_config.modules or {})

    def _create_and_replace(
        self,
        peft_config: EigenzooConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **unused: Any,
    ) -> None:
        assert self._attaching is not None
        parts = self._attaching.parts(current_key, target)
        if isinstance(target, EigenzooLayer):
            target.update_layer(adapter_name, parts, inference_mode=peft_config.inference_mode)
            return
        layer: Any = layer_for(target)
        layer._active_adapter = adapter_name
        layer.update_layer(adapter_name, parts, inference_mode=peft_config.inference_mode)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)


def _probe(config: EigenzooConfig) -> EigenzooConfig:
    """Return the config for PEFT's name rule, in which no targets mean all modules."""
    if config.target_modules is not None:
        return config
    probe = copy.copy(config)
    probe.target_modules = ".*"
    return probe


register(EigenzooConfig, EigenzooModel)
