"""Frozen records that rooms hand to each other and to the user: no tensors, no files, no behaviour beyond arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, TypeVar

T = TypeVar("T")

Progress = Callable[[str, int, int], None]
"""Called as progress(stage, done, total) while long work runs."""


def no_progress(stage: str, done: int, total: int) -> None:
    """Report nothing."""


def telling(progress: Progress, stage: str, items: Collection[T]) -> Iterator[T]:
    """Yield the items, and report each when the next is asked for."""
    for done, item in enumerate(items, 1):
        yield item
        progress(stage, done, len(items))


def finite(value: float) -> float | None:
    """The number as JSON has it, which knows neither NaN nor infinity."""
    return value if math.isfinite(value) else None


def plain(value: Any) -> Any:
    """Turn records, tuples and mappings into what `json` writes."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


@dataclass(frozen=True)
class Layer:
    """One named weight that every model of a zoo has in one shape.

    Attributes:
        name: its name in the files (a LoRA update: its module; a factor: the module and `lora_A` or `lora_B`).
        kind: `dense`, or `update` for a LoRA update kept as factors.
        shape: (outputs, inputs) of its matrix.
        tensor_shape: its shape in the files.
        unfolding: how the tensor becomes the matrix.
        dtype: the widest dtype that a model stores it in.
        num_bytes: bytes of it in the files of the zoo's first model.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    tensor_shape: tuple[int, ...]
    unfolding: str
    dtype: str
    num_bytes: int

    @property
    def num_values(self) -> int:
        """Number of values of the matrix."""
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class LeftOut:
    """A tensor that is no layer, why, and how many models have it; it is carried in the bundle unchanged."""

    tensor: str
    reason: str
    num_models: int


@dataclass(frozen=True)
class SkippedModel:
    """A model that the zoo leaves out, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class ZeroUpdates:
    """The modules that one adapter lacks and others have, which count as updates of zero in it."""

    model: str
    modules: tuple[str, ...]


@dataclass(frozen=True)
class UpdateRank:
    """The rank of one rebuilt LoRA update M, and what a bound on the rank leaves of it.

    Attributes:
        rank: of the update as it is written.
        whole: rank of M, the least that holds it.
        original: rank of the update in the model's own file.
        energy: ‖M‖².
        lost: ‖M − M̂‖², with M̂ the best approximation of `rank`; zero where nothing is cut.
    """

    rank: int
    whole: int
    original: int
    energy: float
    lost: float

    @property
    def loss(self) -> float:
        """‖M − M̂‖² / ‖M‖², a share of its energy; zero for an update that is zero."""
        return self.lost / self.energy if self.energy > 0 else 0.0


