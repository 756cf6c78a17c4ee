"""Zoos in an S3-compatible store, over the loopback: the same numbers, few bytes, and faults that change nothing but time."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from model_builders import add_adapter, make_llama, save_adapter, save_model
from safetensors.torch import load_file

import eigenzoo as ez
from builders import random_factors, random_stack, seeded, write_adapter, write_model, write_stacks
from eigenzoo.errors import BundleError, FormatError
from eigenzoo.formats.opening import open_model
from eigenzoo.formats.remote import remote_url
from eigenzoo.formats.rows import RowReader
from remote_servers import Proxy, running


def bundle_numbers(space: ez.Subspace) -> dict[str, Any]:
    """Everything that a fit found, by layer and model."""
    numbers: dict[str, Any] = {}
    for name in space.names:
        found = space.coefficients(name)
        numbers[name] = ({layer: value.clone() for layer, value in found.values.items()}, found.residuals)
    for layer in space.layers:
        numbers[layer] = space.moments(layer).gram_NN
    return numbers


def assert_same_numbers(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert first.keys() == second.keys()
    for key, value in first.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, second[key]), key
            continue
        values, residuals = value
        assert residuals == second[key][1], key
        assert all(torch.equal(tensor, second[key][0][layer]) for layer, tensor in values.items()), key


def write_checkpoints(root: Path, num_models: int = 6, num_layers: int = 4) -> Path:
    stacks = {f"h.{place}.weight": random_stack(num_models, (12, 10), place) for place in range(num_layers)}
    write_stacks(root, stacks)
    return root


def test_a_zoo_of_checkpoints_fits_as_from_disk(s3: Any, tmp_path: Path) -> None:
    root = write_checkpoints(tmp_path / "zoo")
    (root / "_parent").mkdir()
    (root / "_parent" / "model.safetensors").write_bytes(b"not looked at")
    url = s3.put(root)
    here, there = ez.open_zoo(root), ez.open_zoo(url)
    assert there.names == here.names == tuple(f"m{place}" for place in range(6))
    assert there.num_bytes == here.num_bytes
    assert remote_url(there.models[2].path) == f"{url}/m2"
    assert_same_numbers(bundle_numbers(ez.fit(here, 3)), bundle_numbers(ez.fit(there, 3)))
    fitted = ez.fit(there, 5)
    assert torch.equal(fitted.rebuild("m1").layer("h.0.weight"), ez.fit(here, 5).rebuild("m1").layer("h.0.weight"))


def test_adapters_of_peft_with_their_side_files_fit_as_from_disk(s3: Any, tmp_path: Path) -> None:
    for number in range(3):
        torch.manual_seed(number)
        peft = add_adapter(make_llama(), r=4, target_modules=["q_proj", "up_proj"])
        with torch.no_grad():
            for name, parameter in peft.named_parameters():
                if "lora_" in name:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        folder = save_adapter(peft, tmp_path / "zoo" / f"run-{number}" / "adapter")
        (folder / "tokenizer.json").write_text('{"big": "' + "x" * 300_000 + f'{number}"}}')
        (folder / "special_tokens_map.json").write_text("{}")
        (folder / "optimizer.pt").write_bytes(b"x" * 1000)
    url = s3.put(tmp_path / "zoo")
    here, there = ez.open_zoo(tmp_path / "zoo"), ez.open_zoo(f"{url}/run-*/adapter")
    assert there.names == here.names == ("run-0/adapter", "run-1/adapter", "run-2/adapter")
    assert there.view == "update"
    assert_same_numbers(bundle_numbers(ez.fit(here, 2)), bundle_numbers(ez.fit(there, 2)))
    for one, other in zip(here.models, there.models, strict=True):
        assert one.side_files == other.side_files
        assert "tokenizer.json" in one.side_files
        assert all(one.read_side_file(name) == other.read_side_file(name) for name in one.side_files)
        # Large ones are fetched when they are read, and are holes until then.
        assert (other.path / "tokenizer.json").stat().st_size == (one.path / "tokenizer.json").stat().st_size
        assert (other.path / "tokenizer.json").read_bytes().strip(b"\0") == b""


def test_a_sharded_checkpoint_and_a_base_are_read(s3: Any, tmp_path: Path) -> None:
    sharded = save_model(make_llama(), tmp_path / "zoo" / "sharded", max_shard_size="10KB")
    assert len(list(sharded.glob("*.safetensors"))) == 3
    url = s3.put(tmp_path / "zoo")
    here, there = open_model(sharded), open_model(f"{url}/sharded")
    assert here.tensors.keys() == there.tensors.keys()
    for name in here.tensors:
        assert torch.equal(here.read(name), there.read(name))
    zoo = ez.open_zoo([f"{url}/sharded", str(sharded)], base=f"{url}/sharded")
    assert zoo.names == (f"s3/{s3.name}/zoo/sharded", sharded.as_posix().lstrip("/"))
    assert all(not zoo.stack(layer).matrix(0).any() for layer in zoo.layers)


def test_ranges_of_many_models_are_read_together_in_any_dtype(s3: Any, tmp_path: Path) -> None:
    stack = random_stack(5, (40, 30))
    paths = write_stacks(tmp_path / "zoo", {"w": stack}, torch.bfloat16)
    url = s3.put(tmp_path / "zoo")
    zoo = ez.open_zoo(url)
    models = [*zoo.models, open_model(paths[0])]
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        rows = torch.empty(len(models), 500, dtype=dtype)
        RowReader(models, ["w"] * len(models)).read(100, 600, rows)
        for place, out in enumerate(rows):
            expected = stack[place % 5].to(torch.bfloat16).reshape(-1)[100:600].to(dtype)
            assert torch.equal(out, expected)


def test_two_of_two_hundred_layers_take_under_three_percent_of_the_bytes(s3: Any, tmp_path: Path) -> None:
    tensors = {f"h.{place}.weight": torch.empty(64, 128) for place in range(200)}
    total = 0
    for model in range(8):
        draw = seeded(model)
        values = {name: torch.randn(64, 128, generator=draw) for name in tensors}
        folder = write_model(tmp_path / "zoo" / f"m{model}", values)
        (folder / "config.json").write_text('{"model_type": "test"}')
        total += sum(path.stat().st_size for path in folder.iterdir())
    url = s3.put(tmp_path / "zoo")
    include = ["h.3.weight", "h.150.weight"]
    with running(Proxy(s3.endpoint)) as proxy:
        s3.lead_by(proxy.url)
        there = ez.fit(ez.open_zoo(url, include=include), 3)
        assert 2 * 8 * 64 * 128 * 4 < proxy.num_bytes < 0.03 * total
        before = proxy.num_requests
        ez.open_zoo(url, include=include)
        assert proxy.num_requests == before + 1, "headers and configs are in the cache, and one listing is enough"
        # What was excluded stayed in the store; a whole model is put together from there, with permission.
        kept = ez.load(there.save(tmp_path / "bundle"))
        assert any("198 excluded tensors" in text for text in kept.report["warnings"])
        with pytest.raises(BundleError, match="stays at s3://"):
            kept.rebuild("m3").save(tmp_path / "refused")
        whole = load_file(kept.rebuild("m3", fetch=True).save(tmp_path / "m3") / "model.safetensors")
    own = load_file(tmp_path / "zoo" / "m3" / "model.safetensors")
    assert whole.keys() == own.keys()
    assert all(torch.equal(whole[name], own[name]) for name in own if name not in include)
    here = ez.fit(ez.open_zoo(tmp_path / "zoo", include=include), 3)
    assert here.report["layers"] == there.report["layers"]


def test_broken_answers_and_a_busy_server_change_nothing_but_time(s3: Any, tmp_path: Path) -> None:
    root = write_checkpoints(tmp_path / "zoo", num_layers=10)
    for number in range(4):
        write_adapter(tmp_path / "adapters" / f"a{number}", random_factors({"q": (16, 12), "v": (12, 16)}, 3, number))
    checkpoints, adapters = s3.put(root), s3.put(tmp_path / "adapters", "adapters")
    with running(Proxy(s3.endpoint, cut_every=20, refuse_every=30)) as proxy:
        s3.lead_by(proxy.url)
        there = [ez.fit(ez.open_zoo(url), 3) for url in (checkpoints, adapters)]
        assert proxy.num_cut >= 3
        assert proxy.num_refused >= 3
    here = [ez.fit(ez.open_zoo(path), 3) for path in (root, tmp_path / "adapters")]
    for one, other in zip(here, there, strict=True):
        assert_same_numbers(bundle_numbers(one), bundle_numbers(other))


def test_a_file_that_changes_after_its_header_was_read_is_noticed(s3: Any, tmp_path: Path) -> None:
    root = write_checkpoints(tmp_path / "zoo", num_models=2)
    url = s3.put(root)
    zoo = ez.open_zoo(url)
    before = zoo.models[0].path / "model.safetensors"
    identity = before.stat().st_size, before.stat().st_mtime_ns
    name = next(iter(zoo.layers))
    other = (root / "m1" / "model.safetensors").read_bytes()  # the same size and header, other values
    s3.direct.pipe_file(f"{s3.name}/zoo/m0/model.safetensors", other)
    assert torch.isfinite(zoo.models[1].read(name)).all()
    with pytest.raises(FormatError, match=rf"{url}/m0/model\.safetensors: the file changed since.*Open the zoo again"):
        zoo.models[0].read(name)
    again = ez.open_zoo(url)
    assert torch.equal(again.models[0].read(name), again.models[1].read(name))
    after = again.models[0].path / "model.safetensors"
    assert (after.stat().st_size, after.stat().st_mtime_ns) != identity
    s3.direct.pipe_file(f"{s3.name}/zoo/m0/model.safetensors", other[:-40])
    with pytest.raises(FormatError, match="the file changed since its header was read"):
        again.models[0].read(name)
    with pytest.raises(FormatError, match="the safetensors library refuses it"):
        ez.open_zoo(url)
    s3.direct.rm(f"{s3.name}/zoo/m0/model.safetensors")
    with pytest.raises(FormatError, match=rf"{url}/m0/model\.safetensors: there is no such file"):
        again.models[0].read(name)


def test_a_bucket_that_is_not_there_is_named(s3: Any) -> None:
    with pytest.raises(FormatError, match="s3://no-such-bucket-0/zoo: there is no such file"):
        ez.open_zoo("s3://no-such-bucket-0/zoo")


def test_the_identity_of_stubs_goes_with_the_contents_alone(s3: Any, tmp_path: Path) -> None:
    url = s3.put(write_checkpoints(tmp_path / "zoo", num_models=2))
    stubs = [model.path / "model.safetensors" for model in ez.open_zoo(url).models]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EIGENZOO_CACHE", str(tmp_path / "another"))
        others = [model.path / "model.safetensors" for model in ez.open_zoo(url).models]
    assert stubs[0] != others[0]
    for one, other in zip(stubs, others, strict=True):
        assert one.stat().st_mtime_ns == other.stat().st_mtime_ns
        assert hashlib.sha256(one.read_bytes()).digest() == hashlib.sha256(other.read_bytes()).digest()
    assert stubs[0].stat().st_mtime_ns != stubs[1].stat().st_mtime_ns
