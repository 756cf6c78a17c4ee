"""Remote models without a network: the same models by the same names as on disk, and mirrors that say what they are."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from safetensors.torch import save_file

import eigenzoo as ez
from builders import random_factors, random_stack, write_adapter, write_model, write_stacks
from eigenzoo.errors import FormatError, OutputError, UnsafePathError, UnsupportedError, ZooError
from eigenzoo.formats import tree
from eigenzoo.formats.opening import open_model
from eigenzoo.formats.paths import RECORD_FILE
from eigenzoo.formats.remote import remote_file, remote_url
from eigenzoo.formats.remote.hub_files import find_in_tree
from eigenzoo.formats.safetensors.header import MAX_HEADER_BYTES
from eigenzoo.zoo.sources import find_models, name_models
from fuzz.samples import write_mlx


class Place:
    """A folder of fsspec's memory, and the same folder on disk."""

    def __init__(self, root: Path) -> None:
        self.name = uuid.uuid4().hex[:12]
        self.disk = root / self.name
        self.url = f"memory://{self.name}"
        self.memory: Any = fsspec.filesystem("memory")

    def upload(self) -> str:
        for path in self.disk.rglob("*"):
            if path.is_file():
                self.put(path.relative_to(self.disk).as_posix(), path.read_bytes())
        return self.url

    def put(self, name: str, data: bytes) -> None:
        self.memory.pipe_file(f"/{self.name}/{name}", data)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path)
    made.disk.mkdir()
    yield made
    made.memory.store.clear()


def write_tree(root: Path) -> None:
    """Models as they lie about: at several depths, beside what is none, hidden, private, too deep."""
    for name in ("m10", "m9", "runs/a/adapter-like", "_parent", ".hidden", "x/y/z/deep", "x/y/z/w/too-deep"):
        write_model(root / name, {"w": torch.arange(12.0).reshape(3, 4) + len(name)})
    for name in ("single", "second"):
        save_file({"w": torch.zeros(3, 4)}, root / f"{name}.safetensors")
    (root / "pair").mkdir()
    for name in ("one", "two"):
        save_file({"w": torch.ones(3, 4)}, root / "pair" / f"{name}.safetensors")
    (root / "bundle").mkdir()
    (root / "bundle" / "manifest.json").write_text("{}")
    save_file({"w": torch.ones(3, 4)}, root / "bundle" / "basis.safetensors")
    (root / "notes.md").write_text("text")


@pytest.mark.parametrize(
    "source",
    [
        "",
        "/m9",
        "/single.safetensors",
        "/m*",
        "/*",
        "/runs/*/adapter-*",
        "/**/adapter-*",
        "/pair/[ot]*.safetensors",
        "/p*/tw?.safetensors",
        "/x",
    ],
)
def test_a_url_names_the_models_that_a_path_names(place: Place, source: str) -> None:
    write_tree(place.disk)
    place.upload()
    here = [path for path in find_models(f"{place.disk}{source}") if isinstance(path, Path)]
    there = [path for path in find_models(f"{place.url}{source}") if isinstance(path, Path)]
    assert [path.name for path in there] == [path.name for path in here]
    assert name_models(there) == name_models(here)
    assert [remote_url(path) for path in there] == [
        f"{place.url}/{path.relative_to(place.disk).as_posix()}".removesuffix("/.") for path in here
    ]
    for one, other in zip(here, there, strict=True):
        assert torch.equal(open_model(one).read("w"), open_model(other).read("w"))
        assert open_model(one).format == open_model(other).format


def test_lists_and_text_files_hold_urls_beside_paths(place: Place, tmp_path: Path) -> None:
    paths = write_stacks(place.disk / "zoo", {"w": random_stack(4, (3, 4))})
    place.upload()
    (place.disk / "zoo.txt").write_text(f"# mixed\n{place.url}/zoo/m0\nzoo/m1\n\n{place.url}/zoo/m[23]\n")
    listed = ez.open_zoo(str(place.disk / "zoo.txt"))
    assert listed.names == ("m0", "m1", "m2", "m3")
    assert [remote_url(model.path) is None for model in listed.models] == [False, True, False, False]
    given = ez.open_zoo([f"{place.url}/zoo/m0", paths[1], f"{place.url}/zoo/m[23]", f"{place.url}/zoo/m0"])
    assert given.names == listed.names
    local = ez.open_zoo(place.disk / "zoo")
    for zoo in (listed, given, ez.open_zoo(f"file://{place.disk}/zoo")):
        for block, other in zip(zoo.stack("w").blocks(), local.stack("w").blocks(), strict=True):
            assert torch.equal(block.rows, other.rows)
    assert remote_url(open_model(f"{place.url}/zoo/m0/").path) == f"{place.url}/zoo/m0"
    report = ez.inspect(listed)
    assert [model.path for model in report.models][:2] == [f"{place.url}/zoo/m0", str(paths[1])]


