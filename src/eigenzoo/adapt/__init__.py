"""Adapt a model to a new task by a few hundred numbers: trained, searched or calibrated coefficients in a frozen shared basis.

    adapted = eigenzoo.adapt.attach(model, space)          # any torch module
    torch.optim.Adam(adapted.parameters(), lr=eigenzoo.adapt.LEARNING_RATE)
    eigenzoo.adapt.save(adapted, "task.safetensors")       # a few hundred bytes
    eigenzoo.adapt.detach(adapted)                         # plain weights again

With PEFT: `eigenzoo.integrations.peft_tuner`.
"""

from eigenzoo.adapt.adapter_file import load, save
from eigenzoo.adapt.attach import Adapted, attach, detach
from eigenzoo.adapt.trained import LEARNING_RATE, Start, find_start

__all__ = ["LEARNING_RATE", "Adapted", "Start", "attach", "detach", "find_start", "load", "save"]
