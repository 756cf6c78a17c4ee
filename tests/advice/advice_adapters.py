"""Messages about PEFT's folders: `adapter_config.json`, `adapter_model.safetensors`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from advice_case import Case
from safetensors.torch import load_file, save_file
from tiny_llama import adapter_answers, add_adapter, assert_same, make_llama, save_adapter, write_zoo

import eigenzoo as ez


def edit_config(folder: Path, *removed: str, **changes: object) -> None:
    """Change entries of an adapter's config, or remove them."""
    path = folder / "adapter_config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if key not in removed}))


def assert_rebuilt(root: Path, zoo: Path, **choices: object) -> None:
    """Every adapter of a zoo, rebuilt at full rank, answers in PEFT as before."""
    space = ez.fit(ez.open_zoo(zoo, **choices), rank=1.0)
    assert space.names
    for path in sorted(zoo.iterdir()):
        rebuilt = space.rebuild(path.name).save(root / "rebuilt" / path.name)
        assert_same(adapter_answers(rebuilt), adapter_answers(path))


def open_pickled(root: Path) -> None:
    for path in write_zoo(root / "zoo"):
        torch.save(load_file(path / "adapter_model.safetensors"), path / "adapter_model.bin")
        (path / "adapter_model.safetensors").unlink()
    ez.open_zoo(root / "zoo")


def allow_the_pickle(root: Path) -> None:
    """The test passed `allow_pickle=True`; the rebuilt adapters answer in PEFT as the pickled ones."""
    assert_rebuilt(root, root / "zoo", allow_pickle=True)


def open_without_rank(root: Path) -> None:
    for path in write_zoo(root / "zoo"):
        edit_config(path, "r", "lora_alpha")
    ez.open_zoo(root / "zoo")


def add_the_rank(root: Path) -> None:
    """The test added `r` to the configs; the rebuilt adapters answer as PEFT does with the mended ones."""
    for path in (root / "zoo").iterdir():
        edit_config(path, r=2)
    assert_rebuilt(root, root / "zoo")


def open_wrong_name(root: Path) -> None:
    write_zoo(root / "zoo")
    ez.open_zoo(root / "zoo2")


def take_the_name_that_was_meant(root: Path) -> None:
    """The test opened the name that the message proposes; the rebuilt adapters answer in PEFT as those in it."""
    assert_rebuilt(root, root / "zoo")


def open_without_weights(root: Path) -> None:
    first, second = write_zoo(root / "zoo")
    shutil.move(second / "adapter_model.safetensors", root / "elsewhere")
    ez.open_zoo([first, second])


def get_the_weights(root: Path) -> None:
    """The test put the weights beside the config; the rebuilt adapters answer in PEFT as the originals."""
    shutil.move(root / "elsewhere", root / "zoo" / "a1" / "adapter_model.safetensors")
    assert_rebuilt(root, root / "zoo")


def open_axolotl(root: Path) -> None:
    """As axolotl leaves a run: the config above, weights in the folders of the checkpoints."""
    for seed in range(2):
        run = root / "zoo" / f"run{seed}"
        for step in (9, 20):
            save_adapter(add_adapter(make_llama(), 10 * seed + step), run / f"checkpoint-{step}")
        shutil.copy(run / "checkpoint-9" / "adapter_config.json", run)
    ez.open_zoo(root / "zoo")


def name_the_checkpoints(root: Path) -> None:
    """The test named the last checkpoint of each run; the rebuilt adapters answer in PEFT as these."""
    space = ez.fit(ez.open_zoo([root / "zoo" / f"run{seed}" / "checkpoint-20" for seed in range(2)]), rank=1.0)
    for seed, name in enumerate(space.names):
        rebuilt = space.rebuild(name).save(root / "rebuilt" / f"run{seed}")
        assert_same(adapter_answers(rebuilt), adapter_answers(root / "zoo" / f"run{seed}" / "checkpoint-20"))


def open_other_targets(root: Path) -> None:
    write_zoo(root / "zoo", target_modules=["q_proj", "v_proj"])
    path = root / "zoo" / "a1"
    shutil.rmtree(path)
    save_adapter(add_adapter(make_llama(), 1, target_modules=["q_proj", "up_proj"]), path)
    ez.open_zoo(root / "zoo")


def count_as_zero(root: Path) -> None:
    """The test passed `missing="zero"`; the rebuilt adapters answer in PEFT as the originals, and no module was left out."""
    zoo = ez.open_zoo(root / "zoo", missing="zero")
    assert set(zoo.layers) == {module for model in zoo.models for module in model.updates}
    assert_rebuilt(root, root / "zoo", missing="zero")


def open_disjoint_targets(root: Path) -> None:
    for seed, target in enumerate(("q_proj", "up_proj")):
        save_adapter(add_adapter(make_llama(), seed, target_modules=[target]), root / "zoo" / f"a{seed}")
    ez.open_zoo(root / "zoo")


def skip_disjoint_targets(root: Path) -> None:
    for seed, target in enumerate(("q_proj", "up_proj")):
        save_adapter(add_adapter(make_llama(), seed, target_modules=[target]), root / "zoo" / f"a{seed}")
    ez.open_zoo(root / "zoo", allow_missing=True)


def open_whole_and_update(root: Path) -> None:
    save_adapter(add_adapter(make_llama(), 0, target_modules=["q_proj", "lm_head"]), root / "zoo" / "a0")
    save_adapter(
        add_adapter(make_llama(), 1, target_modules=["q_proj"], modules_to_save=["lm_head"]), root / "zoo" / "a1"
    )
    ez.open_zoo(root / "zoo", missing="zero")


