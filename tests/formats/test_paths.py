"""Names and links that lead out of a model's folder are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from eigenzoo.errors import FormatError, UnsafePathError
from eigenzoo.formats.json_file import parse_json, read_json
from eigenzoo.formats.paths import final_name, inside, read_bounded, relative_name

BAD_NAMES = {
    "": "is empty",
    "../x": r"holds '\.\.'",
    "a/../../x": r"holds '\.\.'",
    "a/./x": r"holds '\.\.', '\.' or an empty part",
    "a//x": "an empty part",
    "..": r"holds '\.\.'",
    "/etc/passwd": "is absolute",
    "C:\\x": "is absolute",
    "C:x": "is absolute",
    "\\\\host\\share\\x": "is absolute",
    "..\\x": r"holds '\.\.'",
    "a\\x": "holds a backslash",
    "a\0b": "holds control characters",
    "a\nb": "holds control characters",
    "\ud800": "holds control characters",
    "x" * 2000: "is longer than 1024",
    "x" * 256: "more than 255 bytes",
    "a/" + "é" * 128: "more than 255 bytes",
}


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_leave_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UnsafePathError, match=BAD_NAMES[name]):
        relative_name(name)
    with pytest.raises(UnsafePathError, match=BAD_NAMES[name]):
        inside(tmp_path, name)


def test_names_and_links_inside_are_followed(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("x")
    (tmp_path / "link").symlink_to("real")
    assert inside(tmp_path, "link") == inside(tmp_path, "real") == (tmp_path / "real").resolve()
    assert inside(tmp_path, "sub/new..name") == tmp_path.resolve() / "sub" / "new..name"


def test_a_root_that_is_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "x").write_text("x")
    (tmp_path / "link").symlink_to("real")
    assert inside(tmp_path / "link", "x") == (tmp_path / "real" / "x").resolve()
    assert [final_name(tmp_path / name) for name in ("real", "link", "real/..")] == ["real", "real", tmp_path.name]


def test_links_out_and_loops_are_refused(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (tmp_path / "secret").write_text("x")
    (model / "out").symlink_to("../secret")
    (model / "folder").symlink_to(tmp_path)
    (model / "loop").symlink_to("loop")
    for name in ("out", "folder/secret"):
        with pytest.raises(UnsafePathError, match="a link that leads out of the folder"):
            inside(model, name)
    with pytest.raises(UnsafePathError, match="'loop' cannot be followed"):
        inside(model, "loop")


def test_the_hub_s_cache_layout_is_followed_and_nothing_else(tmp_path: Path) -> None:
    repo, other = tmp_path / "models--a--b", tmp_path / "models--c--d"
    snapshot = repo / "snapshots" / "0123"
    for folder in (snapshot / "unet", repo / "blobs", other / "blobs"):
        folder.mkdir(parents=True)
    (repo / "blobs" / "hash").write_text("x")
    (other / "blobs" / "hash").write_text("x")
    (snapshot / "good").symlink_to("../../blobs/hash")
    (snapshot / "unet" / "good").symlink_to("../../../blobs/hash")
    (snapshot / "bad").symlink_to("../../../models--c--d/blobs/hash")
    (snapshot / "ref").symlink_to("../../refs")
    assert inside(snapshot, "good") == inside(snapshot / "unet", "good") == (repo / "blobs" / "hash").resolve()
    for name in ("bad", "ref"):
        with pytest.raises(UnsafePathError, match="leads out"):
            inside(snapshot, name)


def test_small_files_are_bounded(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b'{"a": 1}')
    assert read_json(tmp_path / "x.json", where="x") == {"a": 1}
    with pytest.raises(FormatError, match=r"x: the file has 8 bytes\. A file of this kind has at most 7"):
        read_bounded(tmp_path / "x.json", 7, where="x")
    with pytest.raises(FormatError, match="y: the file is missing"):
        read_bounded(tmp_path / "y.json", 7, where="y")
    with pytest.raises(FormatError, match="z: not a regular file"):
        read_bounded(tmp_path, 7, where="z")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"[1]", "JSON list"),
        (b"{", "not valid JSON"),
        (b'{"a": 1, "a": 2}', "'a' occurs twice"),
        (b'{"a": ' + b"[" * 200_000, "nested too deeply"),
        (b'{"a": ' + b"1" * 10_000 + b"}", "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
    ],
)
def test_bad_json_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(FormatError, match=rf"^f\.json: .*{message}"):
        parse_json(data, where="f.json")


def test_the_store_that_repositories_of_the_hub_s_cache_share(tmp_path: Path) -> None:
    name = "ab" + "0" * 62
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0123"
    shared = tmp_path / "blobs" / "ab" / name
    for folder in (snapshot, snapshot.parent.parent / "blobs", shared.parent):
        folder.mkdir(parents=True)
    shared.write_bytes(b"x")
    (snapshot.parent.parent / "blobs" / "etag").symlink_to(f"../../blobs/ab/{name}")
    (snapshot / "w").symlink_to("../../blobs/etag")
    assert inside(snapshot, "w") == shared
    other = shared.with_name("secret")
    other.write_bytes(b"x")
    (snapshot / "v").symlink_to("../../../blobs/ab/secret")
    with pytest.raises(UnsafePathError, match="leads out of the folder"):
        inside(snapshot, "v")
