"""Models served in one batch answer as each of them does alone, rebuilt, saved and loaded by the stock library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from served_zoos import answers, inputs, one_at_a_time, write_adapters, write_finetunes

import eigenzoo as ez
from eigenzoo.errors import MismatchError, UnsupportedError, UsageError
from eigenzoo.integrations.transformers_names import saved_names
from eigenzoo.serve import BASE
from real_models import make

TOLERANCE = 1e-5
"""Of logits computed in float32 through a few layers, as a share of the largest."""

SIDES = {"outputs": 8, "inputs": 8}
UPDATES: dict[str, dict[str, Any]] = {
    "tucker": {"axes": ("outputs", "inputs"), "rank": SIDES},
    "outputs": {"axes": ("outputs",), "rank": {"outputs": 8}},
    "inputs": {"axes": ("inputs",), "rank": {"inputs": 8}},
    "low-rank": {"axes": ("outputs", "inputs"), "rank": {"outputs": 12, "inputs": 12}, "core_rank": 3},
    "three axes": {"axes": ("models", "outputs", "inputs"), "rank": {"models": 2, **SIDES}},
    "stacked": {"axes": ("models",), "rank": 2},
}
WEIGHTS: dict[str, dict[str, Any]] = {
    "tucker": {"axes": ("outputs", "inputs"), "rank": SIDES},
    "low-rank": {"axes": ("outputs", "inputs"), "rank": SIDES, "core_rank": 3},
    "three axes": {"axes": ("models", "outputs", "inputs"), "rank": {"models": 2, **SIDES}},
    "flat": {"axes": ("models",), "rank": 2},
}


def check(space: ez.Subspace, kind: str, folder: Path, **options: Any) -> None:
    """A batch of mixed models and the base answers as they do one at a time; the base's rows have the same bits."""
    names = [space.names[0], BASE, space.names[2], space.names[1], space.names[2]]
    model, batch = make(kind), inputs(kind, len(names))
    before = answers(model, batch)
    served = ez.serve.attach(model, space, **options)
    assert torch.equal(answers(model, batch), before)
    with served.route(names):
        found = answers(model, batch)
    expected = one_at_a_time(space, kind, names, batch, folder)
    scale = float(expected.abs().max())
    assert float((found - expected).abs().max()) <= TOLERANCE * scale
    assert float((found - before)[0].abs().max()) > 1e-3 * scale, "the models change nothing"
    assert torch.equal(found[1], before[1])

    order = torch.tensor([3, 0, 4, 2, 1])
    with served.route([names[row] for row in order]):
        permuted = answers(model, {key: values[order] for key, values in batch.items()})
    assert float((permuted - found[order]).abs().max()) <= TOLERANCE * scale
    with served.route([names[0], *reversed(names[1:])]):
        others = answers(model, batch)
    assert torch.equal(others[0], found[0]), "another row's model changed this one"

    assert served.detach() is model
    assert torch.equal(answers(model, batch), before)


@pytest.mark.parametrize("form", UPDATES)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "vit", "resnet"])
def test_adapters(kind: str, form: str, tmp_path: Path) -> None:
    space = ez.fit(write_adapters(kind, tmp_path / "zoo"), **UPDATES[form])
    check(space, kind, tmp_path / "rebuilt", max_cost=50)


@pytest.mark.parametrize("form", WEIGHTS)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "resnet"])
def test_full_weights(kind: str, form: str, tmp_path: Path) -> None:
    """Norms, biases and embeddings differ by row too."""
    space = ez.fit(write_finetunes(kind, tmp_path / "zoo"), **WEIGHTS[form])
    check(space, kind, tmp_path / "rebuilt", max_cost=50)


def test_differences_from_a_base(tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path / "base")
    paths = write_finetunes("llama", tmp_path / "zoo")
    space = ez.fit(ez.open_zoo(paths, base=tmp_path / "base"), axes=("outputs", "inputs"), rank=SIDES)
    assert space.view == "delta"
    check(space, "llama", tmp_path / "rebuilt")


def test_names_in_files_differ_from_those_in_memory(tmp_path: Path) -> None:
    """Transformers 5 renames a ViT's weights when it loads them. Its class token and positions cannot differ by row."""
    paths = write_finetunes("vit", tmp_path / "zoo")
    whole = ez.fit(paths, axes=("outputs", "inputs"), rank=SIDES)
    with pytest.raises(UnsupportedError, match=r"module 'vit.embeddings': a parameter of ViTEmbeddings differs"):
        ez.serve.attach(make("vit"), whole, names=saved_names(make("vit")))
    with pytest.raises(MismatchError, match="or its names for the layers with names="):
        ez.serve.attach(make("vit"), whole)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_precisions(dtype: str, tmp_path: Path) -> None:
    """In half precision two ways to compute the same model differ by its rounding, through as many layers as there are."""
    space = ez.fit(write_adapters("llama", tmp_path / "zoo"), axes=("outputs", "inputs"), rank=SIDES)
    names = [*space.names[:3], BASE]
    model, batch = make("llama").to(getattr(torch, dtype)), inputs("llama", len(names))
    before = answers(model, batch)
    served = ez.serve.attach(model, space)
    with served.route(names):
        found = answers(model, batch)
    exact = one_at_a_time(space, "llama", names, batch, tmp_path / "rebuilt")
    eps = max(torch.finfo(getattr(torch, dtype)).eps, torch.finfo(torch.float32).eps)
    assert float((found - exact).abs().max()) <= 16 * eps * float(exact.abs().max())
    assert torch.equal(found[-1], before[-1])


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "nf4"])
def test_bundles_in_half_precision_and_in_few_bits(dtype: str, tmp_path: Path) -> None:
    """A bundle's rounding is that of its rebuilt models too."""
    options: dict[str, Any] = {"dtype": dtype, "coefficients_dtype": "bfloat16"}
    adapters = ez.fit(write_adapters("llama", tmp_path / "zoo"), **UPDATES["tucker"], **options)
    check(adapters, "llama", tmp_path / "rebuilt")
    weights = ez.fit(write_finetunes("gpt2", tmp_path / "more"), **WEIGHTS["tucker"], **options)
    check(weights, "gpt2", tmp_path / "again")


