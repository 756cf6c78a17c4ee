"""`eigenzoo nursery make KIND -o DIR`: train a small real zoo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eigenzoo.cli import options
from eigenzoo.cli.console import print_json, progress_bar, say
from eigenzoo.cli.examples import epilog
from eigenzoo.display import in_percent

app = typer.Typer(no_args_is_help=True, help="Train small real zoos on handwritten digits or on Python's docstrings.")


@app.callback()
def _nursery() -> None:
    """Make `make` a subcommand."""


@app.command("make", epilog=epilog("nursery make"))
def command(
    kind: Annotated[
        str,
        typer.Argument(
            help="Kind of zoo: digits-vit, digits-lora, digits-cnn, digits-tasks or docstrings-lora.",
            metavar="KIND",
            show_default=False,
        ),
    ],
    output: Annotated[Path, options.output("Folder to write the zoo to.")],
    num_models: options.NumModels = None,
    seed: options.Seed = 0,
    random_labels: Annotated[
        bool, typer.Option("--random-labels", help="Train on shuffled labels: models share only their initialisation.")
    ] = False,
    train_head: Annotated[bool, typer.Option("--train-head", help="Train the task head too (digits-vit).")] = False,
    own_init: Annotated[
        bool | None,
        typer.Option(
            "--own-init/--shared-init",
            help="Initialise each model separately, or all in the same way.",
            show_default=False,
        ),
    ] = None,
    permuted: Annotated[
        bool,
        typer.Option(
            "--permuted",
            help="Permute the hidden channels of each network; outputs do not change (digits-cnn).",
        ),
    ] = False,
    same_task: Annotated[
        bool, typer.Option("--same-task", help="Train all models on one task, each with its own order of batches.")
    ] = False,
    encoder: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a BERT encoder with its tokenizer (docstrings-lora). Default: all-MiniLM-L6-v2 of the extra text.",
            show_default=False,
        ),
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Train all weights of the body instead of adapters (digits-tasks).")
    ] = False,
    force: options.Force = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Train a small zoo. Takes about a minute, docstrings-lora some minutes. Models are real checkpoints or adapters."""
    from eigenzoo import nursery
    from eigenzoo.nursery.recipe import HELD_OUT

    with progress_bar(quiet=quiet or json) as progress:
        recipe = nursery.make(
            kind,
            output,
            num_models=num_models,
            seed=seed,
            random_labels=random_labels,
            train_head=train_head,
            own_init=own_init,
            permuted=permuted,
            same_task=same_task,
            encoder=encoder,
            full=full,
            force=force,
            progress=progress,
        )
    if json:
        print_json(recipe.to_dict())
    else:
        say(
            f"{recipe.plan.num_models} models of kind {recipe.plan.kind} in {output}: test accuracy "
            f"{in_percent(recipe.mean_test_accuracy)}, training accuracy {in_percent(recipe.mean_train_accuracy)}"
        )
        if recipe.plan.num_held_out:
            say(
                f"{recipe.plan.num_held_out} more models in {output / HELD_OUT} have other tasks and texts: hold them out of a fit"
            )
        say(f"next: eigenzoo inspect {output}")
