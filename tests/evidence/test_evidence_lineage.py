"""Common origin: cosines from weights and from A-factors, and groups that are found exactly or not at all."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from evidence_zoos import MODULES, families, find, layers, noise, normal, planted, write_updates
from safetensors.torch import load_file
from torch import Tensor

import eigenzoo as ez
from builders import PREFIX, random_factors, seeded, write_adapter, write_model, write_stacks
from eigenzoo.evidence.lineage import as_lineages, find_groups, stars
from eigenzoo.evidence.summary import _mean, _within
from tolerance import tolerance

NUM_MODELS, NUM_SHARED, RANK = 30, 12, 4
WIDE = {"block.0.q": (24, 40), "block.0.v": (16, 40)}


def cosines(stacks: dict[str, Tensor], weights: dict[str, int], *, about_mean: bool = True) -> Tensor:
    """Cosines of flattened rows per layer, each about its own mean entry, averaged by weight."""
    total = sum(weights.values())
    parts = []
    for name, stack in stacks.items():
        rows_ND = stack.flatten(1).double()
        rows_ND = torch.nn.functional.normalize(rows_ND - about_mean * rows_ND.mean(1, keepdim=True), dim=1)
        parts.append(weights[name] / total * rows_ND @ rows_ND.T)
    return torch.stack(parts).sum(0)


def test_cosines_of_weights_are_those_of_the_flattened_layers(tmp_path: Path) -> None:
    stacks = {
        "a.weight": noise(9, (7, 6), 1) + normal(1, 7, 6, seed=2),
        "b.weight": 100 * noise(9, (20,), 3),
        "still.weight": normal(1, 30, seed=4).expand(9, 30),
    }
    lineage = find(tmp_path, stacks).lineage
    assert lineage.measure == "weights"
    del stacks["still.weight"]  # a layer that is equal in all models would make them all alike
    expected = cosines(stacks, {"a.weight": 42, "b.weight": 20})
    assert float((torch.tensor(lineage.cosines, dtype=torch.float64) - expected).abs().max()) <= tolerance(99)
    assert sorted(lineage.order) == list(range(9))


def test_cosines_of_updates_are_those_of_the_rows_of_a_that_all_have(tmp_path: Path) -> None:
    """Ranks are mixed from one to three: PEFT draws A row by row, so that one seed gives the same first rows at any rank."""
    paths, rows = write_updates(tmp_path, 0, 9)
    starts = {
        module: torch.stack(
            [load_file(path / "adapter_model.safetensors")[f"{PREFIX}{module}.lora_A.weight"][:1] for path in paths]
        )
        for module in MODULES
    }
    lineage = ez.evidence(paths).lineage
    assert lineage.measure == "updates and A-factors"
    of_starts = cosines(starts, {module: shape[1] for module, shape in MODULES.items()}, about_mean=False)
    of_updates = cosines(rows, {module: shape[0] * shape[1] for module, shape in MODULES.items()})
    expected = torch.maximum(of_starts, of_updates)
    assert float((torch.tensor(lineage.cosines, dtype=torch.float64) - expected).abs().max()) <= tolerance(99)


def test_cosines_of_differences_are_those_of_what_is_left_of_the_base(tmp_path: Path) -> None:
    stack, base = noise(8, (9, 7), 1), 50 * normal(9, 7, seed=2)
    paths = write_stacks(tmp_path / "zoo", {"w": stack + base}, torch.float64)
    lineage = ez.evidence(paths, base=write_model(tmp_path / "base", {"w": base}), view="delta").lineage
    assert lineage.measure == "differences"
    assert float(
        (torch.tensor(lineage.cosines, dtype=torch.float64) - cosines({"w": stack}, {"w": 1})).abs().max()
    ) <= tolerance(63, scale=50)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Thirty adapters, the first twelve of which start from one A and have moved a little; B is small and its own."""
    root, shared = tmp_path_factory.mktemp("adapters"), random_factors(WIDE, RANK, 999)
    paths = []
    for place in range(NUM_MODELS):
        own = random_factors(WIDE, RANK, place)
        factors = {
            module: (0.01 * b_OR, shared[module][1] + 0.1 * a_RI if place < NUM_SHARED else a_RI)
            for module, (b_OR, a_RI) in own.items()
        }
        paths.append(write_adapter(root / f"m{place:02}", factors))
    return paths


