"""What `adapter_config.json` may say: plain LoRA, whose ΔW = s·B·A is all that changes the forward pass.

Every field of PEFT 0.21's LoraConfig that means something else is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from eigenzoo.errors import FormatError, UnsupportedError

CONFIG_FILE = "adapter_config.json"

MAX_PATTERNS = 10_000
"""Entries of a rank or alpha pattern: each is a regular expression that is tried on every module."""

MERGE = "merge it into its base model (merge_and_unload) and open that as a checkpoint"
AS_FLOATS = "save its factors as float32, bfloat16 or float16; dequantise them first if they are quantised"
KEEP_FORMAT = "rebuild it in its original format: leave out format= (--format)"
_RETRAIN = "train the adapter without it"
_REFUSED = {
    "use_dora": ("DoRA: a magnitude per output rescales the whole weight", MERGE),
    "target_parameters": ("LoRA on bare parameters (mixture-of-experts weights of three axes)", MERGE),
    "trainable_token_indices": ("trained rows of the embedding", MERGE),
    "layer_replication": ("layers of the base that are replicated", _RETRAIN),
    "megatron_config": ("Megatron's parallel layers", f"where Megatron is installed, {MERGE}"),
    "use_qalora": ("QALoRA, which pools its inputs", _RETRAIN),
    "alora_invocation_tokens": ("activated LoRA, which changes the weights for some tokens only", _RETRAIN),
    "arrow_config": (
        "an Arrow router, which chooses between other adapters for each token",
        "open the adapters that it chooses between (saved beside it as task_0, task_1, …) and leave the router out",
    ),
    "monteclora_config": ("Monte Carlo LoRA, which samples around its factors in training", MERGE),
    "kasa_config": ("KaSA, which truncates the base weights", MERGE),
    "use_bdlora": ("block-diagonal LoRA", MERGE),
    "enable_lora": ("LoRA on some parts of a fused weight", f"with the PEFT that wrote it, 0.2 or older, {MERGE}"),
    "velora_config": ("VeLoRA, which keeps projections beside its factors", MERGE),
}
_NO_UPDATE = frozenset(
    {
        "ADAPTION_PROMPT",
        "CARTRIDGE",
        "CPT",
        "MULTITASK_PROMPT_TUNING",
        "PREFIX_TUNING",
        "PROMPT_TUNING",
        "P_TUNING",
        "XLORA",
    }
)
"""Types that leave the base's weights as they are, so that nothing can be merged: virtual tokens, added states, a router."""

# These start from factors taken out of the base weights, so that the update is relative to a changed base.
_CHANGED_BASE = ("pissa", "olora", "corda", "lora_ga")
_QUANTISED_BASE = "loftq"
_UNCHANGED_BASE = ("gaussian", "eva", "orthogonal", "mica")

_PLAIN = frozenset(
    {
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_alpha",
        "lora_bias",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "merge_weights",
        "modules_to_save",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
        "use_rslora",
    }
)


