"""How words become options: ranks, axes, budgets, sources, permissions."""

from __future__ import annotations

import inspect
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch
from cli_runner import Run
from safetensors.torch import load_file
from typer.models import OptionInfo

import eigenzoo as ez
from eigenzoo.cli import nursery
from eigenzoo.cli.app import app

Refused = Callable[..., str]


def test_ranks_and_axes(run: Run, zoo: Path, tmp_path: Path) -> None:
    cases: list[tuple[list[str], dict[str, object]]] = [
        ([], {}),
        (["--rank", "3"], {"rank": 3}),
        (["--rank", "0"], {"rank": 0}),
        (["--rank", "0.8"], {"rank": 0.8}),
        (["--rank", "1.0"], {"rank": 1.0}),
        (["--rank", "auto"], {"rank": "auto"}),
        (["--axes", "outputs,inputs", "--rank", "2"], {"axes": ("outputs", "inputs"), "rank": 2}),
        (["--rank", "outputs=3, inputs=0.9"], {"rank": {"outputs": 3, "inputs": 0.9}}),
        (["--rank", "models=2,outputs=auto", "--axes", "models, outputs"], {"rank": {"models": 2, "outputs": "auto"}}),
        (["--max-error", "0.1"], {"max_error": 0.1}),
        (["--budget", "20kB", "--dtype", "bfloat16"], {"budget": 20_000, "dtype": "bfloat16"}),
        (["--budget", "18KiB"], {"budget": 18 * 1024}),
        (["--center", "columns", "--rank", "2"], {"center": "columns", "rank": 2}),
        (["--exclude", "head*", "--exclude", "*.bias", "--rank", "2"], {"exclude": ["head*", "*.bias"], "rank": 2}),
        (
            ["--include", "block.*", "--rank", "2", "--max-memory", "32MB", "--seed", "3"],
            {"include": ["block.*"], "rank": 2},
        ),
    ]
    for number, (words, options) in enumerate(cases):
        document = run("fit", zoo, "-o", tmp_path / f"b{number}", "--json", *words).json
        expected = ez.fit(zoo, **options).report  # type: ignore[arg-type]
        assert {name: layer["rank"] for name, layer in document["layers"].items()} == {
            name: layer["rank"] for name, layer in expected["layers"].items()
        }, words
        assert document["residual"] == pytest.approx(expected["residual"], rel=1e-9), words
    assert ez.load(tmp_path / "b10").report["bytes"]["whole_bundle"] <= 20_000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rank", "many"], "'many' is not a rank"),
        (["--rank", "95%"], "or 'auto'. Write 95 % as 0.95"),
        (["--rank", "-1"], "rank -1 is negative"),
        (["--rank", "1.5"], "rank 1.5 is not a share"),
        (["--rank", "nan"], "rank nan is not a share"),
        (["--rank", ""], "'' is not a rank"),
        (["--rank", "6"], "rank 6, but 6 models span at most 5 directions after centering"),
        (["--rank", "rows=3"], "rows"),
        (["--rank", "outputs=3", "--axes", "models"], "a rank for axis 'outputs'"),
        (["--rank", "outputs="], "'' is not a rank"),
        (["--axes", "modles"], "modles"),
        (["--axes", ""], "ax"),
        (["--budget", "much"], "--budget: 'much' is not a number of bytes"),
        (["--budget", "10"], "a budget of 10 bytes"),
        (["--budget", "1MB", "--rank", "2"], "a rank is given beside a budget"),
        (["--budget", "1MB", "--max-error", "0.1"], "budget and max_error are both given"),
        (["--max-error", "2"], "an error bound of 2.0"),
        (["--max-error", "nan"], "an error bound of nan"),
        (["--max-error", "some"], "'--max-error': Input should be a valid number"),
        (["--max-memory", "lots"], "--max-memory: 'lots' is not a number of bytes"),
        (["--max-memory", "2MB"], "Blocks need at least"),
        (["--device", "cuda"], "device 'cuda'"),
        (["--dtype", "int4"], "int8, nf4"),
        (["--center", "median"], "median"),
        (["--view", "sideways"], "sideways"),
        (["--view", "delta"], "view 'delta' needs a base"),
        (["--view", "update"], "view 'update' needs LoRA adapters"),
        (["--seed", "x"], "'--seed': Input should be a valid integer"),
        (["--exclude", "*"], "no layer is left"),
        (["--ranks", "3"], "--ranks"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_meant_is_refused(
    refused: Refused, zoo: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    assert message in refused("fit", zoo, "-o", tmp_path / "bundle", *words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["zoo"]


def test_an_option_that_is_not_there_is_named(refused: Refused) -> None:
    assert "No such option: --typo" in refused("inspect", "--typo")


def test_sources(run: Run, zoo: Path, here: Path) -> None:
    (here / "list.txt").write_text("# the first and the third\nzoo/m0\n\nzoo/m2\n")
    sources = {
        6: [["zoo"], ["zoo/*"], [zoo], [zoo / f"m{place}" for place in range(6)]],
        2: [["list.txt"], ["zoo/m[02]"], ["zoo/m0", "zoo/m2"], ["zoo/m0", "zoo/m0", "zoo/m2"]],
    }
    for count, all_words in sources.items():
        for words in all_words:
            assert run("inspect", *words, "--json").json["num_models"] == count, words


def test_what_cannot_be_read_is_refused_or_skipped_with_permission(
    run: Run, refused: Refused, zoo: Path, tmp_path: Path
) -> None:
    (zoo / "m3" / "model.safetensors").write_bytes(b"no tensors")
    assert "m3" in refused("fit", zoo, "-o", tmp_path / "bundle", "--rank", 2)
    document = run("fit", zoo, "-o", tmp_path / "bundle", "--rank", 2, "--allow-missing", "--json").json
    assert document["num_models"] == 5
    assert [item["path"] for item in document["skipped"]] == ["m3"]
    assert "skipped: m3" in run("inspect", zoo, "--allow-missing").out


def test_layers_that_some_models_lack(run: Run, refused: Refused, zoo: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tensors = load_file(zoo / "m1" / "model.safetensors")
    save_file({**tensors, "extra.weight": torch.ones(2, 2)}, zoo / "m1" / "model.safetensors", {"format": "pt"})
    message = refused("fit", zoo, "-o", tmp_path / "bundle", "--rank", 2)
    assert "layer 'extra.weight'" in message
    assert "--allow-missing" in message
    document = run("fit", zoo, "-o", tmp_path / "bundle", "--rank", 2, "--allow-missing", "--json").json
    assert [(item["tensor"], item["num_models"]) for item in document["left_out"]] == [("extra.weight", 1)]
    # What was left out comes back with the one model that had it.
    assert run("rebuild", tmp_path / "bundle", "m1", "-o", tmp_path / "m1").code == 0
    assert torch.equal(load_file(tmp_path / "m1" / "model.safetensors")["extra.weight"], torch.ones(2, 2))


def test_pickles_need_permission(run: Run, refused: Refused, zoo: Path, tmp_path: Path) -> None:
    (tmp_path / "pickles").mkdir()
    for place in range(6):
        torch.save(load_file(zoo / f"m{place}" / "model.safetensors"), tmp_path / "pickles" / f"m{place}.pt")
    assert "allow-pickle" in refused("fit", tmp_path / "pickles", "-o", tmp_path / "bundle", "--rank", 2)
    words = ("fit", tmp_path / "pickles", "-o", tmp_path / "bundle", "--rank", 2, "--allow-pickle", "--json")
    assert run(*words).json["residual"] == pytest.approx(ez.fit(zoo, 2).report["residual"], rel=1e-9)
    assert "allow-pickle" in refused("project", tmp_path / "bundle", tmp_path / "pickles" / "m0.pt")
    assert run("project", tmp_path / "bundle", tmp_path / "pickles" / "m0.pt", "--allow-pickle", "--json").json


def test_a_base_makes_deltas(run: Run, refused: Refused, zoo: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(zoo / "m5", tmp_path / "base"))
    paths = [zoo / f"m{place}" for place in range(5)]
    document = run("fit", *paths, "-o", tmp_path / "bundle", "--base", base, "--rank", "1.0", "--json").json
    assert document["view"] == "delta"
    base.rename(tmp_path / "moved")
    # All six were written in one tick of the clock; two real models are not, and only then is a checksum taken.
    os.utime(zoo / "m0" / "model.safetensors", ns=(1, 1))
    assert "the base is not at hand" in refused("rebuild", tmp_path / "bundle", "m0", "-o", tmp_path / "back")
    assert "is not the base" in refused(
        "rebuild", tmp_path / "bundle", "m0", "-o", tmp_path / "back", "--base", zoo / "m0"
    )
    assert run("rebuild", tmp_path / "bundle", "m0", "-o", tmp_path / "back", "--base", tmp_path / "moved").code == 0
    before, after = (load_file(path / "model.safetensors") for path in (zoo / "m0", tmp_path / "back"))
    assert all(torch.allclose(before[name], after[name], atol=1e-5) for name in before)


def test_an_error_about_an_entry_of_a_list_names_the_list_and_the_line(zoo: Path, tmp_path: Path) -> None:
    (tmp_path / "inner.txt").write_text("# further models\nnowhere\n")
    outer = tmp_path / "list.txt"
    outer.write_text(f"{zoo}/m0\n\n{zoo}/m0\nmissing*\n")
    with pytest.raises(ez.ZooError, match=r"/list\.txt, line 4, .*/missing\*'?: no model was found"):
        ez.open_zoo(outer)
    outer.write_text(f"{zoo}/m0\ninner.txt\n")
    with pytest.raises(
        ez.ZooError, match=r"/list\.txt, line 2, .*/inner\.txt, line 2, .*/nowhere: there is no such file"
    ):
        ez.open_zoo(outer)


OWN = {
    "ZOO": "evidence and report take a bundle too",
    "output": "what is written",
    "format": "report chooses its own format, rebuild that of an adapter",
    "rank": "fit keeps directions, evidence asks controls about them, the demo takes one number",
    "budget": "fit counts a bundle, merge the weights file of an adapter",
    "axes": "evidence adds the spectra of sides and truncates nothing",
    "like": "import takes an adapter's path, rebuild a name in the bundle",
    "force": "push replaces what a repository holds, the others an output",
    "model": "adapt takes a path, rebuild whatever opens as a model",
    "metric": "merge chooses by it, on two parts of the data",
    "parent": "merge measures it as a control of adapters too",
    "base": "merge subtracts it from checkpoints alone",
    "dtype": "fit stores bases, merge writes models",
    "missing": "merge refuses adapters that lack layers, by the word of its other refusals",
    "MODELS": "merge takes a bundle and names of its models too",
    "alpha": "import takes the scale of adapters, route an error rate, each by its usual name",
}
"""Options whose name is shared and whose meaning is the command's own."""


def declarations() -> dict[str, dict[str, inspect.Parameter]]:
    """Every option, and every argument by a name in capitals, with the commands that have it."""
    found: dict[str, dict[str, inspect.Parameter]] = {}
    for command in [*app.registered_commands, *nursery.app.registered_commands]:
        assert command.callback is not None
        assert command.name is not None
        for name, parameter in inspect.signature(command.callback, eval_str=True).parameters.items():
            is_option = isinstance(get_args(parameter.annotation)[1], OptionInfo)
            found.setdefault(name if is_option else name.upper(), {})[command.name] = parameter
    return found


def declared(parameter: inspect.Parameter) -> tuple[object, ...]:
    """What help shows of an option: words, type, metavar, range and default."""
    kind, info = get_args(parameter.annotation)
    plain = [item for item in get_args(kind) or (kind,) if item is not type(None)]
    return info.help, plain, info.metavar, info.param_decls, info.min, info.max, info.callback


def test_an_option_of_one_name_is_declared_once() -> None:
    ways = {
        name: len({str(declared(parameter)) for parameter in commands.values()})
        for name, commands in declarations().items()
    }
    assert {name for name, count in ways.items() if count > 1} == OWN.keys()


def test_help_shows_every_default() -> None:
    for name, commands in declarations().items():
        for command, parameter in commands.items():
            _, info = get_args(parameter.annotation)
            if parameter.default not in (inspect.Parameter.empty, None, False):
                assert info.show_default is True, (name, command)


def test_help_shows_no_range_of_a_machine_number(run: Run) -> None:
    for command in [*([str(command.name)] for command in app.registered_commands), ["nursery", "make"]]:
        assert not re.search(r"\d{8}", run(*command, "--help").out), command
