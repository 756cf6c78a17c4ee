"""The files beside the weights that make a model usable: known small texts, by name; nothing else is carried."""

from __future__ import annotations

from pathlib import Path

from eigenzoo.errors import FormatError, UnsupportedError
from eigenzoo.formats.json_file import read_json
from eigenzoo.formats.paths import MAX_SIDE_BYTES, inside, is_regular, list_folder

__all__ = ["CONFIG", "MAX_SIDE_BYTES", "SIDE_FILES", "list_side_files", "refuse_quantised"]

CONFIG = "config.json"
SIDE_FILES = frozenset(
    {
        CONFIG,
        "generation_config.json",
        "preprocessor_config.json",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "spiece.model",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "chat_template.jinja",
        "model_index.json",
        "scheduler_config.json",
    }
)


def list_side_files(
    folder: Path, weights: frozenset[str], also: frozenset[str] = frozenset()
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Sort a folder's entries into what is carried and what is not; weights are neither.

    A known name that is a link out of the folder, no plain file, or too large raises.
    """
    carried, ignored = [], []
    for name in list_folder(folder):
        if name in weights:
            continue
        if name in SIDE_FILES or name in also:
            _check(folder, name)
            carried.append(name)
        else:
            ignored.append(name)
    return tuple(carried), tuple(ignored)


def _check(folder: Path, name: str) -> None:
    target = inside(folder, name)
    if not is_regular(target):
        raise FormatError(f"{name!r} is no plain file", where=str(folder))
    size = target.stat().st_size
    if size > MAX_SIDE_BYTES:
        raise FormatError(
            f"{name!r} has {size} bytes", where=str(folder), rule=f"such a file has at most {MAX_SIDE_BYTES} bytes"
        )


def refuse_quantised(folder: Path, side_files: tuple[str, ...]) -> None:
    """Refuse a folder whose config says that its weights are quantised: their numbers are codes, not weights."""
    if CONFIG not in side_files:
        return
    quantization = read_json(inside(folder, CONFIG), where=CONFIG).get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise UnsupportedError(
            f"the weights are quantised ({str(method)[:40]})",
            where=CONFIG,
            rule="quantised weights are codes, and their differences mean nothing",
            next_step="dequantise the model (model.dequantize() in transformers), save it, and open that",
        )
