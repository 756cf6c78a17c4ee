"""Fused weights as layers of their own, through everything a bundle does: project, rebuild, add, delta, processes."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

import eigenzoo as ez
from builders import random_stack, write_model, write_stacks
from eigenzoo.cli.app import app

RULE = "blocks.*.attn.qkv.*=q,k,v"
NAME = "blocks.0.attn.qkv.weight"
SHAPES = {NAME: (12, 6), "blocks.0.attn.qkv.bias": (12,), "blocks.0.mlp.weight": (5, 6)}


@pytest.fixture
def stacks() -> dict[str, Tensor]:
    """Five models of rank 2 in each layer, so that the last lies in the span of the others."""
    return {name: random_stack(5, shape, seed, rank=2) for seed, (name, shape) in enumerate(SHAPES.items())}


@pytest.fixture
def zoo(tmp_path: Path, stacks: dict[str, Tensor]) -> Path:
    """The first four models; the fifth lies beside them."""
    write_stacks(tmp_path / "zoo", stacks)
    (tmp_path / "zoo" / "m4").rename(tmp_path / "unseen")
    return tmp_path / "zoo"


def assert_equal(folder: Path, stacks: Mapping[str, Tensor], place: int) -> None:
    found = load_file(folder / "model.safetensors")
    assert set(found) == set(stacks)
    for name, stack in stacks.items():
        torch.testing.assert_close(found[name].double(), stack[place], rtol=1e-5, atol=1e-5)


def test_models_come_back_in_their_own_tensors(zoo: Path, stacks: dict[str, Tensor], tmp_path: Path) -> None:
    space = ez.load(ez.fit(ez.open_zoo(zoo, split=RULE), rank=1.0).save(tmp_path / "bundle"))
    assert set(space.layers) == {f"{name}.{part}" for name in SHAPES if "qkv" in name for part in "qkv"} | {
        "blocks.0.mlp.weight"
    }
    for place in range(4):
        assert_equal(space.rebuild(f"m{place}").save(tmp_path / f"m{place}"), stacks, place)
    assert set(space.rebuild("m0").state_dict()) == set(stacks)
    assert not list(space.verify())


def test_each_part_has_its_own_subspace(zoo: Path, stacks: dict[str, Tensor]) -> None:
    """The spectrum of k is that of the stack of k alone, and not that of the fused weight."""
    evidence = ez.evidence(ez.open_zoo(zoo, split=RULE), cache=False).to_dict()["layers"]
    rows = stacks[NAME][:4, 4:8].float().double().flatten(1)
    values = torch.linalg.svdvals(rows - rows.mean(0)).square()[:3]
    found = torch.tensor(evidence[f"{NAME}.k"]["explained_variance_ratio"], dtype=torch.float64)
    torch.testing.assert_close(found, values / values.sum(), rtol=1e-5, atol=1e-7)


def test_what_is_not_analysed_is_joined_bit_by_bit(zoo: Path, tmp_path: Path) -> None:
    """Of the fused weight only v is a layer; rank 0 loses all of it, and q and k stay as they were to the last bit."""
    space = ez.load(ez.fit(ez.open_zoo(zoo, split=RULE, include=["*.weight.v"]), rank=0).save(tmp_path / "bundle"))
    before = load_file(zoo / "m1" / "model.safetensors")
    after = load_file(space.rebuild("m1").save(tmp_path / "out") / "model.safetensors")
    assert torch.equal(after[NAME][:8], before[NAME][:8])
    assert (after[NAME][8:] - before[NAME][8:]).abs().max() > 0.01
    assert all(torch.equal(after[name], before[name]) for name in before if name != NAME)


def test_other_models_are_cut_by_the_bundle_s_rule(zoo: Path, stacks: dict[str, Tensor], tmp_path: Path) -> None:
    space = ez.load(ez.fit(ez.open_zoo(zoo, split=RULE), rank=1.0).save(tmp_path / "bundle"))
    coefficients = space.project(tmp_path / "unseen")
    assert coefficients.residual < 1e-10
    assert_equal(space.rebuild(coefficients).save(tmp_path / "out"), stacks, 4)
    whole = ez.load(ez.fit(zoo, rank=1.0).save(tmp_path / "whole"))
    with pytest.raises(ez.UsageError, match="already split by other rules"):
        whole.project(ez.open_zoo(tmp_path / "unseen", split=RULE))
    write_model(tmp_path / "other", {"blocks.0.attn.query.weight": torch.ones(4, 6)})
    with pytest.raises(ez.UsageError, match="matches no tensor"):
        space.project(tmp_path / "other")


@pytest.mark.parametrize("gone", [False, True])
@pytest.mark.parametrize("refresh", [False, True])
def test_a_bundle_grows_by_its_rule(
    zoo: Path, stacks: dict[str, Tensor], tmp_path: Path, refresh: bool, gone: bool
) -> None:
    space = ez.load(ez.fit(ez.open_zoo(zoo, split=RULE), rank=1.0).save(tmp_path / "bundle"))
    if gone:
        shutil.rmtree(zoo)
    grown = ez.load(space.add(tmp_path / "unseen", refresh=refresh).save(tmp_path / "grown"))
    assert grown.manifest.split == space.manifest.split
    assert grown.report["growth"]["exact"] is not gone
    for place, name in enumerate(["m0", "m1", "m2", "m3", "unseen"]):
        assert_equal(grown.rebuild(name).save(tmp_path / f"out-{name}"), stacks, place)


def test_deltas_are_cut_as_their_base_is(zoo: Path, stacks: dict[str, Tensor], tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", {name: stack[0].float() + 1 for name, stack in stacks.items()})
    fitted = ez.fit(ez.open_zoo(zoo, base=base, split=RULE), rank=1.0)
    space = ez.load(fitted.save(tmp_path / "bundle"))
    assert space.view == "delta"
    for subspace, name in ((fitted, "here"), (space, "there"), (ez.load(tmp_path / "bundle", base=base), "named")):
        assert_equal(subspace.rebuild("m2").save(tmp_path / name), stacks, 2)


def test_rules_of_other_rows_share_no_moments(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`q` first and `q` last are of one name and one shape: what is kept of the one must not be taken for the other."""
    monkeypatch.setenv("EIGENZOO_CACHE", str(tmp_path / "cache"))
    grams = [
        ez.fit(ez.open_zoo(zoo, split=rule), rank=1).moments(f"{NAME}.q").gram_NN
        for rule in ("*.qkv.weight=q,k,v", "*.qkv.weight=k,v,q")
    ]
    assert (grams[0] - grams[1]).abs().max() > 0.01


