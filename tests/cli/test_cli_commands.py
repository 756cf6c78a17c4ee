"""Every command on small zoos: what it prints, and that its JSON keeps the contract."""

from __future__ import annotations

import io
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runner import Run
from safetensors.torch import load_file, save_file

import eigenzoo as ez
from builders import random_factors, read_update, seeded, write_adapter, write_model
from eigenzoo.cli.console import progress_bar
from eigenzoo.display import in_bytes, in_percent

COMMANDS = [
    "inspect",
    "fit",
    "plan",
    "evidence",
    "evaluate",
    "report",
    "project",
    "rebuild",
    "add",
    "route",
    "verify",
    "demo",
    "nursery",
    "nursery make",
]


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_every_command_has_help(run: Run, command: str) -> None:
    result = run(*command.split(), "--help")
    assert result.code == 0
    assert result.err == ""
    assert f"Usage: eigenzoo {command}".strip() in " ".join(result.out.split())
    if command == "":
        assert all(name in result.out for name in COMMANDS if " " not in name)


def test_fit_keeps_the_contract(run: Run, zoo: Path, tmp_path: Path) -> None:
    document = run("fit", zoo, "-o", tmp_path / "bundle", "--rank", 2, "--json").json
    assert {"num_models", "num_layers", "axes", "layers", "bytes", "seconds", "peak_memory"} <= document.keys()
    assert document["num_models"] == 6
    assert document["num_layers"] == 3
    assert document["axes"] == ["models"]
    keys = {"zoo", "bundle", "per_model", "whole_zoo", "whole_bundle", "break_even_models"}
    assert keys <= document["bytes"].keys()
    assert set(document["layers"]) == {"block.weight", "block.bias", "head.weight"}
    fitted = ez.fit(zoo, 2)
    for name, layer in document["layers"].items():
        assert layer["rank"] == {"models": 2}
        assert layer["captured"] == pytest.approx(fitted.report["layers"][name]["captured"], rel=1e-9)
    files = [path for path in (tmp_path / "bundle").rglob("*") if path.is_file() and path.name != "moments.safetensors"]
    assert document["bytes"]["whole_bundle"] == sum(path.stat().st_size for path in files)
    assert document["bytes"]["whole_zoo"] == sum(path.stat().st_size for path in zoo.rglob("*.safetensors"))
    assert document["seconds"] > 0
    assert document["peak_memory"] > 10_000_000


def test_project_keeps_the_contract(run: Run, zoo: Path, bundle: Path) -> None:
    document = run("project", bundle, zoo / "m5", zoo / "m0", "--json").json
    assert set(document) == {"models", "not_in_subspace", "zero_updates"}
    assert document["not_in_subspace"] == []
    assert list(document["models"]) == ["m5", "m0"]
    space = ez.load(bundle)
    for name in ("m5", "m0"):
        rebuilt = space.rebuild(space.project(zoo / name))
        truth = load_file(zoo / name / "model.safetensors")
        lost = {layer: float((truth[layer].double() - rebuilt.layer(layer)).square().sum()) for layer in truth}
        energy = {layer: float(truth[layer].double().square().sum()) for layer in truth}
        model = document["models"][name]
        assert set(model) >= {"residual", "layers"}
        assert model["residual"] == pytest.approx(sum(lost.values()) / sum(energy.values()), rel=1e-4)
        for layer in truth:
            assert model["layers"][layer]["residual"] == pytest.approx(lost[layer] / energy[layer], rel=1e-4)
    assert "share of the energy outside" in run("project", bundle, zoo / "m5").out


def test_project_says_why_more_than_all_of_the_energy_lies_outside(run: Run, tmp_path: Path) -> None:
    for place in range(4):
        stack = {"w": 5 + torch.randn(8, 6, generator=seeded(place))}
        write_model(tmp_path / "zoo" / f"m{place}", stack)
    write_model(tmp_path / "stranger", {"w": torch.randn(8, 6, generator=seeded(9)) / 10})
    assert run("fit", tmp_path / "zoo", "-o", tmp_path / "bundle", "--rank", 1).code == 0
    said = " ".join(run("project", tmp_path / "bundle", tmp_path / "stranger", tmp_path / "zoo" / "m0").out.split())
    assert "more than 100 %: stranger. Each rebuilt model contains the zoo's mean" in said
    assert "more than 100 %" not in run("project", tmp_path / "bundle", tmp_path / "zoo" / "m0").out


