"""Adapters as plain LoRA: what stock PEFT computes with them is what was computed before."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

pytest.importorskip("peft")

from peft import PeftModel
from peft_models import FITS, KINDS, Made, shake, tuned

import eigenzoo as ez
from eigenzoo.adapt import LEARNING_RATE
from eigenzoo.integrations.peft_tuner import export_lora

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated and will be removed in v6:FutureWarning")

NAMES = [name for name, fit in FITS.items() if "conv-weights" not in name]


@pytest.mark.parametrize("name", NAMES)
def test_stock_peft_computes_the_same(made: Callable[[str], Made], name: str, tmp_path: Path) -> None:
    case = made(name)
    model = tuned(case)
    shake(model)
    model.save_pretrained(tmp_path / "saved")
    before = case.outputs(model)
    assert (before - case.outputs(case.base())).abs().max() > 1e-3
    for source, out in ((model, tmp_path / "of-model"), (tmp_path / "saved", tmp_path / "of-files")):
        assert export_lora(source, out) == out
        stock = PeftModel.from_pretrained(case.base(), out).eval()
        torch.testing.assert_close(case.outputs(stock), before, atol=1e-5, rtol=1e-5)
        merged = stock.merge_and_unload()
        torch.testing.assert_close(case.outputs(merged), before, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", ["llama-sides", "llama-factors", "llama-models", "gpt2-delta", "llama-weights"])
@pytest.mark.filterwarnings("ignore:.*layers of the bundle are no weights")
def test_the_zoos_mean_goes_along(made: Callable[[str], Made], name: str, tmp_path: Path) -> None:
    case = made(name)
    model = tuned(case, start="mean")
    shake(model)
    export_lora(model, tmp_path / "out")
    stock = PeftModel.from_pretrained(case.base(), tmp_path / "out").eval()
    torch.testing.assert_close(case.outputs(stock), case.outputs(model), atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path / "saved")
    if name == "llama-weights":
        with pytest.raises(ez.UsageError, match="the zoo's, not a change of a base"):
            export_lora(tmp_path / "saved", tmp_path / "again")
        return
    export_lora(tmp_path / "saved", tmp_path / "again")
    again = PeftModel.from_pretrained(case.base(), tmp_path / "again").eval()
    torch.testing.assert_close(case.outputs(again), case.outputs(model), atol=1e-5, rtol=1e-5)


def test_the_rank_is_that_of_the_update_or_what_is_asked_for(made: Callable[[str], Made], tmp_path: Path) -> None:
    case = made("llama-factors")
    model = tuned(case, start="m0")
    export_lora(model, tmp_path / "exact")
    config = json.loads((tmp_path / "exact" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (3, 3, "LORA")
    export_lora(model, tmp_path / "one", rank=1)
    assert json.loads((tmp_path / "one" / "adapter_config.json").read_text())["r"] == 1
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    exact, one = (load_file(tmp_path / out / "adapter_model.safetensors") for out in ("exact", "one"))
    update = exact[key.format("B")].double() @ exact[key.format("A")].double()
    values = torch.linalg.svdvals(update)
    left_out = update - one[key.format("B")].double() @ one[key.format("A")].double()
    torch.testing.assert_close(left_out.norm(), values[1:].norm(), atol=1e-5, rtol=1e-5)


def test_a_start_of_zero_is_a_lora_of_zeros(made: Callable[[str], Made], tmp_path: Path) -> None:
    case = made("llama-models")
    export_lora(tuned(case), tmp_path / "out")
    stock = PeftModel.from_pretrained(case.base(), tmp_path / "out").eval()
    assert torch.equal(case.outputs(stock), case.outputs(case.base()))


def test_saved_modules_go_along(made: Callable[[str], Made], tmp_path: Path) -> None:
    case = made("vit-sides")
    model = tuned(case, modules_to_save=["classifier"])
    shake(model)
    export_lora(model, tmp_path / "out")
    stock = PeftModel.from_pretrained(case.base(), tmp_path / "out").eval()
    torch.testing.assert_close(case.outputs(stock), case.outputs(model), atol=1e-5, rtol=1e-5)


def test_an_exported_adapter_is_a_model_of_the_zoo(made: Callable[[str], Made], tmp_path: Path) -> None:
    case = made("llama-sides")
    space, model = ez.load(case.bundle), tuned(case, start="m2")
    export_lora(model, tmp_path / "out")
    expected, found = space.coefficients("m2").values, space.project(tmp_path / "out").values
    for layer, values in expected.items():
        torch.testing.assert_close(found[layer].float(), values.float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["conv-weights", "conv-weights-sides"])
def test_convolutions_that_peft_computes_otherwise_are_refused(
    made: Callable[[str], Made], name: str, tmp_path: Path
) -> None:
    model = tuned(made(name))
    with pytest.raises(ez.UnsupportedError, match=r"module 'grouped': convolutions with groups"):
        export_lora(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    model = tuned(made(name), exclude_modules=["grouped", "dilated"])
    export_lora(model, tmp_path / "out")


def test_only_adapters_of_eigenzoo_are_exported(made: Callable[[str], Made], tmp_path: Path) -> None:
    case = made("llama-sides")
    with pytest.raises(ez.UsageError, match="no adapter of eigenzoo called 'other'"):
        export_lora(tuned(case), tmp_path / "out", "other")
    export_lora(tuned(case), tmp_path / "out")
    with pytest.raises(ez.OutputError, match="exists already"):
        export_lora(tuned(case), tmp_path / "out")


OTHER_PROCESS = """
import sys, torch, transformers
from peft import PeftModel
folder, kind = sys.argv[1:]
inputs = torch.load(folder + "/inputs.pt")
def outputs(adapter):
    base = getattr(transformers, kind).from_pretrained(folder + "/base")
    with torch.no_grad():
        return PeftModel.from_pretrained(base, folder + adapter).eval()(**inputs).logits
