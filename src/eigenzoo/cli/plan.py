"""`eigenzoo plan ZOO`: compare error and bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from eigenzoo.cli import options
from eigenzoo.cli.console import print_json, print_table, progress_bar, say
from eigenzoo.display import counted, in_bytes, in_percent

if TYPE_CHECKING:
    from eigenzoo.subspace.fitting.plan import Plan


def command(
    zoo: options.ZooArgument,
    opening: options.Opening,
    running: options.Running,
    axes: options.Axes = None,
    center: options.Center = "models",
    dtype: options.Dtype = "float32",
    coefficients_dtype: options.CoefficientsDtype = "float32",
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Compare axes and ranks by error and bytes, with one pass over the weights. Writes nothing."""
    import eigenzoo as ez
    from eigenzoo.subspace.fitting.plan import check_choices

    chosen = options.parse_axes(axes)
    check_choices(chosen, center, dtype, coefficients_dtype)
    with (
        progress_bar(quiet=quiet or json) as progress,
        running.workers() as workers,
    ):
        made = ez.plan(
            opening.zoo(zoo, progress),
            axes=chosen,
            center=center,
            dtype=dtype,
            coefficients_dtype=coefficients_dtype,
            workers=workers,
            cache=running.cache,
            progress=progress,
        )
    if json:
        print_json(made.to_dict())
    else:
        render(made)


def _budget(size: int) -> str:
    """Write bytes for `--budget`, rounded up."""
    return f"{-(-size // 1000)}kB"


ABOUT = {
    "zero": "Without a bundle, each {each} cut to a lower rank by its own SVD",
    "mean": "With the models' mean stored once, each model's deviation from it cut by its own SVD",
}

WRITTEN = {
    "adapter": "Bytes are in the dtype of the files. To write one: `fit --axes models --rank 1.0`, then "
    "`rebuild --max-lora-rank R`.",
    "model": "Bytes are in the dtype of the files. No command writes such models.",
}


def _render_alone(made: Plan, each: str) -> None:
    """Print whether the control without sharing is better, its sizes, and how to write it."""
    alone = made.better_alone
    if alone is not None:
        about = " about their mean" if alone.about == "mean" else ""
        say(
            f"Cut to rank {alone.rank}{about}, the {each}s alone keep more for their bytes than any bundle in the table: "
            "by energy, sharing does not save bytes here."
        )
    for about, words in ABOUT.items():
        cuts = "; ".join(
            f"rank {row.rank}: {in_bytes(row.bytes)}, {in_percent(row.residual)} lost"
            for row in made.alone
            if row.about == about
        )
        if cuts:
            say(f"{words.format(each=each)}: {cuts}. {WRITTEN[each]}")
    if not made.alone and made.view in ("weight", "delta"):
        say("Not measured: each model cut alone by its own SVD. For weights this large it would take minutes.")


def _dtype_options(made: Plan) -> str:
    """Write the options that `fit` needs to reach the bytes of the table."""
    chosen = {"--dtype": made.dtype, "--coefficients-dtype": made.coefficients_dtype}
    return "".join(f" {option} {value}" for option, value in chosen.items() if value != "float32")


def _render_dtypes(made: Plan) -> None:
    """Say that rounding adds to the losses, or that bundles can have fewer bits."""
    if made.rounded_to:
        say(
            f"Rounding to {' and '.join(made.rounded_to)} loses more than the table says: `fit` prints the loss with it."
        )
    else:
        say("Smaller bundles: compare with `--dtype nf4 --coefficients-dtype bfloat16`, which `fit` takes too.")


def render(made: Plan) -> None:
    """Print a plan as one table."""
    say(
        f"{counted(made.num_models, 'model')}, {counted(made.num_layers, 'layer')}, "
        f"view {made.view}, {in_bytes(made.whole_zoo)} in files; "
        f"the mean alone loses {in_percent(made.mean_only_residual)} of all energy"
    )
    adapters = any(row.lora_rank is not None for row in made.rows)
    cut = any(row.core_rank is not None for row in made.rows)
    each = "adapter" if adapters else "model"
    best, alone, shown = made.recommended, made.better_alone, made.shortlist()
    columns = (
        "",
        "axes",
        "rank",
        *(["core rank"] if cut else []),
        "lost",
        "variance kept",
        "… held out",
        "bundle",
        "ratio",
        "one more model",
        "smaller from",
    )
    print_table(
        "",
        (*columns, "LoRA rank") if adapters else columns,
        [
            (
                "→" if row == best else "",
                ", ".join(row.axes),
                row.rank,
                *(["–" if row.core_rank is None else row.core_rank] if cut else []),
                ("" if row.exact else "≤ ") + in_percent(row.residual),
                in_percent(row.captured),
                in_percent(row.heldout),
                in_bytes(row.bytes),
                f"{row.ratio:.2f}×",
                in_bytes(row.per_model),
                "never" if row.break_even_models is None else counted(row.break_even_models, "model"),
                *([f"≤ {row.lora_rank}"] if adapters else []),
            )
            for row in shown
        ],
        left=3,
    )
    if made.advice:
        say(made.advice)
    if alone is not None:
        _render_alone(made, each)
    if best is not None:
        axes, dtypes = ",".join(best.axes), _dtype_options(made)
        start = "Try this first" if alone is None else "The best bundle for its bytes"
        cores = "" if best.core_rank is None else f" --core-rank {best.core_rank}"
        # A budget chooses whole cores for full weights: for the bytes of cut ones it loses more.
        auto = " --core-rank auto" if made.view == "update" and axes == "outputs,inputs" else ""
        budget = (
            f", or `--axes {axes} --budget {_budget(best.bytes)}{auto}{dtypes}`, which chooses ranks for each layer"
        )
        say(f"→ {start}: `--axes {axes} --rank {best.rank}{cores}{dtypes}`{'' if cores and not auto else budget}.")
    else:
        say(
            "No choice is recommended: none keeps a larger share of the models' differences than it takes of their bytes."
        )
    if alone is None:
        _render_alone(made, each)
    _render_dtypes(made)
    if len(shown) < len(made.rows):
        say(
            f"The table shows {len(shown)} of {len(made.rows)} choices. The others lie between these, or are larger without a "
            "smaller error. `--json` prints all."
        )
    say(
        "lost: share of all energy, in-sample; ≤ marks an upper bound. variance kept: about the mean, in-sample; "
        "held out: for models left out of the fit; –: known only after a fit. Geometry is not function: measure rebuilt models "
        "with `eigenzoo evaluate`."
    )
    if adapters:
        say(
            "LoRA rank: the rank at which `rebuild` writes an adapter, at most the largest of the zoo. `rebuild --max-lora-rank R` "
            "cuts it further; `full` writes the whole update, of which axis models adds the ranks of all models."
        )
