"""The laws of a router: order and units of what it sees, its error rate, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binom
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

import eigenzoo as ez
from builders import seeded
from routing_data import Tasks

TASKS = Tasks(("a", "b", "c", "d"))


def test_it_chooses_as_scikit_learn_does() -> None:
    examples, inputs = TASKS.draw(30, seed=1), torch.cat(list(TASKS.draw(200, seed=2).values()))
    router = ez.Router.fit(examples)
    found = router.route(inputs, alpha=0)
    labels = np.repeat(TASKS.names, 30)
    peer = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=router._chosen_by.shrinkage)
    peer.fit(torch.cat(list(examples.values())).numpy(), labels)
    assert list(found.models) == list(peer.predict(inputs.numpy()))
    assert len(set(found.models)) == 4


def test_the_order_of_models_changes_nothing() -> None:
    examples, inputs = TASKS.draw(12, seed=1), torch.cat(list(TASKS.draw(50, seed=2).values()))
    first = ez.Router.fit(examples).route(inputs, alpha=0.1)
    second = ez.Router.fit(dict(reversed(examples.items()))).route(inputs, alpha=0.1)
    assert second.names == tuple(reversed(first.names))
    assert first.models == second.models
    torch.testing.assert_close(first.weights, second.weights.flip(1))
    torch.testing.assert_close(first.p_values, second.p_values)


def test_units_and_rotations_of_features_change_nothing() -> None:
    examples, inputs = TASKS.draw(15, seed=1), torch.cat(list(TASKS.draw(50, seed=2).values()))
    turn = torch.linalg.qr(torch.randn(6, 6, generator=seeded(3), dtype=torch.float64)).Q * 100
    first = ez.Router.fit(examples).route(inputs)
    second = ez.Router.fit({name: rows @ turn for name, rows in examples.items()}).route(inputs @ turn)
    assert first.models == second.models
    torch.testing.assert_close(first.weights, second.weights)
    torch.testing.assert_close(first.p_values, second.p_values)


@pytest.mark.parametrize("alpha", [0.05, 0.2])
def test_it_abstains_from_at_most_alpha_of_inputs_like_the_examples(alpha: float) -> None:
    """On average over examples: each draw has examples and one input of each task of its own."""
    abstained = 0
    for seed in range(200):
        found = ez.Router.fit(TASKS.draw(15, seed=2 * seed)).route(
            torch.cat(list(TASKS.draw(1, seed=2 * seed + 1).values())), alpha=alpha
        )
        abstained += found.num_abstained
    # Of 20 held-out examples the p-values are multiples of 1/21, so the rate is exactly floor(21 alpha) / 21.
    rate = int(21 * alpha) / 21
    assert rate <= alpha
    # The four inputs of a draw share its examples, so only the draws count as independent.
    assert abstained / 4 <= binom.ppf(0.9999, 200, rate)
    assert abstained / 4 >= binom.ppf(0.0001, 200, rate)


def test_it_abstains_from_inputs_far_from_all_examples() -> None:
    router = ez.Router.fit(TASKS.draw(30, seed=1))
    other = Tasks(("x", "y"), apart=60.0, seed=9).draw(100, seed=3)
    assert router.route(torch.cat(list(other.values()))).num_abstained == 200
    assert router.route(torch.cat(list(other.values())), alpha=0).num_abstained == 0


def test_weights_are_probabilities_that_come_true() -> None:
    """Of few examples in many features: the mean weight of the chosen model is about how often it is right."""
    tasks = Tasks(("a", "b", "c", "d"), width=60, apart=0.35)
    examples, inputs = tasks.draw(12, seed=1), tasks.draw(500, seed=2)
    router = ez.Router.fit(examples)
    found = router.route(torch.cat(list(inputs.values())), alpha=0)
    right = sum(model == TASKS.names[place // 500] for place, model in enumerate(found.models)) / 2000
    assert router.temperature > 1.5
    assert 0.4 < right < 0.9
    assert float(found.weights.max(1).values.mean()) == pytest.approx(right, abs=0.12)
    untempered = torch.softmax(found.weights.log() * router.temperature, 1).max(1).values.mean()
    assert float(untempered) > right + 0.15


def test_inputs_between_two_tasks_are_shared_by_them() -> None:
    tasks = Tasks(("a", "b", "c"), width=4, apart=1.5)
    router = ez.Router.fit(tasks.draw(200, seed=1))
    between = (tasks.centers[0] + tasks.centers[1])[None] / 2 @ tasks.mixing
    weights = router.route(between, alpha=0).mixture(0)
    assert 0.2 < weights["a"] < 0.8
    assert weights["a"] + weights["b"] > weights["c"]


def test_the_result_is_frozen_and_plain() -> None:
    found = ez.Router.fit(TASKS.draw(30, seed=1)).route(TASKS.draw(5, seed=2)["b"])
    with pytest.raises(dataclasses.FrozenInstanceError, match="alpha"):
        found.alpha = 0.5  # type: ignore[misc]
    document = json.loads(json.dumps(found.to_dict()))
    assert document["models"] == {"a": 0, "b": 5, "c": 0, "d": 0}
    assert [each["model"] for each in document["inputs"]] == ["b"] * 5
    assert repr(found) == "Routing(5 inputs, 4 models): 0 abstained at alpha=0.05"


@pytest.mark.parametrize("kind", [np.float32, np.float16, np.int64])
def test_features_may_be_arrays_of_any_numbers(kind: Any) -> None:
    examples = {name: (rows * 100).numpy().astype(kind) for name, rows in TASKS.draw(30, seed=1).items()}
    inputs = (TASKS.draw(20, seed=2)["c"] * 100).numpy().astype(kind)
    assert ez.Router.fit(examples).route(inputs, alpha=0).models.count("c") > 15


SOUND = TASKS.draw(30, seed=1)
INPUTS = torch.zeros(2, 6)
REFUSED: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "no examples": (lambda: ez.Router.fit({}), ez.UsageError, "no examples"),
    "two examples": (lambda: ez.Router.fit({**SOUND, "e": SOUND["a"][:2]}), ez.UsageError, "examples of e: 2 examples"),
    "another width": (lambda: ez.Router.fit({**SOUND, "e": SOUND["a"][:, :5]}), ez.MismatchError, "of e: 5 features"),
    "a vector": (lambda: ez.Router.fit({**SOUND, "e": SOUND["a"][0]}), ez.UsageError, r"of e: features of shape \[6\]"),
    "words": (lambda: ez.Router.fit({"e": [["x"]]}), ez.UsageError, "examples of e: not numbers"),
    "truth values": (lambda: ez.Router.fit({"e": SOUND["a"] > 0}), ez.UsageError, "bool"),
    "NaN": (lambda: ez.Router.fit({"e": SOUND["a"] / 0 * 0}), ez.DataError, "row 0 has features that are NaN"),
    "equal examples": (lambda: ez.Router.fit({"e": torch.ones(9, 4)}), ez.DataError, "no model has two examples"),
    "inputs of another width": (lambda: ez.Router.fit(SOUND).route(INPUTS[:, :5]), ez.MismatchError, "examples have 6"),
    "inputs that are Inf": (lambda: ez.Router.fit(SOUND).route(INPUTS.double() + 1e300), ez.DataError, "row 0"),
    "no inputs": (lambda: ez.Router.fit(SOUND).route(INPUTS[:0]), ez.UsageError, r"shape \[0, 6\]"),
    "an alpha of one": (lambda: ez.Router.fit(SOUND).route(INPUTS, alpha=1), ez.UsageError, "alpha 1"),
    "an alpha of NaN": (lambda: ez.Router.fit(SOUND).route(INPUTS, alpha=float("nan")), ez.UsageError, "alpha nan"),
    "an alpha too small": (
        lambda: ez.Router.fit(SOUND).route(INPUTS, alpha=0.01),
        ez.UsageError,
        "40 held-out examples cannot tell an error rate of 0.01. At least 99 are needed",
    ),
    "a seed": (lambda: ez.Router.fit(SOUND, seed=-1), ez.UsageError, "seed"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_what_it_refuses(case: tuple[Callable[[], object], type[Exception], str]) -> None:
    call, kind, text = case
    with pytest.raises(kind, match=text):
        call()


def test_all_abstained_has_no_mixture() -> None:
    found = ez.Router.fit(SOUND).route(torch.full((3, 6), 1e4))
    assert found.models == (None, None, None)
    assert found.to_dict()["mixture"] is None
    with pytest.raises(ez.UsageError, match="none of 3 inputs belongs to a model"):
        found.mixture()
    with pytest.raises(ez.UsageError, match="there is no input 3"):
        found.mixture(3)


def test_one_model_alone_is_chosen_or_not() -> None:
    found = ez.Router.fit({"a": TASKS.draw(90, seed=1)["a"]}).route(torch.cat([SOUND["a"], torch.full((1, 6), 1e3)]))
    assert set(found.models[:-1]) <= {"a", None}
    assert found.models.count("a") > 20
    assert torch.equal(found.weights, torch.ones(31, 1).double())


def test_files(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    examples, inputs = SOUND, torch.cat(list(TASKS.draw(10, seed=2).values()))
    save_file(examples, tmp_path / "examples.safetensors")
    save_file({"x": inputs}, tmp_path / "inputs.safetensors")
    np.save(tmp_path / "inputs.npy", inputs.numpy())
    wanted = ez.Router.fit(examples).route(inputs)
    router = ez.Router.fit(tmp_path / "examples.safetensors")
    for file in ("inputs.safetensors", "inputs.npy"):
        found = router.route(tmp_path / file)
        assert found.models == wanted.models
        torch.testing.assert_close(found.weights, wanted.weights)
