"""Weights that DeepSpeed had spread over processes when a model was saved: in the file they are empty."""

from __future__ import annotations

from collections.abc import Mapping

from eigenzoo.errors import FormatError
from eigenzoo.formats.model import TensorInfo


def refuse_partitioned(tensors: Mapping[str, TensorInfo], where: str = "") -> None:
    """Raise FormatError for weights of shape [0], which ZeRO stage 3 leaves of every parameter that was not gathered.

    Only names that end in `.weight` count: a buffer may be empty.
    """
    empty = [name for name, info in tensors.items() if info.shape == (0,) and name.endswith(".weight")]
    if empty:
        raise FormatError(
            f"{len(empty)} of {len(tensors)} tensors are empty (shape [0]), such as {empty[0][:200]!r}",
            where=where,
            rule="DeepSpeed's ZeRO stage 3 leaves such tensors where weights were not gathered before they were saved",
            next_step="gather them from the run's checkpoint, where the folder global_step… is: python zero_to_fp32.py . OUT "
            "--safe_serialization; or set stage3_gather_16bit_weights_on_model_save and save again",
        )
