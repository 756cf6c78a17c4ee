"""Coefficients as a PEFT method, trained by the Trainer: `python examples/peft_trainer.py [FOLDER]`, about a minute.

The zoo holds LoRA adapters of one small transformer; the new adapter is some hundred numbers in the basis that they share. It is
saved, loaded, and exported as a plain LoRA adapter that PEFT, vLLM and others read without eigenzoo.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments, ViTForImageClassification

import eigenzoo as ez
from eigenzoo import nursery
from eigenzoo.integrations.peft_tuner import EigenzooConfig, export_lora
from eigenzoo.nursery import digits


class Images(torch.utils.data.Dataset[dict[str, Any]]):
    """A task's images and labels in the Trainer's format."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, place: int) -> dict[str, Any]:
        return {"pixel_values": self.images[place], "labels": self.labels[place]}


def accuracy(model: torch.nn.Module, task: digits.Task) -> float:
    """Accuracy on the task's 500 test images."""
    images, labels = digits.load().test_set(task)
    with torch.no_grad():
        return float((model.eval()(pixel_values=images).logits.argmax(-1) == labels).double().mean())


def main(folder: Path) -> None:
    """Make the zoo, fit, train, save, load, export."""
    zoo, bundle = folder / "lora-zoo", folder / "lora-bundle"
    if not zoo.exists():
        nursery.make("digits-lora", zoo)
    paths = sorted(zoo.glob("task-*"))
    if not bundle.exists():
        ez.fit(ez.open_zoo(paths[:-6]), {"outputs": 8, "inputs": 8}).save(bundle)
    task = digits.Task(tuple(int(digit) for digit in paths[-1].name.removeprefix("task-")))

    model = get_peft_model(ViTForImageClassification.from_pretrained(zoo / "_base"), EigenzooConfig(bundle=str(bundle)))
    model.print_trainable_parameters()
    # A new folder for each run, because PEFT and the Trainer overwrite files.
    run = Path(tempfile.mkdtemp(prefix="peft-", dir=folder))
    arguments = TrainingArguments(
        str(run / "trainer"), max_steps=300, per_device_train_batch_size=64, learning_rate=ez.adapt.LEARNING_RATE, report_to=[],
        save_strategy="no", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=Images(*digits.load().training_set(task))).train()
    model.save_pretrained(run / "adapter", save_embedding_layers=False)

    base = ViTForImageClassification.from_pretrained(zoo / "_base")
    again = PeftModel.from_pretrained(base, str(run / "adapter"))
    plain = export_lora(again, run / "plain-lora")
    stock = PeftModel.from_pretrained(ViTForImageClassification.from_pretrained(zoo / "_base"), str(plain))
    size = (run / "adapter" / "adapter_model.safetensors").stat().st_size
    print(f"task {task}: the adapter's file has {size:,} bytes")
    found = [f"{accuracy(each, task):.3f}" for each in (model, again, stock)]
    print(f"accuracy: trained {found[0]}, loaded {found[1]}, as a plain LoRA {found[2]}")
    print(f"          the task's own LoRA {nursery.accuracy(paths[-1]):.3f}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "examples-output"))
