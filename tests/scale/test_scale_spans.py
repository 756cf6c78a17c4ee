"""Layers in spans: one result whatever number of workers, and whether a layer is kept in memory or read once more."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scale_zoos import as_stored, contents, planted, read_in_float32, read_in_spans
from torch import Tensor

import eigenzoo as ez
from builders import random_factors, write_adapter, write_stacks
from eigenzoo.cli.app import main
from eigenzoo.errors import DataError, UsageError
from eigenzoo.formats.bundle.basis_files import BasisWriter
from eigenzoo.linalg.spectrum import FLOAT32_ROUND_OFF
from eigenzoo.passes import buffers
from eigenzoo.passes.resources import LEAST_MEMORY, Resources
from eigenzoo.passes.workers import local_workers
from eigenzoo.subspace.bundles.storage import moment_tensors
from eigenzoo.subspace.fitting import fit_layers
from eigenzoo.subspace.fitting.fit_layers import fit_task
from eigenzoo.subspace.fitting.options import resolve_options
from eigenzoo.subspace.fitting.work import Work
from eigenzoo.subspace.moments.moments_cache import MomentsCache
from tolerance import tolerance

NUM_MODELS, SHAPE = 10, (90, 70)
CENTERS = ("models", "none", "columns", "global")
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


@pytest.fixture(autouse=True)
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    read_in_float32(monkeypatch)


def spans_of(monkeypatch: pytest.MonkeyPatch, rows: int, *, kept: bool) -> None:
    """Cut layers into spans of at most so many output rows (half as many where values take twice the bytes)."""
    read_in_spans(monkeypatch, rows * 4 * NUM_MODELS * SHAPE[1], kept=kept)


def fitted(zoo: ez.Zoo, folder: Path, num: int = 1, **options: Any) -> tuple[dict[str, bytes], dict[str, Tensor]]:
    """The bundle, to the byte, and the moments, of a fit on so many threads."""
    with local_workers(num=num) as workers:
        space = ez.fit(zoo, 4, workers=workers, cache=False, **options)
    space.save(folder)
    return contents(folder), moment_tensors("w", space.moments("w"))


@pytest.mark.parametrize("center", CENTERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_spans_and_workers_change_no_bit_of_the_moments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, center: str
) -> None:
    stack = planted(NUM_MODELS, SHAPE, parent=3.0)
    zoo = ez.open_zoo(write_stacks(tmp_path / "zoo", {"w": stack}, dtype))
    spans_of(monkeypatch, 17, kept=True)
    assert len(zoo.stack("w").spans()) in (6, 12)
    bundle, moments = fitted(zoo, tmp_path / "kept", center=center)
    assert fitted(zoo, tmp_path / "kept-5", 5, center=center)[0] == bundle
    spans_of(monkeypatch, 17, kept=False)
    twice, again = fitted(zoo, tmp_path / "spans", center=center)
    assert again.keys() == moments.keys()
    assert all(torch.equal(again[name], moments[name]) for name in moments)
    for num in (2, 5):
        assert fitted(zoo, tmp_path / f"spans-{num}", num, center=center)[0] == twice
    first, other = ez.load(tmp_path / "kept"), ez.load(tmp_path / "spans")
    for name in zoo.names:
        found, wanted = (space.rebuild(name).layer("w") for space in (other, first))
        assert float((found - wanted).norm() / wanted.norm()) <= tolerance(1, dtype=torch.float32)


def test_results_come_in_the_order_of_the_jobs_whoever_is_first() -> None:
    def after(seconds: float, value: int) -> int:
        time.sleep(seconds)
        return value

    with local_workers(num=4) as workers:
        jobs = [
            (number, [partial(after, 0.02 / (1 + number), 10 * number + part) for part in (0, 1)])
            for number in range(9)
        ]
        assert list(workers.in_order(jobs)) == [(number, [10 * number, 10 * number + 1]) for number in range(9)]


def test_an_error_comes_in_its_turn_and_what_has_not_begun_is_left() -> None:
    begun: list[int] = []

    def call(number: int) -> int:
        begun.append(number)
        time.sleep(0.005)
        if number == 2:
            raise DataError("the third")
        return number

    with local_workers(num=2) as workers:
        done = workers.in_order((number, [partial(call, number)]) for number in range(50))
        assert [next(done), next(done)] == [(0, [0]), (1, [1])]
        with pytest.raises(DataError, match="the third"):
            next(done)
    assert len(begun) < 10


@pytest.mark.parametrize("center", CENTERS)
@pytest.mark.parametrize("kept", [True, False], ids=["kept", "spans"])
def test_every_center_is_that_of_the_dense_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, center: str, kept: bool
) -> None:
    stack = planted(NUM_MODELS, SHAPE, parent=3.0)
    zoo = ez.open_zoo(write_stacks(tmp_path / "zoo", {"w": stack}))
    spans_of(monkeypatch, 17, kept=kept)
    space = ez.fit(zoo, NUM_MODELS - 1, center=center)
    rows = as_stored(stack)
    mean = rows.mean(0).view(SHAPE)
    removed = {
        "models": mean,
        "none": 0 * mean,
        "columns": mean.mean(0).expand(SHAPE),
        "global": mean.mean().expand(SHAPE),
    }
    about = rows - removed[center].reshape(1, -1)
    found = space.moments("w").centered_NN
    assert float((found - about @ about.T).abs().max()) <= 1e-6 * float((about @ about.T).diagonal().max())
    # About the mean all is kept; about another center the weakest of the N directions is lost.
    weakest = 0.0 if center == "models" else float(np.linalg.svd(about.numpy(), compute_uv=False)[-1] ** 2)
    rebuilt = torch.stack([space.rebuild(name).layer("w").flatten() for name in space.names])
    assert float((rebuilt - rows).square().sum()) == pytest.approx(
        weakest, rel=1e-3, abs=1e-10 * float(rows.square().sum())
    )


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "spans"])
def test_a_base_is_subtracted_span_by_span(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: bool) -> None:
    stack = planted(NUM_MODELS, SHAPE)
    parent = planted(1, SHAPE, seed=1)
    (base,) = write_stacks(tmp_path / "base", {"w": parent}, torch.bfloat16)
    paths = write_stacks(tmp_path / "zoo", {"w": stack + parent})
    spans_of(monkeypatch, 17, kept=kept)
    moments = ez.fit(paths, 4, base=base, center="none").moments("w")
    rows = as_stored(stack + parent) - as_stored(parent, torch.bfloat16)
    assert float((moments.raw_NN - rows @ rows.T).abs().max()) <= 1e-6 * float((rows @ rows.T).max())


def test_memory_decides_on_blocks_and_spans_on_sums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are as large as there is memory; what they sum up to is decided by the spans."""
    zoo = ez.open_zoo(write_stacks(tmp_path / "zoo", {"w": planted(NUM_MODELS, (400, 700))}))
    monkeypatch.setattr("eigenzoo.passes.resources.MAX_LAYER_BYTES", 0)
    found = []
    for max_memory in (None, LEAST_MEMORY):
        with local_workers(max_memory, num=8) as workers:
            found.append(ez.fit(zoo, 4, workers=workers, cache=False).moments("w"))
    # Products are the same ones, of rows whose mean is rounded otherwise where a block ends within a vector of the machine.
    scale = float(found[0].gram_NN.abs().max())
    assert float((found[0].gram_NN - found[1].gram_NN).abs().max()) <= 1e-2 * FLOAT32_ROUND_OFF * scale
    assert found[0].entries == pytest.approx(found[1].entries, rel=1e-8)


