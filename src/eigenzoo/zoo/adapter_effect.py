"""Check whether an adapter changes the outputs of a base, from its factors and one read of each weight that it changes.

For random x with independent normal entries, ‖s·B·A·x‖ / ‖W·x‖ is ‖s·B·A‖ / ‖W‖ up to the spread of a few draws.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from statistics import median

import torch

from eigenzoo.linalg.lora import Factors
from eigenzoo.passes.workers import Workers
from eigenzoo.records import Progress, no_progress
from eigenzoo.zoo.adapter import Adapter
from eigenzoo.zoo.adapter_names import by_role, grouped, is_transposed
from eigenzoo.zoo.base_modules import BaseModules, random_inputs
from eigenzoo.zoo.verification import ABSURD, MUCH, NEGLIGIBLE, Check, LayerChange, checked


def effect_checks(
    adapter: Adapter, base: BaseModules | None, workers: Workers, progress: Progress = no_progress
) -> tuple[list[Check], dict[str, LayerChange]]:
    """Check that values are finite and change something; gives each module's change too.

    Cost: one read of the factors, and of each weight of the base that was not read for another adapter.
    """
    transposed = base is not None and is_transposed(adapter, base)
    spoilt, none, changes = [], [], {}
    task = partial(_effect, adapter, base, transposed)
    for module, (answer, change) in workers.each("checking updates", task, adapter.updates, progress):
        changes[module] = change
        if answer is None:
            spoilt.append(module)
        elif answer == 0.0:
            none.append(module)
    return [_finite(spoilt, adapter), _some_effect(none, spoilt, adapter), *_sizes(changes, none, adapter)], changes


def _effect(
    adapter: Adapter, base: BaseModules | None, transposed: bool, module: str
) -> tuple[float | None, LayerChange]:
    """Return ‖s·B·A·x‖ of one module (None if its factors are not finite) and its change relative to the base's layer."""
    update, factors = adapter.updates[module], adapter.factors(module)
    weight = None if base is None else base.weight_of(update, transposed=transposed)
    name = None if weight is None else weight.tensor.name
    if not all(bool(torch.isfinite(factor).all()) for factor in factors):
        return None, LayerChange(name, None)
    answer = _answer(factors, update.scale, name or module)
    whole = 0.0 if base is None or weight is None else base.answer(weight)
    return answer, LayerChange(name, answer / whole if whole > 0 else None)


def _answer(factors: Factors, scale: float, seed: str) -> float:
    b_OR, a_RI = (factor.double() for factor in factors)
    inputs_IT = random_inputs(seed, a_RI.shape[1]).double()
    return abs(scale) * float(torch.linalg.matrix_norm(b_OR @ (a_RI @ inputs_IT)))


def _finite(spoilt: Sequence[str], adapter: Adapter) -> Check:
    faults = [f"{grouped(group)}: NaN or Inf in its factors" for group in by_role(spoilt)]
    num = len(adapter.updates)
    failed = f"NaN or Inf in the factors of {len(spoilt)} of {num} modules"
    return checked("values", f"factors of {num} modules are finite", faults, failed)


def _some_effect(none: Sequence[str], spoilt: Sequence[str], adapter: Adapter) -> Check:
    if len(spoilt) == len(adapter.updates):
        return Check("effect", "not checked", done=False)
    some = len(adapter.updates) - len(none) - len(spoilt)
    name, detail = "effect", f"{some} of {len(adapter.updates)} modules change something"
    if not none:
        return Check(name, detail)
    if len(none) == len(adapter.updates):
        scales = {update.scale for update in adapter.updates.values()}
        why = "the scale is 0 (lora_alpha)" if scales == {0.0} else "B or A is zero in every module, as before training"
        return Check(name, detail, (f"the adapter changes nothing: {why}",))
    return Check(name, detail, notes=tuple(f"{grouped(group)}: its update is zero" for group in by_role(none)))


def _sizes(changes: Mapping[str, LayerChange], none: Sequence[str], adapter: Adapter) -> list[Check]:
    """Compare changes with the outputs of the base. Without known changes there is no check."""
    sizes = {module: layer.change for module, layer in changes.items() if layer.change is not None}
    if not sizes:
        return []
    if len(none) == len(changes):
        return [Check("change", "not checked, as there is none", done=False)]
    detail = f"updates answer {median(sizes.values()):.2g} times as much as their base layers (median), "
    detail += f"from {min(sizes.values()):.2g} to {max(sizes.values()):.2g}"
    little = [module for module, change in sizes.items() if change < NEGLIGIBLE and module not in none]
    absurd = [module for module, change in sizes.items() if not change <= ABSURD]
    much = [module for module, change in sizes.items() if MUCH < change <= ABSURD]
    faults = [
        f"{_changing(group, sizes)}, and above {ABSURD:g} none of the base's output remains: damaged values, "
        f"{_scaled(adapter, group)}or another base"
        for group in by_role(absurd)
    ]
    notes = [f"{_changing(group, sizes)}; trained updates mostly stay below {MUCH:g}" for group in by_role(much)]
    if little and len(little) + len(none) == len(changes):
        faults.append(f"every change is below {NEGLIGIBLE:g} of the base's outputs: practically none")
    else:
        notes += [f"{_changing(group, sizes)}: practically nothing" for group in by_role(little)]
    return [Check("change", detail, tuple(faults), tuple(notes))]


def _scaled(adapter: Adapter, modules: Sequence[str]) -> str:
    """Name the scale as a possible cause, if there is one."""
    scale = max(abs(adapter.updates[module].scale) for module in modules)
    return f"a scale of {scale:g} (lora_alpha), " if scale != 1.0 else ""


def _changing(modules: Sequence[str], sizes: Mapping[str, float]) -> str:
    low, high = min(sizes[module] for module in modules), max(sizes[module] for module in modules)
    amount = f"{low:.3g}" if len(modules) == 1 else f"{low:.3g} to {high:.3g}"
    return f"{grouped(modules)}: changes {amount} times the output of the base's layer"
