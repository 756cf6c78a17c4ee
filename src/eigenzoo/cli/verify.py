"""`eigenzoo verify PATH`: check a bundle, and whether an adapter takes effect on its base."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from eigenzoo.cli import options
from eigenzoo.cli.console import print_json, print_table, progress_bar, say
from eigenzoo.display import counted
from eigenzoo.errors import EigenzooError, UsageError

if TYPE_CHECKING:
    from eigenzoo.formats.model import Model
    from eigenzoo.zoo.verification import Check, Loader, Verification

SHOWN_NOTES = 20


def command(
    path: Annotated[
        str,
        typer.Argument(
            help="A bundle from `eigenzoo fit`, or a LoRA adapter.", metavar="BUNDLE|ADAPTER", show_default=False
        ),
    ],
    against: Annotated[
        str | None,
        typer.Option(
            help="Base model of the adapters: a folder, file or URL. Check that the adapters take effect on it.",
            metavar="BASE",
            show_default=False,
        ),
    ] = None,
    dry_load: Annotated[
        bool,
        typer.Option(
            "--dry-load/--no-dry-load",
            help="Let PEFT or diffusers load names and shapes into the base. With --no-dry-load the result is undecided.",
        ),
    ] = True,
    allow_pickle: options.AllowPickle = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Check that a bundle or adapter is undamaged and, with --against, that it takes effect on its base.

    For a bundle, check checksums, finite values, orthonormal bases, and that coefficients match their layers.

    With --against, check that the library loads the whole adapter, and that the adapter changes the base's outputs.
    The exit code is 1 if a check fails, or if no library can load the adapter, so that the result is undecided.
    """
    from eigenzoo.formats.bundle.folder import MANIFEST
    from eigenzoo.formats.opening import is_model
    from eigenzoo.formats.remote import is_url
    from eigenzoo.formats.remote.hub_bundle import names_a_bundle
    from eigenzoo.formats.remote.hub_id import find_id

    adapter = is_url(path) or (is_model(path) and not (Path(path) / MANIFEST).is_file())
    if adapter or (find_id(path) is not None and not names_a_bundle(path)):
        _verify_adapter(path, against, dry_load, allow_pickle=allow_pickle, json=json, quiet=quiet or json)
        return
    if find_id(path) is None:
        _check_path(Path(path))
    _verify_bundle(path, against, dry_load, allow_pickle=allow_pickle, json=json, quiet=quiet or json)


def _check_path(path: Path) -> None:
    """Raise for a path that is neither a bundle nor a model."""
    from eigenzoo.formats.bundle.folder import MANIFEST
    from eigenzoo.formats.opening import is_model
    from eigenzoo.formats.paths import did_you_mean

    if (path / MANIFEST).is_file():
        return
    if not path.exists():
        raise UsageError(
            "there is no such file or folder", where=str(path), next_step=did_you_mean(path) or "check the name"
        )
    inner = sorted(path.iterdir()) if path.is_dir() else []
    inner_models = [entry.name for entry in inner if is_model(entry) or (entry / MANIFEST).is_file()]
    if inner_models:
        raise UsageError(
            f"this folder contains {len(inner_models)} bundles or adapters, such as {inner_models[0]!r}",
            where=str(path),
            rule="verify checks one at a time",
            next_step="name one of them",
        )
    raise UsageError(
        "this is neither a bundle nor an adapter",
        where=str(path),
        rule=f"a bundle is a folder from `eigenzoo fit` with {MANIFEST}; an adapter has adapter_config.json",
    )


