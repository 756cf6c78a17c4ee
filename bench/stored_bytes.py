"""Bytes against loss: bundles of every form, and models that are compressed each by itself, on zoos of the nursery.

    python -m bench --only bytes

Held-out models are those of the zoo's own folder for them, else every sixth. Bundles are fitted to 10, 30 and 60 of the others.
Beside them each model is kept by itself: its layers (of an adapter the factors, of a fine-tune the differences from its parent)
rounded, cut to a low rank by their own SVD, as they are or about the mean, or its files compressed by zstd. The energy lost on
held-out models is measured for all, the accuracy only for ways that no smaller one nearly equals.
"""

from __future__ import annotations

import importlib
import json
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import eigenzoo as ez
from bench.rates import FILES, MEAN, NUMBERS, PARENT, Row, at_number, frontier
from bench.sizes import BytesPlan
from bench.suite import Record, tell
from eigenzoo import nursery
from eigenzoo.cli.demo import HELD_OUT as EVERY
from eigenzoo.linalg.lora import cut_product
from eigenzoo.linalg.quantised import CODINGS, SCALES, dequantise, num_blocks, num_codes, quantise
from eigenzoo.nursery.recipe import HELD_OUT, RECIPE
from eigenzoo.nursery.recipe import PARENT as BASE
from eigenzoo.subspace.fitting.alone import is_cut

Metric = Callable[[Path], float]

FLOAT, SMALL = ("float32", "float32"), ("nf4", "bfloat16")
DTYPES = (FLOAT, ("int8", "bfloat16"), SMALL)
"""Dtypes of bases and coefficients. Fewer models than all are fitted in the last only."""

CORES = (1, 2, 4)
"""Ranks of cores."""

ERRORS = (0.03, 0.1, 0.3)
"""Bounds by which ranks are chosen for each layer."""

ZSTD_LEVEL = 19
ROUNDED, ZSTD, CUT = "each rounded", "each by zstd", "each cut by its own SVD"


@dataclass(frozen=True)
class Bundle:
    """A bundle: the options of its fit."""

    family: str
    name: str
    options: Mapping[str, Any]
    dtypes: tuple[str, str]


@dataclass(frozen=True)
class Alone:
    """Models by themselves: the dtype of their layers, the rank that these are cut to, whether about the mean."""

    family: str
    name: str
    dtype: str = "float32"
    rank: int | None = None
    mean: bool = False


AS_THEY_ARE = Alone(FILES, "files")


def alone(plan: BytesPlan) -> list[Alone]:
    """All ways to keep models by themselves."""
    cut = [
        Alone(CUT, f"each cut to rank {rank}, {dtype}", dtype, rank)
        for rank in plan.cuts
        for dtype in ("float32", "nf4")
    ]
    return [
        Alone(PARENT, "the parent", rank=0),
        AS_THEY_ARE,
        *(Alone(ROUNDED, f"each in {dtype}", dtype) for dtype in ("bfloat16", "int8", "nf4")),
        *cut,
        Alone(MEAN, "the mean", rank=0, mean=True),
        *(replace(way, name=f"the mean, {way.name}", mean=True) for way in cut if way.dtype == "nf4"),
    ]


def bundles(plan: BytesPlan, number: int, dtypes: Sequence[tuple[str, str]]) -> Iterator[Bundle]:
    """All bundles of a plan that so many models allow."""
    ways: list[tuple[str, str, dict[str, Any]]] = [
        ("axis models", f"{rank} directions", {"rank": {"models": rank}}) for rank in plan.models if rank < number
    ]
    for side in plan.sides:
        rank = {"outputs": side, "inputs": side}
        ways.append(("shared sides", f"sides {side}", {"rank": rank}))
        for core in CORES:
            if 2 * core < side:  # else the factors are not smaller than the core
                ways.append(
                    ("low-rank cores", f"sides {side}, cores of rank {core}", {"rank": rank, "core_rank": core})
                )
    for error in ERRORS:
        options = {"axes": ("outputs", "inputs"), "max_error": error}
        ways.append(("sides by --max-error", f"sides by --max-error {error}", options))
    for family, name, options in ways:
        for pair in dtypes:
            label = pair[0] if len(set(pair)) == 1 else " + ".join(pair)
            yield Bundle(family, f"{name}, {label}", options, pair)


def run_bytes(plan: BytesPlan, home: Path, metric: Metric | None = None) -> Record:
    """Measure one zoo, which is trained in `home` unless it is there."""
    path = home / plan.kind
    if not (path / RECIPE).exists():
        tell(f"training {plan.kind}")
        nursery.make(plan.kind, path)
    base = path / BASE if plan.view == "delta" else None
    fitted, held = split(path, plan.view, base)
    tell(f"bytes of {plan.kind}")
    with tempfile.TemporaryDirectory() as folder:
        rows = Measured(fitted, held, base, metric or nursery.metric(path), Path(folder)).rows(plan)
    return {
        "kind": plan.kind,
        "title": plan.title,
        "fitted": len(fitted),
        "held_out": len(held),
        "rows": [vars(row) for row in rows],
    }


