"""Products elsewhere than on the CPU: the same to their precision, and a device that is not there is refused."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from scale_zoos import planted, read_in_float32, read_in_spans
from torch import Tensor

import eigenzoo as ez
from builders import edit_model, random_factors, seeded, write_adapter, write_stacks
from eigenzoo.cli.app import main
from eigenzoo.errors import DataError, UsageError
from eigenzoo.linalg import kernels
from eigenzoo.linalg.block_sums import add_block, empty_sums, exact_mean, num_extended
from eigenzoo.linalg.gram import center_gram
from eigenzoo.linalg.update_tiles import Tile, products
from eigenzoo.passes.resources import Resources, check_device
from eigenzoo.subspace.moments.collecting import MomentRequest, dense_moments, loaded, sum_span
from eigenzoo.subspace.moments.sketched import sketch_sides
from eigenzoo.subspace.moments.update_moments import update_side
from tolerance import tolerance

NUM_MODELS, SHAPE = 12, (120, 96)

on_a_gpu = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU and a torch build that knows it"),
]


class Elsewhere(torch.Tensor):
    """A tensor of the CPU that says it is not there: kernels take torch's branch for it."""

    @property
    def device(self) -> torch.device:
        return torch.device("meta")


def elsewhere(values: Tensor) -> Tensor:
    return values.clone().as_subclass(Elsewhere)


def subtracted(rows_ND: Tensor) -> Tensor:
    rows_ND = rows_ND.clone()
    kernels.subtract(rows_ND, rows_ND[1].clone())
    return rows_ND


def mean_into(rows_ND: Tensor) -> Tensor:
    out = torch.empty_like(rows_ND[0])
    assert kernels.mean_rows(rows_ND, out).data_ptr() == out.data_ptr()
    return out


KERNELS: dict[str, Callable[[Tensor], Tensor]] = {
    "gram": kernels.gram,
    "bfloat16_gram": kernels.bfloat16_gram,
    "product": lambda rows_ND: kernels.product(rows_ND[:2], rows_ND.T),
    "mean_rows": kernels.mean_rows,
    "mean_rows into": mean_into,
    "subtract": subtracted,
    "column_energies": kernels.column_energies,
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_kernels_do_the_same_by_torch_as_by_numpy(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, kernel: str
) -> None:
    exact_ND = planted(7, (50, 30)).flatten(1)
    here, exact = (KERNELS[kernel](rows_ND.clone()) for rows_ND in (exact_ND.to(dtype), exact_ND))
    # Without numpy whoever took its branch would fail.
    monkeypatch.setattr(kernels, "np", None)
    there = KERNELS[kernel](elsewhere(exact_ND.to(dtype))).as_subclass(torch.Tensor)
    assert there.dtype == here.dtype
    assert float((there - here).abs().max()) <= tolerance(1, dtype=here.dtype, scale=float(here.abs().max()))
    if kernel == "bfloat16_gram":
        exact = exact_ND.bfloat16().double() @ exact_ND.bfloat16().double().T
    assert float((here - exact).abs().max()) <= tolerance(1, dtype=here.dtype, scale=float(exact.abs().max()))


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cuda", "device 'cuda', but torch sees no GPU.*Use --device cpu"),
        ("cuda:1", "device 'cuda:1', but torch sees no GPU"),
        ("mps", "unknown device 'mps'. Devices are cpu, cuda and cuda:<number>"),
        ("nonsense", "unknown device 'nonsense'. Devices are cpu, cuda and cuda:<number>"),
        ("cpu:0", "unknown device 'cpu:0'. Devices are"),
        ("", "unknown device ''. Devices are"),
    ],
)
def test_devices_that_are_not_there_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], device: str, message: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    paths = write_stacks(tmp_path / "zoo", {"w": planted(4, (6, 5))})
    for call in (ez.fit, ez.evidence, ez.plan):
        with pytest.raises(UsageError, match=message):
            call(paths, device=device)
    words = ["fit", str(tmp_path / "zoo"), "-o", str(tmp_path / "bundle"), "--device", device]
    monkeypatch.setattr("sys.argv", ["eigenzoo", *words])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert re.search(rf"UsageError: (unknown )?device {device!r}", " ".join(capsys.readouterr().err.split()))
    assert not (tmp_path / "bundle").exists()


