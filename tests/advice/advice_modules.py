"""Messages about single modules of adapters, and about adapters of mlx-lm: layers and factors that are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from advice_adapters import assert_rebuilt, edit_config
from advice_case import Case
from advice_factors import CONFIG, MLX, SCALE, WEIGHTS, mlx_answers, write_mlx
from advice_factors import assert_rebuilt as assert_answers
from advice_lora_configs import merge_all
from safetensors.torch import load_file, save_file
from tiny_llama import add_adapter, answers, assert_same, checkpoint_answers, make_llama, quiet, save_adapter, write_zoo
from torch import Tensor, nn

import eigenzoo as ez
from builders import read_update
from tolerance import tolerance


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Change the tensors of an adapter."""
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, {"format": "pt"})


def open_cast(dtype: torch.dtype) -> Callable[[Path], object]:
    """Adapters whose factors were cast to a type of eight bits."""

    def provoke(root: Path) -> None:
        write_zoo(root / "zoo")
        shutil.copytree(root / "zoo", root / "originals")
        for path in (root / "zoo").iterdir():
            rewrite(path, lambda tensors: {key: (100 * values).to(dtype) for key, values in tensors.items()})
        ez.open_zoo(root / "zoo")

    return provoke


def save_as_floats(root: Path) -> None:
    """The test divided the codes by their scale and saved them as float32; the rebuilt adapters have the updates of these files."""
    for path in (root / "zoo").iterdir():
        rewrite(path, lambda tensors: {key: values.float() / 100 for key, values in tensors.items()})
    space = ez.fit(ez.open_zoo(root / "zoo"), rank=1.0)
    for name in space.names:
        for module in space.layers:
            expected, original = (read_update(root / place / name, module) for place in ("zoo", "originals"))
            found = space.rebuild(name).layer(module)
            assert (found - expected).abs().max() <= tolerance(
                100, dtype=torch.float32, scale=float(expected.abs().max())
            )
            assert (found - original).norm() <= 0.2 * original.norm()


def open_nested(root: Path) -> None:
    """Names of modules that another adapter has wrapped."""
    for path in write_zoo(root / "zoo", target_modules=["q_proj"]):
        rewrite(path, lambda tensors: {key.replace(".lora_", ".base_layer.lora_"): tensors[key] for key in tensors})
    ez.open_zoo(root / "zoo")


def merge_the_inner_one(root: Path) -> None:
    """The test merged the inner one by PEFT and saved the outer one anew; rebuilt, these answer in PEFT as the saved ones."""
    shutil.rmtree(root / "zoo")
    for seed in range(2):
        inner = add_adapter(make_llama(), 10 + seed).merge_and_unload()
        save_adapter(add_adapter(inner, seed, target_modules=["q_proj"]), root / "zoo" / f"a{seed}")
    assert_rebuilt(root, root / "zoo")


