"""New tasks of texts from 32 examples and from all: the zoo's basis beside LoRA, random directions and the head alone.

    eigenzoo nursery make docstrings-lora -o ZOO && python -m bench.text_few_shot ZOO [--steps N] [--tasks N] [--rank K] [--core P]

Subspaces are fitted to the zoo's models. The tasks are those of its held-out models, on passages of docstrings that no fitted model
has seen. Learning rates are chosen on two other tasks that no model has learned. Prints tables as Markdown: averages over tasks
and three seeds, which draw the examples, the batches and all random directions, and paired differences with their standard errors
over tasks. About an hour on one core; each line is kept in ZOO-few-shot.jsonl, so that an interrupted run continues.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoTokenizer, BertForSequenceClassification

import eigenzoo as ez
from bench.adaptation_training import answers, correct, train
from bench.pages import markdown
from eigenzoo import adapt
from eigenzoo.nursery import docstrings
from eigenzoo.nursery.docstrings import Task
from eigenzoo.nursery.encoder import ALPHA, PROJECTIONS, RANK, label, num_lower, run_layer, tokens_of
from eigenzoo.nursery.recipe import PARENT, PASSAGES, RECIPE
from eigenzoo.passes.process import quietly

BATCH, SEEDS, EXAMPLES, NUM_TUNING, AT_ONCE = 16, (0, 1, 2), (32, 1000), 2, 125
LORA_RATES, COEFFICIENT_RATES, HEAD_RATES = (3e-4, 1e-3, 3e-3, 1e-2), (0.03, 0.1, 0.3, 1.0, 3.0), (0.01, 0.1, 1.0, 10.0)

TUNING_DRAW = 99
"""Draws examples and batches of the tasks that choose rates."""

Build = Callable[[int], nn.Module]


class Reader(nn.Module):
    """The upper layers and the head of a BERT classifier, for the features that its other layers have computed."""

    def __init__(self, parent: Any) -> None:
        super().__init__()
        self.bert, self.classifier = parent.bert, parent.classifier
        self.lower = num_lower(parent.config.num_hidden_layers)

    def forward(self, features: Tensor) -> Tensor:
        hidden, upper = features, list(self.bert.encoder.layer)[self.lower :]
        for number, layer in enumerate(upper):
            wanted = hidden[..., :1, :] if number == len(upper) - 1 else hidden

            def project(name: str, given: Tensor, layer: Any = layer) -> Tensor:
                return layer.attention.get_submodule(name)(given)

            hidden = run_layer(layer, hidden, wanted, project)
        return self.classifier(torch.tanh(self.bert.pooler.dense(hidden[..., 0, :])))


class Texts:
    """Features and groups of the passages for held-out tasks."""

    def __init__(self, zoo: Path, parent: Any) -> None:
        tokenizer = AutoTokenizer.from_pretrained(zoo / PARENT)
        passages = docstrings.read_passages(zoo / PARENT / PASSAGES)
        lower = num_lower(parent.config.num_hidden_layers)
        self.features, self.groups = {}, {}
        for part in ("train", "test"):
            name = f"held-out {part}"
            with torch.no_grad():
                tokens = tokens_of(tokenizer, passages.texts[name]).split(AT_ONCE)
                found = [parent.bert(input_ids=each, output_hidden_states=True).hidden_states[lower] for each in tokens]
            self.features[part], self.groups[part] = torch.cat(found), torch.tensor(passages.groups[name])

    def labels(self, tasks: Sequence[Task], part: str) -> Tensor:
        """Return the labels (T, n) of tasks."""
        return torch.stack([label(task, self.groups[part]) for task in tasks])


def methods(zoo: Path, parent: Any, rank: int, core: int) -> dict[str, tuple[tuple[float, ...], Build]]:
    """Return what is trained: the rates that are tried, and a module from a seed, by name."""
    start = Reader(parent).eval().requires_grad_(False)
    spaces = {f"k = {rank}": ez.fit(zoo, rank), f"cores {core} × {core}": ez.fit(zoo, core, axes=("outputs", "inputs"))}

    def head(seed: int) -> nn.Module:
        module = copy.deepcopy(start)
        module.classifier.requires_grad_(True)
        return module

    def lora(seed: int) -> nn.Module:
        layers = range(start.lower, len(start.bert.encoder.layer))
        targets = [f"bert.encoder.layer.{layer}.attention.{name}" for layer in layers for name in PROJECTIONS]
        torch.manual_seed(seed)
        with quietly():
            return get_peft_model(
                copy.deepcopy(start), LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets)
            ).eval()

    def basis(space: ez.Subspace, random: bool) -> Build:
        return lambda seed: adapt.attach(copy.deepcopy(start), space, random_basis=random, seed=seed).module

    found: dict[str, tuple[tuple[float, ...], Build]] = {
        "head only": (HEAD_RATES, head),
        f"LoRA, r = {RANK}": (LORA_RATES, lora),
    }
    for size, space in spaces.items():
        found[f"zoo's basis, {size}"] = COEFFICIENT_RATES, basis(space, False)
        found[f"random basis, {size}"] = COEFFICIENT_RATES, basis(space, True)
    return found


def batches(tasks: Sequence[Task], count: int, steps: int, seed: int) -> Tensor:
    """Draw `count` examples for each task and their batches (T, steps, BATCH); the same for all methods."""
    drawn = []
    for task in tasks:
        generator = torch.Generator().manual_seed(int("".join(map(str, task.groups))) * 1000 + seed)
        had = torch.randperm(1000, generator=generator)[:count]
        epochs = [had[torch.randperm(count, generator=generator)] for _ in range(-(-steps * BATCH // count))]
        drawn.append(torch.cat(epochs)[: steps * BATCH].view(steps, BATCH))
    return torch.stack(drawn)


def measure(
    module: nn.Module, texts: Texts, tasks: Sequence[Task], rates: Sequence[float], orders: Tensor
) -> list[float]:
    """Train every task at its rate; return the accuracies on the test passages."""
    trained = train(module, texts.features["train"], texts.labels(tasks, "train"), rates, orders)
    parts = [answers(module, trained, part) for part in texts.features["test"].split(AT_ONCE)]
    return correct(torch.cat(parts, 1), texts.labels(tasks, "test"))


def run(zoo: Path, steps: int, num_tasks: int, rank: int, core: int) -> dict[tuple[str, int], list[list[float]]]:
    """Return each method's accuracies (seeds, tasks), by method and number of examples."""
    learned = {Task.parse(facts["task"]) for facts in json.loads((zoo / RECIPE).read_text())["models"].values()}
    tasks = sorted((task for task in learned if task.held_out), key=str)[:num_tasks]
    groups = {task.groups for task in learned}
    tuning = [Task(task.groups, held_out=True) for task in docstrings.tasks() if task.groups not in groups][::7][
        :NUM_TUNING
    ]
    with quietly():
        parent = BertForSequenceClassification.from_pretrained(zoo / PARENT, attn_implementation="eager").eval()
    texts, kept = Texts(zoo, parent), zoo.with_name(f"{zoo.name}-few-shot.jsonl")
    done = (
        {json.dumps(key): value for key, value in map(json.loads, kept.read_text().splitlines())}
        if kept.exists()
        else {}
    )

    def measured(
        name: str, build: Build, seed: int, chosen: Sequence[Task], rates: Sequence[float], count: int, draw: int
    ) -> list[float]:
        """Return what was measured before, or measure it."""
        key = json.dumps([name, count, draw, [str(task) for task in chosen], list(rates), steps, rank, core])
        if key not in done:
            orders = batches(chosen, count, steps, draw)
            done[key] = measure(build(seed), texts, chosen, rates, orders)
            with kept.open("a") as file:
                file.write(json.dumps([key, done[key]]) + "\n")
        return done[key]

    found: dict[tuple[str, int], list[list[float]]] = {}
    for name, (rates, build) in methods(zoo, parent, rank, core).items():
        for count in EXAMPLES:
            tried = [rate for rate in rates for _ in tuning]
            right = measured(name, build, 0, tuning * len(rates), tried, count, TUNING_DRAW)
            sums = [sum(right[at : at + len(tuning)]) for at in range(0, len(tried), len(tuning))]
            best = rates[sums.index(max(sums))]
            found[name, count] = [
                measured(name, build, seed, tasks, [best] * len(tasks), count, seed) for seed in SEEDS
            ]
            average = statistics.fmean(map(statistics.fmean, found[name, count]))
            print(f"{name}, {count} examples, rate {best:g}: {average:.3f}", flush=True)
    return found