def test_a_gpu_of_a_number_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    for device in ("cpu", "cuda", "cuda:1"):
        check_device(device)
    with pytest.raises(UsageError, match="device 'cuda:2', but torch sees 2 GPUs"):
        check_device("cuda:2")


def on_device(stack: Tensor, device: str) -> Tensor:
    """Extended rows of a stack, not centred."""
    rows_ND = stack.flatten(1).float()
    extended_ED = torch.zeros(num_extended(len(rows_ND)), rows_ND.shape[1])
    extended_ED[: len(rows_ND)] = rows_ND
    return extended_ED.to(device) if device != "elsewhere" else elsewhere(extended_ED)


SUMS = {"columns": True, "sides": True}


@pytest.mark.parametrize(("precision", "parent"), [("default", 0.0), ("fast", 0.0), ("default", 1e4)])
def test_sums_elsewhere_are_those_of_the_cpu(precision: str, parent: float) -> None:
    """Also of rows whose mean is far from them: what its rounding left is found without a look at the values."""
    stack = planted(NUM_MODELS, (150, SHAPE[1]), parent=parent)
    stack = stack if parent else stack - stack.mean(0)
    found = []
    for device in ("cpu", "elsewhere"):
        sums = empty_sums(NUM_MODELS, SHAPE[1], **SUMS)
        add_block(sums, on_device(stack, device), SHAPE[1], precision)
        found.append(sums.on_cpu())
    here, there = found
    rest = [float(sums.gram_EE[NUM_MODELS + 1, NUM_MODELS + 1]) for sums in found]
    assert [value > 0 for value in rest] == [parent > 0] * 2, "the rounding of the mean matters where it is far"
    # About the mean itself: its rounding is another where it is added up in another order.
    exact = center_gram(stack.float().double().flatten(1) @ stack.float().double().flatten(1).T)
    for sums in found:
        within = 1e-2 if precision == "fast" else tolerance(4, dtype=torch.float32)
        assert float((center_gram(sums.gram_NN) - exact).abs().max()) <= within * float(exact.abs().max())
    for one, two in ((here.columns_NI, there.columns_NI), (here.inputs_II, there.inputs_II)):
        assert one is not None
        assert two is not None
        one, two = (one - one.mean(0), two - two.mean(0)) if len(one) == NUM_MODELS else (one, two)
        assert float((one - two).abs().max()) <= tolerance(4, dtype=torch.float32, scale=float(one.abs().max()))
    assert float(there.squares) == pytest.approx(float(here.squares), rel=tolerance(4, dtype=torch.float32))


@pytest.mark.parametrize("precision", ["default", "fast"])
def test_a_span_is_summed_without_waiting_for_the_device(precision: str) -> None:
    """Tensors of "meta" have no values: whoever looks at one, and would wait for a GPU there, raises an error."""
    sums = empty_sums(NUM_MODELS, SHAPE[1], **SUMS, device="meta")
    for _ in range(2):
        rows_ED = on_device(planted(NUM_MODELS, (200, SHAPE[1])), "meta")
        add_block(sums, rows_ED, SHAPE[1], precision)
        assert exact_mean(rows_ED, NUM_MODELS).device.type == "meta"
    assert {part.device.type for part in (sums.gram_EE, sums.squares, sums.columns_NI, sums.inputs_II)} == {"meta"}
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        sums.on_cpu()


def tile(device: str, ranks: tuple[int, ...] = (2, 3, 3)) -> Tile:
    draw = seeded(sum(ranks))
    b_OP, a_PI = (torch.randn(shape, generator=draw) for shape in ((40, sum(ranks)), (sum(ranks), 30)))
    return Tile(b_OP.to(device), a_PI.to(device), ranks)


