"""One file: what is read equals what safetensors reads, and hostile headers end in FormatError."""

from __future__ import annotations

import gc
import json
import os
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from eigenzoo.errors import FormatError, UnsafePathError, UnsupportedError, UsageError
from eigenzoo.formats import open_files
from eigenzoo.formats.safetensors import header as safetensors_header
from eigenzoo.formats.safetensors.dtypes import DTYPES
from eigenzoo.formats.safetensors.file import SafetensorsFile
from eigenzoo.formats.safetensors.header import MAX_HEADER_BYTES, MAX_TENSORS
from eigenzoo.formats.safetensors.tensor_bytes import MOST_VIEWS


def entry(dtype: str = "F32", shape: tuple[int, ...] = (2,), offsets: tuple[int, ...] = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def raw(header: object, values: bytes = bytes(8), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + values


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    tensors = {
        "half": torch.randn(7, 5).to(torch.bfloat16),
        "single": torch.randn(3, 4, 2),
        "double": torch.randn(11, dtype=torch.float64),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "count": torch.tensor([2**53 + 1]),
        "flags": torch.tensor([True, False, True]),
    }
    save_file(tensors, tmp_path / "mixed.safetensors", metadata={"format": "pt", "note": "é"})
    return tmp_path / "mixed.safetensors"


def test_it_reads_what_the_library_reads(mixed: Path) -> None:
    file, expected = SafetensorsFile(mixed), load_file(mixed)
    assert set(file.tensors) == set(expected)
    assert file.metadata == {"format": "pt", "note": "é"}
    for name, value in expected.items():
        found = file.read(name)
        assert (found.dtype, found.shape) == (value.dtype, value.shape)
        assert torch.equal(found, value)
        assert file.tensors[name].nbytes == value.nbytes


@pytest.mark.parametrize("name", sorted(DTYPES))
def test_every_dtype_is_read_bit_for_bit(tmp_path: Path, name: str) -> None:
    values = bytes([0, 1] * 24) if name == "BOOL" else bytes(range(48))
    count = 48 // DTYPES[name].itemsize
    path = tmp_path / "one.safetensors"
    path.write_bytes(raw({"x": entry(name, (count,), (0, 48))}, values))
    read = SafetensorsFile(path).read("x")
    assert read.dtype == DTYPES[name]
    assert bytes(read.view(torch.uint8).numpy()) == values


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_pieces_are_converted_in_place(mixed: Path, out_dtype: torch.dtype) -> None:
    file = SafetensorsFile(mixed)
    for name, info in file.tensors.items():
        flat = load_file(mixed)[name].reshape(-1)
        for start, stop in {(0, flat.numel()), (flat.numel() // 3, flat.numel()), (flat.numel(), flat.numel())}:
            out = torch.full((stop - start,), float("nan"), dtype=out_dtype)
            assert file.read_flat(name, start, stop, out) is out
            assert torch.equal(out, flat[start:stop].to(out_dtype)), (name, info)
            assert torch.equal(file.read_flat(name, start, stop), flat[start:stop])


def test_pieces_of_many_tensors_are_read_as_bytes_in_any_order(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    num = 2 * MOST_VIEWS + 3
    tensors = {f"t{place}": torch.randn(1 + place % 5, generator=draw) for place in range(num)}
    tensors["half"], tensors["empty"] = torch.randn(9, generator=draw).half(), torch.empty(0)
    save_file(tensors, tmp_path / "m.safetensors")
    file = SafetensorsFile(tmp_path / "m.safetensors")
    for order in (list(tensors), list(reversed(tensors)), list(tensors)[::3]):
        memory = {name: bytearray(tensors[name].nbytes) for name in order}
        file.read_bytes([(name, 0, memoryview(memory[name])) for name in order])
        assert all(memory[name] == tensors[name].numpy().tobytes() for name in order)
    part = bytearray(4)
    file.read_bytes([("half", 3, memoryview(part))])
    assert part == tensors["half"][3:5].numpy().tobytes()
    with pytest.raises(UsageError, match=r"values 8:10 of a tensor of 9"):
        file.read_bytes([("half", 8, memoryview(part))])


def test_a_file_that_ends_early_is_told_with_the_tensor_also_where_many_are_read(
    mixed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = SafetensorsFile(mixed)
    sizes = {name: info.nbytes for name, info in file.tensors.items()}
    last = list(sizes)[-1]
    os.truncate(mixed, mixed.stat().st_size - 1)
    monkeypatch.setattr(open_files, "check_identity", lambda *known: None)
    with pytest.raises(FormatError, match=rf"tensor '{last}'.*the file ended before its tensor did"):
        file.read_bytes([(name, 0, memoryview(bytearray(size))) for name, size in sizes.items()])


def test_conversion_is_right_beyond_one_scratch_buffer(tmp_path: Path) -> None:
    values = torch.arange(1_300_001, dtype=torch.float32).to(torch.bfloat16)
    save_file({"x": values}, tmp_path / "x.safetensors")
    out = SafetensorsFile(tmp_path / "x.safetensors").read_flat("x", 7, 1_300_001, torch.empty(1_299_994))
    assert torch.equal(out, values[7:].float())


def test_tensors_come_in_the_order_of_their_bytes(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw({"b": entry(offsets=(8, 16)), "a": entry()}, bytes(16)))
    assert list(SafetensorsFile(path).tensors) == ["a", "b"]


def test_metadata_may_be_null_as_mlx_writes_them(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw({"__metadata__": None, "a": entry()}, bytes(8)))
    assert list(load_file(path)) == ["a"]
    assert SafetensorsFile(path).metadata == {}


def test_a_file_that_changed_is_not_read(mixed: Path) -> None:
    file = SafetensorsFile(mixed)
    os.utime(mixed, ns=(0, 1))
    with pytest.raises(FormatError, match=r"mixed\.safetensors: the file changed since"):
        file.read("half")
    mixed.unlink()
    with pytest.raises(FormatError, match="cannot be read any more"):
        file.read("half")


def test_a_file_that_changes_while_it_is_opened_is_refused(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_header, "_validate_by_library", lambda path, file: os.utime(path, ns=(0, 1)))
    with pytest.raises(FormatError, match=r"mixed\.safetensors: the file changed while its header was read"):
        SafetensorsFile(mixed)


def test_a_file_that_memory_does_not_suffice_to_map_is_refused(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, framework: str) -> None:
        raise MemoryError("Cannot allocate memory (os error 12)")

    monkeypatch.setattr(safetensors_header, "safe_open", fail)
    with pytest.raises(FormatError, match=r"the safetensors library refuses it \(Cannot allocate memory"):
        SafetensorsFile(mixed)


def test_nothing_stays_open_or_mapped(mixed: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    files = [SafetensorsFile(mixed) for _ in range(20)]
    for file in files:
        file.read("single")
    assert len(os.listdir("/proc/self/fd")) == before
    assert str(mixed) not in Path("/proc/self/maps").read_text()


def test_misuse_is_named(mixed: Path) -> None:
    file = SafetensorsFile(mixed)
    with pytest.raises(FormatError, match="no tensor 'nothing'"):
        file.read("nothing")
    with pytest.raises(UsageError, match="values 0:36 of a tensor of 35"):
        file.read_flat("half", 0, 36)
    with pytest.raises(UsageError, match=r"out has shape \(3,\)"):
        file.read_flat("half", 0, 4, torch.empty(3))
    with pytest.raises(UsageError, match="contiguous tensor of 4 values"):
        file.read_flat("half", 0, 4, torch.empty(8)[::2])


def test_complex_values_are_not_cut_to_their_real_part(tmp_path: Path) -> None:
    save_file({"x": torch.ones(2, dtype=torch.complex64)}, tmp_path / "x.safetensors")
    with pytest.raises(UnsupportedError, match="complex values cannot be read as"):
        SafetensorsFile(tmp_path / "x.safetensors").read_flat("x", 0, 2, torch.empty(2))


def test_a_link_out_of_the_folder_is_refused(mixed: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "x.safetensors").symlink_to(mixed)
    with pytest.raises(UnsafePathError, match="link that leads out"):
        SafetensorsFile(tmp_path / "model" / "x.safetensors", tmp_path / "model")


HOSTILE = {
    "empty file": (b"", "0 bytes"),
    "seven bytes": (b"1234567", "7 bytes"),
    "huge header": (struct.pack("<Q", 2**63) + b"{}", "the header has 9223372036854775808 bytes"),
    "header over the cap": (struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{", "Headers up to"),
    "header past the end": (raw(b"{}", b"", 400), "the header has 400 bytes, but the file has 10"),
    "not JSON": (raw(b"{'a': 1}"), "not valid JSON"),
    "not UTF-8": (raw(b'{"\xff": 1}'), "not valid JSON"),
    "an array": (raw(b"[1, 2]"), "not a safetensors file"),
    "deep JSON": (raw(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "nested too deeply|invalid|recursion"),
    "duplicate tensor": (raw(b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2)), "'a' occurs twice"),
    "duplicate field": (raw(b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}'), "occurs twice"),
    "many tensors": (raw(b"{" + b'"dtype"' * (MAX_TENSORS + 1)), "more than 200000 tensors"),
    "truncated": (raw({"a": entry()}, bytes(7)), "the safetensors library refuses it"),
    "trailing bytes": (raw({"a": entry()}, bytes(9)), "the safetensors library refuses it"),
    "overlap": (raw({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)), "the safetensors library refuses it"),
    "hole": (raw({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20)), "the safetensors library refuses it"),
    "wrong size": (raw({"a": entry(shape=(3,))}), r"its data_offsets cover 8 bytes, but F32 \(3,\) takes 12"),
    "backwards": (raw({"a": entry(offsets=(8, 0))}), "-8 bytes"),
    "negative": (raw({"a": entry(offsets=(-8, 0))}), "not a pair of byte positions"),
    "three offsets": (raw({"a": entry(offsets=(0, 8, 8))}), "not a pair of byte positions"),
    "bool size": (raw({"a": entry(shape=(True, 2))}), "not a list of sizes"),
    "float size": (raw(b'{"a":{"dtype":"F32","shape":[2.0],"data_offsets":[0,8]}}'), "not a list of sizes"),
    "overflowing shape": (raw({"a": entry(shape=(2**40, 2**40, 0), offsets=(0, 0))}, b""), "not a list of sizes"),
    "integer of 5000 digits": (raw(b'{"a":{"dtype":"F32","shape":[%b]}}' % (b"9" * 5000)), "not valid JSON"),
    "missing field": (raw({"a": {"dtype": "F32", "shape": [2]}}), "exactly dtype, shape and data_offsets"),
    "dtype no string": (raw({"a": {**entry(), "dtype": 3}}), "dtype is not a string"),
    "metadata no strings": (raw({"__metadata__": {"a": 1}, "a": entry()}), "__metadata__ is not a mapping of strings"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_header_is_refused_by_name(tmp_path: Path, case: str) -> None:
    data, message = HOSTILE[case]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(data)
    with pytest.raises(FormatError, match=message) as refused:
        SafetensorsFile(path)
    assert "bad.safetensors" in str(refused.value)


def test_a_dtype_without_whole_bytes_is_named_with_its_tensor(tmp_path: Path) -> None:
    path = tmp_path / "f4.safetensors"
    path.write_bytes(raw({"layer.weight": entry("F4", (16,), (0, 8))}))
    with pytest.raises(UnsupportedError, match=r"tensor 'layer\.weight': dtype 'F4' has no torch dtype.*Dequantise"):
        SafetensorsFile(path)


def test_a_pipe_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(FormatError, match="not a regular file"):
        SafetensorsFile(tmp_path / "pipe.safetensors")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"none\.safetensors: cannot be read \(No such file"):
        SafetensorsFile(tmp_path / "none.safetensors")


def test_equal_headers_are_checked_once_and_for_files_of_one_size_only(tmp_path: Path) -> None:
    good, other = raw({"a": entry()}, struct.pack("<2f", 1, 2)), raw({"a": entry()}, struct.pack("<2f", 3, 4))
    for name, data in {"first": good, "second": other, "cut": good[:-1], "long": good + b"x"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.safetensors").write_bytes(data)
    first, second = (SafetensorsFile(tmp_path / name / "x.safetensors") for name in ("first", "second"))
    assert first.contents is second.contents
    assert [file.read("a").tolist() for file in (first, second)] == [[1, 2], [3, 4]]
    for name in ("cut", "long"):
        with pytest.raises(FormatError, match="the safetensors library refuses it"):
            SafetensorsFile(tmp_path / name / "x.safetensors")


def test_what_a_header_says_is_forgotten_with_its_files(tmp_path: Path) -> None:
    path = tmp_path / "forgotten.safetensors"
    path.write_bytes(raw({"a": entry()}))
    file = SafetensorsFile(path)
    assert any(key[0] == path.name for key in safetensors_header._cached)
    del file
    gc.collect()
    assert not any(key[0] == path.name for key in safetensors_header._cached)


def test_offsets_are_checked_in_the_bytes_that_were_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_header, "_validate_by_library", lambda path, file: None)
    path = tmp_path / "bad.safetensors"
    for case in ("truncated", "trailing bytes", "overlap", "hole"):
        path.write_bytes(HOSTILE[case][0])
        with pytest.raises(FormatError, match=r"of the values instead of|but the header states"):
            SafetensorsFile(path)


def test_a_header_beyond_the_first_read_is_read_whole(tmp_path: Path) -> None:
    names = [f"layer.{number:04}.{'x' * 40}" for number in range(500)]
    path = tmp_path / "x.safetensors"
    save_file({name: torch.full((1,), float(place)) for place, name in enumerate(names)}, path)
    file = SafetensorsFile(path)
    assert [float(file.read(name)) for name in names] == list(range(500))


def opens_or_refuses(path: Path, data: bytes) -> None:
    """Anything at all either opens, and then all of it can be read, or raises FormatError."""
    path.write_bytes(data)
    try:
        file = SafetensorsFile(path)
    except FormatError:
        return
    for name, info in file.tensors.items():
        assert file.read(name).shape == info.shape


@given(st.binary(max_size=200))
@settings(max_examples=150)
def test_random_bytes_are_opened_or_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    folder = tmp_path_factory.getbasetemp()
    opens_or_refuses(folder / "random.safetensors", data)
    opens_or_refuses(folder / "random.safetensors", raw(b"{" + data))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2**66) | st.floats() | st.sampled_from(["F32", "U8", "F4", "BOOL", ""]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "U8", "BF16", "F4"]) | json_values,
        "shape": st.lists(st.integers(0, 3), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(0, 8), min_size=2, max_size=2) | json_values,
    },
    optional={"more": json_values},
)


@given(st.dictionaries(st.text(max_size=3) | st.just("__metadata__"), entries | json_values, max_size=3))
@settings(max_examples=300)
def test_random_headers_are_opened_or_refused(
    tmp_path_factory: pytest.TempPathFactory, header: dict[str, object]
) -> None:
    opens_or_refuses(tmp_path_factory.getbasetemp() / "header.safetensors", raw(header))
