"""What is written is what is read: for any names, shapes, dtypes and values, by eigenzoo and by the formats' own libraries."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

import eigenzoo as ez
from builders import write_adapter, write_model
from eigenzoo.adapt import search_state, unfinished
from eigenzoo.cli.options import parse_axes, parse_bytes, parse_rank
from eigenzoo.formats.bundle.folder import StoredCoefficients, coefficient_file, read_coefficients, write_coefficients
from eigenzoo.formats.json_file import parse_json
from eigenzoo.formats.layout import ModelLayout, layout_of
from eigenzoo.formats.opening import open_model
from eigenzoo.formats.remote.record import Entry, read_record, write_record
from eigenzoo.formats.remote.source import RemoteFile
from eigenzoo.formats.safetensors.file import SafetensorsFile
from eigenzoo.formats.writers import write_checkpoint
from eigenzoo.subspace.fitting.bytes import count_bytes
from eigenzoo.zoo.sources import find_models
from fuzz.samples import write_file

few = settings(max_examples=25, derandomize=True)

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool)
names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(
    lambda name: name != "__metadata__"
)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
words = st.text("abcxyz019_-", min_size=1, max_size=8)
shapes = st.lists(st.integers(0, 4), max_size=4)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


@st.composite
def tensors(draw: Any, dtypes: tuple[torch.dtype, ...] = DTYPES) -> Tensor:
    """A tensor of any bits: NaN, infinities and denormals too."""
    dtype, shape = draw(st.sampled_from(dtypes)), draw(shapes)
    count = torch.Size(shape).numel() * dtype.itemsize
    data = bytearray(draw(st.binary(min_size=count, max_size=count)))
    if dtype == torch.bool:
        data = bytearray(byte & 1 for byte in data)
    flat = torch.frombuffer(data, dtype=dtype) if count else torch.empty(0, dtype=dtype)
    return flat.reshape(shape)


def bits(values: Tensor) -> tuple[Any, ...]:
    return values.dtype, tuple(values.shape), values.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@few
@given(
    given_tensors=st.dictionaries(names, tensors(), min_size=1, max_size=4),
    metadata=st.dictionaries(texts, texts, max_size=3),
)
def test_safetensors(given_tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = write_file(Path(folder) / "m.safetensors", given_tensors, {**metadata, "format": "pt"})
        own, theirs = SafetensorsFile(path), safe_open(path, "pt")
        with theirs as file:
            assert set(file.keys()) == set(given_tensors) == set(own.tensors)
            assert dict(own.metadata) == file.metadata() == {**metadata, "format": "pt"}
            for name, values in given_tensors.items():
                assert bits(own.read(name)) == bits(file.get_tensor(name)) == bits(values)
        path.write_bytes(save(given_tensors, metadata or None))
        own = SafetensorsFile(path)
        assert {name: bits(own.read(name)) for name in own.tensors} == {
            name: bits(v) for name, v in given_tensors.items()
        }


@few
@given(document=st.dictionaries(texts, json_values, max_size=4))
def test_json(document: dict[str, Any]) -> None:
    for escaped in (True, False):
        assert parse_json(json.dumps(document, ensure_ascii=escaped).encode(), where="here") == document


@few
@given(given_tensors=st.dictionaries(names, tensors(), min_size=1, max_size=4))
def test_checkpoints_and_their_layouts(given_tensors: dict[str, Tensor]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        first, again = Path(folder) / "first", Path(folder) / "again"
        model = open_model(write_model(first, given_tensors))
        layout = layout_of(model)
        assert ModelLayout.from_json(json.loads(json.dumps(layout.to_json()))) == layout
        again.mkdir()
        write_checkpoint(again, layout, model.read, metadata=model.metadata)
        copy = open_model(again)
        assert {name: bits(copy.read(name)) for name in copy.tensors} == {
            name: bits(v) for name, v in given_tensors.items()
        }
        torch.save(given_tensors, Path(folder) / "m.pt")
        pickled = open_model(Path(folder) / "m.pt", allow_pickle=True)
        assert {n: bits(pickled.read(n)) for n in pickled.tensors} == {n: bits(v) for n, v in given_tensors.items()}


@few
@given(
    modules=st.dictionaries(words, st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=3),
    rank=st.integers(1, 3),
    alpha=st.integers(0, 64),
    rslora=st.booleans(),
)
def test_adapters(modules: dict[str, tuple[int, int]], rank: int, alpha: int, rslora: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        draw = torch.Generator().manual_seed(0)
        factors = {
            name: (torch.randn(outputs, rank, generator=draw), torch.randn(rank, inputs, generator=draw))
            for name, (outputs, inputs) in modules.items()
        }
        model = open_model(write_adapter(Path(folder) / "a", factors, lora_alpha=alpha, use_rslora=rslora))
        for name, (b_OR, a_RI) in factors.items():
            assert model.updates[name].scale == alpha / (rank**0.5 if rslora else rank)
            assert [bits(values) for values in model.read_factors(name)] == [bits(b_OR), bits(a_RI)]


@few
@given(
    name=st.text(min_size=1, max_size=300),
    values=st.lists(st.floats(width=32, allow_nan=False), max_size=5),
    residuals=st.lists(st.floats(0, 1, width=32), min_size=1, max_size=3),
    known=st.booleans(),
)
def test_coefficient_files(name: str, values: list[float], residuals: list[float], known: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        energies = torch.tensor(residuals, dtype=torch.float64) if known else None
        stored = StoredCoefficients(torch.tensor(values), torch.tensor(residuals), energies)
        file = coefficient_file(name)
        try:
            name.encode()
        except UnicodeEncodeError:
            return
        write_coefficients(Path(folder) / file, name, "0" * 64, stored)
        found = read_coefficients(Path(folder), file, name, "0" * 64, len(values), len(residuals))
        assert bits(found.values) == bits(stored.values.float())
        assert bits(found.residuals_L) == bits(stored.residuals_L)
        assert (found.energies_L is None) is not known
        assert energies is None or found.energies_L is None or bits(found.energies_L) == bits(energies)


@settings(few, max_examples=8)
@given(
    layers=st.dictionaries(words, st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=3),
    num_models=st.integers(2, 4),
    seed=st.integers(0, 2**31),
)
def test_bundles(layers: dict[str, tuple[int, int]], num_models: int, seed: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, draw = Path(name), torch.Generator().manual_seed(seed)
        stacks = {layer: torch.randn(num_models, *shape, generator=draw) for layer, shape in layers.items()}
        for place in range(num_models):
            write_model(folder / "zoo" / f"m{place}", {layer: stack[place] for layer, stack in stacks.items()})
        space = ez.fit(folder / "zoo", 1.0, cache=False)
        loaded = ez.load(space.save(folder / "bundle"))
        assert list(loaded.verify()) == []
        assert loaded.manifest.basis_id == space.manifest.basis_id
        assert count_bytes(loaded.path, loaded.manifest.models, len(layers), 1, 1).bundle > 0
        for place, model in enumerate(loaded.names):
            for layer, stack in stacks.items():
                rebuilt = loaded.rebuild(model).layer(layer)
                assert torch.equal(rebuilt, space.rebuild(model).layer(layer))
                # Rank 1.0 keeps everything: what is left is the rounding of float32 coefficients and bases.
                bound = 64 * torch.finfo(torch.float32).eps * float(stack.abs().max()) * max(stack[0].numel(), 4)
                assert float((rebuilt - stack[place].double()).abs().max()) <= bound
        for layer in layers:
            assert torch.equal(loaded.moments(layer).gram_NN, space.moments(layer).gram_NN)


@few
@given(values=st.lists(st.floats(), min_size=1, max_size=6), steps=st.integers(1, 4))
def test_states_of_training_and_search(values: list[float], steps: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state"
        parameters = [nn.Parameter(torch.tensor(values)), nn.Parameter(torch.ones(2, 2))]
        optimizer = torch.optim.Adam(parameters)
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        unfinished.write(path, "run", parameters, optimizer, values)
        read = [nn.Parameter(torch.zeros_like(parameter)) for parameter in parameters]
        other = torch.optim.Adam(read)
        losses = unfinished.read(path, "run", read, other, len(values))
        assert torch.equal(torch.tensor(losses).nan_to_num(7.0), torch.tensor(values).nan_to_num(7.0))
        assert [bits(parameter.data) for parameter in read] == [bits(parameter.data) for parameter in parameters]
        for mine, theirs in zip(parameters, read, strict=True):
            for key, value in optimizer.state[mine].items():
                assert torch.equal(value, other.state[theirs][key])
        told = [0.0, *values, *[1.0] * steps]
        state = search_state.SearchState(torch.ones(3), told, torch.ones(steps, 2, dtype=torch.float64).numpy())
        searched = Path(folder) / "searched"
        search_state.write_state(searched, "key", state)
        found = search_state.read_state(searched, "key", 3, 2)
        assert torch.equal(torch.tensor(found.values).nan_to_num(7.0), torch.tensor(told).nan_to_num(7.0))
        assert (found.last == state.last).all()


@few
@given(entries=st.dictionaries(words, st.tuples(words, st.integers(0, 2**40), words), max_size=3), url=words)
def test_records_of_mirrors(entries: dict[str, tuple[str, int, str]], url: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        given_entries = {
            name: Entry(RemoteFile("s3://bucket", path, f"s3://bucket/{path}", size, tag), size, "0" * 64)
            for name, (path, size, tag) in entries.items()
        }
        write_record(Path(folder), url, given_entries)
        assert read_record(Path(folder)) == (url, given_entries)


@few
@given(
    rules=st.dictionaries(
        st.sampled_from(["models", "outputs", "inputs"]),
        st.integers(0, 10**6) | st.floats(0.001, 1) | st.just("auto"),
        min_size=1,
    ),
    number=st.integers(0, 10**6),
    unit=st.sampled_from(
        [("", 1), ("B", 1), ("kB", 10**3), ("MB", 10**6), ("GB", 10**9), ("KiB", 2**10), ("GiB", 2**30)]
    ),
)
def test_words_of_the_command_line(rules: dict[str, Any], number: int, unit: tuple[str, int]) -> None:
    assert parse_rank(",".join(f"{axis}={rule!r}".replace("'", "") for axis, rule in rules.items())) == rules
    assert all(parse_rank(str(rule)) == rule for rule in rules.values())
    assert parse_axes(", ".join(rules)) == tuple(rules)
    assert parse_bytes(f"{number}{unit[0]}", "--budget") == number * unit[1]


@few
@given(chosen=st.lists(words, min_size=1, max_size=4, unique=True), comment=words)
def test_lists_and_globs_of_models(chosen: list[str], comment: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        paths = [write_model(Path(folder) / f"m{name}", {"w": torch.ones(1)}) for name in chosen]
        listed = Path(folder) / "zoo.txt"
        listed.write_text(f"# {comment}\n\n" + "".join(f"  {path.name}\n" for path in paths))
        assert find_models(listed) == paths
        assert set(find_models(f"{folder}/m*")) == set(paths)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["m" * 5000, "a\0b", "m\0*", "*" + "b" * 400, "x" * 300 + ".txt"])
def test_names_that_no_file_can_have(name: str, tmp_path: Path) -> None:
    with pytest.raises(ez.ZooError, match=r"there is no such file or folder|no model was found"):
        find_models(f"{tmp_path}/{name}")
