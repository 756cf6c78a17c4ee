"""LoRAs of diffusion models, and diffusers' pipelines."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from attack_runner import ANY, EITHER, REFUSED, SAFE, Attack, Sandbox, Words
from attacks_configs import PATTERNS
from attacks_names import SCRIPT
from attacks_paths import PLACES
from attacks_pickle import torch_pickle
from safetensors import safe_open
from safetensors.torch import load_file, save_file

STEM = "lora_unet_mid_block_attentions_0_proj_in"
DOWN, UP, ALPHA = f"{STEM}.lora_down.weight", f"{STEM}.lora_up.weight", f"{STEM}.alpha"
METADATA = "lora_adapter_metadata"
Tensors = dict[str, torch.Tensor]


def use_lora(sandbox: Sandbox, file: Path) -> list[Words]:
    """One LoRA of a zoo: looked at, and fitted with the others."""
    return [("inspect", file), ("fit", *sorted(file.parent.glob("*.safetensors")), "-o", "out", "--rank", 1)]


def lora(edit: Callable[[Tensors], object], **strings: str) -> Callable[[Sandbox], Sequence[Words]]:
    """A zoo by kohya's keys, one of whose files has other tensors or strings."""

    def build(sandbox: Sandbox) -> Sequence[Words]:
        file = sandbox.copy("kohya") / "m3.safetensors"
        held = load_file(file)
        edit(held)
        save_file(held, file, {"format": "pt", **strings})
        return use_lora(sandbox, file)

    return build


def all_of_them(edit: Callable[[Tensors], object]) -> Callable[[Sandbox], Sequence[Words]]:
    """A zoo whose files all have been changed in the same way; one is rebuilt from its bundle, the names in it."""

    def build(sandbox: Sandbox) -> Sequence[Words]:
        zoo = sandbox.copy("kohya")
        for file in zoo.iterdir():
            held = load_file(file)
            edit(held)
            save_file(held, file, {"format": "pt"})
        return use_lora(sandbox, zoo / "m3.safetensors")

    return build


def put(name: str, values: torch.Tensor) -> Callable[[Tensors], object]:
    """Another tensor in the place of one, or beside them."""
    return lambda held: held.update({name: values})


def as_is(held: Tensors) -> None:
    """Leave tensors as they are."""


def many_keys(name: str, number: int) -> Callable[[Sandbox], Sequence[Words]]:
    """A header of that many keys, all of one byte, the same for all."""

    def build(sandbox: Sandbox) -> Sequence[Words]:
        file = sandbox.files / "m.safetensors"
        entry = '"dtype":"F32","shape":[1,1],"data_offsets":'
        parts = [f'"{name.format(place)}":{{{entry}[{4 * place},{4 * place + 4}]}}' for place in range(number)]
        header = ("{" + ",".join(parts) + "}").encode()
        file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4 * number))
        return [("inspect", file)]

    return build


def sizes(a: Sequence[int], b: Sequence[int]) -> Callable[[Tensors], object]:
    """Factors of other shapes."""
    return lambda held: held.update({DOWN: torch.ones(*a), UP: torch.ones(*b)})


def config(text: str | None = None, **entries: Any) -> Callable[[Sandbox], Sequence[Words]]:
    """A LoRA by diffusers' keys with other entries in the config that its header holds, or another text."""

    def build(sandbox: Sandbox) -> Sequence[Words]:
        file = sandbox.copy("diffusers.safetensors")
        with safe_open(file, "pt") as opened:
            known = json.loads(opened.metadata()[METADATA])
        written = {**known, **{f"unet.{key}": value for key, value in entries.items()}}
        save_file(load_file(file), file, {METADATA: json.dumps(written) if text is None else text})
        return [("inspect", file)]

    return build


def slow_config(pattern: str) -> Callable[[Sandbox], Sequence[Words]]:
    """A pattern on a module of a long name."""

    def build(sandbox: Sandbox) -> Sequence[Words]:
        file = sandbox.files / "m.safetensors"
        name = f"unet.{'a' * 200}!"
        tensors = {f"{name}.lora_A.weight": torch.ones(2, 4), f"{name}.lora_B.weight": torch.ones(5, 2)}
        document = {"unet.r": 2, "unet.lora_alpha": 4, "unet.alpha_pattern": {pattern: 4}}
        save_file(tensors, file, {METADATA: json.dumps(document)})
        return [("inspect", file)]

    return build


def named(name: str) -> Callable[[Tensors], object]:
    """One more layer of this name."""
    return lambda held: held.update(
        {f"{name}.lora_down.weight": torch.ones(2, 4), f"{name}.lora_up.weight": torch.ones(5, 2)}
    )


