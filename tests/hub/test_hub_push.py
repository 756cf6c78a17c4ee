"""Bundles on the hub: what is pushed is what is loaded, to the bit; nothing broken is pushed, and nothing of others replaced."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants, metadata_load
from safetensors.torch import save

import eigenzoo as ez
from builders import random_factors, random_stack, write_adapter, write_stacks
from eigenzoo.cli.app import main
from eigenzoo.display import markdown_text
from eigenzoo.errors import BundleError, FormatError, OutputError, UsageError
from hub_server import Hub, Repository

# huggingface_hub gives its HTTP library a file in the older one of two ways.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


def write_zoo(root: Path, kind: str) -> list[Path]:
    if kind == "stacked":
        return [write_adapter(root / f"m{n}", random_factors({"q": (7, 6)}, 2, n)) for n in range(5)]
    return write_stacks(root, {"block.weight": random_stack(5, (7, 6), 0), "bias": random_stack(5, (5,), 1)})


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return ez.fit(write_zoo(tmp_path / "secret-folder" / "zoo", "flat"), 2).save(tmp_path / "bundle")


def new_cache(monkeypatch: pytest.MonkeyPatch, path: Path) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(path))
    return path


@pytest.mark.parametrize("kind", ["flat", "tucker", "stacked"])
def test_pushed_and_loaded_it_rebuilds_the_same_bits(
    hub: Hub, logged_in: str, tmp_path: Path, kind: str, offline: Callable[[], None]
) -> None:
    paths = write_zoo(tmp_path / "zoo", kind)
    space = ez.fit(paths, {"outputs": 3, "inputs": 2} if kind == "tucker" else 2)
    pushed = space.push("me/space")
    commit = hub.repos["me/space"].branches["main"]
    assert pushed == f"me/space@{commit}"
    hub.forget()
    loaded = ez.load(pushed)
    assert hub.body_bytes > 0
    assert list(loaded.verify()) == []
    assert loaded.names == space.names
    for name in space.names:
        here, there = space.rebuild(name), loaded.rebuild(name)
        assert there.save(tmp_path / f"there-{name}")
        assert here.save(tmp_path / f"here-{name}")
        for file in (tmp_path / f"here-{name}").iterdir():
            assert file.read_bytes() == (tmp_path / f"there-{name}" / file.name).read_bytes()
    assert loaded.project(paths[0]).residual == space.project(paths[0]).residual
    hub.forget()
    assert ez.load("me/space").names == space.names
    assert hub.body_bytes == 0
    offline()
    hub.forget()
    for source in ("me/space", pushed, "me/space@main", f"hf://{pushed}"):
        assert ez.load(source).coefficients("m0").residuals == space.coefficients("m0").residuals
    assert hub.requests == []


def test_it_is_one_commit_without_moments_unless_they_are_asked_for(hub: Hub, logged_in: str, bundle: Path) -> None:
    space = ez.load(bundle)
    space.push("me/space", message="the first one")
    repo = hub.repos["me/space"]
    assert repo.messages == ["first", "the first one"]
    expected = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}
    assert set(repo.files) == expected - {"moments.safetensors"} | {".gitattributes"}
    assert not ez.load("me/space").has_moments
    space.push("me/space", moments=True, force=True)
    assert set(repo.files) == expected | {".gitattributes"}
    assert ez.load("me/space").has_moments
    assert len(repo.messages) == 3


def test_nothing_says_where_the_models_lay(hub: Hub, logged_in: str, bundle: Path, tmp_path: Path) -> None:
    ez.load(bundle).push("me/space")
    for name, data in hub.repos["me/space"].files.items():
        assert b"secret-folder" not in data, name
        assert str(tmp_path).encode() not in data
        assert logged_in.encode() not in data
    manifest = json.loads(hub.repos["me/space"].files["manifest.json"])
    assert [model["source"]["path"] for model in manifest["models"]] == ["m0", "m1", "m2", "m3", "m4"]


def test_a_broken_bundle_is_not_pushed(hub: Hub, logged_in: str, bundle: Path) -> None:
    basis = bundle / "basis.safetensors"
    data = bytearray(basis.read_bytes())
    data[-1] ^= 1
    basis.write_bytes(data)
    hub.forget()
    with pytest.raises(BundleError, match=r"bundle: basis.*A damaged bundle is not pushed"):
        ez.load(bundle).push("me/space")
    assert hub.requests == []
    assert hub.repos == {}


def test_what_the_hub_holds_is_compared_with_the_manifest(
    hub: Hub, logged_in: str, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ez.load(bundle).push("me/space")
    repo = hub.repos["me/space"]
    good = dict(repo.files)
    file = "coefficients/m1.safetensors"
    for number, (data, message) in enumerate(
        [
            (good[file][:-1] + b"\x7f", r"m1\.safetensors: the checksum differs"),
            (good[file] + b"\0", "bytes, but the manifest says"),
            (None, "'coefficients/m1.safetensors' is missing"),
        ]
    ):
        changed = {**good, file: data} if data is not None else {name: good[name] for name in good if name != file}
        repo.commit(changed)
        new_cache(monkeypatch, tmp_path / f"cache-{number}")
        with pytest.raises(BundleError, match=f"me/space: .*{message}"):
            ez.load("me/space")
    repo.commit({**good, "manifest.json": b'{"schema_version": 9}'})
    with pytest.raises(
        BundleError,
        match=r"me/space: the bundle has schema version 9\. This version of eigenzoo reads schema versions up to 2",
    ):
        ez.load("me/space")


def test_other_content_is_replaced_with_force_only_and_never_what_is_no_bundle(
    hub: Hub, logged_in: str, bundle: Path, tmp_path: Path
) -> None:
    space, other = ez.load(bundle), ez.fit(write_zoo(tmp_path / "other", "stacked"), 2)
    first = space.push("me/space")
    assert space.push("me/space") == first, "the same content is no commit"
    repo = hub.repos["me/space"]
    assert len(repo.messages) == 2
    with pytest.raises(OutputError, match=r"me/space: the repository already holds other content.*--force to replace"):
        other.push("me/space")
    assert ez.load(first).view == "weight"
    pushed = other.push("me/space", force=True)
    assert ez.load("me/space").view == "update"
    assert list(ez.load(pushed).verify()) == []
    assert ez.load(first).view == "weight", "a commit stays what it is"
    hub.repos["me/model"] = Repository({"model.safetensors": save({"w": torch.ones(2)}), "README.md": b"mine"})
    with pytest.raises(OutputError, match=r"me/model: the repository holds other files \(model\.safetensors\)"):
        space.push("me/model", force=True)
    assert hub.repos["me/model"].messages == ["first"]
    hub.repos["me/page"] = Repository({"README.md": b"mine", "LICENSE": b"mine too"})
    with pytest.raises(OutputError, match="me/page: the repository already holds other content"):
        space.push("me/page")
    space.push("me/page", force=True)
    assert hub.repos["me/page"].files["LICENSE"] == b"mine too"


def test_branches_and_private_repositories(hub: Hub, logged_in: str, bundle: Path, tmp_path: Path) -> None:
    space, other = ez.load(bundle), ez.fit(write_zoo(tmp_path / "other", "stacked"), 2)
    space.push("me/space", private=True)
    assert hub.repos["me/space"].private
    with pytest.raises(OutputError, match="me/space@v2: the repository already holds other content"):
        other.push("me/space", revision="v2")
    other.push("me/space@v2", force=True)
    assert ez.load("me/space@v2").view == "update"
    assert ez.load("me/space").view == "weight"
    hub.repos["me/open"] = Repository({})
    with pytest.raises(OutputError, match="me/open: the repository is public"):
        space.push("me/open", private=True)
    for wrong in ("space", "me/space/folder", "/me/space", "me/space@" + "0" * 40):
        with pytest.raises(UsageError, match=r"is no repository of the hub|a commit cannot be pushed to"):
            space.push(wrong)


def test_who_may_not_write_is_told(
    hub: Hub, bundle: Path, offline: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repos["org/space"] = Repository({})
    with pytest.raises(UsageError, match=r"org/space: no token is set.*`hf auth login`"):
        ez.load(bundle).push("org/space")
    assert hub.requests == []
    monkeypatch.setenv("HF_TOKEN", "hf_" + "wrong" * 6)
    for name in ("org/space", "org/new"):
        with pytest.raises(FormatError, match=rf"{name}: the hub refuses the request \(status 403\).*`hf auth login`"):
            ez.load(bundle).push(name)
    assert hub.repos["org/space"].messages == ["first"]
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        FormatError,
        match=r"org/space: the hub at .* cannot be reached \(ConnectError\)\. Check the connection and run it again\.$",
    ):
        ez.load(bundle).push("org/space")
    offline()
    with pytest.raises(
        UsageError, match=r"org/space: HF_HUB_OFFLINE is set, and a push needs the hub\. Run it without"
    ):
        ez.load(bundle).push("org/space")


def test_a_push_goes_on_through_faults_and_is_one_commit(
    hub: Hub, logged_in: str, bundle: Path, slept: list[float]
) -> None:
    failed: set[tuple[str, str]] = set()

    def once(method: str, path: str, _: int) -> Any:
        kind = method, path.split("/")[-2] if "/objects/" not in path else "objects"
        if kind in failed or path == "/api/repos/create":
            return None
        failed.add(kind)
        return 503

    hub.fault = once
    pushed = ez.load(bundle).push("me/space")
    assert len(hub.repos["me/space"].messages) == 2
    assert len(failed) > 4
    assert list(ez.load(pushed).verify()) == []


def test_a_commit_whose_answer_is_lost_is_not_made_twice(
    hub: Hub, logged_in: str, bundle: Path, slept: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    real, calls = HfApi.create_commit, []

    def lost(self: HfApi, *words: Any, **options: Any) -> Any:
        calls.append(real(self, *words, **options))
        raise HfHubHTTPError.__bases__[0]("the connection broke")

    monkeypatch.setattr(HfApi, "create_commit", lost)
    pushed = ez.load(bundle).push("me/space")
    assert len(calls) == 1
    assert pushed.endswith(hub.repos["me/space"].branches["main"])


def test_a_push_that_meets_another_is_refused(
    hub: Hub, logged_in: str, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import HfApi

    hub.repos["me/space"] = Repository({})
    real = HfApi.create_commit

    def later(self: HfApi, *words: Any, **options: Any) -> Any:
        hub.repos["me/space"].commit({"README.md": b"somebody else's"})
        return real(self, *words, **options)

    monkeypatch.setattr(HfApi, "create_commit", later)
    with pytest.raises(FormatError, match=r"me/space: the repository changed during the push \(status 412\)"):
        ez.load(bundle).push("me/space")
    assert hub.repos["me/space"].files == {"README.md": b"somebody else's"}


def test_growth_of_a_pushed_bundle_is_pushed_again(hub: Hub, logged_in: str, bundle: Path, tmp_path: Path) -> None:
    ez.load(bundle).push("me/space", moments=True)
    new = write_stacks(tmp_path / "new", {"block.weight": random_stack(1, (7, 6), 3), "bias": random_stack(1, (5,), 4)})
    grown = ez.load("me/space").add(new[0].rename(tmp_path / "new" / "m9"))
    grown.push("me/space", moments=True, force=True)
    assert ez.load("me/space").names[-1] == "m9"


def in_process(monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["eigenzoo", *words])
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit, match=r"[012]") as leave,
    ):
        main()
    return int(str(leave.value.code)), out.getvalue(), err.getvalue()


def in_its_own(hub: Hub, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own, with nothing but the environment to tell it of the hub."""
    own = {
        **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
        "HF_ENDPOINT": hub.url,
        "HF_HUB_CACHE": constants.HF_HUB_CACHE,
        **env,
    }
    command = [sys.executable, "-m", "eigenzoo", *words]
    return subprocess.run(command, env=own, capture_output=True, text=True, check=True)


