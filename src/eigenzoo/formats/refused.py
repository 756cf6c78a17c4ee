"""Model files of other kinds, known by their ending or first bytes, so that they are refused by name with what converts them."""

from __future__ import annotations

from eigenzoo.errors import UnsupportedError

GGUF = "a GGUF file, as llama.cpp reads it"
_CONVERT = "save the model as safetensors where it comes from, and open that"

FOREIGN: dict[str, tuple[str, str]] = {
    ".gguf": (
        GGUF,
        "convert it with transformers: AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, "
        "quantization_config=GgufConfig(dequantize=True)).save_pretrained(new_folder), and open that; "
        "versions without GgufConfig dequantise by themselves",
    ),
    ".pth.lora": (
        "a file of LoRA factors, as LitGPT writes them",
        "run litgpt merge_lora and litgpt convert_from_litgpt on its folder, and open the result as a checkpoint",
    ),
    ".h5": ("an HDF5 file, as Keras and TensorFlow write it", _CONVERT),
    ".msgpack": ("a msgpack file, as Flax writes it", _CONVERT),
    ".onnx": ("an ONNX graph", _CONVERT),
}
"""Endings of files that hold models and are not read: what they are, and what to do."""

FOREIGN_NAMES = ("tf_model.h5", "flax_model.msgpack", "model.onnx", "lit_model.pth.lora")
"""By these names, and by the ending .gguf, a folder is told to be a model of another kind: other files may be anything."""

MAGIC = {b"GGUF": ".gguf", b"\x89HDF": ".h5"}


def is_foreign(name: str) -> bool:
    """Tell whether a name in a folder is that of a model of another kind."""
    return name.endswith(".gguf") or name in FOREIGN_NAMES


def refuse_foreign(name_or_magic: str | bytes, where: str) -> None:
    """Raise UnsupportedError for a file's name, or its first four bytes, that is of another kind; else do nothing."""
    if isinstance(name_or_magic, bytes):
        ending = MAGIC.get(name_or_magic)
    else:
        ending = next((ending for ending in FOREIGN if name_or_magic.endswith(ending)), None)
    if ending is None:
        return
    kind, next_step = FOREIGN[ending]
    raise UnsupportedError(
        f"this is {kind}",
        where=where,
        rule="full-precision weights are read from safetensors, and from pickles with --allow-pickle",
        next_step=next_step,
    )
