"""Open models outside a subspace's fit: one fold of its own models, held out of a second fit, or given models after a check."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from eigenzoo.errors import UsageError
from eigenzoo.evidence.variants import mean_values
from eigenzoo.linalg.heldout import NUM_FOLDS, make_folds
from eigenzoo.passes.settings import own_settings
from eigenzoo.records import Progress
from eigenzoo.subspace.bundles.originals import Missing, find_originals
from eigenzoo.subspace.coefficients import Coefficients
from eigenzoo.subspace.fitting.fit import fit_as
from eigenzoo.subspace.fitting.options import recorded_options
from eigenzoo.subspace.subspace import Subspace
from eigenzoo.zoo.zoo import Zoo

SAME_MODEL = 1e-3
"""Two models are the same below this distance of their coefficients over their distance from the mean. It is above the round-off of
float32 and half precision, and below the change by any training.
"""


def hold_out(space: Subspace, seed: int, progress: Progress, **running: Any) -> tuple[Subspace, Zoo]:
    """Fit the subspace again to four of five folds of its own models, and open the fifth. For `running` see `fit_as`."""
    if len(space.names) < 3:
        raise UsageError(
            f"{len(space.names)} models are too few to hold any out",
            where=str(space.path),
            next_step="name models that the subspace was not fitted to with models=… or --models",
        )
    zoo = find_originals(space, None, allow_pickle=False)
    if isinstance(zoo, Missing):
        raise UsageError(
            f"{zoo.statement} ({zoo.detail})",
            where=str(space.path),
            rule="to hold models out, the subspace must be fitted again to the others",
            next_step="name models that the subspace was not fitted to with models=… or --models",
        )
    fold = set(make_folds(len(zoo), NUM_FOLDS, seed)[0].tolist())
    rest = zoo.select(names=[name for index, name in enumerate(zoo.names) if index not in fold])
    fitted = _fit_again(space, rest, progress=progress, **running)
    return fitted, fitted.open(zoo.select(names=[name for index, name in enumerate(zoo.names) if index in fold]))


def _fit_again(space: Subspace, rest: Zoo, **running: Any) -> Subspace:
    """Fit fewer models with all options of the first fit. A number of directions is limited to what they span."""
    options = recorded_options(space.manifest.options)
    rule = options.rules.get("models")
    if isinstance(rule, int):
        spanned = len(rest) - 1 if options.center == "models" else len(rest)
        options = replace(options, rules={**options.rules, "models": min(rule, spanned)})
    return fit_as(rest, options, **running)


@own_settings()
def is_known(space: Subspace, projected: Iterable[Coefficients]) -> bool:
    """Tell whether one of the models is in the subspace under any name, by its coefficients and residuals."""

    def flat(values: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([values[name].flatten().double() for name in space.layers])

    mean = flat(mean_values(space))
    kept = [space.coefficients(name) for name in space.names]
    known = [(flat(model.values), torch.tensor(list(model.residuals.values()), dtype=torch.float64)) for model in kept]
    for model in projected:
        values, residuals = flat(model.values), torch.tensor(list(model.residuals.values()), dtype=torch.float64)
        for other_values, other_residuals in known:
            near = (values - other_values).norm() <= SAME_MODEL * (other_values - mean).norm()
            if near and torch.allclose(residuals, other_residuals, rtol=SAME_MODEL, atol=1e-6):
                return True
    return False