def check_config(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Check that a config describes plain LoRA; gives warnings about entries that nobody knows.

    Raises UnsupportedError for what changes the forward pass in another way, FormatError for a wrong type.
    """
    peft_type = config.get("peft_type")
    if peft_type is None and "lora_parameters" in config:
        raise FormatError(
            "the config belongs to mlx-lm, not to PEFT",
            where=CONFIG_FILE,
            rule="factors of mlx-lm are read from adapters.safetensors, in a folder without PEFT weights",
            next_step="name the file of factors, such as 0000100_adapters.safetensors; or save the arrays of adapters.npz, which "
            "early versions wrote, as adapters.safetensors",
        )
    if peft_type != "LORA":
        raise UnsupportedError(
            f"peft_type is {_shown(peft_type)}",
            where=CONFIG_FILE,
            rule="only adapters of type LORA are read",
            next_step=_merging(peft_type),
        )
    for key, (meaning, next_step) in _REFUSED.items():
        if config.get(key) not in (None, False, [], {}):
            raise UnsupportedError(
                f"{key} is {_shown(config[key])}: {meaning}",
                where=CONFIG_FILE,
                rule="only updates of the form s·B·A are read",
                next_step=next_step,
            )
    _check_init(config.get("init_lora_weights", True))
    _check_types(config)
    return _unknown(config)


def _merging(peft_type: object) -> str:
    """What to do with an adapter of another type."""
    if isinstance(peft_type, str) and peft_type in _NO_UPDATE:
        return "leave it out: it changes no weight of its base model"
    return MERGE


def _check_init(init: Any) -> None:
    if isinstance(init, str):
        lowered = init.lower()
        if lowered.startswith(_CHANGED_BASE):
            raise UnsupportedError(
                f"init_lora_weights is {_shown(init)}, which changed the base weights",
                where=CONFIG_FILE,
                rule="all updates of a zoo refer to the same base weights",
                next_step="save it again with PEFT: "
                "save_pretrained(..., path_initial_model_for_weight_conversion=<the initial adapter>)",
            )
        if lowered == _QUANTISED_BASE:
            raise UnsupportedError(
                f"init_lora_weights is {_shown(init)}, which quantised the base weights",
                where=CONFIG_FILE,
                rule="all updates of a zoo refer to the same base weights",
                next_step=f"with the quantised base that it was trained on, {MERGE}",
            )
        if lowered in _UNCHANGED_BASE:
            return
    elif init is None or isinstance(init, bool):
        return
    raise UnsupportedError(
        f"init_lora_weights is {_shown(init)}",
        where=CONFIG_FILE,
        rule=f"the values that leave the base weights unchanged are true, false, {', '.join(_UNCHANGED_BASE)}",
    )


def _check_types(config: Mapping[str, Any]) -> None:
    bias = config.get("bias", "none")
    if bias not in ("none", "all", "lora_only"):
        raise FormatError(f"bias is {_shown(bias)}", where=CONFIG_FILE, rule="it is 'none', 'all' or 'lora_only'")
    for key in ("use_rslora", "fan_in_fan_out", "lora_bias", "ensure_weight_tying"):
        if not isinstance(config.get(key), bool | None):
            raise FormatError(f"{key} is {_shown(config[key])}", where=CONFIG_FILE, rule="it is true or false")
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(key), dict | None):
            raise FormatError(
                f"{key} is {_shown(config[key])}", where=CONFIG_FILE, rule="it maps module names to numbers"
            )
        if len(config.get(key) or {}) > MAX_PATTERNS:
            raise FormatError(
                f"{key} has {len(config[key])} entries", where=CONFIG_FILE, rule=f"at most {MAX_PATTERNS}"
            )


def _unknown(config: Mapping[str, Any]) -> tuple[str, ...]:
    """A switch that nobody knows may change the forward pass, and is refused; a number or a text is only reported."""
    warnings = []
    for key, value in config.items():
        if key in _PLAIN or key in _REFUSED or value in (None, False, [], {}, ""):
            continue
        if value is True or isinstance(value, dict):
            raise UnsupportedError(
                f"the entry {key[:60]!r} is {_shown(value)}, but no known version of PEFT has such an entry",
                where=CONFIG_FILE,
                next_step="remove the entry if it does not change the forward pass",
            )
        warnings.append(f"{CONFIG_FILE}: unknown entry {key[:60]!r} is ignored, as PEFT ignores it")
    return tuple(warnings)


def merged_config(config: Mapping[str, Any], rank: int) -> dict[str, Any]:
    """Give the config of an adapter whose factors all have this rank and hold the scale: alpha = r, no patterns."""
    written = dict(config)
    written |= {
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
        "init_lora_weights": True,
    }
    # PEFT warns of settings for an initialisation that is not asked for any more.
    for key in ("eva_config", "corda_config", "lora_ga_config"):
        if key in written:
            written[key] = None
    return written


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "…"
