"""Merged checkpoints against dense float64 sums and against the methods on the same matrices in memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from merging_cases import GRAM, IN_CORE, PAIRS
from safetensors.torch import load_file
from torch import Tensor

import eigenzoo as ez
from builders import edit_model, seeded, write_model
from eigenzoo.errors import DataError, MismatchError, OutputError, UsageError
from eigenzoo.merge import checkpoints, dense_layer
from eigenzoo.merge.layer_updates import Combination, Context, RowWise, UpdatesInMemory
from eigenzoo.merge.methods import find_method
from tolerance import tolerance

SHAPES = {"body.0.weight": (12, 9), "body.1.weight": (6, 4, 3), "norm.weight": (9,), "bias": (12,), "scalar": ()}
WEIGHTS = (0.7, -0.3, 1.1)
MODEL = "model.safetensors"


def tensors(seed: int, size: float = 1.0) -> dict[str, Tensor]:
    draw = seeded(seed)
    values = {name: size * torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}
    return {**values, "steps": torch.tensor([seed, 7])}


@pytest.fixture
def zoo(tmp_path: Path) -> tuple[Path, list[Path]]:
    """A base and three fine-tunes."""
    start = tensors(100)
    base = write_model(tmp_path / "base", start)
    paths = []
    for place in range(3):
        moved = tensors(place, 0.1)
        paths.append(write_model(tmp_path / f"m{place}", {name: start[name] + moved[name] for name in start}))
    return base, paths


def updates_of(base: Path, paths: list[Path]) -> dict[str, Tensor]:
    """(T, *shape) float64."""
    start, models = load_file(base / MODEL), [load_file(path / MODEL) for path in paths]
    return {name: torch.stack([model[name].double() - start[name].double() for model in models]) for name in SHAPES}


def check(folder: Path, base: Path, wanted: dict[str, Tensor]) -> None:
    start, found = load_file(base / MODEL), load_file(folder / MODEL)
    assert found.keys() == start.keys()
    for name, update in wanted.items():
        exact = start[name].double() + update
        assert found[name].shape == exact.shape
        bound = tolerance(1, dtype=torch.float32, scale=float(exact.abs().max()))
        assert (found[name].double() - exact).abs().max() <= bound, name
    assert torch.equal(found["steps"], start["steps"])


def test_sums_are_those_of_dense_float64(tmp_path: Path, zoo: tuple[Path, list[Path]]) -> None:
    base, paths = zoo
    folder = ez.merge(paths, "task_arithmetic", weights=WEIGHTS, scale=0.5, base=base).save(tmp_path / "out")
    weights = 0.5 * torch.tensor(WEIGHTS, dtype=torch.float64)
    wanted = {name: torch.tensordot(weights, each, 1) for name, each in updates_of(base, paths).items()}
    check(folder, base, wanted)


@pytest.mark.parametrize("block_bytes", [dense_layer.TILE_BYTES, 3 * 9 * 8 * 2])
@pytest.mark.parametrize("method", [*GRAM, *PAIRS, *IN_CORE, "ties", "dare_ties", "sce"])
def test_methods_see_the_same_matrices_as_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zoo: tuple[Path, list[Path]], method: str, block_bytes: int
) -> None:
    """Blocks of two rows give what one block gives; norms and biases are averaged where a method needs matrices."""
    monkeypatch.setattr(dense_layer, "TILE_BYTES", block_bytes)
    base, paths = zoo
    paths = paths[:2] if method in PAIRS else paths
    weighted = find_method(method).weighted
    weights = list(WEIGHTS[: len(paths)]) if weighted else [1.0] * len(paths)
    options: dict[str, Any] = {"semantics": "mergekit"} if method in ("ties", "dare_ties") else {}
    merged = ez.merge(paths, method, weights=weights if weighted else None, base=base, seed=3, **options)
    wanted = {}
    chosen = find_method(method)
    for name, update in updates_of(base, paths).items():
        wide = update.reshape(len(paths), update.shape[1] if update.dim() > 1 else 1, -1)
        weights_T = torch.tensor(weights, dtype=torch.float64)
        if update.dim() < 3 and method in IN_CORE:
            wanted[name] = torch.tensordot(weights_T / weights_T.sum(), update, 1)
            continue
        names = tuple(path.name for path in paths)
        layer = UpdatesInMemory(Context(name, names, weights_T, 3), values_TPQ=wide)
        result = chosen.merge(layer, **chosen.options(options))
        if isinstance(result, Combination):
            result = torch.tensordot(result.coefficients_T, wide, 1)
        elif isinstance(result, RowWise):
            result = torch.cat([result.apply(block) for block in layer.blocks()])
        assert isinstance(result, Tensor)
        wanted[name] = result.reshape(update.shape[1:])
    check(merged.save(tmp_path / "out"), base, wanted)


def test_ties_trims_over_the_whole_model(tmp_path: Path, zoo: tuple[Path, list[Path]]) -> None:
    """The paper's: one threshold for all tensors; here one tensor has all large values."""
    base, _ = zoo
    start = load_file(base / MODEL)
    moved = {name: torch.full(shape, 1e-3) for name, shape in SHAPES.items()}
    moved["norm.weight"] = torch.full((9,), 0.5)
    one = write_model(tmp_path / "one", {**start, **{name: start[name] + each for name, each in moved.items()}})
    share = 9 / sum(each.numel() for each in moved.values()) + 1e-9
    folder = ez.merge([one], "ties", keep=share, base=base).save(tmp_path / "out")
    check(folder, base, {name: each.double() * (name == "norm.weight") for name, each in moved.items()})


