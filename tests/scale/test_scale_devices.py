"""Products elsewhere than on the CPU: the same to their precision, and a device that is not there is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scale_zoos import planted, read_in_float32, read_in_spans
from torch import Tensor

import eigenzoo as ez
from builders import edit_model, random_factors, write_adapter, write_stacks
from eigenzoo.cli.app import main
from eigenzoo.errors import DataError, UsageError
from eigenzoo.linalg import kernels
from eigenzoo.passes.resources import check_device
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
        ("mps", "device 'mps'. Devices are cpu, cuda and cuda:<number>"),
        ("nonsense", "device 'nonsense'. Devices are cpu, cuda and cuda:<number>"),
        ("cpu:0", "device 'cpu:0'. Devices are"),
        ("", "device ''. Devices are"),
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
    assert f"UsageError: device {device!r}" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "bundle").exists()


def test_a_gpu_of_a_number_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    for device in ("cpu", "cuda", "cuda:1"):
        check_device(device)
    with pytest.raises(UsageError, match="device 'cuda:2', but torch sees 2 GPUs"):
        check_device("cuda:2")


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
