"""What transformers calls a model's weights in memory, and what it calls them in the files that it writes.

Since version 5 these are not always the same: parts are renamed when a checkpoint is loaded, and named as before when it is saved.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def saved_names(model: Any) -> dict[str, str]:
    """Return the parameter's name in the model by its name in a saved checkpoint, where one tensor there is one here.

    Fused and split weights have no such name, and are left out.
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
