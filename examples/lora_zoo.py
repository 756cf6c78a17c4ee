"""From thirty LoRA adapters to a bundle and back to PEFT: `python examples/lora_zoo.py [FOLDER]`, about a minute.

Replace `zoo` by a folder of your own adapters and `accuracy` by your own metric; the rest stays as it is.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from peft import PeftModel
from transformers import ViTForImageClassification

import eigenzoo as ez
from eigenzoo import nursery
from eigenzoo.nursery import digits


def main(folder: Path) -> None:
    """Train a zoo, test it for a shared subspace, fit it within a budget, evaluate it, and load one rebuilt adapter with PEFT."""
    zoo = folder / "adapters"
    if not zoo.exists():
        nursery.make("digits-lora", zoo, num_models=30)
    paths = sorted(zoo.glob("task-*"))
    fitted, held_out = paths[:24], paths[24:]

    # 1. Evidence: does the subspace also explain held-out adapters?
    adapters = ez.open_zoo(fitted)
    print(ez.evidence(adapters).verdict.text)

    # 2. Plan: compare axes and ranks by error and bytes.
    plan = ez.plan(adapters)
    for row in plan.rows:
        if row.lora_rank <= 8 and row.ratio > 1:
            print(
                f"{'+'.join(row.axes)} at rank {row.rank}: {row.bytes / 1e3:.0f} kB, loses {row.residual:.1%} of the energy"
            )

    # 3. Budget: fit with the best ranks for half the adapters' bytes.
    space = ez.fit(adapters, axes=("outputs", "inputs"), budget=plan.whole_zoo // 2)
    bundle = folder / "bundle"
    if not bundle.exists():
        space.save(bundle)
    print(f"adapters: {plan.whole_zoo / 1e3:.0f} kB, bundle: {space.report['bytes']['whole_bundle'] / 1e3:.0f} kB")

    # 4. Evaluate: measure rebuilt adapters that were not in the fit.
    print(ez.evaluate(space, nursery.metric(zoo), held_out).sentence)

    # 5. Rebuild one of them from its coefficients and load it with PEFT.
    unseen = space.project(held_out[0])
    rebuilt = space.rebuild(unseen).save(Path(tempfile.mkdtemp(dir=folder)) / unseen.name)
    print(f"{unseen.name}: {unseen.residual:.1%} of its energy lies outside the subspace")
    print(f"accuracy with PEFT: the adapter {accuracy(zoo, held_out[0]):.3f}, rebuilt {accuracy(zoo, rebuilt):.3f}")


def accuracy(zoo: Path, adapter: Path) -> float:
    """Accuracy of the base with an adapter on a task's 500 test images."""
    images, labels = digits.load().test_set(digits.Task(tuple(map(int, adapter.name.removeprefix("task-")))))
    model = PeftModel.from_pretrained(ViTForImageClassification.from_pretrained(zoo / "_base"), adapter)
    with torch.no_grad():
        return float((model.eval()(pixel_values=images).logits.argmax(-1) == labels).double().mean())


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo"))