class Convolutions(nn.Module):
    """One convolution in groups and one without."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped, self.plain = nn.Conv2d(4, 6, 3, groups=2), nn.Conv2d(6, 4, 3)


def write_convolutions(root: Path, targets: list[str]) -> None:
    from peft import LoraConfig, get_peft_model

    for seed in range(2):
        torch.manual_seed(seed)
        with quiet():
            peft = get_peft_model(
                Convolutions(), LoraConfig(r=2, lora_alpha=4, target_modules=targets, init_lora_weights=False)
            )
        save_adapter(peft, root / "zoo" / f"a{seed}")


def open_convolutions(root: Path) -> None:
    write_convolutions(root, ["grouped", "plain"])
    ez.open_zoo(root / "zoo")


def leave_the_groups_out(root: Path) -> None:
    """The test left them out; the rebuilt adapters merge in PEFT to the same weights as the originals."""
    from peft import PeftModel

    shutil.rmtree(root / "zoo")
    write_convolutions(root, ["plain"])
    space = ez.fit(ez.open_zoo(root / "zoo"), rank=1.0)

    def merged(path: Path) -> Tensor:
        torch.manual_seed(9)
        with quiet():
            return PeftModel.from_pretrained(Convolutions(), path).merge_and_unload().plain.weight

    for name in space.names:
        found, expected = merged(space.rebuild(name).save(root / "rebuilt" / name)), merged(root / "zoo" / name)
        assert_same(found, expected, base=torch.zeros(()))


def open_magnitudes(root: Path) -> None:
    """DoRA in the file, and a config that does not say so."""
    for path in write_zoo(root / "zoo", use_dora=True):
        edit_config(path, use_dora=False)
    ez.open_zoo(root / "zoo")


def merge_magnitudes(root: Path) -> None:
    """The test merged them by PEFT with the config of their training; the rebuilt checkpoints answer as PEFT does."""
    for path in (root / "zoo").iterdir():
        edit_config(path, use_dora=True)
    merge_all(root, make_llama)


def open_full_mlx(root: Path) -> None:
    """Whole weights of some layers under the name of an adapter: what `mlx_lm.lora --fine-tune-type full` leaves."""
    for seed in range(2):
        draw = torch.Generator().manual_seed(seed)
        folder = root / "zoo" / f"a{seed}"
        folder.mkdir(parents=True)
        name = "model.layers.1.self_attn.q_proj.weight"
        weight = make_llama().state_dict()[name] + torch.randn(16, 16, generator=draw) * 0.3
        save_file({name: weight}, folder / MLX)
        (folder / CONFIG).write_text(json.dumps({"fine_tune_type": "full", "num_layers": 1, "lora_parameters": {}}))
    ez.open_zoo(root / "zoo")


def fuse(root: Path) -> None:
    """The test put the weights into the base model, which is what `mlx_lm.fuse` does; the rebuilt checkpoints answer as these."""
    expected = {}
    for path in sorted((root / "zoo").iterdir()):
        model = make_llama()
        model.load_state_dict(load_file(path / MLX), strict=False)
        expected[path.name] = answers(model)
        model.save_pretrained(root / "fused" / path.name)
    space = ez.fit(ez.open_zoo(root / "fused"), rank=1.0)
    for name, answer in expected.items():
        assert_same(checkpoint_answers(space.rebuild(name).save(root / "rebuilt" / name)), answer)


def open_mlx_by_another_config(root: Path) -> None:
    for path in write_zoo(root / "kept"):
        write_mlx(root / "zoo" / path.name, path)
    shutil.copytree(root / "zoo", root / "written")
    (root / "zoo" / "a0" / CONFIG).write_text('{"num_layers": 2}')
    ez.open_zoo(root / "zoo")


def take_mlx_config(root: Path) -> None:
    """The test took the config that was written with the factors; the rebuilt adapters answer in PEFT as mlx-lm's formula."""
    shutil.copy(root / "written" / "a0" / CONFIG, root / "zoo" / "a0")
    assert_answers(root, root / "zoo", {name: mlx_answers(root / "zoo" / name, SCALE) for name in ("a0", "a1")})


def rebuild_as(root: Path) -> None:
    """A trained head beside the factors: mlx-lm's format has no place for it."""
    write_zoo(root / "zoo", modules_to_save=["lm_head"])
    ez.fit(root / "zoo", rank=1.0).rebuild("a0").save(root / "mlx", format="mlx-lm")


def rebuild_as_it_came(root: Path) -> None:
    """The test left the format out; the rebuilt adapters answer in PEFT as the originals."""
    assert_rebuilt(root, root / "zoo")


CASES = [
    Case(
        "Factors of whole numbers",
        open_cast(torch.int8),
        ("factors have dtypes torch.int8", "ave its factors as float32", "dequantise them first"),
        save_as_floats,
    ),
    Case(
        "Factors of eight-bit floats",
        open_cast(torch.float8_e4m3fn),
        ("a factor has dtype float8", "ave its factors"),
        save_as_floats,
    ),
    Case(
        "An adapter within an adapter",
        open_nested,
        ("the file has an adapter within an adapter", "erge the inner adapter and save the outer one again"),
        merge_the_inner_one,
    ),
    Case(
        "A convolution in groups",
        open_convolutions,
        ("a grouped convolution", "eave such layers out of the LoRA"),
        leave_the_groups_out,
    ),
    Case(
        "DoRA that the config does not name", open_magnitudes, ("is a DoRA magnitude", "erge it into"), merge_magnitudes
    ),
    Case("mlx-lm's whole weights", open_full_mlx, ("fine_tune_type is 'full'", "(mlx_lm.fuse)"), fuse),
    Case(
        "mlx-lm's factors with another config",
        open_mlx_by_another_config,
        ("the config has no lora_parameters", "hat mlx_lm.lora wrote beside"),
        take_mlx_config,
    ),
    Case(
        "A format that cannot hold an adapter",
        rebuild_as,
        ("are not LoRA factors", "ebuild it in its original format"),
        rebuild_as_it_came,
    ),
]
