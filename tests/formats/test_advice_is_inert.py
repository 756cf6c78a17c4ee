"""Advice holds names out of files, and is pasted into shells: nothing in it may be more than a word there."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import eigenzoo as ez
from builders import write_adapter
from eigenzoo.errors import EigenzooError

EVIL = "q'$(touch canary)`touch canary`;touch canary #[0]\\"


@pytest.mark.parametrize("missing", ["error", "zero"])
def test_a_layer_s_name_in_an_option_is_one_word_and_means_the_layer(missing: str, tmp_path: Path) -> None:
    """A quote in a layer's name ended the advised glob, and what followed was the shell's."""
    factors = {"a": (torch.ones(2, 1), torch.ones(1, 2)), EVIL: (torch.ones(2, 1), torch.ones(1, 2))}
    write_adapter(tmp_path / "m0", factors)
    write_adapter(tmp_path / "m1", {"a": factors["a"]})
    if missing == "zero":
        held = {
            f"base_model.model.a.lora_{side}.weight": torch.ones(*shape)
            for side, shape in (("A", (1, 2)), ("B", (2, 1)))
        }
        held[f"base_model.model.{EVIL}.weight"] = torch.ones(2, 2)
        save_file(held, tmp_path / "m1" / "adapter_model.safetensors")
    with pytest.raises(EigenzooError, match="--exclude") as raised:
        ez.open_zoo(tmp_path, missing=missing)
    option = raised.value.next_step.partition("--exclude ")[2]
    glob, *rest = shlex.split(option.splitlines()[0])
    assert not {char for char in glob if char in "'\"$`;\n\\[]"}
    assert "touch" not in "".join(rest)
    assert len(ez.open_zoo(tmp_path, missing=missing, exclude=[glob]).layers) == 1
