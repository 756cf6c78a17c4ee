"""The methods of the adaptation bench: what each trains, as parameters of one module that ask for a gradient, and what it saves."""

from __future__ import annotations

import copy
import fnmatch
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, VeraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers import ViTForImageClassification

import eigenzoo as ez
from eigenzoo import adapt
from eigenzoo.integrations.transformers_names import saved_names
from eigenzoo.nursery import lora
from eigenzoo.nursery.cnn import Cnn
from eigenzoo.nursery.recipe import PARENT
from eigenzoo.nursery.vit import save_checkpoint
from eigenzoo.passes.process import quietly

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]
"""All linear layers of the tiny transformer but its head."""

VERA_RANK = 64
START, MEAN = "zero", "mean"


@dataclass(frozen=True)
class Built:
    """A module ready for training, and how its trained numbers become one file in a folder; `save` returns that file."""

    module: nn.Module
    save: Callable[[Path], Path]


@dataclass(frozen=True)
class Method:
    """One row.

    Attributes:
        key: of what is kept of it.
        build: from a seed, of whatever the method draws.
        only_rates: no row, but accuracy by learning rate.
        basis: of rows of coefficients alone: (`learned` or `random`, start, label of its size).
    """

    key: str
    title: str
    build: Callable[[int], Built]
    basis: tuple[str, str, str] | None = None
    only_rates: bool = False


@dataclass(frozen=True)
class Ground:
    """A zoo to adapt in.

    Attributes:
        start: the module that all of its models began as.
        spaces: fitted subspaces by the label of their size.
        head: patterns of the parameters of the head.
        names: see `adapt.attach`.
    """

    name: str
    start: nn.Module
    spaces: Mapping[str, ez.Subspace]
    head: tuple[str, ...]
    names: Mapping[str, str] = field(default_factory=dict)

    @property
    def parent(self) -> str:
        """What the start is called."""
        return "the common start" if self.name == "networks" else "the parent"

    def attached(self, label: str, start: str, **options: Any) -> adapt.Adapted:
        """Return a copy of the start with coefficients."""
        module = copy.deepcopy(self.start)
        return adapt.attach(module, self.spaces[label], start=start, names=self.names, **options)

    def mean(self) -> nn.Module:
        """Return the mean of the fitted models as a module."""
        return adapt.detach(self.attached(next(iter(self.spaces)), MEAN))


def vit_start(zoo: Path) -> nn.Module:
    """Return the parent of a zoo of transformers; vmap would take a fused attention apart."""
    with quietly():
        module: nn.Module = ViTForImageClassification.from_pretrained(zoo / PARENT, attn_implementation="eager")
    return module.eval().requires_grad_(False)


def cnn_start(seed: int) -> nn.Module:
    """Return the initialisation that all networks of one zoo share."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Cnn().eval().requires_grad_(False)


def names_of(module: nn.Module) -> Mapping[str, str]:
    return saved_names(module)


def untrained(ground: Ground) -> dict[str, tuple[str, nn.Module]]:
    """Return what nothing is trained in: titles and modules by key."""
    mean = ground.mean().requires_grad_(False)
    return {"start": (f"{ground.parent}, untrained", ground.start), "mean": ("the mean, untrained", mean)}


def coefficients(
    ground: Ground, label: str, start: str, *, random: bool = False, head: bool = False, scaled: bool = True
) -> Method:
    """Train coefficients in the learned basis of a size, or in a random one; in units of the zoo's spread, or as they are."""
    kind = "random" if random else "learned"

    def build(seed: int) -> Built:
        adapted = ground.attached(label, start, random_basis=random, seed=seed, besides=ground.head if head else ())
        if not scaled:
            for weight in adapted.weights.values():
                weight.trained.scales.fill_(1.0)
        return Built(adapted.module, lambda folder: adapt.save(adapted, folder / "task.safetensors"))

    parts = ["random directions" if random else "coefficients", label]
    parts.append(f"from {'the mean' if start == MEAN else ground.parent}")
    parts += ["and head"] * head + ["unscaled"] * (not scaled)
    key = f"{kind}-{label}-{start}{'-head' * head}{'-unscaled' * (not scaled)}"
    basis = (kind, start, label) if scaled and not head else None
    return Method(key, ", ".join(parts), build, basis, only_rates=not scaled)


def some(
    ground: Ground, key: str, title: str, chosen: Callable[[str, nn.Parameter], bool], *, mean: bool = False
) -> Method:
    """Train some of the module's own parameters and save these."""

    def build(seed: int) -> Built:
        module = ground.mean() if mean else copy.deepcopy(ground.start)
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(chosen(name, parameter))
        return Built(module, partial(_save_trained, module))

    return Method(key, title, build)


def _save_trained(module: nn.Module, folder: Path) -> Path:
    path = folder / "task.safetensors"
    save_file({name: each.detach() for name, each in module.named_parameters() if each.requires_grad}, path)
    return path


