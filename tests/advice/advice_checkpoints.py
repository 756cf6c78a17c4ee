"""Messages about checkpoints, shards, pickles, GGUF files and what differs between models."""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

import torch
from advice_case import Case
from safetensors.torch import load_file, save_file
from tiny_llama import answers, assert_same, checkpoint_answers, make_llama

import eigenzoo as ez


def write_checkpoints(root: Path, **settings: str) -> None:
    """Two fine-tunes of the Llama, by transformers."""
    for seed in range(2):
        model = make_llama()
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.05)
        model.save_pretrained(root / "originals" / f"m{seed}", **settings)
    shutil.copytree(root / "originals", root / "zoo")


def assert_rebuilt(root: Path, zoo: Path | None = None, **choices: object) -> None:
    """Every model of a zoo, rebuilt at full rank, answers in transformers as the original."""
    space = ez.fit(ez.open_zoo(zoo or root / "zoo", **choices), rank=1.0)
    for name in ("m0", "m1"):
        rebuilt = space.rebuild(name).save(root / "rebuilt" / name)
        assert_same(checkpoint_answers(rebuilt), checkpoint_answers(root / "originals" / name))


def shard_missing(root: Path) -> None:
    write_checkpoints(root, max_shard_size="10KB")
    next((root / "zoo" / "m0").glob("model-00002-*")).unlink()
    ez.open_zoo(root / "zoo")


def get_the_shard(root: Path) -> None:
    """The test got the shard; the rebuilt checkpoints answer in transformers as the originals."""
    for path in (root / "originals" / "m0").glob("model-00002-*"):
        shutil.copy(path, root / "zoo" / "m0")
    assert_rebuilt(root)


def index_missing(root: Path) -> None:
    write_checkpoints(root, max_shard_size="10KB")
    (root / "zoo" / "m0" / "model.safetensors.index.json").unlink()
    ez.open_zoo(root / "zoo")


def get_the_index(root: Path) -> None:
    """The test got the index; the rebuilt checkpoints answer in transformers as the originals."""
    shutil.copy(root / "originals" / "m0" / "model.safetensors.index.json", root / "zoo" / "m0")
    assert_rebuilt(root)


def cut_off(root: Path) -> None:
    write_checkpoints(root)
    path = root / "zoo" / "m0" / "model.safetensors"
    os.truncate(path, path.stat().st_size - 100)
    ez.open_zoo(root / "zoo")


def get_it_again(root: Path) -> None:
    """The test got the file again; the rebuilt checkpoints answer in transformers as the originals."""
    shutil.copy(root / "originals" / "m0" / "model.safetensors", root / "zoo" / "m0")
    assert_rebuilt(root)


def linked_out(root: Path) -> None:
    write_checkpoints(root)
    path = root / "zoo" / "m0" / "model.safetensors"
    path.rename(root / "elsewhere")
    path.symlink_to(root / "elsewhere")
    ez.open_zoo(root / "zoo")


def replace_the_link(root: Path) -> None:
    """The test put the file in the link's place; the rebuilt checkpoints answer in transformers as the originals."""
    path = root / "zoo" / "m0" / "model.safetensors"
    path.unlink()
    (root / "elsewhere").rename(path)
    assert_rebuilt(root)


def with_nan(root: Path) -> None:
    write_checkpoints(root)
    for folder in ("originals", "zoo"):
        path = root / folder / "m0" / "model.safetensors"
        tensors = load_file(path)
        tensors["model.norm.weight"][3] = float("nan")
        save_file(tensors, path, {"format": "pt"})
    ez.fit(root / "zoo", rank=1.0)


def exclude_the_layer(root: Path) -> None:
    """The test excluded the layer; the rebuilt model holds the original's values, NaN included, and the other answers as before."""
    space = ez.fit(ez.open_zoo(root / "zoo", exclude=["model.norm.weight"]), rank=1.0)
    found = space.rebuild("m0").state_dict()["model.norm.weight"]
    original = load_file(root / "originals" / "m0" / "model.safetensors")["model.norm.weight"]
    assert torch.equal(found.nan_to_num(7), original.nan_to_num(7))
    assert_same(
        checkpoint_answers(space.rebuild("m1").save(root / "m1")), checkpoint_answers(root / "originals" / "m1")
    )


