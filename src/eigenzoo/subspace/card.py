"""README.md of a bundle: its card, for people."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from eigenzoo.formats.bundle import CARD, MOMENTS, file_sizes, write_manifest
from eigenzoo.formats.manifest import Manifest
from eigenzoo.records import weighted_share


def write_card(folder: Path, manifest: Manifest) -> None:
    """Write the card: what it is, sizes, what was lost, in-sample and held-out, where the models came from."""
    report, sizes = manifest.report, manifest.report["bytes"]
    lines = [
        "---",
        "library_name: eigenzoo",
        "tags: [eigenzoo, weight-subspace]",
        "---",
        "",
        f"# A shared weight subspace of {len(manifest.models)} models",
        "",
        f"Made by eigenzoo {manifest.eigenzoo_version}: view `{manifest.view}`, axes `{', '.join(manifest.axes)}`, "
        f"center `{manifest.center}`, bases in {manifest.dtype}.",
        "",
        "| | bytes |",
        "|---|---|",
        f"| the models' files | {sizes['whole_zoo']:,} |",
        f"| this bundle, everything but the moments | {sizes['whole_bundle']:,} |",
        f"| one more model | {sizes['per_model']:,} |",
        f"| moments (optional) | {sizes['moments']:,} |",
        "",
        _break_even(sizes["break_even_models"]),
        "",
        _lost(report),
        "",
        "| model | source |",
        "|---|---|",
        *(f"| {_escape(model.name)} | {_escape(model.source.path)} |" for model in manifest.models),
        "",
        "Licences: those of the models it was made from. Rebuild one with `eigenzoo rebuild BUNDLE NAME -o DIR`.",
        "",
    ]
    (folder / CARD).write_text("\n".join(lines), encoding="utf-8")


def _break_even(num_models: int | None) -> str:
    if num_models is None:
        return "With this basis the bundle never becomes smaller than the models' files."
    return f"With this basis the bundle is smaller than the models' files from {num_models:,} models on."


def _lost(report: dict[str, Any]) -> str:
    """What was lost, in-sample and held-out, or that nobody knows."""
    if "imported" in report:
        return (
            f"Imported from {_escape(str(report['imported']['tool'])[:100])}: what that had lost of the original adapters, "
            "in-sample or held-out, its files do not say."
        )
    return f"Of the fitted models' energy, {report['residual']:.4%} is lost (in-sample). {_heldout(report)}"


def _heldout(report: dict[str, object]) -> str:
    """The mean held-out share of the variance over the layers that have one."""
    layers = report["layers"]
    assert isinstance(layers, dict)
    known = [layer for layer in layers.values() if layer["heldout"] is not None]
    if not known:
        return "Held-out error was not measured by the fit: project models that it has not seen."
    inside, outside = (weighted_share(known, key) or 0.0 for key in ("captured", "heldout"))
    return (
        f"Of the variance about the mean, the kept directions hold {inside:.1%} in-sample and {outside:.1%} of models "
        f"held out of the fit ({len(known)} of {len(layers)} layers)."
    )


def _escape(text: str) -> str:
    """Make untrusted text inert in Markdown and HTML."""
    text = "".join(char if char.isprintable() else "�" for char in text)
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]()#!|~])", r"\\\1", text)


def write_counted(folder: Path, manifest: Manifest) -> None:
    """Write manifest and card with the bundle's own bytes in them: written again until the count is that of the files."""
    for _ in range(8):
        write_manifest(folder, manifest)
        write_card(folder, manifest)
        sizes = file_sizes(folder)
        moments = sizes.pop(MOMENTS, 0)
        counted = {**manifest.report["bytes"], "moments": moments, "whole_bundle": sum(sizes.values())}
        if counted == manifest.report["bytes"]:
            return
        manifest = manifest.model_copy(update={"report": {**manifest.report, "bytes": counted}})
