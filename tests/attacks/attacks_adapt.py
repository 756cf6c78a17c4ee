"""`eigenzoo adapt`: models that transformers would run, configs that build giants, data that only cost."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from attack_runner import EITHER, REFUSED, SAFE, Attack, Sandbox, Words
from attacks_configs import CANARY_MODULE
from attacks_pickle import torch_pickle
from pickle_programs import Canary

Spoil = Callable[[Sandbox, Path], object]
QUICKLY = ("--steps", 2, "--batch-size", 4, "--besides", "classifier.*")


def text_model(spoil: Spoil) -> Callable[[Sandbox], Sequence[Words]]:
    """A classifier of texts, spoilt, as the model that is adapted."""

    def build(sandbox: Sandbox) -> Sequence[Words]:
        model = sandbox.copy("texts_zoo") / "m0"
        spoil(sandbox, model)
        data = sandbox.copy("texts") / "texts.csv"
        return [("adapt", sandbox.copy("texts_bundle"), data, "--model", model, *QUICKLY, "-o", "out.safetensors")]

    return build


def image_model(spoil: Spoil) -> Callable[[Sandbox], Sequence[Words]]:
    """A classifier of images, spoilt, or its images."""

    def build(sandbox: Sandbox) -> Sequence[Words]:
        model, data = sandbox.copy("pictures_zoo") / "m0", sandbox.copy("pictures")
        spoil(sandbox, model)
        return [("adapt", sandbox.copy("pictures_bundle"), data, "--model", model, *QUICKLY, "-o", "out.safetensors")]

    return build


def texts(file: str, data: bytes) -> Callable[[Sandbox], Sequence[Words]]:
    """Data of these bytes."""

    def build(sandbox: Sandbox) -> Sequence[Words]:
        path = sandbox.files / file
        path.write_bytes(data)
        model = sandbox.copy("texts_zoo") / "m0"
        return [("adapt", sandbox.copy("texts_bundle"), path, "--model", model, *QUICKLY, "-o", "out.safetensors")]

    return build


def edit(file: str, **changes: Any) -> Spoil:
    """Change entries of a config."""

    def spoil(sandbox: Sandbox, model: Path) -> None:
        path = model / file
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**known, **changes}))

    return spoil


def module(file: str, **changes: Any) -> Spoil:
    """A config that names a module beside it."""

    def spoil(sandbox: Sandbox, model: Path) -> None:
        (model / "evil.py").write_text(CANARY_MODULE.format(canary=str(sandbox.canary)))
        edit(file, **changes)(sandbox, model)

    return spoil


def pickled(keep: bool, file: str = "pytorch_model.bin") -> Spoil:
    """Pickled weights beside the others, or in their place."""

    def spoil(sandbox: Sandbox, model: Path) -> None:
        torch_pickle(sandbox, model / file)
        if not keep:
            (model / "model.safetensors").unlink()

    return spoil


def adapter_within(sandbox: Sandbox, model: Path) -> None:
    """A checkpoint with an adapter's config, which transformers follows to another folder: there lie pickles."""
    other = sandbox.files / "other"
    other.mkdir()
    (other / "config.json").write_text((model / "config.json").read_text())
    torch_pickle(sandbox, other / "pytorch_model.bin")
    adapter = sandbox.copy("adapters") / "m0"
    (model / "adapter_model.safetensors").write_bytes((adapter / "adapter_model.safetensors").read_bytes())
    config = json.loads((adapter / "adapter_config.json").read_text())
    (model / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(other)}))


