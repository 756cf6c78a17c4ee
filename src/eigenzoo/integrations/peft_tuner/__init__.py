"""Train only coefficients in a bundle's frozen basis, as a method of PEFT.

    from peft import get_peft_model
    from eigenzoo.integrations.peft_tuner import EigenzooConfig, export_lora

    model = get_peft_model(model, EigenzooConfig(bundle="bundle/"))
    ...                                       # Trainer, accelerate, any loop; see eigenzoo.adapt.LEARNING_RATE
    model.save_pretrained("task/")            # a few hundred bytes a layer
    export_lora(model, "task-lora/")          # a plain LoRA, for vLLM and others

Importing this package, or any file of it, registers the method. A process that loads such an adapter imports
`eigenzoo.integrations` first. One model can hold adapters of several bundles.
Memory: the bundle's bases, once per layer, in the dtype of the weights; see docs/adapt.md for what training costs.
"""

# The tuner registers itself and its config. Python runs this file before any other of the package, so importing any of them
# registers the method.
from eigenzoo.integrations.peft_tuner.config import EigenzooConfig
from eigenzoo.integrations.peft_tuner.lora_export import export_lora
from eigenzoo.integrations.peft_tuner.tuner import EigenzooModel

__all__ = ["EigenzooConfig", "EigenzooModel", "export_lora"]
