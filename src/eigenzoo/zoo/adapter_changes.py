"""Propose changes of an adapter's keys or config with which a library may load the tensors that it drops. Only loading tells."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from eigenzoo.formats.lora.peft_folder import PREFIX
from eigenzoo.weights.renames import Rename, find_rename
from eigenzoo.zoo.adapter import Adapter
from eigenzoo.zoo.base_modules import BaseModules, fits

DIFFUSION_PREFIXES = ("diffusion_model.", "transformer.", "unet.")
"""By which diffusers knows whose names the keys of a LoRA are; files of trainers may have none."""

MOST_TOWERS = 16
"""First parts of names that may each be renamed in a way of their own: a model has one for texts, one for images and few more."""


@dataclass(frozen=True)
class Change:
    """One change, to be tried.

    Attributes:
        words: what a user has to do, as a sentence without its full stop.
        adapter: what then comes of it.
    """

    words: str
    adapter: Adapter


def key_changes(adapter: Adapter, base: BaseModules, lost: Sequence[str]) -> Iterator[Change]:
    """Yield changes of the keys: those of `lost` modules become PEFT's prefix and the name of a module of the base."""
    if not lost:
        return
    if adapter.config is None:
        yield from _of_diffusion(adapter)
        return

    is_bare = any(not adapter.updates[module].key_a.startswith(PREFIX) for module in lost)
    tried: list[Renames] = [((Rename(), lost),)] if is_bare else []
    for names in (frozenset(base.own_names), base.weights):
        candidate = _renames(adapter, base, names, lost)
        tried += [candidate] if candidate and candidate not in tried else []
    for renames in tried:
        change = _of_keys(adapter, renames)
        # Two tensors must not get the same key.
        if change is not None and len(change.adapter.shapes) == len(adapter.shapes):
            yield change


Renames = tuple[tuple[Rename, Sequence[str]], ...]
"""Changes of names, each with the modules that it is for."""


def _renames(adapter: Adapter, base: BaseModules, names: Collection[str], lost: Sequence[str]) -> Renames:
    """Find one change of names for all modules, or else one per tower. Return an empty tuple if some modules have none."""

    def accepts(module: str, name: str) -> bool:
        return bool(fits(adapter.updates[module], base.weights[name]))

    whole = find_rename(lost, names, accepts)
    if whole is not None:
        return ((whole, lost),)
    towers: dict[str, list[str]] = {}
    for module in lost:
        towers.setdefault(module.partition(".")[0], []).append(module)
    if len(towers) > MOST_TOWERS:
        return ()
    by_tower = [(find_rename(modules, names, accepts), modules) for modules in towers.values()]
    renames = tuple((rename, modules) for rename, modules in by_tower if rename is not None)
    return renames if len(renames) == len(by_tower) else ()


def _of_keys(adapter: Adapter, renames: Renames) -> Change | None:
    """Express changes of names as changes of whole keys. Return None if the end of a key changes too."""
    rename, lost = renames[0]
    if rename.parts and all(adapter.updates[module].key_a.startswith(PREFIX) for module in lost):
        parts = " and ".join(repr(f"{part}.") for part in rename.parts)
        return Change(f"Take {parts} out of the keys", _renamed(adapter, partial(_put, rename)))
    pairs = []
    for rename, modules in renames:
        of_lost = {key for module in modules for key in adapter.updates[module].keys}
        keys = [key for key in adapter.shapes if key in of_lost]
        others = [key for key in adapter.shapes if key not in of_lost]
        old = _common_start(keys)
        ending, new = keys[0].removeprefix(old), _put(rename, keys[0])
        if not new.endswith(ending):
            return None
        pairs.append(_shortened(old, new.removesuffix(ending), others))
    return _with_prefixes(adapter, pairs)