def tables(found: Mapping[tuple[str, int], list[list[float]]]) -> list[str]:
    """Return averages, and differences of pairs of methods with standard errors over tasks."""
    over_seeds = {key: [statistics.fmean(task) for task in zip(*rows, strict=True)] for key, rows in found.items()}
    names = list(dict.fromkeys(name for name, _ in found))
    head = ["method", *(f"{count} examples" for count in EXAMPLES)]
    lines = markdown(head, [[name, *(_shown(over_seeds[name, count]) for count in EXAMPLES)] for name in names])
    rows = []
    for name in (name for name in names if name.startswith("zoo")):
        for other in (f"LoRA, r = {RANK}", name.replace("zoo's", "random"), "head only"):
            cells = []
            for count in EXAMPLES:
                pairs = zip(over_seeds[name, count], over_seeds[other, count], strict=True)
                cells.append(_shown([one - two for one, two in pairs], "+"))
            rows.append([f"{name} − {other}", *cells])
    return [*lines, "", *markdown(["difference", *head[1:]], rows)]


def _shown(values: Sequence[float], sign: str = "") -> str:
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{statistics.fmean(values):{sign}.3f} ± {error:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("zoo", type=Path)
    for name, default in (("steps", 128), ("tasks", 12), ("rank", 16), ("core", 16)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print("\n".join(tables(run(given.zoo, given.steps, given.tasks, given.rank, given.core))))


if __name__ == "__main__":
    main()
