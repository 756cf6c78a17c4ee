"""Register another package's method in PEFT. Everything fragile about this is in this file.

PEFT's `register_peft_method` fills every table in which PEFT looks up a method, but accepts only names of the closed enum
`PeftType` (huggingface/peft#2634). One way around that is to fill the tables directly, with another enum as the type. This depends
on four internal tables of PEFT, and saving fails: up to 0.20 `get_peft_model_state_dict` rejects a type that is not in
`list(PeftType)`. Instead the enum gets one more member, as in `aenum.extend_enum`, and PEFT's own function does the rest, so that
names, prefixes and tables follow each version of PEFT. This depends on how CPython stores an enum's members, unchanged since 3.4,
and is checked afterwards.

For PEFT 0.18 to 0.21. Before 0.18 a tuner had to implement parts of today's `BaseTuner`, and these versions do not work with
transformers 5. All parts of PEFT that the tuner uses are imported here, so that the error for a version without them names it.
"""

from __future__ import annotations

from importlib import metadata
from typing import Any

from eigenzoo.errors import UnsupportedError, UsageError, install

_RULE = "eigenzoo's tuner is written for PEFT 0.18 to 0.21"
_NEXT_STEP = f"{install('peft')}, or use eigenzoo.adapt, which needs no PEFT"


def check_version(version: str) -> None:
    """Raise UnsupportedError for versions of PEFT that do not support tuners of other packages."""
    major, minor = (int(number) for number in version.split(".")[:2])
    if (major, minor) < (0, 18):
        raise UnsupportedError(f"PEFT is version {version}", rule=_RULE, next_step=_NEXT_STEP)


try:
    # Checked before the import, because old versions cannot be imported with transformers 5.
    check_version(metadata.version("peft"))
    import peft
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig, PeftModel, get_peft_model_state_dict
except ImportError as error:  # also raised if it is not installed
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
"""Prefix of the names of an adapter's parameters."""

NEEDED = (
    "_check_target_module_exists",
    "_create_and_replace",
    "_prepare_adapter_config",
    "_prepare_model",
    "_replace_module",
    "_unload_and_optionally_merge",
)
"""Attributes that the tuner overrides or uses from PEFT."""


def peft_type() -> Any:
    """Return eigenzoo's member of `PeftType`, and make it if it does not exist.

    Raises UnsupportedError for a version of PEFT that does not permit this.
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
    """Register a config and a tuner under eigenzoo's name. A second call does nothing."""
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