def test_products_of_tiles_wait_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The leading rows' products, a sum over rows, come back with those of the updates."""
    copied: list[tuple[int, ...]] = []

    def copy(values: Tensor) -> Tensor:
        copied.append(tuple(values.shape))
        return torch.zeros(values.shape, dtype=values.dtype)

    left, right = tile("meta"), tile("meta", (4, 2))
    monkeypatch.setattr("torch.Tensor.cpu", copy)
    products(left, right, 2, "default")
    assert copied == [(3, 2), (3, 2)]


def dense_stack(root: Path, num_models: int = NUM_MODELS) -> Any:
    write_stacks(root / "zoo", {"w": planted(num_models, SHAPE)})
    return ez.open_zoo(root / "zoo").stack("w")


@pytest.mark.parametrize("side", ["outputs", "sketch", "updates"])
def test_products_of_sides_run_on_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side: str) -> None:
    """Kernels are given tensors of the device, and their results come back once."""
    seen: set[str] = set()

    def record(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def recorded(*tensors: Tensor) -> Tensor:
            seen.update(tensor.device.type for tensor in tensors)
            return kernel(*tensors)

        return recorded

    for name in ("gram", "product"):
        monkeypatch.setattr(kernels, name, record(getattr(kernels, name)))
    if side == "updates":
        for n in range(40):
            write_adapter(tmp_path / f"m{n}", random_factors({"w": (60, 48)}, 4, n))
        stack = ez.open_zoo(tmp_path, view="update").stack("w")
        call: Callable[[str], object] = lambda device: update_side(stack, "outputs", device)  # noqa: E731
    elif side == "sketch":
        stack = dense_stack(tmp_path)
        call = lambda device: sketch_sides(stack, {"outputs": 4}, None, device=device)  # noqa: E731
    else:
        stack = dense_stack(tmp_path)
        request = MomentRequest(("models", "outputs"))
        spans = [sum_span(stack, *span, request, Resources()) for span in stack.spans()]
        seen.clear()
        call = lambda device: dense_moments(stack, spans, request, device)  # noqa: E731
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        call("meta")
    assert seen == {"meta"}


def test_rows_are_copied_from_pinned_memory_that_goes_back_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lent: list[bool] = []

    @contextmanager
    def borrow(rows: int, columns: int, dtype: torch.dtype, *, pinned: bool = False) -> Iterator[Tensor]:
        lent.append(pinned)
        yield torch.empty(rows, columns, dtype=dtype)
        lent.pop()

    monkeypatch.setattr("eigenzoo.subspace.moments.collecting.borrow", borrow)
    stack = dense_stack(tmp_path)
    with loaded(stack, 0, SHAPE[1], Resources(device="meta")) as rows_ED:
        assert rows_ED.device.type == "meta"
        assert lent == []
    with loaded(stack, 0, SHAPE[1], Resources()) as rows_ED:
        assert (rows_ED.device.type, lent) == ("cpu", [False])


def write(root: Path, view: str) -> dict[str, Any]:
    """A zoo of a view; returns what opens it."""
    if view in ("update", "factors"):
        for n in range(NUM_MODELS):
            write_adapter(root / "zoo" / f"m{n}", random_factors({"w": SHAPE}, 4, n), lora_alpha=3 + n)
        return {"zoo": root / "zoo", "view": view}
    stack = planted(NUM_MODELS, SHAPE, parent=10.0)
    write_stacks(root / "zoo", {"w": stack})
    if view == "delta":
        (base,) = write_stacks(root / "base", {"w": stack[:1]})
        return {"zoo": root / "zoo", "view": view, "base": base}
    return {"zoo": root / "zoo"}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "weight": ("weight", {"rank": 4}),
    "high": ("weight", {"rank": 4, "precision": "high"}),
    "none": ("weight", {"rank": 4, "center": "none"}),
    "columns": ("weight", {"rank": 4, "center": "columns"}),
    "global": ("weight", {"rank": 4, "center": "global"}),
    "axes": ("weight", {"rank": {"models": 4, "outputs": 8, "inputs": 8}}),
    "bfloat16": ("weight", {"rank": 4, "dtype": "bfloat16"}),
    "delta": ("delta", {"rank": 4, "center": "none"}),
    "factors": ("factors", {"rank": 4}),
    "update": ("update", {"rank": 4}),
    "update-axes": ("update", {"rank": {"models": 4, "outputs": 8}}),
}


