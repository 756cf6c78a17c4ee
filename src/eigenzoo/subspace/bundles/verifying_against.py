"""Check a bundle against a base: whether rebuilt adapters take effect on it, or how far the mean is from it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from statistics import median

import torch

from eigenzoo.errors import EigenzooError
from eigenzoo.formats.lora.config import check_config, merged_config
from eigenzoo.formats.model import LoraUpdate, Model
from eigenzoo.formats.remote import remote_url
from eigenzoo.formats.safetensors.dtypes import dtype_name
from eigenzoo.formats.splitting import split_model
from eigenzoo.passes.workers import Workers
from eigenzoo.records import Layer, Progress, no_progress, telling
from eigenzoo.subspace.bundles.source_records import is_at_hand
from eigenzoo.subspace.stored import StoredSubspace
from eigenzoo.weights.renames import beyond, find_rename, nearest
from eigenzoo.weights.roles import is_task_head
from eigenzoo.zoo.adapter import Adapter
from eigenzoo.zoo.adapter_effect import effect_checks
from eigenzoo.zoo.adapter_names import HINTED, by_role, grouped
from eigenzoo.zoo.adapter_verifying import MOST_TRIES, structure_checks
from eigenzoo.zoo.base_modules import BaseModules
from eigenzoo.zoo.verification import LOADING, Check, LayerChange, Loader, checked

FAR = 1.0
"""‖M − W‖ / ‖W‖ from which on the mean is as far from the base as zero is. For unrelated models it is about √2."""

Changes = dict[str, dict[str, LayerChange]]


def checks_against(
    space: StoredSubspace, base: Model, loader: Loader | None, workers: Workers, progress: Progress = no_progress
) -> tuple[list[Check], Changes]:
    """Check a bundle against a base. Also return the changes of each model, or for full weights those of the mean."""
    if space.view in ("update", "factors"):
        return _adapters(space, base, loader, workers, progress)
    recorded = _recorded(space, base)
    try:
        cut = split_model(base, space.manifest.split)
    except EigenzooError as error:
        return [*recorded, Check("layers", "not compared", (str(error),))], {}
    checks, changes = _weights(space, cut, workers, progress)
    return [*recorded, *checks], {"mean": changes}


def _adapters(
    space: StoredSubspace, base: Model, loader: Loader | None, workers: Workers, progress: Progress
) -> tuple[list[Check], Changes]:
    """Check every model as it would be rebuilt. Checks that depend only on the files' structure run once per structure."""
    checks: list[Check] = []
    changes: Changes = {}
    modules_by_key: dict[str, BaseModules | None] = {}
    norms: dict[tuple[str, bool], float] = {}
    tries = iter(range(MOST_TRIES))
    for record in telling(progress, "checking adapters", space.manifest.models):
        try:
            adapter, left = _rebuilt(space, record.name)
        except EigenzooError as error:
            checks.append(Check("rebuilt adapters", "not all can be rebuilt", (f"model {record.name}: {error}",)))
            continue
        key = json.dumps([record.layout, {name: _sorted(value) for name, value in (adapter.config or {}).items()}])
        if key not in modules_by_key:
            structure, modules_by_key[key] = structure_checks(adapter, base, loader, norms, tries)
            checks += structure
            if left:
                note = f"{left} modules were excluded, and stay in the store: not checked"
                checks.append(Check("rebuilt adapters", "not all of their modules", notes=(note,)))
        effect, changes[record.name] = effect_checks(adapter, modules_by_key[key], workers)
        checks += [_of_model(record.name, check) for check in effect]
    return _merged(checks), changes


def _rebuilt(space: StoredSubspace, name: str) -> tuple[Adapter, int]:
    """Return a model's rebuilt adapter, with scale 1 and one rank, and how many of its modules are not in the bundle."""
    rebuilt = space.rebuild(name)
    template = space.template(name)
    layout, config = template.layout, template.config
    if config is not None:
        check_config(config)
    stored_names = {*space.layers, *template.carried}
    updates = {
        module: update
        for module, update in layout.updates.items()
        if stored_names & {module, f"{module}.lora_A", update.key_a}
    }
    rank = max(update.rank for update in layout.updates.values())
    ranked = {module: _ranked(update, rank) for module, update in updates.items()}
    shapes = {tensor: layout.tensors[tensor].shape for tensor in template.carried if tensor in layout.tensors}
    for update in ranked.values():
        shapes |= {update.key_a: update.factor_shapes[0], update.key_b: update.factor_shapes[1]}
    merged = None if config is None else merged_config(config, rank)
    adapter = Adapter(name, merged, ranked, shapes, rebuilt.adapter_factors)
    return adapter, len(layout.updates) - len(updates)


def _ranked(update: LoraUpdate, rank: int) -> LoraUpdate:
    shape_a, shape_b = update.factor_shapes
    shapes = ((rank, *shape_a[1:]), (shape_b[0], rank, *shape_b[2:]))
    return replace(update, rank=rank, scale=1.0, factor_shapes=shapes)


def _of_model(name: str, check: Check) -> Check:
    faults = tuple(f"model {name}: {fault}" for fault in check.faults)
    return replace(check, faults=faults, notes=tuple(f"model {name}: {note}" for note in check.notes))


def _sorted(value: object) -> object:
    """Sort the config's sets of names, which PEFT writes in another order each time."""
    return sorted(value, key=str) if isinstance(value, list) else value


