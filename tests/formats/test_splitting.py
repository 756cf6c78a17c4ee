"""Tensors that are cut along their outputs: parts are the rows, and everything that is no rule is refused."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest
import torch
from model_builders import make_gpt2, save_model
from safetensors.torch import load_file, save_file

import eigenzoo as ez
from eigenzoo.errors import FormatError, UnsupportedError, UsageError
from eigenzoo.formats.layout import ModelLayout, layout_of
from eigenzoo.formats.model import Model
from eigenzoo.formats.opening import open_model
from eigenzoo.formats.splitting import split_model
from eigenzoo.weights.splits import parse_split

TENSORS = {
    "blocks.0.attn.qkv.weight": torch.arange(96.0).reshape(12, 8),
    "blocks.0.attn.qkv.bias": torch.arange(12.0).half(),
    "blocks.0.conv.weight": torch.arange(180.0).reshape(6, 5, 2, 3),
    "counter": torch.tensor(3),
}


def cut(path: Path, *rules: str) -> Model:
    return split_model(open_model(path, allow_pickle=True), [parse_split(rule) for rule in rules])


@pytest.fixture(params=["file", "folder", "pickle"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "pickle":
        torch.save(TENSORS, tmp_path / "m.pt")
        return tmp_path / "m.pt"
    file = tmp_path / ("model.safetensors" if request.param == "folder" else "m.safetensors")
    save_file(TENSORS, file, {"format": "pt"})
    return tmp_path if request.param == "folder" else file


@pytest.mark.parametrize(
    ("rule", "rows"),
    [
        ("blocks.*.attn.qkv.*=q,k,v", {"q": (0, 4), "k": (4, 8), "v": (8, 12)}),
        ("blocks.*.attn.qkv.*=3", {"part0": (0, 4), "part1": (4, 8), "part2": (8, 12)}),
        ("*.qkv.*= q:4, k:1 ,v:1", {"q": (0, 8), "k": (8, 10), "v": (10, 12)}),
        ("*qkv*=2", {"part0": (0, 6), "part1": (6, 12)}),
    ],
)
def test_parts_are_the_rows(path: Path, rule: str, rows: dict[str, tuple[int, int]]) -> None:
    model = cut(path, rule)
    others = {name for name in TENSORS if "qkv" not in name}
    assert set(model.tensors) == others | {f"{n}.{part}" for n in TENSORS if "qkv" in n for part in rows}
    for name in set(TENSORS) - others:
        for part, (start, stop) in rows.items():
            expected = TENSORS[name][start:stop]
            found = model.read(f"{name}.{part}")
            assert torch.equal(found, expected)
            assert found.dtype == expected.dtype
            flat = expected.reshape(-1)
            assert torch.equal(model.read_flat(f"{name}.{part}", 1, flat.numel()), flat[1:])
            out = torch.empty(flat.numel() - 1, dtype=torch.float64)
            assert torch.equal(model.read_flat(f"{name}.{part}", 1, flat.numel(), out), flat[1:].double())
    assert all(torch.equal(model.read(name), TENSORS[name]) for name in others)


def test_kernels_are_cut_by_output_channels(path: Path) -> None:
    model = cut(path, "*.conv.weight=up,down", "*.qkv.weight=q,k,v")
    assert torch.equal(model.read("blocks.0.conv.weight.down"), TENSORS["blocks.0.conv.weight"][3:])
    assert "blocks.0.attn.qkv.bias" in model.tensors
    assert split_model(model, [parse_split("*.conv.weight=up,down"), parse_split("*.qkv.weight=q,k,v")]) is model


def test_a_layout_joins_the_parts_and_comes_back(path: Path) -> None:
    whole, model = open_model(path, allow_pickle=True), cut(path, "*.qkv.*=q,k,v")
    layout = layout_of(model)
    assert {name: (item.dtype, item.shape) for name, item in layout.tensors.items()} == {
        name: (item.dtype, item.shape) for name, item in layout_of(whole).tensors.items()
    }
    assert set(layout.pieces) == set(model.tensors)
    assert ModelLayout.from_json(layout.to_json()) == layout
    assert "splits" not in layout_of(whole).to_json()


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ([], "not a mapping"),
        ({"blocks.0.attn.qkv.weight": 3}, "not a list of parts"),
        ({"blocks.0.attn.qkv.weight": [["q", 12]]}, "not a list of parts"),
        ({"blocks.0.attn.qkv.weight": [["q", 6], ["k", 5]]}, "do not cover the rows"),
        ({"blocks.0.attn.qkv.weight": [["q", 12], ["k", 0]]}, "no rows"),
        ({"blocks.0.attn.qkv.weight": [["q", 6.0], ["k", 6]]}, r"not \[name, rows\]"),
        ({"blocks.0.attn.qkv.weight": [["q", 6], ["q", 6]]}, "the name of another part"),
        ({"gone": [["q", 6], ["k", 6]]}, "do not cover the rows"),
        ({"counter": [["q", 1], ["k", 1]]}, "do not cover the rows"),
    ],
)
def test_layouts_that_others_wrote_are_checked(tmp_path: Path, splits: object, message: str) -> None:
    save_file(TENSORS, tmp_path / "m.safetensors")
    document = {**layout_of(open_model(tmp_path / "m.safetensors")).to_json(), "splits": splits}
    with pytest.raises(FormatError, match=message):
        ModelLayout.from_json(document)


@pytest.mark.parametrize(
    "text", ["", "=3", "qkv", "*=1", "*=0", "*=q", "*=q,q", "*=q,,v", "*=q:0,k", "*=5000", "*=a b,c"]
)
def test_what_is_no_rule_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"is not a rule for --split.*A rule is GLOB=NUMBER"):
        parse_split(text)


def test_rules_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    save_file({**TENSORS, "blocks.0.attn.qkv.weight.taken": torch.ones(1)}, tmp_path / "m.safetensors")
    for rules, message in (
        (
            ["*.query.*=q,k,v"],
            r"the split \*\.query\.\*=q,k,v matches no tensor.*`eigenzoo inspect",
        ),
        (["*.qkv.bias=5"], r"qkv\.bias': 12 outputs cannot be split into 5 equal parts"),
        (["*.qkv.bias=q,k,v", "*.bias=2"], "two splits match this tensor"),
        (["counter=2"], r"tensor of shape \[\] and dtype torch\.int64 cannot be split"),
        (["*.qkv.weight=taken,free"], "is already the name of a tensor"),
    ):
        with pytest.raises(UsageError, match=message):
            ez.open_zoo(tmp_path / "m.safetensors", split=rules)
    model = cut(tmp_path / "m.safetensors", "*.qkv.bias=q,k,v")
    with pytest.raises(UsageError, match="already split by other rules"):
        split_model(model, [parse_split("*.qkv.bias=2")])


def test_conv1d_of_gpt2_lies_transposed_and_is_refused(tmp_path: Path) -> None:
    save_model(make_gpt2(), tmp_path / "gpt2")
    with pytest.raises(UnsupportedError, match=r"c_attn\.weight'.*its bias has 48 outputs.*Conv1D holds inputs × out"):
        ez.open_zoo(tmp_path / "gpt2", split=["*.c_attn.weight=q,k,v"])


def test_adapters_are_not_split(adapter: Path) -> None:
    with pytest.raises(UnsupportedError, match="LoRA adapters cannot be split"):
        ez.open_zoo([adapter], split=["*=2"])


def test_models_that_agree_are_cut_once(tmp_path: Path) -> None:
    """Headers that agree stay one object when they are cut: a zoo of thousands is matched once."""
    for name in "ab":
        (tmp_path / name).mkdir()
        save_file({key: value + ord(name) for key, value in TENSORS.items()}, tmp_path / name / "model.safetensors")
    first, second = ez.open_zoo(tmp_path, split="*.qkv.*=q,k,v").models
    assert first.likeness is second.likeness  # type: ignore[attr-defined]


def test_parts_at_a_url_are_read_by_ranges_and_rebuilt_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EIGENZOO_CACHE", str(tmp_path / "cache"))
    system = fsspec.filesystem("memory")
    for number in range(3):
        draw = torch.Generator().manual_seed(number)
        tensors = {"attn.qkv.weight": torch.randn(12, 8, generator=draw), "out": torch.randn(5, 8, generator=draw)}
        save_file(tensors, tmp_path / "m.safetensors", {"format": "pt"})
        system.pipe_file(f"/split/m{number}/model.safetensors", (tmp_path / "m.safetensors").read_bytes())
    zoo = ez.open_zoo("memory://split", split="*.qkv.*=q,k,v", include=["*.v", "out"])
    space = ez.load(ez.fit(zoo, rank=1.0).save(tmp_path / "bundle"))
    assert set(space.layers) == {"attn.qkv.weight.v", "out"}
    found = load_file(space.rebuild("m2", fetch=True).save(tmp_path / "out") / "model.safetensors")
    assert torch.equal(found["attn.qkv.weight"][:8], tensors["attn.qkv.weight"][:8])
    torch.testing.assert_close(found["attn.qkv.weight"], tensors["attn.qkv.weight"], rtol=1e-5, atol=1e-5)
    assert set(found) == set(tensors)