def test_modules_in_folders_are_carried_and_other_weights_are_named(place: Place, tmp_path: Path) -> None:
    for folder in write_stacks(place.disk / "zoo", {"w": random_stack(3, (3, 4))}):
        for name in (
            "modules.json",
            "1_Pooling/config.json",
            "2_Dense/config.json",
            "value_head.bin",
            "3_Dense/pytorch_model.bin",
        ):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("[]")
        save_file({"linear.weight": torch.ones(200, 100)}, folder / "2_Dense" / "model.safetensors")
    place.upload()
    here, there = (ez.open_zoo(f"{root}/zoo").models[1] for root in (place.disk, place.url))
    assert set(there.side_files) == set(here.side_files)
    for name in here.side_files:
        assert there.read_side_file(name) == here.read_side_file(name), name
    assert set(there.beside.weights) == set(here.beside.weights) == {"value_head.bin", "3_Dense/pytorch_model.bin"}


def test_names_that_agree_are_told_apart_by_their_urls(place: Place) -> None:
    for run in "ab":
        write_model(place.disk / run / "last", {"w": torch.ones(3, 4) * ord(run)})
    place.upload()
    zoo = ez.open_zoo([f"{place.url}/a/last", f"{place.url}/b/last"])
    assert zoo.names == ("a/last", "b/last")


def test_a_pattern_that_looks_at_too_many_names_is_named(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tree(place.disk)
    monkeypatch.setattr(tree, "MAX_LOOKED_AT", 5)
    for pattern in (f"{place.upload()}/**", f"{place.disk}/**"):
        with pytest.raises(ZooError, match=f"{re.escape(pattern)}: the folder contains more than 5 names"):
            find_models(pattern)


def test_a_model_below_another_is_named_where_it_can_be_opened(place: Place) -> None:
    for name in ("a0", "a1", "a0/second"):
        write_adapter(place.disk / name, random_factors({"q": (6, 5)}, 2, len(name)))
    for source in (place.upload(), str(place.disk)):
        (warning,) = ez.open_zoo(source).warnings
        named = warning.partition("; name them to read them, such as ")[2]
        assert named == f"'{source}/a0/second'"
        assert ez.open_zoo(named.strip("'")).names == ("second",)


def test_a_stub_is_known_as_one_in_a_later_process_and_in_no_other_folder(place: Place, tmp_path: Path) -> None:
    # Through a chained file system, which another process can open too: its memory:// would be empty.
    write_model(place.disk / "zoo" / "m0", {"w": torch.arange(12.0) + 1})
    (place.disk / "zoo" / "m0" / "config.json").write_text("{}")
    archive = shutil.make_archive(str(tmp_path / "zoo"), "zip", place.disk)
    model = open_model(f"zip://zoo/m0::file://{archive}")
    assert remote_url(model.path) == f"zip://zoo/m0::file://{archive}"
    assert model.name == "m0"
    weights = model.path / "model.safetensors"
    assert weights.read_bytes()[-48:] == bytes(48)
    assert remote_file(weights) is not None
    assert remote_file(model.path / "config.json") is None, "small files are held whole"
    code = (
        "import sys; from eigenzoo.formats.opening import open_model; model = open_model(sys.argv[1]);"
        "print(model.read('w').tolist(), model.ignored_files)"
    )
    run = [sys.executable, "-c", code, str(model.path)]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{[float(value + 1) for value in range(12)]} ()"
    shutil.copytree(model.path, tmp_path / "copied")
    with pytest.raises(FormatError, match=r"without its values.*Open the model by its URL"):
        open_model(tmp_path / "copied")
    (tmp_path / "linked").symlink_to(model.path)
    assert torch.equal(open_model(tmp_path / "linked").read("w"), torch.arange(12.0) + 1)


def test_a_damaged_mirror_is_made_anew(place: Place) -> None:
    write_model(place.disk / "m0", {"w": torch.arange(12.0)})
    place.upload()
    path = open_model(f"{place.url}/m0").path / "model.safetensors"
    for damage in (lambda: path.write_bytes(b""), path.unlink, (path.parent / RECORD_FILE).unlink, lambda: flip(path)):
        damage()
        assert torch.equal(open_model(f"{place.url}/m0").read("w"), torch.arange(12.0))
    assert [entry.name for entry in path.parent.parent.iterdir()] == ["m0"], "nothing temporary is left"


def flip(path: Path) -> None:
    """Change a byte of the header, and not the time."""
    time = path.stat().st_mtime_ns
    data = bytearray(path.read_bytes())
    data[20] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(time, time))


