"""Rank rules and what they refuse."""

from __future__ import annotations

import pytest
import torch

from eigenzoo.errors import RankError
from eigenzoo.linalg.rank import check_rule, choose_rank
from tolerance import tolerance

VALUES = torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("rule", "rank", "reason"),
    [
        (0, 0, "as asked"),
        (3, 3, "as asked"),
        (4, 4, "as asked"),
        (9, 4, "all there are"),
        (1.0, 4, "everything above round-off"),
        (0.4, 1, "40 % of the variance"),
        (0.41, 2, "41 % of the variance"),
        (0.7, 2, "70 % of the variance"),
        (0.9, 3, "90 % of the variance"),
        (0.91, 4, "91 % of the variance"),
    ],
)
def test_numbers_and_shares(rule, rank, reason):
    choice = choose_rank(rule, VALUES, 10.0)
    assert (choice.rank, choice.reason) == (rank, reason)


def test_a_share_is_of_the_total_and_not_of_what_is_kept():
    assert choose_rank(0.4, VALUES, 20.0).rank == 3
    assert choose_rank(0.9, VALUES, 20.0).rank == 4


@pytest.mark.parametrize("rule", [0, 5, 0.5, 1.0])
def test_nothing_to_keep(rule):
    assert choose_rank(rule, VALUES[:0], 0.0).rank == 0


def test_auto_stops_at_the_first_direction_that_is_not_above_the_null():
    null = torch.tensor([[0.3, 0.35, 0.1, 0.05]], dtype=torch.float64).repeat(20, 1)
    assert choose_rank("auto", VALUES, 10.0, null).rank == 1
    assert choose_rank("auto", VALUES, 10.0, null * 0.5).rank == 4
    assert choose_rank("auto", VALUES, 10.0, null * 2).rank == 0
    assert choose_rank("auto", VALUES[:0], 0.0, null).reason == "no variance"


def test_auto_does_not_take_round_off_for_a_finding():
    null = torch.ones(20, 1, dtype=torch.float64)
    above = torch.tensor([1 + tolerance(1)], dtype=torch.float64)
    assert choose_rank("auto", above, 1.0, null).rank == 0


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (True, r"True is not a rank\. A rank is a number, a share in \(0, 1\], or 'auto'"),
        (None, r"None is not a rank"),
        ("half", r"'half' is not a rank"),
        (0.0, r"rank 0\.0 is not a share\. A float rank is a share of the variance in \(0, 1\]"),
        (1.5, r"rank 1\.5 is not a share"),
        (float("nan"), r"rank nan is not a share"),
        (-1, r"rank -1 is negative"),
    ],
)
def test_what_is_no_rule(rule, text):
    with pytest.raises(RankError, match=text):
        check_rule(rule)


@pytest.mark.parametrize("rule", [0, 3, 0.5, 1.0, "auto"])
def test_rules_pass_unchanged(rule):
    assert check_rule(rule) is rule


def test_auto_without_a_null():
    with pytest.raises(RankError, match=r"rank 'auto' needs a null\. Give a number or a share"):
        choose_rank("auto", VALUES, 10.0)