def test_rebuild_says_rank_and_bytes_and_cuts(run: Run, refused: Callable[..., str], tmp_path: Path) -> None:
    modules = {"layers.0.q": (48, 40), "layers.1.q": (40, 48)}
    for place in range(10):
        write_adapter(tmp_path / "zoo" / f"a{place}", random_factors(modules, 3, place))
    assert run("fit", tmp_path / "zoo", "-o", tmp_path / "bundle", "--rank", 8).code == 0
    originals = (tmp_path / "zoo" / "a1" / "adapter_model.safetensors").stat().st_size

    def rebuilt(name: object, folder: str, *options: object) -> tuple[str, Any, int]:
        words = ("rebuild", tmp_path / "bundle", name, *options, "-o")
        said = " ".join(run(*words, tmp_path / folder).out.split())
        document = run(*words, tmp_path / f"{folder}-json", "--json").json
        return said, document, (tmp_path / folder / "adapter_model.safetensors").stat().st_size

    said, document, size = rebuilt("a1", "default")
    assert f"rank 3, {in_bytes(size)} (the original: rank 3, {in_bytes(originals)})" in said
    assert "written at the zoo's own rank" in said
    assert "--max-lora-rank full keeps rank 30" in said
    assert (document["lora"]["rank"], document["lora"]["whole_rank"]) == (3, 30)
    assert f"{in_percent(document['residual'])} outside the subspace" in said
    said, document, size = rebuilt("a1", "whole", "--max-lora-rank", "full")
    assert f"rank 30, {in_bytes(size)} (the original: rank 3, {in_bytes(originals)})" in said
    assert "--max-lora-rank" not in said
    assert f"{in_percent(document['residual'])} of its energy is lost" in said
    assert (document["bytes"], document["original_bytes"]) == (size, originals)
    assert {key: document["lora"][key] for key in ("rank", "whole_rank", "original_rank", "loss")} == {
        "rank": 30,
        "whole_rank": 30,
        "original_rank": 3,
        "loss": 0.0,
    }
    for name in ("a1", tmp_path / "zoo" / "a1"):
        said, document, size = rebuilt(name, f"cut-{len(str(name))}", "--max-lora-rank", 3)
        assert f"rank 3, {in_bytes(size)} (the original: rank 3, {in_bytes(originals)})" in said
        expected = ez.load(tmp_path / "bundle").rebuild("a1", max_lora_rank=3).ranks()
        assert expected is not None
        share = expected.lost / sum(ez.load(tmp_path / "bundle").coefficients("a1").energies.values())
        assert f"outside the subspace, {in_percent(share)} by the cut from rank 30" in said
        stated = float(re.search(r"at most (\S+) % of its energy is lost", said)[1]) / 100  # type: ignore[index]
        lost, energy = 0.0, 0.0
        folders = (tmp_path / f"cut-{len(str(name))}", tmp_path / "zoo" / "a1")
        for module in modules:
            found, original = (read_update(folder, module) for folder in folders)
            lost, energy = lost + float((found - original).square().sum()), energy + float(original.square().sum())
        assert 0 < lost / energy <= stated * (1 + 1e-3)
        assert "--max-lora-rank" not in said
        assert document["lora"]["loss"] == pytest.approx(expected.loss)
        assert set(document["lora"]["layers"]) == set(modules)
    for wrong in (0, "fu", "1.5"):
        words = "rebuild", tmp_path / "bundle", "a1", "-o", tmp_path / "no", "--max-lora-rank", wrong
        assert f"--max-lora-rank: {str(wrong)!r} is not a largest rank" in " ".join(refused(*words).split())


def test_the_loss_of_a_cut_counts_excluded_modules_too(run: Run, tmp_path: Path) -> None:
    for place in range(4):
        b_OR, a_RI = random_factors({"m": (24, 20)}, 4, 10 + place)["m"]
        factors = {**random_factors({"q": (24, 20)}, 4, place), "k": (30 * b_OR, a_RI)}
        write_adapter(tmp_path / "zoo" / f"a{place}", factors)
    assert run("fit", tmp_path / "zoo", "-o", tmp_path / "bundle", "--exclude", "k").code == 0
    said = " ".join(run("rebuild", tmp_path / "bundle", "a1", "-o", tmp_path / "cut", "--max-lora-rank", 2).out.split())
    stated = re.search(r"at most (\S+) % of its energy is lost: (\S+) % outside the subspace, (\S+) % by the cut", said)
    assert stated is not None
    bound, outside, cut = (float(number) / 100 for number in stated.groups())
    pairs = {name: [read_update(tmp_path / at, name) for at in ("cut", "zoo/a1")] for name in ("q", "k")}
    lost = {name: float((found - original).square().sum()) for name, (found, original) in pairs.items()}
    energy = {name: float(original.square().sum()) for name, (_, original) in pairs.items()}
    whole = sum(energy.values())
    assert lost["k"] / whole - 1e-3 <= cut <= sum(lost.values()) / whole + 1e-3
    assert outside <= energy["q"] / whole * (1 + 1e-2)
    assert sum(lost.values()) / whole <= bound * (1 + 1e-2) <= 1


