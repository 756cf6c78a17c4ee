"""Diffusion models' LoRAs by the names of several tools: verify's exit code is what the real diffusers does with the file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

pytest.importorskip("diffusers")

from diffusion_cases import HIDDEN, answer, loaded, make, merged, quietly, tensors_by, write
from followed import advice_in, renaming

import eigenzoo as ez
from eigenzoo.formats.opening import open_model
from eigenzoo.integrations.dry_loading import load_dry
from once import once
from tolerance import tolerance

Run = Callable[..., tuple[int, str, str]]

LAYERS = 40
"""Products in a row: what one rounding may grow to."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def write_all(folder: Path) -> None:
        for family in ("wan", "flux"):
            quietly(make(family).save_pretrained, folder / family)

    return once(tmp_path_factory, "diffusion bases", write_all)


def has_whole_effect(family: str, path: Path, by_component: bool = False) -> bool:
    """Whether the real diffusers answers with the file as with the whole update in the weights."""
    before, wanted = answer(family, make(family)), answer(family, merged(family))
    size = float(wanted.abs().max())
    assert float((wanted - before).abs().max()) > 0.1 * size
    try:
        found = loaded(family, path, by_component=by_component)
    except (ValueError, KeyError, IndexError, AttributeError, RuntimeError):
        return False
    return float((found - wanted).abs().max()) <= tolerance(LAYERS * HIDDEN, dtype=torch.float32, scale=size)


DEFAULT = [(family, tool) for family in ("wan", "flux") for tool in ("kohya", "comfyui", "diffusers")]
DEFAULT += [("wan", "original names alone")]
MORE = [
    (family, tool)
    for family in ("wan", "flux")
    for tool in ("comfyui, with α", "of the component alone", "of a unet", "original names alone", "diffsynth")
    if (family, tool) not in DEFAULT
]
CELLS = [*DEFAULT, *(pytest.param(*cell, marks=pytest.mark.slow) for cell in MORE)]


@pytest.mark.parametrize(("family", "tool"), CELLS)
def test_the_exit_code_is_what_diffusers_does(family: str, tool: str, bases: Path, call: Run, tmp_path: Path) -> None:
    path = write(tmp_path / "lora.safetensors", tensors_by(tool, family))
    if not open_model(path).updates:
        pytest.skip("no format reads these names")
    code, out, _ = call("verify", path, "--against", bases / family, "--json")
    document = json.loads(out)
    by_component = any("(load_lora_adapter" in check["detail"] for check in document["checks"])
    assert code == (0 if has_whole_effect(family, path, by_component) else 1)
    assert document["ok"] is (code == 0)
    if code == 0:
        assert document["typical_change"] > 0.1
        return
    advice = advice_in(document["faults"])
    # Flux's checkpoint has names that diffusers reads only where the factors are called down and up.
    assert bool(advice) == (tool != "of a unet")
    if advice:
        changed = {renaming(advice)(key): value for key, value in load_file(path).items()}
        followed = write(tmp_path / "followed" / "lora.safetensors", changed)
        assert has_whole_effect(family, followed), advice
        assert call("verify", followed, "--against", bases / family)[0] == 0


def without(part: str) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {key: value for key, value in tensors.items() if part not in key}


def other_width(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: torch.cat([value, value], 1) if "lora_A" in key else value for key, value in tensors.items()}


def one_renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.replace("blocks.1.", "blocks.7."): value for key, value in tensors.items()}


@pytest.mark.parametrize(
    ("change", "said"),
    [(other_width, "size mismatch"), (one_renamed, "drops 20 of 40 tensors"), (without("attn1"), "")],
)
def test_another_base_and_a_part_of_a_file(
    change: Callable[[Mapping[str, Tensor]], dict[str, Tensor]], said: str, bases: Path, tmp_path: Path
) -> None:
    """A LoRA of fewer layers takes effect; one whose layers the base has not is at fault, as a whole or in part."""
    path = write(tmp_path / "lora.safetensors", change(tensors_by("diffusers", "wan")))
    found = ez.verify_adapter(path, bases / "wan", loader=load_dry)
    assert found.ok is (not said)
    assert said in "".join(found)
    if said == "size mismatch":
        with pytest.raises(RuntimeError, match="size mismatch"):
            loaded("wan", path)
    else:
        assert not has_whole_effect("wan", path)


def test_without_configs_or_diffusers_it_is_undecided(
    bases: Path, call: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "lora.safetensors", tensors_by("diffusers", "wan"))
    alone = write(tmp_path / "alone.safetensors", make("wan").state_dict())
    for base, said in (
        (alone, "has no config.json and no model_index.json"),
        (bases / "wan", "not installed: diffusers"),
    ):
        code, out, _ = call("verify", path, "--against", base)
        assert code == 1
        assert f"undecided whether it takes effect on {base}" in " ".join(out.split())
        assert said in " ".join(out.split())
        monkeypatch.setattr(
            "eigenzoo.integrations.diffusers_loading.find_spec", lambda name: name != "diffusers" or None
        )


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"_class_name": "os"}, "has no pipeline 'os' that loads LoRAs"),
        ({"_class_name": "DiffusionPipeline"}, "has no pipeline 'DiffusionPipeline' that loads LoRAs"),
        ({"_class_name": "../WanTransformer3DModel"}, "that loads LoRAs"),
        ({"num_layers": 10**9}, "num_layers is 1000000000"),
        ({"ffn_dim": 10**12}, "many times larger than its weights"),
        ({"patch_size": "x"}, "WanTransformer3DModel cannot be built"),
    ],
)
def test_configs_of_strangers_are_not_believed(
    entries: dict[str, object], said: str, bases: Path, tmp_path: Path
) -> None:
    path = write(tmp_path / "lora.safetensors", tensors_by("diffusers", "wan"))
    base = tmp_path / "base"
    write(base / "diffusion_pytorch_model.safetensors", make("wan").state_dict())
    config = json.loads((bases / "wan" / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, **entries}))
    found = ez.verify_adapter(path, base, loader=load_dry)
    assert found.ok is None
    assert said in " ".join(found.notes)