class Lent:
    """Records how many bytes of buffers are lent at once, and in one piece."""

    def __init__(self) -> None:
        self.now, self.most, self.largest, self.times = 0, 0, 0, 0

    def record(self, borrow: Callable[..., AbstractContextManager[Tensor]]) -> Callable[..., Any]:
        @contextmanager
        def recorded(rows: int, columns: int, dtype: torch.dtype, **options: Any) -> Iterator[Tensor]:
            num_bytes = rows * columns * dtype.itemsize
            self.now += num_bytes
            self.times += 1
            self.most, self.largest = max(self.most, self.now), max(self.largest, num_bytes)
            with borrow(rows, columns, dtype, **options) as lent:
                yield lent
            self.now -= num_bytes

        return recorded


@pytest.fixture
def lent(monkeypatch: pytest.MonkeyPatch) -> Lent:
    found = Lent()
    for module in ("zoo.stack", "subspace.moments.collecting", "subspace.moments.update_moments"):
        monkeypatch.setattr(f"eigenzoo.{module}.borrow", found.record(buffers.borrow))
    return found


@pytest.mark.parametrize("center", ["models", "columns"])
def test_buffers_stay_within_the_memory_given(tmp_path: Path, lent: Lent, center: str) -> None:
    """Half of the memory is for blocks, shared by all tasks at once; the other half for what is made of them."""
    zoo = ez.open_zoo(write_stacks(tmp_path / "zoo", {"w": planted(30, (250, 512))}))
    share = LEAST_MEMORY // 2 // 4
    assert zoo.stack("w").num_bytes > 7 * share
    with local_workers(LEAST_MEMORY, num=4) as workers:
        ez.fit(zoo, 4, center=center, workers=workers)
    assert lent.largest <= share, "one task took more than its share"
    assert lent.most <= 4 * share
    assert lent.now == 0, "not all was given back"
    # Once for the moments and once for the basis.
    assert lent.times >= 2 * 8


def test_tiles_of_updates_stay_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lent: Lent) -> None:
    monkeypatch.setattr("eigenzoo.subspace.moments.update_moments.TILE_BYTES", 2**13)
    ez.fit([write_adapter(tmp_path / f"m{n}", random_factors({"w": SHAPE}, 4, n)) for n in range(12)], 4)
    # Two tiles at a time, one update at least in each.
    assert 0 < lent.most <= 2 * 2**13
    assert lent.now == 0


def test_a_large_layer_is_not_held_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lent: Lent) -> None:
    zoo = ez.open_zoo(write_stacks(tmp_path / "zoo", {"w": planted(30, (250, 512))}))
    read_in_spans(monkeypatch, 2**20)
    ez.fit(zoo, 4)
    assert lent.most <= 2**20 * 33 / 30, "more than one span, and the rows of the mean, its rounding and ones"
    assert lent.times == 2 * len(zoo.stack("w").spans())