def _merged(checks: Iterable[Check]) -> list[Check]:
    """Merge checks of the same name. A merged check says for how many models it ran."""
    groups: dict[str, list[Check]] = {}
    for check in checks:
        groups.setdefault(check.name, []).append(check)
    return [
        Check(
            name,
            _telling(group).detail if len(group) == 1 else f"{len(group)} times, such as: {_telling(group).detail}",
            tuple(dict.fromkeys(fault for check in group for fault in check.faults)),
            tuple(dict.fromkeys(note for check in group for note in check.notes)),
            # If a check is undecided for one model, it is undecided for the bundle.
            (all if name == LOADING else any)(check.done for check in group),
        )
        for name, group in groups.items()
    ]


def _telling(checks: list[Check]) -> Check:
    """Return the check whose detail is shown for all: one that failed, else one that ran."""
    return min(checks, key=lambda check: (check.ok, not check.done))


def _recorded(space: StoredSubspace, base: Model) -> list[Check]:
    """Check whether this is the base that was subtracted, if any was."""
    record = space.manifest.base
    if record is None:
        return []
    if remote_url(base.path) is not None:
        return [
            Check(
                "recorded base", "not compared", notes=("the base is at a URL: its checksum is not known",), done=False
            )
        ]
    candidate = record.model_copy(update={"path": str(base.path.absolute())})
    fault = f"{base.path} is not the base that was subtracted: its weights differ"
    faults = () if is_at_hand(candidate, space.path) else (fault,)
    return [checked("recorded base", "the files that were subtracted", faults, "other files than were subtracted")]


def _weights(
    space: StoredSubspace, base: Model, workers: Workers, progress: Progress
) -> tuple[list[Check], dict[str, LayerChange]]:
    layers = {name: basis.layer for name, basis in space.layers.items()}
    present = {name: layer for name, layer in layers.items() if name in base.tensors}
    fitting = {name: layer for name, layer in present.items() if base.tensors[name].shape == layer.tensor_shape}
    absent, other = [name for name in layers if name not in present], [name for name in present if name not in fitting]
    heads = [name for name in (*absent, *other) if is_task_head(name)]
    notes = tuple(f"{grouped(group)}: a task head, which the base has not in this shape" for group in by_role(heads))
    dtypes = [f"{dtype}: {num} layers" for dtype, num in _other_dtypes(fitting, base).items()]
    checks = [
        Check(
            "layers",
            f"{len(fitting)} of {len(layers)} are in the base, in their shapes",
            (
                *_absent([name for name in absent if name not in heads], layers, base),
                *_misshapen(other, heads, layers, base),
            ),
            notes,
        ),
        Check(
            "dtypes",
            "those of the base",
            notes=(f"other dtypes than in the base: {', '.join(dtypes)}",) if dtypes else (),
        ),
    ]
    if space.manifest.center != "models":
        return [
            *checks,
            Check("distance", "not taken", notes=("the bundle's center is not the mean of its models",), done=False),
        ], {}
    distances = workers.each("comparing layers", lambda name: _distance(space, name, base), fitting, progress)
    changes = {name: LayerChange(name, distance) for name, distance in distances}
    measured = [layer.change for layer in changes.values() if layer.change is not None]
    if not measured:
        return checks, changes
    detail = f"the mean is off by {median(measured):.2g} of the base's norm as a rule, {min(measured):.2g} to {max(measured):.2g}"
    far = f"the mean is as far from the base as zero is ({median(measured):.2g} of its norm): the models do not come from it"
    return [*checks, Check("distance", detail, (far,) if median(measured) >= FAR else ())], changes


def _absent(absent: list[str], layers: Mapping[str, Layer], base: Model) -> Iterator[str]:
    def accepts(name: str, other: str) -> bool:
        return layers[name].tensor_shape == base.tensors[other].shape

    rename = find_rename(absent, base.tensors, accepts, layers.keys() - set(absent))
    if rename is not None:
        yield f"{len(absent)} layers are not in the base ({absent[0]!r}, …); with {rename} all of them are"
        return
    later = beyond(absent, base.tensors)
    if later:
        yield f"{len(later)} layers ({later[0]!r}, …) are of blocks that the base has not: it has fewer, and is another base"
    for number, group in enumerate(by_role(name for name in absent if name not in set(later))):
        near = nearest(group[0], base.tensors) if number < HINTED else None
        yield f"{grouped(group)}: not in the base" + (f"; the nearest name there is {near!r}" if near else "")


def _misshapen(other: list[str], heads: list[str], layers: Mapping[str, Layer], base: Model) -> Iterator[str]:
    for group in by_role(name for name in other if name not in heads):
        shape, base_shape = list(layers[group[0]].tensor_shape), list(base.tensors[group[0]].shape)
        yield f"{grouped(group)}: shape {shape}, and in the base {base_shape}"


def _other_dtypes(layers: Mapping[str, Layer], base: Model) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name, layer in layers.items():
        dtype = base.tensors[name].dtype
        if dtype != dtype_of_layer(layer):
            label = f"{layer.dtype} for {dtype_name(dtype)}"
            counts[label] = counts.get(label, 0) + 1
    return counts


def dtype_of_layer(layer: Layer) -> torch.dtype:
    """Return the dtype in a layer's record."""
    dtype: torch.dtype = getattr(torch, layer.dtype)
    return dtype


def _distance(space: StoredSubspace, name: str, base: Model) -> float | None:
    """Return ‖M − W‖ / ‖W‖, or ‖M‖ / ‖W‖ for view `delta`, whose mean is already a difference. None if W is zero."""
    basis = space.layers[name]
    weight_OI = base.read(name).double().reshape(basis.layer.shape)
    norm = float(weight_OI.norm())
    mean_OI = basis.removed().expand(basis.layer.shape)
    off = mean_OI if space.view == "delta" else mean_OI - weight_OI
    return float(off.norm()) / norm if norm > 0 else None