def exclude_the_whole(root: Path) -> None:
    """The test excluded the module; the rebuilt adapters answer in PEFT as the originals."""
    assert_rebuilt(root, root / "zoo", missing="zero", exclude=["lm_head"])


def open_negative_alpha(root: Path) -> None:
    for path in write_zoo(root / "zoo"):
        edit_config(path, lora_alpha=-6)
        shutil.copytree(path, root / "originals" / path.name)
    ez.open_zoo(root / "zoo")


def negate_b(root: Path) -> None:
    """The test negated B and α; the rebuilt adapters answer in PEFT as the originals with their negative α."""
    for path in (root / "zoo").iterdir():
        tensors = load_file(path / "adapter_model.safetensors")
        changed = {key: -value if "lora_B" in key else value for key, value in tensors.items()}
        save_file(changed, path / "adapter_model.safetensors", {"format": "pt"})
        edit_config(path, lora_alpha=6)
    space = ez.fit(root / "zoo", rank=1.0)
    for name in space.names:
        rebuilt = space.rebuild(name).save(root / "rebuilt" / name)
        assert_same(adapter_answers(rebuilt), adapter_answers(root / "originals" / name))


def open_slow_pattern(root: Path) -> None:
    for seed in range(2):
        settings = {"rank_pattern": {r"(.*\.)*q_proj": 3}, "alpha_pattern": {}}
        save_adapter(add_adapter(make_llama(), seed, **settings), root / "zoo" / f"a{seed}")
    ez.open_zoo(root / "zoo")


def name_the_modules(root: Path) -> None:
    """The test named the modules in rank_pattern; the rebuilt adapters answer in PEFT as the originals."""
    for path in (root / "zoo").iterdir():
        edit_config(path, rank_pattern={f"model.layers.{number}.self_attn.q_proj": 3 for number in range(2)})
    assert_rebuilt(root, root / "zoo")


def open_two_in_one_file(root: Path) -> None:
    for path in write_zoo(root / "zoo"):
        file = path / "adapter_model.safetensors"
        tensors = load_file(file)
        both = {
            key.replace(".weight", f".{name}.weight"): tensors[key] * scale
            for key in tensors
            for name, scale in (("first", 1), ("second", 2))
        }
        save_file(both, file, {"format": "pt"})
    ez.open_zoo(root / "zoo")


def save_one_by_one(root: Path) -> None:
    """The test wrote each adapter to a folder of its own; rebuilt, they answer in PEFT as these."""
    for path in list((root / "zoo").iterdir()):
        tensors = load_file(path / "adapter_model.safetensors")
        for name in ("first", "second"):
            copy = root / "single" / f"{path.name}-{name}"
            shutil.copytree(path, copy)
            own = {key.replace(f".{name}.", "."): value for key, value in tensors.items() if f".{name}." in key}
            save_file(own, copy / "adapter_model.safetensors", {"format": "pt"})
    assert_rebuilt(root, root / "single")


def open_factors_of_mixed_ranks(root: Path) -> None:
    for seed in range(2):
        save_adapter(add_adapter(make_llama(), seed, r=2 + seed), root / "zoo" / f"a{seed}")
    ez.open_zoo(root / "zoo", view="factors")


def take_view_update(root: Path) -> None:
    """The test passed `view="update"`; the rebuilt adapters answer in PEFT as the originals."""
    assert_rebuilt(root, root / "zoo", view="update")


CASES = [
    Case(
        "Adapters with other target modules",
        open_other_targets,
        ("has no such layer", "--missing zero (missing='zero')"),
        count_as_zero,
    ),
    Case(
        "Adapters without a module in common",
        open_disjoint_targets,
        ("has no such layer", "--missing zero (missing='zero')"),
        count_as_zero,
    ),
    Case(
        "Adapters without a module in common, with `--allow-missing`",
        skip_disjoint_targets,
        ("no layer is left to analyse", "--missing zero (missing='zero')"),
        count_as_zero,
    ),
    Case(
        "A module that one adapter updates and another trains whole",
        open_whole_and_update,
        ("holds the whole weight of this module", "--exclude 'lm_head'"),
        exclude_the_whole,
    ),
    Case(
        "An adapter's config without its weights",
        open_without_weights,
        ("but no adapter_model.safetensors", "lso download the weights"),
        get_the_weights,
    ),
    Case(
        "The config of a training run above the folders of its checkpoints (axolotl)",
        open_axolotl,
        ("run0/checkpoint-20, which has both; beside it: checkpoint-9",),
        name_the_checkpoints,
    ),
    Case(
        "Adapters of other ranks in view `factors`",
        open_factors_of_mixed_ranks,
        ("view 'update' accepts mixed ranks",),
        take_view_update,
    ),
    Case("A negative α", open_negative_alpha, ("Alpha is not negative", "egate the B factors"), negate_b),
    Case(
        "A pattern that could take minutes to match",
        open_slow_pattern,
        ("repeats a group", "ame the modules one by one in rank_pattern"),
        name_the_modules,
    ),
    Case(
        "Several adapters in one file",
        open_two_in_one_file,
        ("the file has factors of several adapters: first, second", "ave each adapter to its own file"),
        save_one_by_one,
    ),
    Case("A pickled adapter", open_pickled, ("pass --allow-pickle (allow_pickle=True)",), allow_the_pickle),
    Case(
        "An adapter's config without a rank",
        open_without_rank,
        ("has no r", "dd r to adapter_config.json"),
        add_the_rank,
    ),
    Case(
        "A zoo's name that is not there",
        open_wrong_name,
        ("there is no such file or folder",),
        take_the_name_that_was_meant,
    ),
]
