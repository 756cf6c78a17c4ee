"""`digits-lora`: LoRA adapters of one tiny vision transformer, saved as PEFT adapters.

Rank 4, alpha 8, on all four projections of each attention layer. The parent's random two-class head stays frozen, so an adapter
contains only LoRA factors. `adapter_config.json` names the parent as `../_base`, relative to the adapter's own folder, so that the
zoo can be moved and contains no path of this machine. `PeftModel` gets the parent as a model. `AutoPeftModel` would resolve the
name relative to the working folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from eigenzoo.nursery.recipe import PARENT as BASE
from eigenzoo.nursery.recipe import Plan
from eigenzoo.nursery.training import Weights
from eigenzoo.nursery.vit import run
from eigenzoo.passes.draws import seed_generators
from eigenzoo.passes.process import quietly

RANK = 4
ALPHA = 8
TARGETS = ("k_proj", "o_proj", "q_proj", "v_proj")


class LoraKind:
    """Starts, runs and saves the adapters of a `digits-lora` zoo."""

    def __init__(
        self, plan: Plan, parent: Any, *, rank: int = RANK, alpha: int = ALPHA, targets: Sequence[str] = TARGETS
    ) -> None:
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets))
        with quietly():
            self.model: Any = get_peft_model(parent, config).eval()
        # PEFT converts it to a set, whose order on disk would differ from run to run.
        config.target_modules = list(targets)
        self._plan = plan
        self._trained = [name for name, weight in self.model.named_parameters() if weight.requires_grad]

    def forward(self, weights: Weights, images: Tensor) -> Tensor:
        """Return one adapter's logits over the parent."""
        return run(self.model, weights, images)

    def start(self, seed: int) -> Weights:
        """Return PEFT's initial factors: A uniform (Kaiming, a = sqrt 5), B zero.

        A is drawn from the adapter's own seed, or from the zoo's if all adapters share one.
        """
        seed_generators(seed if self._plan.own_init else self._plan.seed)
        for module in self.model.modules():
            if hasattr(module, "reset_lora_parameters"):
                module.reset_lora_parameters("default", init_lora_weights=True)
        weights = dict(self.model.named_parameters())
        return {name: weights[name].detach().clone() for name in self._trained}

    def save(self, weights: Weights, folder: Path, name: str) -> Path:
        """Write one adapter with PEFT, to its path in the zoo's folder, and return its weight file."""
        self.model.peft_config["default"].base_model_name_or_path = "../" * len(Path(name).parts) + BASE
        with torch.no_grad():
            for key, weight in self.model.named_parameters():
                if key in weights:
                    weight.copy_(weights[key])
        # With `save_embedding_layers=False` PEFT does not look for the parent's config, which could end in a request to the hub.
        self.model.save_pretrained(folder / name, save_embedding_layers=False)
        return folder / name / "adapter_model.safetensors"
