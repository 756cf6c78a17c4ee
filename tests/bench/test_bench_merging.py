"""The bench of merging: PEFT and eigenzoo merge the same, and the errors beside the times are those of the rank."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.collection import AdapterRecipe
from bench.merging import measure


def test_both_lose_the_tail_of_the_sum(tmp_path: Path) -> None:
    rows = measure(3, AdapterRecipe(num_layers=2, hidden=32, kv=16, rank=4, planted=2), tmp_path)
    errors = {title: float(error) for title, _, error, *_ in rows}
    peft, cut, whole, *_ = errors.values()
    assert 0.1 < cut < 1
    assert cut == pytest.approx(peft, abs=2e-6)
    assert whole < 1e-6
    assert all(row[3].endswith("×") for row in rows)
