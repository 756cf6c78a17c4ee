"""`ez.evaluate`: models with heads of their own, beside adapters and in checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from function_zoos import SHAPES, Recorder, assert_close, dense, zoo_with_heads
from safetensors.torch import load_file

import eigenzoo as ez
from builders import (
    random_factors,
    random_stack,
    read_update,
    write_adapter,
    write_model,
)


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
    monkeypatch.setattr("function_zoos.SHAPES", shapes)
    paths = [write_adapter(tmp_path / f"m{n}", random_factors(shapes, 2, n), lora_alpha=5) for n in range(5)]
    metric = Recorder()
    found = ez.evaluate(ez.fit(paths[:4], 2, exclude=exclude), metric, paths[4:]).models["m4"]
    model, parent = metric.of(found.head_only), metric.of(found.parent)
    assert_close(model["classifier"], read_update(paths[4], "classifier"))
    for layer in shapes:
        assert not bool(parent[layer].any())
        assert layer == "classifier" or not bool(model[layer].any())