class TestOnAGpu:
    """Against the CPU, which the other files hold against dense float64."""

    pytestmark = on_a_gpu

    @pytest.mark.parametrize("way", ["kept", "spans"])
    @pytest.mark.parametrize("case", CASES)
    def test_a_fit_is_that_of_the_cpu(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, way: str
    ) -> None:
        read_in_float32(monkeypatch)
        read_in_spans(monkeypatch, 4 * NUM_MODELS * SHAPE[1] * 50, kept=way == "kept")
        view, options = CASES[case]
        opened = ez.open_zoo(**{"source" if key == "zoo" else key: each for key, each in write(tmp_path, view).items()})
        here, there = (ez.fit(opened, **options, device=device, cache=False) for device in ("cpu", "cuda"))
        name = next(iter(here.layers))
        one, two = here.moments(name), there.moments(name)
        for found, wanted in ((two.gram_NN, one.gram_NN), (two.raw_NN, one.raw_NN), (two.centered_NN, one.centered_NN)):
            assert float((found - wanted).abs().max()) <= 1e-6 * float(wanted.abs().max())
        assert two.sums_N is not None
        assert float((two.sums_N - one.sums_N).abs().max()) <= 1e-5 * float(one.raw_NN.diagonal().max().sqrt())
        room = 2e-2 if case == "bfloat16" else 1e-5
        for model in here.names:
            wanted = here.rebuild(model).layer(name)
            assert float((there.rebuild(model).layer(name) - wanted).norm() / wanted.norm()) <= room

    def test_fast_products_are_those_of_rounded_rows(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        read_in_float32(monkeypatch)
        for view in ("weight", "update"):
            write(tmp_path / view, view)
            found = [
                ez.fit(tmp_path / view / "zoo", 4, precision=precision, device=device, cache=False).moments("w").gram_NN
                for precision, device in (("fast", "cuda"), ("fast", "cpu"), ("high", "cpu"))
            ]
            scale = float(found[2].abs().max())
            assert float((found[0] - found[1]).abs().max()) <= 1e-5 * scale
            assert 1e-6 * scale < float((found[0] - found[2]).abs().max()) <= 1e-2 * scale

    def test_evidence_and_plan_take_it_too(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        read_in_float32(monkeypatch)
        write(tmp_path, "weight")
        for call in (ez.evidence, ez.plan):
            here, there = (
                call(tmp_path / "zoo", device=device, **({"cache": False} if call is ez.evidence else {}))
                for device in ("cpu", "cuda:0")
            )
            if call is ez.evidence:
                assert here.verdict.code == there.verdict.code
                assert there.layers["w"].variance == pytest.approx(here.layers["w"].variance, rel=1e-6)
            else:
                assert [row.residual for row in there.rows] == pytest.approx(
                    [row.residual for row in here.rows], rel=1e-4, abs=1e-6
                )

    @pytest.mark.parametrize("value", [float("nan"), 1e30])
    def test_values_that_are_no_numbers_are_named(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
    ) -> None:
        read_in_float32(monkeypatch)
        write(tmp_path, "weight")
        values = planted(NUM_MODELS, SHAPE)[0].float()
        values[3, 3] = value
        edit_model(tmp_path / "zoo" / "m7", w=values)
        message = "layer 'w': the products of its values overflow" if value == 1e30 else "layer 'w' of m7: 1 values"
        with pytest.raises(DataError, match=message):
            ez.fit(tmp_path / "zoo", 4, device="cuda")
