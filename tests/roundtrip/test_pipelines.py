"""Folders of diffusers go through a subspace and come back as folders that diffusers loads: same answers."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import eigenzoo as ez
from eigenzoo.formats.paths import OUTPUT_RECORD
from real_models import TOLERANCE

pytest.importorskip("diffusers")
from diffusion_models import answers, finetune, load, make_pipeline, save

LOOSE = 10 * TOLERANCE
"""Of answers of the order of one through some thirty layers in float32."""


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    """diffusers logs how it loads."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Tensor]]]:
    """Three fine-tunes of the UNet of one pipeline, as DreamBooth makes them, beside what they answer."""
    root = tmp_path_factory.mktemp("pipelines")
    expected = {}
    for number in range(3):
        pipeline = finetune(number)
        expected[f"p{number}"] = answers(pipeline)
        save(pipeline, root / f"p{number}")
    return root, expected


def assert_same_answers(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for component, values in expected.items():
        torch.testing.assert_close(found[component], values, rtol=LOOSE, atol=LOOSE)


def files_of(folder: Path) -> set[str]:
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path.name != OUTPUT_RECORD
    }


def test_rebuilt_pipelines_answer_as_the_originals(zoo: tuple, tmp_path: Path) -> None:
    """All components are analysed; every file comes back, and what holds no weights to the byte."""
    root, expected = zoo
    assert (expected["p0"]["unet"] - expected["p1"]["unet"]).abs().max() > 1000 * TOLERANCE
    opened = ez.open_zoo(root)
    assert opened.names == ("p0", "p1", "p2")
    assert {name.partition(".")[0] for name in opened.layers} == {"unet", "vae", "text_encoder"}
    space = ez.load(ez.fit(opened, rank=1.0).save(tmp_path / "bundle"))
    for name, answer in expected.items():
        folder = space.rebuild(name).save(tmp_path / name)
        assert files_of(folder) == files_of(root / name)
        for file in files_of(folder):
            if not file.endswith(".safetensors"):
                assert (folder / file).read_bytes() == (root / name / file).read_bytes(), file
            else:
                assert set(load_file(folder / file)) == set(load_file(root / name / file))
        assert_same_answers(answers(load(folder)), answer)
    rebuilt = load(tmp_path / "p0")
    assert rebuilt.scheduler.config.num_train_timesteps == 77


def test_one_component_is_chosen_and_the_others_are_carried_once(zoo: tuple, tmp_path: Path) -> None:
    """Of the UNet no direction is kept, so that it is the mean; the others are the originals to the last bit."""
    root, expected = zoo
    space = ez.load(ez.fit(ez.open_zoo(root, include=["unet.*"]), rank=0).save(tmp_path / "bundle"))
    assert {name.partition(".")[0] for name in space.layers} == {"unet"}
    folder = space.rebuild("p1").save(tmp_path / "out")
    for component in ("vae", "text_encoder"):
        (file,) = (root / "p1" / component).glob("*.safetensors")
        before, after = load_file(file), load_file(folder / component / file.name)
        assert set(before) == set(after)
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert (answers(load(folder))["unet"] - expected["p1"]["unet"]).abs().max() > 100 * TOLERANCE
    carried = sum(path.stat().st_size for path in (tmp_path / "bundle" / "rest").glob("*.safetensors"))
    originals = sum(
        path.stat().st_size for name in ("vae", "text_encoder") for path in (root / "p0" / name).glob("*.safetensors")
    )
    assert carried < 2 * originals, "three models, whose text encoder and VAE are the same, store them once"


