"""Files beside a merged model: its certificate, and a card with its sources and their licences."""

from __future__ import annotations

import json
import os
from importlib.metadata import version
from pathlib import Path

from eigenzoo.display import in_percent, markdown_text
from eigenzoo.formats.lora.config import CONFIG_FILE
from eigenzoo.formats.remote import source_url
from eigenzoo.formats.writers import write_bytes
from eigenzoo.merge.certificate import Certificate
from eigenzoo.subspace.bundles.provenance import read_licence
from eigenzoo.zoo.zoo import Zoo

MERGED = "merged"
"""Kind of output in a merged model's record; see `formats.output.own`."""

CERTIFICATE, CARD = "merge.json", "README.md"
UNKNOWN = "unknown"


def is_adapter(path: str | os.PathLike[str]) -> bool:
    """Tell by its config whether a folder is an adapter."""
    return os.path.isfile(os.path.join(path, CONFIG_FILE))


def write_certificate(folder: Path, certificate: Certificate, zoo: Zoo, recipe: bytes | None = None) -> None:
    """Write the certificate, the card, and the recipe as it was read, if there is one."""
    document = {key: value for key, value in certificate.to_dict().items() if key not in ("seconds", "peak_memory")}
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_bytes(folder / CERTIFICATE, text.encode("utf-8"))
    write_bytes(folder / CARD, card_text(certificate, zoo).encode("utf-8"))
    if recipe is not None:
        write_bytes(folder / "merge_recipe.yml", recipe)


def card_text(certificate: Certificate, zoo: Zoo) -> str:
    """Return the card: method, sources with weights and licences, and the loss."""
    from huggingface_hub import ModelCardData

    options = ", ".join(f"{name} {value}" for name, value in certificate.options.items())
    rows = [
        f"| {markdown_text(name)} | {markdown_text(_source(zoo, index))} | {markdown_text(read_licence(model) or UNKNOWN)} "
        f"| {certificate.models[name].weight:g} | {in_percent(certificate.models[name].kept)} |"
        for index, (name, model) in enumerate(zip(zoo.names, zoo.models, strict=True))
    ]
    front = ModelCardData(
        library_name="eigenzoo", tags=["eigenzoo", "merge"], license="other", license_name="those-of-the-sources"
    )
    lines = [
        "---",
        *str(front.to_yaml()).splitlines(),
        "---",
        "",
        f"# A merge of {len(zoo)} model{'' if len(zoo) == 1 else 's'}",
        "",
        f"Made by eigenzoo {version('eigenzoo')}: method `{certificate.method}`, scale {certificate.scale:g}"
        f"{', ' + markdown_text(options) if options else ''}. The file loses "
        f"{in_percent(certificate.loss.frobenius)} of the exact merge's norm.",
        "",
        "| model | source | licence | weight | kept |",
        "|---|---|---|---|---|",
        *rows,
        "",
        f"*kept*: how much of a model's own update the merge applies. All figures: `{CERTIFICATE}`.",
        "",
    ]
    return "\n".join(lines)


def _source(zoo: Zoo, index: int) -> str:
    """A model's URL, or the last part of its path: what lies on this machine is nobody else's concern."""
    path = zoo.models[index].path
    return source_url(path) or path.name
