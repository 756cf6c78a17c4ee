"""Serving many models of one base: eigenzoo against the base, a merged model, and PEFT, all of the same function.

    python -m bench.serving                    # a Llama of width 1,024, adapters of rank 16, sides of 64: ten minutes
    python -m bench.serving --write            # … and the table of docs/serve.md

One process. All contenders take turns, and each figure is the median over the turns of its time as a multiple of the base's in the
same turn. The adapters lie in the subspace exactly, so that all compute the same function, which is checked first. A decoding step
computes one token of each row after a prompt; prefill computes prompts without a cache.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import eigenzoo as ez
from bench.machine import describe
from bench.pages import markdown, with_tables
from bench.tables import machine_line
from eigenzoo.serve import Served

PAGE = Path(__file__).parents[1] / "docs" / "serve.md"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, SIDE, VOCABULARY = 16, 64, 4_000
PROMPT, LONG, STEPS = 32, 128, 4
ALL_MODELS = (1, 8, 32, 128, 1_000)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args(arguments)
    machine = describe()
    print(machine_line(machine))
    with tempfile.TemporaryDirectory() as home, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table, notes = measure(asked.width, asked.layers, asked.turns, asked.batches, Path(home))
    heading = ("", *(f"decode, {batch}" for batch in asked.batches), *(f"prefill, {batch}" for batch in asked.batches))
    lines = ["", *markdown(heading, table), "", *notes, "", machine_line(machine), ""]
    print("\n".join(lines))
    if asked.write:
        PAGE.write_text(with_tables(PAGE.read_text(), {"serving": lines}, PAGE))


def measure(
    width: int, layers: int, turns: int, batches: Sequence[int], home: Path
) -> tuple[list[tuple[str, ...]], list[str]]:
    """Return the rows of the table: times of contenders as multiples of the base's, by batch."""
    base = make_base(width, layers)
    paths = write_adapters(base, home)
    space = ez.fit(paths, axes=("outputs", "inputs"), rank={"outputs": SIDE, "inputs": SIDE})
    plain, merged = copy.deepcopy(base), PeftModel.from_pretrained(copy.deepcopy(base), paths[0]).merge_and_unload()
    peft = PeftModel.from_pretrained(copy.deepcopy(base), paths[0], adapter_name="m0").eval()
    for number, path in enumerate(paths[1:], 1):
        peft.load_adapter(path, adapter_name=f"m{number}")
    served = ez.serve.attach(base, space)
    check(plain, peft, served, space)
    known = [space.coefficients(name) for name in space.names]
    for number in range(len(known), max(ALL_MODELS)):
        served.add(f"m{number}", known[number % len(known)])
    rows: dict[str, list[str]] = {}
    for step in (decoding, prefill):
        for batch in batches:
            contenders: dict[str, Callable[[], float]] = {
                "base": lambda step=step, batch=batch: step(plain, batch, {}),
                "merged": lambda step=step, batch=batch: step(merged, batch, {}),
                "PEFT, one adapter": lambda step=step, batch=batch: step(peft, batch, {}),
            }
            for distinct in (1, 8, 32):
                names = [f"m{row % distinct}" for row in range(batch)]
                contenders[f"PEFT, adapter_names, {distinct} models"] = lambda step=step, batch=batch, names=names: (
                    step(peft, batch, {"adapter_names": names})
                )
            for number in ALL_MODELS:
                draw = torch.Generator().manual_seed(number)
                order = torch.randperm(number, generator=draw).tolist()
                names = [f"m{order[row % number]}" for row in range(batch)]
                contenders[f"eigenzoo, {number:,} models"] = lambda step=step, batch=batch, names=names: routed(
                    served, names, step, batch
                )
            times: dict[str, list[float]] = {name: [] for name in contenders}
            for turn in range(turns + 1):
                for name, run in contenders.items():
                    seconds = run()
                    if turn:  # the first one warms up
                        times[name].append(seconds)
            for name in contenders:
                ratio = statistics.median(a / b for a, b in zip(times[name], times["base"], strict=True))
                shown = f"{ratio:.2f}" if name != "base" else f"{1e3 * statistics.median(times['base']):.0f} ms"
                if name.startswith("PEFT, adapter_names") and int(name.split()[2]) > batch:
                    shown = "–"
                rows.setdefault(name, []).append(shown)
            print(step.__name__, batch, {name: cells[-1] for name, cells in rows.items()}, file=sys.stderr)
    memory = served.memory()
    bound = sum(SIDE * SIDE * 4 for _ in space.layers)
    notes = [
        f"Memory of {memory['models']:,} models: basis {memory['basis'] / 1e6:.1f} MB, cores {memory['cores'] / 1e6:.1f} MB, "
        f"{memory['per_model'] / 1e3:.0f} kB for each model ({memory['per_model'] / bound:.2f} · Σk²·4), as LoRA "
        f"{memory['lora'] / 1e3:.0f} kB; cores take less from {memory['pays_from']} models on."
    ]
    return [(name, *cells) for name, cells in rows.items()], notes


