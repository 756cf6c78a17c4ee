"""Methods of merging: each is one typed function, registered by `@method`.

    @method("gram", formula="Σ w τ", source="Ilharco et al. 2023")
    def task_arithmetic(layer: LayerUpdates) -> Combination: ...

Its keyword parameters are the options of the command, the parameters of a recipe, its row in the documentation and its line on the
card of a merged model. A new method is one function in `merge/methods/` and one row in the table of the tests.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from torch import Tensor

from eigenzoo.errors import UsageError
from eigenzoo.merge.layer_updates import Combination, Product, RowWise

Result = Combination | Tensor | RowWise | Product
"""A method returns weights of the updates, the merged update in their space, how it follows from a few rows, or two factors."""

Kind = Literal["gram", "core", "factors", "elements"]
"""Where a method is exact: `gram`, a combination whose weights follow from the updates' inner products; `core`, in any orthonormal
frame; `factors`; `elements`, entry by entry, so that its result depends on the space that it acts in."""


@dataclass(frozen=True)
class Parameter:
    """An option of a method.

    Attributes:
        name, default, help: as users see them.
        choices: the values that it takes; empty for a number.
        least, most: bounds of a number, both allowed.
        kind: `int`, `float` or `str`.
        per_model: whether it may be one number per model.
    """

    name: str
    kind: type
    default: Any
    help: str
    choices: tuple[str, ...] = ()
    least: float = -float("inf")
    most: float = float("inf")
    per_model: bool = False

    def check(self, value: Any, method: str) -> Any:
        """Return the value, or raise UsageError that says what it may be."""
        if self.per_model and isinstance(value, list | tuple):
            return tuple(self.check(each, method) for each in value)
        if self.choices:
            if value in self.choices:
                return value
            rule = f"it is one of {', '.join(self.choices)}"
        else:
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if number and self.least <= value <= self.most and (self.kind is float or value == int(value)):
                return self.kind(value)
            whole = "a whole number" if self.kind is int else "a number"
            rule = f"it is {whole} from {self.least:g} to {self.most:g}"
        raise UsageError(f"{self.name} is {str(value)[:40]!r}", where=f"method {method}", rule=rule)


@dataclass(frozen=True)
class Range:
    """Bounds of a number in a method's signature, both allowed, and its description."""

    help: str
    least: float = -float("inf")
    most: float = float("inf")
    per_model: bool = False


@dataclass(frozen=True)
class Method:
    """A method of merging.

    Attributes:
        name: what users write.
        merge: the function.
        kind: where it is exact.
        formula, source: for the documentation.
        parameters: its options, by name.
        models: the least and the largest number of models that it takes.
        over_model: gives the share of the largest values of the *whole model* that the method keeps with these options, or None
            where it trims each layer by itself.
        weighted: whether it takes weights.
        space: the only space that it acts in, where its kind leaves a choice.
    """

    name: str
    merge: Callable[..., Result]
    kind: Kind
    formula: str
    source: str
    parameters: Mapping[str, Parameter]
    models: tuple[int, int]
    over_model: Callable[[Mapping[str, Any]], float | None]
    weighted: bool
    space: str | None

    @property
    def has_spaces(self) -> bool:
        """Whether users choose the space of the entries."""
        return self.kind == "elements" and self.space is None

    @property
    def summary(self) -> str:
        """The first sentence of the function's description."""
        return (inspect.getdoc(self.merge) or "").partition("\n")[0]

    def options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return all options, those that are not given at their defaults; raises UsageError for unknown or wrong ones."""
        unknown = sorted(set(given) - set(self.parameters))
        if unknown:
            has = ", ".join(self.parameters) or "none"
            raise UsageError(f"there is no option {unknown[0]!r}", where=f"method {self.name}", rule=f"it has {has}")
        return {
            name: parameter.check(given.get(name, parameter.default), self.name)
            for name, parameter in self.parameters.items()
        }


METHODS: dict[str, Method] = {}
"""All methods by name; filled by importing `eigenzoo.merge.methods`."""

MANY = 2**31


def _trims_layers(options: Mapping[str, Any]) -> None:
    return None


def method(
    kind: Kind,
    *,
    formula: str,
    source: str,
    models: tuple[int, int] = (1, MANY),
    over_model: Callable[[Mapping[str, Any]], float | None] = _trims_layers,
    weighted: bool = True,
    space: str | None = None,
) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Register a function as a method. Its keyword parameters are annotated with `Annotated[type, Range(…)]`."""

    def register(function: Callable[..., Result]) -> Callable[..., Result]:
        hints = get_type_hints(function, include_extras=True)
        parameters = {
            name: _parameter(name, hints[name], parameter.default)
            for name, parameter in inspect.signature(function).parameters.items()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY
        }
        METHODS[function.__name__] = Method(
            function.__name__, function, kind, formula, source, parameters, models, over_model, weighted, space
        )
        return function

    return register


def _parameter(name: str, hint: Any, default: Any) -> Parameter:
    kind, bounds = get_args(hint) if get_origin(hint) is Annotated else (hint, None)
    assert isinstance(bounds, Range), f"{name} has no description"
    if get_origin(kind) is Literal:
        return Parameter(name, str, default, bounds.help, choices=get_args(kind))
    return Parameter(name, kind, default, bounds.help, (), bounds.least, bounds.most, bounds.per_model)