def test_the_certificate_counts_the_rounding_of_the_file(tmp_path: Path, zoo: tuple[Path, list[Path]]) -> None:
    base, paths = zoo
    merged = ez.merge(paths, "mean", base=base, dtype="bfloat16")
    before = merged.certificate  # by a pass that writes nothing
    folder = merged.save(tmp_path / "out")
    start, found = load_file(base / MODEL), load_file(folder / MODEL)
    lost = total = 0.0
    for name, each in updates_of(base, paths).items():
        assert found[name].dtype == torch.bfloat16
        exact, written = each.mean(0), found[name].double() - start[name].double()
        lost, total = lost + float((exact - written).square().sum()), total + float(exact.square().sum())
        share = float((exact - written).norm() / exact.norm())
        assert before.layers[name].loss == pytest.approx(share, abs=1e-8)
    for certificate in (before, merged.certificate):
        assert certificate.loss.frobenius == pytest.approx((lost / total) ** 0.5, abs=1e-8)
        assert certificate.bytes == (folder / MODEL).stat().st_size
    assert before.loss.frobenius > 1e-3
    beside = json.loads((folder / "merge.json").read_text())
    assert beside["loss"]["frobenius"] == merged.certificate.loss.frobenius


def test_largest_singular_values_are_left_out_of_large_layers(
    monkeypatch: pytest.MonkeyPatch, zoo: tuple[Path, list[Path]]
) -> None:
    base, paths = zoo
    assert ez.merge(paths, "mean", base=base).certificate.loss.spectral is not None
    monkeypatch.setattr(checkpoints, "SPECTRAL_VALUES", 100)
    assert ez.merge(paths, "mean", base=base).certificate.loss.spectral is None


def test_without_a_base_weights_are_averaged(tmp_path: Path, zoo: tuple[Path, list[Path]]) -> None:
    _, paths = zoo
    folder = ez.merge(paths, "linear", weights=[1, 2, 3], heads="first").save(tmp_path / "out")
    models, found = [load_file(path / MODEL) for path in paths], load_file(folder / MODEL)
    for name in SHAPES:
        wanted = sum(
            (w / 6 * model[name].double() for w, model in zip((1, 2, 3), models, strict=True)), torch.zeros(())
        )
        assert (found[name].double() - wanted).abs().max() <= tolerance(1, dtype=torch.float32, scale=4.0)
    with pytest.raises(UsageError, match=r"method tsv without a base.*mean, linear"):
        ez.merge(paths, "tsv")


