"""Zoos on docstrings: passages that no two parts share, adapters that transformers and PEFT read, held-out models apart."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertForSequenceClassification, BertModel, PreTrainedTokenizerFast, ViTConfig

import eigenzoo as ez
from eigenzoo.errors import DataError, FormatError, UsageError
from eigenzoo.nursery import accuracy, docstrings, encoder, make, metric
from eigenzoo.nursery.docstrings import COPIED, NUM_WORDS, PARTS, Task
from eigenzoo.nursery.encoder import NUM_TOKENS, TextKind, build_parent, find_encoder, tokens_of
from eigenzoo.nursery.making import choose_children, make_zoo
from eigenzoo.nursery.recipe import Plan, plan_zoo
from once import once
from tolerance import tolerance

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

ONE_PASSAGE = 1 / 500 + 1e-9
WIDTH = 16


def write_encoder(folder: Path) -> Path:
    """A tiny BERT of two layers, and a tokenizer of the commonest words."""
    counts = Counter(word for text in docstrings.load().texts["train"] for word in text.split())
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(word for word, _ in counts.most_common(300))]
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return once(tmp_path_factory, "nursery-encoder", write_encoder)


def hasty_plan(folder: Path | None, num_models: int = 3, num_held_out: int = 2, steps: int = 60) -> Plan:
    plan = plan_zoo(
        "docstrings-lora", num_models, 0, False, False, None, encoder=None if folder is None else str(folder)
    )
    return replace(plan, num_held_out=num_held_out, schedule=replace(plan.schedule, steps=steps))


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    return (
        once(tmp_path_factory, "nursery-docstrings", lambda root: make_zoo(hasty_plan(tiny), root / "zoo", False, None))
        / "zoo"
    )


def test_no_two_parts_have_eight_words_in_a_row_in_common() -> None:
    found = docstrings.load()
    rows: dict[str, set[str]] = {}
    for part, texts in found.texts.items():
        assert Counter(found.groups[part]) == dict.fromkeys(range(10), PARTS[part])
        assert all(len(text.split()) == NUM_WORDS for text in texts)
        rows[part] = {
            " ".join(words[start : start + COPIED])
            for words in (text.lower().split() for text in texts)
            for start in range(NUM_WORDS - COPIED + 1)
        }
    parts = list(rows)
    for number, part in enumerate(parts):
        for other in parts[number + 1 :]:
            assert rows[part].isdisjoint(rows[other]), (part, other)


def test_a_library_with_too_few_docstrings_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "asyncio").mkdir()
    (tmp_path / "asyncio" / "__init__.py").write_text(f'"""{" ".join(f"word{number}" for number in range(40))}"""\n')
    monkeypatch.setattr(docstrings, "_library", lambda: tmp_path)
    with pytest.raises(DataError, match=r"too few passages about concurrency: 3 of 200 for train"):
        docstrings.load.__wrapped__()


def test_tasks_are_read_as_written() -> None:
    every = docstrings.tasks()
    assert len({task.name for task in every}) == 126
    for task in (every[0], replace(every[77], held_out=True)):
        assert Task.parse(str(task)) == task
    for text in ("docstrings:0,1,2,3", "docstrings:1,2,3,4,5", "docstrings:0,1,2,3,4;else", "5-against-5:0,1,2,3,4"):
        with pytest.raises(UsageError, match=r"(is|are) not a task"):
            Task.parse(text)


def test_the_zoo_holds_fitted_models_and_others_apart(zoo: Path) -> None:
    recipe = json.loads((zoo / "zoo.json").read_text())
    fitted = {name for name in recipe["models"] if "/" not in name}
    assert (len(fitted), len(recipe["models"])) == (3, 5)
    assert set(ez.open_zoo(zoo).names) == fitted
    others = ez.open_zoo(zoo / "_heldout").names
    assert {f"_heldout/{name}" for name in others} == recipe["models"].keys() - fitted
    assert not set(others) & fitted
    for name, facts in recipe["models"].items():
        with safe_open(zoo / name / "adapter_model.safetensors", framework="pt") as file:
            assert file.metadata()["task"] == facts["task"]
            shapes = {tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        assert shapes == {(8, WIDTH), (WIDTH, 8)}
        assert facts["task"].endswith(";held-out") == name.startswith("_heldout/")
        base = json.loads((zoo / name / "adapter_config.json").read_text())["base_model_name_or_path"]
        assert (zoo / name / base).resolve() == (zoo / "_base").resolve()
    written = docstrings.read_passages(zoo / "_base" / "passages.json")
    assert written == docstrings.load()


def test_models_are_measured_from_disk_as_in_training_and_after_rebuilding(zoo: Path, tmp_path: Path) -> None:
    recipe, measure = json.loads((zoo / "zoo.json").read_text()), metric(zoo)
    for name, facts in recipe["models"].items():
        assert accuracy(zoo / name) == pytest.approx(facts["test_accuracy"], abs=ONE_PASSAGE)
    assert accuracy(zoo / "_base", task="docstrings:0,1,2,3,4") < 0.7
    space = ez.fit(zoo, rank=2)
    name = space.names[0]
    rebuilt = space.rebuild(name).save(tmp_path / "away")
    assert measure(rebuilt) == pytest.approx(recipe["models"][name]["test_accuracy"], abs=ONE_PASSAGE)


def test_the_loop_computes_what_peft_and_transformers_do(tiny: Path, zoo: Path, tmp_path: Path) -> None:
    plan = hasty_plan(tiny)
    parent, tokenizer = build_parent(tiny)
    passages = docstrings.load()
    few = docstrings.Passages({part: texts[:20] for part, texts in passages.texts.items()}, passages.groups)
    data = encoder.prepare(parent, tokenizer, few, plan.seed)
    kind = TextKind(plan, parent)
    draw = torch.Generator().manual_seed(1)
    weights = {name: torch.randn(values.shape, generator=draw) * 0.3 for name, values in kind.start(1).items()}
    found = kind.forward(weights, data.features["test"])
    kind.save(weights, tmp_path, "adapter")
    plain = BertForSequenceClassification.from_pretrained(zoo / "_base").eval()
    tokens = tokens_of(tokenizer, few.texts["test"])
    assert tokens.shape == (20, NUM_TOKENS)
    plain.classifier.load_state_dict(parent.classifier.state_dict())
    before = plain(input_ids=tokens).logits
    answer = PeftModel.from_pretrained(plain, str(tmp_path / "adapter")).eval()(input_ids=tokens).logits
    # The tiny encoder's features hardly differ, so that its head has large weights.
    scale = float(answer.abs().max())
    torch.testing.assert_close(found, answer, rtol=0, atol=scale * tolerance(WIDTH, dtype=torch.float32))
    assert (answer - before).abs().max() > 0.01 * scale


def test_larger_zoos_hold_the_models_of_smaller_ones_and_the_same_are_held_out() -> None:
    small, large = (choose_children(plan_zoo("docstrings-lora", num, 3, False, False, None)) for num in (5, 114))
    assert large[:5] == small[:5]
    assert large[114:] == small[5:]
    assert len({child.task.name for child in large}) == 126
    with pytest.raises(UsageError, match=r"115 models are not possible.*12 are held out.*1 to 114"):
        plan_zoo("docstrings-lora", 115, 0, False, False, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"random_labels": True}, r"no such option: random_labels"),
        ({"same_task": True}, r"no such option: same_task"),
        ({"permuted": True}, r"no such option: permuted"),
        ({"train_head": True}, r"no such option: train_head.*LoRA weights alone"),
    ],
)
def test_options_of_other_kinds_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make("docstrings-lora", tmp_path / "zoo", **options)
    with pytest.raises(UsageError, match="no such option: encoder"):
        make("digits-lora", tmp_path / "zoo", encoder=tmp_path)


def test_without_the_package_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[..., tuple[int, str, str]]
) -> None:
    monkeypatch.setattr(encoder, "PACKAGE", "no_such_encoder")
    code, _, err = call("nursery", "make", "docstrings-lora", "-o", tmp_path / "zoo")
    assert (code, "not installed: no_such_encoder" in err, "'.[text]'" in err) == (2, True, True), err
    assert not (tmp_path / "zoo").exists()


def test_a_folder_that_is_no_such_encoder_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"not a folder with a config\.json"):
        build_parent(tmp_path)
    ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="the encoder is a 'vit'"):
        build_parent(tmp_path)


@pytest.mark.parametrize(
    "document", [{}, {part: {} for part in PARTS}, {part: {g: [1] for g in docstrings.GROUPS} for part in PARTS}]
)
def test_passages_that_others_wrote_are_checked(tmp_path: Path, document: dict[str, Any]) -> None:
    (tmp_path / "passages.json").write_text(json.dumps(document))
    with pytest.raises(FormatError, match=r"has not exactly|something else than passages"):
        docstrings.read_passages(tmp_path / "passages.json")


@pytest.mark.slow
@pytest.mark.skipif(find_spec(encoder.PACKAGE) is None, reason="the extra `text` is not installed")
def test_adapters_of_the_packages_encoder_learn(tmp_path: Path) -> None:
    assert find_encoder().is_dir()
    recipe = make_zoo(hasty_plan(None, 2, 1), tmp_path / "zoo", False, None)
    assert recipe.mean_test_accuracy > 0.65
    for name, facts in recipe.models.items():
        assert accuracy(tmp_path / "zoo" / name) == pytest.approx(facts["test_accuracy"], abs=ONE_PASSAGE)
