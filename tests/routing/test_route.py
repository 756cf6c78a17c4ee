"""`ez.route`, and mixtures of a bundle's models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import eigenzoo as ez
from builders import random_factors, random_stack, write_adapter, write_stacks
from eigenzoo.adapt.rebuilding import rebuild
from eigenzoo.routing.routing import mix
from eigenzoo.subspace.coefficient_file import save_coefficients
from routing_data import Tasks
from tolerance import tolerance

NAMES = ("m0", "m1", "m3")
TASKS = Tasks(NAMES)
INPUTS = torch.cat([TASKS.draw(8, seed=2)["m1"], TASKS.draw(2, seed=3)["m3"]])
MODULES = {"h.0.q_proj": (12, 10), "h.0.v_proj": (8, 10)}
AXES = {"directions": (2, None), "cores": ({"outputs": 6, "inputs": 6}, ("outputs", "inputs"))}


@pytest.fixture(params=["weights", *AXES])
def space(request: pytest.FixtureRequest, tmp_path: Path) -> ez.Subspace:
    if request.param == "weights":
        models = write_stacks(
            tmp_path / "zoo", {"a.weight": random_stack(5, (6, 4)), "b.bias": random_stack(5, (6,), 1)}
        )
        return ez.fit(ez.open_zoo([str(model) for model in models]), rank=3)
    for number in range(5):
        write_adapter(tmp_path / "zoo" / f"m{number}", random_factors(MODULES, 2, number), alpha=4)
    rank, axes = AXES[request.param]
    return ez.fit(ez.open_zoo(tmp_path / "zoo"), rank=rank, **({} if axes is None else {"axes": axes}))


def test_a_mixture_is_rebuilt_as_the_average_of_rebuilt_models(space: ez.Subspace) -> None:
    weights = {"m0": 0.5, "m1": 0.3, "m3": 0.2}
    mixed = mix(space, weights)
    rebuilt = space.rebuild(mixed)
    for layer in space.layers:
        wanted = torch.stack([weight * space.rebuild(name).layer(layer) for name, weight in weights.items()]).sum(0)
        scale = float(wanted.abs().max())
        assert float((rebuilt.layer(layer) - wanted).abs().max()) < tolerance(8, dtype=torch.float32, scale=scale)
        lost = sum(weight * space.coefficients(name).outside[layer] for name, weight in weights.items())
        assert mixed.outside[layer] == pytest.approx(lost)
    assert mixed.name == "mixture of 3 models"


def test_a_mixture_of_one_model_is_that_model(space: ez.Subspace) -> None:
    mixed, alone = mix(space, {"m0": 0.0, "m1": 1.0}), space.coefficients("m1")
    assert mixed.name == "m1"
    assert all(torch.equal(mixed.values[layer], alone.values[layer]) for layer in space.layers)
    assert mixed.residual == pytest.approx(alone.residual)


def test_the_file_of_a_mixture_of_low_rank_cores_has_the_nearest_of_their_rank(tmp_path: Path) -> None:
    for number in range(5):
        write_adapter(tmp_path / "zoo" / f"m{number}", random_factors(MODULES, 2, number), alpha=4)
    space = ez.fit(tmp_path / "zoo", axes=("outputs", "inputs"), rank=7, core_rank=2)
    mixed = mix(space, {"m0": 0.6, "m1": 0.4})
    file = save_coefficients(mixed.values, space, tmp_path / "mix.safetensors")
    whole, found = space.rebuild(mixed), rebuild(space, file)
    for layer in space.layers:
        left, values, right = torch.linalg.svd(whole.layer(layer))
        nearest = left[:, :2] * values[:2] @ right[:2]
        assert float(values[2]) > 0.1 * float(values[0]), "a mixture within the rank would prove nothing"
        assert float((found.layer(layer) - nearest).norm()) < tolerance(16, dtype=torch.float32, scale=float(values[0]))


@pytest.mark.parametrize("weights", [{}, {"m0": 0.4}, {"m0": 1.5, "m1": -0.5}, {"m0": float("nan")}], ids=str)
def test_weights_that_are_no_average_are_refused(space: ez.Subspace, weights: dict[str, float]) -> None:
    with pytest.raises(ez.UsageError, match="Weights of a mixture are positive and sum to 1"):
        mix(space, weights)


def test_a_bundle_without_moments_has_mixtures_too(space: ez.Subspace, tmp_path: Path) -> None:
    space.save(tmp_path / "bundle", moments=False)
    loaded = ez.load(tmp_path / "bundle")
    mixed = mix(loaded, {"m0": 0.5, "m1": 0.5})
    halves = [loaded.coefficients(name).residual / 2 for name in ("m0", "m1")]
    assert mixed.residual == pytest.approx(sum(halves), rel=0.5)
    loaded.rebuild(mixed).save(tmp_path / "out")


def test_route_chooses_among_models_of_the_bundle(space: ez.Subspace) -> None:
    routing = ez.route(space, INPUTS, TASKS.draw(30, seed=1))
    assert [name for name in routing.models if name] == ["m1"] * 8 + ["m3"] * 2
    weights = routing.mixture()
    assert weights["m1"] == pytest.approx(0.8, abs=0.1)
    mixed = routing.coefficients(space)
    wanted = mix(space, weights)
    assert all(torch.equal(mixed.values[layer], wanted.values[layer]) for layer in space.layers)


def test_examples_of_a_model_that_the_bundle_lacks(space: ez.Subspace) -> None:
    examples = {**TASKS.draw(30, seed=1), "m33": torch.zeros(3, 6)}
    with pytest.raises(
        ez.MismatchError, match=r"examples of 'm33', which is not a model of the bundle.*Did you mean"
    ) as found:
        ez.route(space, INPUTS, examples)
    assert "'m3'" in str(found.value)
