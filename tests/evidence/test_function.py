"""What is measured in a held-out model's place, tensor by tensor, against dense float64 algebra; and what is said of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import eigenzoo as ez
from builders import (
    edit_model,
    random_factors,
    random_stack,
    read_update,
    seeded,
    write_adapter,
    write_model,
    write_stacks,
)
from eigenzoo.evidence.function import FunctionEvidence
from eigenzoo.evidence.random_basis import project_randomly
from tolerance import tolerance

NUM_FITTED, NUM_HELD = 8, 7
SHAPES = {"block.0.q": (9, 8), "block.1.q": (6, 10)}
RANKS: dict[str, dict[str, int]] = {
    "models": {"models": 4},
    "sides": {"outputs": 3, "inputs": 4},
    "all": {"models": 4, "outputs": 4, "inputs": 5},
    "outputs": {"outputs": 4},
}
CASES = [(view, axes) for view in ("weight", "delta", "update") for axes in RANKS]


class Recorder:
    """A metric that keeps every model it is given, and returns its number: so every figure leads to its tensors."""

    __name__ = "number of the call"

    def __init__(self) -> None:
        self.models: list[dict[str, Tensor]] = []
        self.paths: list[Path] = []

    def __call__(self, path: Path) -> float:
        kept = [known for known in self.paths if known.exists() and known.parent.name.startswith("eigenzoo-")]
        assert kept == [], "more than one temporary model at a time"
        self.paths.append(path)
        file = path if path.is_file() else next(path.glob("*.safetensors"))
        tensors = load_file(file)
        if (path / "adapter_config.json").exists():
            tensors |= {module: read_update(path, module) for module in SHAPES}
        self.models.append(tensors)
        return float(len(self.models) - 1)

    def of(self, figure: float | None) -> dict[str, Tensor]:
        assert figure is not None
        return self.models[int(figure)]


def write_zoo(root: Path, view: str) -> tuple[list[Path], Path | None]:
    """Write the models to fit and to hold out, and view delta's base; float64, so that files round nothing."""
    number = NUM_FITTED + NUM_HELD
    if view == "update":
        every = [random_factors(SHAPES, 2, seed, torch.float64) for seed in range(number)]
        return [write_adapter(root / f"m{place}", factors, lora_alpha=3) for place, factors in enumerate(every)], None
    stacks = {name: random_stack(number, shape, seed) for seed, (name, shape) in enumerate(SHAPES.items())}
    base = write_model(root / "_base", {name: stack[0] / 3 for name, stack in stacks.items()})
    return write_stacks(root, stacks, torch.float64), base if view == "delta" else None


def dense(paths: list[Path], layer: str, view: str) -> Tensor:
    """The stack (N, O, I) of a layer."""
    if view == "update":
        return torch.stack([read_update(path, layer) for path in paths])
    return torch.stack([load_file(path / "model.safetensors")[layer] for path in paths])


def reference(fitted_NOI: Tensor, held_OI: Tensor, ranks: Mapping[str, int], is_update: bool) -> Callable[..., Tensor]:
    """What one held-out model is from coefficients first:last, by the book: every matrix formed, every basis an SVD's."""
    mean_OI = fitted_NOI.mean(0)
    if set(ranks) == {"models"}:
        basis_KD = torch.linalg.svd((fitted_NOI - mean_OI).flatten(1), full_matrices=False)[2][: ranks["models"]]
        numbers_K = basis_KD @ (held_OI - mean_OI).flatten()
        return lambda first, last: mean_OI + (numbers_K[first:last] @ basis_KD[first:last]).view_as(mean_OI)
    # Bases of updates come from moments about zero, and hold the mean too.
    source_NOI = fitted_NOI if is_update else fitted_NOI - mean_OI
    sides = [
        torch.linalg.svd(source_NOI.movedim(mode, 0).flatten(1))[0][:, : ranks[axis]]
        if axis in ranks
        else torch.eye(source_NOI.shape[mode], dtype=torch.float64)
        for mode, axis in ((1, "outputs"), (2, "inputs"))
    ]
    left_OP, right_IQ = sides
    center_OI = left_OP @ left_OP.T @ mean_OI @ right_IQ @ right_IQ.T if is_update else mean_OI
    core_PQ = left_OP.T @ (held_OI - mean_OI) @ right_IQ
    if "models" in ranks:
        cores_NPQ = left_OP.T @ (fitted_NOI - mean_OI) @ right_IQ
        shared_KD = torch.linalg.svd(cores_NPQ.flatten(1), full_matrices=False)[2][: ranks["models"]]
        numbers_K = shared_KD @ core_PQ.flatten()

        def from_shared(first: int, last: int) -> Tensor:
            part_PQ = (numbers_K[first:last] @ shared_KD[first:last]).view_as(core_PQ)
            return center_OI + left_OP @ part_PQ @ right_IQ.T

        return from_shared

    def corner(size: int) -> Tensor:
        kept = torch.zeros_like(core_PQ)
        rows, columns = (size if axis in ranks else None for axis in ("outputs", "inputs"))
        kept[:rows, :columns] = core_PQ[:rows, :columns]
        return kept

    return lambda first, last: (
        center_OI + left_OP @ (corner(last) - (corner(first) if first else 0)) @ right_IQ.T
        if last
        else center_OI.clone()
    )