@pytest.mark.parametrize("view", ["update", "factors"])
def test_adapters_that_share_an_a_are_found_exactly(adapters: list[Path], view: str) -> None:
    found = ez.evidence(adapters, view=view)
    assert found.lineage.measure == {"update": "updates and A-factors", "factors": "A-factors"}[view]
    assert found.lineage.groups == (tuple(f"m{place:02}" for place in range(NUM_SHARED)),)
    assert found.lineage.duplicates == ()
    across = found.to_dict()["lineage"]["across"]
    assert across["num_lineages"] == 1 + NUM_MODELS - NUM_SHARED
    if view == "factors":
        # The A's alone: a random B tells nothing of an origin.
        parts = {
            module: torch.stack(
                [load_file(path / "adapter_model.safetensors")[f"{PREFIX}{module}.lora_A.weight"] for path in adapters]
            )
            for module in WIDE
        }
        gap = torch.tensor(found.lineage.cosines, dtype=torch.float64) - cosines(parts, dict.fromkeys(WIDE, RANK * 40))
        assert float(gap.abs().max()) <= tolerance(RANK * 40)
        codes = {name: layer.code for name, layer in found.layers.items()}
        # Half of the layers are the shared A's; the B's share nothing.
        assert {code for name, code in codes.items() if name.endswith("lora_A")} == {"shared-lineage"}
        assert {code for name, code in codes.items() if name.endswith("lora_B")} == {"no-shared-structure"}
        assert found.verdict.code == "shared-lineage"
        assert "12 of the 30 models" in found.verdict.text


def test_the_order_of_adapters_does_not_change_their_group(adapters: list[Path]) -> None:
    turned = [adapters[place] for place in torch.randperm(NUM_MODELS, generator=seeded(1)).tolist()]
    assert {frozenset(group) for group in ez.evidence(turned).lineage.groups} == {
        frozenset(f"m{place:02}" for place in range(NUM_SHARED))
    }


def test_a_parent_is_no_lineage_where_the_base_is_taken_away(tmp_path: Path) -> None:
    """Fine-tunes of one parent are one group by their weights; by their differences none, and the verdict says where it holds."""
    parent = {f"block.{place}.weight": 10 * normal(16, 18, seed=40 + place) for place in range(2)}
    tuned = {name: base + planted(24, 3, 0.5, seed=place) for place, (name, base) in enumerate(parent.items())}
    paths = write_stacks(tmp_path / "zoo", tuned)
    base = write_model(tmp_path / "base", {name: weight.float() for name, weight in parent.items()})
    as_weights, as_differences = ez.evidence(paths), ez.evidence(paths, base=base, view="delta")
    assert [len(group) for group in as_weights.lineage.groups] == [24]
    assert as_differences.lineage.groups == ()
    for found, within in ((as_weights, "lineage"), (as_differences, "base")):
        assert found.verdict.code == "shared-subspace"
        assert found.verdict.text.startswith(f"Shared subspace, within one {within}: ")
        assert found.to_dict()["lineage"]["across"] is None
    sentences = [
        next(control["sentence"] for control in found.to_dict()["controls"] if control["name"] == "lineage")
        for found in (as_weights, as_differences)
    ]
    assert "All models have one origin, so no lineage can be held out." in sentences[0]
    assert "held out" not in sentences[1]


def test_copies_are_named_by_the_first_of_them(tmp_path: Path) -> None:
    stack = noise(20, seed=5)
    stack[[7, 11, 15]] = stack[[3, 3, 8]]
    found = find(tmp_path, {"w": stack})
    assert found.lineage.duplicates == (("m3", "m7"), ("m3", "m11"), ("m8", "m15"))
    assert found.lineage.groups == (("m3", "m7", "m11"), ("m8", "m15"))
    assert "3 models are copies of another" in found.to_dict()["controls"][-3]["sentence"]
    assert stars([("a", "b"), ("c", "d"), ("a", "e"), ("b", "e")]) == (("a", "b"), ("c", "d"), ("a", "e"))


def test_adapters_of_one_function_are_copies_whatever_their_factors(tmp_path: Path) -> None:
    factors = [random_factors(MODULES, 3, seed) for seed in range(5)]
    other = {module: (b_OR / 2, 2 * a_RI) for module, (b_OR, a_RI) in factors[2].items()}
    paths = [write_adapter(tmp_path / f"m{place}", each) for place, each in enumerate([*factors, other])]
    assert ez.evidence(paths).lineage.duplicates == (("m2", "m5"),)


