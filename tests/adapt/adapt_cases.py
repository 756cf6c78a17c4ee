"""What tests of `eigenzoo adapt` share: the command as a process, small models of texts, tables and pictures."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from PIL import Image
from torch import Tensor

import eigenzoo as ez
from eigenzoo import adapt
from eigenzoo.nursery import digits
from guard import HANG

TASK = "5-against-5:0,2,4,6,8"
QUICKLY = ("--steps", "40", "--batch-size", "32")

Call = Callable[..., tuple[int, str, str]]


def process(*words: object) -> subprocess.Popen[str]:
    """The command line as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "eigenzoo.cli.app", *map(str, words)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def done(*words: object) -> str:
    """What a process that ends well prints; on standard error it says nothing."""
    running = process(*words)
    out, err = running.communicate(timeout=HANG)
    assert (running.returncode, err) == (0, ""), err
    return out


def bundle_of(zoo: Path) -> Path:
    return zoo.with_name(f"{zoo.name}-bundle")


def vit(folder: Path) -> Any:
    return transformers.ViTForImageClassification.from_pretrained(folder).eval()


def adapted_logits(zoo: Path, file: Path, start: str = "mean") -> Tensor:
    """What a model with the file's coefficients answers to the test images."""
    from eigenzoo.integrations.transformers_names import saved_names

    model = vit(zoo / "_base")
    adapted = adapt.attach(model, ez.load(bundle_of(zoo)), start=start, names=saved_names(model))
    adapt.load(file, adapted)
    with torch.no_grad():
        return model(digits.load().test_images).logits


WORDS = {
    "good": ["fine", "great", "lovely", "happy"],
    "bad": ["poor", "awful", "sad", "grim"],
    "odd": ["queer", "weird"],
}
FILLING = ["the", "film", "was", "and", "plot"]


def write_text_model(folder: Path, kind: str, seed: int, num_labels: int = 2) -> Path:
    """A tiny classifier of texts with a tokenizer that cuts at white space."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = ["[PAD]", "[UNK]", *FILLING, *(word for group in WORDS.values() for word in group)]
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    sizes: dict[str, Any] = {
        "vocab_size": len(words),
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 12,
        "num_labels": num_labels,
    }
    name = "Bert" if kind == "bert" else "Llama"
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**sizes)
    model = getattr(transformers, f"{name}ForSequenceClassification")(config)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))
    model.save_pretrained(folder)
    padding = {"pad_token": "[PAD]"} if kind == "bert" else {"eos_token": "[PAD]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", **padding).save_pretrained(
        folder
    )
    return folder


def rows(num_rows: int = 120, classes: tuple[str, ...] = ("good", "bad")) -> list[dict[str, str]]:
    draw = random.Random(0)
    found = []
    for number in range(num_rows):
        label = classes[number % len(classes)]
        # At both ends: BERT answers at the first token, Llama at the last.
        words = [draw.choice(WORDS[label]), *draw.sample(FILLING, 3), draw.choice(WORDS[label])]
        found.append({"text": " ".join(words), "label": label})
    return found


def write_table(path: Path, table: list[dict[str, Any]]) -> Path:
    if path.suffix == ".csv":
        lines = [",".join(table[0]), *(",".join(map(str, row.values())) for row in table)]
        path.write_text("\n".join(lines) + "\n")
    elif path.suffix == ".json":
        path.write_text(json.dumps(table))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in table))
    else:
        datasets.Dataset.from_list(table).to_parquet(path)
    return path


def text_words(zoo: Path, data: Path, output: Path) -> tuple[object, ...]:
    head = "classifier.*" if zoo.name == "bert" else "score.*"
    model = zoo / "m0"
    training = ("--steps", "120", "--batch-size", "16", "--learning-rate", "0.05")
    return ("adapt", bundle_of(zoo), data, "--model", model, "--besides", head, *training, "-o", output, "--json")


def write_images(root: Path, num_images: int = 16) -> Path:
    """Bright squares on the left or on the right."""
    draw = torch.Generator().manual_seed(0)
    for label in ("left", "right"):
        (root / label).mkdir(parents=True)
        for number in range(num_images):
            pixels = torch.randint(0, 80, (8, 8), generator=draw, dtype=torch.uint8)
            pixels[:, slice(0, 4) if label == "left" else slice(4, 8)] += 150
            Image.fromarray(pixels.numpy(), "L" if number else None).save(root / label / f"{number:02}.png")
    return root
