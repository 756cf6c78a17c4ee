"""Resolve the options of a fit: axes, one rank rule per axis, center, precision, budget."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

import torch

from eigenzoo.errors import BudgetError, RankError, UsageError
from eigenzoo.linalg.block_sums import DEFAULT, FAST, HIGH, PRECISIONS
from eigenzoo.linalg.kernels import BFLOAT16_ROUND_OFF
from eigenzoo.linalg.quantised import CODINGS, value_bytes
from eigenzoo.linalg.rank import AUTO, RankRule, check_rule
from eigenzoo.records import plain
from eigenzoo.seeds import check_seed
from eigenzoo.subspace.bases.basis import CORES, StoredAs
from eigenzoo.subspace.fitting.bytes import ItemSizes
from eigenzoo.subspace.moments.sketched import SketchPlan
from eigenzoo.weights.views import AXES, CENTERS, check_axes, check_choice

Rank = RankRule | Mapping[str, RankRule]
FLOATS = ("float32", "float64", "bfloat16", "float16")
DTYPES = (*FLOATS, *CODINGS)
COEFFICIENT_DTYPES = ("float32", "bfloat16", "float16")
SIDES = ("outputs", "inputs")
EXACT, SKETCH = "exact", "sketch"
SOLVERS = (EXACT, SKETCH)


@dataclass(frozen=True)
class FitOptions:
    """Resolved options of a fit, saved in the bundle.

    Attributes:
        axes: the truncated axes.
        rules: a rank rule for each axis, and for `cores` if each model's core is cut to a rank.
        center: the center that is removed before the moments.
        dtype: dtype of the stored bases.
        budget: largest size of the whole bundle in bytes, or None.
        max_error: largest share of the analysed energy to lose, or None.
        seed: seed of the null, the folds and the sketches.
        solver: the bases of `outputs` and `inputs` come from their moments or from sketches of them.
        precision: precision of products: `high`, `default` or `fast` (see `linalg.block_sums`).
        coefficients_dtype: dtype of the models' stored coefficients.
    """

    axes: tuple[str, ...]
    rules: Mapping[str, RankRule]
    center: str
    dtype: str
    budget: int | None
    max_error: float | None
    seed: int
    solver: str = EXACT
    precision: str = DEFAULT
    coefficients_dtype: str = "float32"

    @property
    def sketch(self) -> SketchPlan | None:
        """The sides to sketch, or None for the exact solver."""
        if self.solver != SKETCH:
            return None
        ranks = {axis: rule for axis, rule in self.rules.items() if axis in SIDES and isinstance(rule, int)}
        return SketchPlan(ranks, self.seed)

    @property
    def precision_of_products(self) -> str:
        """The precision of products: `high` if all variance is to be kept, because float32 products would lose the last bits."""
        return HIGH if self.wants_everything else self.precision

    @property
    def wants_everything(self) -> bool:
        """Whether an axis keeps all its variance."""
        return any(isinstance(rule, float) and rule == 1.0 for rule in self.rules.values())

    @property
    def bounded(self) -> bool:
        """Whether a budget or an error bound chooses the ranks."""
        return self.budget is not None or self.max_error is not None

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the stored bases; float32 for quantised ones, which their writer quantises."""
        dtype: torch.dtype = torch.float32 if self.coding else getattr(torch, self.dtype)
        return dtype

    @property
    def coding(self) -> str:
        """How bases are quantised, else ""."""
        return self.dtype if self.dtype in CODINGS else ""

    @property
    def rounds(self) -> bool:
        """Whether storing loses more than float32 does."""
        return bool(self.coding) or self.torch_dtype.itemsize < 4 or self.coefficients_dtype != "float32"

    @property
    def stored_as(self) -> StoredAs:
        """How a bundle stores bases and coefficients."""
        return StoredAs(self.coding, self.coefficients_dtype)

    @property
    def itemsizes(self) -> ItemSizes:
        """Bytes of a value of bases and of coefficients."""
        return item_sizes(self.dtype, self.coefficients_dtype)