def test_heads_of_their_own(tmp_path: Path) -> None:
    """Adapters that bring a head: each row has its own. A head of another shape is refused by name."""
    paths = write_adapters("vit", tmp_path / "zoo", modules_to_save=["classifier"])
    space = ez.fit(paths, axes=("outputs", "inputs"), rank=SIDES)
    served = ez.serve.attach(make("vit"), space)
    assert served.memory()["carried"] > 0
    served.detach()
    check(space, "vit", tmp_path / "rebuilt")
    other = make("vit")
    other.classifier = torch.nn.Linear(32, 7)
    with pytest.raises(MismatchError, match=r"classifier\.(weight|bias)'.*the base has no such parameter"):
        ez.serve.attach(other, space)


def test_biases_and_excluded_modules(tmp_path: Path) -> None:
    """Biases that PEFT trained, and updates of modules that the fit left out."""
    paths = write_adapters("gpt2", tmp_path / "zoo", bias="lora_only")
    space = ez.fit(paths, axes=("outputs", "inputs"), rank=SIDES, exclude=["*c_fc"])
    check(space, "gpt2", tmp_path / "rebuilt")


@pytest.mark.filterwarnings("ignore:Adapter 'default'. 4 LoRA tensor.s. have invalid shape")
def test_biases_of_updates(tmp_path: Path) -> None:
    """PEFT warns of each such file that it writes."""
    paths = write_adapters("gpt2", tmp_path / "more", lora_bias=True)
    check(ez.fit(paths, axes=("outputs", "inputs"), rank=SIDES), "gpt2", tmp_path / "again")


def test_flat_and_stacked_are_refused_above_a_cost(tmp_path: Path) -> None:
    space = ez.fit(write_finetunes("llama", tmp_path / "zoo"), axes=("models",), rank=3)
    model = make("llama")
    before = model.state_dict()["model.layers.0.mlp.up_proj.weight"].clone()
    with pytest.raises(UnsupportedError, match=r"more than 2 times the products of the base.*--axes outputs,inputs"):
        ez.serve.attach(model, space, max_cost=2)
    assert torch.equal(model.state_dict()["model.layers.0.mlp.up_proj.weight"], before)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU and a torch build that knows it")
def test_a_gpu_answers_as_the_processor_does(tmp_path: Path) -> None:
    space = ez.fit(write_adapters("llama", tmp_path / "zoo"), axes=("outputs", "inputs"), rank=SIDES)
    names, batch = [*space.names[:3], BASE], inputs("llama", 4)
    found = []
    for device in ("cpu", "cuda"):
        model = make("llama").to(device)
        served = ez.serve.attach(model, space)
        with served.route(names):
            found.append(answers(model, {name: values.to(device) for name, values in batch.items()}).cpu())
    assert float((found[0] - found[1]).abs().max()) <= TOLERANCE * float(found[0].abs().max())


def test_t5_positions_are_refused_by_name(tmp_path: Path) -> None:
    space = ez.fit(write_finetunes("t5", tmp_path / "zoo"), axes=("outputs", "inputs"), rank=SIDES)
    with pytest.raises(UnsupportedError, match=r"relative_attention_bias.*indexed by pairs of positions"):
        ez.serve.attach(make("t5"), space)


def test_parametrizations_are_refused_only_where_models_are_served(tmp_path: Path) -> None:
    space = ez.fit(write_adapters("llama", tmp_path / "zoo"), axes=("outputs", "inputs"), rank=SIDES)
    model = make("llama")
    torch.nn.utils.parametrizations.weight_norm(model.lm_head)
    ez.serve.attach(model, space).detach()
    torch.nn.utils.parametrizations.weight_norm(model.model.layers[1].self_attn.q_proj)
    with pytest.raises(UsageError, match=r"module 'model.layers.1.self_attn.q_proj': has a parametrization"):
        ez.serve.attach(model, space)


def test_a_second_subspace_and_unknown_models_are_refused(tmp_path: Path) -> None:
    space = ez.fit(write_adapters("llama", tmp_path / "zoo"), axes=("outputs", "inputs"), rank=SIDES)
    model = make("llama")
    served = ez.serve.attach(model, space, ["a0", "a2"])
    assert served.names == ("a0", "a2")
    with pytest.raises(UsageError, match="models are attached already"):
        ez.serve.attach(model, space)
    for name in ("a1", "../a0", str(tmp_path)):
        with pytest.raises(UsageError, match="no model is called"), served.route([name]):
            pass
    with pytest.raises(UsageError, match="Did you mean 'a0'"), served.route(["a0 "]):
        pass
    with served.route(["a0"]), pytest.raises(UsageError, match="gets 2 rows, but 1 models are named"):
        model(torch.ones(2, 3, dtype=torch.long))
    served.detach()
    with pytest.raises(UsageError, match="nothing is attached any more"), served.route(["a0"]):
        pass
    with pytest.raises(MismatchError, match="layers are not in the module"):
        ez.serve.attach(torch.nn.Linear(3, 3), space)
