"""Check from an adapter's file, its config and the headers of a base whether each factor belongs to a module of the base."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from eigenzoo.errors import FormatError, UnsupportedError
from eigenzoo.formats.lora.peft_folder import PREFIX
from eigenzoo.formats.model import LoraUpdate
from eigenzoo.weights.lora_targets import ALL_LINEAR, endings, targeting
from eigenzoo.weights.renames import beyond, find_rename, nearest
from eigenzoo.weights.roles import role
from eigenzoo.zoo.adapter import Adapter
from eigenzoo.zoo.base_modules import BaseModules, BaseWeight, fits
from eigenzoo.zoo.verification import LOADING, Check, Loading, checked

SHOWN = 5
"""How many names a sentence gives."""

HINTED = 20
"""Roles whose nearest names are looked for: each takes a comparison with every name of the base."""


def is_transposed(adapter: Adapter, base: BaseModules) -> bool:
    """Tell whether a base's weights lie as (inputs, outputs), as Conv1D's do: by those that are not square, else by the config."""
    pairs = [(update, base.find(module)) for module, update in adapter.updates.items()]
    ways = [fits(update, info) for update, info in pairs if info is not None and "lora_embedding_" not in update.key_a]
    answers = [way[0] for way in ways if len(way) == 1]
    return all(answers) if answers else (adapter.config or {}).get("fan_in_fan_out") is True


def name_checks(adapter: Adapter, modules: Collection[str]) -> list[Check]:
    """Check of these modules what needs no base: the names of the factors, and whether the config has PEFT load them."""
    if adapter.config is None:
        return [Check("target modules", "not checked", notes=("the format has no config of PEFT's",), done=False)]
    asked = frozenset(modules)
    bare = [update.key_a for module, update in adapter.updates.items() if module in asked and _is_bare(update.key_a)]
    faults: tuple[str, ...] = ()
    if bare:
        faults = (
            f"{len(bare)} of {len(adapter.updates)} modules have no '{PREFIX}' before their names ({some(bare)}): PEFT drops them. "
            "The module's name in the base follows it; --against BASE tries which change of the keys helps",
        )
    failed = f"{len(bare)} of {len(adapter.updates)} modules' names do not begin with '{PREFIX}'"
    names = checked("names", f"each factor's name begins with '{PREFIX}'", faults, failed)
    return [names, _targets(adapter, adapter.config, asked)]


def _is_bare(key: str) -> bool:
    return not key.startswith(PREFIX)


def _targets(adapter: Adapter, config: Mapping[str, Any], modules: Collection[str]) -> Check:
    name, targets = "target modules", config.get("target_modules")
    try:
        is_target = targeting(config)
        outside = [module for module in adapter.updates if module in modules and not is_target(_asked(module))]
    except UnsupportedError as error:
        return Check(name, "not tried", notes=(str(error),), done=False)
    except FormatError as error:
        return Check(name, "the config's", (str(error),))
    faults = [
        f"{grouped(group)}: the config's target_modules, exclude_modules and layers leave it out: PEFT drops its factors"
        for group in by_role(outside)
    ]
    if targets is None:
        return Check(name, "the config names none", notes=("PEFT chooses them by the base's type",))
    num = len(adapter.updates)
    failed = f"leave out {len(outside)} of {num} modules that have factors"
    return checked(name, f"name all {num} modules that have factors", faults, failed)


def base_checks(adapter: Adapter, base: BaseModules, lost: Collection[str], loading: Loading | None) -> list[Check]:
    """Check that a base has every module in the right shape, and factors for every module that the config names.

    Args:
        lost: the modules whose factors the library does not take up; all, where it was not asked. Only these can be at fault.
        loading: what the library does; None where it was not asked.
    """
    transposed = is_transposed(adapter, base)
    weights = {module: base.weight_of(update, transposed=transposed) for module, update in adapter.updates.items()}
    absent = [module for module in lost if weights[module] is None and base.find(module) is None]
    misshapen = [module for module in lost if weights[module] is None and base.find(module) is not None]
    modules = Check(
        "modules",
        f"{len(weights) - len(absent)} of {len(weights)} are in the base",
        # A library that converts the names of a diffusion model uses its own. Our names do not explain why it drops a tensor.
        tuple(_absent(absent, adapter, base) if absent and not (loading and adapter.config is None) else ()),
    )
    fitting = len(weights) - len(absent) - len(misshapen)
    shapes = (
        Check("shapes", "not checked", done=False)
        if len(absent) == len(weights)
        else Check("shapes", f"{fitting} fit", tuple(_misshapen(misshapen, adapter, base)))
    )
    # Whose names are all others' has no factors for anything: that is said already.
    missing = [] if absent else _missing(adapter, base, loading)
    return [modules, shapes, *_layout_checks(adapter, base, weights), *missing, *_others(adapter, base)]


def _absent(lost: Sequence[str], adapter: Adapter, base: BaseModules) -> list[str]:
    """List the modules that the base lacks, in one sentence if one change of names finds them all."""

    def accepts(module: str, name: str) -> bool:
        return bool(fits(adapter.updates[module], base.weights[name]))

    # By the library's names, if a library was run.
    present = adapter.updates.keys() - set(lost)
    renames = (find_rename(lost, names, accepts, present) for names in (frozenset(base.own_names), base.weights))
    rename = next(filter(None, renames), None)
    if rename is not None:
        return [
            f"{len(lost)} of {len(adapter.updates)} modules are not in the base ({some(lost)}); with {rename} all of them are "
            f"({rename(lost[0])!r})"
        ]
    faults = []
    if adapter.config is None:
        apart = _of_other_components(lost, base)
        if apart:
            components = sorted({module.partition(".")[0] for module in apart})
            faults.append(
                f"{len(apart)} of {len(adapter.updates)} modules are of {some(components)}, and no layer of the base is: "
                "another base, or only a part of the pipeline"
            )
            lost = [module for module in lost if module not in set(apart)]
    later = beyond(lost, base.weights)
    if later:
        faults.append(
            f"{len(later)} of {len(adapter.updates)} modules ({some(later)}) are of layers that the base lacks: "
            "it has fewer layers, so it is another base than the adapter's"
        )
    rest = set(lost) - set(later)
    for number, group in enumerate(by_role(name for name in lost if name in rest)):
        near = nearest(group[0], base.weights) if number < HINTED else None
        faults.append(f"{grouped(group)}: not in the base" + (f"; the nearest name there is {near!r}" if near else ""))
    return faults


def _of_other_components(lost: Sequence[str], base: BaseModules) -> list[str]:
    """Return the layers of a diffusion LoRA that belong to components which the base lacks."""
    have = {name.partition(".")[0] for name in base.weights}
    return [module for module in lost if module.partition(".")[0] not in have]


def _misshapen(misshapen: Sequence[str], adapter: Adapter, base: BaseModules) -> Iterable[str]:
    for group in by_role(misshapen):
        update, info = adapter.updates[group[0]], base.find(group[0])
        assert info is not None
        yield (
            f"{grouped(group)}: the update is for a weight of {list(_wanted(update))}, and the base's is {list(info.shape)}. "
            "It was trained on another base"
        )


def _wanted(update: LoraUpdate) -> tuple[int, ...]:
    if "lora_embedding_" in update.key_a:
        return update.shape[::-1]
    return (update.shape[0], *update.factor_shapes[0][1:])


def _layout_checks(adapter: Adapter, base: BaseModules, weights: Mapping[str, BaseWeight | None]) -> list[Check]:
    """List weights that are shared with another module, and check the config's fan_in_fan_out."""
    notes = [
        f"{module}: shares the weight {weight.tensor.name!r}, which the base's files hold once; PEFT changes this one's use alone"
        for module, weight in weights.items()
        if weight is not None and weight.tied
    ]
    plain = [
        weight.transposed
        for module, weight in weights.items()
        if weight is not None and not weight.tied and "lora_embedding_" not in adapter.updates[module].key_a
    ]
    stated = (adapter.config or {}).get("fan_in_fan_out") is True
    if adapter.config is not None and plain and all(plain) != stated and any(plain) != stated:
        way = "(inputs, outputs), as Conv1D's do" if plain[0] else "(outputs, inputs)"
        notes.append(
            f"the config says fan_in_fan_out={str(stated).lower()}, but the base's weights lie as {way}. "
            "PEFT corrects that on loading, others may not"
        )
    return [Check("layout", "transposed and shared weights", notes=tuple(notes))] if notes else []