def assert_close(found: Tensor, expected: Tensor, size: int = 10) -> None:
    """To the rounding of float32 coefficients."""
    bound = tolerance(size, dtype=torch.float32, scale=float(expected.norm()) + 1)
    assert float((found.double() - expected).abs().max()) < bound


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[Any, ...]]:
    """Every case fitted and evaluated once."""
    done: dict[tuple[str, str], tuple[Any, ...]] = {}

    def make(view: str, axes: str) -> tuple[Any, ...]:
        if (view, axes) not in done:
            paths, base = write_zoo(tmp_path_factory.mktemp("zoo"), view)
            fitted = ez.open_zoo(paths[:NUM_FITTED], view=view, base=base)
            space = ez.fit(fitted, RANKS[axes], dtype="float64")
            metric = Recorder()
            found = ez.evaluate(space, metric, paths[NUM_FITTED:])
            done[view, axes] = (paths, base, space, metric, found)
        return done[view, axes]

    return make


@pytest.mark.parametrize(("view", "axes"), CASES)
def test_every_variant_is_what_dense_algebra_says(evaluated: Callable[..., Any], view: str, axes: str) -> None:
    paths, _, _, metric, found = evaluated(view, axes)
    assert found.ranks == (1, 2, 4)
    assert found.secondary_rank == 2
    assert found.heldout
    assert (found.num_models, found.num_fitted) == (NUM_HELD, NUM_FITTED)
    for layer in SHAPES:
        stack = dense(paths, layer, view)
        for place in range(NUM_FITTED, len(paths)):
            measured = found.models[paths[place].name]
            expected = reference(stack[:NUM_FITTED], stack[place], RANKS[axes], view == "update")
            assert torch.equal(metric.of(measured.original)[layer], stack[place])
            assert_close(metric.of(measured.mean)[layer], expected(0, 0))
            for rank in found.ranks:
                assert_close(metric.of(measured.rebuilt[rank])[layer], expected(0, rank))
            assert_close(metric.of(measured.secondary)[layer], expected(2, 4))


@pytest.mark.parametrize(("view", "axes"), CASES)
def test_the_random_basis_is_an_orthogonal_projection_of_the_same_size(
    evaluated: Callable[..., Any], view: str, axes: str
) -> None:
    paths, _, space, metric, found = evaluated(view, axes)
    for layer, shape in SHAPES.items():
        stack = dense(paths, layer, view)
        inside = []
        for place in range(NUM_FITTED, len(paths)):
            measured = found.models[paths[place].name]
            mean, projected = (metric.of(figure)[layer] for figure in (measured.mean, measured.random_basis[4]))
            kept, dropped = projected - mean, stack[place] - projected
            assert abs(float((kept * dropped).sum())) < tolerance(
                10, dtype=torch.float32, scale=float(stack[place].norm()) ** 2
            )
            assert 0 < float(kept.norm()) < 0.99 * float((stack[place] - mean).norm())
            inside.append(kept)
        ranks = {**dict(zip(("outputs", "inputs"), shape, strict=True)), **space.layers[layer].ranks}
        # Seven models would span seven directions, and all rows and columns, if the basis were not shared and small.
        assert numerical_rank(torch.stack(inside).flatten(1)) == min(NUM_HELD, ranks.get("models", NUM_HELD))
        if (view, axes) == ("update", "models"):
            # Four random updates of the zoo's rank, 2.
            ranks |= {axis: min(size, 8) for axis, size in zip(("outputs", "inputs"), shape, strict=True)}
        assert numerical_rank(torch.cat(inside, 1)) == ranks["outputs"]
        assert numerical_rank(torch.cat(inside, 0)) == ranks["inputs"]


def numerical_rank(matrix: Tensor) -> int:
    return int(torch.linalg.matrix_rank(matrix, rtol=1e-5))


@pytest.mark.parametrize("num_directions", [0, 1, 5, 19, 20])
@pytest.mark.parametrize("block_bytes", [1, 800, 2**20])
def test_a_random_projection_is_idempotent_symmetric_and_of_its_trace(num_directions: int, block_bytes: int) -> None:
    size = 20

    def project(values: Tensor) -> Tensor:
        return project_randomly(values, num_directions, seeded(3), block_bytes)

    matrix = torch.stack([project(row) for row in torch.eye(size, dtype=torch.float64)])
    # The Gram of directions nearly as many as dimensions is as ill-conditioned as chance makes it.
    bound = tolerance(size, scale=1e4)
    assert float((matrix - matrix.T).abs().max()) < bound
    assert float((matrix @ matrix - matrix).abs().max()) < bound
    assert abs(float(matrix.trace()) - num_directions) < bound


