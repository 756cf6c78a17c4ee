"""Making PEFT know a method that is not its own: all that is fragile about it is in this file.

PEFT's `register_peft_method` fills every table that PEFT looks a method up in, but takes only names of the closed enum `PeftType`
(huggingface/peft#2634). There are two ways around that. Filling the tables by hand, with an enum of one's own as the type, leans on
four tables that are PEFT's affair, and does not save: up to 0.20 `get_peft_model_state_dict` refuses a type that is not in
`list(PeftType)`. So the enum gets one member more, as `aenum.extend_enum` does it, and PEFT's own function does the rest: names,
prefixes and tables stay what each version of PEFT makes of them. What that leans on is how CPython keeps an enum's members, the
same since 3.4; it is checked after it is done.

For PEFT 0.18 to 0.21. Before 0.18 a tuner had to bring what is now `BaseTuner`'s, and these versions do not go with transformers 5.
Whatever of PEFT the tuner is built on is imported here, so that a version without it is refused by name.
"""

from __future__ import annotations

from importlib import metadata
from typing import Any

from eigenzoo.errors import UnsupportedError, UsageError, install

_RULE = "eigenzoo's tuner is written for PEFT 0.18 to 0.21"
_NEXT_STEP = f"{install('peft')}, or use eigenzoo.adapt, which needs no PEFT"


def check_version(version: str) -> None:
    """Raise UnsupportedError for a version of PEFT before the first that a tuner of another package can be made for."""
    major, minor = (int(number) for number in version.split(".")[:2])
    if (major, minor) < (0, 18):
        raise UnsupportedError(f"PEFT is version {version}", rule=_RULE, next_step=_NEXT_STEP)


try:
    # Before it is imported: old versions cannot be, beside transformers 5.
    check_version(metadata.version("peft"))
    import peft
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig, PeftModel, get_peft_model_state_dict
except ImportError as error:  # which not being installed is too
    raise UsageError(f"PEFT cannot be imported ({error})", rule=_RULE, next_step=_NEXT_STEP) from error
try:
    from peft.tuners.tuners_utils import (
        BaseTuner,
        BaseTunerLayer,
        _ExcludedModule,
        _maybe_include_all_linear_layers,
        check_adapters_to_merge,
        check_target_module_exists,
    )
    from peft.utils.peft_types import PeftType, register_peft_method
except ImportError as error:
    raise UnsupportedError(f"PEFT {peft.__version__} has a different structure ({error})", rule=_RULE) from error

__all__ = [
    "BaseTuner",
    "BaseTunerLayer",
    "PeftConfig",
    "PeftModel",
    "_ExcludedModule",
    "_maybe_include_all_linear_layers",
    "check_adapters_to_merge",
    "check_target_module_exists",
    "get_peft_model_state_dict",
    "peft_type",
    "register",
]

NAME = "EIGENZOO"
PREFIX = "eigenzoo_"
"""What the names of all that belongs to an adapter begin with."""

NEEDED = (
    "_check_target_module_exists",
    "_create_and_replace",
    "_prepare_adapter_config",
    "_prepare_model",
    "_replace_module",
    "_unload_and_optionally_merge",
)
"""What the tuner overrides, or takes over from PEFT."""


def peft_type() -> Any:
    """Return the member of `PeftType` that stands for eigenzoo, which is made where it is not there.

    Raises UnsupportedError for a version of PEFT in which a tuner of another package cannot be made this way.
    """
    missing = [name for name in NEEDED if not hasattr(BaseTuner, name)]
    if missing:
        raise _unsupported(f"has no BaseTuner.{missing[0]}")
    if NAME not in PeftType.__members__:
        _add_member()
    member = PeftType.__members__.get(NAME)
    if member is None or member not in list(PeftType) or PeftType(NAME) is not member or member != NAME:
        raise _unsupported("has a PeftType that takes no other member")
    return member


def register(config: type, tuner: type) -> None:
    """Register a config and a tuner under eigenzoo's name; once in a process, again does nothing."""
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type())
    if known is config:
        return
    if known is not None:
        raise _unsupported(f"has another method called {NAME}, {known.__module__}.{known.__qualname__}")
    register_peft_method(name=NAME.lower(), config_cls=config, model_cls=tuner, prefix=PREFIX)


def _add_member() -> None:
    member = str.__new__(PeftType, NAME)
    member._name_, member._value_, member._sort_order_ = NAME, NAME, len(PeftType)
    member.__objclass__ = PeftType
    setattr(PeftType, NAME, member)
    PeftType._member_names_.append(NAME)
    PeftType._member_map_[NAME] = member
    PeftType._value2member_map_[NAME] = member


def _unsupported(what: str) -> UnsupportedError:
    return UnsupportedError(f"PEFT {peft.__version__} {what}", rule=_RULE, next_step=_NEXT_STEP)
