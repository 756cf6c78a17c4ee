"""`eigenzoo import`: folders of vLoRA, and adapters of components and loadings."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from attack_runner import EITHER, SAFE, Attack, Sandbox, Words
from attacks_names import SCRIPT
from attacks_paths import PLACES
from attacks_pickle import torch_pickle
from safetensors.torch import load_file, save_file

META, VALUES = "subspace_meta.json", "subspace.safetensors"
ALPHA = ("--alpha", 2, "-o", "out")
Tensors = dict[str, torch.Tensor]


def meta(**changes: Any) -> Callable[[Sandbox], Sequence[Words]]:
    """A folder of vLoRA with other entries in what describes it."""
    return text(lambda document: json.dumps({**document, **changes}))


def text(write: Callable[[dict[str, Any]], str]) -> Callable[[Sandbox], Sequence[Words]]:
    """The same with another text."""

    def build(sandbox: Sandbox) -> Sequence[Words]:
        folder = sandbox.copy("vlora")
        path = folder / META
        path.write_text(write(json.loads(path.read_text())))
        return [("import", folder, *ALPHA)]

    return build


def renamed(name: str) -> Callable[[Sandbox], Sequence[Words]]:
    """A task and a layer of this name, everywhere."""

    def build(sandbox: Sandbox) -> Sequence[Words]:
        folder = sandbox.copy("vlora")
        for path in folder.glob("*.safetensors"):
            save_file({key.replace("block.q", name): old for key, old in load_file(path).items()}, path)
        document = json.loads((folder / META).read_text())
        document["layer_names"] = [name if layer == "block.q" else layer for layer in document["layer_names"]]
        for key in ("shapes_a", "shapes_b"):
            document[key][name] = document[key].pop("block.q")
        document |= {"task_ids": [name, "y"], "task_filenames": {name: "x", "y": "y"}}
        (folder / META).write_text(json.dumps(document))
        return [("import", folder, *ALPHA)]

    return build


def tensors(
    kind: str, file: str, edit: Callable[[Tensors], object], *words: object
) -> Callable[[Sandbox], Sequence[Words]]:
    """Other tensors in one of the files."""

    def build(sandbox: Sandbox) -> Sequence[Words]:
        folder = sandbox.copy(kind)
        held = load_file(folder / file)
        edit(held)
        save_file(held, folder / file, {"format": "pt"})
        return [("import", folder, *(words or ALPHA))]

    return build


def placed(kind: str, file: str, put: Callable[[Sandbox, Path], object]) -> Callable[[Sandbox], Sequence[Words]]:
    """Something else in the place of a file."""

    def build(sandbox: Sandbox) -> Sequence[Words]:
        folder = sandbox.copy(kind)
        (folder / file).unlink()
        put(sandbox, folder / file)
        return [("import", (folder / file).parent, *ALPHA)]

    return build


def huge_header(kind: str, file: str, shape: Sequence[int]) -> Callable[[Sandbox], Sequence[Words]]:
    """A sparse file whose first tensor is said to have this shape, and as many bytes as that needs."""

    def build(sandbox: Sandbox) -> Sequence[Words]:
        path = sandbox.copy(kind) / file
        held = load_file(path)
        first = next(name for name in held if "components" in name)
        header: dict[str, Any] = {}
        position = 0
        for name, values in held.items():
            sizes = list(shape) if name == first else list(values.shape)
            stop = position + 4 * int(torch.tensor(sizes).prod())
            header[name] = {"dtype": "F32", "shape": sizes, "data_offsets": [position, stop]}
            position = stop
        data = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(data)) + data)
        os.truncate(path, 8 + len(data) + position)
        return [("import", sandbox.files / kind, *ALPHA)]

    return build


def claim_more(document: dict[str, Any]) -> str:
    """Shapes of a terabyte, which the tensors do not have."""
    document["shapes_a"] = {name: [2, 2**38] for name in document["layer_names"]}
    return json.dumps(document)


def many_tasks(document: dict[str, Any]) -> str:
    """Two hundred thousand tasks that all are one link away from each other."""
    names = [f"t{number}" for number in range(200_000)]
    return json.dumps({**document, "task_ids": names, "task_filenames": {}})


def many_layers(document: dict[str, Any]) -> str:
    """Three hundred thousand layers, of which the files know two."""
    names = [f"layer{number}" for number in range(300_000)]
    return json.dumps({**document, "layer_names": names, "shapes_a": None, "shapes_b": None})


def pickled(*flags: str) -> Callable[[Sandbox], Sequence[Words]]:
    """A pickle in the place of an adapter's file, and of the components."""

    def build(sandbox: Sandbox) -> Sequence[Words]:
        folder = sandbox.copy("components")
        (folder / "x" / "adapter_model.safetensors").unlink()
        torch_pickle(sandbox, folder / "x" / "adapter_model.bin")
        torch_pickle(sandbox, sandbox.files / "lola_components.pt")
        parts = ("--components", sandbox.files / "lola_components.pt")
        return [("import", folder, *ALPHA, *flags), ("import", folder / "y", *parts, *ALPHA, *flags)]

    return build


