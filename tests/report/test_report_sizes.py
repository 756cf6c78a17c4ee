from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from report_documents import make_document

from eigenzoo.report.document import read_document
from eigenzoo.report.sizes import THRESHOLDS, SizeTable, size_table

Json = dict[str, Any]


def table_of(document: Json) -> SizeTable:
    table = size_table(read_document(document))
    assert table is not None
    return table


def weigh(document: Json, ranks: dict[str, int]) -> int:
    """The formula of the document, written out once more."""
    sizes = document["sizes"]
    num_models = sizes["num_models"]
    total = sizes["shared"] + sizes["per_model"] * num_models
    for name, size in sizes["layers"].items():
        total += size["fixed"] + ranks[name] * size["per_direction"] + num_models * ranks[name] * 4
    return int(total)


def least_rank(ratios: list[float], threshold: float) -> int:
    total = 0.0
    for place, ratio in enumerate(ratios, 1):
        total += ratio
        if total >= threshold - 1e-9:
            return place
    return len(ratios)


@pytest.fixture(scope="module")
def document() -> Json:
    return make_document(num_models=24, num_layers=9)


def test_bytes_of_every_rank_follow_the_formula(document):
    table, layers = table_of(document), document["evidence"]["layers"]
    assert [row.rank for row in table.by_rank] == list(range(24))
    for row in table.by_rank:
        ranks = {name: min(row.rank, len(layer["explained_variance_ratio"])) for name, layer in layers.items()}
        assert row.bytes == weigh(document, ranks)
        assert row.ratio == pytest.approx(document["sizes"]["whole_zoo"] / row.bytes)


def test_a_threshold_takes_the_least_rank_of_each_layer(document):
    table, layers = table_of(document), document["evidence"]["layers"]
    assert [row.threshold for row in table.by_threshold] == list(THRESHOLDS)
    for row in table.by_threshold:
        ranks = {name: least_rank(layer["explained_variance_ratio"], row.threshold) for name, layer in layers.items()}
        assert row.bytes == weigh(document, ranks)
        assert row.ranks == tuple(sorted(rank for name, rank in ranks.items() if layers[name]["variance"]))


def test_what_is_kept_is_a_share_of_all_variance(document):
    table = table_of(document)
    known = [layer for layer in document["evidence"]["layers"].values() if layer["variance"]]
    variance = sum(layer["variance"] for layer in known)
    energy = sum(layer["energy"] for layer in document["evidence"]["layers"].values())
    for rank in (1, 5, 23):
        kept = sum(layer["variance"] * sum(layer["explained_variance_ratio"][:rank]) for layer in known) / variance
        assert table.by_rank[rank].in_sample == pytest.approx(kept)
        assert table.by_rank[rank].residual == pytest.approx((1 - kept) * variance / energy, abs=1e-12)
    assert table.by_rank[-1].in_sample == pytest.approx(1.0)


def test_held_out_is_exact_where_it_was_evaluated_and_linear_between(document):
    table = table_of(document)
    known = [layer for layer in document["evidence"]["layers"].values() if layer["variance"]]
    variance = sum(layer["variance"] for layer in known)
    ranks = known[0]["heldout"]["rank"]
    for key, attribute in (("captured", "heldout"), ("null", "null")):
        at = [
            sum(layer["variance"] * layer["heldout"][key][place] for layer in known) / variance
            for place in range(len(ranks))
        ]
        for rank, value in zip(ranks, at, strict=True):
            assert getattr(table.by_rank[rank], attribute) == pytest.approx(value)
        assert getattr(table.by_rank[3], attribute) == pytest.approx((at[ranks.index(2)] + at[ranks.index(4)]) / 2)
        assert getattr(table.by_rank[-1], attribute) == pytest.approx(at[-1])


def test_rank_zero_is_the_mean_alone(document):
    row = table_of(document).by_rank[0]
    assert (row.in_sample, row.heldout, row.null) == (0.0, 0.0, 0.0)
    assert row.bytes == weigh(document, dict.fromkeys(document["sizes"]["layers"], 0))


def test_break_even_is_the_least_number_of_models_that_pays(document):
    table, sizes = table_of(document), document["sizes"]
    per_file = sizes["whole_zoo"] / sizes["num_models"]
    for row in table.by_rank:
        basis = row.bytes - sizes["num_models"] * row.per_model
        least = row.break_even_models
        assert least is not None
        assert basis + least * row.per_model < least * per_file
        assert basis + (least - 1) * row.per_model >= (least - 1) * per_file


def test_a_basis_that_never_pays_says_never(document):
    dear = {**document, "sizes": {**document["sizes"], "per_model": document["sizes"]["whole_zoo"]}}
    assert {row.break_even_models for row in table_of(dear).by_rank} == {None}


def test_directions_without_variance_cost_nothing():
    document = make_document(num_models=8, num_layers=2, still=False)
    first, _ = document["evidence"]["layers"].values()
    first["explained_variance_ratio"] = [0.7, 0.3, 0.0, 0.0, 0.0, 0.0, 0.0]
    table = table_of(document)
    assert table.by_rank[7].ranks == (2, 7)
    assert np.diff([row.bytes for row in table.by_rank]).min() > 0


def test_a_layer_without_variance_has_its_mean_only(document):
    still = next(name for name, layer in document["evidence"]["layers"].items() if not layer["variance"])
    without = {**document, "sizes": {**document["sizes"], "layers": {**document["sizes"]["layers"]}}}
    fixed = without["sizes"]["layers"].pop(still)["fixed"]
    pairs = zip(table_of(document).by_rank, table_of(without).by_rank, strict=True)
    assert {one.bytes - other.bytes for one, other in pairs} == {fixed}


def test_no_sizes_no_table():
    assert size_table(read_document(make_document(num_models=6, num_layers=2, sizes=False))) is None
