"""Pipelines as files: names, layouts that others wrote, places where nothing may be written, URLs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from safetensors.torch import save_file

import eigenzoo as ez
from eigenzoo.errors import FormatError, UnsafePathError, UnsupportedError
from eigenzoo.formats.layout import ModelLayout, layout_of
from eigenzoo.formats.opening import is_model, open_model
from eigenzoo.formats.writers import write_checkpoint

INDEX = {
    "_class_name": "SomePipeline",
    "requires_safety_checker": False,
    "unet": ["diffusers", "UNet2DModel"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "scheduler": ["diffusers", "DDPMScheduler"],
    "feature_extractor": [None, None],
    "absent": ["diffusers", "AutoencoderKL"],
}


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """Two components whose tensors have the same names, a scheduler, and a file that is not carried."""
    folder = tmp_path / "pipeline"
    for place, file in enumerate(("unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors")):
        (folder / file).parent.mkdir(parents=True)
        tensors = {"w": torch.full((4, 3), float(place)), "b": torch.arange(4.0) + place}
        save_file(tensors, folder / file, {"format": "pt"})
        (folder / file).with_name("config.json").write_text(json.dumps({"place": place}))
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"a copy")
    (folder / "v1-pruned.ckpt").write_bytes(b"another copy")
    (folder / "model_index.json").write_text(json.dumps(INDEX))
    return folder


def test_components_are_read_by_their_names(pipeline: Path) -> None:
    model = open_model(pipeline)
    assert model.format == "pipeline"
    assert list(model.tensors) == ["unet.b", "unet.w", "text_encoder.b", "text_encoder.w"]
    assert torch.equal(model.read("text_encoder.w"), torch.ones(4, 3))
    assert torch.equal(model.read_flat("unet.b", 1, 3), torch.tensor([1.0, 2.0]))
    assert model.side_files == (
        "model_index.json",
        "unet/config.json",
        "text_encoder/config.json",
        "scheduler/scheduler_config.json",
    )
    assert model.ignored_files == (
        "v1-pruned.ckpt",
        "unet/diffusion_pytorch_model.fp16.safetensors",
    )
    assert model.read_side_file("text_encoder/config.json") == b'{"place": 1}'


def test_a_pipeline_is_written_back_byte_for_byte(pipeline: Path, tmp_path: Path) -> None:
    model = open_model(pipeline)
    layout = ModelLayout.from_json(json.loads(json.dumps(layout_of(model).to_json())))
    out = tmp_path / "out"
    out.mkdir()
    side_files = {file: model.read_side_file(file) for file in model.side_files}
    write_checkpoint(out, layout, model.read, metadata=model.metadata, side_files=side_files)
    written = {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert written == {file: (pipeline / file).read_bytes() for file in written}
    assert set(written) == {*side_files, *layout.files}


@pytest.mark.parametrize(
    "name",
    ["/config.json", "../config.json", "a/b/config.json", "../x/model.safetensors.index.json", "a-b/config.json"],
)
def test_side_files_are_written_into_components_alone(pipeline: Path, tmp_path: Path, name: str) -> None:
    model = open_model(pipeline)
    (tmp_path / "out").mkdir()
    with pytest.raises(FormatError, match=r"is not a known side file.*one per component"):
        write_checkpoint(tmp_path / "out", layout_of(model), model.read, side_files={name: b'{"weight_map": {}}'})
    assert not list((tmp_path / "out").iterdir())
    index = {"unet/model.safetensors.index.json": b'{"weight_map": {}}'}
    with pytest.raises(FormatError, match="weight_map does not match"):
        write_checkpoint(tmp_path / "out", layout_of(model), model.read, side_files=index)
    with pytest.raises(FormatError, match=r"'unet/run\.py' is not a known side file"):
        write_checkpoint(tmp_path / "out", layout_of(model), model.read, side_files={"unet/run.py": b""})


@pytest.mark.parametrize(
    ("file", "tensor"),
    [
        ("model.safetensors", "unet.w"),
        ("unet/inner/model.safetensors", "unet.w"),
        ("unet/model.safetensors", "vae.w"),
        ("unet/model.safetensors", "unet."),
        ("a-b/model.safetensors", "a-b.w"),
    ],
)
def test_layouts_that_others_wrote_are_checked(file: str, tensor: str) -> None:
    document: dict[str, Any] = {"format": "pipeline", "index": None, "updates": {}}
    with pytest.raises(FormatError, match="layout: "):
        ModelLayout.from_json({**document, "files": {file: [[tensor, "F32", [2]]]}})
    with pytest.raises(UnsafePathError, match=r"holds '\.\.'"):
        ModelLayout.from_json({**document, "files": {"../m.safetensors": [["unet.w", "F32", [2]]]}})


def test_pipelines_of_one_network_at_the_root_are_what_they_were(tmp_path: Path) -> None:
    """The oldest pipelines have their weights beside the index: such a folder is a checkpoint, or a pickle."""
    (tmp_path / "model_index.json").write_text(json.dumps(INDEX))
    torch.save({"w": torch.ones(2)}, tmp_path / "diffusion_pytorch_model.bin")
    assert open_model(tmp_path, allow_pickle=True).format == "pickle"
    save_file({"w": torch.ones(2)}, tmp_path / "diffusion_pytorch_model.safetensors")
    assert open_model(tmp_path).format == "checkpoint"


def test_a_pipeline_at_a_url_is_refused_and_a_component_is_read(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EIGENZOO_CACHE", str(tmp_path / "cache"))
    system = fsspec.filesystem("memory")
    for path in pipeline.rglob("*"):
        if path.is_file():
            system.pipe_file(f"/pipelines/p/{path.relative_to(pipeline).as_posix()}", path.read_bytes())
    for url in ("memory://pipelines/p", "memory://pipelines"):
        with pytest.raises(UnsupportedError, match=r"this is a diffusers pipeline at a URL.*pipelines/p/unet\)"):
            ez.open_zoo(url)
    assert list(ez.open_zoo("memory://pipelines/p/text_encoder").layers) == ["b", "w"]


def test_a_folder_with_an_index_alone_is_described(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    assert is_model(tmp_path)
    with pytest.raises(FormatError, match=r"no component has weights.*model_index\.json names"):
        open_model(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps({f"c{place}": ["x", "y"] for place in range(65)}))
    with pytest.raises(FormatError, match="65 components"):
        open_model(tmp_path)


def test_quantised_components_are_refused(pipeline: Path) -> None:
    config = {"quantization_config": {"quant_method": "bitsandbytes"}}
    (pipeline / "unet" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match=r"unet.*quantised \(bitsandbytes\)"):
        open_model(pipeline)


@pytest.mark.parametrize("kind", ["pickled adapter", "gguf", "sharded pickle"])
def test_other_kinds_at_urls_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setenv("EIGENZOO_CACHE", str(tmp_path / "cache"))
    files, message = {
        "pickled adapter": (["adapter_config.json", "adapter_model.bin"], "a Python pickle at a URL"),
        "gguf": (["m.Q4_0.gguf", "README.md"], "a GGUF file.*gguf_file=name"),
        "sharded pickle": (
            ["pytorch_model.bin.index.json", "pytorch_model-00001-of-00001.bin"],
            "a Python pickle at a",
        ),
    }[kind]
    root = f"/kinds-{kind.replace(' ', '-')}"
    for name in files:
        fsspec.filesystem("memory").pipe_file(f"{root}/m/{name}", b"{}")
    for url in (f"memory:/{root}/m", f"memory:/{root}"):
        with pytest.raises(UnsupportedError, match=message):
            ez.open_zoo(url, allow_pickle=True)
