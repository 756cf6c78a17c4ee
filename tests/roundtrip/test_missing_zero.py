"""`missing="zero"`: a module that an adapter does not train is an update of zero, in every command and in the rebuilt files."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusion_adapters import (
    OUTPUT,
    add_lora,
    deltas,
    kohya_tensors,
    load_by_diffusers,
    make_all,
    save_by_diffusers,
    save_kohya,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

import eigenzoo as ez
from builders import random_factors, read_update, write_adapter
from real_models import TOLERANCE, add_adapter, load_adapter, logits, make, save_adapter
from tolerance import tolerance

SHAPES = {"layers.0.q": (14, 9), "layers.0.v": (9, 12), "layers.1.q": (14, 9)}
TRAINED = [("layers.0.q", "layers.0.v"), ("layers.0.q", "layers.1.q"), ("layers.1.q",), tuple(SHAPES), ("layers.0.v",)]
"""What each adapter trains: no module is in all of them."""

AXES = [
    ("models",),
    ("outputs", "inputs"),
    pytest.param(("models", "outputs", "inputs"), marks=pytest.mark.slow, id="models+outputs+inputs"),
]


@pytest.fixture
def zoos(tmp_path: Path) -> tuple[Path, Path]:
    """A zoo of adapters with other modules each, and the same with updates of zero written out."""
    for place, modules in enumerate(TRAINED):
        factors = random_factors(SHAPES, 2 + place % 2, place)
        whole = {name: (b if name in modules else 0 * b, a) for name, (b, a) in factors.items()}
        write_adapter(tmp_path / "sparse" / f"a{place}", {name: factors[name] for name in modules}, lora_alpha=5)
        write_adapter(tmp_path / "whole" / f"a{place}", whole, lora_alpha=5)
    return tmp_path / "sparse", tmp_path / "whole"


@pytest.mark.parametrize("axes", AXES, ids=lambda axes: "+".join(axes))
def test_a_fit_is_that_of_updates_of_zero(zoos: tuple[Path, Path], axes: tuple[str, ...]) -> None:
    sparse, whole = (
        ez.fit(ez.open_zoo(path, missing=missing), rank=2, axes=axes)
        for path, missing in zip(zoos, ("zero", "error"), strict=True)
    )
    assert set(sparse.layers) == set(SHAPES)
    for name in sparse.names:
        for layer in SHAPES:
            found, expected = (space.rebuild(name).layer(layer) for space in (sparse, whole))
            assert (found - expected).norm() <= tolerance(100, dtype=torch.float32, scale=float(expected.norm()) + 1)
    for layer, report in sparse.report["layers"].items():
        for key in ("captured", "heldout", "mean_energy", "residual", "null"):
            expected = whole.report["layers"][layer][key]
            assert report[key] == (None if expected is None else pytest.approx(expected, rel=1e-6, abs=1e-9))


def test_evidence_counts_zeros_as_data(zoos: tuple[Path, Path]) -> None:
    found, expected = (
        ez.evidence(ez.open_zoo(path, missing=missing)).to_dict()
        for path, missing in zip(zoos, ("zero", "error"), strict=True)
    )
    assert found["verdict"]["code"] == expected["verdict"]["code"]
    for layer in SHAPES:
        for key in ("explained_variance_ratio", "null", "heldout", "mean_energy", "effective_rank"):
            assert_close(found["layers"][layer][key], expected["layers"][layer][key])


def assert_close(found: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_close(found[key], expected[key])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other)
    else:
        assert found == (pytest.approx(expected, rel=1e-4, abs=1e-7) if isinstance(expected, float) else expected)


def test_what_is_counted_is_said(zoos: tuple[Path, Path], call: Callable[..., tuple[int, str, str]]) -> None:
    zoo = ez.open_zoo(zoos[0], missing="zero")
    assert {zero.model: tuple(sorted(zero.modules)) for zero in zoo.zeros} == {
        f"a{place}": tuple(name for name in SHAPES if name not in modules)
        for place, modules in enumerate(TRAINED)
        if len(modules) < 3
    }
    said = (
        "4 of 5 adapters lack modules that others have, which count as updates of zero: a0 (1), a1 (1), a2 (2), a4 (2)"
    )
    assert said in zoo.warnings
    assert zoo.num_bytes == sum(path.stat().st_size for path in zoos[0].rglob("*.safetensors"))
    sizes = [load_file(path) for path in zoos[0].rglob("*.safetensors")]
    assert zoo.layer_bytes == sum(tensor.nbytes for tensors in sizes for tensor in tensors.values())
    for words in (["inspect"], ["plan"], ["evidence"], ["fit", "-o", zoos[0].parent / "bundle"]):
        code, out, _ = call(words[0], zoos[0], *words[1:], "--missing", "zero")
        assert code == 0
        assert words[0] == "plan" or said in " ".join(out.split())
        code, out, err = call(words[0], zoos[0], *words[1:], *(["--force"] if words[1:] else []))
        assert code == 2
        assert "--missing zero (missing='zero') counts an update that an adapter lacks as zero" in err
    document = json.loads(call("inspect", zoos[0], "--missing", "zero", "--json")[1])
    assert [model["num_zeros"] for model in document["models"]] == [1, 1, 2, 0, 2]
    first = load_file(zoos[0] / "a0" / "adapter_model.safetensors")
    assert document["models"][0]["num_values"] == sum(tensor.numel() for tensor in first.values())


def test_what_lies_beside_an_adapter_is_named_all_the_same(zoos: tuple[Path, Path], tmp_path: Path) -> None:
    """a0 lacks modules that others have."""
    (zoos[0] / "a0" / "value_head.safetensors").touch()
    write_adapter(zoos[0] / "a0" / "second", random_factors(SHAPES, 2, 0))
    zoo = ez.open_zoo(zoos[0], missing="zero")
    (weights, below) = zoo.warnings[:2]
    assert weights.startswith(
        "weights beside these models are neither read nor carried: a0/value_head.safetensors; copy"
    )
    assert below.startswith(
        "folders below these models hold models of their own, which are not read: a0/second; name them"
    )
    found = [(left.file, left.kind) for left in ez.inspect(zoo).not_carried]
    assert found == [("value_head.safetensors", "weights"), ("second", "models")]
    space = ez.load(ez.fit(zoo, rank=1.0).save(tmp_path / "bundle"))
    assert space.rebuild("a0").not_carried == ("value_head.safetensors", "second")
    assert space.rebuild("a0").left_weights == ("value_head.safetensors",)


def test_a_part_of_the_zoo_has_the_same_layers(zoos: tuple[Path, Path]) -> None:
    """As halves and folds have, and what another process opens of them."""
    import pickle

    part = ez.open_zoo(zoos[0], missing="zero").select(names=["a2", "a1"])
    again = pickle.loads(pickle.dumps(part))
    for zoo in (part, again):
        assert list(zoo.names) == ["a2", "a1"]
        assert set(zoo.layers) == set(SHAPES)
        assert all(
            float(torch.linalg.norm(b @ a)) == 0
            for b, a in [zoo.stack("layers.0.v").factors(place) for place in (0, 1)]
        )


@pytest.mark.slow
def test_a_cluster_fits_the_same_bits(zoos: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("distributed")
    from eigenzoo.integrations.cluster import cluster_workers

    zoo = ez.open_zoo(zoos[0], missing="zero")
    here = ez.fit(zoo, rank=2, cache=False)
    with cluster_workers("local", num_workers=1) as workers:
        there = ez.fit(zoo, rank=2, workers=workers, cache=False)
    for name in here.names:
        for layer in SHAPES:
            assert torch.equal(here.rebuild(name).layer(layer), there.rebuild(name).layer(layer))


@pytest.mark.parametrize("axes", AXES[:2], ids=lambda axes: "+".join(axes))
def test_a_bundle_keeps_it(zoos: tuple[Path, Path], tmp_path: Path, axes: tuple[str, ...]) -> None:
    """Projecting, growing with the files and without, fitting anew, verifying."""
    zoo = ez.open_zoo([zoos[0] / f"a{place}" for place in range(4)], missing="zero")
    space = ez.load(ez.fit(zoo, rank=1.0, axes=axes).save(tmp_path / "bundle"))
    assert space.manifest.missing == "zero"
    assert list(space.verify()) == []
    projected = space.project(zoos[0] / "a2")
    assert projected.residual < 1e-10
    assert space.project(zoos[0] / "a4").residual > 0.01
    grown = ez.load(space.add([zoos[0] / "a4"], refresh=True).save(tmp_path / "grown"))
    for place in range(5):
        for layer in SHAPES:
            truth = read_update(zoos[1] / f"a{place}", layer)
            found = grown.rebuild(f"a{place}").layer(layer)
            assert (found - truth).norm() <= tolerance(1000, dtype=torch.float32, scale=float(truth.norm()) + 1)
    zoos[0].rename(tmp_path / "gone")
    alone = space.add([tmp_path / "gone" / "a4"], refresh=True)
    truth = read_update(zoos[1] / "a4", "layers.0.v")
    assert (alone.rebuild("a4").layer("layers.0.v") - truth).norm() <= 1e-4 * truth.norm()
    assert alone.manifest.missing == "zero"
    assert list(ez.load(alone.save(tmp_path / "alone")).verify()) == []


TARGET_SETS: list[dict[str, Any]] = [
    {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 8},
    {"target_modules": "all-linear", "r": 2, "lora_alpha": 6, "rank_pattern": {"up_proj": 3}},
    {"target_modules": ["up_proj"], "layers_to_transform": [1], "layers_pattern": "layers", "r": 3, "use_rslora": True},
    {"target_modules": r".*\.(k_proj|embed_tokens)", "exclude_modules": ["layers.0.self_attn.k_proj"], "r": 2},
]


def test_peft_answers_as_with_the_originals(tmp_path: Path) -> None:
    """Adapters that name their targets in each way; a fit that loses much leaves updates where there were none."""
    expected = {}
    for number, settings in enumerate(TARGET_SETS):
        peft = add_adapter(make("llama"), number, **settings)
        expected[f"a{number}"] = logits(peft, "llama")
        save_adapter(peft, tmp_path / "zoo" / f"a{number}")
    zoo = ez.open_zoo(tmp_path / "zoo", missing="zero")
    assert len(zoo.layers) == 15
    space = ez.load(ez.fit(zoo, rank=1.0).save(tmp_path / "bundle"))
    base = logits(make("llama"), "llama")
    for name, answer in expected.items():
        assert (answer - base).abs().max() > 1000 * TOLERANCE
        rebuilt = space.rebuild(name).save(tmp_path / name)
        torch.testing.assert_close(
            logits(load_adapter("llama", rebuilt), "llama"), answer, rtol=TOLERANCE, atol=TOLERANCE
        )
    lossy = ez.fit(zoo, rank=1)
    model = make("llama")
    with torch.no_grad():
        for module in lossy.layers:
            weight = model.get_submodule(module).weight
            update = lossy.rebuild("a2").layer(module).float()
            weight += update.T if "embed" in module else update
    found = logits(load_adapter("llama", lossy.rebuild("a2", max_lora_rank="full").save(tmp_path / "lossy")), "llama")
    torch.testing.assert_close(found, logits(model, "llama"), rtol=TOLERANCE, atol=TOLERANCE)
    assert (found - expected["a2"]).abs().max() > 0.01


NAMES = ("unet", "text_encoder")


@pytest.mark.parametrize("kind", ["diffusers", pytest.param("before-0.34", marks=pytest.mark.slow), "kohya"])
def test_loras_of_diffusion_models(tmp_path: Path, kind: str) -> None:
    """Components and modules that a file lacks; the rebuilt file answers in diffusers as the original."""
    settings = [
        {"target_modules": ["to_q", "conv1"]},
        {"target_modules": ["to_q", "proj_in"]},
        {"target_modules": ["conv1"]},
    ]
    expected: dict[str, Mapping[str, Tensor]] = {}
    for number, chosen in enumerate(settings):
        names = NAMES if number else NAMES[:1]
        models = add_lora(make_all(names), number, rank=2, alpha=2 if kind == "before-0.34" else 6, **chosen)
        expected[f"m{number}"] = deltas(models)
        path = tmp_path / "zoo" / f"m{number}.safetensors"
        path.parent.mkdir(exist_ok=True)
        if kind == "kohya":
            save_kohya(kohya_tensors(models), path)
        else:
            save_by_diffusers(models, tmp_path / f"saved{number}", metadata=kind == "diffusers").rename(path)
    with pytest.raises(ez.MismatchError, match=r"--missing zero"):
        ez.open_zoo(tmp_path / "zoo")
    space = ez.load(ez.fit(ez.open_zoo(tmp_path / "zoo", missing="zero"), rank=1.0).save(tmp_path / "bundle"))
    for name, updates in expected.items():
        found = deltas(load_by_diffusers(space.rebuild(name).save(tmp_path / name) / OUTPUT, NAMES))
        assert set(found) == set().union(*expected.values())
        for module, delta in found.items():
            truth = updates.get(module)
            assert (delta - (0 if truth is None else truth)).norm() <= 1e-5 * (1 if truth is None else truth.norm()), (
                module
            )
    lossy = ez.fit(ez.open_zoo(tmp_path / "zoo", missing="zero"), rank=0).rebuild("m2", max_lora_rank="full")
    found = deltas(load_by_diffusers(lossy.save(tmp_path / "mean") / OUTPUT, NAMES))
    for module, delta in found.items():
        mean = (
            sum(updates[module] if module in updates else torch.zeros_like(delta) for updates in expected.values()) / 3
        )
        assert (delta - mean).norm() <= 1e-5 * mean.norm(), module


def test_spellings_that_cannot_be_mixed_are_refused(tmp_path: Path) -> None:
    (tmp_path / "zoo").mkdir()
    save_kohya(
        kohya_tensors(add_lora(make_all(NAMES[:1]), 0, target_modules=["to_q"])), tmp_path / "zoo" / "a.safetensors"
    )
    save_by_diffusers(add_lora(make_all(NAMES[:1]), 1, target_modules=["conv1"]), tmp_path / "saved").rename(
        tmp_path / "zoo" / "b.safetensors"
    )
    with pytest.raises(
        ez.MismatchError,
        match=r"a has no such layer, and no file with keys of the same kind has it\..*save_lora_weights",
    ):
        ez.open_zoo(tmp_path / "zoo", missing="zero")


def test_a_module_that_is_trained_whole_is_not_zero(tmp_path: Path) -> None:
    write_adapter(tmp_path / "zoo" / "a0", random_factors(SHAPES, 2, 0))
    some = {name: factors for name, factors in random_factors(SHAPES, 2, 1).items() if name != "layers.1.q"}
    others = {"base_model.model.layers.1.q.weight": torch.ones(14, 9)}
    write_adapter(tmp_path / "zoo" / "a1", some, others=others, modules_to_save=["layers.1.q"])
    with pytest.raises(
        ez.MismatchError, match=r"layer 'layers\.1\.q': a1 holds the whole weight.*--exclude 'layers\.1\.q'"
    ):
        ez.open_zoo(tmp_path / "zoo", missing="zero")
    zoo = ez.open_zoo(tmp_path / "zoo", missing="zero", exclude=["layers.1.q"])
    rebuilt = ez.fit(zoo, rank=1.0).rebuild("a1").save(tmp_path / "out")
    assert torch.equal(
        load_file(rebuilt / "adapter_model.safetensors")["base_model.model.layers.1.q.weight"], torch.ones(14, 9)
    )


def test_only_updates_can_be_zero(tmp_path: Path, zoos: tuple[Path, Path]) -> None:
    with pytest.raises(
        ez.UsageError, match=r"missing='zero' does not work with view 'factors'\. Only an update can be zero"
    ):
        ez.open_zoo(zoos[0], missing="zero", view="factors")
    with pytest.raises(ez.UsageError, match=r"missing 'none'.*error.*zero"):
        ez.open_zoo(zoos[0], missing="none")
    (tmp_path / "dense").mkdir()
    save_file({"w": torch.ones(3, 3)}, tmp_path / "dense" / "m.safetensors")
    with pytest.raises(ez.UsageError, match=r"missing='zero' does not work with view 'weight'"):
        ez.open_zoo(tmp_path / "dense", missing="zero")


def test_dtypes_stay_those_of_the_file(tmp_path: Path) -> None:
    write_adapter(tmp_path / "zoo" / "a0", random_factors(SHAPES, 2, 0))
    some = {
        name: factors for name, factors in random_factors(SHAPES, 2, 1, torch.bfloat16).items() if name != "layers.1.q"
    }
    write_adapter(tmp_path / "zoo" / "a1", some)
    folder = ez.fit(ez.open_zoo(tmp_path / "zoo", missing="zero"), rank=1.0).rebuild("a1").save(tmp_path / "out")
    assert {tensor.dtype for tensor in load_file(folder / "adapter_model.safetensors").values()} == {torch.bfloat16}


def test_very_many_modules_are_refused_before_memory_is_taken(
    zoos: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eigenzoo.zoo.matching.MAX_MODULES", 2)
    with pytest.raises(ez.ZooError, match=r"all adapters together have 3 different modules\. At most 2"):
        ez.open_zoo(zoos[0], missing="zero")
