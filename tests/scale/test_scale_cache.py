"""Moments that are kept: the next run reads no weight for them, says the same, and never takes those of other files."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scale_zoos import hidden, planted, read_in_float32, read_in_spans, rewrite, saved

import eigenzoo as ez
from builders import random_factors, write_adapter, write_stacks
from eigenzoo.errors import OutputError
from eigenzoo.linalg.spectrum import FLOAT32_ROUND_OFF, NUMERICAL_RANK
from eigenzoo.subspace.moments import collecting
from eigenzoo.subspace.moments.moments_cache import trim
from eigenzoo.zoo.stack import DenseStack, UpdateStack

NUM_LAYERS, NUM_MODELS, SHAPE = 3, 8, (12, 10)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often weights are read, by the way in which they are, and how often products of them are summed."""
    found: Counter[str] = Counter()

    def counted(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            found[name] += 1
            return method(*args, **kwargs)

        return call

    for stack, names in ((DenseStack, ("read", "matrix")), (UpdateStack, ("tile", "stored_factors"))):
        for name in names:
            monkeypatch.setattr(stack, name, counted(name, getattr(stack, name)))
    monkeypatch.setattr(collecting, "add_block", counted("products", collecting.add_block))
    return found


def write_zoo(root: Path, view: str = "weight") -> list[Path]:
    if view == "update":
        modules = {f"layer.{n}": SHAPE for n in range(NUM_LAYERS)}
        return [write_adapter(root / f"m{n}", random_factors(modules, 2, n)) for n in range(NUM_MODELS)]
    return write_stacks(root, {f"layer.{n}": planted(NUM_MODELS, SHAPE, n) for n in range(NUM_LAYERS)})


def kept(folder: Path) -> list[Path]:
    return sorted((folder / "moments").glob("*"))


def said(source: Any, **options: Any) -> dict[str, Any]:
    """All that evidence says, but for how long it took."""
    return {key: value for key, value in ez.evidence(source, **options).to_dict().items() if key != "seconds"}


def test_another_rank_reads_the_weights_for_the_basis_alone(tmp_path: Path, reads: Counter[str]) -> None:
    paths = write_zoo(tmp_path / "zoo")
    ez.fit(paths, 3)
    assert reads == {"read": NUM_LAYERS, "products": NUM_LAYERS}
    reads.clear()
    second = saved(ez.fit(paths, 2), tmp_path / "second")
    assert reads == {"read": NUM_LAYERS}
    assert second == saved(ez.fit(paths, 2, cache=False), tmp_path / "anew")


def test_a_large_layer_is_read_once_more_and_not_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: Counter[str]
) -> None:
    read_in_float32(monkeypatch)
    read_in_spans(monkeypatch, 4 * NUM_MODELS * SHAPE[1] * 4)
    paths = write_zoo(tmp_path / "zoo")
    ez.fit(paths, 3)
    assert reads == {"read": 2 * 3 * NUM_LAYERS, "products": 3 * NUM_LAYERS}
    reads.clear()
    second = saved(ez.fit(paths, 2), tmp_path / "second")
    assert reads == {"read": 3 * NUM_LAYERS}
    assert second == saved(ez.fit(paths, 2, cache=False), tmp_path / "anew")


@pytest.mark.parametrize("view", ["weight", "update"])
def test_evidence_reads_nothing_after_a_fit_and_a_fit_less_after_evidence(
    tmp_path: Path, reads: Counter[str], view: str
) -> None:
    paths = write_zoo(tmp_path / "zoo", view)
    first = said(paths)
    assert reads["read"] + reads["tile"] == NUM_LAYERS
    reads.clear()
    assert said(paths) == first
    ez.fit(paths, 2)
    assert said(paths) == first
    assert reads["tile"] == reads["products"] == 0
    # The basis of full weights; for updates their factors are copied.
    assert reads == ({"read": NUM_LAYERS} if view == "weight" else {"stored_factors": NUM_LAYERS * NUM_MODELS})
    assert said(paths, cache=False) == first


def test_an_interrupted_pass_goes_on_where_it_was(tmp_path: Path, reads: Counter[str]) -> None:
    paths = write_zoo(tmp_path / "zoo")

    def interrupt(stage: str, done: int, total: int) -> None:
        if stage == "collecting moments" and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ez.evidence(paths, progress=interrupt)
    reads.clear()
    ez.evidence(paths)
    assert reads["read"] == NUM_LAYERS - 2


def test_changed_contents_are_collected_again(tmp_path: Path) -> None:
    paths = write_zoo(tmp_path / "zoo")
    before = said(paths)
    rewrite(paths[3] / "model.safetensors")
    after = said(paths)
    assert after != before
    assert after == said(paths, cache=False)


def test_a_changed_base_is_another_zoo(tmp_path: Path) -> None:
    paths = write_zoo(tmp_path / "zoo")
    bases = write_stacks(tmp_path / "bases", {f"layer.{n}": planted(2, SHAPE, 9 + n) for n in range(NUM_LAYERS)})
    found = [ez.fit(paths, 2, base=base).moments("layer.0").energies_N for base in (*bases, None)]
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    rewrite(bases[0] / "model.safetensors")
    assert not torch.equal(ez.fit(paths, 2, base=bases[0]).moments("layer.0").energies_N, found[0])


def test_models_in_another_order_have_their_own_moments(tmp_path: Path) -> None:
    paths = write_zoo(tmp_path / "zoo")
    first = ez.fit(paths, 2).moments("layer.0").gram_NN
    back = ez.fit(paths[::-1], 2).moments("layer.0").gram_NN
    assert torch.allclose(back.flip(0, 1), first, rtol=1e-12)
    assert not torch.allclose(back, first, rtol=1e-3)


