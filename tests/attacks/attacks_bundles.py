"""Bundles and adapter files: manifests that lie, JSON that only costs, parts that are damaged byte by byte."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from attack_runner import ANY, EITHER, REFUSED, SAFE, Attack, Sandbox, Words
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from victims import use_bundle

Change = Callable[[dict[str, Any]], object]


def edited(change: Change, *, thorough: bool = False) -> Callable[[Sandbox], Sequence[Words]]:
    """A bundle whose manifest says something else."""

    def build(sandbox: Sandbox) -> Sequence[Words]:
        bundle = sandbox.copy("bundle")
        document = json.loads((bundle / "manifest.json").read_text())
        change(document)
        (bundle / "manifest.json").write_text(json.dumps(document))
        return use_bundle(sandbox, bundle, thorough=thorough)

    return build


def written(text: str) -> Callable[[Sandbox], Sequence[Words]]:
    """A bundle whose manifest is this text."""

    def build(sandbox: Sandbox) -> Sequence[Words]:
        bundle = sandbox.copy("bundle")
        (bundle / "manifest.json").write_bytes(text.encode("utf-8", "surrogateescape"))
        return use_bundle(sandbox, bundle)[:1]

    return build


def honest_checksums(bundle: Path, name: str) -> None:
    """Put a changed file's checksum into the manifest, as an attacker would."""
    data = (bundle / name).read_bytes()
    document = json.loads((bundle / "manifest.json").read_text())
    document["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    if name.startswith("basis"):
        shards = sorted(file for file in document["files"] if file.startswith("basis"))
        joined = "".join(document["files"][shard]["sha256"] for shard in shards)
        document["basis_id"] = hashlib.sha256(joined.encode()).hexdigest()
    (bundle / "manifest.json").write_text(json.dumps(document))


def tensors(
    name: str, change: Callable[[dict[str, torch.Tensor]], object], kind: str = "bundle"
) -> Callable[[Sandbox], Sequence[Words]]:
    """A bundle with other tensors in a file, checksum included."""

    def build(sandbox: Sandbox) -> Sequence[Words]:
        bundle = sandbox.copy(kind)
        path = bundle / name
        found = load_file(path)
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        change(found)
        save_file(found, path, metadata)
        honest_checksums(bundle, name)
        return use_bundle(sandbox, bundle, thorough=name.startswith("moments"))

    return build


def header(name: str, entry: dict[str, Any]) -> Callable[[Sandbox], Sequence[Words]]:
    """A bundle whose file claims a tensor that it does not hold."""

    def build(sandbox: Sandbox) -> Sequence[Words]:
        bundle = sandbox.copy("bundle")
        with safe_open(bundle / name, "pt") as file:
            metadata = file.metadata()
        text = json.dumps({"__metadata__": metadata, "coefficients": entry}).encode()
        (bundle / name).write_bytes(len(text).to_bytes(8, "little") + text + bytes(64))
        honest_checksums(bundle, name)
        return use_bundle(sandbox, bundle)

    return build


def damaged(kind: str, seed: int, how: str) -> Callable[[Sandbox], Sequence[Words]]:
    """Every file of a bundle, cut or with one bit turned, one at a time."""

    def build(sandbox: Sandbox) -> Sequence[Words]:
        draw = random.Random(seed)
        commands: list[Words] = []
        source = sandbox.honest(kind)
        for number, path in enumerate(
            sorted(file for file in source.rglob("*") if file.is_file() and file.name != "README.md")
        ):
            bundle = Path(shutil.copytree(source, sandbox.files / f"{how}{number}"))
            target = bundle / path.relative_to(source)
            data = bytearray(target.read_bytes())
            if how == "cut":
                data = data[: draw.randrange(len(data))]
            else:
                data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
            target.write_bytes(bytes(data))
            commands.append(("verify", bundle))
            if number % 5 == 0:
                commands.append(("rebuild", bundle, "m1", "-o", "out"))
        return commands

    return build


def sources(path: str, file: str = "model.safetensors") -> Callable[[Sandbox], Sequence[Words]]:
    """A bundle whose models come from elsewhere, as growth and evidence read them again."""

    def build(sandbox: Sandbox) -> Sequence[Words]:
        bundle = sandbox.copy("bundle")
        document = json.loads((bundle / "manifest.json").read_text())
        for model in document["models"]:
            model["source"] = {"path": path, "files": {file: {"bytes": 0, "mtime_ns": 1, "sha256": "0" * 64}}}
        (bundle / "manifest.json").write_text(json.dumps(document))
        shutil.copytree(sandbox.honest("zoo") / "m3", sandbox.files / "new")
        return [
            ("add", bundle, sandbox.files / "new", "-o", "out"),
            ("rebuild", bundle, "m1", "-o", "out"),
        ]

    return build


def base(path: str) -> Callable[[Sandbox], Sequence[Words]]:
    """A bundle whose base is a file of the user's."""
    record = {"path": path, "files": {"x": {"bytes": 6, "mtime_ns": 1, "sha256": "0" * 64}}}
    return edited(lambda d: d.update(base=record, view="delta"), thorough=True)


def task(metadata: dict[str, str], **parts: torch.Tensor) -> Callable[[Sandbox], Sequence[Words]]:
    """An adapter file, changed."""

    def build(sandbox: Sandbox) -> Sequence[Words]:
        path = sandbox.copy("task.safetensors")
        found = load_file(path) | {name.replace("__", "."): values for name, values in parts.items()}
        with safe_open(path, "pt") as file:
            known = file.metadata()
        save_file(found, path, {**known, **metadata})
        return [("rebuild", sandbox.copy("bundle"), path, "-o", "out")]

    return build


def task_bytes(data: bytes) -> Callable[[Sandbox], Sequence[Words]]:
    """An adapter file of these bytes."""

    def build(sandbox: Sandbox) -> Sequence[Words]:
        path = sandbox.files / "task.safetensors"
        path.write_bytes(data)
        return [("rebuild", sandbox.copy("bundle"), path, "-o", "out")]

    return build


def model(change: Change) -> Change:
    """Change the first model's record."""
    return lambda document: change(document["models"][0])


def unlisted(sandbox: Sandbox) -> Sequence[Words]:
    """A file that the manifest does not name, whose name says that all is well."""
    bundle = sandbox.copy("bundle")
    (bundle / "x\nbundle: 4 models, 2 layers, whole\ny").write_text("")
    return [("verify", bundle)]


def one_line(sandbox: Sandbox) -> None:
    """A verdict that a name forges would stand on a line of its own."""
    (ran,) = sandbox.ran
    assert ran.code == 1
    assert [line for line in ran.out.splitlines() if line.endswith("whole")] == []


FILES: dict[str, Change] = {
    "a file above": lambda d: d["files"].update({"../../secret.txt": d["files"]["basis.safetensors"]}),
    "an absolute file": lambda d: d["files"].update({"/etc/passwd": d["files"]["basis.safetensors"]}),
    "coefficients above": model(lambda m: m.update(coefficients="../../secret.txt")),
    "coefficients by an absolute path": model(lambda m: m.update(coefficients="/etc/passwd")),
    "a layout above": model(lambda m: m.update(layout="../../../secret")),
    "a side file above": model(lambda m: m.update(side_files={"../../../evil.json": "0" * 32})),
    "a side file above a module": model(lambda m: m.update(side_files={"1_Pooling/../../evil.json": "0" * 32})),
    "a side file below a module": model(lambda m: m.update(side_files={"1_Pooling/x/config.json": "0" * 32})),
    "a program in a module's folder": model(lambda m: m.update(side_files={"1_Pooling/evil.py": "0" * 32})),
    "a pickle in a module's folder": model(lambda m: m.update(side_files={"2_Dense/pytorch_model.bin": "0" * 32})),
    "names that a terminal acts on, not carried": model(
        lambda m: m.update(not_carried=["\x1b]52;c;YQ==\x07", "<script>alert(1)</script>", "../../../evil.json"])
    ),
    "a million names that are not carried": model(lambda m: m.update(not_carried=["n"] * 10**6)),
    "a side file that is a program": model(lambda m: m.update(side_files={"evil.py": "0" * 32})),
    "a version of the future": lambda d: d.update(schema_version=3, new={}),
    "a version of 10^300": lambda d: d.update(schema_version=10**300),
    "a version that is a text": lambda d: d.update(schema_version="1"),
    "NaN": lambda d: d["report"].update(energy=float("nan")),
    "numbers of 1e308": lambda d: d["report"]["bytes"].update(zoo=10**308),
    "a text of ten megabytes": lambda d: d.update(eigenzoo_version="1" * 10**7),
    "a name of ten megabytes": model(lambda m: m.update(name="n" * 10**7)),
    "a layer of 2^40 values": lambda d: d["layers"][0].update(shape=[2**20, 2**20], tensor_shape=[2**20, 2**20]),
    "a layer of 10^18 values": lambda d: d["layers"][0].update(shape=[10**9, 10**9], tensor_shape=[10**18]),
    "ranks of 10^12": lambda d: d["layers"][0].update(ranks={"models": 10**12}),
    "a hundred thousand layers": lambda d: d.update(
        layers=[{**d["layers"][0], "name": str(n)} for n in range(100_000)]
    ),
    "names that are escapes": lambda d: d["layers"][0].update(name="\x1b]52;c;ZXZpbA==\x07\n<script>"),
    "keys that are escapes": lambda d: d.update({"\x1b[2J\nfault: none": 1}),
    "no layers": lambda d: d.update(layers=[], discarded={}),
    "no models": lambda d: d.update(models=[]),
}

HARMLESS = {"no models", "numbers of 1e308", "names that a terminal acts on, not carried"}
"""What breaks no rule."""

TEXTS = {
    "nested without end": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "60 MB of brackets": '{"a": [' + "[]," * 20 * 10**6 + "[]]}",
    "70 MB": '{"a": "' + "x" * 70 * 2**20 + '"}',
    "a number of a million digits": '{"schema_version": ' + "9" * 10**6 + "}",
    "a key twice": '{"schema_version": 1, "schema_version": 1}',
    "half a surrogate": '{"schema_version": "\\ud800"}',
    "empty": "",
    "a list": "[]",
    "no UTF-8": "\udcff",
}

PARTS: dict[str, tuple[str, Callable[[dict[str, torch.Tensor]], object], frozenset[int]]] = {
    "NaN in the basis": ("basis.safetensors", lambda t: t["block.weight/models"].fill_(float("nan")), ANY),
    "a basis of another shape": (
        "basis.safetensors",
        lambda t: t.update({"block.weight/models": torch.zeros(2, 3)}),
        ANY - SAFE,
    ),
    "a basis of integers": (
        "basis.safetensors",
        lambda t: t.update({"block.weight/models": torch.zeros(2, 8, 7).int()}),
        ANY,
    ),
    "a basis that is missing": ("basis.safetensors", lambda t: t.pop("block.weight/models"), ANY - SAFE),
    "coefficients of another length": (
        "coefficients/m0.safetensors",
        lambda t: t.update(coefficients=torch.zeros(10**6)),
        ANY,
    ),
    "coefficients that are infinite": (
        "coefficients/m0.safetensors",
        lambda t: t["coefficients"].fill_(float("inf")),
        ANY,
    ),
    "a residual that is NaN": ("coefficients/m0.safetensors", lambda t: t["residual"].fill_(float("nan")), ANY),
    "moments of another shape": (
        "moments.safetensors",
        lambda t: t.update({"block.weight/gram": torch.zeros(2, 2).double()}),
        ANY,
    ),
    "moments that are NaN": ("moments.safetensors", lambda t: t["block.weight/gram"].fill_(float("nan")), ANY),
}

W = "block.weight/models"

CODES: dict[str, tuple[str, Callable[[dict[str, torch.Tensor]], object]]] = {
    "scales that are NaN": ("basis.safetensors", lambda t: t[f"{W}.scale"].fill_(float("nan"))),
    "scales below zero": ("basis.safetensors", lambda t: t[f"{W}.scale"].neg_()),
    "scales that are zero": ("basis.safetensors", lambda t: t[f"{W}.scale"].zero_()),
    "no scales": ("basis.safetensors", lambda t: t.pop(f"{W}.scale")),
    "more scales": ("basis.safetensors", lambda t: t.update({f"{W}.scale": torch.ones(99).bfloat16()})),
    "scales in float64": ("basis.safetensors", lambda t: t.update({f"{W}.scale": t[f"{W}.scale"].double()})),
    "fewer codes": ("basis.safetensors", lambda t: t.update({W: t[W][1:].clone()})),
    "codes that are one": ("basis.safetensors", lambda t: t[W].fill_(0)),
    "codes in eight bits": ("basis.safetensors", lambda t: t.update({W: t[W].to(torch.int8)})),
    "directions in float32": ("basis.safetensors", lambda t: t.update({W: torch.eye(2, 56).view(2, 8, 7)})),
    "coefficients in float32": (
        "coefficients/m0.safetensors",
        lambda t: t.update(coefficients=t["coefficients"].float()),
    ),
    "coefficients in bfloat16": (
        "coefficients/m0.safetensors",
        lambda t: t.update(coefficients=t["coefficients"].bfloat16()),
    ),
}

TASKS: dict[str, Callable[[Sandbox], Sequence[Words]]] = {
    "other coefficients": task({}, coefficients=torch.zeros(10**6)),
    "NaN": task({}, coefficients=torch.full((4,), float("nan"))),
    "half precision": task({}, coefficients=torch.zeros(4).half()),
    "another basis": task({"basis": "0" * 64}),
    "no format": task({"format": "\x1b[2J"}),
    "names that are no table": task({"names": "[[[["}),
    "names nested without end": task({"names": '{"a":' * 100_000 + "1" + "}" * 100_000}, besides__x=torch.zeros(1)),
    "classes nested without end": task({"classes": "[" * 100_000}),
    "classes that are no list": task({"classes": '{"a": 1}'}),
    "a tensor of nowhere": task({}, besides__evil=torch.zeros(3)),
    "random directions without number": task({"augment": "9" * 5000, "augment_seed": "0"}),
    "random directions of a billion": task({"augment": "999999", "augment_seed": "0"}),
    "negative random directions": task({"augment": "-1", "augment_seed": "-1"}),
    "cut": task_bytes(b"\x00" * 4),
    "a header of 2^63": task_bytes((2**63).to_bytes(8, "little") + b"{}"),
    "a pickle": task_bytes(b"\x80\x04cos\nsystem\n."),
}

ATTACKS = [
    *(
        Attack(
            f"manifest: {what}",
            edited(change, thorough=what == "a file above"),
            ANY if what in HARMLESS else ANY - SAFE,
        )
        for what, change in FILES.items()
    ),
    *(Attack(f"manifest's text: {what}", written(text), REFUSED) for what, text in TEXTS.items()),
    *(
        Attack(f"bundle's tensors: {what}", tensors(name, change), codes | {2})
        for what, (name, change, codes) in PARTS.items()
    ),
    *(
        Attack(f"quantised bundle: {what}", tensors(name, change, "quantised_bundle"), ANY - SAFE)
        for what, (name, change) in CODES.items()
    ),
    *(
        Attack(f"coefficients' header: {what}", header("coefficients/m0.safetensors", entry))
        for what, entry in {
            "2^62 values": {"dtype": "F32", "shape": [2**62], "data_offsets": [0, 2**64]},
            "a terabyte": {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]},
            "sizes that overflow": {"dtype": "F32", "shape": [2**32, 2**32], "data_offsets": [0, 64]},
        }.items()
    ),
    *(
        Attack(f"{kind}, every file: {how}", damaged(kind, seed, how), ANY)
        for seed, kind in enumerate(("bundle", "adapters_bundle", "tucker_bundle", "quantised_bundle"))
        for how in ("cut", "turned")
    ),
    *(
        Attack(f"sources: {path[:20]}", sources(path, file), EITHER)
        for path, file in (
            ("/dev", "zero"),
            ("../../secret.txt", "secret.txt"),
            ("/proc/self", "environ"),
            ("\x1b[2J", "x"),
            ("a\0b", "x"),
            ("http://127.0.0.1:9/x", "x"),
            ("file:///etc", "passwd"),
            ("x" * 1000, "x"),
            ("~/diary.txt", "x"),
        )
    ),
    *(
        Attack(f"base: {path}", base(path), ANY)
        for path in ("../../secret.txt", "/dev/zero", "http://127.0.0.1:9/x", "a\0b")
    ),
    *(Attack(f"adapter file: {what}", build, REFUSED) for what, build in TASKS.items()),
    Attack("verify: a file whose name says that all is well", unlisted, ANY - SAFE, after=one_line),
]
