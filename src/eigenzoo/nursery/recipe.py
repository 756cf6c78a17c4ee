"""What a zoo is to be (`Plan`) and what it became (`Recipe`, the zoo's `zoo.json`). Needs neither torch nor sklearn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

from eigenzoo.errors import UsageError
from eigenzoo.seeds import check_seed

NUM_TASKS = 126
MOST_ZOOS = 2**31
"""Seeds of zoos: each has `NUM_TASKS` seeds of its own for its models, all of which torch takes."""

PARENT = "_base"
RECIPE = "zoo.json"
ZOO = "zoo"
"""What the record of the folder calls it; see `formats.output.own`."""

_PACKAGES = ("torch", "transformers", "peft", "safetensors", "scikit-learn", "numpy")


@dataclass(frozen=True)
class Schedule:
    """How long and how fast: Adam, `warmup` as a share of the steps, then half a cosine down to zero."""

    steps: int
    batch_size: int
    learning_rate: float
    warmup: float = 0.1


PRETRAINING = Schedule(steps=800, batch_size=64, learning_rate=3e-3)


@dataclass(frozen=True)
class Defaults:
    """What a kind does unless told otherwise, and which options it has at all."""

    num_models: int
    num_shuffled_models: int
    schedule: Schedule
    shuffled_schedule: Schedule
    options: frozenset[str]
    own_init: bool = False
    pretraining: Schedule | None = None


# As many as one core trains in about 40 s; tasks are left over for models that the zoo has never seen. Shuffled labels
# are learned by heart within 320 steps, against 128 for the real ones, hence fewer models in the same time.
DEFAULTS: Mapping[str, Defaults] = {
    "digits-vit": Defaults(
        num_models=72,
        num_shuffled_models=36,
        schedule=Schedule(128, 32, 1.5e-3),
        shuffled_schedule=Schedule(320, 32, 1.5e-3),
        options=frozenset({"train_head"}),
        pretraining=PRETRAINING,
    ),
    "digits-lora": Defaults(
        num_models=72,
        num_shuffled_models=36,
        schedule=Schedule(128, 32, 1e-2),
        shuffled_schedule=Schedule(320, 32, 1e-2),
        options=frozenset({"own_init"}),
        own_init=True,
        pretraining=PRETRAINING,
    ),
    "digits-cnn": Defaults(
        num_models=100,
        num_shuffled_models=100,
        schedule=Schedule(400, 32, 1e-2),
        shuffled_schedule=Schedule(600, 32, 1e-2),
        options=frozenset({"own_init", "permuted"}),
    ),
}


@dataclass(frozen=True)
class Plan:
    """Everything that decides how a zoo comes out, all defaults resolved."""

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


@dataclass(frozen=True)
class Recipe:
    """A finished zoo: its plan, what each model learned and how well.

    `models` maps a model's name to its `task`, its `seed`, its `test_accuracy` (true labels, 500 images never trained
    on) and its `train_accuracy` (the images and labels it was trained on, shuffled ones included). `parent` holds the
    parent's `ten_class_test_accuracy`; it is empty for kinds without a parent. `versions` are those of the libraries.
    """

    plan: Plan
    models: Mapping[str, Mapping[str, Any]]
    parent: Mapping[str, float]
    versions: Mapping[str, str]

    @property
    def mean_test_accuracy(self) -> float:
        """The mean over models of their test accuracy."""
        return self._mean("test_accuracy")

    @property
    def mean_train_accuracy(self) -> float:
        """The mean over models of the accuracy on what they were trained on."""
        return self._mean("train_accuracy")

    def to_dict(self) -> dict[str, Any]:
        """Return what `zoo.json` holds: numbers, strings, lists and dicts alone."""
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
) -> Plan:
    """Resolve the defaults and refuse, with `UsageError`, what the kind cannot do."""
    if kind not in DEFAULTS:
        raise UsageError(f"there is no zoo of kind {kind!r}", rule=f"the kinds are {', '.join(DEFAULTS)}")
    defaults = DEFAULTS[kind]
    if num_models is None:
        num_models = defaults.num_shuffled_models if random_labels else defaults.num_models
    if not 1 <= num_models <= NUM_TASKS:
        raise UsageError(
            f"{num_models} models are not possible",
            where=kind,
            rule=f"a zoo has {NUM_TASKS} seeds for its models"
            if same_task
            else f"ten digits can be split into five against five in {NUM_TASKS} ways, one model each",
            next_step=f"ask for 1 to {NUM_TASKS} models, or make a second zoo with another seed",
        )
    seed = check_seed(seed, MOST_ZOOS, where=kind)
    _refuse_options(kind, {"train_head": train_head, "own_init": bool(own_init), "permuted": permuted})
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
        defaults.shuffled_schedule if random_labels else defaults.schedule,
        defaults.pretraining,
    )


def _refuse_options(kind: str, asked: Mapping[str, bool]) -> None:
    """Refuse an option that the kind does not have, with the reason."""
    reasons = {
        "train_head": "its adapters hold LoRA weights alone"
        if kind == "digits-lora"
        else "it trains all weights anyway",
        "own_init": "its models are fine-tunes of one parent",
        "permuted": "its models keep the order of their one parent; only digits-cnn is permuted",
    }
    for option, wanted in asked.items():
        if wanted and option not in DEFAULTS[kind].options:
            raise UsageError(f"no such option: {option}", where=kind, rule=reasons[option], next_step="leave it out")


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that decide the numbers."""
    return {package: version(package) for package in _PACKAGES}
