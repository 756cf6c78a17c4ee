from __future__ import annotations

import pytest
import torch

from eigenzoo.errors import UsageError
from eigenzoo.nursery import digits
from eigenzoo.nursery.digits import NUM_SHUFFLED, Task


def test_the_split_is_fixed_and_disjoint() -> None:
    data = digits.load()
    assert data.train_images.shape == (1297, 1, 8, 8)
    assert data.test_images.shape == (500, 1, 8, 8)
    assert data.train_images.min() == -1
    assert data.train_images.max() == 1
    both = torch.cat([data.train_images, data.test_images]).flatten(1)
    # All 1,797 scans differ, so an image in both splits would show as a repeated row.
    assert len(torch.unique(both, dim=0)) == 1797
    assert torch.bincount(torch.cat([data.train_digits, data.test_digits])).tolist() == [
        178, 182, 177, 183, 181, 182, 181, 179, 174, 180,
    ]  # fmt: skip


def test_each_of_the_126_splits_is_one_task() -> None:
    every = digits.tasks()
    splits = {frozenset({frozenset(task.digits), frozenset(set(range(10)) - set(task.digits))}) for task in every}
    assert len(every) == len(splits) == len({task.name for task in every}) == 126


def test_a_label_is_0_for_the_class_that_holds_digit_0() -> None:
    assert Task((0, 2, 4, 6, 8)).label(torch.arange(10)).tolist() == [0, 1] * 5


@pytest.mark.parametrize(
    "task", [Task((0, 2, 4, 6, 8)), Task((0, 1, 2, 3, 9), labels_seed=41), Task((0, 1, 2, 3, 9), 0)]
)
def test_a_task_is_read_as_written(task: Task) -> None:
    assert Task.parse(str(task)) == task


@pytest.mark.parametrize(
    "text",
    ["", "0,1,2,3,4", "5-against-5:0,1,2,3", "5-against-5:1,2,3,4,5", "5-against-5:0,2,1,3,4", "5-against-5:0,1,2,3,x",
     "5-against-5:0,1,2,3,10", "5-against-5:0,1,1,3,4", "5-against-5:0,1,2,3,4;shuffled=", "5-against-5:0,1,2,3,4;"],
)  # fmt: skip
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"not a task\. A task is"):
        Task.parse(text)


def test_shuffled_labels_are_the_same_labels_dealt_out_anew() -> None:
    data, task = digits.load(), Task((0, 1, 2, 3, 4))
    true = task.label(data.train_digits)[:NUM_SHUFFLED]
    images, first = data.training_set(Task(task.digits, labels_seed=1))
    _, second = data.training_set(Task(task.digits, labels_seed=2))
    assert torch.equal(images, data.train_images[:NUM_SHUFFLED])
    assert first.sum() == second.sum() == true.sum()
    for a, b in [(first, true), (second, true), (first, second)]:
        assert 0.3 < (a == b).double().mean() < 0.7
    assert torch.equal(data.training_set(Task(task.digits, labels_seed=1))[1], first)


def test_a_shuffled_task_is_tested_on_true_labels() -> None:
    data, task = digits.load(), Task((0, 1, 2, 3, 4))
    assert torch.equal(data.test_set(Task(task.digits, labels_seed=1))[1], task.label(data.test_digits))