def test_random_directions_hold_their_share_of_the_energy_and_no_more() -> None:
    size, num_directions, draws = 400, 40, 50
    values = random_stack(1, (size,), 1)[0]
    shares = [
        float(project_randomly(values, num_directions, seeded(seed)).square().sum() / values.square().sum())
        for seed in range(draws)
    ]
    # The share is Beta-distributed, with mean k / D; four standard errors of the average of so many.
    deviation = (2 * 0.1 * 0.9 / (size + 2) / draws) ** 0.5
    assert abs(sum(shares) / draws - num_directions / size) < 4 * deviation


@pytest.mark.parametrize("view", ["weight", "delta", "update"])
def test_the_parent_is_the_base_or_a_zero_update_or_unknown(evaluated: Callable[..., Any], view: str) -> None:
    paths, base, _, metric, found = evaluated(view, "models")
    measured = found.models[paths[-1].name]
    if view == "weight":
        assert measured.parent is None
        assert found.mean.parent is None
        assert found.spread.parent is None
        return
    for layer in SHAPES:
        parent = metric.of(measured.parent)[layer]
        if view == "delta":
            assert torch.equal(parent, load_file(base / "model.safetensors")[layer])
        else:
            assert torch.equal(parent, torch.zeros_like(parent))


def test_adapters_seen_as_factors_have_a_zero_update_as_parent_too(tmp_path: Path) -> None:
    paths, _ = write_zoo(tmp_path, "update")
    space = ez.fit(paths[:5], 2, view="factors")
    metric = Recorder()
    found = ez.evaluate(space, metric, paths[5:6])
    for layer in SHAPES:
        update = metric.of(found.models["m5"].parent)[layer]
        assert torch.equal(update, torch.zeros_like(update))


def test_without_the_models_mean_removed_the_mean_is_that_of_the_coefficients(tmp_path: Path) -> None:
    paths, _ = write_zoo(tmp_path, "weight")
    space = ez.fit(paths[:4], 4, center="none", dtype="float64")
    metric = Recorder()
    measured = ez.evaluate(space, metric, paths[4:5]).models["m4"]
    for layer in SHAPES:
        stack = dense(paths, layer, "weight")
        assert_close(metric.of(measured.mean)[layer], stack[:4].mean(0))
        basis_KD = torch.linalg.svd(stack[:4].flatten(1), full_matrices=False)[2]
        own, mean = basis_KD @ stack[4].flatten(), basis_KD @ stack[:4].mean(0).flatten()
        assert_close(metric.of(measured.rebuilt[2])[layer].flatten(), own[:2] @ basis_KD[:2])
        assert_close(metric.of(measured.secondary)[layer].flatten(), mean[:2] @ basis_KD[:2] + own[2:] @ basis_KD[2:])


# --- heads ---------------------------------------------------------------------------------------------------------


def zoo_with_heads(
    root: Path, same_head: bool = False, num_classes: Callable[[int], int] = lambda place: 3
) -> list[Path]:
    bodies = random_stack(7, (6, 5), 1)
    heads = [torch.randn(num_classes(place), 6, generator=seeded(place), dtype=torch.float64) for place in range(7)]
    return [
        write_model(root / f"m{place}", {"body.weight": bodies[place], "head.weight": heads[0 if same_head else place]})
        for place in range(7)
    ]


@pytest.mark.parametrize("known_parent", [False, True])
@pytest.mark.parametrize("other_shapes", [False, True])
def test_head_only_has_its_own_head_on_the_parents_or_the_means_body(
    tmp_path: Path, known_parent: bool, other_shapes: bool
) -> None:
    paths = zoo_with_heads(tmp_path, num_classes=(lambda place: 2 + place % 2) if other_shapes else lambda place: 3)
    space, metric = ez.fit(paths[:5], 2, dtype="float64"), Recorder()
    tensors = {"body.weight": random_stack(1, (6, 5), 5)[0], "head.weight": random_stack(1, (3, 6), 6)[0]}
    parent = write_model(tmp_path / "_parent", tensors)
    found = ez.evaluate(space, metric, paths[5:], parent=parent if known_parent else None)
    for path in paths[5:]:
        own, measured = load_file(path / "model.safetensors"), found.models[path.name]
        model = metric.of(measured.head_only)
        assert torch.equal(model["head.weight"], own["head.weight"])
        if known_parent:
            assert torch.equal(model["body.weight"], tensors["body.weight"])
        else:
            assert_close(model["body.weight"], dense(paths[:5], "body.weight", "weight").mean(0))
            assert measured.parent is None
        if known_parent and own["head.weight"].shape == (3, 6):
            assert torch.equal(metric.of(measured.parent)["head.weight"], tensors["head.weight"])
        else:
            assert measured.parent is None
    assert (found.mean.parent is None) == (other_shapes or not known_parent)
    assert found.mean.head_only == pytest.approx(sum(one.head_only or 0 for one in found.models.values()) / 2)


