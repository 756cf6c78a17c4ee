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

    space = ez.load(bundle)
    faults = list(space.verify())
    if json:
        print_json(
            {
                "bundle": str(bundle),
                "ok": not faults,
                "num_models": len(space.names),
                "num_layers": len(space.layers),
                "faults": faults,
            }
        )
    else:
        for fault in faults:
            say(f"fault: {fault}")
        say(
            f"{bundle}: {len(space.names)} models, {len(space.layers)} layers, "
            + ("whole" if not faults else f"{len(faults)} faults")
        )
    if faults:
        raise typer.Exit(1)
