"""`eigenzoo adapt BUNDLE DATA -o FILE`: adapt a model to a new task by a few hundred numbers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from eigenzoo.cli import options
from eigenzoo.cli.console import print_json, print_table, progress_bar, say
from eigenzoo.display import in_bytes, in_percent
from eigenzoo.errors import UsageError

if TYPE_CHECKING:
    from eigenzoo.integrations.classification import Adaptation

# Constants of adapt.trained, integrations.classification and its data, so that the help does not import torch.
LEARNING_RATE, STEPS, BATCH_SIZE = 0.1, 200, 64


def command(
    bundle: options.BundleArgument,
    data: Annotated[
        str,
        typer.Argument(
            help="Training data: a table with columns text and label (.csv, .json, .jsonl, .parquet), a folder with one "
            "subfolder of images per class, a folder with train and test parts of either, or a task of the nursery: "
            "5-against-5:0,1,2,3,4.",
            metavar="DATA",
            show_default=False,
        ),
    ],
    model: Annotated[
        Path,
        typer.Option(
            help="Model to adapt: a local transformers checkpoint with its tokenizer or image processor, or a model of the "
            "nursery.",
            show_default=False,
        ),
    ],
    output: Annotated[Path | None, options.output("Adapter file to write.")] = None,
    start: Annotated[
        str,
        typer.Option(
            help="Initial value: mean (of the zoo), zero (the model's own weights), random, the name of a model in the "
            "bundle, or the path of a model."
        ),
    ] = "mean",
    steps: Annotated[int, typer.Option(help="Number of Adam steps.")] = STEPS,
    batch_size: Annotated[int, typer.Option(help="Items per step.")] = BATCH_SIZE,
    learning_rate: Annotated[
        float, typer.Option(help="Learning rate, in units of the spread of the zoo's coefficients.")
    ] = LEARNING_RATE,
    besides: Annotated[
        list[str] | None,
        typer.Option(
            help="Train these parameters too, such as a head: 'classifier.*' (repeatable).", show_default=False
        ),
    ] = None,
    prefix: Annotated[
        str | None,
        typer.Option(
            help="Prefix of the bundle's layers in the model, such as 'bert.'. Default: the only prefix that fits.",
            show_default=False,
        ),
    ] = None,
    seed: options.Seed = 0,
    random_basis: Annotated[
        bool,
        typer.Option(
            "--random-basis",
            help="Run the control: train the same number of random directions, print the accuracy, write nothing.",
        ),
    ] = False,
    test_share: Annotated[
        float | None,
        typer.Option(
            help="Share of each class to hold out if the data has no test part. Default: 0.2.", show_default=False
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="Checkpoint file of the training. Default: a hidden file beside the output.", show_default=False
        ),
    ] = None,
    device: options.Device = "cpu",
    force: options.Force = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Train coefficients for a new classification task. After an interruption, the same command resumes from its checkpoint."""
    if output is None and not random_basis:
        raise UsageError(
            "--output is missing",
            rule="only the control --random-basis writes no file",
            next_step="name the file to write: -o task.safetensors",
        )
    with progress_bar(quiet=quiet or json) as progress:
        from eigenzoo.integrations.classification import adapt_classifier

        adaptation = adapt_classifier(
            bundle,
            data,
            model,
            output,
            start=start,
            steps=steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
            besides=besides or (),
            prefix=prefix,
            seed=seed,
            random_basis=random_basis,
            test_share=test_share,
            checkpoint=checkpoint,
            device=device,
            force=force,
            progress=progress,
        )
    if json:
        print_json(adaptation.to_dict())
    else:
        render(adaptation, bundle)


def render(adaptation: Adaptation, bundle: str) -> None:
    """Print the training, the sizes of file and alternatives, and the accuracy with its controls."""
    besides = f", {adaptation.num_besides} of them besides the coefficients" if adaptation.num_besides else ""
    random = " in a random basis" if adaptation.random_basis else ""
    say(
        f"{adaptation.num_trained} numbers trained{random}{besides}: {adaptation.steps} steps on {adaptation.num_train} items, "
        f"loss {adaptation.first_loss:.3g} → {adaptation.last_loss:.3g}"
        + (f" (resumed after {adaptation.taken_up_at} steps)" if adaptation.taken_up_at else "")
    )
    for note in adaptation.notes:
        say(note)
    print_table(
        "",
        (f"on {adaptation.num_test} held-out items", "accuracy"),
        [
            (f"before, start {adaptation.start}", in_percent(adaptation.accuracy.start)),
            ("the zoo's mean alone", in_percent(adaptation.accuracy.mean)),
            ("adapted", in_percent(adaptation.accuracy.adapted)),
        ],
    )
    sizes = [
        (f"a LoRA of rank {adaptation.lora_rank} of the same layers", in_bytes(adaptation.lora_bytes)),
        ("the full checkpoint", in_bytes(adaptation.checkpoint_bytes)),
    ]
    if adaptation.file_bytes is not None:
        sizes.insert(0, ("this file", in_bytes(adaptation.file_bytes)))
    print_table("", ("on disk", "bytes"), sizes)
    if adaptation.output is not None:
        zero = " --model MODEL" if adaptation.start == "zero" else ""
        say(f"\nadapter file: {adaptation.output} (keep the bundle: the file needs it)")
        say(f"next: eigenzoo rebuild {bundle} {adaptation.output} -o MODEL_FOLDER{zero}")
