"""Checkpoints that transformers saved go through a subspace of full rank and load again, whole: same logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import eigenzoo as ez
from builders import random_stack, write_stacks
from eigenzoo.formats.paths import OUTPUT_RECORD
from real_models import MODELS, TOLERANCE, load_checkpoint, logits, make

SHARDS = ["5GB", "8KB"]
AXES = [("models",), ("outputs",), ("outputs", "inputs")]


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def names_of(folder: Path) -> list[str]:
    """The files of a model, without the record of who wrote them."""
    return sorted(path.name for path in folder.iterdir() if path.name != OUTPUT_RECORD)


def assert_same_answers(kind: str, folder: Path, expected: torch.Tensor, base: torch.Tensor) -> None:
    """The checkpoint loads without a complaint and answers as expected, far from what its parent answers."""
    assert (expected - base).abs().max() > 1000 * TOLERANCE
    torch.testing.assert_close(logits(load_checkpoint(kind, folder), kind), expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("shards", SHARDS)
def test_rebuilt_checkpoints_answer_as_the_originals(
    tmp_path: Path, checkpoint_zoo: Callable, kind: str, shards: str
) -> None:
    zoo = checkpoint_zoo(kind, "1KB" if kind == "resnet" and shards != "5GB" else shards)
    space = ez.fit(zoo.folder, rank=1.0)
    assert set(space.names) == set(zoo.logits)
    for name, expected in zoo.logits.items():
        folder = space.rebuild(name).save(tmp_path / name)
        assert_same_answers(kind, folder, expected, zoo.base_logits)
        assert names_of(folder) == names_of(zoo.path(name))
        assert (len(names_of(folder)) > 4) == (shards != "5GB")


@pytest.mark.parametrize("kind", ["gpt2", "resnet"])
@pytest.mark.parametrize("axes", AXES[1:], ids="+".join)
def test_tucker_forms_answer_as_the_originals(
    tmp_path: Path, checkpoint_zoo: Callable, kind: str, axes: tuple[str, ...]
) -> None:
    zoo = checkpoint_zoo(kind)
    space = ez.fit(zoo.folder, rank=1.0, axes=axes)
    for name, expected in zoo.logits.items():
        assert_same_answers(kind, space.rebuild(name).save(tmp_path / name), expected, zoo.base_logits)


@pytest.mark.parametrize("center", ["columns", "none", "global"])
def test_every_center_answers_as_the_originals(tmp_path: Path, checkpoint_zoo: Callable, center: str) -> None:
    zoo = checkpoint_zoo("vit")
    space = ez.load(ez.fit(zoo.folder, rank=1.0, center=center).save(tmp_path / "bundle"))
    for name, expected in zoo.logits.items():
        assert_same_answers("vit", space.rebuild(name).save(tmp_path / name), expected, zoo.base_logits)


@pytest.mark.parametrize("kind", MODELS)
def test_a_loaded_bundle_rebuilds_the_same_files(tmp_path: Path, checkpoint_zoo: Callable, kind: str) -> None:
    zoo = checkpoint_zoo(kind)
    space = ez.fit(zoo.folder, rank=1.0)
    loaded = ez.load(space.save(tmp_path / "bundle"))
    assert list(loaded.verify()) == []
    for name in space.names:
        first, second = (
            space.rebuild(name).save(tmp_path / name),
            loaded.rebuild(name).save(tmp_path / f"{name}-loaded"),
        )
        assert names_of(first) == names_of(second)
        assert all((first / file).read_bytes() == (second / file).read_bytes() for file in names_of(first))


@pytest.mark.parametrize("shards", SHARDS)
def test_files_keep_their_tensors_dtypes_metadata_and_configs(
    tmp_path: Path, checkpoint_zoo: Callable, shards: str
) -> None:
    zoo = checkpoint_zoo("gpt2", shards)
    folder = ez.fit(zoo.folder, rank=1.0).rebuild("m1").save(tmp_path / "out")
    for path in zoo.path("m1").iterdir():
        if path.suffix != ".safetensors":
            assert (folder / path.name).read_bytes() == path.read_bytes(), path.name
            continue
        with safe_open(path, "pt") as before, safe_open(folder / path.name, "pt") as after:
            assert after.metadata() == before.metadata()
            assert list(after.keys()) == list(before.keys())
            for name in before.keys():  # noqa: SIM118  (a file, no mapping)
                assert after.get_tensor(name).dtype == before.get_tensor(name).dtype
                assert after.get_tensor(name).shape == before.get_tensor(name).shape


def test_metadata_of_a_model_s_own_is_carried(tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / "zoo" / f"m{number}").mkdir(parents=True)
        save_file(
            {"a.weight": torch.randn(4, 3)},
            tmp_path / "zoo" / f"m{number}" / "model.safetensors",
            {"format": "pt", "run": f"number {number}, «é»"},
        )
    space = ez.load(ez.fit(tmp_path / "zoo", rank=1.0).save(tmp_path / "bundle"))
    with safe_open(space.rebuild("m1").save(tmp_path / "out") / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "run": "number 1, «é»"}


def test_counters_are_bit_equal_and_variances_positive(tmp_path: Path, checkpoint_zoo: Callable) -> None:
    zoo = checkpoint_zoo("resnet")
    space = ez.fit(zoo.folder, rank=1.0)
    for number, name in enumerate(space.names):
        before, after = tensors_of(zoo.path(name)), tensors_of(space.rebuild(name).save(tmp_path / name))
        counters = [key for key in before if key.endswith("num_batches_tracked")]
        assert len(counters) == 8
        for key in counters:
            assert after[key].dtype == torch.int64
            assert after[key].shape == ()
            assert after[key].item() == 1000 + number
        for key in before:
            if key.endswith("running_var"):
                assert (after[key] > 0).all()


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_variances_stay_positive_in_a_truncated_fit(tmp_path: Path, rank: int) -> None:
    """Variances over decades: a sum of few directions falls below zero, and a batch norm then answers NaN."""
    draw = torch.Generator().manual_seed(0)
    variances = torch.exp(3 * torch.randn(6, 40, generator=draw))
    write_stacks(tmp_path / "zoo", {"bn.running_var": variances, "bn.weight": random_stack(6, (40,))})
    space = ez.fit(tmp_path / "zoo", rank=rank)
    for name in space.names:
        rebuilt = tensors_of(space.rebuild(name).save(tmp_path / name))["bn.running_var"]
        assert (rebuilt > 0).all(), f"{int((rebuilt <= 0).sum())} variances of {name} are not positive"


def test_tied_weights_are_neither_demanded_nor_written(tmp_path: Path, checkpoint_zoo: Callable) -> None:
    for kind, tied in (("gpt2", "lm_head.weight"), ("t5", "lm_head.weight")):
        zoo = checkpoint_zoo(kind)
        folder = ez.fit(zoo.folder, rank=1.0).rebuild("m0").save(tmp_path / kind)
        assert tied not in tensors_of(folder)
        loaded = load_checkpoint(kind, folder)
        assert loaded.get_output_embeddings().weight.data_ptr() == loaded.get_input_embeddings().weight.data_ptr()


@pytest.mark.parametrize("kind", ["llama", "vit"])
@pytest.mark.parametrize("view", ["weight", "delta"])
def test_bfloat16_checkpoints_come_back_in_bfloat16(
    tmp_path: Path, checkpoint_zoo: Callable, kind: str, view: str
) -> None:
    zoo = checkpoint_zoo(kind, dtype=torch.bfloat16)
    opened = ez.open_zoo(zoo.folder, base=zoo.folder / "_base" if view == "delta" else None)
    assert opened.view == view
    space = ez.fit(opened, rank=1.0)
    for name in space.names:
        folder = space.rebuild(name).save(tmp_path / name)
        before, after = tensors_of(zoo.path(name)), tensors_of(folder)
        assert set(after) == set(before)
        for key, tensor in before.items():
            assert after[key].dtype == tensor.dtype == torch.bfloat16
            # Stored values are exact again unless the float32 basis lands beyond half a bfloat16 step, for the smallest few.
            assert (after[key] == tensor).float().mean() > 0.99
            torch.testing.assert_close(after[key], tensor, rtol=2 * torch.finfo(torch.bfloat16).eps, atol=1e-6)
        assert next(load_checkpoint(kind, folder).parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["llama", "resnet"])
def test_differences_from_a_base_come_back_on_the_base(tmp_path: Path, checkpoint_zoo: Callable, kind: str) -> None:
    zoo = checkpoint_zoo(kind)
    opened = ez.open_zoo(zoo.folder, base=zoo.folder / "_base")
    space = ez.fit(opened, rank=1.0)
    assert space.view == "delta"
    loaded = ez.load(space.save(tmp_path / "bundle"))
    for number, (name, expected) in enumerate(zoo.logits.items()):
        assert_same_answers(kind, space.rebuild(name).save(tmp_path / f"fitted{number}"), expected, zoo.base_logits)
        assert_same_answers(kind, loaded.rebuild(name).save(tmp_path / f"loaded{number}"), expected, zoo.base_logits)
    coefficients = loaded.project(zoo.path("m1"))
    assert coefficients.residual < 1e-10
    assert_same_answers(
        kind, loaded.rebuild(coefficients).save(tmp_path / "projected"), zoo.logits["m1"], zoo.base_logits
    )


def test_the_bundle_of_differences_does_not_hold_the_base(tmp_path: Path, checkpoint_zoo: Callable) -> None:
    """Neither its values nor its models': of 64 bytes from the middle of each tensor none is in any file."""
    zoo = checkpoint_zoo("llama")
    bundle = ez.fit(ez.open_zoo(zoo.folder, base=zoo.folder / "_base"), rank=1.0).save(tmp_path / "bundle")
    files = [path.read_bytes() for path in bundle.rglob("*") if path.is_file()]
    for model in ("_base", "m0"):
        for name, tensor in tensors_of(zoo.path(model)).items():
            # Norms are ones in the base, which any file may hold.
            if tensor.ndim < 2:
                continue
            piece = bytes(tensor.contiguous().view(torch.uint8).view(-1)[512:576].tolist())
            assert not any(piece in file for file in files), f"{name} of {model}"


