"""Merged adapters as files: what the sources state, what is refused, what no method merges, and outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import eigenzoo as ez
from builders import PREFIX, edit_model, random_factors, read_update, write_adapter
from eigenzoo.errors import BudgetError, DataError, MismatchError, OutputError, UnsupportedError, UsageError
from tolerance import tolerance

MODULES = {"layers.0.q": (20, 30), "layers.1.q": (16, 24)}
WEIGHTS = (0.7, -0.3, 1.1)
HEAD = f"{PREFIX}score.weight"


@pytest.fixture
def adapters(tmp_path: Path) -> list[Path]:
    """Ranks 2, 4 and 7, other alphas, one of rsLoRA."""
    return [
        write_adapter(
            tmp_path / f"m{place}", random_factors(MODULES, rank, place), lora_alpha=2 + place, use_rslora=place == 1
        )
        for place, rank in enumerate((2, 4, 7))
    ]


def with_head(root: Path, *heads: Tensor | None) -> list[Path]:
    return [
        write_adapter(
            root / f"h{place}",
            random_factors(MODULES, 2, place),
            others={} if head is None else {HEAD: head},
            modules_to_save=None if head is None else ["score"],
        )
        for place, head in enumerate(heads)
    ]


def edit_config(folder: Path, **changes: Any) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def test_scales_are_absorbed_and_alpha_is_the_rank(tmp_path: Path, adapters: list[Path]) -> None:
    folder = ez.merge(adapters, "task_arithmetic", weights=WEIGHTS).save(tmp_path / "out")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (13, 13, False)
    for module in MODULES:
        wanted = sum(w * read_update(path, module) for w, path in zip(WEIGHTS, adapters, strict=True))
        assert isinstance(wanted, Tensor)
        error = (read_update(folder, module) - wanted).norm()
        assert error <= tolerance(1, dtype=torch.float32, scale=float(wanted.norm()))


def test_weights_go_by_name_whatever_the_order(tmp_path: Path, adapters: list[Path]) -> None:
    named = {path.name: weight for path, weight in zip(adapters, WEIGHTS, strict=True)}
    one = ez.merge(adapters, "task_arithmetic", weights=named).save(tmp_path / "one")
    other = ez.merge(adapters[::-1], "task_arithmetic", weights=named).save(tmp_path / "other")
    for module in MODULES:
        wanted = read_update(one, module)
        assert (read_update(other, module) - wanted).norm() <= tolerance(
            1, dtype=torch.float32, scale=float(wanted.norm())
        )


@pytest.mark.parametrize(
    ("changes", "words"), [({"use_dora": True}, "DoRA"), ({"init_lora_weights": "pissa"}, "changed the base")]
)
def test_what_is_no_plain_update_is_refused_before_any_value_is_read(
    adapters: list[Path], changes: dict[str, Any], words: str
) -> None:
    edit_config(adapters[2], **changes)
    # The values are NaN: whoever read them would say so.
    edit_model(
        adapters[0],
        "adapter_model.safetensors",
        **{f"{PREFIX}layers.0.q.lora_A.weight".replace(".", "__"): torch.full((2, 30), torch.nan)},
    )
    with pytest.raises(UnsupportedError, match=words):
        ez.merge(adapters)


def test_equal_heads_are_carried_and_others_refused(tmp_path: Path) -> None:
    head = torch.randn(3, 5)
    folder = ez.merge(with_head(tmp_path / "same", head, head)).save(tmp_path / "out")
    assert torch.equal(load_file(folder / "adapter_model.safetensors")[HEAD], head)
    paths = with_head(tmp_path / "other", head, head, head + 1)
    with pytest.raises(MismatchError, match=r"score\.weight.*h2 and h0 differ.*--heads first, or --heads h2"):
        ez.merge(paths)
    for choice, wanted in (("first", head), ("h2", head + 1)):
        folder = ez.merge(paths, heads=choice).save(tmp_path / choice)
        assert torch.equal(load_file(folder / "adapter_model.safetensors")[HEAD], wanted)
        assert json.loads((folder / "adapter_config.json").read_text())["modules_to_save"] == ["score"]
    with pytest.raises(UsageError, match=r"heads 'h7'.*h0, h1, h2"):
        ez.merge(paths, heads="h7")


@pytest.mark.parametrize("order", [1, -1])
def test_a_head_that_one_model_lacks_is_refused(tmp_path: Path, order: int) -> None:
    paths = with_head(tmp_path, torch.ones(3, 5), None)[::order]
    with pytest.raises(MismatchError, match=r"h[01] and h[01] differ"):
        ez.merge(paths)
    folder = ez.merge(paths, heads="h1").save(tmp_path / "out")
    assert HEAD not in load_file(folder / "adapter_model.safetensors")


def test_layers_that_one_adapter_lacks_count_as_zero_on_request(tmp_path: Path) -> None:
    whole = write_adapter(tmp_path / "whole", random_factors(MODULES, 3, 0))
    part = write_adapter(tmp_path / "part", random_factors({"layers.0.q": (20, 30)}, 2, 1))
    with pytest.raises(MismatchError, match=r"layers\.1\.q.*missing"):
        ez.merge([part, whole], "task_arithmetic")
    merged = ez.merge([part, whole], "task_arithmetic", weights=[1.0, 2.0], missing="zero")
    folder = merged.save(tmp_path / "out")
    wanted = 2 * read_update(whole, "layers.1.q")
    assert (read_update(folder, "layers.1.q") - wanted).norm() <= tolerance(
        1, dtype=torch.float32, scale=float(wanted.norm())
    )
    assert sorted(json.loads((folder / "adapter_config.json").read_text())["target_modules"]) == sorted(MODULES)
    assert any("count as updates of zero" in text for text in merged.certificate.warnings)


def test_other_bases_are_a_warning(adapters: list[Path]) -> None:
    edit_config(adapters[0], base_model_name_or_path="org/one")
    edit_config(adapters[1], base_model_name_or_path="org/other")
    (warning,) = ez.merge(adapters[:2]).certificate.warnings
    assert "2 different base models: org/one, org/other" in warning


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite_are_named_and_nothing_is_written(
    tmp_path: Path, adapters: list[Path], value: float
) -> None:
    key = f"{PREFIX}layers.1.q.lora_B.weight"
    broken = load_file(adapters[1] / "adapter_model.safetensors")[key]
    broken[3, 1] = value
    edit_model(adapters[1], "adapter_model.safetensors", **{key.replace(".", "__"): broken})
    with pytest.raises(DataError, match=r"1 values are NaN or Inf.*layers\.1\.q' of m1|layers\.1\.q' of m1.*NaN"):
        ez.merge(adapters).save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_head_that_is_not_finite_is_named(tmp_path: Path) -> None:
    head = torch.full((3, 5), torch.nan)
    with pytest.raises(DataError, match=r"score\.weight' of h0"):
        ez.merge(with_head(tmp_path, head, head))


def test_shapes_that_differ_are_named(tmp_path: Path, adapters: list[Path]) -> None:
    other = write_adapter(tmp_path / "other", random_factors({**MODULES, "layers.1.q": (16, 25)}, 2, 0))
    with pytest.raises(MismatchError, match=r"layers\.1\.q.*\[16, 25\] in other but \[16, 24\] in m0"):
        ez.merge([*adapters, other])


def test_values_that_overflow_the_file_are_an_error(tmp_path: Path) -> None:
    factors = {name: (b * 1e3, a * 1e3) for name, (b, a) in random_factors(MODULES, 2, 0, torch.float16).items()}
    path = write_adapter(tmp_path / "m", factors)
    with pytest.raises(DataError, match=r"overflow torch\.float16"):
        ez.merge(path, "task_arithmetic", scale=1e6)
    folder = ez.merge(path, "task_arithmetic", scale=1e6, dtype="float32").save(tmp_path / "out")
    assert load_file(folder / "adapter_model.safetensors")[f"{PREFIX}layers.0.q.lora_A.weight"].dtype == torch.float32


def test_outputs_are_whole_and_never_replace_others(tmp_path: Path, adapters: list[Path]) -> None:
    merged, folder = ez.merge(adapters), tmp_path / "out"
    merged.save(folder)
    with pytest.raises(OutputError, match="exists already"):
        merged.save(folder)
    merged.save(folder, force=True)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"notes\.txt"):
        merged.save(folder, force=True)
    assert (folder / "notes.txt").read_text() == "mine"
    with pytest.raises(OutputError, match="exists already"):
        merged.save(adapters[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m0", "m1", "m2", "out"]


def test_the_same_merge_gives_the_same_files(tmp_path: Path, adapters: list[Path]) -> None:
    one, other = (ez.merge(adapters, "tsv").save(tmp_path / name) for name in ("one", "other"))
    names = sorted(path.name for path in one.iterdir())
    assert {"merge.json", "adapter_model.safetensors", "adapter_config.json"} <= set(names)
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def test_a_budget_is_kept_and_spent(tmp_path: Path, adapters: list[Path]) -> None:
    """No direction that is left out would fit, and each that is kept saves more per byte than any that is not."""
    updates = {name: sum(read_update(path, name) for path in adapters) for name in MODULES}
    values = {name: torch.linalg.svdvals(update) for name, update in updates.items() if isinstance(update, Tensor)}
    for budget in (2_400, 3_300, 4_500):
        merged = ez.merge(adapters, "task_arithmetic", budget=budget)
        folder = merged.save(tmp_path / str(budget))
        size = (folder / "adapter_model.safetensors").stat().st_size
        assert size == merged.certificate.bytes <= budget
        ranks = {name: layer.rank for name, layer in merged.certificate.layers.items()}
        gains = {name: values[name].square() / sum(MODULES[name]) for name in MODULES}
        worst_kept = min(float(gains[name][rank - 1]) for name, rank in ranks.items() if rank > 1)
        for name, rank in ranks.items():
            assert size + 4 * sum(MODULES[name]) + 8 > budget or float(gains[name][rank]) < worst_kept
        lost = sum(float(values[name][rank:].square().sum()) for name, rank in ranks.items())
        total = sum(float(value.square().sum()) for value in values.values())
        assert merged.certificate.loss.frobenius == pytest.approx((lost / total) ** 0.5, rel=1e-6)


def test_budgets_that_cannot_be_met_are_refused(adapters: list[Path]) -> None:
    with pytest.raises(BudgetError, match=r"a budget of 500 bytes.*Raise it to at least 800"):
        ez.merge(adapters, budget=500)
    with pytest.raises(BudgetError, match="number of bytes"):
        ez.merge(adapters, budget=0)
    with pytest.raises(UsageError, match="rank 4 beside a budget"):
        ez.merge(adapters, budget=5_000, rank=4)


def test_zoos_that_leave_updates_out_are_refused(adapters: list[Path]) -> None:
    zoo = ez.open_zoo(adapters, exclude=["layers.1.*"])
    with pytest.raises(MismatchError, match=r"1 update of m0 would not be merged.*without include"):
        ez.merge(zoo)
