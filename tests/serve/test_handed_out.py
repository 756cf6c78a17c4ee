"""Adapters that are handed out to other engines: exact, checked, whole, bounded, and never deleted while a server lives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from served_zoos import Zoo, write_adapters, write_finetunes

import eigenzoo as ez
from eigenzoo.integrations.dry_loading import load_dry
from eigenzoo.serve.engines import VLLM_RANKS, print_command, vllm_rank
from eigenzoo.serve.handed_out import HandedOut, written_rank
from eigenzoo.zoo.verification import Loading
from real_models import make

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


@pytest.fixture
def hand_out(zoo: Zoo, tmp_path: Path) -> Callable[..., HandedOut]:
    def make_one(**options: Any) -> HandedOut:
        return HandedOut(ez.load(zoo.bundle), zoo.base, load_dry, **{"folder": tmp_path / "kept", **options})

    return make_one


def test_it_is_the_adapter_that_rebuild_writes_and_is_made_once(
    zoo: Zoo, hand_out: Callable[..., HandedOut], tmp_path: Path
) -> None:
    expected = ez.load(zoo.bundle).rebuild("a3").save(tmp_path / "expected")
    first = hand_out()
    path = first.path("a3")
    for file in (WEIGHTS, CONFIG):
        assert (path / file).read_bytes() == (expected / file).read_bytes()
    made = (path / WEIGHTS).stat()
    assert hand_out().path("a3") == path, "another server uses the same folder"
    assert (path / WEIGHTS).stat().st_ino == made.st_ino
    assert first.path("a4") != path
    assert [entry.name for entry in first.folder.iterdir() if entry.name.startswith(".")] == [".lock"]


def test_the_folder_depends_on_coefficients_and_base(
    zoo: Zoo, hand_out: Callable[..., HandedOut], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    handed_out = hand_out()
    path = handed_out.path("a0")

    make("llama").save_pretrained(tmp_path / "other")
    other = HandedOut(ez.load(zoo.bundle), tmp_path / "other", load_dry, folder=handed_out.folder).path("a0")
    assert other != path, "it was not checked against this base"

    space = handed_out.space
    changed = space.coefficients("a0")
    layer = next(iter(changed.values))
    values = {**changed.values, layer: changed.values[layer] * (1 + 2**-20)}
    monkeypatch.setattr(space, "coefficients", lambda name: replace(changed, values=values))
    again = handed_out.path("a0")
    assert again not in (path, other)
    assert {path, other, again} == {entry for entry in handed_out.folder.iterdir() if not entry.name.startswith(".")}


def test_names_are_no_paths(hand_out: Callable[..., HandedOut]) -> None:
    handed_out = hand_out()
    for name in ("../a0", "a0/../a1", "/etc/passwd", "", "a99"):
        with pytest.raises(ez.UsageError, match="no model is called"):
            handed_out.path(name)
    path = handed_out.path("a0")
    assert path.parent == handed_out.folder


def test_a_base_that_it_does_not_fit_is_refused(zoo: Zoo, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_pretrained(zoo.base)
    config.hidden_size, config.head_dim = 64, 16
    LlamaForCausalLM(config).save_pretrained(tmp_path / "wider")
    handed_out = HandedOut(ez.load(zoo.bundle), tmp_path / "wider", load_dry, folder=tmp_path / "kept")
    with pytest.raises(ez.MismatchError, match=r"model 'a0': its adapter does not fit the base.*wider"):
        handed_out.path("a0")
    assert [entry.name for entry in handed_out.folder.iterdir()] == [".lock"], "nothing is left"


def test_without_a_library_that_decides_nothing_is_handed_out(zoo: Zoo, tmp_path: Path) -> None:
    def no_library(base: object, adapter: object) -> Loading | str:
        return "PEFT is not installed"

    handed_out = HandedOut(ez.load(zoo.bundle), zoo.base, no_library, folder=tmp_path / "kept")
    with pytest.raises(ez.MismatchError, match=r"it is not known whether .* has an effect .*PEFT is not installed"):
        handed_out.path("a0")


def test_a_rank_above_the_engines_is_refused(zoo: Zoo, hand_out: Callable[..., HandedOut]) -> None:
    assert hand_out(max_rank=4).path("a2").is_dir()
    with pytest.raises(
        ez.RankError, match=r"model 'a2': its adapter has rank 4. The engine was started for ranks up to 3"
    ):
        hand_out(max_rank=3).path("a2")


def test_full_weights_are_refused(zoo: Zoo, tmp_path: Path) -> None:
    ez.fit(write_finetunes("llama", tmp_path / "zoo", 3), rank=1).save(tmp_path / "bundle")
    space = ez.load(tmp_path / "bundle")
    with pytest.raises(ez.UnsupportedError, match="Engines load PEFT adapters"):
        HandedOut(space, zoo.base, load_dry, folder=tmp_path / "kept")
    with pytest.raises(ez.UnsupportedError, match="Engines load PEFT adapters"):
        print_command(space, zoo.base, "vllm")


def test_a_changed_folder_is_refused(hand_out: Callable[..., HandedOut]) -> None:
    handed_out = hand_out()
    path = handed_out.path("a0")
    tensors = load_file(path / WEIGHTS)
    content = bytearray((path / WEIGHTS).read_bytes())
    assert tensors
    content[-1] ^= 1
    (path / WEIGHTS).write_bytes(content)
    with pytest.raises(ez.OutputError, match="was changed since eigenzoo wrote it"):
        handed_out.path("a0")
    (path / WEIGHTS).unlink()
    with pytest.raises(ez.OutputError, match=r"lacks adapter_model\.safetensors"):
        handed_out.path("a0")


def test_threads_that_ask_at_once_make_it_once(
    hand_out: Callable[..., HandedOut], monkeypatch: pytest.MonkeyPatch
) -> None:
    handed_out = hand_out()
    made: list[str] = []
    rebuild = handed_out.space.rebuild

    def counted(name: str, **options: Any) -> Any:
        made.append(name)
        return rebuild(name, **options)

    monkeypatch.setattr(handed_out.space, "rebuild", counted)
    paths: list[Path] = []
    threads = [threading.Thread(target=lambda: paths.append(handed_out.path("a1"))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(paths)) == 1
    assert len(paths) == 6
    assert made == ["a1"]


def test_an_interrupted_rebuild_leaves_no_adapter(
    hand_out: Callable[..., HandedOut], monkeypatch: pytest.MonkeyPatch
) -> None:
    handed_out = hand_out()
    with monkeypatch.context() as patched:

        def fail(*words: object, **options: object) -> object:
            raise KeyboardInterrupt

        patched.setattr("eigenzoo.serve.handed_out.verify_adapter", fail)
        with pytest.raises(KeyboardInterrupt):
            handed_out.path("a0")
    assert [entry.name for entry in handed_out.folder.iterdir()] == [".lock"]
    assert handed_out.path("a0").is_dir()


OTHER_SERVER = """
import sys
from pathlib import Path
import eigenzoo as ez
from eigenzoo.serve.handed_out import HandedOut
kept = HandedOut(ez.load(sys.argv[1]), sys.argv[2], lambda base, adapter: "", folder=Path(sys.argv[3]))
print("lives", flush=True)
sys.stdin.read()
"""


def test_the_folder_is_bounded_and_nothing_is_deleted_while_a_server_lives(
    zoo: Zoo, hand_out: Callable[..., HandedOut]
) -> None:
    first = hand_out()
    paths = [first.path(name) for name in ("a0", "a1", "a2")]
    for age, path in enumerate(paths):
        os.utime(path, (1000 + age, 1000 + age))
    command = [sys.executable, "-c", OTHER_SERVER, str(zoo.bundle), str(zoo.base), str(first.folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == "lives\n"
            first.close()
            full = hand_out(max_adapters=3)
            assert all(path.is_dir() for path in paths)
            with pytest.raises(ez.ResourceError, match=r"3 adapters of .* none is deleted while a server lives"):
                full.path("a3")
            assert full.path("a2") == paths[2], "one that is there needs no room"
            full.close()
        finally:
            other.kill()
    alone = hand_out(max_adapters=3)
    assert [path.is_dir() for path in paths] == [False, False, True], "the oldest go"
    alone.path("a3")
    alone.close()
    size = sum(file.stat().st_size for file in alone.folder.rglob("*"))
    by_bytes = hand_out(max_bytes=size)
    # One was deleted, and two were made, of about the same size.
    with pytest.raises(ez.ResourceError, match="3 adapters of"):
        _ = [by_bytes.path(name) for name in ("a4", "a5", "a6")]


def test_the_command_of_vllm_has_the_smallest_rank_that_fits(zoo: Zoo) -> None:
    space = ez.load(zoo.bundle)
    assert written_rank(space, space.names) == max(
        rebuilt.rank for rebuilt in (space.rebuild(name).ranks() for name in space.names) if rebuilt is not None
    )
    lines = print_command(space, zoo.base, "vllm")
    assert f"export EIGENZOO_VLLM_BUNDLE={zoo.bundle}" in lines
    assert "export VLLM_ALLOW_RUNTIME_LORA_UPDATING=1" in lines
    assert f"vllm serve {zoo.base} --enable-lora --max-lora-rank 8 --max-loras 9" in lines
    assert "--max-loras 3" in "\n".join(print_command(space, zoo.base, "vllm", ["a0", "a1"])), "two, and a free slot"
    assert [vllm_rank(rank) for rank in (1, 8, 9, 257, 512)] == [8, 8, 16, 320, 512]
    assert sorted(VLLM_RANKS) == list(VLLM_RANKS)
    with pytest.raises(ez.UnsupportedError, match=r"ranks up to 513\. VLLM accepts ranks up to 512"):
        vllm_rank(513)


def test_ranks_of_models_that_were_not_projected_are_those_of_the_files(tmp_path: Path, zoo: Zoo) -> None:
    """A bundle without moments says nothing about what a cut loses."""
    paths = write_adapters("llama", tmp_path / "zoo")
    ez.fit(paths, rank=1.0).save(tmp_path / "bundle", moments=False)
    space = ez.load(tmp_path / "bundle")
    assert not space.coefficients(space.names[0]).outside
    handed_out = HandedOut(space, zoo.base, load_dry, folder=tmp_path / "kept")
    ranks = [load_file(handed_out.path(name) / WEIGHTS) for name in space.names]
    assert written_rank(space, space.names) == max(
        tensor.shape[0] for tensors in ranks for key, tensor in tensors.items() if "lora_A" in key
    )


def test_the_command_of_llama_cpp_rebuilds_verifies_and_converts_each_model(zoo: Zoo) -> None:
    text = "\n".join(print_command(ez.load(zoo.bundle), zoo.base, "llama.cpp", ["a5", "a1"]))
    assert f"eigenzoo rebuild {zoo.bundle} a5 -o adapter-0 && eigenzoo verify adapter-0 --against {zoo.base}" in text
    assert "llama-server -m base.gguf --cache-ram 0 --lora-scaled adapter-0.gguf:0,adapter-1.gguf:0" in text


def test_the_command_line_prints_them(zoo: Zoo, call: Callable[..., tuple[int, str, str]]) -> None:
    words = ("serve", zoo.bundle, "--model", zoo.base, "--only", "a3", "--print-command")
    expected = print_command(ez.load(zoo.bundle), zoo.base, "llama.cpp", ["a3"])
    assert call(*words, "llama.cpp") == (0, "\n".join(expected) + "\n", "")
    code, out, _ = call(*words, "llama.cpp", "--json")
    assert (code, json.loads(out)) == (0, {"engine": "llama.cpp", "commands": expected})
    code, out, said = call(*words, "tgi")
    assert (code, out) == (2, "")
    assert "'tgi' is not an engine" in said


def test_commands_refuse_other_engines_and_models(zoo: Zoo) -> None:
    space = ez.load(zoo.bundle)
    with pytest.raises(ez.UsageError, match=r"'tgi' is not an engine\. Choose vllm or llama\.cpp"):
        print_command(space, zoo.base, "tgi")
    with pytest.raises(ez.UsageError, match="no model is called 'a22'"):
        print_command(space, zoo.base, "vllm", ["a22"])