def test_a_base_that_moved_is_named_anew(tmp_path: Path, checkpoint_zoo: Callable) -> None:
    zoo = checkpoint_zoo("llama")
    make("llama").save_pretrained(tmp_path / "base")
    bundle = ez.fit(ez.open_zoo(zoo.folder, base=tmp_path / "base"), rank=1.0).save(tmp_path / "bundle")
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(ez.BundleError, match=r"the base is not at hand.*Name the base with base="):
        ez.load(bundle).rebuild("m0").save(tmp_path / "out")
    assert names_of(tmp_path) == ["bundle", "moved"]
    folder = ez.load(bundle, base=tmp_path / "moved").rebuild("m0").save(tmp_path / "out")
    assert_same_answers("llama", folder, zoo.logits["m0"], zoo.base_logits)


def test_another_base_of_the_same_size_is_refused(tmp_path: Path, checkpoint_zoo: Callable) -> None:
    """Added to another parent, the differences make a model that answers at random, and nobody would notice."""
    zoo = checkpoint_zoo("llama")
    bundle = ez.fit(ez.open_zoo(zoo.folder, base=zoo.folder / "_base"), rank=1.0).save(tmp_path / "bundle")
    with pytest.raises(ez.BundleError, match="is not the base that was subtracted"):
        ez.load(bundle, base=zoo.path("m2")).rebuild("m0").save(tmp_path / "out")


