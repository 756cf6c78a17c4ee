"""What every reader of another tool's subspace gives: adapters' factors A and B as a mean, shared directions and loadings.

Legend: N models, K directions, D values of one flattened factor, S values of a side, R rank of the adapters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from eigenzoo.errors import DataError, FormatError, UnsafePathError
from eigenzoo.formats.model import TensorInfo
from eigenzoo.formats.safetensors.file import SafetensorsFile

FACTORS = ("lora_A", "lora_B")
"""The two factors of a module, as layers of view `factors` are called."""

MAX_NAME = 1000
"""Little enough that a factor's name is one that a bundle may hold."""
MOST_VALUES = 2**40
"""Values of one factor, as many as a bundle may have of a layer."""


@dataclass(frozen=True)
class ForeignFactor:
    """One factor of one module, of all models, in float64.

    Attributes:
        mean: what the tool adds back, (D,); None where it has none.
        directions: (K, D), each a whole factor; or (K, S), each along the inputs of A or the outputs of B.
        loadings: (N, K); or (N, K, R) with directions along a side.
    """

    mean: Tensor | None
    directions: Tensor
    loadings: Tensor


class ForeignSubspace(ABC):
    """Another tool's subspace of LoRA adapters, opened by its headers; values are read factor by factor.

    Attributes:
        tool: what wrote it, in words.
        axes: `models` where directions are whole factors; `outputs` and `inputs` where they lie along a side.
        path: the folder that it was read from.
        names: the models.
        sources: where each model lies.
        shapes: per module the shapes of A (rank, inputs, …) and B (outputs, rank, …), in the order of the files.
        dtype: what rebuilt factors are written in.
        files: all files of values that it is read from.
        notes: what a reader of the bundle must know.
        keeps_others: whether it keeps the tensors of an adapter that are no factors, such as trained heads.
    """

    tool: ClassVar[str]
    axes: ClassVar[tuple[str, ...]]
    keeps_others: ClassVar[bool] = False

    path: Path
    names: tuple[str, ...]
    sources: tuple[Path, ...]
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    dtype: torch.dtype
    files: tuple[Path, ...]
    notes: tuple[str, ...]

    @abstractmethod
    def factor(self, module: str, factor: str) -> ForeignFactor:
        """Read one factor, `lora_A` or `lora_B`, of all models; NaN and Inf are refused."""

    def others(self, index: int) -> tuple[TensorInfo, ...]:
        """The tensors of one model that are no factors, where the tool keeps any."""
        return ()

    def read_other(self, index: int, name: str) -> Tensor:
        """Read one of these."""
        raise FormatError(f"there is no tensor {name[:200]!r}", where=str(self.sources[index]))


def open_tensors(path: Path, root: Path) -> SafetensorsFile:
    """Open a file of a folder by its header; errors name the folder."""
    try:
        return SafetensorsFile(path, root)
    except UnsafePathError:
        raise
    except FormatError as error:
        raise error.at(str(root)) from error.__cause__


def check_names(names: Sequence[object], what: str, where: str) -> tuple[str, ...]:
    """Return names that a bundle can have: text of 1 to 1,000 characters, each once."""
    checked = tuple(name for name in names if isinstance(name, str) and 0 < len(name) <= MAX_NAME and _is_text(name))
    if len(checked) != len(names):
        raise FormatError(
            f"the name of a {what} is not text, is empty or is too long",
            where=where,
            rule=f"names have 1 to {MAX_NAME} characters",
        )
    if len(set(checked)) != len(checked):
        raise FormatError(f"a {what} is listed twice", where=where)
    if not checked:
        raise FormatError(
            f"there is no {what}", where=where, next_step="name the folder of a subspace with models in it"
        )
    return checked


def check_shapes(shape_a: Sequence[int], shape_b: Sequence[int], where: str) -> None:
    """Refuse shapes that are not those of a LoRA update's factors."""
    a, b = tuple(shape_a), tuple(shape_b)
    plain = all(type(size) is int and size > 0 for size in a + b)
    if not plain or not 2 <= len(a) <= 5 or len(a) != len(b) or b[1] != a[0] or any(size != 1 for size in b[2:]):
        raise FormatError(
            f"A has shape {str(a)[:80]} and B has shape {str(b)[:80]}",
            where=where,
            rule="A must have shape (rank, inputs, *kernel) and B (outputs, rank, 1, …)",
        )
    if max(prod(a), prod(b)) > MOST_VALUES:
        raise FormatError(
            f"the factors have shapes {a} and {b}", where=where, rule=f"a factor has at most {MOST_VALUES} values"
        )


def require_shape(info: TensorInfo | None, name: str, shape: tuple[int | None, ...], where: str) -> TensorInfo:
    """Return a tensor's entry of a header if it is floating and of this shape; None stands for any size."""
    shown = [size if size is not None else "any" for size in shape]
    if info is None:
        raise FormatError(f"there is no tensor {name[:200]!r}", where=where, rule=f"floating values of shape {shown}")
    fits = len(info.shape) == len(shape) and all(
        size in (None, actual) for size, actual in zip(shape, info.shape, strict=True)
    )
    if not fits or not info.dtype.is_floating_point:
        raise FormatError(
            f"tensor {name[:200]!r} has {info.dtype} values of shape {list(info.shape)}",
            where=where,
            rule=f"floating values of shape {shown}",
        )
    return info


def finite(values: Tensor, name: str, where: str) -> Tensor:
    """Return values in float64; raises DataError where one is NaN or Inf."""
    exact = values.double()
    if not bool(torch.isfinite(exact).all()):
        raise DataError(
            f"NaN or Inf in tensor {name[:200]!r}", where=where, next_step="write the subspace again without it"
        )
    return exact


def _is_text(name: str) -> bool:
    """Half surrogates, which JSON can spell, are in no file name and no header."""
    return name.isprintable() or not any("\ud800" <= char <= "\udfff" for char in name)
