"""Tiny models of timm and torchvision, in a process of their own: `python vision_models.py make|answers FOLDER`.

torchvision comes without its compiled operators here, and transformers takes one that is half there for a whole one; so
neither library may be imported where the tests run.

    make      writes FOLDER/<zoo>/<model> by the libraries' own means, and FOLDER/<zoo>.answers
    answers   loads what lies in FOLDER/<zoo>/rebuilt-<model>, strictly, and writes FOLDER/<zoo>.rebuilt
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

NUM_MODELS = 3
OPERATORS = ("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",)
LIBRARY = torch.library.Library("torchvision", "DEF")


def import_libraries() -> None:
    """Name the operators that torchvision describes when it is imported; nothing here calls them."""
    for prefix in ("", "q"):
        LIBRARY.define(prefix + OPERATORS[0])
    import timm  # noqa: F401
    import torchvision  # noqa: F401


def make_vit() -> nn.Module:
    import timm

    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5}
    return timm.create_model("vit_tiny_patch16_224", **sizes).eval()


def make_resnet() -> nn.Module:
    import torchvision

    torch.manual_seed(0)
    return torchvision.models.resnet18(num_classes=5).eval()


@torch.no_grad()
def perturbed(make: Callable[[], nn.Module], number: int) -> nn.Module:
    """The parent with noise on every weight, and other running variances."""
    model, draw = make(), torch.Generator().manual_seed(10 + number)
    for parameter in model.parameters():
        size = max(float(parameter.abs().mean()), 0.02)
        parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.3 * size)
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            buffer.mul_(torch.randn(buffer.shape, generator=draw).mul(0.3).exp())
    return model


@torch.no_grad()
def answer(model: nn.Module) -> Tensor:
    size = 16 if type(model).__name__ == "VisionTransformer" else 32
    return model(torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(7)))


def save_hub(model: nn.Module, path: Path) -> None:
    """A folder as timm pushes it to the hub."""
    from timm.models import save_for_hf

    save_for_hf(model, str(path), safe_serialization=True)


def save_training(model: nn.Module, path: Path) -> None:
    """A checkpoint of timm's training script, whose average is the model and whose last weights are others."""
    from timm.utils import CheckpointSaver, ModelEmaV3

    average, last = ModelEmaV3(model), perturbed(make_vit, 99)
    saver = CheckpointSaver(last, torch.optim.AdamW(last.parameters()), model_ema=average)
    saver._save(str(path), epoch=3)


ZOOS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Path], object], str]] = {
    "timm-hub": (make_vit, save_hub, "m{}"),
    "timm-training": (make_vit, save_training, "m{}.pth.tar"),
    "torchvision": (make_resnet, lambda model, path: torch.save(model.state_dict(), path), "m{}.pth"),
}
"""How each zoo's models are made and saved, and what they are called."""


def write_zoos(root: Path) -> None:
    for zoo, (make, save, name) in ZOOS.items():
        (root / zoo).mkdir(parents=True)
        answers = {}
        for number in range(NUM_MODELS):
            model = perturbed(make, number)
            save(model, root / zoo / name.format(number))
            answers[f"m{number}"] = answer(model)
        torch.save(answers, root / f"{zoo}.answers")


def answer_rebuilt(root: Path) -> None:
    from timm.models import load_checkpoint

    for zoo, (make, _, _) in ZOOS.items():
        answers = {}
        for folder in sorted((root / zoo).glob("rebuilt-*")):
            (weights,) = folder.glob("*.safetensors")
            model = make()
            load_checkpoint(model, str(weights), strict=True)
            answers[folder.name.removeprefix("rebuilt-")] = answer(model)
        torch.save(answers, root / f"{zoo}.rebuilt")


if __name__ == "__main__":
    import_libraries()
    {"make": write_zoos, "answers": answer_rebuilt}[sys.argv[1]](Path(sys.argv[2]))