def test_results_do_not_pile_up_before_a_slow_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spans of a basis wait for their turn to be written; workers wait too, when what waits weighs too much."""
    zoo = ez.open_zoo(write_stacks(tmp_path / "zoo", {"w": planted(NUM_MODELS, SHAPE)}))
    spans_of(monkeypatch, 2, kept=False)
    monkeypatch.setattr("eigenzoo.passes.workers.MAX_PENDING_BYTES", 0)
    made, written, ahead = [], [], []
    make, write = fit_layers.basis_task, BasisWriter.write_flat

    def counted(*args: Any) -> Any:
        made.append(1)
        return make(*args)

    def slow(writer: BasisWriter, name: str, start: int, tensor: Tensor) -> None:
        if name == "w/mean":
            ahead.append(len(made) - len(written))
            written.append(1)
            time.sleep(0.002)
        write(writer, name, start, tensor)

    monkeypatch.setattr(fit_layers, "basis_task", counted)
    monkeypatch.setattr(BasisWriter, "write_flat", slow)
    with local_workers(num=2) as workers:
        ez.fit(zoo, 4, workers=workers)
    assert len(written) == len(zoo.stack("w").spans()) == 45
    assert max(ahead) <= 2 + 1, "those that run, and the one that is written"


def test_memory_that_is_given_back_is_lent_again_and_let_go_at_the_end(tmp_path: Path) -> None:
    with buffers.borrow(3, 5, torch.float32) as first:
        place = first.data_ptr()
        with buffers.borrow(3, 5, torch.float32) as second:
            assert second.data_ptr() != place
    with buffers.borrow(2, 7, torch.float32) as again:
        assert again.shape == (2, 7)
        assert again.data_ptr() in (place, second.data_ptr())
    with local_workers():
        ez.fit(write_stacks(tmp_path, {"w": planted(NUM_MODELS, SHAPE)}), 2)
    assert buffers._free == []


def test_too_little_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = write_stacks(tmp_path / "zoo", {"w": planted(NUM_MODELS, SHAPE)})
    for call in (ez.fit, ez.evidence, ez.plan):
        with pytest.raises(
            UsageError, match=r"16,777,215 bytes of memory are too few\. Blocks need at least 16,777,216 bytes"
        ):
            call(paths, max_memory=LEAST_MEMORY - 1)
    words = ["fit", *map(str, paths), "-o", str(tmp_path / "bundle"), "--rank", "2", "--quiet", "--max-memory"]
    for size, code, text in (
        ("1MB", 2, "UsageError: 1,000,000 bytes of memory are too few. Blocks need at least"),
        ("16MiB", 0, ""),
    ):
        monkeypatch.setattr("sys.argv", ["eigenzoo", *words, size])
        with pytest.raises(SystemExit, match=str(code)):
            main()
        assert text in " ".join(capsys.readouterr().err.split())
    assert list(ez.load(tmp_path / "bundle").verify()) == []


def test_memory_that_is_handed_on_comes_back_when_nothing_refers_to_it() -> None:
    buffers.release()
    first = buffers.lend(3, 1000, torch.float32)
    address, view = first.data_ptr(), first[2].view(-1)[5:]
    first.fill_(7)
    del first
    gc.collect()
    assert buffers.lend(3, 1000, torch.float32).data_ptr() != address, "a view is still there"
    assert bool((view == 7).all())
    del view
    gc.collect()
    held = [buffers.lend(3, 1000, torch.float32) for _ in range(2)]
    assert address in {tensor.data_ptr() for tensor in held}
    buffers.release()


@pytest.mark.parametrize("view", ["full weights", "updates"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("rank", [4, {"models": 3, "outputs": 20, "inputs": "auto"}, {"outputs": 1.0}], ids=str)
def test_no_basis_weighs_more_than_is_said_before_it_is_made(tmp_path: Path, view: str, dtype: str, rank: Any) -> None:
    if view == "updates":
        updates = [random_factors({"w": SHAPE}, 8, n) for n in range(NUM_MODELS)]
        zoo = ez.open_zoo([write_adapter(tmp_path / f"m{n}", update) for n, update in enumerate(updates)])
    else:
        zoo = ez.open_zoo(write_stacks(tmp_path, {"w": planted(NUM_MODELS, SHAPE)}))
    options = resolve_options(rank, None, "models", dtype, None, None, 0)
    (name,) = zoo.layers
    result = fit_task(zoo, name, options, Resources())
    tensors = [*result.tensors.values()]
    for span in result.spans:
        tensors += [span.directions_KD] if span.mean_D is None else [span.directions_KD, span.mean_D]
    with local_workers(num=1) as workers:
        layers = fit_layers.LayerPass(
            zoo, options, {}, workers, BasisWriter(tmp_path, [name], 6), {}, MomentsCache(zoo, None), Work(), {}
        )
        assert sum(tensor.nbytes for tensor in tensors) <= layers._weight((name, None))
