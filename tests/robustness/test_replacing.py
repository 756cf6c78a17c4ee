"""What `--force` may replace: an output as eigenzoo wrote it. Whatever else lies there stays, to the byte."""

from __future__ import annotations

import errno
import io
import os
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from killed import arguments, digest
from operations import Net, _adapted, write_start

import eigenzoo as ez
from builders import random_stack, write_stacks
from eigenzoo import adapt
from eigenzoo.cli.app import main
from eigenzoo.formats.output import whole
from eigenzoo.subspace.bundles import card
from sampling import slow_but

Words = Callable[[Path, Path], list[object]]

FOLDERS: dict[str, Words] = {
    "fit": lambda root, out: ["fit", root / "zoo", "-o", out, "--rank", 2, "--no-cache", "--quiet"],
    "add": lambda root, out: ["add", root / "bundle", root / "more" / "new", "-o", out, "--quiet"],
    "rebuild": lambda root, out: ["rebuild", root / "bundle", "m1", "-o", out],
    "rebuild of an adapter file": lambda root, out: ["rebuild", root / "basis", root / "task.safetensors", "-o", out],
    "report, png": lambda root, out: ["report", root / "bundle", "-o", out, "--format", "png", "--quiet"],
    "report, svg": lambda root, out: ["report", root / "bundle", "-o", out, "--format", "svg", "--quiet"],
    "nursery": lambda root, out: ["nursery", "make", "digits-cnn", "-o", out, "--num-models", 1, "--quiet"],
    "demo": lambda root, out: ["demo", "-o", out, "--num-models", 6, "--quiet"],
}
"""Commands that write a folder."""

OTHER_KIND = "is a folder of another kind. --force (force=True) replaces only an output of the same kind"
NO_RECORD = (
    "has no record (.eigenzoo-output.json) of the files that eigenzoo wrote. --force (force=True) replaces only an output of the "
    "same kind that eigenzoo wrote. Choose another name, or move it away."
)

FILES: dict[str, Words] = {
    f"report, {kind}": lambda root, out, kind=kind: ["report", root / "bundle", "-o", out, "--format", kind, "--quiet"]  # type: ignore[misc]
    for kind in ("html", "md", "csv", "json")
}
"""Commands that write a file."""


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A zoo, a bundle, an adapter file, and one output of each command, under the command's name."""
    root = tmp_path_factory.mktemp("start")
    write_start(root)
    _adapted(root)
    for name, words in {**FOLDERS, **FILES}.items():
        if name not in ("nursery", "demo"):
            assert _run(*words(root, root / name)) == (0, "")
    _write_demo(root / "demo")
    shutil.copytree(root / "demo" / "zoo", root / "nursery")
    return root


def _write_demo(folder: Path) -> None:
    """What the demo leaves, of models that are hastily trained."""
    pytest.importorskip("sklearn")
    pytest.importorskip("transformers")
    from eigenzoo import nursery

    nursery.make("digits-cnn", folder / "zoo", num_models=3)
    ez.fit(folder / "zoo", rank=1, cache=False).save(folder / "bundle")
    words = ["report", folder / "bundle", "-o", folder / "report.html", "--no-cache", "--quiet"]
    assert _run(*words) == (0, "")


@pytest.fixture
def root(start: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(start, tmp_path / "root"))


def _run(*words: object) -> tuple[object, str]:
    """Run a command in this process; returns its exit code, and what it said on standard error."""
    said = io.StringIO()
    with (
        arguments(*words),
        redirect_stdout(io.StringIO()),
        redirect_stderr(said),
        pytest.raises(SystemExit, match=r"[012]") as leave,
    ):
        main()
    return leave.value.code, " ".join(said.getvalue().split())


def _stays(root: Path, words: list[object], said: str) -> None:
    """The command refuses, says why, and leaves every byte and no trace."""
    before = digest(root)
    code, error = _run(*words)
    assert code == 2
    assert said in error
    assert digest(root) == before