def components_at(name: str) -> Callable[[Sandbox], Sequence[Words]]:
    """A file of components that is something else."""

    def build(sandbox: Sandbox) -> Sequence[Words]:
        os.mkfifo(sandbox.files / "pipe")
        path = sandbox.files / "pipe" if name == "a pipe" else sandbox.secret if name == "a secret" else name
        return [("import", sandbox.copy("components"), "--components", path, *ALPHA)]

    return build


def like(config: str | None, target: str = "") -> Callable[[Sandbox], Sequence[Words]]:
    """What the adapters are to be like."""

    def build(sandbox: Sandbox) -> Sequence[Words]:
        path = sandbox.files / "adapter_config.json"
        if config is not None:
            path.write_text(config)
        elif target == "a pipe":
            os.mkfifo(path)
        else:
            path.symlink_to(target)
        return [("import", sandbox.copy("vlora"), "--like", path, "-o", "out")]

    return build


def fill(value: float, part: str) -> Callable[[Tensors], object]:
    """One value wherever the name holds this part."""
    return lambda held: [old.fill_(value) for name, old in held.items() if part in name]


def put(name: str, values: torch.Tensor) -> Callable[[Tensors], object]:
    """Put another tensor in the place of one."""
    return lambda held: held.update({name: values})


LORA = '{"peft_type": "LORA", "r": 2, "lora_alpha": 4'
STEM = "base_model.model.block.q.subspaceadapter_A"
ADAPTER = "x/adapter_model.safetensors"
NAMES = {
    "..": "../../../etc/passwd",
    "absolute": "/etc/passwd",
    "escapes": "\x1b]52;c;YQ==\x07\x1b[2J",
    "HTML": SCRIPT,
    "lines": "a\nfault: none",
    "half a character": "\ud800",
    "900 characters": "n" * 900,
    "10^5 characters": "n" * 10**5,
    "turned text": "\u202egnp",
    "a manifest": "manifest.json",
}