def _missing(adapter: Adapter, base: BaseModules, loading: Loading | None) -> list[Check]:
    """Check that every base module in the config's list has factors. Use the library's result if a library was run."""
    config = adapter.config or {}
    targets = config.get("target_modules")
    if targets is None or targets == ALL_LINEAR or (loading is not None and loading.error):
        return []
    try:
        is_target = targeting(config)
        wanted = [name for name in base.own_names if is_target(name)]
    except FormatError:
        return []  # said by another check
    if loading is None:
        have = {base.find(module) for module in adapter.updates}
        without = [name for name in wanted if name not in adapter.updates and base.weights[name] not in have]
    else:
        without = list(dict.fromkeys(name.partition(".lora_")[0] for name in loading.missing))
    random = config.get("init_lora_weights") is False
    faults = [
        f"{grouped(group)}: the config names it, and the adapter has no factors for it"
        + (": PEFT draws them at random" if random else "; PEFT fills in some that change nothing")
        for group in by_role(without)
    ]
    unknown = dict.fromkeys(targets if isinstance(targets, list) else [])
    for module in (*adapter.updates, *base.weights):
        for name in endings(module):
            unknown.pop(name, None)
    notes = [f"target_modules: {some([*unknown])} name nothing, in the adapter or in the base"] if unknown else []
    named = f"{len(wanted)} modules of the base that the config names"
    return [checked("completeness", f"factors for all {named}", faults, f"none for {len(without)} of {named}", notes)]


