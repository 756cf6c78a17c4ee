"""What lies beside a model's weights is carried by its name, or named as left behind; weights among it are a warning."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import eigenzoo as ez
from builders import random_factors, random_stack, write_adapter, write_stacks
from eigenzoo.errors import FormatError, UnsafePathError
from eigenzoo.formats.bundle.manifest import MAX_LEFT
from eigenzoo.formats.opening import open_model
from eigenzoo.formats.paths import MAX_SIDE_BYTES
from eigenzoo.formats.side_files import is_side_file
from eigenzoo.formats.writers import layout_of, write_checkpoint

MODULES = {"q_proj": (6, 5), "v_proj": (4, 5)}


def adapters(root: Path, num_models: int = 3) -> list[Path]:
    return [write_adapter(root / f"t{n}", random_factors(MODULES, 2, seed=n)) for n in range(num_models)]


def put(folder: Path, name: str, data: bytes = b"{}") -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)


# What PEFT, trl, LLaVA, transformers' Trainer, DeepSpeed and repositories of the hub write beside weights.
LEFT = {
    "lora": {
        "non_lora_trainables.bin": "weights",
        "value_head.safetensors": "weights",
        "pytorch_model.bin": "weights",
        "new_embeddings.safetensors": "weights",
        "second/adapter_model.safetensors": "models",
        "checkpoint-10/adapter_model.safetensors": "models",
        "heads/v_head.pt": "weights",
        "adapter_model.bin": "",
        "optimizer.pt": "",
        "scheduler.pt": "",
        "rng_state_0.pth": "",
        "training_args.bin": "",
        "global_step10/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt": "",
        "README.md": "",
        "runs/events.out": "",
    },
    "checkpoint": {
        "mm_projector.bin": "weights",
        "pytorch_model.bin": "",
        "pytorch_model-00001-of-00002.bin": "",
        "pytorch_model.bin.index.json": "",
        "model.fp16.safetensors": "",
        "tf_model.h5": "",
        "flax_model.msgpack": "",
        "consolidated.safetensors": "",
        "onnx/model.onnx": "",
        "original/consolidated.00.pth": "",
        "LICENSE": "",
        "modeling_custom.py": "",
    },
}


@pytest.mark.parametrize("kind", LEFT)
def test_what_is_left_is_sorted_by_what_it_holds(tmp_path: Path, kind: str) -> None:
    folder = adapters(tmp_path)[0] if kind == "lora" else write_stacks(tmp_path, {"w": random_stack(1, (4, 3))})[0]
    if kind == "lora":
        for name in [*LEFT["lora"]]:
            if name.endswith("/adapter_model.safetensors"):
                put(folder, f"{Path(name).parent}/adapter_config.json")
    for name in (*LEFT[kind], ".gitattributes", ".cache/huggingface/x.lock"):
        put(folder, name)
    beside = open_model(folder).beside
    assert set(beside.weights) == {name for name, what in LEFT[kind].items() if what == "weights"}
    assert set(beside.models) == {str(Path(name).parent) for name, what in LEFT[kind].items() if what == "models"}
    tops = {name.partition("/")[0] for name in LEFT[kind]}
    assert {name.partition("/")[0] for name in beside.ignored} == tops


CARRIED = (
    ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json", "chat_template.json"),
    ("chat_template.jinja", "additional_chat_templates/tool_use.jinja", "tokenizer.json", "sentencepiece.bpe.model"),
    ("modules.json", "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"),
    ("config_sentence_transformers.json", "sentence_bert_config.json"),
)


@pytest.mark.parametrize("names", CARRIED)
@pytest.mark.parametrize("kind", ["lora", "checkpoint"])
def test_known_files_come_back_to_the_byte(tmp_path: Path, kind: str, names: tuple[str, ...]) -> None:
    folders = (
        adapters(tmp_path / "zoo") if kind == "lora" else write_stacks(tmp_path / "zoo", {"w": random_stack(3, (4, 3))})
    )
    for number, folder in enumerate(folders):
        for name in names:
            put(folder, name, f"{name} of {number}".encode())
    space = ez.load(ez.fit(tmp_path / "zoo", rank=1).save(tmp_path / "bundle"))
    rebuilt = space.rebuild(space.names[1]).save(tmp_path / "out")
    assert [(rebuilt / name).read_bytes() for name in names] == [f"{name} of 1".encode() for name in names]
    assert space.rebuild(space.names[1]).not_carried == ()


def test_folders_of_modules_are_those_that_sentence_transformers_lists(tmp_path: Path) -> None:
    (folder,) = write_stacks(tmp_path, {"w": random_stack(1, (4, 3))})
    for name in ("1_Pooling/config.json", "1_Pooling/notes.txt", "1_Pooling/inner/config.json", "Pooling/config.json"):
        put(folder, name)
    assert open_model(folder).beside.carried == ()
    put(folder, "modules.json")
    beside = open_model(folder).beside
    assert beside.carried == ("1_Pooling/config.json", "modules.json")
    assert beside.ignored == ("1_Pooling/inner", "1_Pooling/notes.txt", "Pooling")


def test_a_module_too_large_to_carry_is_named(tmp_path: Path) -> None:
    (folder,) = write_stacks(tmp_path, {"w": random_stack(1, (4, 3))})
    put(folder, "modules.json")
    put(folder, "2_Dense/config.json")
    with (folder / "2_Dense" / "model.safetensors").open("wb") as file:
        file.truncate(MAX_SIDE_BYTES + 1)
    assert open_model(folder).beside.weights == ("2_Dense/model.safetensors",)


def test_a_link_in_a_module_s_folder_is_refused_and_a_linked_folder_not_followed(tmp_path: Path) -> None:
    (folder,) = write_stacks(tmp_path / "zoo", {"w": random_stack(1, (4, 3))})
    put(tmp_path, "away/config.json")
    put(folder, "modules.json")
    (folder / "1_Pooling").symlink_to(tmp_path / "away")
    beside = open_model(folder).beside
    assert (beside.carried, beside.ignored) == (("modules.json",), ("1_Pooling",))
    (folder / "1_Pooling").unlink()
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").symlink_to(tmp_path / "away" / "config.json")
    with pytest.raises(UnsafePathError, match=r"leads out of the folder"):
        open_model(folder)


@pytest.mark.parametrize(
    "name",
    [
        "1_Pooling/../config.json",
        "1_Pooling/x/config.json",
        "1_Pooling/evil.py",
        "100_Pooling/config.json",
        "1_Dense/model.bin",
        *[
            "additional_chat_templates/x.py",
            "additional_chat_templates/../x.jinja",
            "/1_Pooling/config.json",
            "1_Pooling",
        ],
    ],
)
def test_only_known_places_are_written(tmp_path: Path, name: str) -> None:
    (folder,) = write_stacks(tmp_path, {"w": random_stack(1, (4, 3))})
    model = open_model(folder)
    (tmp_path / "out").mkdir()
    assert not is_side_file(name)
    with pytest.raises(FormatError, match=r"is not a known side file"):
        write_checkpoint(tmp_path / "out", layout_of(model), model.read, side_files={name: b"{}"})
    assert list((tmp_path / "out").iterdir()) == []


def test_a_side_file_is_not_also_a_file_of_weights(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    (folder / "2_Dense").mkdir(parents=True)
    save_file({"w": torch.ones(2)}, folder / "2_Dense" / "model.safetensors")
    index = {"weight_map": {"w": "2_Dense/model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    put(folder, "modules.json")
    model = open_model(folder)
    assert model.beside.carried == ("model.safetensors.index.json", "modules.json")
    (tmp_path / "out").mkdir()
    with pytest.raises(FormatError, match=r"'2_Dense/model.safetensors' is both a side file and a weights file"):
        write_checkpoint(tmp_path / "out", layout_of(model), model.read, side_files={"2_Dense/model.safetensors": b""})


def test_a_bundle_keeps_the_names_that_matter_most(tmp_path: Path) -> None:
    for folder in adapters(tmp_path / "zoo"):
        for number in range(30):
            put(folder, f"a{number}.txt")
        put(folder, "trainer_state.json")
        put(folder, "value_head.bin")
    space = ez.load(ez.fit(tmp_path / "zoo", rank=1).save(tmp_path / "bundle"))
    names = space.rebuild("t0").not_carried
    assert len(names) == MAX_LEFT
    assert names[:2] == ("value_head.bin", "trainer_state.json")
    grown = space.add(write_adapter(tmp_path / "t9", random_factors(MODULES, 2, seed=9)))
    assert grown.rebuild("t0").not_carried == names
    assert grown.rebuild("t9").not_carried == ()


def test_a_name_that_is_no_text_is_named_in_a_bundle_all_the_same(tmp_path: Path) -> None:
    """Linux takes any bytes for a name; JSON takes text."""
    write_stacks(tmp_path / "zoo", {"w": random_stack(3, (4, 3))})
    (tmp_path / "zoo" / "m0" / os.fsdecode(b"caf\xe9.txt")).touch()
    space = ez.load(ez.fit(tmp_path / "zoo", rank=1).save(tmp_path / "bundle"))
    assert space.rebuild("m0").not_carried == ("caf\\udce9.txt",)