def test_where_all_share_one_head_there_is_no_head_only(tmp_path: Path) -> None:
    paths = zoo_with_heads(tmp_path, same_head=True)
    found = ez.evaluate(ez.fit(paths[:5], 2), Recorder(), paths[5:])
    assert found.models["m5"].head_only is None
    assert found.mean.head_only is None
    assert "head" not in found.sentence


@pytest.mark.parametrize("same", [False, True])
def test_heads_saved_beside_adapters(tmp_path: Path, same: bool) -> None:
    """As PEFT's modules_to_save: a head of their own makes the base model alone unknown, and head-only a control."""
    name = "base_model.model.head.weight"
    paths = [
        write_adapter(
            tmp_path / f"m{place}",
            random_factors(SHAPES, 2, place),
            others={name: torch.full((2, 4), 0.0 if same else float(place))},
        )
        for place in range(5)
    ]
    metric = Recorder()
    measured = ez.evaluate(ez.fit(paths[:4], 2), metric, paths[4:]).models["m4"]
    if same:
        assert measured.head_only is None
        assert measured.parent is not None
    else:
        assert measured.parent is None
        model = metric.of(measured.head_only)
        assert torch.equal(model[name], torch.full((2, 4), 4.0))
        assert not any(bool(model[layer].any()) for layer in SHAPES)
        assert bool(metric.of(measured.mean)["block.0.q"].any())


@pytest.mark.parametrize("exclude", [(), ("classifier",)])
def test_an_update_of_the_head_itself_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exclude: Any) -> None:
    shapes = {**SHAPES, "classifier": (3, 8)}
    monkeypatch.setattr(f"{__name__}.SHAPES", shapes)
    paths = [write_adapter(tmp_path / f"m{n}", random_factors(shapes, 2, n), lora_alpha=5) for n in range(5)]
    metric = Recorder()
    found = ez.evaluate(ez.fit(paths[:4], 2, exclude=exclude), metric, paths[4:]).models["m4"]
    model, parent = metric.of(found.head_only), metric.of(found.parent)
    assert_close(model["classifier"], read_update(paths[4], "classifier"))
    for layer in shapes:
        assert not bool(parent[layer].any())
        assert layer == "classifier" or not bool(model[layer].any())


# --- which models, and what the metric is given --------------------------------------------------------------------


def test_originals_are_measured_where_they_lie_and_all_else_is_gone_afterwards(tmp_path: Path) -> None:
    paths, _ = write_zoo(tmp_path, "weight")
    before = {path: (path / "model.safetensors").read_bytes() for path in paths}
    metric = Recorder()
    found = ez.evaluate(ez.fit(paths[:5], 2), metric, paths[5:7])
    for path in paths[5:7]:
        assert metric.paths[int(found.models[path.name].original or 0)] == path
    assert {path.name for path in metric.paths} == {"m5", "m6"}
    assert [path for path in metric.paths if path.exists()] == paths[5:7]
    assert before == {path: (path / "model.safetensors").read_bytes() for path in paths}


def test_files_are_measured_as_files_with_their_own_metadata(tmp_path: Path) -> None:
    stack = random_stack(5, (4, 3), 0)
    for place in range(5):
        save_file({"w.weight": stack[place]}, tmp_path / f"m{place}.safetensors", {"format": "pt", "task": f"t{place}"})
    tasks = []

    def metric(path: Path) -> float:
        assert path.name == "m4.safetensors"
        with safe_open(path, "pt") as file:
            tasks.append(file.metadata()["task"])
        return 0.0

    ez.evaluate(
        ez.fit([tmp_path / f"m{place}.safetensors" for place in range(4)], 2), metric, tmp_path / "m4.safetensors"
    )
    assert set(tasks) == {"t4"}
    assert len(tasks) == 6


