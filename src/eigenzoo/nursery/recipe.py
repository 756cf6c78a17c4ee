"""The plan of a zoo (`Plan`) and its result (`Recipe`, the zoo's `zoo.json`). Needs neither torch nor sklearn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from platform import python_version
from typing import Any

from eigenzoo.errors import UsageError
from eigenzoo.seeds import check_seed

NUM_TASKS = 126
MOST_ZOOS = 2**31
"""Largest seed of a zoo. Each zoo has its own `NUM_TASKS` seeds for its models, which torch must accept."""

PARENT = "_base"
HELD_OUT = "_heldout"
"""Folder of a zoo's held-out models, which `open_zoo` passes over: name it to use them."""

PASSAGES = "passages.json"
"""File in the parent's folder with the passages that a zoo's tasks are about."""

TASKS = "digits-tasks"
DOCSTRINGS = "docstrings-lora"
NUM_HELD_OUT = 12
RECIPE = "zoo.json"
ZOO = "zoo"
"""Kind of output in the folder's record; see `formats.output.own`."""

_PACKAGES = ("torch", "transformers", "peft", "safetensors", "scikit-learn", "numpy")


@dataclass(frozen=True)
class Schedule:
    """Steps and learning rate of Adam: `warmup` as a share of the steps, then half a cosine to zero."""

    steps: int
    batch_size: int
    learning_rate: float
    warmup: float = 0.1


FULL_SCHEDULE = Schedule(steps=200, batch_size=32, learning_rate=1e-3)
"""Schedule for fine-tunes of `digits-tasks`. With a larger rate they move so far apart that no merge is as good as the parent."""

PRETRAINING = Schedule(steps=800, batch_size=64, learning_rate=3e-3)


@dataclass(frozen=True)
class Defaults:
    """Default options of a kind, which options it has, and how many models it trains at once."""

    num_models: int
    num_shuffled_models: int
    schedule: Schedule
    shuffled_schedule: Schedule
    options: frozenset[str]
    own_init: bool = False
    pretraining: Schedule | None = None
    num_held_out: int = 0
    at_once: int = 32


# One core trains this many in about 40 s. Some tasks remain for models outside the zoo. Memorising shuffled labels takes 320 steps,
# against 128 for real ones, so there are fewer models in the same time.
DEFAULTS: Mapping[str, Defaults] = {
    "digits-vit": Defaults(
        num_models=72,
        num_shuffled_models=36,
        schedule=Schedule(128, 32, 1.5e-3),
        shuffled_schedule=Schedule(320, 32, 1.5e-3),
        options=frozenset({"train_head", "random_labels", "same_task"}),
        pretraining=PRETRAINING,
    ),
    "digits-lora": Defaults(
        num_models=72,
        num_shuffled_models=36,
        schedule=Schedule(128, 32, 1e-2),
        shuffled_schedule=Schedule(320, 32, 1e-2),
        options=frozenset({"own_init", "random_labels", "same_task"}),
        own_init=True,
        pretraining=PRETRAINING,
    ),
    "digits-cnn": Defaults(
        num_models=100,
        num_shuffled_models=100,
        schedule=Schedule(400, 32, 1e-2),
        shuffled_schedule=Schedule(600, 32, 1e-2),
        options=frozenset({"own_init", "permuted", "random_labels", "same_task"}),
    ),
    # Few steps: longer training moves models farther apart, and merges of them are then worse than the parent.
    TASKS: Defaults(
        num_models=8,
        num_shuffled_models=0,
        schedule=Schedule(200, 32, 5e-3),
        shuffled_schedule=Schedule(200, 32, 5e-3),
        options=frozenset({"own_init", "full"}),
        own_init=True,
        pretraining=PRETRAINING,
    ),
    # Two layers of a real encoder take a hundred times the work of a digits' ViT.
    DOCSTRINGS: Defaults(
        num_models=60,
        num_shuffled_models=0,
        schedule=Schedule(128, 16, 3e-3),
        shuffled_schedule=Schedule(128, 16, 3e-3),
        options=frozenset({"own_init", "encoder"}),
        own_init=True,
        num_held_out=NUM_HELD_OUT,
        at_once=12,
    ),
}


@dataclass(frozen=True)
class Plan:
    """All inputs of a zoo, with resolved defaults."""

    kind: str
    num_models: int
    seed: int
    random_labels: bool
    train_head: bool
    own_init: bool
    permuted: bool
    same_task: bool
    schedule: Schedule
    pretraining: Schedule | None
    num_held_out: int = 0
    encoder: str | None = None
    full: bool = False