def against(sandbox: Sandbox) -> Sequence[Words]:
    """A LoRA whose base is a pipeline with nothing that fits."""
    return [("verify", sandbox.copy("kohya") / "m0.safetensors", "--against", sandbox.copy("pipelines") / "m0")]


def use_pipeline(sandbox: Sandbox, pipeline: Path) -> list[Words]:
    """A pipeline, looked at and fitted with the others."""
    return [("inspect", pipeline), ("fit", pipeline.parent, "-o", "out", "--rank", 1)]


def index(spoil: Callable[[dict[str, Any]], str]) -> Callable[[Sandbox], Sequence[Words]]:
    """A pipeline with another index."""

    def build(sandbox: Sandbox) -> Sequence[Words]:
        pipeline = sandbox.copy("pipelines") / "m2"
        path = pipeline / "model_index.json"
        path.write_text(spoil(json.loads(path.read_text())))
        return use_pipeline(sandbox, pipeline)

    return build


def components(**entries: Any) -> Callable[[Sandbox], Sequence[Words]]:
    """A pipeline whose index has more entries; some of what they might name is there."""

    def build(sandbox: Sandbox) -> Sequence[Words]:
        zoo = sandbox.copy("zoo")
        (sandbox.files / "outside").mkdir()
        (zoo / "m0" / "model.safetensors").rename(sandbox.files / "outside" / "model.safetensors")
        return index(lambda document: json.dumps({**document, **entries}))(sandbox)

    return build


def placed(place: str, put_there: Callable[[Sandbox, Path], object]) -> Callable[[Sandbox], Sequence[Words]]:
    """Something else in the place of a component or a file of it."""

    def build(sandbox: Sandbox) -> Sequence[Words]:
        pipeline = sandbox.copy("pipelines") / "m2"
        path = pipeline / place
        if path.is_dir():
            path.rename(sandbox.files / "moved")
        else:
            path.unlink()
        put_there(sandbox, path)
        return use_pipeline(sandbox, pipeline)[: 1 if path.suffix else 2]

    return build