@pytest.mark.slow
def test_the_commands_take_ids(hub: Hub, logged_in: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in write_zoo(tmp_path / "zoo", "flat"):
        hub.repos[f"org/{path.name}"] = Repository({"model.safetensors": (path / "model.safetensors").read_bytes()})
    ids, bundle = [f"org/m{place}" for place in range(5)], str(tmp_path / "bundle")
    done = in_its_own(hub, "fit", *ids, "-o", bundle, "--rank", "2")
    assert done.stderr == "", "silence in a pipe"
    code, out, err = in_process(monkeypatch, "push", bundle, "me/space", "--json")
    assert (code, err) == (0, "")
    pushed = json.loads(out)
    assert pushed["id"] == f"me/space@{hub.repos['me/space'].branches['main']}"
    code, out, _ = in_process(monkeypatch, "verify", "me/space")
    assert code == 0
    assert out.endswith("me/space: 5 models, 2 layers, whole\n")
    hub.forget()
    done = in_its_own(hub, "rebuild", "me/space@main", "m3", "-o", str(tmp_path / "rebuilt"), HF_HUB_OFFLINE="1")
    assert done.stderr == ""
    assert (tmp_path / "rebuilt" / "model.safetensors").is_file()
    assert hub.requests == []
    code, out, _ = in_process(monkeypatch, "project", "me/space", ids[0], "--json")
    assert list(json.loads(out)["models"]) == ["m0"]
    code, _, err = in_process(monkeypatch, "add", "me/space", ids[0])
    assert code == 2
    assert "add cannot replace a bundle on the hub" in err
    code, _, err = in_process(monkeypatch, "evidence", "me/space", "--quiet")
    assert code == 2
    assert "the bundle has no moments" in err


def test_the_card_on_the_hub_names_sources_by_their_commits(hub: Hub, logged_in: str, tmp_path: Path) -> None:
    for path in write_zoo(tmp_path / "zoo", "flat"):
        hub.repos[f"org/{path.name}"] = Repository({"model.safetensors": (path / "model.safetensors").read_bytes()})
    ids = [f"org/m{place}" for place in range(5)]
    ez.fit(ids, 2).push("me/space")
    card = hub.repos["me/space"].files["README.md"].decode()
    (tmp_path / "README.md").write_text(card)
    assert metadata_load(tmp_path / "README.md")["library_name"] == "eigenzoo"
    commits = {repo: hub.repos[repo].branches["main"] for repo in ids}
    assert f"eigenzoo fit {' '.join(f'{repo}@{commit}' for repo, commit in commits.items())} --view weight" in card
    for repo, commit in commits.items():
        assert f"| {markdown_text(f'hf://{repo}@{commit}')} |" in card