def item_sizes(dtype: str, coefficients_dtype: str) -> ItemSizes:
    """Return the bytes of a value of bases and of coefficients in these dtypes."""
    basis = value_bytes(dtype) if dtype in CODINGS else getattr(torch, dtype).itemsize
    return ItemSizes(basis, getattr(torch, coefficients_dtype).itemsize)


def plain_options(options: FitOptions) -> dict[str, Any]:
    """Return options as a manifest records them: without the dtype of coefficients where it is the default."""
    found: dict[str, Any] = plain(options)
    if options.coefficients_dtype == "float32":
        del found["coefficients_dtype"]
    return found


def resolve_options(
    rank: Rank | None,
    axes: Iterable[str] | None,
    center: str,
    dtype: str,
    budget: int | None,
    max_error: float | None,
    seed: int,
    solver: str = EXACT,
    precision: str = DEFAULT,
    coefficients_dtype: str = "float32",
    core_rank: int | str | None = None,
) -> FitOptions:
    """Resolve a user's options. Raises UsageError for options that contradict each other."""
    if budget is not None and max_error is not None:
        raise UsageError("budget and max_error are both given", rule="one of them decides the ranks")
    if rank is not None and (budget is not None or max_error is not None):
        raise UsageError("a rank is given beside a budget or an error bound", rule="one of them decides the ranks")
    budget = None if budget is None else _whole_bytes(budget)
    if budget is not None and budget <= 0:
        raise BudgetError(f"a budget of {budget} bytes", rule="a budget is positive")
    if max_error is not None and not 0 <= max_error < 1:
        raise BudgetError(f"an error bound of {max_error}", rule="it is a share of the energy in [0, 1)")
    seed = check_seed(seed)
    chosen = _axes_of(rank) if axes is None else check_axes(axes)
    rules = _rules_of(AUTO if rank is None else rank, chosen)
    if core_rank is not None:
        rules[CORES] = _check_core_rank(core_rank, chosen)
    if check_choice(solver, SOLVERS, "solver") == SKETCH:
        _check_sketch(chosen, rules, budget is not None or max_error is not None)
    if precision == FAST and 1.0 in rules.values() and any(isinstance(rule, float) for rule in rules.values()):
        raise UsageError(
            "precision 'fast' with rank 1.0",
            rule=f"bfloat16 products lose eigenvalues below {BFLOAT16_ROUND_OFF:.0e} of the largest, and 1.0 asks for all of them",
            next_step="use precision 'high' or 'default', or a rank below 1.0",
        )
    return FitOptions(
        chosen,
        rules,
        check_choice(center, CENTERS, "center"),
        check_choice(dtype, DTYPES, "dtype"),
        budget,
        max_error,
        seed,
        solver,
        check_choice(precision, PRECISIONS, "precision"),
        check_choice(coefficients_dtype, COEFFICIENT_DTYPES, "coefficients dtype"),
    )


def recorded_options(saved: Mapping[str, Any]) -> FitOptions:
    """Return the options in a manifest. Fields that older versions did not write have their defaults."""
    known = {
        field.name: saved[field.name] for field in fields(FitOptions) if field.name in saved or field.default is MISSING
    }
    return FitOptions(
        **{**known, "axes": tuple(saved["axes"]), "rules": dict(saved["rules"]), "seed": int(saved["seed"])}
    )


def _whole_bytes(budget: Any) -> int:
    """Return a budget as an int, also from numpy's integers and floats like 2e9. Raises BudgetError for other values."""
    whole = not isinstance(budget, bool) and (
        hasattr(budget, "__index__") or (isinstance(budget, float) and budget.is_integer())
    )
    if not whole:
        raise BudgetError(f"a budget of {budget!s:.40}", rule="a budget is a whole number of bytes")
    return int(budget)