def test_every_precision_keeps_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_in_float32(monkeypatch)
    paths = write_zoo(tmp_path / "zoo")
    found = [ez.fit(paths, 2, precision=name).moments("layer.0").round_off for name in ("high", "default", "high")]
    assert found == [NUMERICAL_RANK, FLOAT32_ROUND_OFF, NUMERICAL_RANK]


@pytest.mark.parametrize("center", ["none", "columns", "global"])
def test_moments_about_other_centers_are_not_mixed_up(tmp_path: Path, center: str) -> None:
    paths = write_zoo(tmp_path / "zoo")
    ez.fit(paths, 2)
    found = saved(ez.fit(paths, 2, center=center), tmp_path / "kept")
    assert found == saved(ez.fit(paths, 2, center=center, cache=False), tmp_path / "anew")


@pytest.mark.parametrize("way", ["off", "cache=False"])
def test_nothing_is_kept_where_nobody_wants_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: Counter[str], own_folder_of_moments: Path, way: str
) -> None:
    paths = write_zoo(tmp_path / "zoo")
    if way == "off":
        monkeypatch.setenv("EIGENZOO_CACHE", "off")
    for _ in range(2):
        reads.clear()
        ez.fit(paths, 2, cache=way == "off")
        ez.evidence(paths, cache=way == "off")
        assert reads["products"] == 2 * NUM_LAYERS
    assert list(own_folder_of_moments.iterdir()) == []
    assert list(tmp_path.iterdir()) == [tmp_path / "zoo"]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-8]),
    "empty": lambda path: path.write_bytes(b""),
    "of no kind": lambda path: path.write_bytes(b"\xff" * 200),
    "changed": flip,
    "of another layer": lambda path: path.write_bytes(kept(path.parents[1])[0].read_bytes()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_collected_again_and_made_good(
    tmp_path: Path, reads: Counter[str], own_folder_of_moments: Path, damage: str
) -> None:
    paths = write_zoo(tmp_path / "zoo")
    first = said(paths)
    files = kept(own_folder_of_moments)
    assert len(files) == NUM_LAYERS
    DAMAGES[damage](files[1])
    for collected in (1, 0):
        reads.clear()
        assert said(paths) == first
        assert reads["products"] == collected
    assert kept(own_folder_of_moments) == files


def test_the_longest_unused_go_first(tmp_path: Path) -> None:
    for age in range(5):
        path = tmp_path / f"{age}.safetensors"
        path.write_bytes(bytes(100))
        os.utime(path, (1e9 - age, 1e9 - age))
    (tmp_path / ".4.safetensors.tmp-0a").write_bytes(bytes(100))
    os.utime(tmp_path / ".4.safetensors.tmp-0a", (1e8, 1e8))
    (tmp_path / "else").write_bytes(bytes(1000))
    trim(tmp_path, 600)
    assert len(list(tmp_path.iterdir())) == 7
    trim(tmp_path, 599)
    assert hidden([tmp_path]) == [], "what an interrupted run left unfinished"
    trim(tmp_path, 250)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.safetensors", "1.safetensors", "else"]
    trim(tmp_path / "nowhere", 0)


def test_a_run_leaves_no_more_than_there_is_room_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_folder_of_moments: Path
) -> None:
    paths = write_zoo(tmp_path / "zoo")
    ez.evidence(paths)
    files = kept(own_folder_of_moments)
    for age, path in enumerate(files):
        os.utime(path, (1e9 - age, 1e9 - age))
    size = files[0].stat().st_size
    monkeypatch.setattr("eigenzoo.subspace.moments.moments_cache.CACHE_BYTES", 2 * size + size // 2)
    others = write_stacks(tmp_path / "others", {"layer.0": planted(NUM_MODELS, SHAPE, 9)})
    ez.evidence(others)
    left = kept(own_folder_of_moments)
    assert len(left) == 2
    assert files[0] in left
    ez.evidence(paths, include=["layer.1"])
    assert len(kept(own_folder_of_moments)) == 2


@pytest.mark.parametrize("place", ["a file", "below a file"])
def test_a_cache_that_cannot_be_made_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    (tmp_path / "file").write_text("kept")
    monkeypatch.setenv("EIGENZOO_CACHE", str(tmp_path / "file" / ("" if place == "a file" else "deep")))
    paths = write_zoo(tmp_path / "zoo")
    assert said(paths) == said(paths, cache=False)
    assert (tmp_path / "file").read_text() == "kept"


def test_a_cache_that_is_read_only_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: Counter[str], own_folder_of_moments: Path
) -> None:
    paths = write_zoo(tmp_path / "zoo")
    first = said(paths)
    kept(own_folder_of_moments)[0].unlink()

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(30, "Read-only file system")

    def refuse_output(*args: object, **kwargs: object) -> None:
        raise OutputError("cannot be created (Read-only file system)")

    for name in ("os.utime", "pathlib.Path.unlink", "pathlib.Path.replace"):
        monkeypatch.setattr(name, refuse)
    monkeypatch.setattr("eigenzoo.subspace.moments.moments_cache.write_moment_tensors", refuse_output)
    monkeypatch.setattr("eigenzoo.subspace.moments.moments_cache.CACHE_BYTES", 0)
    reads.clear()
    assert said(paths) == first
    assert reads["products"] == 1