def test_a_component_s_folder_is_a_model_of_its_own(zoo: tuple, tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    root, expected = zoo
    opened = ez.open_zoo([root / f"p{number}" / "unet" for number in range(3)])
    assert opened.names == ("p0/unet", "p1/unet", "p2/unet")
    space = ez.fit(opened, rank=1.0)
    pipeline = make_pipeline()
    pipeline.unet = UNet2DConditionModel.from_pretrained(space.rebuild("p2/unet").save(tmp_path / "unet"))
    found = answers(pipeline)["unet"]
    torch.testing.assert_close(found, expected["p2"]["unet"], rtol=LOOSE, atol=LOOSE)


def test_sharded_components_keep_their_shards(tmp_path: Path) -> None:
    expected = {}
    for number in range(2):
        pipeline = finetune(number)
        expected[f"p{number}"] = answers(pipeline)
        save(pipeline, tmp_path / "zoo" / f"p{number}", max_shard_size="60KB")
    assert len(list((tmp_path / "zoo" / "p0" / "unet").glob("*.safetensors"))) > 2
    space = ez.load(ez.fit(ez.open_zoo(tmp_path / "zoo"), rank=1.0).save(tmp_path / "bundle"))
    for name, answer in expected.items():
        folder = space.rebuild(name).save(tmp_path / name)
        assert files_of(folder) == files_of(tmp_path / "zoo" / name)
        assert_same_answers(answers(load(folder)), answer)


def test_files_of_a_variant_come_back_as_that_variant(tmp_path: Path) -> None:
    for number in range(2):
        save(finetune(number).to(torch.float16), tmp_path / "zoo" / f"p{number}", variant="fp16")
    space = ez.fit(ez.open_zoo(tmp_path / "zoo"), rank=1.0)
    folder = space.rebuild("p1").save(tmp_path / "out")
    assert (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    assert files_of(folder) == files_of(tmp_path / "zoo" / "p1")
    before, after = (
        load_file(path / "unet" / "diffusion_pytorch_model.fp16.safetensors")
        for path in (tmp_path / "zoo" / "p1", folder)
    )
    for name, values in before.items():
        assert after[name].dtype == torch.float16
        torch.testing.assert_close(after[name], values, rtol=2e-3, atol=1e-4)
    assert load(folder, variant="fp16", torch_dtype=torch.float16).unet.dtype == torch.float16


def test_fused_weights_of_a_component_are_cut_and_joined(zoo: tuple, tmp_path: Path) -> None:
    root, expected = zoo
    opened = ez.open_zoo(root, split="unet.*.ff.net.0.proj.*=value,gate", include=["*.ff.net.0.proj.*"])
    assert all(name.endswith((".value", ".gate")) for name in opened.layers)
    space = ez.load(ez.fit(opened, rank=1.0).save(tmp_path / "bundle"))
    assert_same_answers(answers(load(space.rebuild("p0").save(tmp_path / "out"))), expected["p0"])


def test_a_pipeline_is_projected_and_replaced(zoo: tuple, tmp_path: Path) -> None:
    root, _ = zoo
    space = ez.fit(ez.open_zoo(root), rank=1.0)
    shutil.copytree(root / "p1", tmp_path / "copy")
    coefficients = space.project(tmp_path / "copy")
    assert coefficients.residual < 1e-10
    out = space.rebuild("p0").save(tmp_path / "out")
    space.rebuild(coefficients).save(out, force=True)
    (out / "unet" / "notes.txt").write_text("mine")
    with pytest.raises(ez.OutputError, match=r"holds 'unet/notes.txt'"):
        space.rebuild("p0").save(out, force=True)
    assert (out / "unet" / "notes.txt").read_text() == "mine"


def pickled(folder: Path) -> None:
    (folder / "vae" / "diffusion_pytorch_model.safetensors").rename(folder / "vae" / "diffusion_pytorch_model.bin")


def ambiguous(folder: Path) -> None:
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    shutil.copy(file, file.with_name("diffusion_pytorch_model.ema.safetensors"))
    file.rename(file.with_name("diffusion_pytorch_model.fp16.safetensors"))


def shards_of_a_variant(folder: Path) -> None:
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_name("diffusion_pytorch_model.fp16-00001-of-00002.safetensors"))


def without_weights(folder: Path) -> None:
    for path in folder.rglob("*.safetensors"):
        path.unlink()


def link_out(folder: Path) -> None:
    shutil.move(folder / "vae", folder.parent / "outside")
    (folder / "vae").symlink_to(folder.parent / "outside")


def named(name: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps({**index, name: ["diffusers", "AutoencoderKL"]}))

    return edit


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (pickled, r"component 'vae': the weights are a Python pickle.*save_pretrained"),
        (ambiguous, r"component 'vae': there are no weights in a readable format.*with variant="),
        (shards_of_a_variant, r"component 'vae': the weights are shards of a variant.*with variant="),
        (without_weights, r"no component has weights"),
        (link_out, r"'vae' is a link that leads out of the folder"),
        (named("../vae"), r"'\.\./vae' holds '\.\.'"),
        (named("vae/inner"), r"a component is called 'vae/inner'"),
    ],
)
def test_what_is_no_whole_pipeline_is_refused(
    zoo: tuple, tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    shutil.copytree(zoo[0] / "p0", tmp_path / "p0")
    spoil(tmp_path / "p0")
    with pytest.raises(ez.FormatError, match=message):
        ez.open_zoo(tmp_path / "p0")