def _check_sketch(axes: tuple[str, ...], rules: Mapping[str, RankRule], decided: bool) -> None:
    """Raise UsageError for options that need a whole spectrum, because a sketch contains only the leading part for a given rank."""
    sides = [axis for axis in axes if axis != "models"]
    if not sides:
        raise UsageError(
            "solver 'sketch' without axis outputs or inputs",
            rule="axis models is solved by the Gram of the models, which needs no sketch",
            next_step="add an axis, such as axes=('models', 'outputs'), or leave the solver out",
        )
    if decided:
        raise UsageError(
            "solver 'sketch' with a budget or an error bound",
            rule="these choose ranks by whole spectra, and a sketch holds the leading directions alone",
            next_step=f"give a number of directions for each of {', '.join(sides)}, or use solver 'exact'",
        )
    for axis in sides:
        if not isinstance(rules[axis], int):
            raise UsageError(
                f"solver 'sketch' with rank {rules[axis]!r} for axis {axis!r}",
                rule="shares and 'auto' are chosen by whole spectra, and a sketch holds the leading directions alone",
                next_step=f"give a number, such as rank={{{axis!r}: 64}}, or use solver 'exact'",
            )


def _check_core_rank(core_rank: Any, axes: tuple[str, ...]) -> RankRule:
    """Return the rule of the cores; raises RankError for an invalid rank, and UsageError if there are no cores to cut."""
    rule = check_rule(core_rank)
    if isinstance(rule, float) or rule == 0:
        raise RankError(f"core rank {core_rank!r}", rule="a core rank is a number of 1 or more, or 'auto'")
    if set(axes) != set(SIDES):
        raise UsageError(
            f"a core rank with axes {', '.join(axes)}",
            rule="cores lie between truncated outputs and inputs, one of each model",
            next_step="use axes=('outputs', 'inputs'), or leave the core rank out",
        )
    return rule


def _axes_of(rank: Rank | None) -> tuple[str, ...]:
    """Return the axes named in `rank`, else `models`."""
    return check_axes(rank) if isinstance(rank, Mapping) else ("models",)


def _rules_of(rank: Rank, axes: tuple[str, ...]) -> dict[str, RankRule]:
    if not isinstance(rank, Mapping):
        return {axis: check_rule(rank) for axis in axes}
    strange = [axis for axis in rank if axis not in axes]
    if strange:
        raise RankError(
            f"a rank for axis {strange[0]!r}",
            rule=f"the truncated axes are {', '.join(axes)}",
            next_step=f"choose among {', '.join(AXES)} with axes=…",
        )
    missing = [axis for axis in axes if axis not in rank]
    if missing:
        raise RankError(f"no rank for axis {missing[0]!r}", rule="a rank per axis names every truncated axis")
    return {axis: check_rule(rank[axis]) for axis in axes}


def check_center(center: str, view: str) -> None:
    """Raise UsageError for a center that a view does not support."""
    if view == "update" and center in ("columns", "global"):
        raise UsageError(
            f"center {center!r} with view 'update'",
            rule="updates are centered on the models' mean or not at all",
            next_step="use view 'factors', as the paper's scripts do, or center 'models' or 'none'",
        )


def check_against(options: FitOptions, view: str, num_models: int) -> None:
    """Raise for ranks and centers that a zoo does not support, before any work starts."""
    check_center(options.center, view)
    if CORES in options.rules and options.bounded and view != "update":
        raise UsageError(
            f"a core rank with a budget or an error bound, and view {view!r}",
            rule="these choose by the models' own singular values, which are known of LoRA updates",
            next_step="give the ranks of the sides, such as rank=64, or leave the core rank out",
        )
    rule = options.rules.get("models")
    spanned = num_models - 1 if options.center == "models" else num_models
    if isinstance(rule, int) and spanned < 1:
        raise RankError(
            f"rank {rule}, but a zoo of one model spans no direction after centering",
            rule="a subspace about the models' mean needs at least two models",
            next_step="add models",
        )
    if isinstance(rule, int) and rule > spanned:
        after = " after centering" if options.center == "models" else ""
        raise RankError(
            f"rank {rule}, but {num_models} model{'s span' if num_models > 1 else ' spans'} at most {spanned} "
            f"direction{'s' if spanned > 1 else ''}{after}",
            next_step=f"ask for rank <= {spanned} or add models",
        )
