"""`eigenzoo push BUNDLE org/name`: a bundle to the Hugging Face hub."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from eigenzoo.cli import options
from eigenzoo.cli.console import print_json, say


def command(
    bundle: options.BundleArgument,
    repo: Annotated[
        str, typer.Argument(help="The repository: org/name or org/name@branch.", metavar="ID", show_default=False)
    ],
    revision: Annotated[
        str | None, typer.Option(help="The branch, made where there is none.", show_default=False)
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    moments: Annotated[
        bool, typer.Option("--moments", help="Push the moments too: evidence, plan and exact growth need them.")
    ] = False,
    message: Annotated[str | None, typer.Option(help="The commit's first line.", show_default=False)] = None,
    force: options.Force = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Verify a bundle and push it to the hub in one commit; what another commit holds is replaced with --force only."""
    from huggingface_hub.utils import disable_progress_bars

    import eigenzoo as ez
    from eigenzoo.formats.remote.hub_calls import endpoint
    from eigenzoo.subspace.bundles.pushing import check_push

    check_push(repo, revision)
    if quiet or json or not sys.stderr.isatty():
        disable_progress_bars()
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
