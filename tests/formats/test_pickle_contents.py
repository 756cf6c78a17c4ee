"""Which dict of a training checkpoint is read, and what its names lose: the rules of docs/formats.md."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import eigenzoo as ez
from eigenzoo.errors import FormatError, UnsupportedError
from eigenzoo.formats.pickles.contents import WRAPPERS, state_dict_of
from eigenzoo.formats.pickles.file import PickleStateDict


class Attack:
    """What a hostile pickle does when it is loaded carelessly."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.target),)


def saved(path: Path, content: Any) -> PickleStateDict:
    torch.save(content, path)
    return PickleStateDict(path, allow_pickle=True)


@pytest.mark.parametrize("place", range(len(WRAPPERS)))
def test_the_first_wrapper_wins_and_the_others_are_told(tmp_path: Path, place: int) -> None:
    checkpoint = {key: {"w": torch.full((2,), float(number))} for number, key in enumerate(WRAPPERS) if number >= place}
    opened = saved(tmp_path / "m.pth", {**dict(reversed(checkpoint.items())), "epoch": 3})
    assert torch.equal(opened.read("w"), torch.full((2,), float(place)))
    if place == len(WRAPPERS) - 1:
        assert opened.warnings == ()
    else:
        others = ", ".join(map(repr, WRAPPERS[place + 1 :]))
        assert opened.warnings == (
            f"the checkpoint holds {WRAPPERS[place]!r} beside {others}: {WRAPPERS[place]!r} is read",
        )


def test_an_empty_average_is_none() -> None:
    assert state_dict_of({"model_ema": {}, "model": {"w": torch.ones(1)}}) == ({"w": torch.ones(1)}, ())


def test_prefixes_of_torch_s_wrappers_are_removed(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1))
    # Importing torch.compile takes seconds and warns; this is what it does to names.
    compiled = {f"_orig_mod.{name}": value for name, value in nn.DataParallel(net).state_dict().items()}
    averaged = torch.optim.swa_utils.AveragedModel(net)
    for wrapped, notes in (
        (nn.DataParallel(net).state_dict(), ("the prefix 'module.', which all names have, is removed",)),
        (compiled, ("the prefix '_orig_mod.module.', which all names have, is removed",)),
        (
            averaged.state_dict(),
            (
                "the counter 'n_averaged' of an averaged model is left out",
                "the prefix 'module.', which all names have, is removed",
            ),
        ),
    ):
        opened = saved(tmp_path / "m.pt", {"model": wrapped})
        assert set(opened.tensors) == set(net.state_dict())
        assert all(torch.equal(opened.read(name), value) for name, value in net.state_dict().items())
        assert opened.warnings == notes


def test_a_prefix_that_one_name_lacks_stays() -> None:
    state = {"module.a": torch.ones(1), "b": torch.ones(1)}
    assert state_dict_of(state) == (state, ())
    state = {"model.a": torch.ones(1), "model.b": torch.ones(1)}
    assert state_dict_of(state) == (state, ()), "an attribute's name is removed of Lightning's checkpoints alone"


def lightning(state: dict[str, torch.Tensor]) -> dict[str, Any]:
    """A checkpoint as Lightning's Trainer writes it, as far as it is not tensors of the model."""
    return {
        "epoch": 1,
        "global_step": 20,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": state,
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_path": "x.ckpt"}},
        "optimizer_states": [{"state": {0: {"step": torch.tensor(20.0)}}, "param_groups": [{"lr": 1e-3}]}],
        "lr_schedulers": [],
    }


@pytest.mark.parametrize("attribute", ["model", "net"])
def test_lightning_s_attribute_is_removed_once(tmp_path: Path, attribute: str) -> None:
    names = ("model.embed", "model.out", "lm_head") if attribute == "model" else ("model.embed", "model.out")
    state = {f"{attribute}.{name}": torch.full((2,), float(place)) for place, name in enumerate(names)}
    opened = saved(tmp_path / "m.ckpt", lightning(state))
    assert tuple(opened.tensors) == names
    assert opened.warnings == (f"the prefix '{attribute}.', which all names have, is removed",)
    compiled = {f"{attribute}._orig_mod.{name}": torch.ones(1) for name in names}
    assert tuple(saved(tmp_path / "c.ckpt", lightning(compiled)).tensors) == names
    several = lightning({"encoder.w": torch.ones(1), "loss.w": torch.ones(1)})
    assert saved(tmp_path / "s.ckpt", several).warnings == ()


def test_what_weights_only_does_not_load_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(
        UnsupportedError, match=r"more than tensors, or is damaged \(argparse\.Namespace\).*only with weights_only"
    ):
        saved(tmp_path / "m.pth", {"state_dict": {"w": torch.ones(1)}, "args": argparse.Namespace(lr=1)})
    for content in ({"state_dict": {"w": torch.ones(1)}, "args": Attack(tmp_path / "made")}, Attack(tmp_path / "made")):
        with pytest.raises(UnsupportedError, match=r"more than tensors, or is damaged \((posix|nt)\.mkdir\)"):
            saved(tmp_path / "m.ckpt", content)
        assert not (tmp_path / "made").exists()


def test_a_dict_that_no_wrapper_names_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"the entry 'net' is dict.*under state_dict_ema, model_ema, state_dict"):
        saved(tmp_path / "m.pt", {"net": {"w": torch.ones(1)}, "epoch": 1})


def test_a_zoo_says_once_what_was_decided_of_all(tmp_path: Path) -> None:
    for number in range(3):
        state = {"module.w": torch.full((2, 2), float(number))}
        torch.save({"model": state, "model_ema": state}, tmp_path / f"m{number}.pth")
    zoo = ez.open_zoo(tmp_path, allow_pickle=True)
    assert list(zoo.layers) == ["w"]
    assert zoo.warnings == (
        "m0 and 2 more: the checkpoint holds 'model_ema' beside 'model': 'model_ema' is read",
        "m0 and 2 more: the prefix 'module.', which all names have, is removed",
    )