def test_without_models_a_fifth_is_held_out_of_a_second_fit(tmp_path: Path) -> None:
    paths, _ = write_zoo(tmp_path, "weight")
    space, metric = ez.fit(paths, len(paths) - 1, dtype="float64"), Recorder()
    found = ez.evaluate(space, metric, seed=1)
    assert found.heldout
    assert (found.num_models, found.num_fitted) == (3, 12)
    assert found.ranks == (1, 2, 4, 8, 11)
    fitted = [path for path in paths if path.name not in found.models]
    for name, measured in found.models.items():
        assert metric.paths[int(measured.original or 0)] == (tmp_path / name).resolve()
        for layer in SHAPES:
            assert_close(metric.of(measured.mean)[layer], dense(fitted, layer, "weight").mean(0))
            assert torch.equal(metric.of(measured.original)[layer], dense([tmp_path / name], layer, "weight")[0])
    assert set(ez.evaluate(space, Recorder(), seed=2).models) != set(found.models)
    assert set(ez.evaluate(space, Recorder(), seed=1).models) == set(found.models)


@pytest.mark.parametrize(
    "options", [{"rank": {"outputs": 3, "models": 6}}, {"max_error": 0.2}, {"rank": 0.8, "center": "none"}]
)
@pytest.mark.parametrize("view", ["weight", "delta", "update"])
def test_the_second_fit_has_the_options_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, view: str, options: dict[str, Any]
) -> None:
    paths, base = write_zoo(tmp_path, view)
    space = ez.fit(ez.open_zoo(paths[:10], base=base), **options, dtype="float64", seed=5)
    fitted: list[ez.Subspace] = []
    monkeypatch.setattr(
        "eigenzoo.evidence.refit.fit", lambda *given, **named: fitted.append(ez.fit(*given, **named)) or fitted[0]
    )
    found = ez.evaluate(space, Recorder())
    assert found.heldout
    assert (found.num_models, found.num_fitted) == (2, 8)
    assert (found.mean.parent is None) == (view == "weight")
    assert fitted[0].manifest.options == space.manifest.options
    assert (fitted[0].view, fitted[0].axes, fitted[0].manifest.center) == (view, space.axes, space.manifest.center)


@pytest.mark.parametrize(("center", "spanned"), [("models", 3), ("none", 4)])
def test_the_second_fit_has_as_many_directions_as_fewer_models_span(tmp_path: Path, center: str, spanned: int) -> None:
    paths, _ = write_zoo(tmp_path, "weight")
    found = ez.evaluate(ez.fit(paths[:6], 5, center=center), Recorder())
    assert (found.num_fitted, found.ranks[-1]) == (4, spanned)


def test_a_bundle_whose_models_are_gone_asks_for_others(tmp_path: Path) -> None:
    paths, _ = write_zoo(tmp_path, "weight")
    ez.fit(paths[:5], 2).save(tmp_path / "bundle")
    shutil.rmtree(paths[2])
    with pytest.raises(ez.UsageError, match=r"files of 'm2' are gone.*--models"):
        ez.evaluate(ez.load(tmp_path / "bundle"), Recorder())
    assert ez.evaluate(ez.load(tmp_path / "bundle"), Recorder(), paths[5:6]).heldout


def test_two_models_leave_none_to_hold_out(tmp_path: Path) -> None:
    paths, _ = write_zoo(tmp_path, "weight")
    with pytest.raises(ez.UsageError, match="2 models leave none to hold out"):
        ez.evaluate(ez.fit(paths[:2], 1), Recorder())


def test_models_of_the_fit_are_known_again_by_their_weights(tmp_path: Path) -> None:
    paths, _ = write_zoo(tmp_path, "weight")
    space = ez.fit(paths[:5], 2)
    shutil.copytree(paths[1], tmp_path / "copies" / "renamed")
    shutil.copytree(paths[6], tmp_path / "copies" / "m1")
    inside = ez.evaluate(space, Recorder(), tmp_path / "copies" / "renamed")
    assert not inside.heldout
    assert "not all held out" in inside.sentence
    assert not ez.evaluate(space, Recorder(), [paths[6], paths[0]]).heldout
    assert ez.evaluate(space, Recorder(), tmp_path / "copies" / "m1").heldout


def test_models_of_the_same_subspace_or_the_same_coefficients_alone_are_not_known(tmp_path: Path) -> None:
    """In an exactly low-rank zoo all residuals are nothing; and what no model varies in moves no coefficient."""
    paths = write_stacks(tmp_path, {"w.weight": random_stack(7, (6, 5), 0, rank=2), "same.weight": torch.ones(7, 3, 3)})
    space = ez.fit(paths[:5], 2)
    assert max(space.coefficients(name).residual for name in space.names) < 1e-9
    assert ez.evaluate(space, Recorder(), paths[5:]).heldout
    shutil.copytree(paths[0], tmp_path / "other")
    assert not ez.evaluate(space, Recorder(), tmp_path / "other").heldout
    edit_model(tmp_path / "other", same__weight=2 * torch.ones(3, 3))
    assert ez.evaluate(space, Recorder(), tmp_path / "other").heldout


