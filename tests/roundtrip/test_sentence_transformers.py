"""Models that sentence-transformers saved come back whole: its modules lie in folders of their own, one with weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
from transformers import BertConfig, BertModel, BertTokenizerFast

import eigenzoo as ez
from eigenzoo.formats.opening import open_model
from once import once
from tolerance import tolerance

WORDS = ["a", "b", "c", "d"]
TEXTS = ["a b c", "d", "b b a d c"]
WIDTH = 16


def save_one(folder: Path, seed: int) -> None:
    torch.manual_seed(seed)
    inner = folder.with_name(f"{folder.name}-transformer")
    inner.mkdir(parents=True)
    (inner / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    BertModel(BertConfig(vocab_size=9, max_position_embeddings=16, **sizes)).save_pretrained(inner)
    BertTokenizerFast(str(inner / "vocab.txt")).save_pretrained(inner)
    modules = [Transformer(str(inner)), Pooling(WIDTH), Dense(WIDTH, 6), Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save(str(folder))
    shutil.rmtree(inner)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def make(folder: Path) -> None:
        for seed in range(3):
            save_one(folder / f"m{seed}", seed)

    return once(tmp_path_factory, "sentence-transformers", make)


def embed(folder: Path) -> torch.Tensor:
    model = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    return model.encode(TEXTS, convert_to_tensor=True, show_progress_bar=False).double()


def names_of(folder: Path) -> set[str]:
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return {name for name in names if not name.startswith(".")}


def test_embeddings_of_rebuilt_models_are_the_originals(zoo: Path, tmp_path: Path) -> None:
    space = ez.load(ez.fit(zoo, rank=1.0).save(tmp_path / "bundle"))
    answers = {name: embed(zoo / name) for name in space.names}
    for name, expected in answers.items():
        rebuilt = space.rebuild(name).save(tmp_path / name)
        # Weights within a rounding, and then some two dozen products of sixteen values: unit vectors.
        torch.testing.assert_close(embed(rebuilt), expected, rtol=0, atol=tolerance(WIDTH, dtype=torch.float32))
        assert names_of(zoo / name) - names_of(rebuilt) == {"README.md"}
        assert space.rebuild(name).not_carried == ("README.md",)
    assert (answers["m0"] - answers["m1"]).abs().max() > 0.1


def test_weights_of_a_module_are_carried_and_what_cannot_be_is_named(zoo: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(zoo / "m0", tmp_path / "m0")
    assert "2_Dense/model.safetensors" in open_model(folder).side_files
    (folder / "2_Dense" / "model.safetensors").unlink()
    torch.save({"linear.weight": torch.ones(6, WIDTH)}, folder / "2_Dense" / "pytorch_model.bin")
    beside = open_model(folder).beside
    assert beside.weights == ("2_Dense/pytorch_model.bin",)
    assert "2_Dense/config.json" in beside.carried


def test_a_module_in_a_folder_of_its_own_is_rebuilt_and_the_others_are_said(zoo: Path, tmp_path: Path) -> None:
    """Older versions put the transformer into `0_Transformer`, and a layer with weights beside it."""
    for path in zoo.iterdir():
        folder = shutil.copytree(path, tmp_path / "zoo" / path.name)
        (folder / "0_Transformer").mkdir()
        for file in list(folder.iterdir()):
            if file.is_file() and file.name not in ("modules.json", "config_sentence_transformers.json", "README.md"):
                file.rename(folder / "0_Transformer" / file.name)
        text = (folder / "modules.json").read_text()
        (folder / "modules.json").write_text(text.replace('"path": ""', '"path": "0_Transformer"'))
    opened = ez.open_zoo(tmp_path / "zoo")
    assert opened.names == ("m0/0_Transformer", "m1/0_Transformer", "m2/0_Transformer")
    (said,) = opened.warnings
    assert "0_Transformer is one module of a sentence-transformers model" in said
    space = ez.fit(opened, rank=1.0)
    copy = shutil.copytree(tmp_path / "zoo" / "m1", tmp_path / "copy")
    shutil.rmtree(copy / "0_Transformer")
    space.rebuild("m1/0_Transformer").save(copy / "0_Transformer")
    torch.testing.assert_close(embed(copy), embed(zoo / "m1"), rtol=0, atol=tolerance(WIDTH, dtype=torch.float32))
