"""`eigenzoo verify` as a user runs it: exit codes, one document, a line for each check."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from verify_cases import WEIGHTS, broken, write_adapter

import eigenzoo as ez

Made = Callable[[str], Path]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(call: Run) -> Run:
    return call


def test_an_adapter_against_its_base(run: Run, base: Made, sound: Made, tmp_path: Path) -> None:
    code, out, err = run("verify", sound("llama"), "--against", base("llama"))
    assert (code, err) == (0, "")
    assert f"4 modules, takes effect on {base('llama')}" in out
    for name in ("file", "names", "target modules", "modules", "shapes", "completeness", "loading", "values", "change"):
        assert f"ok  {name}" in out
    assert "takes up 8 of 8 tensors" in out
    assert re.search(r"updates answer [\d.]+ times as much as their base layers \(median\), from [\d.]+ to [\d.]+", out)
    code, out, _ = run("verify", sound("llama"), "--against", base("llama"), "--json")
    document: Any = json.loads(out)
    assert (code, document["ok"], document["bundle"], document["faults"]) == (0, True, None, [])
    assert (document["num_models"], document["num_layers"]) == (1, 4)
    assert document["adapter"] == str(sound("llama"))
    assert [check["done"] for check in document["checks"] if check["name"] == "loading"] == [True]
    adapter = broken(sound("llama"), tmp_path / "broken", lambda key: key.replace("model.layers", "layers"))
    code, out, err = run("verify", adapter, "--against", base("llama"))
    assert (code, err) == (1, "")
    assert "FAULT  modules" in out
    assert "fault: 4 of 4 modules are not in the base" in out
    assert f"{adapter}: 4 modules, faults: 2" in out
    code, out, _ = run("verify", adapter, "--against", base("llama"), "--json")
    assert (code, len(json.loads(out)["faults"])) == (1, 2)


def test_without_a_dry_load_it_is_undecided(run: Run, base: Made, sound: Made, tmp_path: Path) -> None:
    """Whatever the names say: exit code 1, no fault, and neither "takes effect" nor "ok"."""
    renamed = broken(sound("llama"), tmp_path / "renamed", lambda key: key.replace("model.layers", "layers"))
    bundle = ez.fit([write_adapter(tmp_path / f"a{place}", "llama", seed=place) for place in range(3)], 1)
    bundle.save(tmp_path / "bundle")
    # Without its config nobody can build it.
    alone = Path(shutil.copy(base("llama") / "model.safetensors", tmp_path / "alone.safetensors"))
    for words in (
        (sound("llama"), "--against", base("llama"), "--no-dry-load"),
        (renamed, "--against", base("llama"), "--no-dry-load"),
        (tmp_path / "bundle", "--against", base("llama"), "--no-dry-load"),
        (sound("conv"), "--against", base("conv")),
        (sound("llama"), "--against", alone),
    ):
        code, out, err = run("verify", *words)
        assert (code, err) == (1, ""), words
        assert "undecided whether it takes effect on" in " ".join(out.split())
        assert "note: undecided, since loading was not tried: " in " ".join(out.split())
        assert "fault" not in out
        code, out, _ = run("verify", *words, "--json")
        document = json.loads(out)
        assert (code, document["ok"], document["faults"]) == (1, None, [])
    code, out, _ = run("verify", renamed, "--against", base("llama"), "--no-dry-load", "--json")
    assert any("4 of 4 modules are not in the base" in note for note in json.loads(out)["notes"])


def test_an_adapter_of_mlx_lm_is_undecided(run: Run, base: Made, sound: Made, tmp_path: Path) -> None:
    """PEFT cannot read its files; of the PEFT adapter that is rebuilt from it, PEFT decides."""
    zoo = [write_adapter(tmp_path / f"a{place}", "llama", seed=place) for place in range(3)]
    space = ez.fit(zoo, rank=1.0)
    folder = space.rebuild("a0").save(tmp_path / "mlx", format="mlx-lm")
    for path in (folder, folder / "adapters.safetensors"):
        code, out, err = run("verify", path, "--against", base("llama"))
        assert (code, err) == (1, "")
        assert "undecided, since loading was not tried: only mlx-lm loads such files" in out
        assert "takes up" not in out
    assert json.loads(run("verify", folder, "--against", base("llama"), "--json")[1])["ok"] is None
    again = ez.fit([folder, *zoo[1:]], rank=1.0).rebuild("mlx").save(tmp_path / "again")
    assert run("verify", again, "--against", base("llama"))[0] == 0


def test_an_adapter_alone(run: Run, sound: Made) -> None:
    code, out, _ = run("verify", sound("llama"))
    assert code == 0
    assert "undamaged; --against BASE checks whether it takes effect" in out


def test_a_bundle_against_a_base(run: Run, base: Made, tmp_path: Path) -> None:
    paths = [write_adapter(tmp_path / f"a{place}", "llama", seed=place) for place in range(3)]
    bundle = ez.fit(paths, 1).save(tmp_path / "bundle")
    code, out, err = run("verify", bundle, "--against", base("llama"))
    assert (code, err) == (0, "")
    assert f"3 models, 4 layers, whole, and takes effect on {base('llama')}" in " ".join(out.split())
    assert "ok  checksums" in out
    assert "ok  change" in out
    code, out, _ = run("verify", bundle, "--against", base("gpt2"), "--json")
    document = json.loads(out)
    assert code == 1
    assert not document["ok"]
    assert (document["num_models"], document["num_layers"]) == (3, 4)
    assert document["against"] == str(base("gpt2"))
    (bundle / "basis.safetensors").write_bytes(b"")
    code, out, _ = run("verify", bundle, "--against", base("llama"), "--json")
    assert (code, json.loads(out)["ok"]) == (1, False)


def test_bad_input(run: Run, base: Made, sound: Made, tmp_path: Path) -> None:
    alone = Path(shutil.copy(sound("llama") / WEIGHTS, tmp_path / "alone.safetensors"))
    for words, message in (
        ((base("llama"),), "is not an adapter"),
        ((tmp_path / "nowhere",), "there is no such file or folder"),
        ((sound("llama").parent,), "Name one of them"),
        ((alone,), "but no adapter_config.json"),
        ((sound("llama"), "--against", tmp_path / "nowhere"), "nothing of this name exists"),
        ((sound("llama"), "--against", sound("llama")), "A base is a model of full weights"),
        ((broken(sound("llama"), tmp_path / "dora", use_dora=True),), "DoRA"),
    ):
        code, out, err = run("verify", *words)
        assert (code, out) == (2, ""), words
        assert message in err
        assert "Traceback" not in err


def test_an_adapter_is_named_by_its_weights_too(run: Run, base: Made, sound: Made) -> None:
    found = [run("verify", path, "--against", base("llama")) for path in (sound("llama"), sound("llama") / WEIGHTS)]
    assert [code for code, _, _ in found] == [0, 0]
    assert found[0][1] == found[1][1].replace(f"/{WEIGHTS}", "")


def test_names_of_strangers_move_no_terminal(run: Run, base: Made, sound: Made, tmp_path: Path) -> None:
    adapter = broken(sound("llama"), tmp_path / "odd", lambda key: key.replace("q_proj", "q\x1b[31m"))
    for words in ((), ("--json",)):
        code, out, _ = run("verify", adapter, "--against", base("llama"), *words)
        assert code == 1
        assert "\x1b" not in out


def test_rebuild_is_quiet_where_it_is_asked(run: Run, tmp_path: Path) -> None:
    paths = [write_adapter(tmp_path / f"a{place}", "llama", seed=place) for place in range(4)]
    bundle = ez.fit(paths[:3], 1).save(tmp_path / "bundle")
    for name, source in (("known", "a0"), ("other", paths[3])):
        code, _, err = run("rebuild", bundle, source, "-o", tmp_path / name, "--quiet")
        assert (code, err) == (0, "")
        assert ez.verify_adapter(tmp_path / name).ok
