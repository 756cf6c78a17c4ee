"""`eigenzoo rebuild BUNDLE NAME -o DIR`: rebuild a model in its original format."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from eigenzoo.cli import options
from eigenzoo.cli.console import print_json, progress_bar, say
from eigenzoo.cli.left_behind import not_in_subspace, say_left_of_model, say_not_in_subspace
from eigenzoo.display import in_bytes, in_percent
from eigenzoo.errors import UsageError
from eigenzoo.records import finite

if TYPE_CHECKING:
    from eigenzoo.records import UpdateRanks
    from eigenzoo.subspace.coefficients import Coefficients
    from eigenzoo.subspace.rebuilt import MaxRank
    from eigenzoo.subspace.subspace import Subspace


def command(
    bundle: options.BundleArgument,
    name: Annotated[
        str,
        typer.Argument(
            help="A model of the bundle, the path of any model (projected first), or an adapter file from `eigenzoo adapt`.",
            metavar="NAME",
            show_default=False,
        ),
    ],
    output: Annotated[Path, options.output("Model to write.")],
    mean_only: Annotated[
        bool, typer.Option("--mean-only", help="Write the zoo's mean instead of the model, as a control.")
    ] = False,
    fetch: Annotated[
        bool, typer.Option("--fetch", help="Read excluded tensors from the URL that the model came from.")
    ] = False,
    base: options.Base = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="For an adapter file: the model that was adapted. Required for --start zero; otherwise it provides only the "
            "tensors that are not layers.",
            show_default=False,
        ),
    ] = None,
    like: Annotated[
        str | None,
        typer.Option(
            help="For an adapter file: the model of the bundle that provides the tensors that are not layers. Default: the "
            "first.",
            show_default=False,
        ),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(
            help="Output format of adapters: `diffusers` or `kohya` for LoRAs of diffusion models, `mlx-lm` for others. "
            "Default: the original's keys, or a PEFT adapter.",
            show_default=False,
        ),
    ] = None,
    max_lora_rank: Annotated[
        str | None,
        typer.Option(
            "--max-lora-rank",
            metavar="RANK|full",
            help="Cut each LoRA update to its best approximation of at most this rank, such as 16, and print the loss. `full` "
            "writes the whole rank. Default: the zoo's own rank, which loses no more than lies outside the subspace; for a file of "
            "`eigenzoo adapt` the whole rank.",
            show_default=False,
        ),
    ] = None,
    allow_pickle: options.AllowPickle = False,
    force: options.Force = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Rebuild one model: layers from the subspace, everything else unchanged."""
    import eigenzoo as ez
    from eigenzoo.formats.output.own import recorded
    from eigenzoo.formats.output.whole import check_free
    from eigenzoo.subspace.coefficient_file import is_coefficient_file
    from eigenzoo.subspace.rebuilt import MODEL

    max_rank = options.parse_max_rank(max_lora_rank)
    check_free(output, force=force, foreign=recorded(MODEL))
    space = ez.load(bundle, base=base)
    if name not in space.names and is_coefficient_file(Path(name)):
        if format is not None:
            raise UsageError(
                "--format does not apply to files from `eigenzoo adapt`", where=name, next_step="leave it out"
            )
        _rebuild_adapter(
            space, name, output, model, like, max_rank, mean_only=mean_only, fetch=fetch, force=force, json=json
        )
        return
    if model is not None or like is not None:
        raise UsageError(
            "--model and --like apply only to files from `eigenzoo adapt`", where=name, next_step="leave them out"
        )
    known = name in space.names or not Path(name).exists()
    with progress_bar(quiet=quiet or json) as progress:
        if known:
            coefficients = space.coefficients(name)
            original = _bytes_of(space, name)
            besides: list[str] = []
        else:
            opened = space.open(name, allow_pickle=allow_pickle)
            coefficients, original = space.project(opened, progress=progress), opened.num_bytes
            besides = not_in_subspace(space, opened)
        rebuilt = space.rebuild(coefficients, mean_only=mean_only, fetch=fetch, max_lora_rank=max_rank)
        rebuilt.save(output, force=force, format=format, progress=progress)
        ranks, written = rebuilt.ranks(), _written(output)
    if json:
        print_json(
            {
                "name": coefficients.name,
                "output": str(output),
                "mean_only": mean_only,
                "residual": None if _is_imported(space, coefficients) else finite(coefficients.residual),
                "not_in_subspace": besides,
                "not_carried": list(rebuilt.not_carried),
                "weights_not_carried": list(rebuilt.left_weights),
                **_sizes(ranks, written, original),
            }
        )
        return
    say(
        f"{'the mean, instead of ' if mean_only else ''}{coefficients.name} → {output}"
        + (_cut(ranks) if mean_only else f" · {_lost(space, coefficients, ranks)}")
    )
    if space.view == "update" and not mean_only and coefficients.residual > 1:
        say(
            "note: the base without an adapter is closer to this model: it loses 100 %. Fit with more directions, or with "
            "--axes outputs,inputs."
        )
    say_not_in_subspace(besides, [coefficients.name])
    say_left_of_model(rebuilt.not_carried, rebuilt.left_weights)
    _say_sizes(ranks, written, original, max_rank)


