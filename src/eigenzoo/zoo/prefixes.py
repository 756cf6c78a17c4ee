"""Find the one prefix, or part from a wrapper, by which the names of one model differ from the others'."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from eigenzoo.errors import MismatchError
from eigenzoo.formats.lora.peft_folder import PREFIX
from eigenzoo.formats.model import Model
from eigenzoo.formats.renaming import renamed_model
from eigenzoo.weights.renames import find_prefixes

PROBES = 20
"""Names whose beginnings are tried: a head may lie outside what has the prefix."""

MOST_PARTS = 8
"""Parts of a name that may all be prefix, and parts that are tried as a wrapper's."""

MOST_NAMES = 2_000
"""Names that are compared: what most of these have is enough to tell."""


@dataclass(frozen=True)
class Extra:
    """What some names have and others lack: `text`, at their beginning or else wherever it stands; without it `num` names agree."""

    text: str
    at_the_beginning: bool
    num: int


def extra_of(longer: Collection[str], shorter: Collection[str]) -> Extra | None:
    """Find what to remove from names to have the others: None where that is not one text, or at most half of them then agree.

    >>> extra_of(["module.a.w", "module.b.w"], ["a.w", "b.w"])
    Extra(text='module.', at_the_beginning=True, num=2)
    >>> extra_of(["m._orig_mod.a.w", "m._orig_mod.b.w"], ["m.a.w", "m.b.w"])
    Extra(text='_orig_mod.', at_the_beginning=False, num=2)
    """
    there = set(shorter)
    only = list(islice((name for name in longer if name not in there), MOST_NAMES))
    extras = [Extra(text, True, _num_cut(only, there, text)) for text in _beginnings(only, there)]
    usual_parts = {part for name in shorter for part in name.split(".")}
    new = dict.fromkeys(
        part for name in islice(only, PROBES) for part in name.split(".")[:-1] if part not in usual_parts
    )
    for part in islice(new, MOST_PARTS):
        extras.append(Extra(f"{part}.", False, sum(_without(name, part) in there for name in only)))
    best = max(extras, key=lambda extra: extra.num, default=None)
    return best if best is not None and 2 * best.num > len(only) else None


def _beginnings(names: Sequence[str], there: Collection[str]) -> list[str]:
    """Return the beginnings that some names have before an existing name."""
    beginnings: dict[str, None] = {}
    for name in islice(names, PROBES):
        parts = name.split(".")
        for number in range(1, min(len(parts), MOST_PARTS + 1)):
            if ".".join(parts[number:]) in there:
                beginnings[".".join(parts[:number]) + "."] = None
    return list(beginnings)


def _num_cut(names: Collection[str], there: Collection[str], prefix: str) -> int:
    return sum(name.startswith(prefix) and name[len(prefix) :] in there for name in names)


def _without(name: str, part: str) -> str:
    return ".".join(other for other in name.split(".") if other != part)


def prefix_error(models: Sequence[Model], names: Sequence[str]) -> MismatchError | None:
    """Return the error that names the model which differs from most others by a prefix of its names; None where none does.

    Names are those of the files, so that the next step is right for adapters too. Cost: every model's names, once.
    """
    sets = [frozenset(model.tensors) for model in models]
    counts = Counter(sets)
    usual = counts.most_common(1)[0][0]
    for own in counts:
        longer = extra_of(sorted(own), usual)
        extra = longer or extra_of(sorted(usual), own)
        if extra is not None:
            return _error(names[sets.index(own)], names[sets.index(usual)], counts[own], extra, longer is not None)
    return None


def as_layers(models: Sequence[Model], layers: Collection[str]) -> list[Model]:
    """See models that hold what a bundle is of under a prefix by the bundle's names: `bert.encoder.…` as `encoder.…`.

    A model is renamed if it has none of these layers under their names, and one prefix alone, added or cut, makes all of them
    names of it. All others are returned as they are. Cost: every name of each kind of model, once.
    """
    known: dict[frozenset[str], dict[str, str]] = {}
    seen = []
    for model in models:
        own = frozenset(model.updates or model.tensors)
        if own not in known:
            known[own] = _names_of(own, {_module(layer) for layer in layers} if model.updates else layers)
        seen.append(renamed_model(model, known[own]) if known[own] else model)
    return seen


def _names_of(own: frozenset[str], layers: Collection[str]) -> dict[str, str]:
    """Return the bundle's names of a model's own, where these are others."""
    if not own.isdisjoint(layers):
        return {}
    changes = find_prefixes(sorted(layers), own, lambda layer, name: True)
    return {changes[0](layer): layer for layer in layers} if len(changes) == 1 else {}


def _module(layer: str) -> str:
    return layer.removesuffix(".lora_A").removesuffix(".lora_B")


def layers_error(own: Collection[str], layers: Collection[str], name: str) -> MismatchError | None:
    """Return the error that names what a model's layers have before the names of a bundle's, or lack; None for nothing."""
    longer = extra_of(sorted(own), layers)
    extra = longer or extra_of(sorted(layers), own)
    if extra is None:
        return None
    # PEFT's own prefix was cut off the adapter's names that began with it.
    text = extra.text if extra.text == PREFIX else extra.text.removesuffix(PREFIX)
    return _error(name, "the bundle", 1, replace(extra, text=text), longer is not None)


def _error(name: str, others: str, num: int, extra: Extra, has_it: bool) -> MismatchError:
    verb = "begin with" if extra.at_the_beginning else "hold"
    more = f", and so do {num - 1} more models" if num > 1 else ""
    if has_it:
        what = f"the names of its tensors {verb} {extra.text!r}, which those of {others} lack{more}"
        text = f"name.removeprefix({extra.text!r})" if extra.at_the_beginning else f"name.replace({extra.text!r}, '')"
    else:
        what = f"the names of its tensors lack {extra.text!r}, which those of {others} {verb}{more}"
        text = f"name if name in others else {extra.text!r} + name" if extra.at_the_beginning else ""
    return MismatchError(
        what,
        where=name,
        rule=f"{'without' if has_it else 'with'} it {extra.num:,} names agree",
        next_step=(
            f"save it under the others' names: save_file({{{text}: tensor for name, tensor in load_file(path).items()}}, path, "
            "{'format': 'pt'}) of safetensors.torch"
            + ("" if has_it else f", others = load_file(the file of {others})")
            + "; of shards, rename in the index too"
            if text
            else f"save it as {others} was saved"
        ),
    )
