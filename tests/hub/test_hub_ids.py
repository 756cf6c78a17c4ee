"""Ids of the hub in the place of paths: the same zoo as from disk, downloaded once, and no byte more than is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

import eigenzoo as ez
from builders import random_factors, random_stack, write_adapter, write_stacks
from eigenzoo.errors import FormatError, UnsupportedError, ZooError
from eigenzoo.formats.opening import open_model
from eigenzoo.formats.remote import source_url
from eigenzoo.formats.remote.hub_id import HubId, parse_id
from hub_server import Hub, Repository


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write_checkpoints(root: Path, num_models: int = 4, seed: int = 0) -> list[Path]:
    paths = write_stacks(
        root, {"block.weight": random_stack(num_models, (7, 6), seed), "bias": random_stack(num_models, (5,), seed + 1)}
    )
    for path in paths:
        (path / "config.json").write_text('{"model_type": "small"}')
    return paths


@pytest.fixture
def zoo(hub: Hub, tmp_path: Path) -> list[Path]:
    """Models on disk, each also a repository of its own, and all of them in one."""
    paths = write_checkpoints(tmp_path / "disk")
    for path in paths:
        besides = {
            "README.md": b"---\nlicense: mit\n---\n",
            "pytorch_model.bin": b"pickle",
            "modeling.py": b"import os",
        }
        hub.repos[f"org/{path.name}"] = Repository({**files_of(path), **besides, "onnx/model.onnx": bytes(1000)})
    hub.repos["org/zoo"] = Repository({f"runs/{p.name}/{n}": d for p in paths for n, d in files_of(p).items()})
    return paths


def test_ids_are_the_models_that_lie_on_disk(hub: Hub, zoo: list[Path]) -> None:
    names = [path.name for path in zoo]
    found, local = ez.open_zoo([f"org/{name}" for name in names]), ez.open_zoo(zoo)
    assert found.names == local.names == tuple(names)
    for there, here in zip(found.models, local.models, strict=True):
        assert there.side_files == here.side_files == ("config.json",)
        for tensor in here.tensors:
            assert torch.equal(there.read(tensor), here.read(tensor))
        commit = hub.repos[f"org/{there.path.parent.parent.name.rpartition('--')[2]}"].branches["main"]
        assert source_url(there.path) == f"hf://org/{there.path.parent.parent.name.rpartition('--')[2]}@{commit}"
    for source in ("org/zoo", "org/zoo/runs", "org/zoo@main"):
        one = ez.open_zoo(source)
        assert one.names == tuple(names), source
        assert torch.equal(one.models[2].read("bias"), local.models[2].read("bias"))


MODULES = {
    "modules.json": b"[]",
    "1_Pooling/config.json": b"{}",
    "2_Dense/config.json": b"{}",
    "2_Dense/model.safetensors": b"weights of a module",
}
LEFT = {
    "README.md",
    "modeling.py",
    "mm_projector.bin",
    "2_Dense/pytorch_model.bin",
    "head/v_head.bin",
    "old/config.json",
}


def test_modules_are_downloaded_and_what_is_left_there_is_named(hub: Hub, zoo: list[Path], tmp_path: Path) -> None:
    for path in zoo:
        files = hub.repos[f"org/{path.name}"].files
        files |= MODULES | dict.fromkeys(LEFT - {"README.md"}, b"x")
        files["old/model.safetensors"] = b"x"
    space = ez.load(ez.fit([f"org/{path.name}" for path in zoo], rank=1).save(tmp_path / "bundle"))
    rebuilt = space.rebuild("m1").save(tmp_path / "out")
    for name, data in MODULES.items():
        assert (rebuilt / name).read_bytes() == data
    left = {"head", "old", "onnx", "pytorch_model.bin", "head/v_head.bin", *LEFT} - {"old/config.json"}
    assert set(space.rebuild("m1").not_carried) == left
    assert set(space.rebuild("m1").left_weights) == {"mm_projector.bin", "head/v_head.bin"}
    (below,) = [text for text in space.report["warnings"] if "models of their own" in text]
    assert "m0/old, m1/old" in below


def test_only_weights_and_configs_are_downloaded(hub: Hub, zoo: list[Path], tmp_path: Path) -> None:
    ez.open_zoo([f"org/{path.name}" for path in zoo])
    asked = {path.rpartition("/")[2] for _, path in hub.requests if "/resolve/" in path}
    assert asked == {"model.safetensors", "config.json", "README.md", ".gitattributes"}
    assert not list((tmp_path / "hub-cache").rglob("*.py"))
    assert not list((tmp_path / "hub-cache").rglob("*.bin"))


def test_the_second_run_downloads_nothing_and_offline_asks_nothing(
    hub: Hub, zoo: list[Path], offline: Callable[[], None]
) -> None:
    sources = ["org/zoo", f"org/{zoo[0].name}"]
    first = [model.read("bias") for model in ez.open_zoo(sources).models]
    assert hub.body_bytes > 0
    hub.forget()
    second = ez.open_zoo(sources)
    assert hub.body_bytes == 0
    assert {method for method, _ in hub.requests} == {"GET"}
    assert len(hub.requests) == 2, "one question a repository: which commit main is"
    offline()
    hub.forget()
    third = ez.open_zoo(sources)
    assert hub.requests == []
    for models in (second.models, third.models):
        assert all(torch.equal(model.read("bias"), known) for model, known in zip(models, first, strict=True))


def test_a_branch_becomes_the_commit_that_the_bundle_records(hub: Hub, zoo: list[Path], tmp_path: Path) -> None:
    repo = hub.repos["org/zoo"]
    old = repo.branches["main"]
    repo.branches["v1"] = old
    repo.branches["feature/x"] = old
    changed = {**repo.files, "runs/m0/model.safetensors": repo.files["runs/m1/model.safetensors"]}
    new = repo.commit(changed)
    assert torch.equal(ez.open_zoo("org/zoo").models[0].read("bias"), ez.open_zoo(zoo).models[1].read("bias"))
    for revision in ("v1", "feature/x", old):
        found = ez.open_zoo(f"org/zoo@{revision}")
        assert torch.equal(found.models[0].read("bias"), ez.open_zoo(zoo).models[0].read("bias"))
    bundle = ez.fit("org/zoo@v1", 2).save(tmp_path / "bundle")
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert [model["source"]["path"] for model in manifest["models"]] == [
        f"hf://org/zoo@{old}/runs/{path.name}" for path in zoo
    ]
    assert all(file["sha256"] for model in manifest["models"] for file in model["source"]["files"].values())
    assert new != old


def test_growth_is_exact_from_the_cache_of_the_commit(hub: Hub, zoo: list[Path], tmp_path: Path) -> None:
    repo = hub.repos["org/zoo"]
    bundle = ez.fit("org/zoo", 2).save(tmp_path / "bundle")
    repo.commit({**repo.files, "runs/m0/model.safetensors": repo.files["runs/m1/model.safetensors"]})
    extra = write_checkpoints(tmp_path / "extra", 1, seed=9)[0].rename(tmp_path / "extra" / "new")
    grown = ez.load(bundle).add(extra)
    assert grown.report["growth"]["exact"]
    local = ez.fit(zoo, 2).add(extra)
    assert grown.report["residual"] == pytest.approx(local.report["residual"], rel=1e-6)


def test_a_base_and_lists_take_ids(hub: Hub, zoo: list[Path], tmp_path: Path) -> None:
    (tmp_path / "zoo.txt").write_text(
        f"# models\norg/{zoo[0].name}\ndisk/{zoo[1].name}\n\norg/zoo/runs/{zoo[2].name}@main\n"
    )
    listed = ez.open_zoo(tmp_path / "zoo.txt")
    assert listed.names == tuple(path.name for path in zoo[:3])
    commit = hub.repos[f"org/{zoo[3].name}"].branches["main"]
    found = ez.open_zoo(zoo[:3], base=f"org/{zoo[3].name}")
    local = ez.open_zoo(zoo[:3], base=zoo[3])
    space, same = ez.fit(found, 2), ez.fit(local, 2)
    assert space.view == "delta"
    assert space.manifest.base is not None
    assert space.manifest.base.path == f"hf://org/{zoo[3].name}@{commit}"
    saved = ez.load(space.save(tmp_path / "bundle"))
    hub.forget()
    for there, here in zip(
        saved.rebuild("m0").state_dict().values(), same.rebuild("m0").state_dict().values(), strict=True
    ):
        assert torch.equal(there, here)
    assert hub.requests == [], "the base is taken from the cache, by its commit"


def test_a_base_that_is_not_in_the_cache_is_not_fetched_unasked(
    hub: Hub, zoo: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = ez.fit(ez.open_zoo(zoo[:3], base=f"org/{zoo[3].name}"), 2).save(tmp_path / "bundle")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    hub.forget()
    with pytest.raises(ez.BundleError, match=r"hf://org/m3@[0-9a-f]{40}: the base is not at hand.*Name the base"):
        ez.load(bundle).rebuild("m0").state_dict()
    assert hub.requests == []
    assert ez.load(bundle, base="org/m3").rebuild("m0").state_dict()


def test_adapters_in_folders_and_in_repositories_of_one_name(hub: Hub, tmp_path: Path) -> None:
    paths = [write_adapter(tmp_path / f"a{n}", random_factors({"q": (7, 6)}, 2, n)) for n in range(4)]
    for place, path in enumerate(paths):
        hub.repos[f"org{place}/adapter"] = Repository({**files_of(path), "checkpoint-1/optimizer.pt": b"x" * 10_000})
    found = ez.open_zoo([f"org{place}/adapter" for place in range(4)])
    assert found.view == "update"
    assert found.names == tuple(f"org{place}/adapter" for place in range(4))
    assert not [path for _, path in hub.requests if path.endswith("optimizer.pt")]
    many = Repository({f"{path.name}/{name}": data for path in paths for name, data in files_of(path).items()})
    hub.repos["org/many"] = many
    assert ez.open_zoo("org/many").names == ("a0", "a1", "a2", "a3")


def test_shards_are_those_of_the_index(hub: Hub, zoo: list[Path], tmp_path: Path) -> None:
    shards = {
        "model-00001-of-00002.safetensors": {"a": torch.ones(3)},
        "model-00002-of-00002.safetensors": {"b": torch.zeros(2)},
    }
    weight_map = {name: shard for shard, tensors in shards.items() for name in tensors}
    files = {shard: save(tensors, {"format": "pt"}) for shard, tensors in shards.items()}
    index = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    hub.repos["org/sharded"] = Repository(
        {**files, "model.safetensors.index.json": index, "consolidated.safetensors": bytes(5000)}
    )
    model = open_model("org/sharded")
    assert torch.equal(model.read("a"), torch.ones(3))
    assert not [path for _, path in hub.requests if "consolidated" in path]
    hub.repos["org/torn"] = Repository({"model-00001-of-00002.safetensors": b"", "model.safetensors.index.json": index})
    with pytest.raises(FormatError, match=r"org/torn@[0-9a-f]{40}.*no shard 'model-00002-of-00002\.safetensors'"):
        open_model("org/torn")


def test_pickles_need_permission_before_they_are_downloaded(hub: Hub, tmp_path: Path) -> None:
    for place in range(3):
        torch.save({"w": torch.full((4, 3), float(place))}, tmp_path / "w.bin")
        hub.repos[f"org/p{place}"] = Repository({"pytorch_model.bin": (tmp_path / "w.bin").read_bytes()})
    ids = [f"org/p{place}" for place in range(3)]
    with pytest.raises(UnsupportedError, match=r"org/p0: the weights are a Python pickle.*allow_pickle=True"):
        ez.open_zoo(ids)
    assert not [path for _, path in hub.requests if path.endswith(".bin")]
    found = ez.open_zoo(ids, allow_pickle=True)
    assert found.names == ("p0", "p1", "p2")
    assert found.models[2].read("w")[0, 0] == 2


def test_what_cannot_be_read_is_skipped_only_when_asked(hub: Hub, zoo: list[Path]) -> None:
    hub.repos["org/pickled"] = Repository({"pytorch_model.bin": b"x"})
    ids = [*(f"org/{path.name}" for path in zoo), "org/pickled"]
    found = ez.open_zoo(ids, allow_missing=True)
    assert len(found) == 4
    assert found.skipped[0].path == "pickled"
    assert "Python pickle" in found.skipped[0].reason


def test_a_path_that_exists_wins(hub: Hub, zoo: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_checkpoints(tmp_path / "org" / "zoo", 2, seed=5)
    assert ez.open_zoo("org/zoo").names == ("m0", "m1")
    assert hub.requests == []
    with pytest.raises(ZooError, match=r"org/m0: there is no such file or folder. Give an id of the hub as text"):
        ez.open_zoo(Path("org/m0"))


def test_a_bundle_in_the_place_of_a_zoo(hub: Hub) -> None:
    hub.repos["org/bundle"] = Repository({"manifest.json": b"{}", "basis.safetensors": b""})
    with pytest.raises(ZooError, match="org/bundle: this is a bundle, not a zoo or a model"):
        ez.open_zoo("org/bundle")
    hub.repos["org/empty"] = Repository({"README.md": b"nothing"})
    with pytest.raises(ZooError, match="'org/empty': no model was found"):
        ez.open_zoo("org/empty")
    with pytest.raises(FormatError, match="org/empty/runs: the repository has no folder 'runs'"):
        ez.open_zoo("org/empty/runs")


@pytest.mark.parametrize(
    "text",
    [
        "model",
        "org/name.safetensors",
        "/org/name",
        "./org/name",
        "../org/name",
        "~/org",
        "org/na--me",
        "org/*",
        "a b/c",
        "org/../name",
        "org/name/../x",
        "org/name@",
        "org//name",
        "s3://a/b",
        "list/zoo.txt",
        "-x/y",
        "org/name.git",
    ],
)
def test_what_is_no_id(text: str) -> None:
    assert parse_id(text) is None


def test_ids_and_urls_say_the_same() -> None:
    for text in ("org/name", "o.r-g/n_a.me@v1.0", "org/name/runs/m 0".replace(" ", ""), "org/name/x@refs/pr/1"):
        found = parse_id(text)
        assert isinstance(found, HubId)
        assert str(found) == text


def test_ids_and_streams_agree(hub: Hub, zoo: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec = pytest.importorskip("fsspec")
    monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": hub.url, "token": False})
    streamed = ez.open_zoo("hf://org/zoo/runs")
    whole = ez.open_zoo("org/zoo/runs")
    assert streamed.names == whole.names
    assert [source_url(model.path) for model in streamed.models] == [source_url(model.path) for model in whole.models]
    for there, here in zip(streamed.models, whole.models, strict=True):
        assert torch.equal(there.read("bias"), here.read("bias"))


def test_pickled_adapters_and_shards_need_permission_too(hub: Hub, tmp_path: Path) -> None:
    shard = "pytorch_model-00001-of-00001.bin"
    torch.save({"weight": torch.ones(3, 2)}, tmp_path / shard)
    index = json.dumps({"metadata": {}, "weight_map": {"weight": shard}}).encode()
    hub.repos["org/shards"] = Repository(
        {shard: (tmp_path / shard).read_bytes(), "pytorch_model.bin.index.json": index}
    )
    folder = write_adapter(tmp_path / "a0", random_factors({"q": (7, 6)}, 2, 0))
    pickled = {name: data for name, data in files_of(folder).items() if name.endswith(".json")}
    torch.save(load_file(folder / "adapter_model.safetensors"), tmp_path / "a")
    hub.repos["org/adapter"] = Repository({**pickled, "adapter_model.bin": (tmp_path / "a").read_bytes()})
    for name in ("org/shards", "org/adapter"):
        with pytest.raises(UnsupportedError, match="Python pickle"):
            open_model(name)
    assert not list((tmp_path / "hub-cache").rglob("*.bin"))
    assert torch.equal(open_model("org/shards", allow_pickle=True).read("weight"), torch.ones(3, 2))
    assert open_model("org/adapter", allow_pickle=True).updates.keys() == open_model(folder).updates.keys()


def test_a_pipeline_is_refused_before_its_components_are_downloaded(hub: Hub) -> None:
    hub.repos["org/sd"] = Repository(
        {"model_index.json": b"{}", "unet/diffusion_pytorch_model.safetensors": bytes(100)}
    )
    with pytest.raises(UnsupportedError, match=r"pipeline on the hub.*org/name/unet"):
        open_model("org/sd")
    assert not [path for _, path in hub.requests if path.endswith(".safetensors")]


def test_an_adapter_is_verified_by_its_id(hub: Hub, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a0", random_factors({"q": (7, 6)}, 2, 0))
    hub.repos["org/a0"] = Repository(files_of(folder))
    assert ez.verify_adapter("org/a0").checks == ez.verify_adapter(folder).checks
