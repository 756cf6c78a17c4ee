from __future__ import annotations

import numpy as np
import pytest
from report_documents import make_document

from eigenzoo.report import curves
from eigenzoo.report.document import read_document
from eigenzoo.report.numbers import at_rank, log_ranks
from eigenzoo.report.payload import role_map
from eigenzoo.report.similarity import group_runs


@pytest.mark.parametrize("num_ranks", [0, 1, 2, 39, 40, 41, 100, 499, 2000, 20_000])
def test_ranks_are_few_rising_and_reach_both_ends(num_ranks):
    ranks = log_ranks(num_ranks)
    assert len(ranks) <= 40
    assert (np.diff(ranks) > 0).all()
    if num_ranks:
        assert ranks[0] == 1
        assert ranks[-1] == num_ranks
        assert len(ranks) >= min(num_ranks, 36)


def test_the_average_over_layers_is_by_number_of_values():
    report = read_document(make_document(num_models=12, num_layers=7))
    known = [layer for layer in report.layers.values() if layer["variance"]]
    whole = sum(layer["num_values"] for layer in known)
    spectrum = curves.all_layers_spectrum(report)
    halves, left = curves.all_layers_halves(report), curves.all_layers_leave_one_out(report)
    for place in (0, 3):
        first = sum(layer["num_values"] * layer["explained_variance_ratio"][place] for layer in known) / whole
        assert spectrum["spectrum"][place] == pytest.approx(first)
        null = sum(layer["num_values"] * layer["null"]["norm_matched"][place] for layer in known) / whole
        assert spectrum["norm_matched"][place] == pytest.approx(null)
        cosine = sum(layer["num_values"] * layer["split_half"]["cosines"][place] for layer in known) / whole
        assert halves["cosine"][place] == pytest.approx(cosine)
        out = sum(layer["num_values"] * layer["heldout"]["leave_one_out"]["captured"][place] for layer in known) / whole
        assert left["heldout"][place] == pytest.approx(out)
    assert spectrum["spectrum"].sum() == pytest.approx(1.0)


def test_a_null_that_some_layers_lack_is_not_averaged():
    document = make_document(num_models=12, num_layers=4, still=False)
    next(iter(document["evidence"]["layers"].values()))["null"]["permuted"] = None
    found = curves.all_layers_spectrum(read_document(document))
    assert "permuted" not in found
    assert "iid" in found


def test_sums_are_over_all_ranks_though_few_are_shown():
    report = read_document(make_document(num_models=200, num_layers=1, still=False))
    (layer,) = report.layers.values()
    shown = curves.thinned(curves.with_cumulative(curves.full_spectrum(layer)))
    assert shown["spectrum_sum"][-1] == pytest.approx(1.0)
    place = len(shown["rank"]) // 2
    until = int(shown["rank"][place])
    assert shown["spectrum_sum"][place] == pytest.approx(sum(layer["explained_variance_ratio"][:until]))


def test_a_number_at_a_rank_is_that_of_the_largest_evaluated_one():
    assert at_rank([1, 2, 4, 8], [0.1, 0.2, 0.4, 0.8], 7) == 0.4
    assert at_rank([1, 2, 4, 8], [0.1, 0.2, None, 0.8], 7) == 0.2
    assert at_rank([2], [0.2], 1) is None
    assert at_rank([], [], 1) is None


def test_groups_that_lie_apart_are_outlined_apart():
    groups = [["a", "b", "e"], ["c"], ["d", "f"]]
    assert group_runs(list("abcdef"), groups) == [(0, 0, 1), (2, 3, 3), (0, 4, 4), (2, 5, 5)]


def test_layers_of_one_role_and_depth_share_a_cell_as_their_average():
    document = make_document(num_models=8, num_layers=3, still=False)
    for rank, layer in zip((1, 2, 6), document["evidence"]["layers"].values(), strict=True):
        layer["role"], layer["depth"], layer["rank"]["auto"] = "all", None if rank == 6 else 0, rank
    found = role_map(read_document(document))
    assert found["depths"] == [0, None]
    cells = {(row, column): (count, auto) for row, column, count, _, auto, *_ in found["cells"]}
    assert cells == {(0, 0): (2, 1.5), (0, 1): (1, 6.0)}


def test_the_rank_that_numbers_are_given_at():
    document = make_document(num_models=40, num_layers=2)
    assert read_document(document).rank == 16
    document["evidence"]["growth"]["rank"] = 8
    assert read_document(document).rank == 8
    document["evidence"]["growth"] = None
    assert read_document(document).rank == 16
    document["evidence"]["summary"]["rank"] = [20, 40]
    assert read_document(document).rank == 20