def test_a_cache_that_is_off_is_gone_with_the_process(place: Place, tmp_path: Path) -> None:
    code = (
        "import torch, fsspec, sys; from safetensors.torch import save;"
        "from eigenzoo.formats.opening import open_model;"
        "fsspec.filesystem('memory').pipe_file('/a/model.safetensors', save({'w': torch.ones(3)}));"
        "model = open_model('memory://a'); print(model.path, model.read('w').tolist())"
    )
    off = {**os.environ, "EIGENZOO_CACHE": "off", "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=off)
    path, _, values = done.stdout.partition(" ")
    assert values.strip() == "[1.0, 1.0, 1.0]"
    assert path.startswith(str(tmp_path))
    assert not Path(path).exists()
    assert not list(tmp_path.glob("eigenzoo-*"))


def test_a_cache_that_cannot_be_written_is_told(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(place.disk / "m0", {"w": torch.arange(12.0)})
    place.upload()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EIGENZOO_CACHE", str(tmp_path / "file"))
    with pytest.raises(OutputError, match=r"the mirror cannot be written.*Set EIGENZOO_CACHE"):
        open_model(f"{place.url}/m0")


def test_values_are_checked_to_be_of_the_file_that_was_opened(place: Place) -> None:
    for number in range(2):
        write_model(place.disk / f"m{number}", {"w": torch.arange(12.0) + number})
    place.upload()
    zoo = ez.open_zoo(place.url)
    place.put("m0/model.safetensors", (place.disk / "m1" / "model.safetensors").read_bytes())
    with pytest.raises(FormatError, match=rf"{place.url}/m0/model.safetensors: the file changed since its header"):
        zoo.models[0].read("w")
    assert torch.equal(ez.open_zoo(place.url).models[0].read("w"), torch.arange(12.0) + 1)


@pytest.mark.parametrize(
    "name",
    ["../../escape/model.safetensors", "m1/./model.safetensors", "m\\1/model.safetensors", "m1/a\nb.safetensors"],
)
def test_names_that_lead_elsewhere_are_refused(place: Place, name: str) -> None:
    write_model(place.disk / "m0", {"w": torch.arange(12.0)})
    place.upload()
    # What stores list is what they were given: keys are no paths to them.
    found = place.memory.store.pop(f"/{place.name}/m0/model.safetensors")
    place.memory.store[f"/{place.name}/m0/model.safetensors"] = found
    place.memory.store[f"/{place.name}/{name}"] = found
    with pytest.raises(UnsafePathError, match=rf"{place.url}: .*Files of a model are named relative to its own folder"):
        ez.open_zoo(place.url)


def test_hostile_headers_are_refused_by_length_before_they_are_read(place: Place) -> None:
    write_model(place.disk / "good", {"w": torch.arange(12.0)})
    good = (place.disk / "good" / "model.safetensors").read_bytes()
    place.upload()
    cases = {
        "absurd": ((2**62).to_bytes(8, "little") + good[8:], "the header has 4611686018427387904 bytes"),
        "long": ((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + good[8:], "Headers up to 33554432 bytes are read"),
        "beyond": (
            (len(good)).to_bytes(8, "little") + good[8:],
            f"the header has {len(good)} bytes, but the file has {len(good)}",
        ),
        "cut": (good[:-8], "the safetensors library refuses it"),
        "empty": (b"", "A safetensors file has at least 8"),
        "pointer": (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1234\n",
            "a Git LFS pointer.* of 1,234 bytes",
        ),
        "text": (b"<html>this is no safetensors file</html>", "an HTML page with the name of a model file"),
    }
    for name, (data, _) in cases.items():
        place.put(f"bad/{name}/model.safetensors", data)
    place.put("bad/good/model.safetensors", good)
    for name, (_, message) in cases.items():
        with pytest.raises(FormatError, match=rf"{place.url}/bad/{name}, model\.safetensors: .*({message})"):
            open_model(f"{place.url}/bad/{name}")
    zoo = ez.open_zoo(f"{place.url}/bad", allow_missing=True)
    assert zoo.names == ("good",)
    assert len(zoo.skipped) == len(cases)


def test_side_files_are_bounded_before_they_are_downloaded(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(place.disk / "m0", {"w": torch.arange(12.0)})
    place.upload()
    place.put("m0/config.json", b" " * (16 * 2**20 + 1))
    with pytest.raises(FormatError, match=r"'config\.json' has 16777217 bytes.*at most 16777216 bytes"):
        open_model(f"{place.url}/m0")


def test_shards_of_an_index_are_found_and_missed(place: Place) -> None:
    for number in (1, 2):
        shard = place.disk / "m0" / "parts" / f"s{number}.safetensors"
        shard.parent.mkdir(parents=True, exist_ok=True)
        save_file({f"w{number}": torch.full((3,), float(number))}, shard)
    save_file({"other": torch.zeros(2)}, place.disk / "m0" / "parts" / "unlisted.safetensors")
    names = {f"w{number}": f"parts/s{number}.safetensors" for number in (1, 2)}
    (place.disk / "m0" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    place.upload()
    model = open_model(f"{place.url}/m0")
    assert torch.equal(model.read("w2"), torch.full((3,), 2.0))
    assert not (model.path / "parts" / "unlisted.safetensors").exists()
    place.memory.rm(f"/{place.name}/m0/parts/s2.safetensors")
    with pytest.raises(FormatError, match=rf"{place.url}/m0, .*the shard 'parts/s2.safetensors' is missing"):
        open_model(f"{place.url}/m0")


def test_what_is_not_read_from_urls_is_refused_with_a_way_out(place: Place) -> None:
    write_tree(place.disk)
    place.upload()
    state = pickle.dumps({})
    place.put("old/pytorch_model.bin", state)
    place.put("old.pt", state)
    place.put("shards/model-00001-of-00002.safetensors", b"")
    place.put("list.txt", b"m9\n")
    for name in ("old", "old.pt"):
        for allow in (False, True):
            with pytest.raises(UnsupportedError, match=rf"{place.url}/{name}: .*pickle at a URL.*Download it"):
                ez.open_zoo(f"{place.url}/{name}", allow_pickle=allow)
    with pytest.raises(FormatError, match="there are shards of a checkpoint, but no index"):
        ez.open_zoo(f"{place.url}/shards")
    with pytest.raises(UnsupportedError, match=r"a list of models at a URL is not read.*Download it"):
        ez.open_zoo(f"{place.url}/list.txt")
    with pytest.raises(ZooError, match=r"this is a bundle, not a zoo.*Download it"):
        ez.open_zoo(f"{place.url}/bundle")
    with pytest.raises(ZooError, match=f"{place.url}/nothing: there is no such file or folder"):
        ez.open_zoo(f"{place.url}/nothing")
    with pytest.raises(FormatError, match=rf"{place.url}/nothing\.safetensors: there is no such file"):
        ez.open_zoo(f"{place.url}/nothing.safetensors")
    with pytest.raises(ZooError, match="no model was found"):
        ez.open_zoo(f"{place.url}/nothing*")
    with pytest.raises(UnsupportedError, match="the bucket or host is a wildcard"):
        ez.open_zoo("memory://*/m9")
    with pytest.raises(ZooError, match=r"no such file or folder.*Give a URL as text"):
        ez.open_zoo(Path(f"{place.url}/m9"))


def test_a_folder_of_a_hundred_thousand_names_is_listed(place: Place) -> None:
    write_adapter(place.disk / "m0", random_factors({"q": (6, 5)}, 2, 0))
    place.upload()
    held = place.memory.store[f"/{place.name}/m0/adapter_config.json"]
    for number in range(100_000):
        place.memory.store[f"/{place.name}/m0/log-{number}.txt"] = held
    zoo = ez.open_zoo(place.url)
    assert zoo.names == ("m0",)
    assert zoo.models[0].side_files == ()


def test_of_mlx_lms_folder_on_the_hub_the_last_weights_are_downloaded() -> None:
    names = ["a/adapter_config.json", "a/adapters.safetensors", "a/0000100_adapters.safetensors", "a/x.bin"]
    (model,) = find_in_tree(dict.fromkeys(names, 10), "", 3, "it")
    assert (model.kind, model.files) == ("adapter", frozenset(names[:2]))


def test_factors_at_a_url_are_what_they_are_on_disk(place: Place) -> None:
    """mlx-lm's folders are mirrored with their weights; PEFT's weights alone say no scale, there as here."""
    for number in range(2):
        write_mlx(place.disk / f"m{number}", number)
        write_adapter(place.disk / "peft" / f"a{number}", random_factors({"x": (3, 4)}, 2, number))
    url = place.upload()
    for number, model in enumerate(ez.open_zoo([f"{url}/m0", f"{url}/m1"]).models):
        own = open_model(place.disk / f"m{number}")
        assert model.updates == own.updates
        for module in own.updates:
            assert all(map(torch.equal, model.read_factors(module), own.read_factors(module)))
    with pytest.raises(UnsupportedError, match=r"no adapter_config.json.*into a folder with their"):
        open_model(f"{url}/peft/a0/adapter_model.safetensors")
    assert open_model(f"{url}/peft/a0").format == "lora"
