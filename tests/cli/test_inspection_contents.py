"""Reading many tensors at once gives what each of them holds: sums, values that are not finite, answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import eigenzoo as ez
from builders import random_factors, regauge, seeded, write_adapter, write_model
from eigenzoo.formats.model import Model
from eigenzoo.zoo import answers, contents
from eigenzoo.zoo.answers import Probe, make_probe
from eigenzoo.zoo.contents import LEAST_ROWS, MOST_BYTES, Contents, ContentsReader
from tolerance import tolerance

SIZES = (1, 300, 4096, MOST_BYTES)
"""Bytes that are read at once: `LEAST_ROWS` rows, a few tensors, more, everything."""

DTYPES = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.complex64,
    torch.int8,
    torch.bool,
)
MODULES = {"block.0.q": (37, 29), "block.1.q": (37, 29), "block.2.q": (37, 29), "block.0.v": (16, 40)}


def opened(path: Path) -> tuple[Model, Probe]:
    (model,) = ez.open_zoo([path]).models
    return model, make_probe([model])


def sum_of_words(tensors: dict[str, Tensor]) -> int:
    """Each tensor's bytes as whole numbers of 64 bits, the last one filled with zeros."""
    total = 0
    for tensor in tensors.values():
        raw = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        raw += bytes(-len(raw) % 8)
        total += sum(np.frombuffer(raw, "<u8").tolist())
    return total % 2**64


@pytest.mark.parametrize("num_bytes", SIZES)
def test_tensors_of_every_dtype_and_length_are_summed_and_counted(tmp_path: Path, num_bytes: int) -> None:
    draw = seeded(0)
    tensors = {"empty": torch.empty(0, 3), "w": torch.randn(40, 41, generator=draw)}
    bad = {}
    for number, dtype in enumerate(DTYPES):
        for length in (1, 7, 8, 333):
            name = f"t{number}.{length}"
            values = torch.randn(length, generator=draw)
            if length == 333 and (dtype.is_floating_point or dtype.is_complex):
                values[[0, 200, 332]] = torch.nan
                bad[name] = 3
            tensors[name] = values.to(dtype)
    model, probe = opened(write_model(tmp_path / "m", tensors))
    found = ContentsReader(probe, num_bytes).read(model)
    assert found.digest[1] == sum_of_words(tensors)
    assert found.non_finite == bad


def test_updates_that_are_too_large_are_read_and_not_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    factors = random_factors(MODULES, 3, 0)
    write_adapter(tmp_path / "zoo" / "m0", factors)
    write_adapter(tmp_path / "zoo" / "m1", regauge(factors, 1))
    zoo = ez.open_zoo(tmp_path / "zoo")
    assert ez.inspect(zoo).same_function == (("m0", "m1"),)
    monkeypatch.setattr(answers, "MOST_PROBED", 40)
    assert ez.inspect(zoo).same_function == (("m0", "m1"),)
    monkeypatch.setattr(answers, "MOST_PROBED", 39)  # one layer has 40 inputs
    found = ez.inspect(zoo)
    assert found.same_function == ()
    assert [warning[:34] for warning in found.warnings] == [
        f"{name}: not compared by function: more"[:34] for name in zoo.names
    ]


