"""Weights that DeepSpeed had spread over processes when a model was saved: in the file they are empty."""

from __future__ import annotations

from collections.abc import Mapping

from eigenzoo.errors import FormatError
from eigenzoo.formats.model import TensorInfo


def refuse_partitioned(tensors: Mapping[str, TensorInfo], where: str = "") -> None:
    """Raise FormatError for weights of shape [0], which ZeRO stage 3 leaves of every parameter that was not gathered.

    Only weights count, by their names: a buffer may be empty.
    """
    empty = [name for name, info in tensors.items() if info.shape == (0,) and _is_parameter(name)]
    if empty:
        again = "set stage3_gather_16bit_weights_on_model_save in DeepSpeed's config and save it again"
        whole = (
            "in the run's folder, where global_step… is, run python zero_to_fp32.py . OUT --safe_serialization and open OUT; or "
            f"{again}"
        )
        raise FormatError(
            f"{len(empty)} of {len(tensors)} tensors are empty (shape [0]), such as {empty[0][:200]!r}",
            where=where,
            rule="DeepSpeed's ZeRO stage 3 saves such tensors if weights were not gathered before",
            # What the script gathers of an adapter has names that PEFT does not load.
            next_step=again if any(".lora_" in name for name in empty) else whole,
        )


def _is_parameter(name: str) -> bool:
    return name.endswith(".weight") or ".lora_" in name