@dataclass(frozen=True)
class UpdateRanks:
    """The ranks of a rebuilt adapter's updates; `rank`, `whole` and `original` are the largest of its layers."""

    layers: Mapping[str, UpdateRank]

    def __repr__(self) -> str:
        ranks = f"rank={self.rank}, whole={self.whole}, original={self.original}"
        return f"UpdateRanks({len(self.layers)} layers, {ranks}, loss={self.loss:.3g})"

    @property
    def rank(self) -> int:
        """The rank that a program which loads the adapter must allow."""
        return max(layer.rank for layer in self.layers.values())

    @property
    def whole(self) -> int:
        """The largest rank before the cut."""
        return max(layer.whole for layer in self.layers.values())

    @property
    def original(self) -> int:
        """The largest rank in the model's own file."""
        return max(layer.original for layer in self.layers.values())

    @property
    def loss(self) -> float:
        """‖M − M̂‖² / ‖M‖² over all layers together, a share of the energy."""
        energy = sum(layer.energy for layer in self.layers.values())
        return self.lost / energy if energy > 0 else 0.0

    @property
    def lost(self) -> float:
        """‖M − M̂‖² over all layers together."""
        return sum(layer.lost for layer in self.layers.values())

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain JSON values."""
        layers = {
            name: {"rank": layer.rank, "whole_rank": layer.whole, "original_rank": layer.original, "loss": layer.loss}
            for name, layer in self.layers.items()
        }
        return {
            "rank": self.rank,
            "whole_rank": self.whole,
            "original_rank": self.original,
            "loss": self.loss,
            "layers": layers,
        }


@dataclass(frozen=True)
class ByteCount:
    """Bytes of a zoo and of its bundle; `zoo` and `bundle` count the analysed layers, `whole_*` everything on disk.

    Attributes:
        per_model: what one more model adds to the bundle, its carried tensors included.
        moments: the optional moments file, counted apart from `whole_bundle`.
        break_even_models: the least number of models at which the bundle, with this basis, is smaller than the models'
            files; None where a model's own share is no smaller than its file.
    """

    zoo: int
    bundle: int
    per_model: int
    whole_zoo: int
    whole_bundle: int
    moments: int
    break_even_models: int | None


@dataclass(frozen=True)
class LayerFit:
    """How well a fitted layer holds its zoo.

    Attributes:
        rank: directions kept, per truncated axis.
        reason: why so many, per truncated axis.
        energy: Σ‖X‖² over the models, the denominator of `mean_energy` and `residual`.
        variance: Σ‖X − M‖² about the center, the denominator of `captured`, `heldout` and `null`; zero where it is round-off.
        captured: share of the stack's centred energy that is kept, in-sample; None for a layer without variance, or imported.
        heldout: the same of models left out of the fit: for axis `models` alone as many of five folds as hold 40 models,
            else one of five; None for sides above 2,048 that are not sketched and centers other than `models`, where it is not
            computed.
        null: what the same number of directions captures of unrelated models with the same norms (of more than 256 models, a part
            stands for all); models axis only.
        mean_energy: share of the stack's whole energy that lies in its mean.
        residual: share of the whole energy (mean included) that is lost.
        note: what a reader must know, such as `no variance` or `trivial`.
        bound: with solver `sketch`, what bases and cores of the same ranks could hold beyond these at most, as a share of Σ‖X − M‖²
            (of updates: of Σ‖X‖²); None for solver `exact`, and where there is no energy to share.
    """

    shape: tuple[int, int]
    rank: dict[str, int]
    reason: dict[str, str]
    energy: float
    variance: float
    captured: float | None
    heldout: float | None
    null: float | None
    mean_energy: float
    residual: float
    note: str = ""
    bound: float | None = None


@dataclass(frozen=True)
class AloneRow:
    """The control without sharing: every layer of every model cut to a lower rank by its own SVD.

    Attributes:
        rank: the rank to which layers of a larger one are cut; a layer that its factors would not make smaller stays whole.
        residual: share of the analysed energy that is lost, exact.
        bytes: of all models then; other tensors and headers stay as they are.
        per_model: bytes of one of them, without what is there once.
        about: `zero`: the update, or the difference from the base, is cut itself; `mean`: its deviation from the models' mean is
            cut, and the mean is stored once.
    """

    rank: int
    residual: float
    bytes: int
    per_model: int = 0
    about: str = "zero"


@dataclass(frozen=True)
class FitReport:
    """What a fit did: per layer ranks and captured energy; Σ‖X‖² of all analysed layers (`energy`) and the share of it that is
    lost (`residual`, in-sample); duplicates in function; bytes; time (s) and peak memory (bytes); the control without sharing
    (`alone`; empty where it was not measured)."""

    num_models: int
    num_layers: int
    view: str
    center: str
    axes: tuple[str, ...]
    layers: dict[str, LayerFit]
    energy: float
    residual: float
    duplicates: tuple[tuple[str, str], ...]
    bytes: ByteCount
    left_out: tuple[LeftOut, ...]
    skipped: tuple[SkippedModel, ...]
    warnings: tuple[str, ...]
    seconds: float
    peak_memory: int
    alone: tuple[AloneRow, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain JSON values."""
        return dict(plain(self))


def weighted_share(layers: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """A share over several layers, weighted by what it is a share of; None where no layer has it."""
    weight = "energy" if key in ("mean_energy", "residual") else "variance"
    known = [layer for layer in layers if layer[key] is not None]
    whole = sum(layer[weight] for layer in known)
    return sum(layer[key] * layer[weight] for layer in known) / whole if whole > 0 else None