def test_rebuild_writes_a_model_of_the_bundle_or_any_other(
    run: Run, refused: Callable[..., str], zoo: Path, bundle: Path, tmp_path: Path
) -> None:
    space = ez.load(bundle)
    for name, word in (("m0", "m0"), ("m5", zoo / "m5")):
        document = run("rebuild", bundle, word, "-o", tmp_path / f"out-{name}", "--json").json
        assert document["name"] == name
        expected = space.rebuild("m0") if name == "m0" else space.rebuild(space.project(zoo / "m5"))
        written = load_file(tmp_path / f"out-{name}" / "model.safetensors")
        assert written.keys() == space.layers.keys()
        assert all(torch.equal(written[layer], expected.layer(layer).float()) for layer in written)
        assert document["bytes"] == (tmp_path / f"out-{name}" / "model.safetensors").stat().st_size
        assert document["original_bytes"] == (zoo / name / "model.safetensors").stat().st_size
        assert document["lora"] is None
    assert "--max-lora-rank" in refused("rebuild", bundle, "m0", "-o", tmp_path / "cut", "--max-lora-rank", 2)
    result = run("rebuild", bundle, "m0", "-o", tmp_path / "mean", "--mean-only")
    assert "the mean, instead of m0" in result.out
    mean = load_file(tmp_path / "mean" / "model.safetensors")["block.bias"]
    stack = torch.stack([load_file(zoo / f"m{place}" / "model.safetensors")["block.bias"] for place in range(5)])
    assert torch.allclose(mean, stack.mean(0), atol=1e-6)


