"""Families × names × tasks: verify's exit code is what the real PEFT does with the real file, and its advice is right."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

pytest.importorskip("peft")
pytest.importorskip("transformers")

import transformers
from families import FAMILIES, answer, key_change, loaded_by, make, renamed, train
from followed import advice_in, renaming
from peft import LoraConfig
from verify_cases import quietly

from eigenzoo.integrations.peft_loading import CLASSES
from once import once
from tolerance import tolerance

Run = Callable[..., tuple[int, str, str]]

PRODUCTS = 24
"""Terms of the longest sum: the same operations run in both, and only merged experts may be summed in another order."""


@dataclass(frozen=True)
class Case:
    """A base, a sound adapter of it, and what the model answered before and with it."""

    family: str
    base: Path
    adapter: Path
    before: Tensor
    wanted: Tensor

    def is_wanted(self, kind: str, adapter: Path) -> bool:
        """Whether the base of this class with this adapter answers as the model that was trained."""
        try:
            found = answer(self.family, loaded_by(kind, self.base, adapter))
        # Whatever these libraries raise, nothing was loaded.
        except (ValueError, RuntimeError, KeyError, AttributeError, TypeError):
            return False
        size = float(self.wanted.abs().max())
        alike = found.shape == self.wanted.shape
        return alike and float((found - self.wanted).abs().max()) <= tolerance(
            PRODUCTS, dtype=torch.float32, scale=size
        )


Cases = Callable[..., Case]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Cases:
    """Of a family, a task and the class that was trained (of the base, where none is named)."""

    def get(family: str, task: str | None = None, kind: str | None = None) -> Case:
        base = once(tmp_path_factory, f"base of {family}", lambda folder: quietly(make(family).save_pretrained, folder))

        def write(folder: Path) -> None:
            own = type(make(family)).__name__
            torch.manual_seed(1)
            model = quietly(getattr(transformers, kind or own).from_pretrained, base).eval()
            before = answer(family, model)
            tuned = train(model, FAMILIES[family].targets, task)
            save_file({"before": before, "wanted": answer(family, tuned)}, folder / "answers.safetensors")
            quietly(tuned.save_pretrained, folder, save_embedding_layers=False)

        adapter = once(tmp_path_factory, f"adapter of {family} {task} {kind}", write)
        answers = load_file(adapter / "answers.safetensors")
        return Case(family, base, adapter, answers["before"], answers["wanted"])

    return get


def check(case: Case, adapter: Path, task: str | None, call: Run) -> tuple[int, dict[str, Any]]:
    """Compare verify's exit code with whether any class that a config names answers as it should; gives the document too."""
    assert float((case.wanted - case.before).abs().max()) > 1e-3
    code, out, _ = call("verify", adapter, "--against", case.base, "--json")
    document = json.loads(out)
    loading = next(entry for entry in document["checks"] if entry["name"] == "loading")
    assert loading["done"], document["notes"]
    named = re.search(r"loading into (\w+),", loading["detail"])
    assert named
    if code == 0:
        assert case.is_wanted(named[1], adapter), "verify says that it takes effect"
        assert document["ok"] is True
    else:
        kinds = [type(make(case.family)).__name__, named[1], *([CLASSES[task]] if task else [])]
        for kind in dict.fromkeys(kinds):
            assert not case.is_wanted(kind, adapter), (kind, document["faults"])
        assert document["ok"] is False
    return code, document


SEEING = ("qwen2.5-vl", "qwen2-vl", "llava", "gemma3")
NAMES = ("PEFT's", "compiled outside", "compiled inside", "of a part", "of DataParallel", "without PEFT's prefix")
NAMES += ("with it twice", "of a state dict", "compiled, without PEFT's prefix")
OLDER = ("before 4.52", "of the text model")
ALL = [(family, names) for family in FAMILIES for names in (*NAMES, *(OLDER if family in SEEING else ()))]
FEW = {(family, "PEFT's") for family in FAMILIES} | {(family, "before 4.52") for family in ("qwen2.5-vl", "llava")}
FEW |= {("qwen2.5-vl", "compiled outside"), ("qwen2-vl", "of a part"), ("gpt2", "of a state dict")}


@pytest.mark.parametrize(
    ("family", "names"), [cell if cell in FEW else pytest.param(*cell, marks=pytest.mark.slow) for cell in ALL]
)
def test_names(family: str, names: str, case: Cases, call: Run, tmp_path: Path) -> None:
    made = case(family)
    adapter = renamed(made.adapter, tmp_path / "adapter", key_change(family, names))
    code, document = check(made, adapter, None, call)
    assert code == 0 or names != "PEFT's"
    if code == 0:
        return
    advice = advice_in(document["faults"])
    assert advice, document["faults"]
    followed = renamed(adapter, tmp_path / "followed", renaming(advice))
    assert check(made, followed, None, call)[0] == 0, advice