def _others(adapter: Adapter, base: BaseModules) -> list[Check]:
    """Check the tensors that are not factors: modules that were trained whole."""
    factors = {key for update in adapter.updates.values() for key in update.keys}
    others = {name: shape for name, shape in adapter.shapes.items() if name not in factors}
    if not others:
        return []
    notes = []
    for name, shape in others.items():
        info = base.tensor(name.removeprefix(PREFIX))
        if info is None:
            notes.append(f"{name.removeprefix(PREFIX)}: new, the base has none")
        elif info.shape != shape:
            notes.append(f"{name.removeprefix(PREFIX)}: {list(shape)}, in the base {list(info.shape)}")
    return [Check("other tensors", f"{len(others)} are trained whole", notes=tuple(notes))]


def loading_check(loading: Loading | str, adapter: Adapter, advice: str = "") -> Check:
    """Say what a library does with the adapter; `advice` is what was tried and makes it take up everything."""
    if isinstance(loading, str):
        return Check(LOADING, "not tried", notes=(f"undecided, since loading was not tried: {loading}",), done=False)
    what, advice = loading.what, f". {advice}" if advice else ""
    if loading.error:
        return Check(LOADING, f"{what} takes up nothing", (f"{what} {loading.error}{advice}",))
    num, dropped = len(adapter.shapes), loading.dropped
    faults = (f"{what} drops {len(dropped)} of {num} tensors ({some(dropped)}){advice}",) if dropped else ()
    notes = [loading.note] if loading.note else []
    if loading.missing:
        notes.append(f"{what} misses {len(loading.missing)} tensors ({some(loading.missing)})")
    return Check(LOADING, f"{what} takes up {num - len(dropped)} of {num} tensors", faults, tuple(notes))


def _asked(module: str) -> str:
    """Return the name that PEFT looks up in the config. For an attention's output projection it is the attention."""
    return module.partition(".base_layer.")[0]


def by_role(names: Iterable[str]) -> list[list[str]]:
    """Gather names that differ only by the numbers of their blocks."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[role(name)].append(name)
    return list(groups.values())


def grouped(names: Sequence[str]) -> str:
    """Say names that were gathered by their role."""
    return names[0] if len(names) == 1 else f"{role(names[0])} ({len(names)} of this name)"


def some(names: Sequence[str]) -> str:
    """Quote the first few names."""
    return ", ".join(repr(name) for name in names[:SHOWN]) + (", …" if len(names) > SHOWN else "")