def other_shape(root: Path) -> None:
    write_checkpoints(root)
    for folder in ("originals", "zoo"):
        path = root / folder / "m1" / "model.safetensors"
        tensors = load_file(path)
        tensors["model.embed_tokens.weight"] = torch.randn(44, 16, generator=torch.Generator().manual_seed(9))
        tensors["lm_head.weight"] = torch.randn(44, 16, generator=torch.Generator().manual_seed(8))
        save_file(tensors, path, {"format": "pt"})
        config = path.with_name("config.json")
        config.write_text(config.read_text().replace('"vocab_size": 40', '"vocab_size": 44'))
    ez.open_zoo(root / "zoo")


def exclude_the_shape(root: Path) -> None:
    """The test excluded the layer; the rebuilt checkpoints answer in transformers as the originals."""
    space = ez.fit(ez.open_zoo(root / "zoo", exclude=["model.embed_tokens.weight"]), rank=1.0)
    assert_same(
        checkpoint_answers(space.rebuild("m0").save(root / "m0")), checkpoint_answers(root / "originals" / "m0")
    )
    found, original = (
        checkpoint_answers(path) for path in (space.rebuild("m1").save(root / "m1"), root / "originals" / "m1")
    )
    torch.testing.assert_close(found, original, rtol=1e-5, atol=1e-5)


def with_arguments(root: Path) -> None:
    write_checkpoints(root)
    for path in (root / "zoo").iterdir():
        weights = path / "model.safetensors"
        torch.save({"model": load_file(weights), "args": argparse.Namespace(lr=1e-4)}, path / "pytorch_model.bin")
        weights.unlink()
    ez.open_zoo(root / "zoo", allow_pickle=True)


def save_the_state_dict(root: Path) -> None:
    """The test loaded each where it was made and saved its state dict; rebuilt, they answer in transformers as the originals."""
    for path in (root / "zoo").iterdir():
        loaded = torch.load(path / "pytorch_model.bin", weights_only=False)
        save_file(loaded["model"], path / "model.safetensors", {"format": "pt"})
        (path / "pytorch_model.bin").unlink()
    assert_rebuilt(root)


def with_other_entries(root: Path) -> None:
    write_checkpoints(root)
    for path in (root / "zoo").iterdir():
        weights = path / "model.safetensors"
        torch.save({**load_file(weights), "epoch": 3}, path / "pytorch_model.bin")
        weights.unlink()
    ez.open_zoo(root / "zoo", allow_pickle=True)


def save_the_state_dict_alone(root: Path) -> None:
    """The test saved the tensors alone, as safetensors; rebuilt, they answer in transformers as the originals."""
    for path in (root / "zoo").iterdir():
        loaded = torch.load(path / "pytorch_model.bin", weights_only=True)
        del loaded["epoch"]
        save_file(loaded, path / "model.safetensors", {"format": "pt"})
        (path / "pytorch_model.bin").unlink()
    assert_rebuilt(root)


def pickled_shards_without_index(root: Path) -> None:
    write_checkpoints(root)
    path = root / "zoo" / "m0" / "model.safetensors"
    tensors = list(load_file(path).items())
    for number, part in enumerate((tensors[:9], tensors[9:]), 1):
        torch.save(dict(part), path.with_name(f"pytorch_model-{number:05}-of-00002.bin"))
    path.unlink()
    ez.open_zoo(root / "zoo", allow_pickle=True)


def convert_the_shards(root: Path) -> None:
    """The test converted the model to safetensors; the rebuilt checkpoints answer in transformers as the originals."""
    folder = root / "zoo" / "m0"
    tensors = {}
    for shard in folder.glob("*.bin"):
        tensors |= torch.load(shard, weights_only=True)
        shard.unlink()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert_rebuilt(root)


def a_bundle_as_a_zoo(root: Path) -> None:
    write_checkpoints(root)
    ez.fit(root / "zoo", rank=1).save(root / "bundle")
    ez.open_zoo(root / "bundle")


def name_the_models(root: Path) -> None:
    """The test named the models that it was made from; rebuilt, they answer in transformers as the originals."""
    assert_rebuilt(root)


