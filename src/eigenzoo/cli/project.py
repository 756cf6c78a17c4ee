"""`eigenzoo project BUNDLE MODEL…`: measure how much of a model is outside the subspace."""

from __future__ import annotations

from eigenzoo.cli import options
from eigenzoo.cli.console import print_json, print_table, progress_bar
from eigenzoo.cli.left_behind import not_in_subspace, say_beyond, say_not_in_subspace, say_zero_updates
from eigenzoo.display import in_percent


def command(
    bundle: options.BundleArgument,
    models: options.ModelsArgument,
    base: options.Base = None,
    allow_pickle: options.AllowPickle = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Project models onto a bundle's subspace and print the share of their energy that lies outside."""
    import eigenzoo as ez

    with progress_bar(quiet=quiet or json) as progress:
        space = ez.load(bundle, base=base)
        opened = space.open(models, allow_pickle=allow_pickle)
        projected = space.project_many(opened, progress=progress)
    besides = not_in_subspace(space, opened)
    if json:
        residuals = {name: coefficients.to_dict() for name, coefficients in projected.items()}
        zeros = {zero.model: list(zero.modules) for zero in opened.zeros}
        print_json({"models": residuals, "not_in_subspace": besides, "zero_updates": zeros})
        return
    print_table(
        "share of the energy outside the subspace, ‖X − X̂‖² / ‖X‖²",
        ("model", "all layers", "worst layer", ""),
        [
            (
                name,
                in_percent(coefficients.residual),
                in_percent(max(coefficients.residuals.values())),
                max(coefficients.residuals, key=lambda layer: coefficients.residuals[layer]),
            )
            for name, coefficients in projected.items()
        ],
    )
    say_beyond(projected)
    say_not_in_subspace(besides, opened.names)
    say_zero_updates(opened.zeros)
