"""`eigenzoo adapt` on the digits, and `eigenzoo rebuild` of what it writes."""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("peft")
pytest.importorskip("transformers")
pytest.importorskip("datasets")

from adapt_cases import QUICKLY, TASK, Call, adapted_logits, bundle_of, done, process, vit
from peft import PeftModel

import eigenzoo as ez
from eigenzoo import nursery
from eigenzoo.nursery import digits
from eigenzoo.passes.process import quietly
from guard import HANG, wait_until
from tolerance import ONE_IMAGE


@pytest.mark.slow
def test_digits_as_processes(digits_zoo: Callable[[str], Path], tmp_path: Path) -> None:
    zoo, file = digits_zoo("digits-vit"), tmp_path / "task.safetensors"
    words = (bundle_of(zoo), TASK, "--model", zoo / "_base", *QUICKLY, "--learning-rate", "0.1")
    found = json.loads(done("adapt", *words, "-o", file, "--json"))
    assert [path.name for path in tmp_path.iterdir()] == ["task.safetensors"]
    space = ez.load(bundle_of(zoo))
    assert found["num_trained"] == sum(basis.num_coefficients for basis in space.layers.values())
    assert found["file_bytes"] == file.stat().st_size
    assert found["checkpoint_bytes"] == (zoo / "_base" / "model.safetensors").stat().st_size
    assert found["accuracy"]["adapted"] > found["accuracy"]["mean"] + 0.1
    assert found["accuracy"]["mean"] == found["accuracy"]["start"]
    assert (found["num_train"], found["num_test"], found["taken_up_at"]) == (1297, 500, 0)
    assert found["last_loss"] < found["first_loss"]

    done("rebuild", bundle_of(zoo), file, "-o", tmp_path / "model")
    assert nursery.accuracy(tmp_path / "model") == pytest.approx(found["accuracy"]["adapted"], abs=ONE_IMAGE)
    with torch.no_grad():
        rebuilt = vit(tmp_path / "model")(digits.load().test_images).logits
    assert torch.allclose(rebuilt, adapted_logits(zoo, file), rtol=0, atol=1e-5)

    again = process("adapt", *words, "-o", tmp_path / "again.safetensors", "--json")
    # However late the signal comes: what there is at that moment is what the next call begins with.
    wait_until(lambda: (tmp_path / ".again.safetensors.checkpoint").exists() or again.poll() is not None)
    time.sleep(random.random() / 4)
    again.send_signal(signal.SIGINT)
    out, err = again.communicate(timeout=HANG)
    if again.returncode:
        assert (again.returncode, out) == (130, "")
        assert "resume from the last checkpoint" in err
        assert sorted(path.name for path in tmp_path.iterdir() if "again" in path.name) == [
            ".again.safetensors.checkpoint"
        ]
        done("adapt", *words, "-o", tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == file.read_bytes()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_start_zero_changes_the_model_that_is_named(
    digits_zoo: Callable[[str], Path], tmp_path: Path, call: Call
) -> None:
    zoo, file = digits_zoo("digits-vit"), tmp_path / "task.safetensors"
    code, out, err = call(
        "adapt", bundle_of(zoo), TASK, "--model", zoo / "_base", *QUICKLY, "--start", "zero", "-o", file, "--json"
    )
    assert code == 0, err
    found = json.loads(out)["accuracy"]
    base = vit(zoo / "_base")
    test_images, labels = digits.load().test_set(digits.Task.parse(TASK))
    with torch.no_grad():
        assert found["start"] == float((base(test_images).logits.argmax(-1) == labels).double().mean())
    assert found["mean"] != found["start"]
    words = ("rebuild", bundle_of(zoo), file, "-o", tmp_path / "model")
    code, _, err = call(*words)
    assert code == 2
    assert "trained from start zero" in err
    assert "Name the model with --model" in err
    other = next(path for path in sorted(zoo.iterdir()) if path.name.startswith("task-"))
    code, _, err = call(*words, "--model", other)
    assert code == 2
    assert "is not the model that was trained" in err
    code, _, err = call(*words, "--model", zoo / "_base")
    assert code == 0, err
    with torch.no_grad():
        rebuilt = vit(tmp_path / "model")(test_images).logits
    assert torch.allclose(rebuilt, adapted_logits(zoo, file, "zero"), rtol=0, atol=1e-5)


@pytest.mark.parametrize("start", ["mean", "zero"])
def test_deltas_come_on_top_of_their_base(
    digits_zoo: Callable[[str], Path], tmp_path: Path, call: Call, start: str
) -> None:
    zoo, file = digits_zoo("digits-vit"), tmp_path / "task.safetensors"
    models = sorted(zoo.glob("task-*"))
    bundle = ez.fit(models, 3, view="delta", base=zoo / "_base", exclude=["classifier.*"]).save(tmp_path / "bundle")
    words = ("adapt", bundle, TASK, *QUICKLY, "--start", start, "--besides", "classifier.*", "-o", file, "--json")
    code, out, err = call(*words, "--model", zoo / "_base")
    assert code == 0, err
    code, _, err = call("rebuild", bundle, file, "--like", models[2].name, "-o", tmp_path / "model")
    assert code == 0, err
    assert nursery.accuracy(tmp_path / "model") == pytest.approx(json.loads(out)["accuracy"]["adapted"], abs=ONE_IMAGE)
    if start == "mean":
        code, _, err = call(*words, "--force", "--model", models[0])
        assert code == 2
        assert "is not the base that was subtracted" in err


def test_what_was_trained_besides_finds_its_place_under_the_names_of_the_files(
    digits_zoo: Callable[[str], Path], tmp_path: Path, call: Call
) -> None:
    """transformers calls a layer otherwise in memory than in the files that it writes."""
    zoo, file = digits_zoo("digits-vit"), tmp_path / "task.safetensors"
    exclude = ["classifier.*", "*.layer.1.*", "*.layers.1.*"]
    bundle = ez.fit(sorted(zoo.glob("task-*")), 3, exclude=exclude).save(tmp_path / "bundle")
    words = ("--model", zoo / "_base", *QUICKLY, "--besides", "*layers.1.*", "-o", file, "--json")
    code, out, err = call("adapt", bundle, TASK, *words)
    assert code == 0, err
    code, _, err = call("rebuild", bundle, file, "-o", tmp_path / "model")
    assert code == 0, err
    assert nursery.accuracy(tmp_path / "model") == pytest.approx(json.loads(out)["accuracy"]["adapted"], abs=ONE_IMAGE)


@pytest.mark.parametrize("start", ["mean", "zero"])
def test_lora_gives_an_adapter_of_the_same_function(
    digits_zoo: Callable[[str], Path], tmp_path: Path, call: Call, start: str
) -> None:
    zoo, file = digits_zoo("digits-lora"), tmp_path / "task.safetensors"
    words = ("--model", zoo / "_base", *QUICKLY, "--start", start, "-o", file, "--json")
    code, out, err = call("adapt", bundle_of(zoo), TASK, *words)
    assert code == 0, err
    code, _, err = call("rebuild", bundle_of(zoo), file, "-o", tmp_path / "adapter")
    assert code == 0, err
    accuracy = nursery.accuracy(tmp_path / "adapter", base=zoo / "_base")
    assert accuracy == pytest.approx(json.loads(out)["accuracy"]["adapted"], abs=ONE_IMAGE)
    with quietly():
        model = PeftModel.from_pretrained(vit(zoo / "_base"), str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        rebuilt = model(digits.load().test_images).logits
    assert torch.allclose(rebuilt, adapted_logits(zoo, file, start), rtol=0, atol=1e-5)


def test_networks_of_the_nursery(digits_zoo: Callable[[str], Path], tmp_path: Path, call: Call) -> None:
    zoo, file = digits_zoo("digits-cnn"), tmp_path / "task.safetensors"
    model = sorted(zoo.glob("task-*.safetensors"))[0]
    code, out, err = call("adapt", bundle_of(zoo), TASK, "--model", model, *QUICKLY, "-o", file, "--json")
    assert code == 0, err
    code, _, err = call("rebuild", bundle_of(zoo), file, "-o", tmp_path / "net")
    assert code == 0, err
    (rebuilt,) = (tmp_path / "net").glob("*.safetensors")
    assert nursery.accuracy(rebuilt) == pytest.approx(json.loads(out)["accuracy"]["adapted"], abs=ONE_IMAGE)


def test_the_control_is_measured_and_not_kept(
    digits_zoo: Callable[[str], Path], tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    zoo = digits_zoo("digits-vit")
    monkeypatch.chdir(tmp_path)
    words = ("adapt", bundle_of(zoo), TASK, "--model", zoo / "_base", *QUICKLY, "--random-basis")
    code, out, err = call(*words)
    assert code == 0, err
    assert "numbers trained in a random basis" in out
    assert list(tmp_path.iterdir()) == []
    code, _, err = call(*words, "-o", tmp_path / "task.safetensors")
    assert code == 2
    assert "a random basis has no output file" in err


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.cuda,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU and a torch build that knows it"),
            ],
        ),
    ],
)
def test_the_device_is_an_option(digits_zoo: Callable[[str], Path], tmp_path: Path, call: Call, device: str) -> None:
    zoo = digits_zoo("digits-cnn")
    words = ("adapt", bundle_of(zoo), TASK, "--model", next(iter(sorted(zoo.glob("**/*.safetensors")))), *QUICKLY)
    found = []
    for number, chosen in enumerate(((), ("--device", device))):
        code, out, err = call(*words, *chosen, "-o", tmp_path / f"{number}.safetensors", "--json")
        assert code == 0, err
        found.append(json.loads(out))
    assert found[0]["accuracy"]["adapted"] == pytest.approx(found[1]["accuracy"]["adapted"], abs=0.02)
    if device == "cpu":
        assert (tmp_path / "0.safetensors").read_bytes() == (tmp_path / "1.safetensors").read_bytes()
