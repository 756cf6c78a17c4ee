"""Train small real zoos from data that Python and scikit-learn include.

Models of most kinds learn to split ten classes into five against five, in one of 126 ways. Each model has its own way, or all have
the same one. Kinds:

* `digits-vit`: fine-tunes of one tiny vision transformer on handwritten digits, as transformers checkpoints;
* `digits-lora`: LoRA adapters of such a transformer, as PEFT adapters;
* `digits-cnn`: small convolutional networks from scratch, as bare safetensors files;
* `digits-tasks`: adapters or fine-tunes for merging: one network can do all of their tasks, each with a frozen head of its own;
* `docstrings-lora`: LoRA adapters of a pretrained encoder of texts, on passages of the standard library's docstrings. Its models
  that are held out, in `_heldout`, learn other tasks on other passages. Needs the extra `text`, which has the encoder.

The digits' zoos take less than a minute on one core, that of docstrings some minutes.

Needs the extra `nursery`; importing this package does not.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from eigenzoo.errors import UsageError, require
from eigenzoo.nursery.recipe import DEFAULTS, PARENT, RECIPE, Recipe, plan_zoo

__all__ = ["KINDS", "Recipe", "accuracy", "make", "metric", "tasks_metric"]

KINDS: tuple[str, ...] = tuple(DEFAULTS)


def make(
    kind: str,
    out: str | os.PathLike[str],
    *,
    num_models: int | None = None,
    seed: int = 0,
    random_labels: bool = False,
    train_head: bool = False,
    own_init: bool | None = None,
    permuted: bool = False,
    same_task: bool = False,
    encoder: str | os.PathLike[str] | None = None,
    full: bool = False,
    force: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> Recipe:
    """Train a zoo of one of `KINDS` and save it as the folder `out`, which appears complete or not at all.

    Args:
        num_models: number of tasks, drawn by the seed from the 126, or of runs of one task, also up to 126. Default: 72 (36 with
            random labels), 100 for networks from scratch, and 60 for adapters of an encoder of texts, besides 12 that are held out.
        random_labels: each model memorises 128 training images whose labels its own seed has shuffled.
        train_head: `digits-vit` only: also train the two-class head. Otherwise all models keep one random head.
        own_init: an initialisation per model. By default adapters draw their own A, and networks from scratch share
            one initialisation; fine-tunes always start at their parent.
        permuted: `digits-cnn` only: permute each network's hidden channels after training, in its own order. Its outputs do not
            change, but its weights no longer correspond to those of other networks.
        same_task: all models learn the first task of the seed, each with its own order of batches. Excludes random labels.
        encoder: `docstrings-lora` only: folder of a BERT encoder with its tokenizer. Default: all-MiniLM-L6-v2 of the extra `text`.
        full: `digits-tasks` only: train all weights of the body instead of LoRA adapters.
        force: replace an unchanged zoo of the nursery at `out`.
        progress: called as progress(stage, done, total) with stages `pretraining`, `passages` and `models`.

    The zoo contains one folder (or `.safetensors` file) per model. Its name is that of its task (`task-01234`: the class that
    contains 0), or `task-01234-run-007` if all have the same task. `_base` is the parent with the models' two-class head, and
    `zoo.json` the returned recipe. Each weight file's metadata contain its `task`, `kind`, `random_labels` with `labels_seed`, and
    `permutation_seed` if permuted. With one seed and kind, permuted and other zoos have the same trained networks.

    Trains on one thread. The same arguments give the same bytes on the same machine with the same library versions.

    Raises:
        UsageError: an option the kind does not have, options that exclude each other, a number of models out of
            range, a library that is missing.
        OutputError: `out` exists and is not to be, or may not be, replaced.
    """
    plan = plan_zoo(
        kind,
        num_models,
        seed,
        random_labels,
        train_head,
        own_init,
        permuted=permuted,
        same_task=same_task,
        encoder=None if encoder is None else os.fspath(encoder),
        full=full,
    )
    require("sklearn", "transformers", "peft", where="eigenzoo.nursery", extra="nursery")
    from eigenzoo.nursery.making import make_zoo

    return make_zoo(plan, Path(out), force, progress)


def accuracy(
    path: str | os.PathLike[str], *, task: str | None = None, base: str | os.PathLike[str] | None = None
) -> float:
    """Return the accuracy of one saved model: a checkpoint folder, adapter folder or .safetensors file.

    `task` is the measured task, by default the one in the file's metadata. A true task such as `5-against-5:0,1,2,3,4` is measured
    on the 500 test images, on which no model is trained. A shuffled one (`...;shuffled=7`, the tasks of a zoo with random labels)
    is measured on the 128 training images with shuffled labels. On any other images it can only reach chance; pass the true task to
    see that.

    `base` is an adapter's parent. Default: the folder in `adapter_config.json`, relative to the adapter's folder. So an adapter
    inside its zoo, or rebuilt beside it, needs no `base`. An adapter elsewhere needs it: see `metric`. A parent is measured on the
    given `task`, with the head of its children.

    A task of docstrings, such as `docstrings:0,1,2,3,4` (`…;held-out`), is measured on the 500 passages that the zoo holds for it.

    Takes about 20 ms, an adapter 50; an adapter of an encoder of texts some seconds. Nothing is downloaded.

    Raises:
        UsageError: a task or parent is neither recorded nor given.
        FormatError: no model at `path`.
        MismatchError: weights missing, too many, or of another shape.
    """
    require("sklearn", "transformers", "peft", where="eigenzoo.nursery", extra="nursery")
    from eigenzoo.nursery.measuring import measure

    return measure(Path(path), task, None if base is None else Path(base))


def metric(zoo: str | os.PathLike[str]) -> Callable[[str | os.PathLike[str]], float]:
    """Return `accuracy` with the parent of one zoo, for models in any folder.

    It measures the models of `zoo`, and models rebuilt from its subspace, each on the task in its metadata. An adapter in a
    temporary folder has no other reference to its parent. For zoos without adapters it is the same as `accuracy`. The zoo's path is
    resolved now and not when a model is measured, so that the working folder can change. The returned function can be pickled.

    Raises:
        UsageError: no zoo of the nursery at `zoo`.
    """
    folder = Path(zoo).absolute()
    if not (folder / RECIPE).is_file():
        raise UsageError(
            "this is not a zoo of the nursery",
            where=str(zoo),
            rule=f"such a zoo is a folder with {RECIPE}",
            next_step="pass a folder that `eigenzoo nursery make` wrote",
        )
    base = folder / PARENT
    return partial(accuracy, base=base if base.is_dir() else None)


def tasks_metric(zoo: str | os.PathLike[str]) -> Callable[[str | os.PathLike[str], str], dict[str, float]]:
    """Return a metric of merged models of a `digits-tasks` zoo: the accuracy on each task, with that task's head.

    It is called with a model's path and a part of the data, `validation` (250 images) or `test` (500); no model is trained on
    either. The returned function can be pickled.

    Raises UsageError if there is no zoo of the nursery at `zoo`.
    """
    metric(zoo)  # the checks
    return partial(_tasks_accuracy, base=Path(zoo).absolute() / PARENT)


def _tasks_accuracy(path: str | os.PathLike[str], part: str = "test", *, base: Path) -> dict[str, float]:
    require("sklearn", "transformers", "peft", where="eigenzoo.nursery", extra="nursery")
    from eigenzoo.nursery.measuring import measure_tasks

    return measure_tasks(Path(path), base, part)
