"""Define the options that commands share, and parse their values."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer

from eigenzoo.errors import RankError, UsageError
from eigenzoo.seeds import check_seed

if TYPE_CHECKING:
    from eigenzoo import Subspace, Zoo
    from eigenzoo.passes.workers import Workers
    from eigenzoo.records import Progress


def checked_seed(seed: int) -> int:
    """Check the option `--seed` before any work."""
    return check_seed(seed, where="--seed")


ZooArgument = Annotated[
    list[str],
    typer.Argument(
        help="The models: a folder, a glob, several paths, a .txt file of paths, URLs (s3://…, hf://…), or hub ids "
        "(org/name@revision).",
        metavar="ZOO",
        show_default=False,
    ),
]


def _not_at_a_url(bundle: str) -> str:
    """Raise for a bundle at a URL before a command does anything."""
    from eigenzoo.formats.remote.hub_bundle import bundle_id

    bundle_id(bundle)
    return bundle


BundleArgument = Annotated[
    str,
    typer.Argument(
        help="A bundle from `eigenzoo fit`, or its hub id: org/name@revision.",
        callback=_not_at_a_url,
        metavar="BUNDLE",
        show_default=False,
    ),
]
ZooOrBundleArgument = Annotated[
    list[str],
    typer.Argument(
        help="A bundle, or models: a folder, a glob, several paths, a .txt file of paths, URLs, or hub ids.",
        metavar="ZOO|BUNDLE",
        show_default=False,
    ),
]
ModelsArgument = Annotated[
    list[str],
    typer.Argument(help="Paths, URLs or hub ids of models.", metavar="MODEL...", show_default=False),
]


def output(help: str) -> Any:
    """Declare `--output` with the help text of one command."""
    return typer.Option("--output", "-o", help=help, show_default=False)


BundleOutput = Annotated[Path, output("The bundle to write.")]
View = Annotated[
    str | None,
    typer.Option(
        help="Form of weights to analyse: weight, delta (weight minus --base), update (scaled ΔW of LoRA) or factors (A and B). "
        "Default: update for adapters, delta with --base, otherwise weight.",
        show_default=False,
    ),
]
Base = Annotated[
    str | None, typer.Option(help="Checkpoint to subtract from every model (view delta).", show_default=False)
]
Axes = Annotated[
    str | None,
    typer.Option(
        help="Axes to truncate, comma-separated: models, outputs, inputs. Default: models for fit, all useful choices for plan. "
        "To store LoRA adapters in fewer bytes: outputs,inputs.",
        show_default=False,
    ),
]
Rank = Annotated[
    str | None,
    typer.Option(
        help="Directions to keep: a number, a share of the variance such as 0.95 (1.0 keeps all), auto, "
        "or one per axis: outputs=64,inputs=64. Default: auto.",
        show_default=False,
    ),
]
CoreRank = Annotated[
    str | None,
    typer.Option(
        help="Cut each model's core to this rank, with axes outputs,inputs, and store it as two small factors: a number, or auto "
        "(the cut loses no more than the sides; with --budget or --max-error chosen for each layer together with them). "
        "Default: whole cores.",
        show_default=False,
    ),
]
Center = Annotated[
    str,
    typer.Option(
        help="Center to subtract before the fit: models (their mean), columns (one mean per input), global (one mean of all "
        "values) or none."
    ),
]
Include = Annotated[
    list[str] | None,
    typer.Option(help="Analyse only layers that match this glob (repeatable): '*.attn.*'.", show_default=False),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(
        help="Leave out layers that match this glob (repeatable). A bundle carries them unchanged; for models at URLs they "
        "stay at the URL.",
        show_default=False,
    ),
]
Split = Annotated[
    list[str] | None,
    typer.Option(
        help="Split fused weights that match a glob into separate layers, in equal parts along the outputs (repeatable): "
        "'*.attn.qkv.*=q,k,v' or '…=3'.",
        metavar="RULE",
        show_default=False,
    ),
]
Dtype = Annotated[
    str, typer.Option(help="Dtype of the stored bases: float32, float64, bfloat16, float16, int8 or nf4 (four bits).")
]
CoefficientsDtype = Annotated[
    str, typer.Option(help="Dtype of the models' stored coefficients: float32, bfloat16 or float16.")
]
Device = Annotated[str, typer.Option(help="Device for matrix products: cpu, cuda or cuda:<number>.")]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        help="Memory for blocks of weights, such as 2GB. Default: a quarter of the machine's. On a cluster it is per worker; "
        "default: a few hundred MB.",
        show_default=False,
    ),
]
Cluster = Annotated[
    str | None,
    typer.Option(
        help="Run on a dask cluster: local, or the address of a scheduler, tcp://host:port.", show_default=False
    ),
]
Precision = Annotated[
    str,
    typer.Option(
        help="Precision of matrix products: high (float64), default (float32 about the mean) or fast (bfloat16, faster on "
        "GPUs only)."
    ),
]
Solver = Annotated[
    str, typer.Option(help="Solver for axes outputs and inputs: exact, or sketch (randomised, with an error bound).")
]
Cache = Annotated[
    bool, typer.Option("--cache/--no-cache", help="Read moments from the cache of earlier runs, and write them to it.")
]
Seed = Annotated[int, typer.Option(help="Seed for all random draws.", callback=checked_seed)]
NumModels = Annotated[
    int | None,
    typer.Option(
        help="Number of models to train, at most 126. Default: 72; 36 with random labels; 100 for networks from scratch.",
        show_default=False,
    ),
]
METRIC = typer.Option(
    help="Metric for rebuilt models, as module:function. It is called with the path of a saved model and returns a number. "
    "Modules in the working folder are found too.",
    show_default=False,
)
MetricArg = Annotated[
    str | None,
    typer.Option(help="Call the function once with this text; it returns the metric.", show_default=False),
]
HeldOutModels = Annotated[
    list[str] | None,
    typer.Option(
        help="Models to measure (repeatable): new ones, or the fitted ones, to see what their stored form can do. Default: hold "
        "out a fifth of the bundle's own models and fit the others again.",
        show_default=False,
    ),
]
Parent = Annotated[
    Path | None,
    typer.Option(
        help="Checkpoint from which the models were fine-tuned; it is measured too (full weights only).",
        show_default=False,
    ),
]
AllowPickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Also read .pt, .pth, .pth.tar, .bin and .ckpt files (tensors only).")
]
AllowMissing = Annotated[
    bool,
    typer.Option(
        "--allow-missing", help="Skip unreadable models, and layers that some models lack. The output counts them."
    ),
]
Missing = Annotated[
    str,
    typer.Option(
        help="LoRA modules that some adapters lack: error, or zero (treat them as zero updates). "
        "Example: --missing zero for adapters with different target modules."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Do not show progress bars.")]
Force = Annotated[
    bool,
    typer.Option("--force", help="Replace an existing output of the same kind if eigenzoo wrote every file in it."),
]


def parse_axes(text: str | None) -> tuple[str, ...] | None:
    """Read a comma-separated list of axes."""
    return None if text is None else tuple(part.strip() for part in text.split(",") if part.strip())


def parse_rank(text: str | None) -> int | float | str | dict[str, int | float | str] | None:
    """Read a rank: one rule, or one per axis.

    >>> parse_rank("16"), parse_rank("0.95"), parse_rank("outputs=64,inputs=auto")
    (16, 0.95, {'outputs': 64, 'inputs': 'auto'})
    """
    if text is None:
        return None
    if "=" not in text:
        return _parse_rule(text.strip())
    rules: dict[str, int | float | str] = {}
    for part in text.split(","):
        axis, _, rule = (word.strip() for word in part.partition("="))
        if axis in rules:
            raise UsageError(
                f"rank {text!r} names axis {axis!r} twice", where="--rank", rule="give one rank for each axis"
            )
        rules[axis] = _parse_rule(rule)
    return rules


def parse_core_rank(text: str | None) -> int | str | None:
    """Read the rank of cores: a number, or `auto`."""
    if text is None:
        return None
    rule = _parse_rule(text.strip())
    if isinstance(rule, float):
        raise RankError(f"{text!r} is not a core rank", rule="a core rank is a number of 1 or more, or 'auto'")
    return rule


def parse_rule(text: str | None) -> int | float | str:
    """Read one rank for all axes; `auto` if none is given."""
    return "auto" if text is None else _parse_rule(text.strip())


def _parse_rule(text: str) -> int | float | str:
    if text == "auto":
        return text
    try:
        return int(text) if text.lstrip("+-").isdigit() else float(text)
    except ValueError:
        raise RankError(
            f"{text!r} is not a rank",
            rule="a rank is a number, a share in (0, 1], or 'auto'",
            next_step=_as_share(text),
        ) from None


def parse_max_rank(text: str | None) -> int | Literal["full"] | None:
    """Read the largest rank of an update.

    >>> parse_max_rank("16"), parse_max_rank("full"), parse_max_rank(None)
    (16, 'full', None)
    """
    if text is None or text == "full":
        return None if text is None else "full"
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) >= 1):
        raise UsageError(
            f"{text[:40]!r} is not a largest rank",
            where="--max-lora-rank",
            rule="it is a number of 1 or more, or 'full'",
        )
    return int(text)


def _as_share(text: str) -> str:
    """Explain how to write a percentage as a share."""
    percent = re.fullmatch(r"(\d{1,2}(?:\.\d{1,6})?) ?%", text)
    return f"write {percent[1]} % as {float(percent[1]) / 100:g}" if percent else ""


def parse_bytes(text: str | None, option: str) -> int | None:
    """Read a number of bytes with its unit.

    >>> parse_bytes("1.5MB", "--budget")
    1500000
    """
    if text is None:
        return None
    from pydantic import ByteSize, TypeAdapter, ValidationError

    try:
        return int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        raise UsageError(
            f"{text!r} is not a number of bytes", where=option, rule="write 500000, 200MB or 1.5GiB"
        ) from None


@dataclass(frozen=True)
class Opening:
    """The options for opening a zoo."""

    view: View = None
    base: Base = None
    include: Include = None
    exclude: Exclude = None
    split: Split = None
    allow_pickle: AllowPickle = False
    allow_missing: AllowMissing = False
    missing: Missing = "error"

    def zoo(self, words: list[str], progress: Progress) -> Zoo:
        """Open the zoo named by a command's arguments."""
        import eigenzoo as ez

        lists = {name: getattr(self, name) or () for name in ("include", "exclude", "split")}
        return ez.open_zoo(one_or_many(words), **{**vars(self), **lists}, progress=progress)

    def zoo_or_bundle(self, words: list[str], progress: Progress) -> Zoo | Subspace:
        """Open a zoo, or a bundle, which has its own view and layers."""
        import eigenzoo as ez
        from eigenzoo.formats.remote.hub_bundle import names_a_bundle

        if len(words) > 1 or not names_a_bundle(words[0]):
            return self.zoo(words, progress)
        if self.view is not None or self.include or self.exclude or self.split or self.missing != "error":
            raise UsageError(
                "--view, --include, --exclude, --split and --missing do not apply to a bundle",
                where=words[0],
                rule="a bundle has its own view and layers",
                next_step="name the zoo instead",
            )
        return ez.load(words[0], base=self.base)


