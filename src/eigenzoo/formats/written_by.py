"""Which tool wrote a model, where its files say so: strings of safetensors' headers, entries of configs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from eigenzoo.errors import FormatError
from eigenzoo.formats.json_file import parse_json
from eigenzoo.formats.model import Model
from eigenzoo.formats.side_files import CONFIG, MODULES

MOST = 60
"""Characters of what a file says of itself."""


def _named(entry: str, tool: str) -> Callable[[Mapping[str, Any]], str]:
    """The tool that an entry stands for, with the version that it gives."""
    return lambda document: f"{tool} {document[entry]}" if isinstance(document.get(entry), str) else ""


def _software(header: Mapping[str, Any]) -> str:
    """What ai-toolkit and others say of themselves: an object with name and version."""
    try:
        software = json.loads(header.get("software", ""))
    except (ValueError, RecursionError):
        return ""
    return (
        f"{software['name']} {software.get('version', '')}".strip()
        if isinstance(software, dict) and "name" in software
        else ""
    )


_HEADER: tuple[Callable[[Mapping[str, Any]], str], ...] = (
    _software,
    lambda header: "kohya's sd-scripts" if "ss_sd_scripts_commit_hash" in header else "",
    lambda header: "diffusers" if "lora_adapter_metadata" in header else "",
    lambda header: {"mlx": "MLX", "tf": "TensorFlow", "flax": "Flax"}.get(header.get("format", ""), ""),
)
"""What headers' strings say, the most telling first; `format: pt`, which all of torch's tools write, says nothing."""

_CONFIG = (
    _named("unsloth_version", "unsloth"),
    _named("peft_version", "PEFT"),
    _named("_diffusers_version", "diffusers"),
    _named("transformers_version", "transformers"),
)


def written_by(model: Model) -> str:
    """Return the tool that a model's files name, with its version where they have it; empty where they say nothing.

    Cost: the model's config.
    """
    for header in model.metadata.values():
        for describe in _HEADER:
            if tool := describe(header):
                return tool[:MOST]
    config = model.config if model.config is not None else _config(model)
    tool = next((tool for describe in _CONFIG if (tool := describe(config))), "")
    inner = "sentence-transformers" if MODULES in model.side_files else ""
    return " on ".join(filter(None, (inner, tool)))[:MOST]


def _config(model: Model) -> Mapping[str, Any]:
    if CONFIG not in model.side_files:
        return {}
    try:
        return parse_json(model.read_side_file(CONFIG), where=CONFIG)
    except FormatError:
        return {}  # a config that is no JSON is carried as it is
