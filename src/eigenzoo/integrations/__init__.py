"""Connect to other libraries, each in its own file. Only commands and users import these files.

Importing this package registers eigenzoo's adapters in PEFT. The two can be imported in any order:

    import eigenzoo.integrations
    from peft import PeftModel
    PeftModel.from_pretrained(base, "adapter/")

This does not import PEFT, which need not be installed.
"""

from eigenzoo.integrations.when_imported import when_imported

when_imported("peft", "eigenzoo.integrations.peft_tuner")
