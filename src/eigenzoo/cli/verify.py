"""`eigenzoo verify BUNDLE`: whether a bundle is whole."""

from __future__ import annotations

import typer

from eigenzoo.cli import options
from eigenzoo.cli.console import print_json, say


def command(bundle: options.BundleArgument, json: options.Json = False) -> None:
    """Check checksums, unknown files, finiteness, orthonormality, and that every coefficient matches its layer.

    Exit code 1 if a check fails.
    """
    import eigenzoo as ez
    from eigenzoo.formats.bundle import MANIFEST

    num_models = num_layers = None
    try:
        space = ez.load(bundle)
        num_models, num_layers = len(space.names), len(space.layers)
        faults = list(space.verify())
    except ez.EigenzooError as error:
        # A bundle that cannot even be loaded has failed the check; what is no bundle is bad input.
        if not (bundle / MANIFEST).is_file():
            raise
        faults = [str(error)]
    if json:
        print_json(
            {
                "bundle": str(bundle),
                "ok": not faults,
                "num_models": num_models,
                "num_layers": num_layers,
                "faults": faults,
            }
        )
    else:
        for fault in faults:
            say(f"fault: {fault}")
        held = "" if num_models is None else f"{num_models} models, {num_layers} layers, "
        say(f"{bundle}: {held}" + ("whole" if not faults else f"faults: {len(faults)}"))
    if faults:
        raise typer.Exit(1)