def pickled(sandbox: Sandbox) -> Sequence[Words]:
    """A component whose weights are a pickle."""
    pipeline = sandbox.copy("pipelines") / "m2"
    (pipeline / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch_pickle(sandbox, pipeline / "unet" / "diffusion_pytorch_model.bin")
    return [("inspect", pipeline, "--allow-pickle"), ("inspect", pipeline)]


def own_code(sandbox: Sandbox) -> Sequence[Words]:
    """A pipeline and component of the sender's own classes, with modules beside them."""
    pipeline = sandbox.copy("pipelines") / "m2"
    for path in (pipeline / "pipeline.py", pipeline / "unet" / "evil.py"):
        path.write_text(f"open({str(sandbox.canary)!r}, 'w')\n")
    return index(
        lambda document: json.dumps({**document, "_class_name": ["pipeline", "Evil"], "unet": ["evil", "Model"]})
    )(sandbox)


def bundled(sandbox: Sandbox) -> Sequence[Words]:
    """A bundle of pipelines whose contents name other components."""
    zoo = sandbox.copy("pipelines")
    ran = sandbox.run("fit", zoo, "-o", "outbundle", "--rank", 1)
    assert ran.code == 0, ran.err
    bundle = sandbox.files / "made"
    (sandbox.work / "outbundle").rename(bundle)
    changed = 0
    for path in bundle.rglob("*.json"):
        text = path.read_text()
        if "unet/diffusion" in text and path.name != "manifest.json":
            path.write_text(text.replace("unet/diffusion", "../../../diffusion"))
            changed += 1
    assert changed
    return [("verify", bundle), ("rebuild", bundle, "m2", "-o", "out")]


NAN, INF = float("nan"), float("inf")
ALPHAS: dict[str, tuple[torch.Tensor, frozenset[int]]] = {
    "NaN": (torch.tensor(NAN), REFUSED),
    "infinite": (torch.tensor(-INF), REFUSED),
    "zero": (torch.tensor(0.0), EITHER),
    "negative": (torch.tensor(-4.0), EITHER),
    "3e38": (torch.tensor(3e38), ANY),
    "1e308": (torch.tensor(1e308, dtype=torch.float64), ANY),
    "subnormal": (torch.tensor(1e-45), EITHER),
    "true": (torch.tensor(True), REFUSED),
    "complex": (torch.tensor(1j), REFUSED),
    "8-bit": (torch.tensor(1.0).to(torch.float8_e4m3fn), REFUSED),
    "2^63 - 1": (torch.tensor(2**63 - 1), ANY),
    "of two values": (torch.ones(2), REFUSED),
    "of none": (torch.ones(0), REFUSED),
    "of a million": (torch.ones(10**6), REFUSED),
    "of six axes": (torch.ones(1, 1, 1, 1, 1, 1), REFUSED),
}
NAMES = {
    "escapes": "lora_unet_\x1b]52;c;YQ==\x07",
    "HTML": f"lora_unet_{SCRIPT}",
    "lines": "lora_te1_a\nfault: none",
    "..": "unet.../../../etc/passwd",
    "absolute": "/etc/passwd",
    "Markdown": "lora_unet_[x](javascript:alert(1))|---|",
    "10^5 characters": "lora_unet_" + "a" * 10**5,
    "50,000 dots": "unet" + ".a" * 50_000,
    "50,000 numbers": "lora_unet" + "_1" * 50_000,
    "50,000 levels": "lora_unet" + "_a.lora_down" * 5_000,
    "processors": "unet" + ".processor" * 20_000 + ".to_q",
    "nothing": "lora_unet_",
    "blocks of 10^30": f"lora_unet_input_blocks_{10**30}_1_proj_in",
    "blocks of 5000 digits": f"lora_unet_input_blocks_{'9' * 5000}_1_proj_in",
    "digits of another script": "lora_unet_input_blocks_٤_1_proj_in",
}
NESTED = '{"a":' * 100_000 + "1" + "}" * 100_000

ATTACKS = [
    Attack("diffusion: sound, as the control", lora(as_is), SAFE),
    Attack("diffusion: sound with a config, as the control", config(), SAFE),
    *(
        Attack(f"diffusion: an alpha that is {what}", lora(put(ALPHA, value)), codes)
        for what, (value, codes) in ALPHAS.items()
    ),
    Attack("diffusion: an alpha of no layer", lora(put("lora_unet_other.alpha", torch.tensor(1.0)))),
    Attack("diffusion: rank 0", lora(sizes((0, 4), (5, 0)))),
    Attack("diffusion: ranks that differ", lora(sizes((3, 4), (5, 2)))),
    Attack("diffusion: factors of one axis", lora(sizes((8,), (10,)))),
    Attack("diffusion: factors of nine axes", lora(sizes((2,) + (1,) * 8, (5, 2) + (1,) * 7))),
    Attack("diffusion: B with a kernel", lora(sizes((2, 4, 3, 3), (5, 2, 3, 3)))),
    Attack("diffusion: an update of 4·10^12 values", lora(sizes((1, 2 * 10**6), (2 * 10**6, 1))), EITHER),
    Attack("diffusion: all of them of 10^11 values", all_of_them(sizes((1, 10**6), (10**5, 1))), EITHER),
    Attack("diffusion: factors of integers", lora(lambda held: held.update({DOWN: torch.ones(2, 4).int()}))),
    Attack("diffusion: NaN in a factor", lora(lambda held: held[DOWN].fill_(NAN)), ANY - SAFE),
    Attack("diffusion: 3e38 in both factors", lora(lambda held: (held[DOWN].fill_(3e38), held[UP].fill_(3e38))), ANY),
    Attack("diffusion: a factor alone", lora(lambda held: held.pop(UP))),
    Attack(
        "diffusion: two names of one layer",
        lora(named("unet.mid_block.attentions.0.proj_in")),
        says="two factors",
    ),
    Attack(
        "diffusion: SGM's name and diffusers' of one layer",
        lora(named("lora_unet_down_blocks_1_attentions_0_proj_in")),
        says="two factors",
    ),
    Attack(
        "diffusion: two names that differ by dots", all_of_them(lambda h: (named("unet.a.b")(h), named("unet.a_b")(h)))
    ),
    *(Attack(f"diffusion: a layer called {what}", all_of_them(named(name)), EITHER) for what, name in NAMES.items()),
    Attack("diffusion: a million keys", many_keys("lora_unet_{}.lora_down.weight", 10**6)),
    Attack("diffusion: 50,000 factors alone", many_keys("lora_unet_{}.lora_down.weight", 50_000)),
    Attack("diffusion: 50,000 alphas alone", many_keys("lora_unet_{}.alpha", 50_000), EITHER),
    Attack("diffusion: 50,000 keys that are nearly factors", many_keys("lora_unet_{}.lora_downweight", 50_000), EITHER),
    *(
        Attack(f"diffusion: of another kind: {what}", lora(put(name, torch.ones(2, 2))))
        for what, name in {
            "LoHa": "lora_unet_x.hada_w1_a",
            "DoRA": f"{STEM}.dora_scale",
            "a core": f"{STEM}.lora_mid.weight",
            "a name of 10^5 dots": "a." * 10**5 + "hada_w1_a",
        }.items()
    ),
    Attack("diffusion: configs beside alphas", lora(as_is, **{METADATA: '{"unet.r": 2, "unet.lora_alpha": 4}'})),
    Attack(
        "diffusion: strings of escapes", lora(as_is, **{"ss_\x1b[2J": "\x1b[2J" + SCRIPT, "ss_tag": "x" * 10**6}), SAFE
    ),
    *(
        Attack(f"diffusion, config: {what}", config(text))
        for what, text in {
            "nested without end": NESTED,
            "15 MB of brackets": '{"a": [' + "[]," * 5 * 10**6 + "[]]}",
            "a list": "[]",
            "nothing": "",
            "a key twice": '{"unet.r": 2, "unet.r": 4}',
            "NaN": '{"unet.r": 2, "unet.lora_alpha": NaN}',
            "5000 digits": '{"unet.r": 2, "unet.lora_alpha": ' + "9" * 5000 + "}",
        }.items()
    ),
    Attack(
        "diffusion, config: of half a million components",
        # What is long is made by the attack: every run of the tests imports this list.
        lambda sandbox: config("{" + ",".join(f'"c{n}.r": 2' for n in range(500_000)) + "}")(sandbox),
        EITHER,
    ),
    *(
        Attack(f"diffusion, config: {what}", config(**entries))
        for what, entries in {
            "a rank of zero": {"r": 0, "rank_pattern": {}},
            "a rank of 2^62": {"r": 2**62, "rank_pattern": {}},
            "alpha negative": {"lora_alpha": -4},
            "alpha a text": {"lora_alpha": "\x1b[2J"},
            "DoRA": {"use_dora": True},
            "another kind": {"peft_type": "\x1b[2J"},
            "patterns of escapes": {"rank_pattern": {"\x1b[2J(": 2}},
        }.items()
    ),
    Attack(
        "diffusion, config: a million patterns",
        lambda sandbox: config(alpha_pattern={f"m{number}": 1 for number in range(10**6)})(sandbox),
    ),
    *(Attack(f"diffusion, config: {what}", slow_config(next(iter(p))), EITHER) for what, p in PATTERNS.items()),
    Attack("diffusion: verified against a pipeline without its layers", against, ANY),
    Attack("pipeline: sound, as the control", index(json.dumps), SAFE),
    *(
        Attack(f"pipeline: a component called {what}", components(**{name: ["diffusers", "Model"]}), codes)
        for what, name, codes in (
            ("..", "../../outside", REFUSED),
            ("an absolute path", "/etc", REFUSED),
            (".", ".", REFUSED),
            ("nothing", "", REFUSED),
            ("a path", "unet/..", REFUSED),
            ("escapes", "\x1b[2J", REFUSED),
            ("HTML", SCRIPT, REFUSED),
            ("10^5 characters", "a" * 10**5, REFUSED),
            ("half a character", "\ud800", REFUSED),
            ("Windows' path", "C:\\x", REFUSED),
            ("what is not there", "vae", EITHER),
            ("in capitals", "UNET", EITHER),
        )
    ),
    Attack(
        "pipeline: 10^5 components", lambda sandbox: components(**{f"c{n}": ["a", "b"] for n in range(10**5)})(sandbox)
    ),
    Attack("pipeline: components that are objects", components(unet={"a": 1}, vae=[[]], text_encoder=[7, 7]), EITHER),
    *(
        Attack(f"pipeline, index: {what}", index(lambda document, text=text: text))
        for what, text in {
            "nested without end": NESTED,
            "15 MB of brackets": '{"a": [' + "[]," * 5 * 10**6 + "[]]}",
            "a list": "[]",
            "empty": "",
            "no components": "{}",
            "a component twice": '{"unet": ["a", "b"], "unet": ["a", "b"]}',
        }.items()
    ),
    *(
        Attack(
            f"pipeline: in the place of {place}: {what}", placed(place, there), EITHER if place == "unet" else REFUSED
        )
        for place in ("unet", "unet/diffusion_pytorch_model.safetensors", "unet/config.json", "model_index.json")
        for what, there in {
            **PLACES,
            "a link elsewhere": lambda box, path: path.symlink_to(box.files / "moved"),
            "a link to the secret's folder": lambda box, path: path.symlink_to(box.root),
        }.items()
        if what not in ("a link out of the folder", "a socket")
    ),
    Attack("pipeline: a component of pickles", pickled, says="pickle"),
    Attack("pipeline: classes of the sender's", own_code, SAFE),
    Attack("pipeline: a bundle that writes elsewhere", bundled, ANY - SAFE),
]
