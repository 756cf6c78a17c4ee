"""The adaptation bench at its smallest size: its loop against torch's, sizes against counts by hand, files that come back."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from bench import adaptation
from bench.adaptation import PAGE, ZOOS, Split, ground, measure, split, with_shared
from bench.adaptation_methods import cnn_start, coefficients, lora_usual
from bench.adaptation_tables import (
    NAMES,
    Found,
    Row,
    difference,
    less_table,
    main_table,
    pair_table,
    pairs,
    rate_table,
)
from bench.adaptation_training import Kept, Settings, adapt_all, answers, best_rate, orders, put, train, try_rates
from bench.pages import with_tables
from eigenzoo import adapt
from eigenzoo.nursery import digits
from eigenzoo.nursery.making import make_zoo
from eigenzoo.nursery.recipe import Schedule, plan_zoo
from eigenzoo.nursery.training import rate as warmed
from eigenzoo.passes.process import quietly
from tolerance import tolerance

pytestmark = pytest.mark.slow

SETTINGS = Settings(
    steps=2, batch_size=8, seeds=(0,), rates=(0.01, 0.1), num_models=12, held_out=3, tuning=2, ranks=(2, 3), core=3
)

HEADER = 600
"""More than the header of a file with few tensors."""


@pytest.fixture(scope="module")
def zoos(tmp_path_factory) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Hastily trained zoos of every kind, with their recipes."""
    folder = tmp_path_factory.mktemp("adaptation")
    made = {}
    for name, kind in ZOOS.items():
        plan = plan_zoo(kind, SETTINGS.num_models, 0, False, False, None)
        pretraining = Schedule(20, 32, 5e-3) if plan.pretraining else None
        recipe = make_zoo(
            replace(plan, schedule=Schedule(6, 16, 3e-3), pretraining=pretraining), folder / name, False, None
        )
        made[name] = folder / name, recipe.to_dict()
    return made


@pytest.fixture(scope="module")
def found(zoos, tmp_path_factory) -> dict[str, Found]:
    kept = Kept(tmp_path_factory.mktemp("kept") / "kept.jsonl", SETTINGS)
    return {name: measure(name, path, recipe, SETTINGS, kept) for name, (path, recipe) in zoos.items()}


def capped(module: torch.nn.Module, rank: int, patterns: str) -> int:
    """As many coefficients as a layer has directions for: the rank, or all of it."""
    return sum(min(rank, each.numel()) for name, each in module.named_parameters() if not name.startswith(patterns))


def test_a_row_is_counted_by_hand(found):
    """A tiny ViT of width 32, two blocks and a head of two classes; LoRA of rank r on (O, I) has r (O + I) numbers, VeRA r + O."""
    from eigenzoo.nursery.vit import build

    rows, vit = {row.key: row for row in found["fine-tunes"].rows}, build(2, 0)
    all_weights = sum(each.numel() for each in vit.parameters())
    numbers = {
        "head-start": 66,
        "head-mean": 66,
        "learned-k = 2-mean": capped(vit, 2, "classifier"),
        "learned-k = 3-mean": capped(vit, 3, "classifier"),
        "learned-k = 3-mean-head": capped(vit, 3, "classifier") + 66,
        "biases-start": sum(each.numel() for each in vit.parameters() if each.dim() == 1) - 2,
        "lora-4": 2 * 4 * 4 * (32 + 32),
        "lora-8": 2 * 8 * (4 * (32 + 32) + 2 * (32 + 64)),
        "vera": 2 * (6 * 64 + 5 * 32 + 64),
        "full-start": all_weights - 66,
    }
    assert {key: rows[key].num_trained for key in numbers} == numbers
    for learned, random in pairs(found["fine-tunes"]):
        assert learned.num_trained == random.num_trained
        assert learned.num_bytes == random.num_bytes
    assert rows["original"].num_bytes > 4 * all_weights


def test_cores_are_counted_by_hand(found):
    """Cores of 3 × 3 for each of eight projections, which are all that an adapter changes; a network's vectors have one side."""
    adapters, networks = found["adapters"], found["networks"]
    assert adapters.row("learned-cores 3 × 3-mean").num_trained == 8 * 9
    assert adapters.row("learned-k = 3-mean").num_trained == 8 * 3
    # Convolutions (8, 9), (16, 72), (16, 144), the head (2, 16), its bias of two, and nine vectors of convolutions and norms.
    assert networks.row("learned-cores 3 × 3-mean").num_trained == 3 * 9 + 2 * 3 + 9 * 3 + 2
    assert networks.row("learned-k = 3-mean").num_trained == capped(cnn_start(0), 3, "none")
    assert networks.row("full-start-head").num_trained == 3682
    assert networks.row("head-mean").num_trained == 34