def _of_diffusion(adapter: Adapter) -> Iterator[Change]:
    """Yield the ways to write a diffusion model's keys that diffusers knows: whose names they are, and which factor is which."""
    sides, named = {".lora_A.": ".lora_down.", ".lora_B.": ".lora_up."}, {".default.weight": ".weight"}
    for spelling in ({}, named, sides, {**named, **sides}):
        if not all(any(old in key for key in adapter.shapes) for old in spelling):
            continue
        for prefix in ("", *DIFFUSION_PREFIXES):
            words = [f"put {prefix!r} before each key"] if prefix else []
            words += [f"write {new!r} for {old!r} in the keys" for old, new in spelling.items()]
            if words:
                yield Change(_sentence(words), _renamed(adapter, partial(_spelt, prefix, spelling)))


def _spelt(prefix: str, spelling: Mapping[str, str], key: str) -> str:
    for old, new in spelling.items():
        key = key.replace(old, new)
    return prefix + key


def config_changes(adapter: Adapter, lost: Sequence[str]) -> Iterator[Change]:
    """Yield changes of the config: `target_modules` names what there are factors for, by endings or else by whole names."""
    if not lost or adapter.config is None:
        return
    free = {
        key: None for key in ("exclude_modules", "layers_to_transform", "layers_pattern") if adapter.config.get(key)
    }
    others = "".join(f", {key} to null" for key in free)
    endings = sorted({module.rpartition(".")[2] for module in adapter.updates})
    yield Change(
        f"Set target_modules to {endings}{others} in adapter_config.json",
        replace(adapter, config={**adapter.config, **free, "target_modules": endings}),
    )
    yield Change(
        f"Set target_modules to the {len(adapter.updates)} names of modules that the keys have{others} in adapter_config.json",
        replace(adapter, config={**adapter.config, **free, "target_modules": sorted(adapter.updates)}),
    )


def _put(rename: Rename, key: str) -> str:
    return PREFIX + rename(key.removeprefix(PREFIX))


def _with_prefixes(adapter: Adapter, pairs: Sequence[tuple[str, str]]) -> Change:
    """Replace the first prefix of each pair by the second. Each key is changed at most once."""
    words = []
    for old, new in pairs:
        if not old:
            words.append(f"put {new!r} before each key")
        elif not new:
            words.append(f"cut {old!r} off the keys that begin with it")
        else:
            words.append(f"put {new!r} in the place of {old!r} in the keys that begin with it")
    return Change(_sentence(words), _renamed(adapter, partial(_begun, pairs)))


def _begun(pairs: Sequence[tuple[str, str]], key: str) -> str:
    return next((new + key.removeprefix(old) for old, new in pairs if key.startswith(old)), key)


def _sentence(words: Sequence[str]) -> str:
    text = ", and ".join(words)
    return text[0].upper() + text[1:]


def _common_start(keys: Sequence[str]) -> str:
    """Return the common beginning of all keys, up to a dot."""
    first, last = min(keys).split("."), max(keys).split(".")
    common = 0
    while common < min(len(first), len(last)) - 1 and first[common] == last[common]:
        common += 1
    return "".join(f"{part}." for part in first[:common])


def _shortened(old: str, new: str, others: Sequence[str]) -> tuple[str, str]:
    """Cut the common ending off both, as long as no other key begins with the rest of the old one."""
    olds, news = old.split(".")[:-1], new.split(".")[:-1]
    while olds and news and olds[-1] == news[-1]:
        shorter = "".join(f"{part}." for part in olds[:-1])
        if any(key.startswith(shorter) for key in others):
            break
        olds.pop()
        news.pop()
    return "".join(f"{part}." for part in olds), "".join(f"{part}." for part in news)


def _renamed(adapter: Adapter, change: Callable[[str], str]) -> Adapter:
    """Return an adapter with other keys. Its modules keep their names."""
    updates = {
        module: replace(
            update,
            key_a=change(update.key_a),
            key_b=change(update.key_b),
            key_alpha=None if update.key_alpha is None else change(update.key_alpha),
        )
        for module, update in adapter.updates.items()
    }
    shapes, dtypes = _by(adapter.shapes, change), _by(adapter.dtypes, change)
    return replace(adapter, updates=updates, shapes=shapes, dtypes=dtypes)


def _by(values: Mapping[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    return {change(key): value for key, value in values.items()}
