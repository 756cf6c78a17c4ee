"""`eigenzoo add BUNDLE MODEL…`: add models to a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from eigenzoo.cli import options
from eigenzoo.cli.console import print_json, progress_bar, say
from eigenzoo.cli.fit import render_bytes
from eigenzoo.cli.left_behind import not_in_subspace, say_not_in_subspace, say_zero_updates
from eigenzoo.display import counted, in_percent
from eigenzoo.errors import UsageError

if TYPE_CHECKING:
    from eigenzoo.subspace.subspace import Subspace


def command(
    bundle: options.BundleArgument,
    models: options.ModelsArgument,
    output: Annotated[Path | None, options.output("Bundle to write. Default: replace BUNDLE.")] = None,
    refresh: Annotated[bool, typer.Option("--refresh", help="Refit the basis to all models.")] = False,
    old: Annotated[
        list[str] | None, typer.Option(help="Current path of the old models' files (repeatable).", show_default=False)
    ] = None,
    base: options.Base = None,
    allow_pickle: options.AllowPickle = False,
    force: options.Force = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Add models to a bundle.

    With the old models' files the result is exact. Without them it is exact inside the kept subspace.
    """
    import eigenzoo as ez
    from eigenzoo.formats.output.whole import check_free
    from eigenzoo.formats.remote.hub_bundle import bundle_id
    from eigenzoo.subspace.bundles.card import foreign_to_a_bundle
    from eigenzoo.subspace.bundles.originals import missing_originals

    if output is None and bundle_id(bundle) is not None:
        raise UsageError(
            "add cannot replace a bundle on the hub",
            where=bundle,
            next_step="write the grown bundle to a folder with -o, then run `eigenzoo push`",
        )
    target = Path(bundle) if output is None else output
    check_free(target, force=force or output is None, foreign=foreign_to_a_bundle)
    with progress_bar(quiet=quiet or json) as progress:
        space = ez.load(bundle, base=base)
        new = space.open(models, allow_pickle=allow_pickle)
        grown = space.add(
            new,
            refresh=refresh,
            old=options.one_or_many(old) if old else None,
            allow_pickle=allow_pickle,
            workspace=target.absolute().parent,
            progress=progress,
        )
        missing = None
        if old is None and not grown.report["growth"]["exact"]:
            missing = missing_originals(space, allow_pickle=allow_pickle)
        grown.save(target, force=force or output is None)
    saved = ez.load(target)
    report = saved.report
    if json:
        print_json(report)
        return
    growth = report["growth"]
    say(f"added {', '.join(growth['added'])}: {counted(report['num_models'], 'model')} in {target}")
    say(f"{growth['statement']} · {_lost(saved)}")
    say_not_in_subspace(not_in_subspace(space, new), new.names)
    say_zero_updates(new.zeros)
    if missing is not None and "imported" not in report:
        say(f"{missing.detail}. {missing.next_step}")
    render_bytes(report["bytes"])


def _lost(space: Subspace) -> str:
    """Write the loss of all models, or for an imported bundle that of the new ones, because the loss of the others is unknown."""
    from eigenzoo.subspace.coefficients import share_of

    if "imported" not in space.report:
        growth = space.report["growth"]
        bound = "at most " if growth["refreshed"] and not growth["exact"] else ""
        return f"lost: {bound}{in_percent(space.report['residual'])} of all energy"
    new = [space.coefficients(name) for name in space.report["growth"]["added"]]
    energy = sum(sum(coefficients.energies.values()) for coefficients in new)
    lost = sum(sum(coefficients.outside.values()) for coefficients in new)
    return (
        f"lost: {in_percent(share_of(lost, energy))} of the new models' energy; "
        f"the error of {space.report['imported']['tool']} for the imported models is unknown"
    )
