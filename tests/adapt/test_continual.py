"""A stream of tasks: nothing is forgotten with a frozen basis, and with a new one exactly what geometry says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import eigenzoo as ez
from builders import random_factors, random_stack, seeded, write_adapter, write_stacks
from eigenzoo import adapt
from eigenzoo.adapt import continual
from eigenzoo.adapt.adapter_file import AdapterFile, read
from eigenzoo.adapt.augment import Augmentation
from eigenzoo.adapt.continual import Stream, move
from eigenzoo.adapt.maps import map_of
from eigenzoo.errors import BundleError, UsageError
from tolerance import tolerance

SHAPES = {"one.weight": (6, 5), "two.weight": (3, 6)}


class Net(nn.Module):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(5, 6), nn.Linear(6, 3)


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def stacks(rank: int | None) -> dict[str, torch.Tensor]:
    return {name: random_stack(12, shape, seed, rank) for seed, (name, shape) in enumerate(SHAPES.items())}


def trained(space: ez.Subspace, draw: int, **options: object) -> adapt.Adapted:
    """A module with random coefficients."""
    adapted = adapt.attach(net(), space, **options)
    with torch.no_grad():
        for parameter in adapted.parameters():
            parameter.normal_(generator=seeded(draw))
    return adapted


def weights(adapted: adapt.Adapted) -> torch.Tensor:
    return torch.cat([adapted.module.one.weight.flatten(), adapted.module.two.weight.flatten()]).detach()


def renamed(paths: list[Path]) -> list[Path]:
    return [path.rename(path.with_name(f"new{place}")) for place, path in enumerate(paths)]


class Distances:
    """A metric: 1 less the distance from the weights that a task had when it was learnt."""

    def __init__(self) -> None:
        self.of: dict[str, torch.Tensor] = {}

    def __call__(self, name: str, adapted: adapt.Adapted) -> float:
        return 1 - float((weights(adapted) - self.of[name]).norm() / self.of[name].norm())


def learnt(stream: Stream, metric: Distances, name: str, draw: int, **options: object) -> None:
    adapted = trained(stream.space, draw, **options)
    metric.of[name] = weights(adapted)
    stream.learn(name, adapted)


def test_a_frozen_basis_forgets_nothing(tmp_path: Path) -> None:
    stream, metric = Stream(ez.fit(write_stacks(tmp_path / "zoo", stacks(None)), 3), tmp_path / "stream"), Distances()
    learnt(stream, metric, "cats", 1)
    learnt(stream, metric, "dogs", 2, start="m3")
    learnt(stream, metric, "birds", 3, start="zero", augment=2, besides=["two.bias"])
    report = stream.report(metric, net)
    assert report.tasks == stream.tasks == ("cats", "dogs", "birds")
    assert report.steps == ("learn cats", "learn dogs", "learn birds")
    assert [[value is not None for value in row] for row in report.values] == [
        [True, False, False],
        [True, True, False],
        [True, True, True],
    ]
    assert all(value == pytest.approx(1, abs=1e-6) for row in report.values for value in row if value is not None)
    assert report.mean_forgetting == 0
    again = stream.attach("birds", net())
    assert torch.allclose(
        again.module.two.bias, trained(stream.space, 3, start="zero", augment=2, besides=["two.bias"]).module.two.bias
    )


def test_a_basis_that_spans_the_old_tasks_keeps_them(tmp_path: Path) -> None:
    """The zoo has three directions and the fit five: after new models of two more everything still fits."""
    all_stacks = stacks(3)
    more = {
        name: stack[0] + torch.tensordot(random_stack(4, (2,), 5), random_stack(2, stack.shape[1:], 9), 1)
        for name, stack in all_stacks.items()
    }
    space = ez.fit(write_stacks(tmp_path / "zoo", all_stacks), 5)
    stream, metric = Stream(space, tmp_path / "stream"), Distances()
    adapted = adapt.attach(net(), stream.space)
    rows = stream.space.all_coefficients
    adapted.set_coefficients({name: 0.5 * rows_NK[1] + 0.7 * rows_NK[4] for name, rows_NK in rows.items()})
    metric.of["cats"] = weights(adapted)
    stream.learn("cats", adapted)
    paths = renamed(write_stacks(tmp_path / "more", more))
    lost = stream.refresh(paths)
    learnt(stream, metric, "dogs", 2)
    report = stream.report(metric, net)
    assert report.steps == ("learn cats", "refresh 1", "learn dogs")
    assert set(stream.space.names) == {*space.names, "cats", "new0", "new1", "new2", "new3"}
    assert lost["cats"] < 1e-10
    assert report.mean_forgetting < 1e-5
    assert not torch.allclose(
        stream.space.layers["one.weight"].removed(), space.layers["one.weight"].removed(), atol=0.1
    )


@pytest.mark.parametrize("include", [True, False])
def test_what_is_lost_is_what_the_new_span_leaves_out(tmp_path: Path, include: bool) -> None:
    space = ez.fit(write_stacks(tmp_path / "zoo", stacks(None)), 2)
    stream, metric = Stream(space, tmp_path / "stream"), Distances()
    learnt(stream, metric, "cats", 1)
    learnt(stream, metric, "dogs", 2)
    whole = {name: weights(stream.attach(name, net())).double() for name in stream.tasks}
    old_mean = weights(adapt.attach(net(), stream.space)).double()
    more = {name: 2 * random_stack(5, shape, 7 + seed) for seed, (name, shape) in enumerate(SHAPES.items())}
    paths = renamed(write_stacks(tmp_path / "more", more))
    lost = stream.refresh(paths, include_tasks=include)
    assert ("cats" in stream.space.names) == include == (tmp_path / "stream" / "models" / "cats").exists()
    for name, target in whole.items():
        nearest, start = [], 0
        for layer, basis in stream.space.layers.items():
            size = basis.layer.num_values
            mean = basis.removed().expand(basis.layer.shape).flatten()
            rows = basis.operator().table.double().flatten(1)
            left = target[start : start + size] - mean
            nearest.append(mean + rows.T @ torch.linalg.lstsq(rows.T, left[:, None]).solution[:, 0])
            start += size
            assert layer in SHAPES
        found = weights(stream.attach(name, net())).double()
        assert torch.allclose(found, torch.cat(nearest), atol=tolerance(64, dtype=torch.float32))
        outside = (torch.cat(nearest) - target).square().sum() / (target - old_mean).square().sum()
        assert lost[name] == pytest.approx(float(outside), rel=1e-3)
    report = stream.report(metric, net)
    expected = {name: 1 - metric(name, stream.attach(name, net())) for name in stream.tasks}
    assert report.forgetting["cats"] == pytest.approx(expected["cats"], abs=1e-5)
    assert report.mean_forgetting == pytest.approx(sum(expected.values()) / 2, abs=1e-5)
    assert report.mean_forgetting > 0.05


VIEWS = [
    ("weight", {"models": 5}),
    ("weight", {"outputs": 3, "inputs": 4}),
    ("update", {"models": 5}),
    ("update", {"inputs": 4}),
]


@pytest.mark.parametrize(("view", "rank"), VIEWS)
@pytest.mark.parametrize("mean", [True, False])
def test_moving_into_a_basis_and_back_changes_nothing_inside_it(
    tmp_path: Path, view: str, rank: dict[str, int], mean: bool
) -> None:
    """From a small subspace into one that holds it: of the same zoo at a higher rank, where the mean is the same."""
    if view == "weight":
        zoo = ez.open_zoo(write_stacks(tmp_path, stacks(None)))
        large = {axis: size + 1 for axis, size in rank.items()}
    else:
        shapes = {name.removesuffix(".weight"): shape for name, shape in SHAPES.items()}
        paths = [write_adapter(tmp_path / f"m{n}", random_factors(shapes, 2, seed=n)) for n in range(8)]
        zoo = ez.open_zoo(paths, view="update")
        large = {axis: size + 1 for axis, size in rank.items()}
    old, new = ez.fit(zoo, rank), ez.fit(zoo, large)
    values = {name: torch.randn(basis.coefficient_shape, generator=seeded(4)) for name, basis in old.layers.items()}
    moved, lost = move(AdapterFile(values, {}, mean, {}), old, new)
    assert lost < tolerance(64, dtype=torch.float32) ** 2 * 1e3
    for name, basis in old.layers.items():
        before, after = map_of(basis, torch.float64), map_of(new.layers[name], torch.float64)
        # Of updates the mean is a core: in the larger basis it is a little more than it was.
        expected = before.matrix(values[name].double()) + mean * before.mean()
        found = after.matrix(moved[name]) + mean * after.mean()
        assert torch.allclose(found, expected, atol=1e-5 * float(expected.abs().max()))
    back, _ = move(AdapterFile(moved, {}, mean, {}), new, old)
    assert all(torch.allclose(back[name].float(), values[name], atol=1e-4) for name in values)


def test_random_directions_are_moved_as_the_weights_that_they_are(tmp_path: Path) -> None:
    space = ez.fit(write_stacks(tmp_path / "zoo", stacks(None)), 3)
    adapted = trained(space, 5, augment=4, seed=8)
    found = read(adapt.save(adapted, tmp_path / "task.safetensors"), space, augmented=True)
    assert found.augmentation == Augmentation(4, 8)
    moved, lost = move(found, space, space)
    inside = {name: values[:3] for name, values in found.values.items()}
    assert all(torch.allclose(moved[name].float(), inside[name], atol=1e-5) for name in inside)
    outside = sum(float(values[3:].square().sum()) for values in found.values.values())
    assert lost == pytest.approx(outside / sum(float(v.square().sum()) for v in found.values.values()), rel=1e-4)


def test_a_stream_is_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space = ez.fit(write_stacks(tmp_path / "zoo", stacks(None)), 3)
    stream, metric = Stream(space, tmp_path / "stream"), Distances()
    learnt(stream, metric, "cats", 1)

    def broken(*arguments: object) -> None:
        raise RuntimeError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(continual, "save_moved", broken)
        with pytest.raises(RuntimeError, match="the disk is full"):
            stream.refresh()
    again = Stream(None, tmp_path / "stream")
    assert again.tasks == ("cats",)
    assert metric("cats", again.attach("cats", net())) == pytest.approx(1, abs=1e-6)
    again.refresh()
    assert Stream(None, tmp_path / "stream").report(metric, net) == again.report(metric, net)
    with pytest.raises(BundleError, match="over another basis"):
        Stream(space, tmp_path / "stream")
    with pytest.raises(BundleError, match="was adapted in another basis"):
        again.learn("dogs", trained(space, 1))
    with pytest.raises(UsageError, match="holds no stream"):
        Stream(None, tmp_path / "none")
    for name in ("cats", "../cats", "", "a/b"):
        with pytest.raises(UsageError, match="is taken, or no name"):
            again.learn(name, trained(again.space, 1))
    with pytest.raises(UsageError, match="no task is called 'dogs'"):
        again.attach("dogs", net())
    with pytest.raises(UsageError, match="nothing joins the zoo"):
        again.refresh(include_tasks=False)