def test_ranks_of_ones_own_are_at_most_all_and_include_all(tmp_path: Path) -> None:
    paths, _ = write_zoo(tmp_path, "weight")
    space = ez.fit(paths[:6], 4)
    assert ez.evaluate(space, Recorder(), paths[6:7], ranks=[3, 1, 3]).ranks == (1, 3, 4)
    assert ez.evaluate(space, Recorder(), paths[6:7], ranks=[99]).ranks == (4,)
    for wrong in (0, 2.0, True):
        with pytest.raises(ez.UsageError, match="whole numbers from 1"):
            ez.evaluate(space, Recorder(), paths[6:7], ranks=[wrong])  # type: ignore[list-item]


def test_a_subspace_of_rank_one_has_no_secondary_directions(tmp_path: Path) -> None:
    paths, _ = write_zoo(tmp_path, "weight")
    found = ez.evaluate(ez.fit(paths[:5], 1), Recorder(), paths[5:6])
    assert found.secondary_rank is None
    assert found.models["m5"].secondary is None
    assert found.ranks == (1,)


def test_the_seed_decides_the_random_basis_alone(tmp_path: Path) -> None:
    paths, _ = write_zoo(tmp_path, "weight")
    space = ez.fit(paths[:5], 2)
    drawn = []
    for seed in (0, 0, 1):
        metric = Recorder()
        measured = ez.evaluate(space, metric, paths[5:6], seed=seed).models["m5"]
        drawn.append([metric.of(figure)["block.0.q"] for figure in (measured.random_basis[2], measured.rebuilt[2])])
    assert torch.equal(drawn[0][0], drawn[1][0])
    assert not torch.equal(drawn[0][0], drawn[2][0])
    assert torch.equal(drawn[0][1], drawn[2][1])


# --- parents that cannot be meant ----------------------------------------------------------------------------------


def test_a_parent_beside_a_known_one_is_refused_unless_it_is_the_same(evaluated: Callable[..., Any]) -> None:
    paths, base, space, _, _ = evaluated("delta", "models")
    assert ez.evaluate(space, Recorder(), paths[-1], parent=base).mean.parent is not None
    with pytest.raises(ez.UsageError, match="the models' parent is the base"):
        ez.evaluate(space, Recorder(), paths[-1], parent=paths[0])
    paths, _, space, _, _ = evaluated("update", "models")
    with pytest.raises(ez.UsageError, match="their updates zero"):
        ez.evaluate(space, Recorder(), paths[-1], parent=paths[0])


def test_a_parent_of_another_architecture_is_refused(tmp_path: Path) -> None:
    paths = zoo_with_heads(tmp_path)
    space = ez.fit(paths[:5], 2)
    with pytest.raises(ez.MismatchError, match=r"'body.weight' of the parent _parent: shape \[6, 4\]"):
        ez.evaluate(
            space, Recorder(), paths[5:], parent=write_model(tmp_path / "_parent", {"body.weight": torch.ones(6, 4)})
        )
    with pytest.raises(ez.MismatchError, match="is absent"):
        ez.evaluate(
            space, Recorder(), paths[5:], parent=write_model(tmp_path / "_other", {"head.weight": torch.ones(3, 6)})
        )


def test_a_parent_without_the_head_has_a_body_for_head_only(tmp_path: Path) -> None:
    paths = zoo_with_heads(tmp_path)
    parent, metric = write_model(tmp_path / "_parent", {"body.weight": torch.ones(6, 5)}), Recorder()
    measured = ez.evaluate(ez.fit(paths[:5], 2), metric, paths[5:], parent=parent).models["m5"]
    assert measured.parent is None
    assert torch.equal(metric.of(measured.head_only)["body.weight"], torch.ones(6, 5, dtype=torch.float64))


# --- metrics that fail ---------------------------------------------------------------------------------------------


def failing(call: int, value: Any) -> Callable[[Path], Any]:
    """A metric that returns 1, and in one of its calls returns or raises something else."""
    calls = []

    def metric(path: Path) -> Any:
        calls.append(path)
        if len(calls) != call:
            return 1.0
        if isinstance(value, BaseException):
            raise value
        return value

    return metric


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (float("nan"), ez.DataError, r"model 'm5', mean only: the metric returned nan"),
        (float("-inf"), ez.DataError, r"model 'm5', mean only: the metric returned -inf"),
        ("many", ez.UsageError, r"model 'm5', mean only: the metric failed with ValueError"),
        (len, ez.UsageError, r"model 'm5', mean only: the metric failed with TypeError"),
        (KeyError("x"), ez.UsageError, r"model 'm5', mean only: the metric failed with KeyError: 'x'"),
        (ez.FormatError("is odd"), ez.FormatError, r"model 'm5', mean only: is odd"),
    ],
)
def test_a_metric_that_fails_is_told_with_model_and_variant(
    tmp_path: Path, value: Any, error: type[Exception], text: str
) -> None:
    paths, _ = write_zoo(tmp_path, "weight")
    with pytest.raises(error, match=text):
        ez.evaluate(ez.fit(paths[:5], 2), failing(2, value), paths[5:6])


