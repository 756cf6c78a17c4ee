"""`eigenzoo push BUNDLE org/name`: push a bundle to the Hugging Face hub."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from eigenzoo.cli import options
from eigenzoo.cli.console import print_json, say


def command(
    bundle: options.BundleArgument,
    repo: Annotated[
        str,
        typer.Argument(help="Repository on the hub: org/name or org/name@branch.", metavar="ID", show_default=False),
    ],
    revision: Annotated[
        str | None, typer.Option(help="Branch to push to; it is created if it does not exist.", show_default=False)
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Create a new repository as private.")] = False,
    moments: Annotated[
        bool, typer.Option("--moments", help="Also push the moments, which evidence, plan and exact growth need.")
    ] = False,
    message: Annotated[str | None, typer.Option(help="First line of the commit message.", show_default=False)] = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Replace the bundle or the model card that the repository contains. A repository with other files is never "
            "replaced.",
        ),
    ] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Verify a bundle and push it to the Hugging Face hub in one commit. --force replaces another bundle in the repository."""
    import eigenzoo as ez
    from eigenzoo.formats.remote.hub_calls import endpoint
    from eigenzoo.subspace.bundles.pushing import check_push

    check_push(repo, revision)
    with _progress_bars(shown=not (quiet or json) and sys.stderr.isatty()):
        pushed = ez.load(bundle).push(
            repo, revision=revision, private=private, moments=moments, message=message, force=force
        )
    name, _, commit = pushed.partition("@")
    page = f"{endpoint()}/{name}/tree/{commit}"
    if json:
        print_json({"bundle": bundle, "id": pushed, "repo": name, "commit": commit, "url": page})
        return
    say(f"{bundle} → {page}")
    say(f"next: eigenzoo verify {pushed}")


@contextmanager
def _progress_bars(*, shown: bool) -> Iterator[None]:
    """Hide huggingface_hub's progress bars unless they are wanted, and restore its setting."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if shown or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