@pytest.mark.parametrize("name", ZOOS)
def test_bytes_are_those_of_the_numbers(found, name):
    """Files of coefficients and heads have a small header; others one entry for each tensor."""
    for row in found[name].rows:
        if row.num_trained:
            few = row.basis is not None or row.key.startswith("head")
            assert 4 * row.num_trained < row.num_bytes
            assert row.num_bytes < 4 * row.num_trained + (HEADER if few else 150 * 60), row.key


@pytest.mark.parametrize("name", ZOOS)
def test_rows_of_every_method(found, name):
    rows = found[name].rows
    assert [row.key for row in rows[:3]] == ["original", "start", "mean"]
    assert len({row.key for row in rows}) == len({row.title for row in rows}) == len(rows)
    for row in rows:
        assert len(row.accuracy) == SETTINGS.held_out
        assert all(0 <= each <= 1 for each in row.accuracy)
        assert (row.rate in SETTINGS.rates) == bool(row.num_trained)
    from_parent = int(name == "fine-tunes")
    assert len(pairs(found[name])) == len(SETTINGS.ranks) + 1 + from_parent


def test_what_does_not_depend_on_the_zoo_is_measured_once(found):
    whole = found["fine-tunes"]
    rows = with_shared(found["adapters"], whole).rows
    assert rows[-1] is whole.row("full-start")
    other = replace(whole, rows=[replace(whole.row("start"), accuracy=(0.1, 0.2, 0.3))])
    with pytest.raises(SystemExit, match="different parents"):
        with_shared(found["adapters"], other)


def test_the_split_is_the_same_for_all_zoos(zoos):
    names = [sorted(recipe["models"]) for _, recipe in zoos.values()]
    parts = [split(each, SETTINGS) for each in names]
    assert parts[0] == parts[1] == parts[2]
    together = [*parts[0].fitted, *parts[0].held_out, *parts[0].tuning]
    assert sorted(together) == names[0]
    assert (len(parts[0].held_out), len(parts[0].tuning)) == (3, 2)


def test_a_random_basis_is_of_its_seed(zoos):
    path, recipe = zoos["fine-tunes"]
    fitted = split(sorted(recipe["models"]), SETTINGS).fitted
    with ground("fine-tunes", path, fitted, SETTINGS) as prepared:
        method = coefficients(prepared, "k = 2", "mean", random=True)
        first, same, other = (
            torch.cat(
                [each.flatten() for name, each in method.build(seed).module.named_buffers() if name.endswith("table")]
            )
            for seed in (0, 0, 1)
        )
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_side_by_side_is_one_after_the_other_with_torchs_adam():
    data, module = digits.load(), cnn_start(0).requires_grad_(True)
    tasks = digits.tasks()[3:6]
    labels = torch.stack([task.label(data.train_digits) for task in tasks])
    rates, drawn = (0.01, 0.03, 0.003), orders(replace(SETTINGS, steps=20), 1297, tasks, 0)
    trained = train(module, data.train_images, labels, rates, drawn)
    for place, rate in enumerate(rates):
        alone = copy.deepcopy(module)
        optimizer = torch.optim.Adam(alone.parameters(), lr=rate)
        for step, chosen in enumerate(drawn[place]):
            optimizer.param_groups[0]["lr"] = warmed(Schedule(20, 8, rate), step)
            optimizer.zero_grad()
            cross_entropy(alone(data.train_images[chosen]), labels[place, chosen]).backward()
            optimizer.step()
        for name, each in alone.named_parameters():
            # Round-off of a sum of 20 steps, which Adam's division by small second moments makes larger.
            assert float((trained[name][place] - each.detach()).abs().max()) < 100 * tolerance(
                20, dtype=torch.float32
            ), name


def test_what_is_saved_answers_as_what_was_trained(zoos, tmp_path):
    from peft import PeftModel

    path, recipe = zoos["adapters"]
    parts = split(sorted(recipe["models"]), SETTINGS)
    tasks, images = Split.tasks(parts.held_out), digits.load().test_images
    with ground("adapters", path, parts.fitted, SETTINGS) as prepared:
        for label in prepared.spaces:
            built = coefficients(prepared, label, "mean").build(0)
            trained, _ = adapt_all(built.module, SETTINGS, tasks, 0.1, 0)
            put(built.module, trained, 1)
            file = built.save(tmp_path / label)
            fresh = prepared.attached(label, "mean")
            adapt.load(file, fresh)
            difference = answers(fresh.module, {}, images)[0] - answers(built.module, trained, images)[1]
            # Sums of 32 products, deep.
            assert float(difference.abs().max()) < 100 * tolerance(32, dtype=torch.float32)
        built = lora_usual(prepared).build(0)
        trained, _ = adapt_all(built.module, SETTINGS, tasks, 0.1, 0)
        put(built.module, trained, 1)
        with quietly():
            fresh = PeftModel.from_pretrained(copy.deepcopy(prepared.start), str(built.save(tmp_path / "lora").parent))
        difference = answers(fresh, {}, images)[0] - answers(built.module, trained, images)[1]
        assert float(difference.abs().max()) < 100 * tolerance(32, dtype=torch.float32)


