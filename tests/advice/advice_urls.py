"""Messages about URLs: a web server on the loopback, a store in memory, and mirrors of what lies there."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
import pytest
import torch
from advice_bundles import write_bundle
from advice_case import Case
from advice_hub import FILES, PIPELINE, VALUES, Place, at_the_hub, files_of
from advice_zoos import assert_rebuilt
from safetensors.torch import save

import eigenzoo as ez
from eigenzoo.formats.opening import open_model
from eigenzoo.formats.paths import RECORD_FILE
from eigenzoo.formats.remote import address, record, retrying
from hub_server import Repository
from remote_servers import FileServer, running

STORE = "memory://advice-store"


@contextmanager
def changed(root: Path) -> Iterator[pytest.MonkeyPatch]:
    """A cache in the case's folder, and no waits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EIGENZOO_CACHE", str(root / "cache"))
        patch.setattr(retrying, "pause", lambda seconds, stopped: None)
        patch.setattr(record, "_own", {})
        patch.setattr(address, "_connected", {})
        yield patch


def in_store(
    work: Callable[[Path, pytest.MonkeyPatch], object], files: dict[str, bytes] | None = None
) -> Callable[[Path], object]:
    """Do something with a store in memory that holds `m0`, or these files."""

    def call(root: Path) -> object:
        system = fsspec.filesystem("memory")
        for name, data in (files or {f"m0/{name}": FILES[name] for name in FILES}).items():
            system.pipe_file(f"/advice-store/{name}", data)
        try:
            with changed(root) as patch:
                return work(root, patch)
        finally:
            system.rm("/advice-store", recursive=True)

    call.__doc__ = work.__doc__
    return call


def at_server(work: Callable[[FileServer, Path], object]) -> Callable[[Path], object]:
    """Do something with a web server that has the model `zoo/m0`."""

    def call(root: Path) -> object:
        with changed(root), running(FileServer({f"zoo/m0/{name}": FILES[name] for name in FILES})) as server:
            return work(server, root)

    call.__doc__ = work.__doc__
    return call


def read_at(server: FileServer) -> None:
    assert torch.equal(open_model(f"{server.url}/zoo/m0").read("w"), VALUES)


def failing(fault: str | int, wait: str = "0") -> Callable[[Path], object]:
    """Read from a server whose answers to a range are wrong once a model is open."""

    def work(server: FileServer, root: Path) -> None:
        model = open_model(f"{server.url}/zoo/m0")
        server.wait, server.fault = wait, lambda *_: fault
        model.read("w")

    return at_server(work)


def run_it_again(server: FileServer, root: Path) -> None:
    """The test ran it again with the server well; the model holds the values that lie there."""
    read_at(server)


def read_what_is_gone(server: FileServer, root: Path) -> None:
    model = open_model(f"{server.url}/zoo/m0")
    del server.files["zoo/m0/model.safetensors"]
    model.read("w")


def check_the_name(server: FileServer, root: Path) -> None:
    """The test named a file that is there; the model holds the values that lie there."""
    assert torch.equal(open_model(f"{server.url}/zoo/m0/model.safetensors").read("w"), VALUES)


def give_credentials(server: FileServer, root: Path) -> None:
    """The test gave a token by fsspec's own settings of the driver; the server answers who sends them with its values."""
    seen: list[str] = []
    handler = server.RequestHandlerClass
    real = handler.do_GET

    def do_GET(self: object) -> None:
        if "Authorization" not in self.headers:
            self.answer(401, b"")
            return
        seen.append(self.headers["Authorization"])
        real(self)

    fsspec.config.conf["http"] = {"client_kwargs": {"headers": {"Authorization": "Bearer secret"}}}
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(handler, "do_GET", do_GET)
            read_at(server)
    finally:
        del fsspec.config.conf["http"]
    assert set(seen) == {"Bearer secret"}


def read_what_changed(server: FileServer, root: Path) -> None:
    model = open_model(f"{server.url}/zoo/m0")
    server.files["zoo/m0/model.safetensors"] = save({"w": VALUES + 1}, {"format": "pt"})
    model.read("w")


def open_it_again(server: FileServer, root: Path) -> None:
    """The test opened it again; the model holds the values that lie there now."""
    server.files["zoo/m0/model.safetensors"] = save({"w": VALUES + 1}, {"format": "pt"})
    assert torch.equal(open_model(f"{server.url}/zoo/m0").read("w"), VALUES + 1)


def download_it_first(server: FileServer, root: Path) -> None:
    """The test downloaded the files; the model holds the values that lie there."""
    for name in FILES:
        path = root / "downloaded" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(server.files[f"zoo/m0/{name}"])
    assert torch.equal(open_model(root / "downloaded").read("w"), VALUES)


def open_any_bucket(root: Path, patch: pytest.MonkeyPatch) -> None:
    ez.open_zoo("memory://*/m0")


def name_the_bucket(root: Path, patch: pytest.MonkeyPatch) -> None:
    """The test named the bucket; the model holds the values that lie there."""
    (model,) = ez.open_zoo(f"{STORE}/*").models
    assert torch.equal(model.read("w"), VALUES)