@dataclass(frozen=True)
class Running:
    """The options for where a pass over the weights runs, and for its cache."""

    device: Device = "cpu"
    max_memory: MaxMemory = None
    cluster: Cluster = None
    cache: Cache = True

    @contextmanager
    def workers(self) -> Iterator[Workers]:
        """Open a command's workers: threads of this process, or a cluster's processes."""
        from eigenzoo.passes.workers import local_workers

        num_bytes = parse_bytes(self.max_memory, "--max-memory")
        if self.cluster is None:
            with local_workers(num_bytes, self.device) as workers:
                yield workers
            return
        from eigenzoo.integrations.cluster import cluster_workers

        with cluster_workers(self.cluster, max_memory=num_bytes, device=self.device) as workers:
            yield workers


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command in which groups of options are single options, for typer."""
    groups: dict[str, Any] = {}
    declared: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
        kind = parameter.annotation
        if not is_dataclass(kind):
            declared.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        groups[name], hints = kind, get_type_hints(kind, include_extras=True)
        declared += [
            inspect.Parameter(
                field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
            )
            for field in fields(kind)
        ]

    def call(**words: Any) -> None:
        made = {
            name: kind(**{field.name: words.pop(field.name) for field in fields(kind)}) for name, kind in groups.items()
        }
        command(**words, **made)

    call.__doc__ = command.__doc__
    call.__signature__ = inspect.Signature(declared)  # type: ignore[attr-defined]
    return call


def one_or_many(zoo: list[str]) -> str | list[str]:
    """Return a single argument, which may be a folder, a glob or a list, or several as paths of models."""
    return zoo[0] if len(zoo) == 1 else zoo
