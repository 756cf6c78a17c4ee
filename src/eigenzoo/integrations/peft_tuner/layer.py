"""Add coefficients to a model's layers: W x + ΔW(c) x, with one class for each kind of layer.

Bases are frozen and shared by all adapters of one bundle. A layer computes in the dtype of its inputs, and coefficients are
float32. ΔW is L(c) of one basis, or with view `factors` a product of two: L_B(c_B) · L_A(c_A).
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from eigenzoo.adapt.maps import Map, Stages, apply, dense, follow
from eigenzoo.adapt.trained import Coefficients, without_autocast
from eigenzoo.errors import DataError, UnsupportedError
from eigenzoo.integrations.peft_tuner.mixed import AdapterNamesError, Mixed, add_one_by_one, add_stacked, stacked
from eigenzoo.integrations.peft_tuner.registration import BaseTunerLayer, check_adapters_to_merge
from eigenzoo.linalg.low_rank import LowRank
from eigenzoo.serve.layers import Chain, shared_by_rows

LINEAR, CONV1D, EMBEDDING, CONV, OTHER_CONV = "linear", "conv1d", "embedding", "conv", "other-conv"
"""Kinds of layers. The last one is convolutions with groups, dilation or padding other than zeros, which PEFT's LoRA ignores."""

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
PARTS = {"eigenzoo_update": "", "eigenzoo_a": ".lora_A", "eigenzoo_b": ".lora_B"}
"""The trained coefficients, and the suffix of the bundle's layer after the module's name, in the order of computation."""


class NotFiniteError(DataError, ValueError):
    """A merge results in NaN or Inf. Also a ValueError, like the errors of PEFT's own methods."""


class SavedCoefficients(Coefficients):
    """Coefficients whose state is c. Training changes θ, and files contain c.

    Loading sets the start to the saved c and θ to zero, so that the loaded coefficients have the same bits.
    """

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        values = self.theta if self.theta.is_meta else self.numbers()
        destination[prefix + "coefficients"] = values if keep_vars else values.detach()

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        values = state_dict.get(prefix + "coefficients")
        if values is None:
            missing_keys.append(prefix + "coefficients")
            return
        if values.shape != self.start.shape:
            shapes = f"{tuple(values.shape)} for {tuple(self.start.shape)}"
            error_msgs.append(f"size mismatch for {prefix}coefficients: {shapes}.")
            return
        with torch.no_grad():
            self.start = values.detach().to(self.start)
            if self.theta.is_meta:
                self.theta = nn.Parameter(torch.zeros_like(self.start), requires_grad=self.theta.requires_grad)
            self.theta.zero_()


@dataclass(frozen=True)
class Part:
    """One basis of an adapter in a layer: its coefficients' start and scales, and how to read it.

    Attributes:
        begin: initial values of the trained numbers.
        scales: see `eigenzoo.adapt.trained`.
        form: how low-rank cores follow from the numbers, their two factors; None for other coefficients.
        mean: whether ΔW contains the zoo's mean.
        key: key of the basis among those of the same layer.
        freeze: function that reads the basis. It is called if the layer does not have the basis yet.
        offset: function that returns the additional term of start `mean`.
    """

    begin: Tensor
    scales: Tensor
    form: LowRank | None
    mean: bool
    key: str
    freeze: Callable[[], Map]
    offset: Callable[[], Tensor | None]


@dataclass(frozen=True)
class _Use:
    """The basis of an adapter's coefficients."""

    key: str
    mean: bool


class EigenzooLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """A layer of the base and the changes by adapters.

    Attributes:
        base_layer: the original layer, unchanged.
        in_features, out_features: its sizes, as in PEFT's layers; for a convolution its channels.
        eigenzoo_update, eigenzoo_a, eigenzoo_b: coefficients by adapter.
        eigenzoo_uses: the basis by adapter and part.
        eigenzoo_bases: the frozen bases, by their keys.
        eigenzoo_mixed: the adapters of the rows of a batch, during a call with `adapter_names`.
    """

    adapter_layer_names = tuple(PARTS)
    other_param_names = ("eigenzoo_uses",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = _features_of(self._base())
        for name in PARTS:
            self.add_module(name, nn.ModuleDict())
        self.eigenzoo_uses: dict[str, dict[str, _Use]] = {}
        self.eigenzoo_bases = nn.ModuleDict()
        self._disable_adapters = False
        self.eigenzoo_mixed: Mixed | None = None
        self.merged_adapters: list[str] = []

    def update_layer(self, adapter: str, parts: Mapping[str, Part], *, inference_mode: bool = False) -> None:
        """Add an adapter with parts by the names of PARTS. Existing bases are used again."""
        device, dtype = self._placement()
        tuner: Any = self  # torch's type of PEFT's methods
        uses = {}
        for name, part in parts.items():
            if part.key not in self.eigenzoo_bases:
                self.eigenzoo_bases[part.key] = self._laid_out(part.freeze()).cast(device, dtype)
            if part.mean and self._basis(part.key).offset is None:
                self._basis(part.key).offset = part.offset()
                self._basis(part.key).cast(device, dtype)
            coefficients = SavedCoefficients(part.begin.to(device), part.scales.to(device), part.form)
            getattr(self, name)[adapter] = coefficients
            uses[name] = _Use(part.key, part.mean)
        self.eigenzoo_uses[adapter] = uses
        tuner.set_adapter(tuner.active_adapters, inference_mode=inference_mode)

    def stages(self, adapter: str) -> Stages:
        """Return the current ΔW of an adapter as products of thin matrices."""
        return [
            self._basis(use.key).chains(getattr(self, name)[adapter](), use.mean)
            for name, use in self.eigenzoo_uses[adapter].items()
        ]

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return ΔW of an adapter in the shape of the layer's weight, in float32, or float64 if the weight is."""
        weight = self._plain_weight("gives no ΔW")
        with without_autocast(weight.device):
            matrix = dense(self.stages(adapter), torch.promote_types(weight.dtype, torch.float32))
        return self._as_weight(matrix).reshape(weight.shape)

    def forward(self, inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's output plus the changes by the active adapters."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return cast(Tensor, self.base_layer(inputs, *args, **kwargs))
        result: Tensor = self.base_layer(inputs, *args, **kwargs)
        if self.eigenzoo_mixed is not None:
            return self._add_mixed(self.eigenzoo_mixed, inputs, result)
        if self.merged:
            return result
        for adapter in cast(list[str], self.active_adapters):
            if adapter in self.eigenzoo_uses:
                result = result + self._added(adapter, inputs, result.dtype).to(result.dtype)
        return result

    def _add_mixed(self, mixed: Mixed, inputs: Tensor, result: Tensor) -> Tensor:
        """Return the output plus the change by each row's adapter."""
        if self.merged:
            raise AdapterNamesError(
                "adapter_names is given, but adapters are merged", next_step="call unmerge_adapter() first"
            )
        if shared_by_rows(mixed.rows, self._base(), inputs):
            inputs, result = (values.expand(mixed.rows.num_rows, *values.shape[1:]) for values in (inputs, result))
        pick, left = mixed.pick(inputs, self._base()), dict(enumerate(mixed.adapters, 1))
        left = {slot: adapter for slot, adapter in left.items() if adapter in self.eigenzoo_uses}
        for key in dict.fromkeys(self._one_basis(adapter) for adapter in left.values()):
            chain = None if key is None else self._stacked(mixed, key)
            if chain is not None:
                result = add_stacked(self._base(), inputs, result, chain, pick)
                left = {slot: adapter for slot, adapter in left.items() if self._one_basis(adapter) != key}
        if not left:
            return result
        return add_one_by_one(
            inputs, result, pick, list(left), lambda slot, rows: self._added(left[slot], rows, result.dtype)
        )

    def _one_basis(self, adapter: str) -> str | None:
        """Return the key of an adapter's basis, or None if it has two, or a mean beside the basis."""
        (use, *others) = self.eigenzoo_uses[adapter].values()
        return None if others or (use.mean and self._basis(use.key).offset is not None) else use.key

    def _stacked(self, mixed: Mixed, key: str) -> Chain | None:
        """Return the chain of all adapters of a basis, computed once during a call of the model."""
        place = (id(self), key)
        if place not in mixed.chains:
            all_parts = [
                self.stages(adapter)[0][0]
                if adapter in self.eigenzoo_uses and self._one_basis(adapter) == key
                else None
                for adapter in mixed.adapters
            ]
            basis = self._basis(key)
            first = basis.after if basis.transposed else basis.before
            chain = stacked(all_parts, 0 if first is None else 1)
            if chain is None:
                return None
            mixed.chains[place] = chain
        return mixed.chains[place]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add ΔW to the layer's weight. With `safe_merge`, raise DataError and change nothing if the result is not finite.

        Raises UnsupportedError for quantised weights, whose rounding would change the outputs.
        """
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter not in self.eigenzoo_uses:
                continue
            weight = self._plain_weight("cannot be merged into")
            with torch.no_grad():
                merged = (weight + self.get_delta_weight(adapter)).to(weight.dtype)
                if safe_merge and not bool(torch.isfinite(merged).all()):
                    raise NotFiniteError(f"NaNs detected in the merged weights: adapter {adapter!r} seems to be broken")
                weight.copy_(merged)
            self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Subtract the ΔW of all merged adapters from the layer's weight. Exact up to the rounding of its dtype."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        while self.merged_adapters:
            adapter = self.merged_adapters.pop()
            if adapter in self.eigenzoo_uses:
                weight = self._plain_weight("cannot be unmerged")
                with torch.no_grad():
                    weight.copy_((weight - self.get_delta_weight(adapter)).to(weight.dtype))

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, and bases that no other adapter uses."""
        super().delete_adapter(adapter_name)
        used = {use.key for uses in self.eigenzoo_uses.values() for use in uses.values()}
        for key in set(self.eigenzoo_bases.keys()) - used:
            del self.eigenzoo_bases[key]

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT can convert it to a LoRA. `export_lora` does so exactly."""
        return True

    def __repr__(self) -> str:
        return "eigenzoo." + str(super().__repr__())

    def _base(self) -> Any:
        return self.get_base_layer()  # type: ignore[operator]

    def _basis(self, key: str) -> Map:
        return cast(Map, self.eigenzoo_bases[key])

    def _placement(self) -> tuple[torch.device, torch.dtype]:
        """Return device and dtype of the bases: those of the weight, or for quantised weights those of computation."""
        base = self._base()
        weight = next((part for name in ("weight", "qweight") if (part := getattr(base, name, None)) is not None), None)
        device = torch.device("cpu") if weight is None or weight.is_meta else weight.device
        dtype = None if weight is None else weight.dtype
        dtype = dtype if dtype in FLOATS else getattr(base, "compute_dtype", None)
        return device, dtype if dtype in FLOATS else torch.float32

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move an adapter to its layer's device without changing its coefficients' dtype."""
        placed, dtype = self._placement()
        for name, use in self.eigenzoo_uses.get(adapter_name, {}).items():
            self._basis(use.key).cast(device or placed, dtype)
            getattr(self, name)[adapter_name].to(device or placed)

    def _plain_weight(self, what: str) -> Tensor:
        weight = getattr(self._base(), "weight", None)
        if isinstance(weight, Tensor) and weight.dtype in FLOATS and weight.numel() == prod(self.matrix_shape()):
            return weight.data
        raise UnsupportedError(
            f"a quantised layer {what}",
            where=type(self._base()).__name__,
            rule="weights are float64, float32, bfloat16 or float16",
            next_step="load the base without quantising it, or serve the adapter beside it (export_lora)",
        )

    def matrix_shape(self) -> tuple[int, int]:
        """Return (outputs, inputs) of ΔW."""
        return shape_of(self._base())

    def _laid_out(self, basis: Map) -> Map:
        return basis

    @abstractmethod
    def _added(self, adapter: str, inputs: Tensor, dtype: torch.dtype) -> Tensor:
        """Return ΔW x for the layer's inputs."""

    def _as_weight(self, matrix_OI: Tensor) -> Tensor:
        return matrix_OI


class EigenzooLinear(EigenzooLayer):
    """A linear layer, quantised or not, or GPT-2's Conv1D, whose weight is transposed."""

    def _added(self, adapter: str, inputs: Tensor, dtype: torch.dtype) -> Tensor:
        values = inputs if inputs.dtype in FLOATS else inputs.to(dtype)
        return follow(self.stages(adapter), values, apply)

    def _as_weight(self, matrix_OI: Tensor) -> Tensor:
        return matrix_OI.T if isinstance(self._base(), Conv1D) else matrix_OI


class EigenzooEmbedding(EigenzooLayer):
    """An embedding. Rows of its weight are columns of ΔW."""

    def _added(self, adapter: str, inputs: Tensor, dtype: torch.dtype) -> Tensor:
        # This looks up rows of a weight and multiplies no activations. Autocast does not change the base's embedding either.
        with without_autocast(inputs.device):
            added = follow(self.stages(adapter), inputs, lambda part, ids: embedding(ids, part.T).to(dtype))
        scale = cast(Any, self)._get_embed_scale()
        return added if scale is None else added * scale.to(added.dtype)

    def _as_weight(self, matrix_OI: Tensor) -> Tensor:
        return matrix_OI.T


class EigenzooConv(EigenzooLayer):
    """A convolution of one to three dimensions. Its inputs are channels times kernel entries."""

    def _added(self, adapter: str, inputs: Tensor, dtype: torch.dtype) -> Tensor:
        base = self._base()
        stages = self.stages(adapter)
        if base.groups > 1:  # outputs depend on their own group only, and so cannot be combined from shared activations
            with without_autocast(inputs.device):
                stages = [[[dense(stages, torch.promote_types(inputs.dtype, torch.float32))]]]
        kernel = base.weight.shape[1:]

        def convolve(part: Tensor, x: Tensor) -> Tensor:
            found: Tensor = base._conv_forward(x, part.reshape(-1, *kernel).to(x.dtype), None)
            return found.movedim(1, -1)

        return follow(stages, inputs, convolve).movedim(-1, 1)

    def _laid_out(self, basis: Map) -> Map:
        return basis.contiguous()


def base_of(module: nn.Module) -> nn.Module:
    """Return a module, or the original one if adapters wrap it."""
    return cast(nn.Module, cast(Any, module).get_base_layer()) if isinstance(module, BaseTunerLayer) else module


def kind_of(module: nn.Module) -> str | None:
    """Return the kind of a layer, for a convolution with channels and kernel; None for layers that cannot have coefficients."""
    if isinstance(module, Conv1D):
        return CONV1D
    if isinstance(module, nn.Embedding):
        return EMBEDDING
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        is_plain = module.groups == 1 and set(module.dilation) == {1} and module.padding_mode == "zeros"
        sizes = (module.weight.shape[1], *module.kernel_size)
        return f"{CONV if is_plain else OTHER_CONV}:{'x'.join(map(str, sizes))}"
    # torch's attention reads its output layer's weight and never calls the layer.
    if isinstance(module, NonDynamicallyQuantizableLinear) or not all(_features(module)):
        return None
    return LINEAR


def shape_of(module: nn.Module) -> tuple[int, int]:
    """Return (outputs, inputs) of a layer with a kind."""
    if isinstance(module, Conv1D):
        return module.weight.shape[1], module.weight.shape[0]
    if isinstance(module, nn.Embedding):
        return module.embedding_dim, module.num_embeddings
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return module.out_channels, prod(module.weight.shape[1:])
    return _features(module)


def _features_of(module: nn.Module) -> tuple[int, int]:
    """Return (inputs, outputs) like PEFT: rows and columns of an embedding, channels of a convolution."""
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return module.in_channels, module.out_channels
    outputs, inputs = shape_of(module)
    return inputs, outputs


def _features(module: nn.Module) -> tuple[int, int]:
    """Return outputs and inputs of a linear layer by either of their attribute names in quantised layers; zeros for others."""
    for out_name, in_name in (("out_features", "in_features"), ("outfeatures", "infeatures")):
        outputs, inputs = getattr(module, out_name, None), getattr(module, in_name, None)
        if isinstance(outputs, int) and isinstance(inputs, int):
            return outputs, inputs
    return 0, 0


def layer_for(module: nn.Module) -> EigenzooLayer:
    """Wrap a layer with a kind."""
    base = base_of(module)
    if isinstance(base, nn.Embedding):
        return EigenzooEmbedding(module)
    if isinstance(base, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return EigenzooConv(module)
    return EigenzooLinear(module)