@pytest.mark.parametrize("folder", ["mine", "likely", "zoo/m1", "zoo"])
@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_of_somebodys_is_never_replaced(root: Path, name: str, folder: str) -> None:
    """Not even one that looks like such an output: a zoo of another tool, pictures, the checkpoint of somebody's training."""
    (root / "mine").mkdir()
    (root / "mine" / "thesis.tex").write_text("years of work")
    likely = root / "likely"
    (likely / "zoo").mkdir(parents=True)
    for file in ("zoo.json", "zoo/zoo.json", "scree.png", "model.safetensors", "config.json"):
        (likely / file).write_text("{}")
    words = FOLDERS[name]
    _stays(root, words(root, root / folder), "exists already")
    said = OTHER_KIND if name in ("fit", "add", "demo") else NO_RECORD
    _stays(root, [*words(root, root / folder), "--force"], said)


@pytest.mark.parametrize("name", ["fit", "nursery"])
def test_the_old_output_comes_back_where_the_new_one_cannot_take_its_name(
    root: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where two folders cannot be exchanged at once, the old one is moved aside first."""
    before, rename = digest(root / name), Path.rename
    failed: list[Path] = []

    def refuse(path: Path, target: str | os.PathLike[str]) -> Path:
        if Path(target) == root / name and ".old-" not in path.name:
            failed.append(path)
            raise OSError(errno.EIO, "Input/output error", str(target))
        return rename(path, target)

    monkeypatch.setattr(whole, "exchange", lambda *paths: False)
    monkeypatch.setattr(Path, "rename", refuse)
    _, error = _run(*FOLDERS[name](root, root / name), "--force")
    assert failed
    assert "Input/output error" in error
    assert digest(root / name) == before
    assert not list(root.glob(f".{name}*old-*"))


def test_pictures_and_models_alone_are_no_outputs(root: Path) -> None:
    (root / "photos").mkdir()
    (root / "photos" / "holiday.png").write_bytes(b"png")
    _stays(root, [*FOLDERS["report, png"](root, root / "photos"), "--force"], NO_RECORD)
    _stays(root, [*FOLDERS["rebuild"](root, root / "zoo" / "m1"), "--force"], NO_RECORD)


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("place", ["thesis.tex", "deep/er/thesis.tex", "own"])
def test_a_file_of_somebodys_in_an_output_is_named_and_stays(root: Path, name: str, place: str) -> None:
    """At the top, in a new folder, and in a folder of the output's own."""
    output = root / name
    folders = [path for path in output.iterdir() if path.is_dir()]
    if place == "own":
        place = f"{folders[0].name}/thesis.tex" if folders else ".thesis"
    file = output / place
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("years of work")
    words = FOLDERS[name](root, output)
    _stays(root, words, "exists already")
    _stays(root, [*words, "--force"], "thesis")
    link = output / "link"
    file.rename(root / "elsewhere")
    link.symlink_to(root / "elsewhere")
    _stays(root, [*words, "--force"], "'link', which eigenzoo did not write")


@pytest.mark.parametrize("name", [name for name in FOLDERS if name not in ("fit", "add")])
def test_an_output_that_was_changed_stays(root: Path, name: str) -> None:
    """The same name and length: a model that was trained on, a table that was edited."""
    output = root / name / ("zoo" if name == "demo" else "")
    files = sorted(path for path in output.rglob("*") if path.is_file() and not path.name.startswith("."))
    content = files[0].read_bytes()
    files[0].write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    _stays(root, [*FOLDERS[name](root, root / name), "--force"], "which was changed since eigenzoo wrote it")


def test_a_card_that_was_edited_stays(root: Path) -> None:
    """A bundle's README.md is the page that people write on; `add` replaces the bundle without --force."""
    card = root / "fit" / "README.md"
    written = card.read_text()
    card.write_text(written + "\nTrained by us, for years.\n")
    grow = ["add", root / "fit", root / "more" / "new", "--quiet"]
    demo = root / "demo" / "bundle" / "README.md"
    demo.write_text("ours")
    for words in (
        [*FOLDERS["fit"](root, root / "fit"), "--force"],
        grow,
        [*FOLDERS["demo"](root, root / "demo"), "--force"],
    ):
        _stays(root, words, "holds 'README.md', which was changed since eigenzoo wrote it")
    # What the error says to do next.
    card.rename(root / "mine.md")
    assert _run(*grow) == (0, "")
    assert card.read_text() != written


@pytest.mark.parametrize("name", slow_but([name for name in FOLDERS if name != "demo"], ["fit", "rebuild"]))
def test_an_own_output_is_replaced(root: Path, name: str) -> None:
    output = root / name
    for file in output.rglob("*.json"):
        if file.name == "zoo.json":
            file.unlink()  # what is missing is no reason to keep the rest
    assert _run(*FOLDERS[name](root, output), "--force") == (0, "")
    assert _run(*FOLDERS[name](root, output), "--force") == (0, "")
    assert sorted(path.name for path in root.iterdir() if path.name.startswith(".")) == []


def test_a_demo_may_be_made_again_though_its_bundle_has_grown(root: Path) -> None:
    from eigenzoo.cli.demo import foreign_to_a_demo

    assert foreign_to_a_demo(root / "demo") == ""
    grown = ez.load(root / "demo" / "bundle").project(next((root / "demo" / "zoo").glob("*.safetensors")))
    assert grown.residual >= 0
    shutil.rmtree(root / "demo" / "bundle")
    ez.fit(root / "demo" / "zoo", rank=2, cache=False).save(root / "demo" / "bundle")
    assert foreign_to_a_demo(root / "demo") == ""
    (root / "demo" / "report.html").write_text("<html>mine</html>")
    assert foreign_to_a_demo(root / "demo") == "holds another 'report.html'"


@pytest.mark.parametrize("name", slow_but(FILES, list(FILES)[:1]))
def test_a_file_is_replaced_only_by_another_report_in_its_format(root: Path, name: str) -> None:
    words, kind = FILES[name], name.rpartition(" ")[2]
    for content in ("years of work", '{"title": "mine"}', "section,layer\n1,2\n", "<html>eigenzoo report</html>"):
        mine = root / f"thesis.{kind}"
        mine.write_text(content)
        _stays(root, words(root, mine), "exists already")
        _stays(root, [*words(root, mine), "--force"], "is a file of another kind")
    others = [root / other for other in FILES if other != name]
    for other in others:
        _stays(root, [*words(root, other), "--force"], "is a file of another kind")
    _stays(root, words(root, root / name), "exists already")
    assert _run(*words(root, root / name), "--force") == (0, "")
    (root / "empty").touch()
    assert _run(*words(root, root / "empty"), "--force") == (0, "")


def test_an_adapter_file_is_replaced_only_by_another(root: Path) -> None:
    adapted = adapt.attach(Net(), ez.load(root / "basis"))
    adapt.save(adapted, root / "task.safetensors", force=True)
    for mine in (root / "zoo" / "m1" / "model.safetensors", root / "report, md"):
        before = mine.read_bytes()
        with pytest.raises(ez.OutputError, match=r"is a file of another kind\. --force \(force=True\) replaces only"):
            adapt.save(adapted, mine, force=True)
        assert mine.read_bytes() == before


def test_a_hidden_folder_whose_name_begins_like_leftovers_stays(root: Path) -> None:
    """Leftovers are known by their whole names, and by their age where another system wrote them."""
    folder = root / ".out.tmp-of-last-year"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    os.utime(folder, (0, 0))
    assert _run(*FOLDERS["rebuild"](root, root / "out")) == (0, "")
    assert (folder / "thesis.tex").read_text() == "years of work"


def test_a_bundle_that_is_exchanged_while_it_is_looked_at_has_no_strangers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its manifest and its card were read of two bundles, each as eigenzoo wrote it."""
    paths = write_stacks(tmp_path / "zoo", {"w": random_stack(6, (5, 4), 0)})
    ez.fit(paths[:4], 1, cache=False).save(tmp_path / "bundle")
    ez.fit(paths, 2, cache=False).save(tmp_path / "other")
    read_json = card.read_json
    times = iter(range(10))

    def exchanged(path: Path, **options: Any) -> Any:
        found = read_json(path, **options)
        if next(times) == 0:
            os.replace(tmp_path / "bundle", tmp_path / "old")
            os.replace(tmp_path / "other", tmp_path / "bundle")
        return found

    monkeypatch.setattr(card, "read_json", exchanged)
    assert card.foreign_to_a_bundle(tmp_path / "bundle") == ""
    assert next(times) == 2, "it was looked at twice"
