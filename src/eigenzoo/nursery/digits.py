"""The handwritten digits of scikit-learn with a fixed split, and their binary tasks.

The 1,797 images (8 x 8, one channel) are split into 1,297 for training and 500 for testing. The split has one fixed seed, so that
all zoos are tested on the same 500 images.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from eigenzoo.errors import UsageError

NUM_TEST = 500
SPLIT_SEED = 0
# Few enough that a model of 3,700 parameters memorises them within seconds.
NUM_SHUFFLED = 128

_PREFIX = "5-against-5:"
_SHUFFLED = ";shuffled="


@dataclass(frozen=True)
class Task:
    """Five digits against the other five. `labels_seed` shuffles the labels over the images.

    `digits` is the class that contains 0 and has the label 0; the others have the label 1. So each of the 126 splits has one name.
    A shuffled task consists of the first `NUM_SHUFFLED` training images. Its labels are a permutation of the task's, so that they
    can only be memorised.

    >>> str(Task((0, 1, 2, 3, 4)))
    '5-against-5:0,1,2,3,4'
    >>> Task.parse("5-against-5:0,1,2,3,4;shuffled=7").labels_seed
    7
    """

    digits: tuple[int, ...]
    labels_seed: int | None = None

    def __post_init__(self) -> None:
        digits = self.digits
        if len(digits) != 5 or list(digits) != sorted(set(digits) & set(range(10))) or 0 not in digits:
            raise UsageError(
                f"digits {digits} are not a task",
                rule="a task is five different digits in rising order, beginning with 0",
            )

    @property
    def name(self) -> str:
        """The name of a model that learns this task, e.g. `task-01234`."""
        return "task-" + "".join(map(str, self.digits))

    def __str__(self) -> str:
        shuffled = "" if self.labels_seed is None else f"{_SHUFFLED}{self.labels_seed}"
        return _PREFIX + ",".join(map(str, self.digits)) + shuffled

    @classmethod
    def parse(cls, text: str) -> Task:
        """Parse the result of `str`. Raises UsageError for any other text."""
        listed, _, seed = text.removeprefix(_PREFIX).partition(_SHUFFLED)
        try:
            task = cls(tuple(int(digit) for digit in listed.split(",")), int(seed) if seed else None)
        except ValueError:
            task = None
        if task is None or str(task) != text:
            raise UsageError(f"{text!r} is not a task", rule="a task is written like '5-against-5:0,1,2,3,4'")
        return task

    def label(self, digits: Tensor) -> Tensor:
        """Return the true labels, 0 or 1, of images of these digits, never shuffled."""
        return (~torch.isin(digits, torch.tensor(self.digits))).long()


@dataclass(frozen=True)
class Digits:
    """Images (n, 1, 8, 8) float32 in [-1, 1] and their digits (n,) int64, of both splits."""

    train_images: Tensor
    train_digits: Tensor
    test_images: Tensor
    test_digits: Tensor

    def training_set(self, task: Task) -> tuple[Tensor, Tensor]:
        """Return the training images and labels of a task."""
        if task.labels_seed is None:
            return self.train_images, task.label(self.train_digits)
        labels = task.label(self.train_digits[:NUM_SHUFFLED])
        order = torch.randperm(NUM_SHUFFLED, generator=torch.Generator().manual_seed(task.labels_seed))
        return self.train_images[:NUM_SHUFFLED], labels[order]

    def test_set(self, task: Task) -> tuple[Tensor, Tensor]:
        """Return the test images and the true labels. A model of a shuffled task can only reach chance on them."""
        return self.test_images, task.label(self.test_digits)


def tasks() -> list[Task]:
    """Return all 126 tasks in lexical order."""
    return [Task((0, *rest)) for rest in combinations(range(1, 10), 4)]


@lru_cache(maxsize=1)
def load() -> Digits:
    """Read the data that scikit-learn includes (no download), split by `SPLIT_SEED`."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(SPLIT_SEED).permutation(len(data.target))
    images = torch.from_numpy(data.images[order]).to(torch.float32).unsqueeze(1) / 8 - 1
    digits = torch.from_numpy(data.target[order]).to(torch.int64)
    return Digits(images[NUM_TEST:], digits[NUM_TEST:], images[:NUM_TEST], digits[:NUM_TEST])
