"""The tuner on a bundle of low-rank cores: it trains two factors, saves them, and exports updates of their rank."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("peft")

from peft import PeftModel
from peft_models import Made, shake, tuned

import eigenzoo as ez
from eigenzoo.integrations.peft_tuner import export_lora

# PEFT's own use of what transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated and will be removed in v6:FutureWarning")
SIDES = ("outputs", "inputs")


@pytest.mark.parametrize("start", ["mean", "zero", "m1"])
def test_the_tuner_trains_factors_and_exports_their_rank(
    made: Callable[[str], Made], start: str, tmp_path: Path
) -> None:
    plain = made("llama-sides")
    bundle = ez.fit(plain.paths, axes=SIDES, rank=8, core_rank=1).save(tmp_path / "bundle")
    case = Made("low", plain.kind, plain.fit, plain.paths, bundle)
    model = tuned(case, start=start)
    if start == "zero":
        torch.testing.assert_close(case.outputs(model), case.outputs(case.base()))
    shake(model)
    expected = case.outputs(model)
    model.save_pretrained(tmp_path / "saved")
    state = load_file(tmp_path / "saved/adapter_model.safetensors")
    space = ez.load(bundle)
    sizes = sorted(basis.num_coefficients for basis in space.layers.values())
    assert sorted(values.numel() for name, values in state.items() if name.endswith("coefficients")) == sizes
    loaded = PeftModel.from_pretrained(case.base(), tmp_path / "saved").eval()
    torch.testing.assert_close(case.outputs(loaded), expected)
    export_lora(tmp_path / "saved", tmp_path / "lora")
    stock = PeftModel.from_pretrained(case.base(), tmp_path / "lora").eval()
    torch.testing.assert_close(case.outputs(stock), expected, atol=1e-5, rtol=1e-5)
    assert stock.peft_config["default"].r == 1