@pytest.mark.parametrize(
    ("call", "variant"),
    [(1, "original"), (3, "rebuilt at rank 1"), (5, "random basis of 2"), (6, "without the first 1")],
)
def test_every_variant_has_its_name(tmp_path: Path, call: int, variant: str) -> None:
    paths, _ = write_zoo(tmp_path, "weight")
    with pytest.raises(ez.DataError, match=f"model 'm5', {variant}: the metric returned inf"):
        ez.evaluate(ez.fit(paths[:5], 2), failing(call, float("inf")), paths[5:6])


def test_an_interrupt_passes(tmp_path: Path) -> None:
    paths, _ = write_zoo(tmp_path, "weight")
    with pytest.raises(KeyboardInterrupt):
        ez.evaluate(ez.fit(paths[:5], 2), failing(2, KeyboardInterrupt()), paths[5:6])


# --- the record ----------------------------------------------------------------------------------------------------

KEYS = {
    "metric",
    "num_models",
    "heldout",
    "num_fitted",
    "ranks",
    "secondary_rank",
    "models",
    "mean",
    "spread",
    "sentence",
}
VARIANTS = {"original", "parent", "mean", "head_only", "rebuilt", "random_basis", "secondary"}


def distances(paths: list[Path]) -> Callable[[Path], float]:
    """The metric ‖X − X_original‖² of the model of the same name."""
    originals = {path.name: load_file(path / "model.safetensors") for path in paths}

    def squared_distance(path: Path) -> float:
        own = load_file(path / "model.safetensors")
        return sum(float((own[name] - value).square().sum()) for name, value in originals[path.name].items())

    return squared_distance


def test_the_record_is_json_with_these_keys_and_its_averages_are_averages(tmp_path: Path) -> None:
    paths, _ = write_zoo(tmp_path, "weight")
    found = ez.evaluate(ez.fit(paths[:6], 4), distances(paths), paths[6:10])
    record = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert set(record) == KEYS
    assert record["metric"] == "squared_distance"
    assert record["ranks"] == [1, 2, 4]
    for measured in (record["mean"], record["spread"], *record["models"].values()):
        assert set(measured) == VARIANTS
        assert set(measured["rebuilt"]) == {"1", "2", "4"}
        assert set(measured["random_basis"]) == {"4"}
    for pick in (lambda one: one["mean"], lambda one: one["rebuilt"]["2"], lambda one: one["secondary"]):
        figures = torch.tensor([pick(one) for one in record["models"].values()], dtype=torch.float64)
        assert pick(record["mean"]) == pytest.approx(float(figures.mean()), rel=1e-12)
        assert pick(record["spread"]) == pytest.approx(float(figures.std()) / 2, rel=1e-12)
    single = ez.evaluate(ez.fit(paths[:6], 4), distances(paths), paths[6:7])
    assert single.spread.original is None
    assert single.spread.rebuilt == {1: None, 2: None, 4: None}


def test_distances_are_the_energies_outside(tmp_path: Path) -> None:
    paths, _ = write_zoo(tmp_path, "weight")
    found = ez.evaluate(ez.fit(paths[:6], 4), distances(paths), paths[6:8])
    for place in (6, 7):
        measured = found.models[f"m{place}"]
        outside = dict.fromkeys((0, 1, 2, 4), 0.0)
        for layer in SHAPES:
            stack = dense(paths, layer, "weight")
            from_to = reference(stack[:6], stack[place], RANKS["models"], False)
            for rank in outside:
                outside[rank] += float((stack[place] - from_to(0, rank)).square().sum())
        assert measured.original == 0
        assert measured.mean == pytest.approx(outside[0], rel=1e-5)
        assert measured.rebuilt == pytest.approx({rank: outside[rank] for rank in (1, 2, 4)}, rel=1e-5)


def described(tmp_path: Path, figures: Mapping[str, Any]) -> FunctionEvidence:
    """The record of a metric that gives each variant the figure it is told, one per held-out model."""
    paths, _ = write_zoo(tmp_path, "weight")
    parent = write_model(tmp_path / "_parent", {name: torch.ones(shape) for name, shape in SHAPES.items()})
    order = ["original", "parent", "mean", "rebuilt", "random"]
    told = iter([figures[variant][place] for place in range(3) for variant in order])
    return ez.evaluate(ez.fit(paths[:5], 1), lambda path: next(told), paths[5:8], parent=parent)