def split(path: Path, view: str | None = None, base: Path | None = None) -> tuple[ez.Zoo, ez.Zoo]:
    """Open the fitted and the held-out models of a zoo."""
    zoo = ez.open_zoo(path, view=view, base=base)
    if (path / HELD_OUT).exists():
        return zoo, ez.open_zoo(path / HELD_OUT, view=view, base=base)
    held = zoo.names[EVERY - 1 :: EVERY]
    return zoo.select(names=[name for name in zoo.names if name not in held]), zoo.select(names=held)


@dataclass(frozen=True)
class Measured:
    """Models that are fitted and held out, the parent that fine-tunes are differences from, the metric, a folder for bundles."""

    fitted: ez.Zoo
    held: ez.Zoo
    base: Path | None
    metric: Metric
    folder: Path

    def rows(self, plan: BytesPlan) -> list[Row]:
        """Measure every way for every number of models, then the accuracy of those on the frontier."""
        ways: list[tuple[Row, Alone | Bundle]] = []
        numbers = sorted({min(number, len(self.fitted)) for number in plan.fitted})
        by_itself = [(way, None if way.mean else self.alone(way, numbers[-1])) for way in alone(plan)]
        compressed = self.compressed(numbers[-1])
        for number in numbers:
            ways += [(replace(row or self.alone(way, number), fitted=number), way) for way, row in by_itself]
            ways += [(replace(row, fitted=number), AS_THEY_ARE) for row in compressed]
            every = bundles(plan, number, DTYPES if number == numbers[-1] else DTYPES[-1:])
            ways += [(self.bundle(way, number), way) for way in every]
        rows = [row for row, _ in ways]
        asked = {
            row for number in NUMBERS for row in frontier(at_number(rows, number), number, by_family=plan.by_family)
        }
        tell(f"accuracy of {len(asked)} of {len(rows)} ways")
        known: dict[Any, tuple[float, float]] = {}
        for place, (row, way) in enumerate(ways):
            key = (way.name, row.fitted if isinstance(way, Bundle) or way.mean else 0)
            if row in asked:
                if key not in known:
                    known[key] = self.score(way, row.fitted)
                rows[place] = replace(row, score=known[key][0], spread=known[key][1])
        return rows

    def subset(self, number: int) -> ez.Zoo:
        """So many fitted models, evenly from the list."""
        names = self.fitted.names
        return self.fitted.select(names=[names[place * len(names) // number] for place in range(number)])

    def bundle(self, way: Bundle, number: int) -> Row:
        """Fit and save a bundle."""
        dtype, coefficients = way.dtypes
        fit = ez.fit(self.subset(number), **way.options, dtype=dtype, coefficients_dtype=coefficients)
        space = ez.load(fit.save(self._place(way, number)), base=self.base)
        projected = space.project_many(self.held).values()
        energy = sum(sum(model.energies.values()) for model in projected)
        outside = sum(sum(model.outside.values()) for model in projected)
        counted = space.report["bytes"]
        return Row(
            way.family,
            way.name,
            number,
            counted["whole_bundle"] - number * counted["per_model"],
            counted["per_model"],
            _values(self._place(way, number).glob("basis*.safetensors")),
            _values(self._place(way, number).glob("coefficients/*.safetensors")) / number,
            space.report["residual"],
            outside / energy,
        )

    def _place(self, way: Bundle, number: int) -> Path:
        return self.folder / f"{number} {way.name}"

    def score(self, way: Alone | Bundle, number: int) -> tuple[float, float]:
        """Rebuild the held-out models and measure them: the mean, and its standard error."""
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            if isinstance(way, Alone):
                self.alone(way, number, folder)
            else:
                space = ez.load(self._place(way, number), base=self.base)
                for model, coefficients in space.project_many(self.held).items():
                    space.rebuild(coefficients).save(folder / model)
            scores = [self.metric(path) for path in sorted(folder.iterdir())]
        spread = statistics.stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else 0.0
        return statistics.fmean(scores), spread

    def alone(self, way: Alone, number: int, folder: Path | None = None) -> Row:
        """Keep held-out models by themselves, and write them into a folder if one is given."""
        rest = sum(model.weight_files()[0].stat().st_size for model in self.held.models)
        shared, size, lost, energy = 0, 0, 0.0, 0.0
        kept: list[dict[str, Sequence[Tensor]]] = [{} for _ in self.held.names]
        for name, layer in self.held.layers.items():
            stack, mean = self.held.stack(name), torch.zeros(layer.shape, dtype=torch.float64)
            if way.mean:
                first = self.subset(number).stack(name)
                mean = sum((product(values_of(first, place)) for place in range(number)), mean) / number
                shared += stored_size(mean, way.dtype)
                mean = rounded(mean, way.dtype)
            for place in range(len(self.held)):
                values = values_of(stack, place)
                rest -= sum(4 * part.numel() for part in values)
                original, parts = product(values), values
                if way.rank == 0:
                    parts = [torch.zeros_like(part) for part in values]
                elif way.rank is not None and is_cut(layer, way.rank):
                    whole = (original - mean, torch.eye(layer.shape[1], dtype=torch.float64))
                    parts = cut_product(*(values if len(values) == 2 and not way.mean else whole), way.rank).factors
                elif way.mean:
                    parts = [original - mean]
                size += sum(stored_size(part, way.dtype) for part in parts) if way.rank != 0 else 0
                # Each factor is stored direction by direction, so that a direction's values share scales.
                *left, right = parts
                parts = [*(rounded(part.T, way.dtype).T for part in left), rounded(right, way.dtype)]
                rebuilt = mean + product(parts)
                lost += float((original - rebuilt).square().sum())
                energy += float(original.square().sum())
                if folder is not None:
                    kept[place][name] = parts if len(parts) == len(values) == 2 and not way.mean else [rebuilt]
        for place, layers in enumerate(kept) if folder is not None else ():
            self._write(place, layers, folder)
        each, of_files = size / len(self.held), (rest + size) / len(self.held)
        return Row(way.family, way.name, number, shared, of_files, shared, each, None, lost / energy)

    def _write(self, place: int, layers: Mapping[str, Sequence[Tensor]], folder: Path) -> None:
        """Write a held-out model with other layers: factors of updates, or whole layers."""
        model = self.held.models[place]
        source, target = model.weight_files()[0], folder / model.path.name
        shutil.copytree(model.path, target)
        tensors = _tensors(source)
        if model.updates:
            pairs = {
                name: parts if len(parts) == 2 else (parts[0], torch.eye(parts[0].shape[1]))
                for name, parts in layers.items()
            }
            rank = max(right.shape[0] for _, right in pairs.values())
            for name, (left, right) in pairs.items():
                room = rank - right.shape[0]
                update = model.updates[name]
                tensors[update.key_b] = torch.nn.functional.pad(left.float(), (0, room)).contiguous()
                tensors[update.key_a] = torch.nn.functional.pad(right.float(), (0, 0, 0, room)).contiguous()
            config = json.loads((target / "adapter_config.json").read_text())
            changed = {"r": rank, "lora_alpha": rank, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
            (target / "adapter_config.json").write_text(json.dumps(config | changed))
        else:
            parent = {} if self.base is None else _tensors(next(self.base.glob("*.safetensors")))
            for name, (matrix,) in layers.items():
                values = tensors[name]
                difference = matrix.reshape(values.shape)
                tensors[name] = (parent.get(name, torch.zeros(())) + difference).to(values.dtype).contiguous()
        with safe_open(source, "pt") as opened:
            save_file(tensors, target / source.name, opened.metadata())

    def compressed(self, number: int) -> list[Row]:
        """Held-out models' files by zstd; nothing where the library is not installed."""
        try:
            zstandard = importlib.import_module("zstandard")
        except ImportError:
            return []
        compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL)
        size = statistics.fmean(
            len(compressor.compress(model.weight_files()[0].read_bytes())) for model in self.held.models
        )
        return [Row(ZSTD, f"each by zstd -{ZSTD_LEVEL}", number, 0, size, 0, size, None, 0.0)]


def values_of(stack: Any, place: int) -> Sequence[Tensor]:
    """A model's layer in float64: the factors of an update with the scale in the first, or the matrix."""
    parts = stack.factors(place) if hasattr(stack, "factors") else [stack.matrix(place)]
    return [part.double() for part in parts]


def product(parts: Sequence[Tensor]) -> Tensor:
    """The matrix that is kept as one part or two."""
    return parts[0] if len(parts) == 1 else parts[0] @ parts[1]


def rounded(values: Tensor, dtype: str) -> Tensor:
    """Values as a dtype holds them; in float32 as they are."""
    if dtype == "float32":
        return values
    if dtype not in CODINGS:
        return values.to(getattr(torch, dtype)).to(values.dtype)
    found = dequantise(*quantise(values.float().reshape(-1), dtype), dtype, values.numel())
    return found.view(values.shape).to(values.dtype)


def stored_size(values: Tensor, dtype: str) -> int:
    """Bytes of values in a dtype, scales included."""
    count = values.numel()
    if dtype not in CODINGS:
        return count * getattr(torch, dtype).itemsize
    return num_codes(count, dtype) + SCALES.itemsize * num_blocks(count)


def _tensors(path: Path) -> dict[str, Tensor]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _values(files: Iterable[Path]) -> int:
    """Bytes of safetensors files without their headers."""
    found = 0
    for path in files:
        with path.open("rb") as file:
            found += path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")
    return found