def open_url_as_path(root: Path, patch: pytest.MonkeyPatch) -> None:
    ez.open_zoo(Path(f"{STORE}/m0"))


def give_text(root: Path, patch: pytest.MonkeyPatch) -> None:
    """The test gave it as text; the model holds the values that lie there."""
    (model,) = ez.open_zoo(f"{STORE}/m0").models
    assert torch.equal(model.read("w"), VALUES)


def open_a_list(root: Path, patch: pytest.MonkeyPatch) -> None:
    ez.open_zoo(f"{STORE}/zoo.txt")


def download_the_list(root: Path, patch: pytest.MonkeyPatch) -> None:
    """The test downloaded it; the model that it names holds the values that lie there."""
    (root / "zoo.txt").write_text(f"{STORE}/m0\n")
    (model,) = ez.open_zoo(root / "zoo.txt").models
    assert torch.equal(model.read("w"), VALUES)


def as_pickle() -> bytes:
    stream = io.BytesIO()
    torch.save({"w": VALUES}, stream)
    return stream.getvalue()


def open_pickle(root: Path, patch: pytest.MonkeyPatch) -> None:
    ez.open_zoo(f"{STORE}/m0", allow_pickle=True)


def download_and_allow(root: Path, patch: pytest.MonkeyPatch) -> None:
    """The test did both; the downloaded pickle and the converted file hold the values."""
    (root / "m0").mkdir()
    (root / "m0" / "pytorch_model.bin").write_bytes(as_pickle())
    assert torch.equal(open_model(root / "m0", allow_pickle=True).read("w"), VALUES)
    fsspec.filesystem("memory").pipe_file("/advice-store/m1/model.safetensors", FILES["model.safetensors"])
    assert torch.equal(open_model(f"{STORE}/m1").read("w"), VALUES)


def open_pipeline(root: Path, patch: pytest.MonkeyPatch) -> None:
    ez.open_zoo(f"{STORE}/pipe")


def open_component(root: Path, patch: pytest.MonkeyPatch) -> None:
    """The test did both; the component and the downloaded pipeline hold the values that lie there."""
    assert torch.equal(open_model(f"{STORE}/pipe/unet").read("w"), VALUES)
    for name, data in PIPELINE.items():
        path = root / "downloaded" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    assert torch.equal(open_model(root / "downloaded").read("unet.w"), VALUES)


def open_without_cache(root: Path, patch: pytest.MonkeyPatch) -> None:
    (root / "file").write_text("")
    patch.setenv("EIGENZOO_CACHE", str(root / "file"))
    open_model(f"{STORE}/m0")


def set_the_cache(root: Path, patch: pytest.MonkeyPatch) -> None:
    """The test did both; the model holds the values that lie there."""
    for cache in (str(root / "cache"), "off"):
        patch.setenv("EIGENZOO_CACHE", cache)
        assert torch.equal(open_model(f"{STORE}/m0").read("w"), VALUES)


def open_a_copy(root: Path, patch: pytest.MonkeyPatch) -> None:
    shutil.copytree(open_model(f"{STORE}/m0").path, root / "copied")
    open_model(root / "copied")


def open_by_url_or_there(root: Path, patch: pytest.MonkeyPatch) -> None:
    """The test did both; the models hold the values that lie there."""
    assert torch.equal(open_model(f"{STORE}/m0").read("w"), VALUES)
    patch.setenv("EIGENZOO_CACHE", str(root / "another"))
    place = root / "another" / "remote" / "copied"
    place.parent.mkdir(parents=True)
    shutil.copytree(open_model(f"{STORE}/m0").path, place, dirs_exist_ok=True)
    assert torch.equal(open_model(place).read("w"), VALUES)


def mirrored(root: Path, change: Callable[[dict], object]) -> Path:
    """Mirror the model, change its record, and forget it as another process would; returns the mirror."""
    path = open_model(f"{STORE}/m0").path
    document = json.loads((path / RECORD_FILE).read_text())
    change(document)
    (path / RECORD_FILE).write_text(json.dumps(document))
    record._own.clear()
    return path


def open_unrecorded(root: Path, patch: pytest.MonkeyPatch) -> None:
    open_model(mirrored(root, lambda document: document["files"].pop("model.safetensors"))).read("w")


def open_with_damaged_record(root: Path, patch: pytest.MonkeyPatch) -> None:
    open_model(mirrored(root, lambda document: document.update(files=3))).read("w")


def open_without_secrets(root: Path, patch: pytest.MonkeyPatch) -> None:
    path = mirrored(root, lambda document: document["files"]["model.safetensors"].update(secret=True))
    open_model(path).read("w")


def open_by_url(root: Path, patch: pytest.MonkeyPatch) -> None:
    """The test opened it by its URL; the model holds the values that lie there."""
    assert torch.equal(open_model(f"{STORE}/m0").read("w"), VALUES)


def remove_and_open(root: Path, patch: pytest.MonkeyPatch) -> None:
    """The test removed that folder and opened the model by its URL; it holds the values that lie there."""
    for path in list((root / "cache" / "remote").rglob(RECORD_FILE)):
        shutil.rmtree(path.parent)
    open_by_url(root, patch)


