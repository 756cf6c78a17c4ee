"""`eigenzoo route BUNDLE INPUTS`: which models answer these inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eigenzoo.cli import options
from eigenzoo.cli.console import print_json, print_table, say
from eigenzoo.display import counted, in_number, in_percent

# The default of routing.router, without importing torch for the help.
ALPHA = 0.05


def command(
    bundle: options.BundleArgument,
    inputs: Annotated[
        Path,
        typer.Argument(
            help="Features of the inputs, one row each: an .npy file, or a safetensors file with one tensor.",
            metavar="INPUTS",
            show_default=False,
        ),
    ],
    examples: Annotated[
        Path,
        typer.Option(
            help="Features of at least 3 inputs of each model: a safetensors file with one tensor per model, named after it. "
            "Use the same encoder as for INPUTS.",
            show_default=False,
        ),
    ],
    alpha: Annotated[
        float,
        typer.Option(
            help="Largest share of the models' own inputs to leave without an answer. 0 answers every input. "
            "Example: --alpha 0.01."
        ),
    ] = ALPHA,
    output: Annotated[
        Path | None,
        options.output("File for one mixture of models for all answered inputs together, for `eigenzoo rebuild`."),
    ] = None,
    seed: options.Seed = 0,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Choose the models that answer inputs, from a few examples per model; inputs of no model are left without an answer."""
    import eigenzoo as ez
    from eigenzoo.formats.output.whole import check_free_file
    from eigenzoo.subspace.coefficient_file import is_coefficient_file, save_coefficients

    if output is not None:
        check_free_file(output, force=force, own=is_coefficient_file)
    space = ez.load(bundle)
    routing = ez.route(space, inputs, examples, alpha=alpha, seed=seed)
    mixture = {} if output is None else routing.mixture()
    if output is not None:
        save_coefficients(routing.coefficients(space).values, space, output, force=force)
    largest = max(mixture, key=lambda name: mixture[name], default="")
    document = routing.to_dict()
    if json:
        print_json({**document, "output": None if output is None else str(output)})
        return
    answered = len(routing.models) - routing.num_abstained
    shares = document["mixture"] or {}
    print_table(
        f"{counted(len(routing.models), 'input')}, {counted(len(routing.names), 'model')}",
        ("model", "inputs", "share", "in the mixture"),
        [
            (name, in_number(count), in_percent(count / len(routing.models)), in_percent(shares.get(name)))
            for name, count in sorted(document["models"].items(), key=lambda item: -item[1])
            if count or shares.get(name)
        ]
        + [("(no model)", in_number(routing.num_abstained), in_percent(1 - answered / len(routing.models)), "")],
    )
    say(
        f"at most {in_percent(alpha)} of inputs like the examples are left without a model, on average "
        f"({counted(routing.num_calibration, 'held-out example')}). Inputs of other tasks have no such bound"
    )
    if output is not None:
        say(f"\nmixture: {output} (keep the bundle: the file needs it)")
        if any("cores" in basis.ranks for basis in space.layers.values()):
            say("its cores are cut to the rank of the bundle's cores: the average of models has a higher one")
        say("measure it first: one model is often better than a mixture (docs/route.md)")
        say(f"next: eigenzoo rebuild {bundle} {output} --like {largest} -o MODEL_FOLDER")
