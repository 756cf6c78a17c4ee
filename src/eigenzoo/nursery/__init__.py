"""Small real zoos, trained in under a minute on one core from data that scikit-learn carries with it.

Every model learns one of the 126 ways to split the ten handwritten digits into five against five: each its own, or all
the same one. Kinds:

* `digits-vit`: fine-tunes of one tiny vision transformer, as transformers checkpoints;
* `digits-lora`: LoRA adapters of such a transformer, as PEFT adapters;
* `digits-cnn`: small convolutional networks from scratch, as bare safetensors files.

Needs the extra `nursery`; importing this package does not.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from eigenzoo.errors import UsageError, require
from eigenzoo.nursery.recipe import DEFAULTS, PARENT, RECIPE, Recipe, plan_zoo

__all__ = ["KINDS", "Recipe", "accuracy", "make", "metric"]

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
    force: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> Recipe:
    """Train a zoo of one of `KINDS` and save it as the folder `out`, which appears whole or not at all.

    Args:
        num_models: how many of the 126 tasks, drawn by the seed (or how many runs of one task, up to 126 too); by
            default 72 (36 with random labels), and 100 networks from scratch.
        random_labels: each model learns by heart 128 training images whose labels its own seed has shuffled.
        train_head: `digits-vit` only: train the two-class head too; else all models keep one random head.
        own_init: an initialisation per model. By default adapters draw their own A, and networks from scratch share
            one initialisation; fine-tunes always start at their parent.
        permuted: `digits-cnn` only: after its training each network's hidden channels are put into an order of its
            own. All its answers stay what they were, its weights no longer lie where another network has them.
        same_task: all models learn the first task that the seed chooses, each from batches in an order of its own.
            Not together with random labels.
        force: replace a zoo of the nursery that lies at `out` as it was made, with nothing else in it.
        progress: called with a stage (`pretraining`, `models`), what is done and what there is to do.

    The zoo holds one folder (or `.safetensors` file) per model, named after its task (`task-01234`: the class that
    holds 0; `task-01234-run-007` where all have the same one); the parent in `_base`, with the models' two-class
    head; and `zoo.json`, the recipe that is returned. Each weight file's metadata names its `task`, `kind`,
    `random_labels` and, for those, `labels_seed`; if permuted, `permutation_seed`. One seed's zoos of one kind hold
    the same trained networks whether permuted or not.

    Trains on one thread. The same arguments give the same bytes on the same machine with the same library versions.

    Raises:
        UsageError: an option the kind does not have, options that exclude each other, a number of models out of
            range, a library that is missing.
        OutputError: `out` exists and is not to be, or may not be, replaced.
    """
    plan = plan_zoo(kind, num_models, seed, random_labels, train_head, own_init, permuted=permuted, same_task=same_task)
    require("sklearn", "transformers", "peft", where="eigenzoo.nursery", extra="nursery")
    from eigenzoo.nursery.making import make_zoo

    return make_zoo(plan, Path(out), force, progress)


def accuracy(
    path: str | os.PathLike[str], *, task: str | None = None, base: str | os.PathLike[str] | None = None
) -> float:
    """Return the share of right answers of one saved model: checkpoint folder, adapter folder or .safetensors file.

    `task`, by default the one in the file's metadata, decides what is measured. A true task such as
    `5-against-5:0,1,2,3,4` is measured on the 500 test images, which no model is trained on. A shuffled one
    (`...;shuffled=7`, the tasks of a zoo with random labels) is measured on the 128 training images whose labels were
    shuffled, since on any other images chance is all that can be reached; pass the true task to see that.

    `base` is an adapter's parent; by default the folder that `adapter_config.json` names, read as relative to the
    adapter's folder. So an adapter inside its zoo, or one rebuilt beside it, needs no `base`, and one saved anywhere
    else does: `metric` binds it. A parent itself is measured on the `task` given: with the head its children got.

    Takes about 20 ms, an adapter 50. Nothing is downloaded.

    Raises:
        UsageError: no task, or no parent, is recorded and none is given.
        FormatError: no model at `path`.
        MismatchError: weights missing, too many, or of another shape.
    """
    require("sklearn", "transformers", "peft", where="eigenzoo.nursery", extra="nursery")
    from eigenzoo.nursery.measuring import measure

    return measure(Path(path), task, None if base is None else Path(base))


def metric(zoo: str | os.PathLike[str]) -> Callable[[str | os.PathLike[str]], float]:
    """Return `accuracy` for the models of one zoo, wherever their files lie: the zoo's own `_base` is their parent.

    What `make` saved as `zoo` is measured as by `accuracy`, and so is every model rebuilt from its subspace, each on
    the task in its metadata. An adapter that lies in a temporary folder has nothing else that leads to its parent.
    For zoos without adapters it is no more than `accuracy`. The zoo is looked for now and not when a model is measured,
    so that the working folder may change; the function returned can be pickled.

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