def png(width: int, height: int) -> bytes:
    """A grey image of any size in a few kilobytes."""
    line = zlib.compressobj(9)
    rows = line.compress(bytes((width + 1) * min(height, 200)))
    for _ in range(height // 200 - 1):
        rows += line.compress(bytes((width + 1) * 200))
    rows += line.flush()

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def pictures(data: Callable[[Path], object], names: Sequence[str] = ("0.png",)) -> Spoil:
    """Other files in the place of images."""

    def spoil(sandbox: Sandbox, model: Path) -> None:
        for name in names:
            path = sandbox.copy("pictures") / "dark" / name
            path.unlink(missing_ok=True)
            data(path)

    return spoil


def loader(sandbox: Sandbox) -> Sequence[Words]:
    """A folder of data with a loading script of its own name."""
    data = sandbox.copy("texts")
    for name in ("texts.py", "dataset_infos.json", "README.md"):
        (data / name).write_text(CANARY_MODULE.format(canary=str(sandbox.canary)))
    (data / "texts.csv").rename(data / "train.csv")
    model = sandbox.copy("texts_zoo") / "m0"
    return [("adapt", sandbox.copy("texts_bundle"), data, "--model", model, *QUICKLY, "-o", "out.safetensors")]


def start_from(spoil: Callable[[Sandbox, Path], object]) -> Callable[[Sandbox], Sequence[Words]]:
    """A start that is somebody's file."""

    def build(sandbox: Sandbox) -> Sequence[Words]:
        start = sandbox.files / "start.safetensors"
        spoil(sandbox, start)
        model, data = sandbox.copy("texts_zoo") / "m0", sandbox.copy("texts") / "texts.csv"
        words = ("--model", model, *QUICKLY, "--start", start, "-o", "out.safetensors")
        return [("adapt", sandbox.copy("texts_bundle"), data, *words)]

    return build


MANY = tuple(f"{number}.png" for number in range(40))
SIZES = {
    "layers": {"num_hidden_layers": 10**8},
    "width": {"hidden_size": 2**20, "num_attention_heads": 1},
    "depth between": {"intermediate_size": 2**40},
    "words": {"vocab_size": 10**9},
    "places": {"max_position_embeddings": 10**10},
    "places of a few gigabytes": {"max_position_embeddings": 10**9},
    "heads": {"num_attention_heads": 10**9},
    "classes": {"id2label": {str(number): str(number) for number in range(20_000)}, "num_labels": 20_000},
    "a negative size": {"hidden_size": -8},
    "a text as a size": {"hidden_size": "8"},
}

ATTACKS = [
    Attack("adapt: sound texts, as the control", text_model(lambda box, model: None), SAFE, adapt=True),
    Attack("adapt: sound images, as the control", image_model(lambda box, model: None), SAFE, adapt=True),
    Attack("adapt: pickled weights in their place", text_model(pickled(False)), REFUSED, adapt=True),
    Attack("adapt: pickled weights beside", text_model(pickled(True)), EITHER, adapt=True),
    Attack(
        "adapt: a pickle called model.safetensors", text_model(pickled(True, "model.safetensors")), REFUSED, adapt=True
    ),
    Attack("adapt: an adapter's config beside", text_model(adapter_within), REFUSED, adapt=True),
    Attack(
        "adapt: code of a config of a known kind",
        text_model(
            module(
                "config.json",
                auto_map={"AutoConfig": "evil.Config", "AutoModelForSequenceClassification": "evil.Model"},
            )
        ),
        EITHER,
        adapt=True,
    ),
    Attack(
        "adapt: code of a config of an unknown kind",
        text_model(
            module("config.json", model_type="evil", auto_map={"AutoConfig": "evil.Config"}, trust_remote_code=True)
        ),
        adapt=True,
    ),
    Attack(
        "adapt: code of a tokenizer",
        text_model(
            module(
                "tokenizer_config.json",
                tokenizer_class="Evil",
                auto_map={"AutoTokenizer": ["evil.Model", "evil.Model"]},
            )
        ),
        EITHER,
        adapt=True,
    ),
    Attack(
        "adapt: code of an image processor",
        image_model(
            module(
                "preprocessor_config.json", image_processor_type="Evil", auto_map={"AutoImageProcessor": "evil.Model"}
            )
        ),
        EITHER,
        adapt=True,
    ),
    Attack(
        "adapt: quantised by a library",
        text_model(edit("config.json", quantization_config={"quant_method": "awq"})),
        adapt=True,
    ),
    Attack(
        "adapt: attention by a kernel of the hub",
        text_model(edit("config.json", _attn_implementation="evil/kernel")),
        EITHER,
        adapt=True,
    ),
    *(
        Attack(
            f"adapt: a config of many {what}",
            text_model(edit("config.json", **sizes)),
            EITHER if what == "classes" else REFUSED,
            adapt=True,
        )
        for what, sizes in SIZES.items()
    ),
    Attack(
        "adapt: a tokenizer that is a pickle",
        text_model(lambda box, model: (model / "tokenizer.json").write_bytes(pickle.dumps(Canary(box.canary)))),
        adapt=True,
    ),
    Attack(
        "adapt: a template that runs code",
        text_model(
            lambda box, model: (model / "chat_template.jinja").write_text(
                "{{ cycler.__init__.__globals__.os.system('true') }}"
            )
        ),
        SAFE,
        adapt=True,
    ),
    Attack(
        "adapt: images of a terabyte asked for",
        image_model(edit("preprocessor_config.json", size={"height": 10**6, "width": 10**6})),
        adapt=True,
    ),
    Attack(
        "adapt: images of 20000 × 20000 asked for",
        image_model(edit("preprocessor_config.json", size={"height": 20000, "width": 20000})),
        adapt=True,
    ),
    Attack("adapt: images of no size", image_model(edit("preprocessor_config.json", size={"height": "x"})), adapt=True),
    Attack(
        "adapt: an image of 10^10 points",
        image_model(
            pictures(
                lambda path: path.write_bytes(
                    png(100_000, 200)[:-20].replace(
                        struct.pack(">II", 100_000, 200), struct.pack(">II", 100_000, 100_000)
                    )
                )
            )
        ),
        adapt=True,
    ),
    Attack(
        "adapt: an image of 80 million points",
        image_model(pictures(lambda path: path.write_bytes(png(10_000, 8_000)))),
        adapt=True,
    ),
    Attack(
        "adapt: forty images of 4 million points",
        image_model(pictures(lambda path: path.write_bytes(png(2000, 2000)), MANY)),
        EITHER,
        adapt=True,
    ),
    Attack(
        "adapt: an image that is a link to a device",
        image_model(pictures(lambda path: path.symlink_to("/dev/zero"))),
        adapt=True,
    ),
    Attack("adapt: an image that is a pipe", image_model(pictures(os.mkfifo)), adapt=True),
    Attack(
        "adapt: an image that is a program",
        image_model(pictures(lambda path: path.write_bytes(b"%!PS\n(touch) run"))),
        adapt=True,
    ),
    Attack(
        "adapt: a class whose name is an escape",
        image_model(
            lambda box, model: (box.copy("pictures") / "dark").rename(box.copy("pictures") / "\x1b]0;x\x07\ny")
        ),
        EITHER,
        adapt=True,
    ),
    Attack("adapt: a loading script beside the data", loader, EITHER, adapt=True),
    Attack("adapt: data that is a pickle", texts("evil.csv", pickle.dumps({"text": "x"})), adapt=True),
    Attack("adapt: data without columns", texts("evil.jsonl", b'{"a": 1}\n'), adapt=True),
    Attack("adapt: data nested without end", texts("evil.json", b"[" * 100_000 + b"]" * 100_000), adapt=True),
    Attack("adapt: data that is no table", texts("evil.parquet", b"PAR1" + bytes(100) + b"PAR1"), adapt=True),
    Attack(
        "adapt: data of a formula and escapes",
        texts("evil.csv", b"text,label\n\x1b[2J,=cmd()\n" * 4),
        EITHER,
        adapt=True,
    ),
    Attack("adapt: data that is a zip file", texts("evil.csv", b"PK\x03\x04" + bytes(100)), adapt=True),
    Attack(
        "adapt: a text of a million words",
        texts("evil.csv", b"text,label\n" + b"film " * 10**6 + b",good\nbad film,bad\n" * 4),
        EITHER,
        adapt=True,
    ),
    Attack(
        "adapt: a start that is a pickle",
        start_from(lambda box, path: path.write_bytes(pickle.dumps(Canary(box.canary)))),
        adapt=True,
    ),
    Attack("adapt: a start that is a pipe", start_from(lambda box, path: os.mkfifo(path)), adapt=True),
]