@dataclass(frozen=True)
class Recipe:
    """A finished zoo: its plan, and each model's task and accuracy.

    `models` maps a model's name to its `task`, its `seed`, its `test_accuracy` (true labels, 500 images outside of training) and
    its `train_accuracy` (its training images and labels, also shuffled ones). `parent` has the parent's `ten_class_test_accuracy`,
    and is empty for kinds without a parent. `versions` are those of the libraries.
    """

    plan: Plan
    models: Mapping[str, Mapping[str, Any]]
    parent: Mapping[str, float]
    versions: Mapping[str, str]

    @property
    def mean_test_accuracy(self) -> float:
        """The mean test accuracy over models."""
        return self._mean("test_accuracy")

    @property
    def mean_train_accuracy(self) -> float:
        """The mean training accuracy over models."""
        return self._mean("train_accuracy")

    def to_dict(self) -> dict[str, Any]:
        """Return the contents of `zoo.json`: numbers, strings, lists and dicts."""
        return {
            **asdict(self.plan),
            "mean_test_accuracy": self.mean_test_accuracy,
            "mean_train_accuracy": self.mean_train_accuracy,
            "parent": dict(self.parent),
            "models": {name: dict(facts) for name, facts in self.models.items()},
            "versions": dict(self.versions),
        }

    def _mean(self, fact: str) -> float:
        return sum(float(model[fact]) for model in self.models.values()) / len(self.models)


def plan_zoo(
    kind: str,
    num_models: int | None,
    seed: int,
    random_labels: bool,
    train_head: bool,
    own_init: bool | None,
    *,
    permuted: bool = False,
    same_task: bool = False,
    encoder: str | None = None,
    full: bool = False,
) -> Plan:
    """Resolve the defaults. Raises UsageError for options that the kind does not support."""
    if kind not in DEFAULTS:
        raise UsageError(f"there is no zoo of kind {kind!r}", rule=f"the kinds are {', '.join(DEFAULTS)}")
    defaults = DEFAULTS[kind]
    asked = {"train_head": train_head, "own_init": bool(own_init), "permuted": permuted, "full": full}
    only_digits = {"random_labels": random_labels, "same_task": same_task}
    _refuse_options(kind, {**asked, **only_digits, "encoder": encoder is not None})
    if num_models is None:
        num_models = defaults.num_shuffled_models if random_labels else defaults.num_models
    most = NUM_TASKS - defaults.num_held_out
    if not 1 <= num_models <= most:
        raise UsageError(
            f"{num_models} models are not possible",
            where=kind,
            rule=f"a zoo has {NUM_TASKS} seeds for its models"
            if same_task or kind == TASKS
            else f"ten classes can be split into five against five in {NUM_TASKS} ways, one model each"
            + (f", and {defaults.num_held_out} are held out" if defaults.num_held_out else ""),
            next_step=f"ask for 1 to {most} models, or make a second zoo with another seed",
        )
    seed = check_seed(seed, MOST_ZOOS, where=kind)
    if same_task and random_labels:
        raise UsageError(
            "same_task and random_labels exclude each other",
            where=kind,
            rule="shuffled labels give each model its own task",
            next_step="leave one of them out",
        )
    return Plan(
        kind,
        num_models,
        seed,
        random_labels,
        train_head,
        defaults.own_init if own_init is None else own_init,
        permuted,
        same_task,
        FULL_SCHEDULE if full else defaults.shuffled_schedule if random_labels else defaults.schedule,
        defaults.pretraining,
        defaults.num_held_out,
        encoder,
        full,
    )


def _refuse_options(kind: str, asked: Mapping[str, bool]) -> None:
    """Raise UsageError for an option that the kind does not have, with the reason."""
    reasons = {
        "train_head": "its adapters hold LoRA weights alone"
        if kind in ("digits-lora", DOCSTRINGS, TASKS)
        else "it trains all weights anyway",
        "full": "only digits-tasks has both adapters and fine-tunes",
        "own_init": "its models are fine-tunes of one parent",
        "encoder": "its models are of images",
        "random_labels": "its models learn the true groups",
        "same_task": "its models learn one task each",
        "permuted": "its models keep the order of their one parent; only digits-cnn is permuted",
    }
    for option, wanted in asked.items():
        if wanted and option not in DEFAULTS[kind].options:
            raise UsageError(f"no such option: {option}", where=kind, rule=reasons[option], next_step="leave it out")


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries on which the numbers depend, and of Python, whose docstrings are read."""
    return {package: version(package) for package in _PACKAGES} | {"python": python_version()}