def shards_of_other_architectures(root: Path) -> None:
    write_checkpoints(root)
    path = root / "zoo" / "m1" / "model.safetensors"
    save_file({name[::-1]: tensor for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    ez.open_zoo(root / "zoo")


def name_models_of_one_architecture(root: Path) -> None:
    """The test named models of one architecture; rebuilt, they answer in transformers as the originals."""
    shutil.rmtree(root / "zoo" / "m1")
    shutil.copytree(root / "originals" / "m1", root / "zoo" / "m1")
    assert_rebuilt(root)
    assert answers(make_llama()).isfinite().all()


_GGUF = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def as_gguf(root: Path) -> None:
    """Write the models as llama.cpp's converter does: its names, and the halves of each head's rotary rows interleaved."""
    import gguf
    from transformers import AutoConfig

    write_checkpoints(root)
    for path in (root / "zoo").iterdir():
        config = AutoConfig.from_pretrained(path)
        heads = config.num_attention_heads
        writer = gguf.GGUFWriter(path / "model.gguf", "llama")
        writer.add_block_count(config.num_hidden_layers)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_dimension_count(config.hidden_size // heads)
        writer.add_vocab_size(config.vocab_size)
        for key, values in load_file(path / "model.safetensors").items():
            name = key.removesuffix(".weight").removeprefix("model.layers.")
            number, _, rest = name.partition(".") if name[0].isdigit() else ("", "", name)
            if rest.endswith(("q_proj", "k_proj")):
                values = values.view(heads, 2, len(values) // heads // 2, -1).transpose(1, 2).reshape(values.shape)
            block = f"blk.{number}." if number else ""
            writer.add_tensor(f"{block}{_GGUF[rest]}.weight", values.contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        (path / "model.safetensors").unlink()
    ez.open_zoo(root / "zoo")


def convert_gguf(root: Path) -> None:
    """The test converted the files in that way; the rebuilt checkpoints answer in transformers as the models before GGUF."""
    import transformers

    # Versions without the class dequantise by themselves.
    kind = getattr(transformers, "GgufConfig", None)
    settings = {} if kind is None else {"quantization_config": kind(dequantize=True)}
    for name in ("m0", "m1"):
        folder = root / "zoo" / name
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", **settings)
        model.save_pretrained(root / "converted" / name)
    assert_rebuilt(root, root / "converted")


CASES = [
    Case(
        "A GGUF file",
        as_gguf,
        ("a GGUF file", "quantization_config=GgufConfig(dequantize=True)).save_pretrained(new_folder)"),
        convert_gguf,
    ),
    Case("A shard that is missing", shard_missing, ("is missing", "ownload it"), get_the_shard),
    Case("Shards without their index", index_missing, ("but no index", "ownload the index too"), get_the_index),
    Case(
        "A file that was cut off",
        cut_off,
        ("the safetensors library refuses it", "ownload or save the file again"),
        get_it_again,
    ),
    Case(
        "A link that leads out of a model's folder",
        linked_out,
        ("leads out of the folder", "eplace the link with the file itself"),
        replace_the_link,
    ),
    Case(
        "NaN in a layer",
        with_nan,
        ("NaN or Inf", "--exclude the layer so that it is carried unchanged"),
        exclude_the_layer,
    ),
    Case(
        "A layer of another shape",
        other_shape,
        ("shape [44, 16] in m1", "--exclude 'model.embed_tokens.weight'"),
        exclude_the_shape,
    ),
    Case(
        "Checkpoints without a layer in common",
        shards_of_other_architectures,
        ("o layer is in all models", "name models of one architecture"),
        name_models_of_one_architecture,
    ),
    Case(
        "A pickle with more than tensors",
        with_arguments,
        ("argparse.Namespace", "oad it where it was made and save its state dict as safetensors"),
        save_the_state_dict,
    ),
    Case(
        "A pickle with entries that are no tensors",
        with_other_entries,
        ("the entry 'epoch' is int", "ave the state dict alone, as safetensors"),
        save_the_state_dict_alone,
    ),
    Case(
        "Pickled shards without their index",
        pickled_shards_without_index,
        ("there are pickled shards of a checkpoint, but no index", "convert the model to safetensors"),
        convert_the_shards,
    ),
    Case(
        "A bundle where a zoo is asked for",
        a_bundle_as_a_zoo,
        ("this is a bundle", "name the models it was made from"),
        name_the_models,
    ),
]
