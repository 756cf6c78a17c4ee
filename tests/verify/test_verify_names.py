"""PEFT's choice of modules, told by the config alone; and the one change of names that makes them those of a base."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists

import eigenzoo as ez
from eigenzoo.weights.lora_targets import is_target
from eigenzoo.weights.renames import WRAPPERS, Rename, beyond, find_rename, nearest

PARTS = ("model", "layers", "0", "1", "q_proj", "v_proj", "head", "q")
NAMES = st.lists(st.sampled_from(PARTS), min_size=1, max_size=5).map(".".join)
LISTS = st.lists(NAMES, min_size=1, max_size=3)


@settings(max_examples=400)
@given(
    module=NAMES,
    targets=LISTS | st.sampled_from([r".*q_proj", r"model\.layers\.\d+\.(q|v)_proj", "q_proj", r".*\.[01]\..*"]),
    excluded=st.none() | LISTS | st.sampled_from([r".*head.*", "q"]),
    saved=st.none() | LISTS,
    layers=st.none() | st.just([0]) | st.just(1) | st.just([0, 1]) | st.just([]),
    pattern=st.none() | st.sampled_from(["layers", "model.layers", ["layers", "head"]]),
)
def test_modules_are_chosen_as_peft_does(module, targets, excluded, saved, layers, pattern) -> None:
    config = {"target_modules": targets, "exclude_modules": excluded, "modules_to_save": saved}
    if isinstance(targets, list):
        config |= {"layers_to_transform": layers, "layers_pattern": pattern if layers else None}
    expected = check_target_module_exists(LoraConfig(**config), module)
    assert is_target(config, module) == bool(expected and type(expected).__name__ != "_ExcludedModule")


def test_all_linear_and_nothing_mean_what_peft_makes_of_them() -> None:
    assert is_target({"target_modules": "all-linear"}, "a.b")
    assert is_target({}, "a.b")
    assert not is_target({"exclude_modules": ["b"]}, "a.b")


@pytest.mark.parametrize("pattern", ["(a+)+$", "a" * 2000, "(", r".*.*.*.*.*.*.*.*.*.*b"])
def test_patterns_that_are_slow_or_broken_are_refused(pattern: str) -> None:
    with pytest.raises(ez.FormatError, match="pattern"):
        is_target({"target_modules": pattern}, "a" * 200)


def test_entries_of_a_wrong_type_are_refused() -> None:
    for config in ({"target_modules": [1]}, {"target_modules": ["a"], "layers_to_transform": ["0"]}):
        with pytest.raises(ez.FormatError, match="is not a list of"):
            is_target(config, "layers.0.a")


BASE = [f"model.layers.{place}.{name}" for place in range(3) for name in ("attn.q", "attn.v", "mlp.up")] + ["head"]


@pytest.mark.parametrize("prefix", ["", "language_model.", "a.b.", "module."])
@pytest.mark.parametrize("cut", ["", "model."])
def test_a_prefix_that_differs_is_found(prefix: str, cut: str) -> None:
    names = [prefix + name.removeprefix(cut) for name in BASE if name != "head"]
    found = find_rename(names, BASE, lambda name, other: True)
    assert found is not None
    assert [found(name) for name in names] == [name for name in BASE if name != "head"]
    assert str(found)


def test_a_prefix_is_only_believed_where_all_names_and_shapes_fit() -> None:
    names = ["layers.0.attn.q", "layers.9.attn.q"]
    assert find_rename(names, BASE, lambda name, other: True) is None
    assert find_rename(names[:1], BASE, lambda name, other: True) == Rename("", "model.")
    assert find_rename(names[:1], BASE, lambda name, other: False) is None
    assert find_rename([], BASE, lambda name, other: True) is None


def test_no_rename_leads_to_another_block_or_onto_a_name_that_is_held() -> None:
    def accepts(name: str, other: str) -> bool:
        return True

    assert find_rename(["model.layers.3.attn.q"], BASE, accepts) is None
    assert find_rename(["layers.0.attn.q"], BASE, accepts, ["model.layers.0.attn.q"]) is None
    assert beyond(["model.layers.3.attn.q", "model.layers.1.attn.z", "head"], BASE) == ["model.layers.3.attn.q"]


def test_of_two_towers_the_one_is_chosen_that_fits() -> None:
    base = {"vision.layers.0.q": 1, "text.model.layers.0.q": 2}
    assert find_rename(["layers.0.q"], base, lambda name, other: base[other] == 2) == Rename("", "text.model.")


def test_wrappers_are_taken_out_wherever_they_stand() -> None:
    for part in WRAPPERS:
        if part != "base_model":
            names = [f"model.{part}.layers.{place}.{part}.attn.q" for place in range(3)]
            assert find_rename(names, BASE, lambda name, other: True) == Rename(parts=(part,))


def test_the_nearest_name() -> None:
    assert nearest("model.layers.1.attn.query", BASE) == "model.layers.1.attn.q"
    assert nearest("zzz", BASE) is None
