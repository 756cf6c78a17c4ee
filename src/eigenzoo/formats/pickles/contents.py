"""What was unpickled, as a state dict: which of a checkpoint's dicts is taken, and which prefixes its names lose.

The rules are in docs/formats.md; whatever they decide is said in a note.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from eigenzoo.errors import FormatError

WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model")
"""Where a training checkpoint keeps its weights, the first that is there wins: an average of the weights before the
weights, as timm loads them."""

PREFIXES = ("module.", "_orig_mod.")
"""What DataParallel and torch.compile put before every name of the module that they wrap."""

LIGHTNING = "pytorch-lightning_version"
AVERAGED = "n_averaged"
"""The counter that torch's AveragedModel keeps beside the module that it wraps."""


def state_dict_of(loaded: Any) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Find the dict of tensors in what was loaded, its names as the model has them, with notes on what was decided."""
    notes: list[str] = []
    document = loaded
    if isinstance(loaded, Mapping):
        wrappers = [key for key in WRAPPERS if isinstance(loaded.get(key), Mapping) and loaded[key]]
        if wrappers:
            document = loaded[wrappers[0]]
        if len(wrappers) > 1:
            others = ", ".join(map(repr, wrappers[1:]))
            notes.append(f"the checkpoint holds {wrappers[0]!r} beside {others}: {wrappers[0]!r} is read")
    check_tensors(document)
    state = dict(document)
    if AVERAGED in state and all(name == AVERAGED or name.startswith(PREFIXES[0]) for name in state) and len(state) > 1:
        del state[AVERAGED]
        notes.append(f"the counter {AVERAGED!r} of an averaged model is left out")
    prefixes: list[str] = []
    attribute = isinstance(loaded, Mapping) and LIGHTNING in loaded
    while (prefix := _common_prefix(state, attribute)) is not None:
        attribute = attribute and prefix in PREFIXES
        prefixes.append(prefix)
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    if prefixes:
        notes.append(f"the prefix {''.join(prefixes)!r}, which all names have, is removed")
    return state, tuple(notes)


def check_tensors(document: Any) -> None:
    """Raise unless this is a dict from names to tensors."""
    if not isinstance(document, Mapping) or not document:
        raise FormatError(
            f"the pickle holds {type(document).__name__}", rule="a dict from names to tensors is expected"
        )
    for name, value in document.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise FormatError(
                f"the entry {str(name)[:100]!r} is {type(value).__name__}",
                rule=f"every entry of a state dict is a tensor; one is expected under {', '.join(WRAPPERS)} or at the top level",
                next_step="save the state dict alone, as safetensors",
            )


def _common_prefix(names: Iterable[str], attribute: bool) -> str | None:
    """The prefix that all names have and more: of a wrapper, or in Lightning's module the attribute that holds the model."""
    names = list(names)
    candidates = [*PREFIXES, f"{names[0].partition('.')[0]}."] if attribute else [*PREFIXES]
    for prefix in candidates:
        if all(name.startswith(prefix) and len(name) > len(prefix) for name in names):
            return prefix
    return None