def blocks(sizes: list[int], inside: float, between: float = 0.0) -> Tensor:
    """Cosines of families: `inside` between two models of one, `between` between models of two."""
    cosines_NN = torch.full((sum(sizes), sum(sizes)), between, dtype=torch.float64)
    start = 0
    for size in sizes:
        cosines_NN[start : start + size, start : start + size] = inside
        start += size
    return cosines_NN.fill_diagonal_(1.0)


@pytest.mark.parametrize(
    ("sizes", "inside", "between", "expected"),
    [
        ([3, 2, 1], 0.9, 0.0, [[0, 1, 2], [3, 4]]),
        ([3, 2, 1], 0.9, 0.6, [[0, 1, 2, 3, 4, 5]]),  # the largest gap is that below 0.6: one parent, two children
        ([3, 2, 1], 0.9, 0.3, [[0, 1, 2], [3, 4]]),
        ([3, 2, 1], 0.1, 0.0, []),
        ([3, 2, 1], 0.3, -0.1, [[0, 1, 2], [3, 4]]),
        ([4], 0.5, 0.0, [[0, 1, 2, 3]]),
        ([1, 1], 0.0, 0.1, []),
        ([1], 0.0, 0.0, []),
        ([2], 0.0, 0.0, []),
    ],
)
def test_groups_are_cut_at_the_largest_gap(sizes, inside, between, expected):
    groups, level = find_groups(blocks(sizes, inside, between), {})
    assert groups == expected
    assert (level is None) == (expected == [])


def test_copies_do_not_hide_what_is_only_akin():
    """Two copies join at one, their family at 0.5, all else at zero: without the copies the gap is that of the family."""
    cosines_NN = blocks([4, 1, 1], 0.5)
    cosines_NN[0, 1] = cosines_NN[1, 0] = 1.0
    assert find_groups(cosines_NN, {1: 0})[0] == [[0, 1, 2, 3]]
    # A copy of a model without family is a group of its own.
    cosines_NN[4, 5] = cosines_NN[5, 4] = 1.0
    assert find_groups(cosines_NN, {1: 0, 5: 4})[0] == [[0, 1, 2, 3], [4, 5]]


def test_every_model_has_one_lineage():
    assert as_lineages(["a", "b", "c", "d", "e"], [["d", "b"], ["e", "a"]]) == [[3, 1], [4, 0], [2]]


def test_two_families_far_apart_are_found_whatever_their_layers(tmp_path: Path) -> None:
    for number, sizes in enumerate(([9, 4], [5, 5, 5], [3, 2])):
        found = find(tmp_path / str(number), layers(lambda seed, sizes=sizes: families(sizes, seed=seed)))
        names, expected = list(found.names), []
        for size in sizes:
            expected.append(tuple(names[:size]))
            names = names[size:]
        assert set(found.lineage.groups) == set(expected)
        assert list(map(len, found.lineage.groups)) == sorted(sizes, reverse=True)
        shutil.rmtree(tmp_path / str(number))


@pytest.mark.parametrize(
    ("sizes", "view", "within"),
    [
        ((36, 12), "update", ", within one base (36 of the 72 models have a closer common origin)"),
        ((36, 12), "delta", ", within one base (36 of the 72 models have a closer common origin)"),
        ((72,), "update", ", within one lineage"),
        ((), "update", ", within one base"),
        ((70,), "weight", ", within the lineage of 70 of the 72 models"),
    ],
)
def test_one_lineage_is_not_said_beside_a_part_of_the_models(sizes: tuple[int, ...], view: str, within: str) -> None:
    groups = tuple(tuple(f"{size}-{place}" for place in range(size)) for size in sizes)
    summary = SimpleNamespace(across=None)
    assert _within(summary, SimpleNamespace(groups=groups), 72, view) == within  # type: ignore[arg-type]


def test_chance_below_zero_has_a_word() -> None:
    below, above = (_mean(SimpleNamespace(mean_heldout=0.5, mean_null=null)) for null in (-0.02, 0.01))  # type: ignore[arg-type]
    assert below.endswith("(chance −2.00 %: the mean of unrelated models adds energy)")
    assert above.endswith("(chance 1.00 %)")
