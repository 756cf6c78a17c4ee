"""Torch settings of the user that would change results, or break off a fit: results are the same, and the settings stay."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from scale_zoos import contents, planted, read_in_float32, saved

import eigenzoo as ez
from builders import random_factors, write_adapter, write_model, write_stacks
from eigenzoo.linalg import kernels
from eigenzoo.passes.settings import own_settings
from guard import HANG

NUM_MODELS, SHAPE = 12, (120, 96)


@contextmanager
def precision(name: str) -> Iterator[None]:
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


@contextmanager
def backend(module: Any, name: str) -> Iterator[None]:
    """The newer way to say it, from torch 2.9 on."""
    module.fp32_precision = name
    try:
        yield
    finally:
        module.fp32_precision = "none"


@contextmanager
def allowed_tf32() -> Iterator[None]:
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


Setting = Callable[[], AbstractContextManager[Any]]

PRODUCTS: dict[str, Setting] = {
    "precision high": lambda: precision("high"),
    "precision medium": lambda: precision("medium"),
    "allow_tf32": allowed_tf32,
    "cuda tf32": lambda: backend(torch.backends.cuda.matmul, "tf32"),
    "cpu bf16": lambda: backend(torch.backends.mkldnn.matmul, "bf16"),
    "all tf32": lambda: backend(torch.backends, "tf32"),
    "all bf16": lambda: backend(torch.backends, "bf16"),
}
OTHERS: dict[str, Setting] = {
    "default dtype": lambda: default_dtype(torch.float64),
    "default half": lambda: default_dtype(torch.bfloat16),
    "default device": lambda: default_device("meta"),
    "device context": lambda: torch.device("meta"),
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "deterministic": deterministic,
}
SETTINGS = {**PRODUCTS, **OTHERS}
SHOWN = ("precision medium", "default half", "default device", "autocast")
"""One of each kind of setting; the others are slow."""


def products() -> list[object]:
    """What torch says of the precision of float32 products, by both of its ways; None where it raises for a mix of them."""

    def read(get: Callable[[], object]) -> object:
        try:
            return get()
        except RuntimeError:
            return None

    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul, torch.backends.mkldnn, torch.backends)
    return [
        read(torch.get_float32_matmul_precision),
        read(lambda: torch.backends.cuda.matmul.allow_tf32),
        *(module.fp32_precision for module in backends),
    ]


def write(root: Path) -> dict[str, list[Path]]:
    """Thirteen models of full weights, and as many of updates; the last is not to be fitted."""
    stacks = {"w": planted(NUM_MODELS + 1, SHAPE), "v": planted(NUM_MODELS + 1, (40, 24), 1)}
    adapters = [
        write_adapter(root / "lora" / f"m{n}", random_factors({"w": SHAPE}, 4, n), lora_alpha=3 + n)
        for n in range(NUM_MODELS + 1)
    ]
    base = write_model(root / "base", {"w.weight": planted(1, SHAPE, 2)[0].float()})
    return {"dense": write_stacks(root / "dense", stacks), "lora": adapters, "base": [base]}


def everything(zoos: dict[str, list[Path]], out: Path) -> dict[str, object]:
    """What all that reads weights makes of both zoos: tensors by their bytes."""
    found: dict[str, object] = {}

    def tensors(files: dict[str, bytes]) -> dict[str, bytes]:
        return {name: file for name, file in files.items() if name.endswith(".safetensors")}

    for kind, paths in ((kind, zoos[kind]) for kind in ("dense", "lora")):
        for name, options in {
            "models": {"rank": 4},
            "sides": {"rank": {"models": 3, "outputs": 8, "inputs": 8}},
            "half": {"rank": 4, "dtype": "bfloat16"},
            "sketch": {"rank": {"outputs": 4}, "solver": "sketch"},
        }.items():
            own = out / kind / name
            space = ez.fit(paths[:-1], **options, cache=False)  # type: ignore[arg-type]
            found[f"{kind} {name} fit"] = tensors(saved(space, own / "bundle"))
            loaded = ez.load(own / "bundle")
            coefficients = loaded.project(paths[-1])
            found[f"{kind} {name} residual"] = coefficients.residual
            found[f"{kind} {name} rebuilt"] = tensors(contents(loaded.rebuild(coefficients).save(own / "rebuilt")))
            if name in ("models", "sides"):
                found[f"{kind} {name} grown"] = tensors(saved(loaded.add([paths[-1]]), own / "grown"))
        verdict = ez.evidence(paths[:-1], cache=False).to_dict()
        found[f"{kind} evidence"] = {key: value for key, value in verdict.items() if key != "seconds"}
        found[f"{kind} plan"] = repr(ez.plan(paths[:-1]).rows)
        found[f"{kind} inspect"] = repr(ez.inspect(ez.open_zoo(paths)))
        found[f"{kind} verify"] = repr(
            ez.load(out / kind / "models" / "bundle").verify(against=zoos["base"][0]).changes
        )
        found[f"{kind} refreshed"] = tensors(saved(_refreshed(paths, out / kind), out / kind / "refreshed"))
        values = ez.evaluate(space, _size, paths[-1:]).to_dict()
        found[f"{kind} evaluate"] = {key: value for key, value in values.items() if key != "metric"}
    return found


def _refreshed(paths: list[Path], out: Path) -> ez.Subspace:
    """Fitted anew to one model more, when the files of the others are gone."""
    copies = [Path(shutil.copytree(path, out / "copies" / path.name)) for path in paths[:-1]]
    space = ez.load(ez.fit(copies, 4, cache=False).save(out / "before"))
    shutil.rmtree(out / "copies")
    return space.add([paths[-1]], refresh=True)


def _size(path: Path) -> float:
    return float(sum(file.stat().st_size for file in path.iterdir()))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, list[Path]], dict[str, object]]:
    root = tmp_path_factory.mktemp("plain")
    with pytest.MonkeyPatch.context() as patch:
        read_in_float32(patch)
        zoos = write(root)
        return zoos, everything(zoos, root)


@pytest.mark.parametrize(
    "setting", [pytest.param(name, marks=[] if name in SHOWN else pytest.mark.slow) for name in SETTINGS]
)
def test_the_results_are_the_same_to_the_bit(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    plain: tuple[dict[str, list[Path]], dict[str, object]],
    setting: str,
) -> None:
    read_in_float32(monkeypatch)
    zoos, wanted = plain
    with SETTINGS[setting]():
        found = everything(zoos, tmp_path)
    assert [name for name in wanted if found[name] != wanted[name]] == []


@pytest.mark.parametrize("setting", PRODUCTS)
def test_products_are_full_float32_inside_and_the_users_afterwards(setting: str) -> None:
    with own_settings():
        rows = planted(60, (4096,)).float()
        wanted = torch.mm(rows, rows.T)
    with PRODUCTS[setting]():
        before = products()
        with own_settings():
            assert products()[:2] == ["highest", False]
            assert torch.equal(torch.mm(rows, rows.T), wanted)
        assert products() == before
    assert products()[:2] == ["highest", False]


@pytest.mark.parametrize("setting", PRODUCTS)
def test_the_last_of_several_threads_restores_the_setting(setting: str) -> None:
    inside, leave, left = threading.Event(), threading.Event(), []

    def overlapping() -> None:
        with own_settings():
            inside.set()
            leave.wait(HANG)
        left.append(products())

    with PRODUCTS[setting]():
        before = products()
        with own_settings():
            other = threading.Thread(target=overlapping)
            other.start()
            assert inside.wait(HANG)
        assert products()[:2] == ["highest", False]
        leave.set()
        other.join(HANG)
        assert left == [before]


def test_the_setting_is_restored_after_an_error() -> None:
    with precision("high"), torch.autocast("cpu", dtype=torch.bfloat16):
        before = products()
        with pytest.raises(ez.UsageError, match="device 'nonsense'"), own_settings():
            raise ez.UsageError("device 'nonsense'")
        assert products() == before
        assert torch.is_autocast_enabled("cpu")


def test_a_metric_sees_the_users_settings(tmp_path: Path) -> None:
    paths = write_stacks(tmp_path / "zoo", {"w": planted(7, (6, 5))})
    space = ez.fit(paths[:-1], 2, cache=False)
    seen: set[object] = set()

    def metric(path: Path) -> float:
        seen.add((torch.get_float32_matmul_precision(), torch.get_default_device().type))
        seen.add(torch.is_autocast_enabled("cpu"))
        return 0.0

    with precision("high"), torch.device("meta"), torch.autocast("cpu", dtype=torch.bfloat16):
        ez.evaluate(space, metric, paths[-1:])
    assert seen == {("high", "meta"), True}


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU and a torch build that knows it")
def test_products_of_a_gpu_are_full_float32_too() -> None:
    rows = planted(60, (4096,))
    exact = rows @ rows.T
    for setting in PRODUCTS.values():
        with setting(), own_settings():
            found = kernels.gram(rows.float().cuda()).cpu().double()
        # TF32 rounds factors to 11 bits: 5e-4. The sums of 4,096 products lose a few digits of float32's own.
        assert float((found - exact).abs().max()) <= 1e-6 * float(exact.abs().max())
