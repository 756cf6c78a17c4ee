"""A zoo of adapters of a tiny language model with a tokenizer, built once for all workers."""

from __future__ import annotations

from pathlib import Path

import pytest
from served_zoos import Zoo, write_adapters
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import eigenzoo as ez
from once import once
from real_models import VOCABULARY, make

collect_ignore = ["llama_cpp_client.py", "vllm_checks.py"]  # they run in the engines' environment

CHAT = "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} {% endfor %}"


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    def build(folder: Path) -> None:
        make("llama").save_pretrained(folder / "base")
        words = {"[UNK]": 0, "user": 1, **{f"w{number}": number for number in range(2, VOCABULARY)}}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")
        fast.chat_template = CHAT
        fast.save_pretrained(folder / "base")
        settings = [{"r": 2 + seed % 3, "lora_alpha": 4} for seed in range(20)]
        paths = write_adapters("llama", folder / "adapters", settings)
        ez.fit(paths, axes=("outputs", "inputs"), rank={"outputs": 16, "inputs": 16}).save(folder / "bundle")

    folder = once(tmp_path_factory, "served-zoo", build)
    return Zoo(folder / "base", folder / "bundle")