def test_output_dtypes_are_those_of_the_base(tmp_path: Path, zoo: tuple[Path, list[Path]]) -> None:
    base, paths = zoo
    start = load_file(base / MODEL)
    half = write_model(tmp_path / "half", {n: v.half() if v.is_floating_point() else v for n, v in start.items()})
    for path in paths:
        (path / "config.json").write_text(json.dumps({"model_type": "llama", "torch_dtype": "float32"}))
    folder = ez.merge(paths, base=half).save(tmp_path / "out")
    assert load_file(folder / MODEL)["body.0.weight"].dtype == torch.float16
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "float16"


def test_heads_of_other_shapes_are_one_models(tmp_path: Path, zoo: tuple[Path, list[Path]]) -> None:
    base, paths = zoo
    for place, path in enumerate(paths):
        edit_model(path, classifier__weight=torch.full((2 + place, 9), float(place)))
    with pytest.raises(MismatchError, match=r"classifier\.weight.*m1 and m0 differ.*--heads"):
        ez.merge(paths, base=base)
    folder = ez.merge(paths, base=base, heads="m2").save(tmp_path / "out")
    assert torch.equal(load_file(folder / MODEL)["classifier.weight"], torch.full((4, 9), 2.0))


@pytest.mark.parametrize("build", [lambda root: root / "out", lambda root: None], ids=["save", "check"])
def test_values_that_are_not_finite_are_named_and_nothing_is_left(
    tmp_path: Path, zoo: tuple[Path, list[Path]], build: Callable[[Path], Path | None]
) -> None:
    base, paths = zoo
    edit_model(paths[1], bias=torch.full((12,), torch.inf))
    merged, target = ez.merge(paths, base=base), build(tmp_path)
    with pytest.raises(DataError, match=r"'bias' of m1|m1.*'bias'"):
        _ = merged.certificate if target is None else merged.save(target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "m0", "m1", "m2"]


def test_overflow_of_a_dtype_is_an_error(tmp_path: Path, zoo: tuple[Path, list[Path]]) -> None:
    base, paths = zoo
    with pytest.raises(DataError, match=r"overflow torch\.float16"):
        ez.merge(paths, "task_arithmetic", scale=1e6, base=base, dtype="float16").save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_shapes_that_differ_from_the_base_are_named(zoo: tuple[Path, list[Path]]) -> None:
    base, paths = zoo
    edit_model(base, bias=torch.zeros(13))
    with pytest.raises(MismatchError, match=r"'bias'.*\[12\] in the models, but in the base"):
        ez.merge(paths, base=base)


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"rank": 4}, "rank 4 for full weights"),
        ({"budget": 100}, "for 100 bytes for full weights"),
        ({"method": "ties", "space": "rows"}, "space 'rows' for full weights"),
        ({"missing": "zero"}, "Only an update can be zero"),
        ({"dtype": "int8"}, "float32, float16, bfloat16, float64"),
        ({"method": "regmean"}, "no moments of inputs are given"),
    ],
)
def test_choices_of_adapters_are_refused(zoo: tuple[Path, list[Path]], choice: dict[str, Any], words: str) -> None:
    base, paths = zoo
    with pytest.raises(UsageError, match=words):
        _ = ez.merge(paths, base=base, **choice).certificate


def test_outputs_are_never_replaced_but_by_force(tmp_path: Path, zoo: tuple[Path, list[Path]]) -> None:
    base, paths = zoo
    merged = ez.merge(paths, base=base)
    folder = merged.save(tmp_path / "out")
    with pytest.raises(OutputError, match="exists already"):
        merged.save(folder)
    first = (folder / MODEL).read_bytes()
    merged.save(folder, force=True)
    assert (folder / MODEL).read_bytes() == first
    with pytest.raises(OutputError, match="no record"):
        merged.save(base, force=True)


def test_an_interrupted_merge_leaves_nothing(tmp_path: Path, zoo: tuple[Path, list[Path]]) -> None:
    base, paths = zoo

    def interrupt(stage: str, done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    merged = ez.merge(paths, base=base)
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        merged.save(tmp_path / "out", progress=interrupt)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "m0", "m1", "m2"]
    merged.save(tmp_path / "out")
    assert merged.certificate.layers.keys() == SHAPES.keys()
