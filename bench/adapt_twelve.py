"""A new task in a model of twelve layers for a few thousand numbers: bytes and accuracy beside the full checkpoint and a LoRA.

    python -m bench.adapt_twelve [FOLDER] [--steps 200] [--learning-rate 0.03]

Trains the nursery's zoo of digits with a vision transformer of twelve layers in the place of its two (FOLDER, `zoos/vit-12`, keeps
it), fits all models but four at rank 16, and adapts the parent to the tasks of these four. Beside each: its own fine-tune, the
parent, the mean, and the same training in a random basis. About ten minutes on one core, most of them for the zoo.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import ViTConfig, ViTForImageClassification

import eigenzoo as ez
from bench.pages import markdown
from eigenzoo.adapt.trained import LEARNING_RATE
from eigenzoo.display import in_bytes
from eigenzoo.integrations.classification import STEPS, adapt_classifier
from eigenzoo.nursery import vit
from eigenzoo.nursery.making import make_zoo
from eigenzoo.nursery.recipe import PARENT, RECIPE, Schedule, plan_zoo

NUM_LAYERS, HIDDEN = 12, 48
NUM_MODELS, HELD_OUT, RANK = 24, 4, 16


def build(num_labels: int, seed: int) -> Any:
    """What `nursery.vit.build` gives, six times as deep."""
    torch.manual_seed(seed)
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=HIDDEN,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        intermediate_size=2 * HIDDEN,
        num_labels=num_labels,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="eager",
    )
    return ViTForImageClassification(config).eval()


def make(folder: Path) -> dict[str, Any]:
    """Train the zoo unless it is there; returns its recipe."""
    if not (folder / RECIPE).exists():
        plan = plan_zoo("digits-vit", NUM_MODELS, 0, False, False, None)
        # A deeper network is trained more slowly, or its attention collapses.
        deep = replace(plan, pretraining=Schedule(800, 64, 1e-3), schedule=Schedule(128, 32, 5e-4))
        with patch.object(vit, "build", build):
            make_zoo(deep, folder, False, None)
    return dict(json.loads((folder / RECIPE).read_text()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("zoos/vit-12"))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--learning-rate", type=float, default=LEARNING_RATE)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    recipe = make(asked.folder)
    names = sorted(recipe["models"])
    held_out = names[:: len(names) // HELD_OUT][:HELD_OUT]
    rows, found = [], None
    with tempfile.TemporaryDirectory() as scratch:
        zoo = ez.open_zoo([asked.folder / name for name in names if name not in held_out], exclude=["classifier.*"])
        bundle = ez.fit(zoo, RANK).save(Path(scratch) / "bundle")
        for name in held_out:
            task = recipe["models"][name]["task"]
            options: dict[str, Any] = {"steps": asked.steps, "learning_rate": asked.learning_rate}
            parent, file = asked.folder / PARENT, Path(scratch) / f"{name}.safetensors"
            found = adapt_classifier(bundle, task, parent, file, **options)
            zero = adapt_classifier(bundle, task, parent, file.with_suffix(".zero"), start="zero", **options)
            control = adapt_classifier(bundle, task, parent, None, random_basis=True, **options)
            figures = [
                recipe["models"][name]["test_accuracy"],
                zero.accuracy.start,
                found.accuracy.mean,
                found.accuracy.adapted,
                zero.accuracy.adapted,
                control.accuracy.adapted,
            ]
            rows.append((task.partition(":")[2], figures))
    assert found is not None
    columns = ["task", "its own fine-tune", "parent", "mean alone", "adapted", "adapted, start zero", "random basis"]
    average = [statistics.fmean(column) for column in zip(*(figures for _, figures in rows), strict=True)]
    print(
        f"parent, ten classes: {recipe['parent']['ten_class_test_accuracy']:.3f}; {len(zoo)} models fitted, rank {RANK}\n"
    )
    cells = [[task, *(f"{figure:.3f}" for figure in figures)] for task, figures in [*rows, ("average", average)]]
    print("\n".join(markdown(columns, cells)))
    print(
        f"\n{found.num_trained} numbers in a file of {in_bytes(found.file_bytes or 0)}; a LoRA of rank {found.lora_rank} "
        f"{in_bytes(found.lora_bytes)}; the full checkpoint {in_bytes(found.checkpoint_bytes)}"
    )


if __name__ == "__main__":
    main()