def make_base(width: int, layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=11 * width // 4,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        max_position_embeddings=4096,
    )
    return LlamaForCausalLM(config).eval()


def write_adapters(base: LlamaForCausalLM, home: Path) -> list[Path]:
    """Thirty-two adapters whose factors lie in sides of `SIDE` directions, saved by PEFT."""
    draw = torch.Generator().manual_seed(0)
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS))
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    shared = [
        (
            torch.randn(SIDE, layer.in_features, generator=draw) / layer.in_features**0.5,
            torch.randn(layer.out_features, SIDE, generator=draw) / layer.out_features**0.5,
        )
        for layer in layers
    ]
    paths = []
    for number in range(32):
        for layer, (right, left) in zip(layers, shared, strict=True):
            layer.lora_A["default"].weight.copy_(torch.randn(RANK, SIDE, generator=draw) @ right)
            layer.lora_B["default"].weight.copy_(left @ torch.randn(SIDE, RANK, generator=draw) / 8)
        paths.append(home / f"m{number}")
        model.save_pretrained(paths[-1])
    return paths


def check(plain: LlamaForCausalLM, peft: PeftModel, served: Served, space: ez.Subspace) -> None:
    """Raise unless eigenzoo and PEFT compute the same function, which is not the base's."""
    ids, names = tokens(4, PROMPT), ["m3", "m0", "m31", "m3"]
    found, expected = served_logits(served, names, ids), peft(ids, adapter_names=names).logits
    error = float((found - expected).abs().max() / expected.abs().max())
    change = float((expected - plain(ids).logits).abs().max() / expected.abs().max())
    print(f"largest difference of logits from PEFT's {error:.1e}, from the base's {change:.1e}", file=sys.stderr)
    if error > 1e-4 or change < 1e-2:
        raise RuntimeError("the contenders do not compute the same function")


def served_logits(served: Served, names: Sequence[str], ids: Tensor) -> Tensor:
    with served.route(names):
        logits: Tensor = served.model(ids).logits
    return logits


def tokens(batch: int, length: int) -> Tensor:
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))


def decoding(model: Any, batch: int, options: dict[str, Any]) -> float:
    """Return the seconds of a step."""
    cache = DynamicCache(config=model.config)
    model(tokens(batch, PROMPT), past_key_values=cache, use_cache=True, **options)
    ids = tokens(batch, 1)
    started = time.perf_counter()
    for _ in range(STEPS):
        model(ids, past_key_values=cache, use_cache=True, **options)
    return (time.perf_counter() - started) / STEPS


def prefill(model: Any, batch: int, options: dict[str, Any]) -> float:
    """Return the seconds of prompts."""
    ids = tokens(batch, LONG)
    started = time.perf_counter()
    model(ids, use_cache=False, logits_to_keep=1, **options)
    return time.perf_counter() - started


def routed(served: Served, names: Sequence[str], step: Callable[..., float], batch: int) -> float:
    with served.route(names):
        return step(served.model, batch, {})


if __name__ == "__main__":
    main()