def test_add_grows_the_bundle_in_place_or_beside(run: Run, zoo: Path, bundle: Path, tmp_path: Path) -> None:
    document = run("add", bundle, zoo / "m5", "-o", tmp_path / "beside", "--refresh", "--json").json
    assert document["growth"]["added"] == ["m5"]
    assert document["growth"]["refreshed"]
    assert ez.load(bundle).names == tuple(f"m{place}" for place in range(5))
    result = run("add", bundle, zoo / "m5")
    assert result.code == 0
    assert "added m5: 6 models" in result.out
    assert "the basis is unchanged and the moments are exact" in result.out
    assert ez.load(bundle).names[-1] == "m5"
    assert list(ez.load(bundle).verify()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["beside", "bundle", "zoo"]


def test_a_rebuilt_adapter_that_is_worse_than_none_says_so(run: Run, tmp_path: Path) -> None:
    """The mean of ten large updates is no part of a small one that has nothing in common with them."""
    for place in range(10):
        factors = random_factors({"q": (48, 40)}, 3, place)
        write_adapter(tmp_path / "zoo" / f"a{place}", factors, lora_alpha=3 if place else 0.3)
    run("fit", tmp_path / "zoo", "-o", tmp_path / "bundle", "--rank", 0)
    space = ez.load(tmp_path / "bundle")
    assert space.coefficients("a0").residual > 1 > space.coefficients("a1").residual
    note = "note: the base without an adapter is closer to this model: it loses 100 %. Fit with more directions"
    assert note in run("rebuild", tmp_path / "bundle", "a0", "-o", tmp_path / "small").out
    assert note in run("rebuild", tmp_path / "bundle", tmp_path / "zoo" / "a0", "-o", tmp_path / "projected").out
    assert note not in run("rebuild", tmp_path / "bundle", "a1", "-o", tmp_path / "large").out


def test_a_fit_that_keeps_nothing_and_a_larger_bundle_say_so(run: Run, zoo: Path, tmp_path: Path) -> None:
    out = run("fit", zoo, "-o", tmp_path / "bundle", "--rank", "auto").out
    assert "no direction is beyond chance in 3 of 3 layers: rebuilt models are the mean there" in out
    assert "note: this bundle is larger than the models' files. `eigenzoo plan ZOO` lists" in out
    assert "beyond chance" not in run("fit", zoo, "-o", tmp_path / "other", "--rank", 1).out


def test_a_wrong_name_has_the_nearest_one_beside_it(
    zoo: Path, bundle: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    said = refused("rebuild", bundle, "mm3", "-o", tmp_path / "out")
    assert said.endswith("no model is called 'mm3'. The bundle has 5: m0, m1, m2, m3, m4. Did you mean 'm3'?")


def test_add_from_the_bundle_alone_says_so(run: Run, zoo: Path, bundle: Path, tmp_path: Path) -> None:
    for place in range(5):
        (zoo / f"m{place}").rename(tmp_path / f"m{place}")
    result = run("add", bundle, zoo / "m5", "-o", tmp_path / "alone")
    assert "old files are not found where the bundle names them, so the moments are exact inside" in result.out
    assert f"'m0': {zoo / 'm0'} is not there. No old model is: the bundle names them" in result.out
    assert "--old FOLDER says where they are now" in result.out
    paths = [word for place in range(5) for word in ("--old", tmp_path / f"m{place}")]
    assert "the moments are exact" in run("add", bundle, zoo / "m5", "-o", tmp_path / "found", *paths).out


def test_verify_says_whole_or_what_is_wrong(run: Run, bundle: Path) -> None:
    result = run("verify", bundle)
    assert result.code == 0
    assert "5 models, 3 layers, whole" in result.out
    assert run("verify", bundle, "--json").json["ok"] is True
    (bundle / "extra").write_text("")
    result = run("verify", bundle)
    assert result.code == 1
    assert "fault: extra: the manifest does not list it" in result.out
    result = run("verify", bundle, "--json")
    assert result.code == 1
    assert result.json["faults"] == ["extra: the manifest does not list it"]
    assert result.json["ok"] is False
    (bundle / "extra").unlink()
    (bundle / "coefficients" / "m0.safetensors").unlink()
    result = run("verify", bundle, "--json")
    assert result.code == 1, "a bundle that cannot be loaded has failed the check"
    assert "m0.safetensors' is missing" in result.json["faults"][0]
    result = run("project", bundle, "whatever")
    assert result.code == 2
    assert "is missing" in result.err


def test_adapters_go_round(run: Run, tmp_path: Path) -> None:
    modules = {"block.q": (7, 6), "block.v": (5, 8)}
    for place in range(4):
        write_adapter(tmp_path / "zoo" / f"a{place}", random_factors(modules, 2, place), lora_alpha=8)
    document = run("fit", f"{tmp_path}/zoo/a*", "-o", tmp_path / "bundle", "--rank", "1.0", "--json").json
    assert document["view"] == "update"
    assert run("rebuild", tmp_path / "bundle", "a1", "-o", tmp_path / "back").code == 0
    for module in modules:
        expected = read_update(tmp_path / "zoo" / "a1", module)
        assert torch.allclose(read_update(tmp_path / "back", module), expected, atol=1e-4)


def test_nursery_says_what_it_cannot_make(refused: object, tmp_path: Path) -> None:
    message = refused("nursery", "make", "digits-rnn", "-o", tmp_path / "zoo")  # type: ignore[operator]
    assert "digits-rnn" in message
    for kind, option, text in (
        ("digits-vit", "--permuted", "no such option: permuted"),
        ("digits-cnn", "--same-task", "same_task and random_labels"),
    ):
        assert text in refused("nursery", "make", kind, "-o", tmp_path / "zoo", "--random-labels", option)  # type: ignore[operator]
    assert not (tmp_path / "zoo").exists()


def test_a_model_without_any_layer_of_the_bundle_is_named(run: Run, bundle: Path, tmp_path: Path) -> None:
    save_file({"other.weight": torch.ones(4, 4)}, tmp_path / "stranger.safetensors")
    done = run("project", bundle, tmp_path / "stranger.safetensors")
    err = done.err
    assert done.code == 2
    assert "MismatchError: stranger: has none of the bundle's layers" in err
    assert "--include" not in err


def test_a_terminal_shows_that_a_command_has_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setenv("TERM", "xterm")
    with progress_bar(quiet=False) as progress:
        begun = shown.getvalue()
        progress("reading", 1, 2)
    assert "starting" in begun
    assert "starting" not in shown.getvalue().rpartition("reading")[2]


def test_an_upper_bound_of_what_is_lost_is_marked(run: Run, zoo: Path, bundle: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved" / "bundle"
    shutil.copytree(bundle, moved)
    done = run("add", moved, zoo / "m5", "-o", tmp_path / "grown", "--refresh")
    assert "lost: at most " in done.out
    assert "at most" not in run("add", bundle, zoo / "m5", "-o", tmp_path / "exact", "--refresh").out
