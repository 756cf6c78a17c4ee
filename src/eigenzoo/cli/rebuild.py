"""`eigenzoo rebuild BUNDLE NAME -o DIR`: a model back, in the format it came in."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from eigenzoo.cli import options
from eigenzoo.cli.console import in_percent, print_json, progress_bar, say
from eigenzoo.errors import UsageError
from eigenzoo.records import finite

if TYPE_CHECKING:
    from eigenzoo.subspace.coefficients import Coefficients
    from eigenzoo.subspace.subspace import Subspace


def command(
    bundle: options.BundleArgument,
    name: Annotated[
        str,
        typer.Argument(
            help="A model of the bundle; the path of any model, which is projected first; or a file that `eigenzoo adapt` wrote.",
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
    model: Annotated[
        str | None,
        typer.Option(
            help="Of an adapter file: the model that was adapted. Needed for start zero; else it only gives what is no layer.",
            show_default=False,
        ),
    ] = None,
    like: Annotated[
        str | None,
        typer.Option(
            help="Of an adapter file: the model of the bundle that gives what is no layer; by default the first.",
            show_default=False,
        ),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(
            help="Of a LoRA of a diffusion model: write it with the keys of `diffusers` or `kohya`; of another adapter: `mlx-lm`.",
            show_default=False,
        ),
    ] = None,
    allow_pickle: options.AllowPickle = False,
    force: options.Force = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Rebuild one model: layers from the subspace, everything else as it was."""
    import eigenzoo as ez
    from eigenzoo.adapt.adapter_file import is_adapter_file
    from eigenzoo.formats.output.own import recorded
    from eigenzoo.formats.output.whole import check_free
    from eigenzoo.subspace.rebuilt import MODEL

    check_free(output, force=force, foreign=recorded(MODEL))
    space = ez.load(bundle, base=base)
    if name not in space.names and is_adapter_file(Path(name)):
        if format is not None:
            raise UsageError("--format is not for files of `eigenzoo adapt`", where=name, next_step="leave it out")
        _rebuild_adapter(space, name, output, model, like, mean_only=mean_only, fetch=fetch, force=force, json=json)
        return
    if model is not None or like is not None:
        raise UsageError("--model and --like are for files of `eigenzoo adapt`", where=name)
    known = name in space.names or not Path(name).exists()
    with progress_bar(quiet=quiet or json) as progress:
        if known:
            coefficients = space.coefficients(name)
        else:
            coefficients = space.project(space.open(name, allow_pickle=allow_pickle), progress=progress)
        rebuilt = space.rebuild(coefficients, mean_only=mean_only, fetch=fetch)
        rebuilt.save(output, force=force, format=format, progress=progress)
    if json:
        print_json(
            {
                "name": coefficients.name,
                "output": str(output),
                "mean_only": mean_only,
                "residual": None if _is_imported(space, coefficients) else finite(coefficients.residual),
            }
        )
        return
    say(
        f"{'the mean, in the place of ' if mean_only else ''}{coefficients.name} → {output}"
        + ("" if mean_only else f" · {_lost(space, coefficients)}")
    )


def _is_imported(space: Subspace, coefficients: Coefficients) -> bool:
    """Whether a model's residual is against what another tool rebuilt, and not against the original."""
    sources = {model.name: model.source for model in space.manifest.models}
    return "imported" in space.report and coefficients.name in sources and not sources[coefficients.name].files


def _lost(space: Subspace, coefficients: Coefficients) -> str:
    """What the rebuilt model lacks; of an imported one, what is known of that."""
    if _is_imported(space, coefficients):
        return f"as {space.report['imported']['tool']} rebuilds it; what that had lost is not known"
    return f"{in_percent(coefficients.residual)} of its energy is lost"


def _rebuild_adapter(
    space: Subspace,
    name: str,
    output: Path,
    model: str | None,
    like: str | None,
    *,
    mean_only: bool,
    fetch: bool,
    force: bool,
    json: bool,
) -> None:
    """Rebuild the model that an adapter file stands for."""
    from eigenzoo.adapt.rebuilding import rebuild

    if mean_only or fetch:
        raise UsageError(
            f"{'--mean-only' if mean_only else '--fetch'} is not for files of `eigenzoo adapt`",
            where=name,
            next_step="leave it out",
        )
    rebuilt = rebuild(space, name, model=model, like=like)
    rebuilt.save(output, force=force)
    if json:
        print_json({"name": rebuilt.name, "output": str(output), "mean_only": False, "residual": None})
        return
    say(f"{name} → {output}")