ATTACKS = [
    Attack("import: vLoRA, sound, as the control", meta(), SAFE),
    Attack("import: components, sound, as the control", tensors("components", ADAPTER, lambda held: None), SAFE),
    *(
        Attack(f"import: names of tasks and layers: {what}", renamed(name), EITHER)
        for what, name in NAMES.items()
        if what != "half a character"
    ),
    *(
        Attack(f"import: a task's file: {what}", meta(task_filenames={"x": f"/../{name}", "y": "y"}))
        for what, name in NAMES.items()
    ),
    Attack("import: a task of half a character", meta(task_ids=["\ud800", "y"])),
    Attack("import: 200,000 tasks", text(many_tasks)),
    Attack("import: 300,000 layers", text(many_layers)),
    Attack("import: shapes of a terabyte", text(claim_more)),
    Attack("import: shapes of texts", meta(shapes_a={"block.q": ["\x1b[2J", 4], "block.v": [2, 6]})),
    Attack("import: shapes of 10^6 axes", meta(shapes_a={"block.q": [1] * 10**6, "block.v": [2, 6]})),
    Attack("import: shapes of 10^400", meta(shapes_a={"block.q": [2, 10**400], "block.v": [2, 6]})),
    Attack("import: shapes below zero", meta(shapes_a={"block.q": [-2, -4], "block.v": [2, 6]})),
    Attack("import: a rank of zero", meta(shapes_a=None, shapes_b=None, rank=0)),
    Attack("import: 10^12 components", meta(num_components=10**12, format="nf4_packed", nf4_block_size=2**40)),
    Attack("import: packed components that are not there", meta(format="nf4_packed")),
    Attack("import: a format of escapes", meta(format="\x1b[2J")),
    Attack("import: tasks twice", meta(task_ids=["x", "x"])),
    Attack("import: tasks that are objects", meta(task_ids=[{"a": 1}, []])),
    Attack("import: nested without end", text(lambda document: '{"a":' * 100_000 + "1" + "}" * 100_000)),
    Attack("import: 60 MB of brackets", text(lambda document: '{"a": [' + "[]," * 20 * 10**6 + "[]]}")),
    Attack("import: 80 MB of text", text(lambda document: '{"a": "' + "x" * 80 * 2**20 + '"}')),
    Attack("import: a key twice", text(lambda document: '{"layer_names": [], "layer_names": ["a"]}')),
    Attack("import: no JSON", text(lambda document: "\0" * 1000)),
    *(
        Attack(f"import: in the place of {file}: {what}", placed(kind, file, put_there))
        for kind, file in (("vlora", META), ("vlora", VALUES), ("vlora", "task_x.safetensors"), ("components", ADAPTER))
        for what, put_there in PLACES.items()
        if what not in ("a link out of the folder", "a socket")
    ),
    *(
        Attack(f"import: {what} in {part}", tensors(kind, file, fill(value, part)))
        for kind, file, part in (
            ("vlora", VALUES, "components"),
            ("vlora", VALUES, "mean"),
            ("vlora", "task_x.safetensors", "loadings"),
            ("components", ADAPTER, "components"),
            ("components", ADAPTER, "loadings"),
        )
        for what, value in (("NaN", float("nan")), ("infinity", float("inf")))
    ),
    Attack("import: 3e38 in loadings", tensors("vlora", "task_x.safetensors", fill(3e38, "loadings")), EITHER),
    Attack(
        "import: 1e308 in loadings",
        tensors(
            "components",
            ADAPTER,
            lambda held: held.update({f"{STEM}.loadings": torch.full((2, 2), 1e308, dtype=torch.float64)}),
        ),
        EITHER,
    ),
    Attack("import: no directions but zeros", tensors("vlora", VALUES, fill(0.0, "components")), EITHER),
    Attack(
        "import: components of no size", tensors("components", ADAPTER, put(f"{STEM}.components", torch.ones(0, 2)))
    ),
    Attack("import: loadings of no size", tensors("components", ADAPTER, put(f"{STEM}.loadings", torch.ones(2, 0)))),
    Attack(
        "import: loadings of integers", tensors("components", ADAPTER, put(f"{STEM}.loadings", torch.ones(2, 2).int()))
    ),
    Attack(
        "import: components under two names",
        tensors("components", ADAPTER, put(f"{STEM}.components.weight", torch.eye(4)[:, :2].contiguous())),
    ),
    Attack(
        "import: modules of 50,000 dots",
        tensors("components", ADAPTER, put("a." * 50_000 + "subspaceadapter_A.loadings", torch.ones(2, 2))),
    ),
    Attack(
        "import: a name that ends as a factor over and over",
        tensors("components", ADAPTER, put("a.eigenlora_A.loadings" * 2000 + "x", torch.ones(2, 2))),
        EITHER,
    ),
    Attack(
        "import: another tensor with the name of a factor",
        tensors("components", ADAPTER, put("base_model.model.block.q.lora_A.weight", torch.ones(2, 2))),
    ),
    Attack(
        "import: other tensors of hostile names",
        tensors("components", ADAPTER, lambda held: held.update({f"../{SCRIPT}\x1b[2J": torch.ones(1)})),
        EITHER,
    ),
    *(
        Attack(f"import: a header of {what} in {kind}", huge_header(kind, file, shape))
        for kind, file in (("vlora", VALUES), ("components", ADAPTER))
        for what, shape in {"a terabyte": (2**19, 2**19), "two gigabytes": (2, 2**28)}.items()
    ),
    Attack(
        "import: a file of a header alone", placed("vlora", VALUES, lambda box, path: path.write_bytes(b"\xff" * 8))
    ),
    Attack("import: pickles without permission", pickled(), says="pickle"),
    Attack("import: pickles with permission", pickled("--allow-pickle")),
    *(
        Attack(f"import: components at {name}", components_at(name))
        for name in ("a pipe", "a secret", "/dev/zero", "/dev/stdin")
    ),
    *(
        Attack(f"import: like {what}", like(config), EITHER)
        for what, config in {
            "alpha NaN": LORA.replace("4", "NaN") + "}",
            "a slow pattern": LORA + ', "alpha_pattern": {"(b+)+$": 4}}',
            "a rank of 10^9": LORA.replace('"r": 2', '"r": 1000000000') + "}",
            "a config of escapes": LORA + ', "modules_to_save": ["\\u001b[2J", "' + SCRIPT.replace('"', "") + '"]}',
            "a base of escapes": LORA + ', "base_model_name_or_path": "\\u001b[2J"}',
            "nested without end": '{"a":' * 100_000 + "1" + "}" * 100_000,
            "a megabyte of modules to save": LORA + ', "modules_to_save": ["' + "x" * 10**6 + '"]}',
        }.items()
    ),
    *(
        Attack(f"import: like {name}", like(None, name))
        for name in ("a pipe", "/dev/zero", "/dev", "adapter_config.json")
    ),
    *(
        Attack(
            f"import: alpha {value}",
            lambda box, value=value: [("import", box.copy("vlora"), f"--alpha={value}", "-o", "out")],
            EITHER,
        )
        for value in ("nan", "-1", "inf", "1e308", "0")
    ),
]