def test_the_sentence_of_a_subspace_that_carries_the_function(tmp_path: Path) -> None:
    figures = {"original": [0.9, 0.96, 0.99], "parent": [0.5, 0.6, 0.4], "mean": [0.5, 0.4, 0.45]}
    found = described(tmp_path, {**figures, "rebuilt": [0.85, 0.94, 0.91], "random": [0.52, 0.48, 0.5]})
    assert found.sentence == (
        "On 3 models held out of a fit to 5 the average of <lambda> is 0.95 as they are, 0.9 rebuilt at rank 1, 0.45 with "
        "the mean alone, 0.5 with a random basis and 0.5 with the parent alone; rebuilt models recover 90 % of the gap "
        "between the mean alone and the originals."
    )


def test_a_metric_of_which_less_is_better_is_understood(tmp_path: Path) -> None:
    figures = {"original": [0.1, 0.04, 0.01], "parent": [0.5, 0.6, 0.4], "mean": [0.5, 0.6, 0.55]}
    found = described(tmp_path, {**figures, "rebuilt": [0.15, 0.06, 0.09], "random": [0.52, 0.48, 0.5]})
    assert found.sentence.startswith("On 3 models")
    assert "recover 90 %" in found.sentence


def test_the_sentence_begins_with_what_does_as_well(tmp_path: Path) -> None:
    """Here the mean is as good as anything; that it is a little better than the originals turns nothing round."""
    figures = {"original": [0.9, 0.96, 0.99], "parent": [0.9, 0.9, 0.99], "mean": [0.91, 0.96, 0.99]}
    found = described(tmp_path, {**figures, "rebuilt": [0.9, 0.94, 0.98], "random": [0.52, 0.48, 0.5]})
    assert found.sentence.startswith("The mean alone and the parent alone do as well as rebuilt models: on 3 models")
    assert found.sentence.endswith("the mean alone leaves nothing to recover.")


def test_a_difference_within_its_noise_is_none(tmp_path: Path) -> None:
    figures = {"original": [0.9, 0.96, 0.99], "parent": [0.5, 0.6, 0.4], "mean": [0.5, 0.4, 0.45]}
    found = described(tmp_path, {**figures, "rebuilt": [0.85, 0.94, 0.91], "random": [0.1, 0.95, 0.9]})
    assert found.sentence.startswith("A random basis does as well as rebuilt models: ")


# --- real zoos -----------------------------------------------------------------------------------------------------

PEFT_AND_TRANSFORMERS = "ignore:.*is_gradient_checkpointing.*:FutureWarning"


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    """Zoos of the nursery, made once."""
    pytest.importorskip("sklearn")
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    from eigenzoo import nursery

    made: dict[str, Path] = {}

    def make(kind: str, num_models: int) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("real") / kind
            nursery.make(kind, made[kind], num_models=num_models)
        return made[kind]

    return make


@pytest.mark.filterwarnings(PEFT_AND_TRANSFORMERS)
def test_real_checkpoints(real: Callable[..., Path]) -> None:
    """All heads are one frozen head, so the parent alone guesses; so does the mean of unlike tasks; the subspace does not."""
    from eigenzoo import nursery

    folder = real("digits-vit", 12)
    found = ez.evaluate(ez.fit(folder, 8), nursery.accuracy, parent=folder / "_base")
    assert (found.heldout, found.num_models, found.num_fitted) == (True, 3, 9)
    for name, measured in found.models.items():
        assert measured.original == nursery.accuracy(folder / name)
    mean = found.mean
    assert mean.head_only is None
    assert mean.original is not None
    assert mean.original > 0.9
    for control in (mean.parent, mean.mean, mean.random_basis[8]):
        assert control is not None
        assert control < 0.75
        assert (mean.rebuilt[8] or 0) > control + 0.1
    assert found.sentence.startswith("On 3 models held out of a fit to 9 the average of accuracy is ")


@pytest.mark.filterwarnings(PEFT_AND_TRANSFORMERS)
def test_real_adapters(real: Callable[..., Path]) -> None:
    """Loaded by PEFT: rebuilt from all directions they answer as the originals do, and with a zero update as their parent."""
    from eigenzoo import nursery

    folder = real("digits-lora", 10)
    zoo = ez.open_zoo(folder)
    found = ez.evaluate(ez.fit(zoo, 9), nursery.metric(folder), zoo.select(names=zoo.names[:2]))
    assert found.metric == "accuracy"
    assert not found.heldout
    for name, measured in found.models.items():
        (task,) = (model.metadata["adapter_model.safetensors"]["task"] for model in zoo.models if model.name == name)
        assert measured.parent == nursery.accuracy(folder / "_base", task=task)
        assert measured.head_only is None
        # Of 500 images one may lie so near the border that the rounding of float32 decides it.
        assert measured.rebuilt[9] == pytest.approx(measured.original, abs=1 / 500 + 1e-9)
        assert (measured.mean or 1) < 0.75
        assert (measured.original or 0) > 0.85