TASKS = (None, *CLASSES)
FEW_TASKS = {("qwen2.5-vl", "CAUSAL_LM"), ("llava", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM"), ("bert-cls", "SEQ_CLS")}


@pytest.mark.parametrize(
    ("family", "task"),
    [
        (family, task) if (family, task) in FEW_TASKS else pytest.param(family, task, marks=pytest.mark.slow)
        for family in FAMILIES
        for task in CLASSES
        # PEFT makes no such adapter of a model that generates no text.
        if task not in ("CAUSAL_LM", "SEQ_2_SEQ_LM") or family not in ("bert", "bert-cls", "vit")
    ],
)
def test_tasks_of_adapters_of_the_base_itself(family: str, task: str, case: Cases, call: Run) -> None:
    """Whatever task a trainer writes into the config, the base is the class that was trained."""
    made = case(family, task)
    assert check(made, made.adapter, task, call)[0] == 0


OWN = [
    ("bert", "SEQ_CLS", "AutoModelForSequenceClassification"),
    ("bert", "FEATURE_EXTRACTION", "AutoModel"),
    ("bert", "TOKEN_CLS", "AutoModelForTokenClassification"),
    ("bert", "QUESTION_ANS", "AutoModelForQuestionAnswering"),
    ("bert", None, "AutoModel"),
    ("llama", "SEQ_CLS", "AutoModelForSequenceClassification"),
    ("llama", "FEATURE_EXTRACTION", "AutoModel"),
    ("llama", None, "AutoModel"),
    ("gpt2", "TOKEN_CLS", "AutoModelForTokenClassification"),
    ("qwen2.5-vl", None, "AutoModel"),
    ("qwen2.5-vl", "FEATURE_EXTRACTION", "AutoModel"),
]


@pytest.mark.parametrize(
    ("family", "task", "kind"), [*OWN[:2], *(pytest.param(*cell, marks=pytest.mark.slow) for cell in OWN[2:])]
)
def test_tasks_of_adapters_of_another_class(family: str, task: str | None, kind: str, case: Cases, call: Run) -> None:
    """A head or a body that was trained on the base's weights: by the class that the adapter's config names."""
    made = case(family, task, kind)
    code, document = check(made, made.adapter, task, call)
    assert code == 0
    own = type(make(family)).__name__
    if not made.is_wanted(own, made.adapter):
        assert any(note.startswith(f"{own}: PEFT drops tensors") for note in document["notes"])


BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"target_modules": ["k_proj"]}, "Set target_modules to"),
    ({"target_modules": ["q_proj"]}, "Set target_modules to"),
    ({"exclude_modules": ["q_proj"]}, "Set target_modules to"),
    ({"layers_to_transform": [0]}, "Set target_modules to"),
    ({"target_modules": r".*\.layers\.0\..*"}, "Set target_modules to"),
]


@pytest.mark.parametrize(
    ("config", "words"), [*BROKEN[:2], *(pytest.param(*case, marks=pytest.mark.slow) for case in BROKEN[2:])]
)
def test_advice_on_the_config_is_right(
    config: dict[str, Any], words: str, case: Cases, call: Run, tmp_path: Path
) -> None:
    made = case("llama")
    adapter = renamed(made.adapter, tmp_path / "adapter", str, **config)
    code, document = check(made, adapter, None, call)
    advice = advice_in(document["faults"])
    assert code == 1
    assert advice.startswith(words)
    entries = dict.fromkeys(re.findall(r"(\w+) to null", advice))
    targets = json.loads(re.search(r"target_modules to (\[.*?\])", advice)[1].replace("'", '"'))
    followed = renamed(adapter, tmp_path / "followed", str, target_modules=targets, **entries)
    assert check(made, followed, None, call)[0] == 0


EXPERTS = {"mixtral": ("w1", "w2", "w3"), "qwen3-moe": ("gate_proj", "up_proj", "down_proj")}


@pytest.mark.parametrize("part", [1.0, 0.5])
@pytest.mark.parametrize("family", [pytest.param(family, marks=pytest.mark.slow) for family in EXPERTS])
def test_experts_by_the_names_of_the_files(family: str, part: float, case: Cases, call: Run, tmp_path: Path) -> None:
    """Newer transformers joins all experts in memory, and PEFT joins the factors of adapters that name each."""
    base = case(family).base
    draw, weights, factors = torch.Generator().manual_seed(4), load_file(base / "model.safetensors"), {}
    names = [name for name in weights if ".experts." in name]
    assert len(names) == 12
    for number, name in enumerate(names):
        outputs, inputs = weights[name].shape
        down, up = (0.3 * torch.randn(shape, generator=draw) for shape in ((4, inputs), (outputs, 4)))
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        if number < part * len(names):
            factors |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
        weights[name] = weights[name] + 2.0 * up @ down
    (tmp_path / "adapter").mkdir()
    save_file(factors, tmp_path / "adapter" / "adapter_model.safetensors", {"format": "pt"})
    config = LoraConfig(r=4, lora_alpha=8, target_modules=list(EXPERTS[family]), base_model_name_or_path=str(base))
    config.save_pretrained(tmp_path / "adapter")
    shutil.copytree(base, tmp_path / "merged")
    save_file(weights, tmp_path / "merged" / "model.safetensors", {"format": "pt"})
    kind = getattr(transformers, type(make(family)).__name__)
    before, wanted = (answer(family, quietly(kind.from_pretrained, path)) for path in (base, tmp_path / "merged"))
    made = Case(family, base, tmp_path / "adapter", before, wanted)
    assert check(made, made.adapter, None, call)[0] == (0 if part == 1.0 else 1)


def test_names_that_peft_converts_by_the_models_own_patterns(
    case: Cases, call: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Classes of transformers before version 5 have patterns for names of older adapters, which PEFT follows."""
    made = case("qwen2.5-vl")
    older = renamed(made.adapter, tmp_path / "older", key_change("qwen2.5-vl", "before 4.52"))
    assert check(made, older, None, call)[0] == 1
    patterns = {r"^visual": "model.visual", r"^model(?!\.(language_model|visual))": "model.language_model"}
    kind = transformers.Qwen2_5_VLForConditionalGeneration
    monkeypatch.setattr(kind, "_checkpoint_conversion_mapping", patterns, raising=False)
    assert check(made, older, None, call)[0] == 0