def _bytes_of(space: Subspace, name: str) -> int | None:
    """Return the bytes of the original weight files of a model in the bundle; None without files."""
    files = next(model.source.files for model in space.manifest.models if model.name == name)
    return sum(file.bytes for file in files.values()) or None


def _written(output: Path) -> int:
    """Return the bytes of the written weight files."""
    return sum(path.stat().st_size for path in output.rglob("*.safetensors"))


def _sizes(ranks: UpdateRanks | None, written: int, original: int | None) -> dict[str, object]:
    """Return the sizes as JSON values; `lora` is null for full weights."""
    return {
        "bytes": written,
        "original_bytes": original,
        "lora": None if ranks is None else ranks.to_dict(),
    }


def _say_sizes(ranks: UpdateRanks | None, written: int, original: int | None, max_rank: MaxRank) -> None:
    """Print the bytes, for an adapter also its rank, why it was truncated or not, and the option for the other."""
    if ranks is None:
        say(in_bytes(written) + ("" if original is None else f" (the original: {in_bytes(original)})"))
        return
    before = f"rank {ranks.original}" + ("" if original is None else f", {in_bytes(original)}")
    say(f"rank {ranks.rank}, {in_bytes(written)} (the original: {before})")
    if max_rank is not None:
        return
    if ranks.rank < ranks.whole:
        say(
            "written at the zoo's own rank: the cut loses no more than lies outside the subspace. --max-lora-rank full keeps "
            f"rank {ranks.whole}"
        )
    elif ranks.rank > ranks.original:
        say(f"to cut the rank, add --max-lora-rank {ranks.original}; it also prints the loss")


def _is_imported(space: Subspace, coefficients: Coefficients) -> bool:
    """Tell whether a model's residual is relative to another tool's rebuilt adapter, and not to the original."""
    sources = {model.name: model.source for model in space.manifest.models}
    return "imported" in space.report and coefficients.name in sources and not sources[coefficients.name].files


def _lost(space: Subspace, coefficients: Coefficients, ranks: UpdateRanks | None) -> str:
    """Write the rebuilt model's loss, including truncated updates; for an imported model the known part."""
    if _is_imported(space, coefficients):
        return (
            f"as {space.report['imported']['tool']} rebuilds it; the error against the original is unknown{_cut(ranks)}"
        )
    outside, energy = coefficients.residual, sum(coefficients.energies.values())
    if not _cut(ranks) or ranks is None or space.view != "update" or not 0 < energy < math.inf:
        return f"{in_percent(outside)} of its energy is lost{_cut(ranks)}"
    # Excluded modules are truncated too, so their energy counts here.
    total_energy = energy + sum(
        update.energy for name, update in ranks.layers.items() if name not in coefficients.energies
    )
    outside, cut = max(outside, 0.0) * energy / total_energy, ranks.lost / total_energy
    # The losses by projection and by truncation need not be orthogonal, so the triangle inequality bounds their sum.
    both = (math.sqrt(outside) + math.sqrt(cut)) ** 2
    return (
        f"at most {in_percent(min(both, 1.0))} of its energy is lost: {in_percent(outside)} outside the subspace, "
        f"{in_percent(cut)} by the cut from rank {ranks.whole}"
    )


def _cut(ranks: UpdateRanks | None) -> str:
    """Write the loss by truncating updates, or "" if none was truncated."""
    if ranks is None or ranks.rank == ranks.whole:
        return ""
    return f" · cutting from rank {ranks.whole} loses {in_percent(ranks.loss)} of the updates' energy"


def _rebuild_adapter(
    space: Subspace,
    name: str,
    output: Path,
    model: str | None,
    like: str | None,
    max_rank: MaxRank,
    *,
    mean_only: bool,
    fetch: bool,
    force: bool,
    json: bool,
) -> None:
    """Rebuild the model of an adapter file."""
    from eigenzoo.adapt.rebuilding import rebuild

    if mean_only or fetch:
        raise UsageError(
            f"{'--mean-only' if mean_only else '--fetch'} does not apply to files from `eigenzoo adapt`",
            where=name,
            next_step="leave it out",
        )
    rebuilt = rebuild(space, name, model=model, like=like, max_lora_rank=max_rank)
    rebuilt.save(output, force=force)
    ranks, written = rebuilt.ranks(), _written(output)
    if json:
        document = {"name": rebuilt.name, "output": str(output), "mean_only": False, "residual": None}
        print_json({**document, **_sizes(ranks, written, None)})
        return
    say(f"{name} → {output}{_cut(ranks)}")
    _say_sizes(ranks, written, None, max_rank)
