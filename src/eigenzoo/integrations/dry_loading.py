"""Load an adapter without weights by the library of its format."""

from __future__ import annotations

import threading

from eigenzoo.formats.model import Model
from eigenzoo.integrations import diffusers_loading, peft_loading
from eigenzoo.zoo.adapter import Adapter
from eigenzoo.zoo.verification import Loading

_ONE_AT_A_TIME = threading.RLock()
"""Libraries that load without values replace torch's functions meanwhile. Two threads would each keep the other's replacement."""


def load_dry(base: Model, adapter: Adapter) -> Loading | str:
    """Try to load an adapter into a base: with PEFT if it has PEFT's config, and a diffusion model's LoRA with diffusers.

    A `Loader` of `eigenzoo.verify_adapter`. No value is read. Returns a text if loading was not tried.
    """
    with _ONE_AT_A_TIME:
        if adapter.config is None:
            return diffusers_loading.load_dry(base, adapter)
        return peft_loading.load_dry(base, adapter)
