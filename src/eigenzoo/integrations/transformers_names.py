"""Map transformers' names of weights in files to their names in memory.

Since version 5 they can differ: names are changed when a checkpoint is loaded, and changed back when it is saved.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def saved_names(model: Any) -> dict[str, str]:
    """Return parameter names in the model by names in a saved checkpoint.

    Fused and split weights have no one-to-one names and are left out.
    """
    held: dict[str, Tensor] = dict(model.state_dict())
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # before version 5 the names were the same
        return {name: name for name in held}
    places = {(values.data_ptr(), values.shape): name for name, values in held.items()}
    saved: dict[str, Tensor] = revert_weight_conversion(model, dict(held))
    found = {name: places.get((values.data_ptr(), values.shape)) for name, values in saved.items()}
    return {name: parameter for name, parameter in found.items() if parameter is not None}
