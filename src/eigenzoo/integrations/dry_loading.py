"""Load an adapter without weights by the library of its format."""

from __future__ import annotations

from eigenzoo.formats.model import Model
from eigenzoo.integrations import diffusers_loading, peft_loading
from eigenzoo.zoo.adapter import Adapter
from eigenzoo.zoo.verification import Loading


def load_dry(base: Model, adapter: Adapter) -> Loading | str:
    """Try to load an adapter into a base: with PEFT if it has PEFT's config, and a diffusion model's LoRA with diffusers.

    A `Loader` of `eigenzoo.verify_adapter`. No value is read. Returns a text if loading was not tried.
    """
    if adapter.config is None:
        return diffusers_loading.load_dry(base, adapter)
    return peft_loading.load_dry(base, adapter)
