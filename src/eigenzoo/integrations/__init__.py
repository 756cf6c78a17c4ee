"""Other people's engines, each in a file of its own; nothing imports them but the commands, and whoever asks for one.

Importing this package makes PEFT know adapters of eigenzoo, whichever of the two is imported first:

    import eigenzoo.integrations
    from peft import PeftModel
    PeftModel.from_pretrained(base, "adapter/")

PEFT itself is not imported by that, and need not be installed.
"""

from eigenzoo.integrations.when_imported import when_imported

when_imported("peft", "eigenzoo.integrations.peft_tuner")
