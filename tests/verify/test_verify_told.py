"""What `verify` says of what failed is true: its details, and the causes that it names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from verify_cases import CONFIG, broken, changed, write_adapter

import eigenzoo as ez
from eigenzoo.errors import FormatError
from eigenzoo.integrations.dry_loading import load_dry
from eigenzoo.integrations.models import told
from eigenzoo.zoo.verification import Verification

Made = Callable[[str], Path]


def details(found: Verification) -> dict[str, str]:
    return {check.name: check.detail for check in found.checks}


def test_a_base_of_fewer_layers_is_another_base(base: Made, sound: Made, tmp_path: Path) -> None:
    tensors = load_file(base("llama") / "model.safetensors")
    (tmp_path / "short").mkdir()
    short = {name: value for name, value in tensors.items() if ".1." not in name}
    save_file(short, tmp_path / "short" / "model.safetensors")
    found = ez.verify_adapter(sound("llama"), tmp_path / "short")
    assert (found.ok, list(found)) == (None, [])
    assert "2 of 4 modules" in found.notes[0]
    assert "it has fewer layers" in found.notes[0]
    config = json.loads((base("llama") / "config.json").read_text())
    (tmp_path / "short" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    first, dropped = ez.verify_adapter(sound("llama"), tmp_path / "short", loader=load_dry)
    assert "it has fewer layers" in first
    assert "drops 4 of 8 tensors" in dropped


def test_details_of_an_adapter_that_fails(base: Made, sound: Made, tmp_path: Path) -> None:
    adapter = broken(sound("llama"), tmp_path / "names", lambda key: key.removeprefix("base_model.model."))
    assert details(ez.verify_adapter(adapter))["names"].startswith("4 of 4 modules' names do not begin")

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[next(iter(tensors))].fill_(float("nan"))

    found = details(ez.verify_adapter(changed(sound("llama"), tmp_path / "nan", spoil)))
    assert found["values"] == "NaN or Inf in the factors of 1 of 4 modules"
    assert found["effect"] == "3 of 4 modules change something"

    def silence(tensors: dict[str, torch.Tensor]) -> None:
        for name, value in tensors.items():
            value.mul_("lora_A" in name)

    checks = ez.verify_adapter(changed(sound("llama"), tmp_path / "zero", silence), base("llama")).checks
    assert [check.done for check in checks if check.name == "change"] == [False]


def test_details_of_a_bundle_that_fails(tmp_path: Path) -> None:
    paths = [write_adapter(tmp_path / f"a{place}", "llama", seed=place) for place in range(3)]
    bundle = ez.fit(paths, 1).save(tmp_path / "bundle")
    assert details(ez.load(bundle).verify())["unknown files"] == "none"
    (bundle / "other").write_text("x")
    data = bytearray((bundle / "basis.safetensors").read_bytes())
    data[-4] ^= 1
    (bundle / "basis.safetensors").write_bytes(data)
    found = details(ez.load(bundle).verify())
    assert found["unknown files"] == "faults: 1"
    assert found["checksums"].startswith("1 of ")


def test_causes_that_the_config_has(base: Made, sound: Made, tmp_path: Path) -> None:
    adapter = broken(sound("llama"), tmp_path / "alpha", lora_alpha=8e6)
    assert "a scale of 2e+06 (lora_alpha)" in "".join(ez.verify_adapter(adapter, base("llama")))
    bare = broken(sound("llama"), tmp_path / "bare")
    config = json.loads((bare / CONFIG).read_text())
    (bare / CONFIG).write_text(json.dumps({key: value for key, value in config.items() if key != "r"}))
    (fault,) = ez.verify_adapter(bare)
    assert "adapter_config.json has no r" in fault
    assert "PEFT assumes 8 if r is missing" in fault


def test_the_whole_reason_of_another_library_is_told() -> None:
    def refuse() -> None:
        raise RuntimeError("Error in loading:\n\tsize mismatch" + " x" * 300)

    with pytest.raises(FormatError, match="Error in loading: size mismatch") as caught:
        told("refused", Path("here"), refuse)
    assert len(caught.value.what) < 350