def head_only(ground: Ground, *, mean: bool) -> Method:
    """Train the head of the start, or of the mean."""
    where = "the mean" if mean else ground.parent
    return some(
        ground, f"head-{'mean' if mean else 'start'}", f"head only, on {where}", partial(_is_head, ground), mean=mean
    )


def _is_head(ground: Ground, name: str, _: nn.Parameter) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in ground.head)


def biases(ground: Ground, *, mean: bool, head: bool) -> Method:
    """Train what has one dimension: biases and norms (BitFit), with or without the head."""

    def chosen(name: str, parameter: nn.Parameter) -> bool:
        return head if _is_head(ground, name, parameter) else parameter.dim() == 1

    where = "the mean" if mean else ground.parent
    title = f"biases and norms{', and head' if head else ''}, of {where}"
    return some(ground, f"biases-{'mean' if mean else 'start'}{'-head' if head else ''}", title, chosen, mean=mean)


def full(ground: Ground, *, head: bool, mean: bool = False) -> Method:
    """Train all weights, with the head or without it, and save a checkpoint as the zoo's models are saved."""
    inner = some(ground, "full", "", lambda name, each: head or not _is_head(ground, name, each), mean=mean)

    def build(seed: int) -> Built:
        module = inner.build(seed).module
        is_cnn = isinstance(module, Cnn)
        return Built(module, partial(_save_trained, module) if is_cnn else partial(save_checkpoint, module))

    where = "the mean" if mean else ground.parent
    return Method(
        f"full-{'mean' if mean else 'start'}{'-head' if head else ''}", f"full fine-tuning from {where}", build
    )


def peft_adapter(ground: Ground, key: str, title: str, config: Callable[[int], Any]) -> Method:
    """Train an adapter of PEFT's on the parent."""

    def build(seed: int) -> Built:
        with torch.random.fork_rng(devices=[]), quietly():
            torch.manual_seed(seed)
            module = get_peft_model(copy.deepcopy(ground.start), config(seed)).eval()

        def save(folder: Path) -> Path:
            module.save_pretrained(folder, save_embedding_layers=False)
            return folder / "adapter_model.safetensors"

        return Built(module, save)

    return Method(key, title, build)


def lora_usual(ground: Ground) -> Method:
    """LoRA as the zoo of adapters is trained."""
    title = f"LoRA, r = {lora.RANK}, attention"
    targets = list(lora.TARGETS)
    return peft_adapter(
        ground, "lora-4", title, lambda seed: LoraConfig(r=lora.RANK, lora_alpha=lora.ALPHA, target_modules=targets)
    )


def lora_all(ground: Ground) -> Method:
    """LoRA on all linear layers."""
    return peft_adapter(
        ground,
        "lora-8",
        "LoRA, r = 8, all linear layers",
        lambda seed: LoraConfig(r=8, lora_alpha=16, target_modules=LINEAR),
    )


def vera(ground: Ground) -> Method:
    """VeRA on all linear layers; its random factors come from the seed, and are not in the file."""
    return peft_adapter(ground, "vera", f"VeRA, r = {VERA_RANK}, all linear layers", _vera_config)


def _vera_config(seed: int) -> VeraConfig:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Specified to not save vera_A and vera_B")
        return VeraConfig(r=VERA_RANK, target_modules=LINEAR, projection_prng_key=seed, save_projection=False)


def paired(ground: Ground, start: str, labels: Sequence[str]) -> list[Method]:
    """Coefficients of these sizes, each with random directions beside it."""
    return [coefficients(ground, label, start, random=random) for label in labels for random in (False, True)]


def vit_methods(ground: Ground) -> list[Method]:
    """All rows of the zoo of fine-tunes, and what is only looked at by learning rate."""
    sizes = list(ground.spaces)
    some_sizes = sizes[1 : len(sizes) // 2 + 1]
    return [
        head_only(ground, mean=False),
        head_only(ground, mean=True),
        *paired(ground, MEAN, sizes),
        *paired(ground, START, some_sizes),
        *(coefficients(ground, some_sizes[-1], MEAN, random=random, head=True) for random in (False, True)),
        biases(ground, mean=False, head=False),
        lora_usual(ground),
        lora_all(ground),
        vera(ground),
        full(ground, head=False),
        *(
            coefficients(ground, label, MEAN, random=random, scaled=False)
            for label in sizes[1:]
            for random in (False, True)
        ),
    ]


def lora_methods(ground: Ground) -> list[Method]:
    """All rows of the zoo of adapters but those that it has in common with the fine-tunes, whose parent is the same."""
    return paired(ground, MEAN, list(ground.spaces))


def cnn_methods(ground: Ground) -> list[Method]:
    """All rows of the zoo of networks from one start; their heads are layers of the zoo like any other."""
    return [
        head_only(ground, mean=False),
        head_only(ground, mean=True),
        biases(ground, mean=True, head=True),
        *paired(ground, MEAN, list(ground.spaces)),
        full(ground, head=True),
        full(ground, head=True, mean=True),
    ]