def open_bundle(root: Path) -> object:
    write_bundle(root)
    return in_store(
        lambda *_: ez.open_zoo(f"{STORE}/space"), {f"space/{n}": d for n, d in files_of(root / "bundle").items()}
    )(root)


def load_bundle(root: Path) -> object:
    write_bundle(root)
    return in_store(
        lambda *_: ez.load(f"{STORE}/space"), {f"space/{n}": d for n, d in files_of(root / "bundle").items()}
    )(root)


def project_bundle(root: Path) -> object:
    write_bundle(root)
    return in_store(
        lambda *_: ez.open_zoo(root / "zoo", base=f"{STORE}/space"),
        {f"space/{n}": d for n, d in files_of(root / "bundle").items()},
    )(root)


def download_it_to_use_it(root: Path) -> None:
    """The test downloaded it; the models that are rebuilt of it hold the files' values."""
    shutil.copytree(root / "bundle", root / "downloaded")
    assert_rebuilt(ez.load(root / "downloaded"), root / "originals")


def download_or_name_the_models(root: Path) -> None:
    """The test did both; the models hold the files' values."""
    download_it_to_use_it(root)
    assert_rebuilt(ez.open_zoo([root / "zoo" / f"m{n}" for n in range(4)]), root / "originals")


def open_hub_bundle(place: Place) -> None:
    place.hub.repos["org/space"] = Repository(files_of(write_bundle(place.root)))
    place.patch.setitem(fsspec.config.conf, "hf", {"endpoint": place.hub.url, "token": False})
    place.patch.setattr(address, "_connected", {})
    place.patch.setenv("EIGENZOO_CACHE", str(place.root / "cache"))
    ez.open_zoo("hf://org/space")


def name_it_by_its_id(place: Place) -> None:
    """The test loaded it by that id; the rebuilt models hold the files' values."""
    place.hub.repos["org/space"] = Repository(files_of(place.root / "bundle"))
    assert_rebuilt(ez.load("org/space"), place.root / "originals")


AGAIN = "heck the connection and run it again: headers"
PICKLED = {"m0/pytorch_model.bin": as_pickle()}
PIPE = {f"pipe/{name}": data for name, data in PIPELINE.items()}
BY_URL = "pen the model by its URL"

CASES = [
    Case("A server that fails", failing(500), ("in 8 attempts", AGAIN), at_server(run_it_again)),
    Case(
        "A server that asks to wait for an hour",
        failing(429, "4000"),
        ("un it again in 4000 s",),
        at_server(run_it_again),
    ),
    Case(
        "A file that has gone from its server",
        at_server(read_what_is_gone),
        ("heck the name",),
        at_server(check_the_name),
    ),
    Case("A file that a server refuses", failing(403), ("et the driver's credentials",), at_server(give_credentials)),
    Case(
        "A file that changes at its URL", at_server(read_what_changed), ("pen the zoo again",), at_server(open_it_again)
    ),
    Case("A server that knows no ranges", failing("whole"), ("ownload the file first",), at_server(download_it_first)),
    Case("A glob of buckets", in_store(open_any_bucket), ("ame the bucket",), in_store(name_the_bucket)),
    Case("A URL given as a path", in_store(open_url_as_path), ("merges its double slash",), in_store(give_text)),
    Case("A list at a URL", in_store(open_a_list), ("ownload it",), in_store(download_the_list)),
    Case(
        "A pickle at a URL",
        in_store(open_pickle, PICKLED),
        ("ownload it and pass",),
        in_store(download_and_allow, PICKLED),
    ),
    Case("A pipeline at a URL", in_store(open_pipeline, PIPE), ("/pipe/unet)",), in_store(open_component, PIPE)),
    Case(
        "A cache folder that cannot be written",
        in_store(open_without_cache),
        ("et EIGENZOO_CACHE",),
        in_store(set_the_cache),
    ),
    Case("A copy of a mirror", in_store(open_a_copy), (BY_URL, "set EIGENZOO_CACHE"), in_store(open_by_url_or_there)),
    Case("A mirror without a file's record", in_store(open_unrecorded), (BY_URL,), in_store(open_by_url)),
    Case(
        "A mirror with a damaged record",
        in_store(open_with_damaged_record),
        ("emove its folder",),
        in_store(remove_and_open),
    ),
    Case("A mirror of a URL with credentials", in_store(open_without_secrets), (BY_URL,), in_store(open_by_url)),
    Case("A bundle at a URL as a zoo", open_bundle, ("ownload it to use it, or name",), download_or_name_the_models),
    Case("A bundle at a URL", load_bundle, ("ownload it",), download_it_to_use_it),
    Case("A bundle at a URL as a base", project_bundle, ("ownload it to use it",), download_it_to_use_it),
    Case(
        "A bundle on the hub as a zoo",
        at_the_hub(open_hub_bundle),
        ("ame it by its id",),
        at_the_hub(name_it_by_its_id),
    ),
]