def _verify_bundle(
    bundle: str, against: str | None, dry_load: bool, *, allow_pickle: bool, json: bool, quiet: bool
) -> None:
    import eigenzoo as ez
    from eigenzoo.formats.bundle.folder import MANIFEST

    base = None if against is None else _opened(against, allow_pickle)
    verification, num_models, num_layers = None, None, None
    try:
        space = ez.load(bundle)
        num_models, num_layers = len(space.names), len(space.layers)
        with progress_bar(quiet=quiet) as progress:
            verification = space.verify(against=base, loader=_loader(dry_load), progress=progress)
        faults = list(verification)
    except EigenzooError as error:
        # A bundle that cannot be loaded has failed the check. A path that is not a bundle is bad input.
        if isinstance(error, UsageError) or not (Path(bundle) / MANIFEST).is_file():
            raise
        faults = [str(error)]
    document: dict[str, Any] = {
        "bundle": bundle,
        "ok": verification.ok if verification is not None else False,
        "num_models": num_models,
        "num_layers": num_layers,
        "faults": faults,
    }
    contents = "" if num_models is None else f"{num_models} models, {num_layers} layers, "
    result = "whole"
    if verification is not None and verification.undecided:
        result += f", and undecided whether it takes effect on {verification.against}"
    elif verification is not None and verification.against is not None:
        result += f", and {'fits' if 'mean' in verification.changes else 'takes effect on'} {verification.against}"
    _tell(document, verification, f"{bundle}: {contents}", result, json=json)


def _verify_adapter(
    path: str, against: str | None, dry_load: bool, *, allow_pickle: bool, json: bool, quiet: bool
) -> None:
    import eigenzoo as ez

    if Path(path).is_file():
        from eigenzoo.subspace.coefficient_file import is_coefficient_file

        if is_coefficient_file(Path(path)):
            raise UsageError(
                "a file from `eigenzoo adapt` cannot be checked without its bundle",
                where=path,
                next_step="run `eigenzoo rebuild BUNDLE FILE -o DIR` and verify DIR",
            )
    base = None if against is None else _opened(against, allow_pickle)
    with progress_bar(quiet=quiet) as progress:
        verification = ez.verify_adapter(path, base, loader=_loader(dry_load), progress=progress)
    num_layers = sum(len(layers) for layers in verification.changes.values()) or None
    document = {
        "bundle": None,
        "ok": verification.ok,
        "num_models": 1,
        "num_layers": num_layers,
        "faults": list(verification),
    }
    contents = "" if num_layers is None else f"{num_layers} modules, "
    result = "undamaged; --against BASE checks whether it takes effect"
    if against is not None:
        result = f"{'undecided whether it ' if verification.undecided else ''}takes effect on {verification.against}"
    _tell(document, verification, f"{path}: {contents}", result, json=json)


def _opened(against: str, allow_pickle: bool) -> Model:
    from eigenzoo.formats.opening import open_model

    return open_model(against, allow_pickle=allow_pickle)


def _loader(dry_load: bool) -> Loader | None:
    if not dry_load:
        return None
    from eigenzoo.integrations.dry_loading import load_dry

    return load_dry


def _mark(check: Check) -> str:
    if not check.done:
        return "–"
    return "ok" if check.ok else "FAULT"


def group_notes(notes: Sequence[str]) -> list[str]:
    """Put notes together that differ by the model and by numbers only.

    >>> group_notes(["model a: q: changes 1.3 times", "model b: q: changes 2 times", "other dtypes"])
    ['model a: q: changes 1.3 times (and 1 note like it of other models; --json lists all)', 'other dtypes']
    """
    groups: dict[str, list[str]] = {}
    for note in notes:
        alike = re.sub(r"\d[\d.,]*", "#", re.sub(r"^model .*?: ", "", note))
        groups.setdefault(alike, []).append(note)
    return [
        group[0]
        + (
            f" (and {counted(len(group) - 1, 'note')} like it of other models; --json lists all)"
            if len(group) > 1
            else ""
        )
        for group in groups.values()
    ]


def _tell(
    document: dict[str, Any], verification: Verification | None, subject: str, result: str, *, json: bool
) -> None:
    if verification is not None:
        document = document | {key: value for key, value in verification.to_dict().items() if key not in document}
    faults = document["faults"]
    if json:
        print_json(document)
    else:
        if verification is not None:
            rows = [(_mark(check), check.name, check.detail) for check in verification.checks]
            print_table("", ("", "check", "result"), rows, left=3)
            notes = group_notes(verification.notes)
            for note in notes[:SHOWN_NOTES]:
                say(f"note: {note}")
            if len(notes) > SHOWN_NOTES:
                say(f"note: {len(notes) - SHOWN_NOTES} more notes; --json lists all")
        for fault in faults:
            say(f"fault: {fault}")
        say(subject + (result if not faults else f"faults: {len(faults)}"))
    if document["ok"] is not True:
        raise typer.Exit(1)
