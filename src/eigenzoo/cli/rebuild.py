"""`eigenzoo rebuild BUNDLE NAME -o DIR`: a model back, in the format it came in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eigenzoo.cli import options
from eigenzoo.cli.console import in_percent, print_json, say


def command(
    bundle: options.BundleArgument,
    name: Annotated[
        str,
        typer.Argument(
            help="A model of the bundle, or the path of any model, which is projected first.",
            metavar="NAME",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The model to write.", show_default=False)],
    mean_only: Annotated[
        bool, typer.Option("--mean-only", help="The zoo's mean in the model's place: the control.")
    ] = False,
    fetch: Annotated[
        bool, typer.Option("--fetch", help="Read what was excluded from the store that the model came from.")
    ] = False,
    base: options.Base = None,
    allow_pickle: options.AllowPickle = False,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Rebuild one model: layers from the subspace, everything else as it was."""
    import eigenzoo as ez
    from eigenzoo.formats.opening import is_only_a_model
    from eigenzoo.formats.output import check_free

    check_free(output, force=force, replaceable=is_only_a_model)
    space = ez.load(bundle, base=base)
    known = name in space.names or not Path(name).exists()
    coefficients = space.coefficients(name) if known else space.project(space.open(name, allow_pickle=allow_pickle))
    space.rebuild(coefficients, mean_only=mean_only, fetch=fetch).save(output, force=force)
    if json:
        print_json(
            {
                "name": coefficients.name,
                "output": str(output),
                "mean_only": mean_only,
                "residual": coefficients.residual,
            }
        )
        return
    say(
        f"{'the mean, in the place of ' if mean_only else ''}{coefficients.name} → {output}"
        + ("" if mean_only else f" · {in_percent(coefficients.residual)} of its energy is lost")
    )