def test_a_zoo_travels_with_its_rule(zoo: Path) -> None:
    opened = ez.open_zoo(zoo, split=RULE)
    assert dict(pickle.loads(pickle.dumps(opened)).layers) == dict(opened.layers)
    assert dict(opened.select(include=["*.q"]).layers).keys() == {f"{name}.q" for name in SHAPES if "qkv" in name}


def test_a_manifest_with_another_rule_is_refused(zoo: Path, tmp_path: Path) -> None:
    bundle = ez.fit(ez.open_zoo(zoo, split=RULE), rank=1).save(tmp_path / "bundle")
    document = json.loads((bundle / "manifest.json").read_text())
    assert document["options"]["split"] == ["blocks.*.attn.qkv.*=q:1,k:1,v:1"]
    document["options"]["split"] = ["no rule"]
    (bundle / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(ez.BundleError, match="no rule"):
        ez.load(bundle)


def test_the_command_line_splits(zoo: Path, tmp_path: Path) -> None:
    def run(*words: object) -> str:
        done = CliRunner().invoke(app, [str(word) for word in words])
        assert done.exit_code == 0, done.output
        return done.stdout

    fitted = json.loads(run("fit", zoo, "-o", tmp_path / "b", "--split", RULE, "--rank", "1.0", "--json"))
    assert f"{NAME}.q" in fitted["layers"]
    assert (
        json.loads(run("project", tmp_path / "b", tmp_path / "unseen", "--json"))["models"]["unseen"]["residual"] < 1e-9
    )
    for command in ("inspect", "plan", "evidence"):
        assert json.loads(run(command, zoo, "--split", RULE, "--json"))["num_layers"] == 7, command
    run("rebuild", tmp_path / "b", "m0", "-o", tmp_path / "out")
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == set(SHAPES)
    refused = CliRunner().invoke(app, ["fit", str(zoo), "-o", str(tmp_path / "c"), "--split", "*.qkv.*=5"])
    assert refused.exit_code != 0
    assert not (tmp_path / "c").exists()


def test_a_bundle_with_rules_is_verified_against_a_whole_base(zoo: Path, tmp_path: Path) -> None:
    space = ez.fit(ez.open_zoo(zoo, split=RULE), rank=2)
    assert space.verify(against=zoo / "m0").ok

    write_model(tmp_path / "other", {"blocks.0.mlp.weight": torch.ones(5, 6)})
    (fault,) = space.verify(against=tmp_path / "other")
    assert RULE.partition("=")[0] in fault
    assert "matches no tensor" in fault