EXCLUDED = {
    "vit": ["classifier*", "*.*.*bias"],
    "resnet": ["*.normalization.*", "resnet.encoder.stages.*.layers.*.shortcut.convolution.weight"],
}


@pytest.mark.parametrize("kind", EXCLUDED)
def test_excluded_layers_are_bit_equal(tmp_path: Path, checkpoint_zoo: Callable, kind: str) -> None:
    """By globs of names, and by a role as listings show it; the rest is truncated and therefore differs."""
    zoo = checkpoint_zoo(kind)
    space = ez.load(ez.fit(ez.open_zoo(zoo.folder, exclude=EXCLUDED[kind]), rank=1).save(tmp_path / "bundle"))
    for name in space.names:
        before, after = tensors_of(zoo.path(name)), tensors_of(space.rebuild(name).save(tmp_path / name))
        excluded = set(before) - set(space.layers)
        assert len(excluded) > 3
        assert set(space.layers) < set(before)
        assert set(after) == set(before)
        for key, tensor in before.items():
            assert torch.equal(after[key], tensor) == (key in excluded), key


def test_an_unseen_checkpoint_keeps_what_it_brings(tmp_path: Path, checkpoint_zoo: Callable) -> None:
    """A copy with a config of its own and a head that the zoo does not have."""
    zoo = checkpoint_zoo("vit")
    space = ez.fit(ez.open_zoo(zoo.folder, exclude=["classifier*"]), rank=1.0)
    tensors = tensors_of(zoo.path("m0"))
    tensors |= {"classifier.weight": torch.randn(9, 32), "classifier.bias": torch.randn(9)}
    (tmp_path / "unseen").mkdir()
    save_file(tensors, tmp_path / "unseen" / "model.safetensors", {"format": "pt"})
    config = json.loads((zoo.path("m0") / "config.json").read_text())
    config["id2label"] = {str(label): f"class {label}" for label in range(9)}
    config["label2id"] = {f"class {label}": label for label in range(9)}
    (tmp_path / "unseen" / "config.json").write_text(json.dumps(config))
    coefficients = space.project(tmp_path / "unseen")
    assert coefficients.residual < 1e-10
    folder = space.rebuild(coefficients).save(tmp_path / "out")
    assert torch.equal(tensors_of(folder)["classifier.weight"], tensors["classifier.weight"])
    expected = logits(load_checkpoint("vit", tmp_path / "unseen"), "vit")
    assert expected.shape == (2, 9)
    torch.testing.assert_close(logits(load_checkpoint("vit", folder), "vit"), expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_one_model_is_its_own_mean(tmp_path: Path, checkpoint_zoo: Callable) -> None:
    zoo = checkpoint_zoo("gpt2")
    space = ez.fit(zoo.path("m2"), rank=1.0)
    assert {layer["note"] for layer in space.report["layers"].values()} == {"no variance"}
    assert_same_answers("gpt2", space.rebuild("m2").save(tmp_path / "out"), zoo.logits["m2"], zoo.base_logits)


def test_the_mean_alone_is_another_model(tmp_path: Path, checkpoint_zoo: Callable) -> None:
    """The control: if the mean answered alike, equal logits of rebuilt models would be no evidence."""
    zoo = checkpoint_zoo("vit")
    folder = ez.fit(zoo.folder, rank=1.0).rebuild("m0", mean_only=True).save(tmp_path / "mean")
    assert (logits(load_checkpoint("vit", folder), "vit") - zoo.logits["m0"]).abs().max() > 1000 * TOLERANCE