@pytest.mark.parametrize("num_bytes", SIZES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_answers_are_those_of_the_updates_multiplied_out(tmp_path: Path, dtype: torch.dtype, num_bytes: int) -> None:
    factors = random_factors(MODULES, 3, 0, dtype)
    others = {"classifier.bias": torch.randn(5, generator=seeded(1))}
    model, probe = opened(write_adapter(tmp_path / "a", factors, others=others, lora_alpha=6))
    found = ContentsReader(probe, num_bytes).read(model)
    assert found.non_finite == {}
    assert len(found.answers.modules) == len(MODULES)
    used = torch.float64 if dtype == torch.float64 else torch.float32
    for module, answer_L in zip(found.answers.modules, found.answers.answers_ML, strict=True):
        b_OR, a_RI = (factor.double() for factor in factors[module])
        input_I, listeners_LO = torch.from_numpy(probe.input_I).double(), torch.from_numpy(probe.listeners_LO).double()
        expected_L = 2 * (listeners_LO[:, : len(b_OR)] @ b_OR) @ (a_RI @ input_I[: a_RI.shape[1]])
        scale = 2 * (listeners_LO[:, : len(b_OR)].abs() @ b_OR.abs()) @ (a_RI.abs() @ input_I[: a_RI.shape[1]].abs())
        allowed = tolerance(sum(MODULES[module]), dtype=used, scale=scale.max().item())
        assert abs(torch.from_numpy(answer_L) - expected_L).max() <= allowed


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_value_of_a_factor_that_is_not_finite_is_counted_wherever_it_is(
    tmp_path: Path, dtype, value: float
) -> None:
    path = write_adapter(tmp_path / "a", random_factors({"block.q": (7, 6)}, 2, 0, dtype))
    file = path / "adapter_model.safetensors"
    whole = load_file(file)
    for name, tensor in whole.items():
        for place in range(tensor.numel()):
            changed = tensor.clone()
            changed.view(-1)[place] = value
            save_file({**whole, name: changed}, file, {"format": "pt"})
            model, probe = opened(path)
            assert ContentsReader(probe, MOST_BYTES).read(model).non_finite == {name: 1}


def test_values_whose_products_and_sums_overflow_are_finite(tmp_path: Path) -> None:
    factors = {"block.q": (torch.full((7, 2), 3e38), torch.full((2, 6), 3e38))}
    others = {"classifier.weight": torch.full((4, 4), 3e38)}
    model, probe = opened(write_adapter(tmp_path / "a", factors, others=others))
    assert ContentsReader(probe, MOST_BYTES).read(model).non_finite == {}


def test_contents_do_not_depend_on_the_order_in_the_file_and_on_what_is_read_at_once(tmp_path: Path) -> None:
    tensors = {f"w{number}": torch.randn(9, 5 + number % 3, generator=seeded(number)) for number in range(12)}
    found: list[Contents] = []
    # safetensors sorts by dtype and name, so other names change the order; the digest's names are left out below.
    renamed = {f"w{11 - int(name[1:]):02}": tensor for name, tensor in tensors.items()}
    for name, each in (("one", tensors), ("other", renamed)):
        model, probe = opened(write_model(tmp_path / name, each))
        found += [ContentsReader(probe, num_bytes).read(model) for num_bytes in SIZES]
    assert len({each.digest[1] for each in found}) == 1
    assert len({each.digest for each in found}) == 2


@pytest.mark.parametrize("kind", ["weights", "factors"])
def test_a_large_tensor_is_read_within_the_bound(tmp_path: Path, monkeypatch, kind: str) -> None:
    num_bytes = 2**16
    if kind == "weights":
        model, probe = opened(write_model(tmp_path / "m", {"w": torch.randn(500, 400, generator=seeded(0))}))
    else:
        model, probe = opened(write_adapter(tmp_path / "m", random_factors({"block.q": (9000, 1500)}, 24, 0)))
    held = []
    original = contents.borrow

    @contextmanager
    def spied(rows: int, columns: int, dtype: torch.dtype) -> Iterator[Tensor]:
        held.append(rows * columns * dtype.itemsize)
        with original(rows, columns, dtype) as memory:
            yield memory

    monkeypatch.setattr(contents, "borrow", spied)
    reader = ContentsReader(probe, num_bytes)
    reader.read(model)
    reader.hash(model)
    assert sum(held) >= 2 * sum(info.nbytes for info in model.tensors.values()), "not everything was read"
    assert max(held) <= num_bytes
    assert num_bytes >= 1500 * 4 * LEAST_ROWS, "rows of A fit, so the bound is that of the reader"
