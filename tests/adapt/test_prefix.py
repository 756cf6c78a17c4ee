"""Bundles of bare encoders on task models that hold the encoder under a prefix: found without a name where one prefix fits."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, BertModel

import eigenzoo as ez
from builders import seeded
from eigenzoo import adapt
from eigenzoo.integrations import classification
from eigenzoo.integrations.peft_tuner import EigenzooConfig
from eigenzoo.integrations.transformers_names import saved_names
from once import once
from tolerance import tolerance

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated and will be removed in v6:FutureWarning")

NUM_MODELS = 5
FLOAT32 = tolerance(64, dtype=torch.float32)
TOKENS = torch.randint(0, 30, (3, 7), generator=seeded(1))


def config(**changes: Any) -> BertConfig:
    sizes = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertConfig(**{**sizes, "intermediate_size": 24, "max_position_embeddings": 12, **changes})


def encoder() -> BertModel:
    torch.manual_seed(0)
    return BertModel(config()).eval()


def classifier(**changes: Any) -> BertForSequenceClassification:
    torch.manual_seed(1)
    model = BertForSequenceClassification(config(**changes)).eval()
    # So that logits differ by far more than rounding.
    nn.init.normal_(model.classifier.weight, std=2.0)
    return model


def _write_adapters(root: Path) -> None:
    for seed in range(NUM_MODELS):
        model = encoder()
        torch.manual_seed(seed + 1)
        lora = LoraConfig(r=2, lora_alpha=4, target_modules=["query", "dense"], init_lora_weights=False)
        get_peft_model(model, lora).save_pretrained(root / f"m{seed}", save_embedding_layers=False)


def _write_checkpoints(root: Path) -> None:
    for seed in range(NUM_MODELS):
        model, draw = encoder(), seeded(seed + 1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=0.05)
        model.save_pretrained(root / f"m{seed}")


KINDS = {"adapters": _write_adapters, "checkpoints": _write_checkpoints}


@pytest.fixture
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return lambda kind: once(tmp_path_factory, f"encoders-{kind}", KINDS[kind])


def fitted(zoo: Path, tmp_path: Path) -> ez.Subspace:
    return ez.load(ez.fit(zoo, 1.0).save(tmp_path / "bundle"))


def with_the_zoos(zoo: Path, name: str) -> nn.Module:
    """The classifier with what a model of the zoo has for an encoder, put there by other libraries alone."""
    model = classifier()
    if (zoo / name / "adapter_config.json").is_file():
        model.bert.load_state_dict(encoder().state_dict())
        model.bert = PeftModel.from_pretrained(model.bert, str(zoo / name)).merge_and_unload()
    else:
        model.bert.load_state_dict(BertModel.from_pretrained(zoo / name).state_dict())
    return model.eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def on_encoder(kind: str) -> nn.Module:
    """The classifier that a change is put on: adapters need the encoder of their zoo."""
    model = classifier()
    if kind == "adapters":
        model.bert.load_state_dict(encoder().state_dict())
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("named", [False, True])
def test_attach_finds_the_prefix(zoo: Callable[[str], Path], tmp_path: Path, kind: str, named: bool) -> None:
    space, model = fitted(zoo(kind), tmp_path), on_encoder(kind)
    names = saved_names(model) if named else None
    adapted = adapt.attach(model, space, start="m2", names=names)
    assert {path.partition(".")[0] for path, _ in adapted.places.values()} == {"bert"}
    torch.testing.assert_close(logits(model), logits(with_the_zoos(zoo(kind), "m2")), rtol=0, atol=FLOAT32)
    assert torch.equal(logits(adapt.detach(adapted)), logits(model))


@pytest.mark.parametrize("kind", KINDS)
def test_peft_finds_the_prefix(zoo: Callable[[str], Path], tmp_path: Path, kind: str) -> None:
    space = fitted(zoo(kind), tmp_path)
    matrices = ["query", "dense"] if kind == "adapters" else ["query", "key", "value", "dense"]
    config = EigenzooConfig(bundle=space.path, start="m2", target_modules=matrices)
    model = get_peft_model(on_encoder(kind), config)
    assert {name.partition(".")[0] for name in config.modules or ()} == {"bert"}
    expected = with_the_zoos(zoo(kind), "m2")
    merged = {name: values for name, values in model.merge_and_unload().named_parameters() if "dense.weight" in name}
    for name, values in merged.items():
        torch.testing.assert_close(values, expected.get_parameter(name), rtol=0, atol=FLOAT32)
    again = get_peft_model(on_encoder(kind), EigenzooConfig(bundle=space.path, start="m2", target_modules=matrices))
    with torch.no_grad():
        for name, values in again.named_parameters():
            if "coefficients" in name:
                values.add_(0.1)
    again.save_pretrained(tmp_path / "saved")
    loaded = PeftModel.from_pretrained(on_encoder(kind), str(tmp_path / "saved"))
    assert torch.equal(logits(loaded), logits(again))


class Pair(nn.Module):
    """Two encoders of one size, as of questions and of answers."""

    def __init__(self) -> None:
        super().__init__()
        self.question, self.answer = encoder(), encoder()


def test_two_prefixes_that_fit_are_named_and_one_is_chosen(zoo: Callable[[str], Path], tmp_path: Path) -> None:
    space = fitted(zoo("adapters"), tmp_path)
    both = r"not in the m.*: encoder\.layer\.0\..*'answer\.' before each name.*'question\.' before.*prefix='answer\.'"
    with pytest.raises(ez.MismatchError, match=both):
        adapt.attach(Pair(), space)
    with pytest.raises(ez.MismatchError, match=both):
        get_peft_model(Pair(), EigenzooConfig(bundle=space.path))
    adapted = adapt.attach(Pair(), space, prefix="answer.")
    assert all(path.startswith("answer.") for path, _ in adapted.places.values())
    config = EigenzooConfig(bundle=space.path, prefix="question.")
    get_peft_model(Pair(), config)
    assert all(name.startswith("question.") for name in config.modules or ())


def test_where_no_prefix_fits_both_sides_are_named(zoo: Callable[[str], Path], tmp_path: Path) -> None:
    """Of fewer blocks, of another width, and under a prefix that is not there."""
    space = fitted(zoo("adapters"), tmp_path)
    sides = r"'bert\.encoder\.layer\.1\..*' is missing .* nearest name to 'encoder\.layer\.1\..*' is 'bert\.encoder\.layer\.0\."
    short = classifier(num_hidden_layers=1)
    with pytest.raises(ez.MismatchError, match=sides + r".*prefix=.*names="):
        adapt.attach(short, space)
    with pytest.raises(ez.MismatchError, match=sides + ".*prefix=.*exclude_modules"):
        get_peft_model(short, EigenzooConfig(bundle=space.path))
    wide = r"With 'bert\.' before each name, 'bert\.encoder.*' is missing or has another shape"
    with pytest.raises(ez.MismatchError, match=wide):
        adapt.attach(classifier(hidden_size=32), space)
    with pytest.raises(ez.MismatchError, match=r"with 'model\.' before each name"):
        adapt.attach(classifier(), space, prefix="model.")
    assert not [name for name, _ in short.named_parameters() if "parametrizations" in name]


def test_a_prefix_is_cut_too(tmp_path: Path) -> None:
    """A bundle of task models without their heads, on the encoder alone."""
    for seed in range(3):
        model = classifier()
        torch.manual_seed(seed + 1)
        lora = LoraConfig(r=2, target_modules=["query"], init_lora_weights=False)
        get_peft_model(model, lora).save_pretrained(tmp_path / f"zoo/m{seed}", save_embedding_layers=False)
    space = ez.fit(tmp_path / "zoo", 1.0)
    assert all(name.startswith("bert.") for name in space.layers)
    adapted = adapt.attach(encoder(), space, start="m1")
    assert all(path.startswith("encoder.") for path, _ in adapted.places.values())


def test_adapt_and_rebuild_on_the_command_line(
    tmp_path: Path, call: Callable[..., tuple[int, str, str]], zoo: Callable[[str], Path]
) -> None:
    """A bundle of bare encoders, a task model with its head: nothing is named, and the whole task model is written."""
    pytest.importorskip("datasets")
    from adapt_cases import rows, write_table, write_text_model

    task = write_text_model(tmp_path / "task", "bert", 0)
    for number in range(4):
        model = BertForSequenceClassification.from_pretrained(write_text_model(tmp_path / "other", "bert", number))
        model.bert.save_pretrained(tmp_path / f"zoo/m{number}")
    bundle = ez.fit(tmp_path / "zoo", 3).save(tmp_path / "bundle")
    data, file = write_table(tmp_path / "reviews.csv", rows()), tmp_path / "task.safetensors"
    training = ("--steps", "60", "--batch-size", "16", "--besides", "classifier.*")
    code, out, err = call("adapt", bundle, data, "--model", task, *training, "-o", file, "--json")
    assert (code, err) == (0, "")
    adapted = json.loads(out)["accuracy"]["adapted"]
    code, _, err = call("adapt", bundle, data, "--model", task, *training, "-o", file, "--force", "--prefix", "model.")
    assert (code, "with 'model.' before each name" in err) == (2, True), err
    code, _, err = call("rebuild", bundle, file, "--model", task, "-o", tmp_path / "model")
    assert code == 0, err
    reader = BertForSequenceClassification
    model, found = reader.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(found.values()), found
    labelled = classification.read_labelled(data, tmp_path / "model")
    assert classification.accuracy(model.eval(), labelled.test) == pytest.approx(adapted, abs=1 / 24 + 1e-9)


def test_evaluate_takes_adapters_of_task_models(zoo: Callable[[str], Path], tmp_path: Path) -> None:
    """Rebuilt ones are of the task model again."""
    space, heldout = fitted(zoo("adapters"), tmp_path), tmp_path / "heldout" / "task-a"
    shutil.copytree(zoo("adapters") / "m2", heldout)
    keys = load_file(heldout / "adapter_model.safetensors")
    save_file(
        {name.replace("base_model.model.", "base_model.model.bert."): value for name, value in keys.items()},
        heldout / "adapter_model.safetensors",
        {"format": "pt"},
    )

    def first_logit(path: Path) -> float:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            return float(logits(PeftModel.from_pretrained(on_encoder("adapters"), str(path)))[0, 0])

    found = ez.evaluate(space, first_logit, heldout.parent).models["task-a"]
    assert found.original == pytest.approx(float(logits(with_the_zoos(zoo("adapters"), "m2"))[0, 0]), abs=FLOAT32)
    assert found.rebuilt[max(found.rebuilt)] == pytest.approx(found.original, abs=FLOAT32)
    assert found.mean != pytest.approx(found.original, abs=100 * FLOAT32)
    assert found.parent == pytest.approx(float(logits(on_encoder("adapters"))[0, 0]), abs=FLOAT32)


def test_evaluate_takes_task_models(zoo: Callable[[str], Path], tmp_path: Path) -> None:
    """With their heads, which are carried; an added one is rebuilt from the bundle alone."""
    space, heldout = fitted(zoo("checkpoints"), tmp_path), tmp_path / "heldout" / "task-a"
    with_the_zoos(zoo("checkpoints"), "m2").save_pretrained(heldout)

    def first_logit(path: Path) -> float:
        model, found = BertForSequenceClassification.from_pretrained(path, output_loading_info=True)
        assert not any(found.values()), found
        return float(logits(model.eval())[0, 0])

    found = ez.evaluate(space, first_logit, heldout.parent, ranks=[1]).models["task-a"]
    assert found.original == pytest.approx(float(logits(with_the_zoos(zoo("checkpoints"), "m2"))[0, 0]), abs=FLOAT32)
    assert found.rebuilt[max(found.rebuilt)] == pytest.approx(found.original, abs=FLOAT32)
    assert found.mean != pytest.approx(found.original, abs=100 * FLOAT32)
    own = load_file(heldout / "model.safetensors")
    rebuilt = space.rebuild(space.project(heldout)).state_dict()
    assert set(rebuilt) == set(own)
    grown = ez.load(space.add(heldout).save(tmp_path / "grown"))
    shutil.rmtree(heldout.parent)
    assert first_logit(grown.rebuild("task-a").save(tmp_path / "again")) == pytest.approx(found.original, abs=FLOAT32)