stock = outputs("/lora")
assert "eigenzoo" not in sys.modules
import eigenzoo.integrations.peft_tuner
torch.save({"stock": stock, "loaded": outputs("/saved")}, folder + "/found.pt")
"""
"""A plain LoRA is loaded by PEFT alone, then the adapter itself by its name."""


def in_another_process(folder: Path, kind: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a process that knows nothing of this one computes with the adapter, and with the LoRA that was made of it."""
    torch.save(inputs, folder / "inputs.pt")
    done = subprocess.run([sys.executable, "-c", OTHER_PROCESS, str(folder), kind], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.load(folder / "found.pt")


@pytest.mark.parametrize(
    "name", ["llama-sides", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2-models", "vit-sides"))]
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.slow
def test_from_the_trainer_to_another_process_to_stock_peft(
    made: Callable[[str], Made], name: str, tmp_path: Path
) -> None:
    from transformers import Trainer, TrainingArguments

    case = made(name)
    model = tuned(case)
    inputs = KINDS[case.kind].inputs
    column, values = next(iter(inputs.items()))
    labels = values if case.kind != "vit" else torch.arange(len(values)) % 4
    data = [{column: values[place], "labels": labels[place]} for place in range(len(values))]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "runs"),
        max_steps=4,
        per_device_train_batch_size=3,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        report_to=[],
        use_cpu=True,
        save_steps=2,
        logging_steps=1,
        remove_unused_columns=False,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model, arguments, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    model.eval()
    expected = case.outputs(model)
    assert (expected - case.outputs(case.base())).abs().max() > 1e-4
    trainer.save_model(str(tmp_path / "saved"))
    size = (tmp_path / "saved" / "adapter_model.safetensors").stat().st_size
    assert size < 4 * sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) + 4096
    # What the trainer kept on the way is an adapter too.
    resumed = Trainer(tuned(case), arguments, train_dataset=data)
    resumed.train(resume_from_checkpoint=str(tmp_path / "runs" / "checkpoint-2"))
    torch.testing.assert_close(case.outputs(resumed.model.eval()), expected, atol=1e-5, rtol=1e-5)
    export_lora(tmp_path / "saved", tmp_path / "lora")
    case.base().save_pretrained(tmp_path / "base")
    found = in_another_process(tmp_path, type(case.base()).__name__, inputs)
    torch.testing.assert_close(found["loaded"], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found["stock"], expected, atol=1e-5, rtol=1e-5)