def test_what_was_measured_is_kept_by_its_settings(zoos, tmp_path, monkeypatch):
    path, recipe = zoos["networks"]
    keys = ["head-mean", "learned-k = 2-mean"]
    kept = tmp_path / "kept.jsonl"
    first = measure("networks", path, recipe, SETTINGS, Kept(kept, SETTINGS), keys)
    assert len(kept.read_text().splitlines()) == len(keys) * (1 + len(SETTINGS.seeds))
    monkeypatch.setattr(adaptation, "adapt_all", None)
    monkeypatch.setattr(adaptation, "try_rates", None)
    assert measure("networks", path, recipe, SETTINGS, Kept(kept, SETTINGS), keys) == first
    with pytest.raises(TypeError, match="not callable"):
        measure("networks", path, recipe, SETTINGS, Kept(kept, replace(SETTINGS, steps=4)), keys)
    assert all(json.loads(line)["zoo"] == "networks" for line in kept.read_text().splitlines())


def test_few_images_are_few():
    few = replace(SETTINGS, num_images=5, steps=40)
    drawn = orders(few, 1297, digits.tasks()[:2], 0)
    assert [len(each.unique()) for each in drawn] == [5, 5]
    assert not torch.equal(orders(few, 1297, digits.tasks()[:2], 1), drawn)
    assert torch.equal(orders(few, 1297, digits.tasks()[:2], 0), drawn)


def test_rates_are_told_apart_on_images_that_are_not_trained_on(monkeypatch):
    seen: list[torch.Tensor] = []
    whole = adaptation.try_rates.__globals__["train"]

    def watched(module, images, labels, rates, drawn):
        seen.append(drawn)
        assert rates == [0.01, 0.01, 0.1, 0.1]
        return whole(module, images, labels, rates, drawn)

    monkeypatch.setitem(adaptation.try_rates.__globals__, "train", watched)
    module = cnn_start(0).requires_grad_(True)
    tried = try_rates(module, SETTINGS, digits.tasks()[:2])
    assert int(seen[0].max()) < 1000
    assert [len(tried[part]) for part in ("accuracy", "loss")] == [2, 2]


def test_the_best_rate_is_of_accuracy_then_of_loss():
    assert best_rate(SETTINGS, {"accuracy": [0.9, 0.8], "loss": [2.0, 1.0]}) == 0.01
    assert best_rate(SETTINGS, {"accuracy": [0.9, 0.9], "loss": [2.0, 1.0]}) == 0.1


def test_tables_of_known_rows():
    rows = [
        Row("original", "own", (0.9, 1.0), 0, 70),
        Row("mean", "mean", (0.5, 0.5)),
        Row("learned-a", "learned", (0.9, 0.7), 5, 1000, 0.1, 1.0, ("learned", "mean", "a")),
        Row("random-a", "random", (0.5, 0.7), 5, 1000, 0.3, 1.0, ("random", "mean", "a")),
        Row("full-start", "full", (0.9, 0.9), 9000, 40000, 0.1, 1.0),
    ]
    found = Found("fine-tunes", rows, {}, {"a": 4000})
    assert main_table(found)[4] == "| learned | 0.800 ± 0.100 | 75% | 5 | 1,000 | 0.1 | 1.00 |"
    assert difference(rows[2], rows[3]) == (pytest.approx(0.2), pytest.approx(0.2), 1)
    assert pair_table([found])[2:] == [
        "| fine-tunes | a | the mean | 5 | 0.800 | 0.600 | +0.200 ± 0.200 | 1 of 2 | 4,000 bytes |"
    ]
    assert less_table({"32 images": found}, found)[4] == "| learned | 5 | 0.800 ± 0.100 | 0.800 ± 0.100 |"


def test_the_page_has_a_place_for_every_table(found):
    names = [*NAMES.values(), "adaptation-pairs", "adaptation-less"]
    page = with_tables(PAGE.read_text(encoding="utf-8"), {name: ["here it is"] for name in names}, PAGE)
    assert page.count("here it is") == len(names)
    assert len(rate_table(found["fine-tunes"], SETTINGS)) == 2 + 2 * 3 + 2 * 2


def test_the_picture_is_drawn(found, tmp_path):
    from bench.adaptation_picture import draw

    draw({"all": found["fine-tunes"], "few": found["fine-tunes"]}, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"
