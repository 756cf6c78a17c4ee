"""What training in a bundle's basis costs beside LoRA: memory and time of a step, both in one run.

    python -m bench.adapt_cost [--hidden 512] [--layers 4] [--tokens 512] [--rank 16] [--dtype float32]

A Llama from a config and a zoo of random LoRA adapters on all its linear layers: nothing is downloaded. Every method takes the same
batch, one after the other in each round, and its time is compared with LoRA's of the same round: `time` is the median of the
ratios. Memory is the largest sum of the bytes of all tensors that are held at one time: weights, bases, activations kept for the
backward pass, gradients and the optimiser's state. It is counted, not sampled, and so the same in every run.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

import eigenzoo as ez
from eigenzoo.integrations.peft_tuner import EigenzooConfig

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NUM_MODELS = 8


class Held(TorchDispatchMode):
    """Counts the bytes of all storages that operations make, for as long as somebody holds them."""

    def __init__(self, before: int) -> None:
        super().__init__()
        self.now = self.most = before
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._take(value.untyped_storage(), new=True)
        return result

    def know(self, tensors: Iterator[Tensor]) -> None:
        """Take tensors that are counted already."""
        for tensor in tensors:
            self._take(tensor.untyped_storage(), new=False)

    def _take(self, storage: torch.UntypedStorage, new: bool) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known[key] = storage.nbytes() if new else 0
        self.now += self._known[key]
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self._known.pop(key, 0)


def fixed(model: nn.Module) -> list[Tensor]:
    """All that a model holds before it is used: parameters, and buffers in no state dict too."""
    return [*model.parameters(), *model.buffers()]


def storage_bytes(tensors: list[Tensor]) -> int:
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def make_base(options: argparse.Namespace) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 11 // 4,
        num_hidden_layers=options.layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).to(getattr(torch, options.dtype))


def make_zoo(root: Path, options: argparse.Namespace) -> list[Path]:
    paths = []
    for seed in range(NUM_MODELS):
        base = make_base(options)
        torch.manual_seed(seed + 1)
        model = get_peft_model(base, lora(options.rank, init_lora_weights=False))
        paths.append(root / f"m{seed}")
        model.save_pretrained(paths[-1])
    return paths


def lora(rank: int, **changes: Any) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS, task_type="CAUSAL_LM", **changes)


def make_configs(root: Path, options: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    paths, rank = make_zoo(root / "zoo", options), options.rank
    sides = {"axes": ["outputs", "inputs"], "rank": rank}
    fits: dict[str, dict[str, Any]] = {
        f"cores {rank} x {rank} (tucker, axes outputs,inputs)": {**sides, "view": "update"},
        "6 shared cores (tucker, axis models)": {
            "view": "update",
            "axes": ["models", "outputs", "inputs"],
            "rank": {"models": 6, "outputs": rank, "inputs": rank},
        },
        "loadings (factors)": {**sides, "view": "factors"},
        f"6 of {NUM_MODELS} adapters (stacked)": {"view": "update", "rank": 6},
    }
    configs: dict[str, Callable[[], Any]] = {f"LoRA r={rank}": lambda: lora(rank)}
    for place, (name, fit) in enumerate(fits.items()):
        bundle = ez.fit(paths, **fit, cache=False).save(root / f"bundle{place}")
        configs[name] = lambda bundle=bundle: EigenzooConfig(bundle=str(bundle), task_type="CAUSAL_LM")
    return configs


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, tokens: Tensor) -> None:
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    tokens = torch.randint(0, 1024, (4, options.tokens // 4), generator=torch.Generator().manual_seed(0))
    rows, running = [], []
    with tempfile.TemporaryDirectory() as folder:
        for name, config in make_configs(Path(folder), options).items():
            model = get_peft_model(make_base(options), config()).train()
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            optimizer = torch.optim.Adam(trained, lr=1e-3)
            held = Held(storage_bytes(fixed(model)))
            held.know(iter(fixed(model)))
            with held:
                for _ in range(2):
                    train_step(model, optimizer, tokens)
            frozen = storage_bytes(fixed(model)) - storage_bytes(fixed(make_base(options)))
            rows.append({"name": name, "trained": sum(map(Tensor.numel, trained)), "frozen": frozen, "peak": held.most})
            running.append((model, optimizer))
    times: list[list[float]] = [[] for _ in rows]
    for round_ in range(options.rounds + 2):
        for place, (model, optimizer) in enumerate(running):
            started = time.perf_counter()
            train_step(model, optimizer, tokens)
            if round_ >= 2:
                times[place].append(time.perf_counter() - started)
    for row, own in zip(rows, times, strict=True):
        row["ms"] = 1e3 * statistics.median(own)
        row["time"] = statistics.median(mine / theirs for mine, theirs in zip(own, times[0], strict=True))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("hidden", 512), ("layers", 4), ("tokens", 512), ("rank", 16), ("rounds", 9), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = measure(options)
    print("| method | trained | adapter, frozen and trained | peak | peak / LoRA | ms a step | time / LoRA |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        print(
            f"| {row['name']} | {row['trained']:,} | {row['frozen'] / 2**20:.2f} MiB | {row['peak'] / 2**20:.1f} MiB "
            f"| {row['peak'] / rows[0]['peak']:.3f} | {row['ms']:.0f} | {row['time']:.3f} |"
        )


if __name__ == "__main__":
    main()
