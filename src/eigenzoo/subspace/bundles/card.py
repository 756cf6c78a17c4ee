"""Write a bundle's card: its README.md, with the front matter that the hub reads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from eigenzoo.display import markdown_text
from eigenzoo.errors import EigenzooError
from eigenzoo.formats.bundle.folder import (
    CARD,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    MOMENTS,
    file_sizes,
    foreign_files,
    write_manifest,
)
from eigenzoo.formats.bundle.manifest import Manifest, SourceRecord, parse_manifest
from eigenzoo.formats.bundle.snapshot import ATTEMPTS, Snapshot
from eigenzoo.formats.json_file import read_json
from eigenzoo.formats.remote.hub_id import parse_id, parse_url
from eigenzoo.records import weighted_share
from eigenzoo.subspace.bundles.provenance import KEY

UNKNOWN = "unknown"
MAX_NAMED = 6
"""Largest number of sources that the card's command lists."""

_SPDX = re.compile(r"[a-z0-9][a-z0-9.+-]{0,40}")
_PLAIN_WORD = re.compile(r"[A-Za-z0-9_./@:=,+-]{1,300}")


def write_card(folder: Path, manifest: Manifest) -> None:
    """Write the card beside the manifest."""
    (folder / CARD).write_text(card_text(manifest), encoding="utf-8")


def foreign_to_a_bundle(folder: Path) -> str:
    """Return the name of a file that is not part of the folder's bundle, or of the card if it was edited; "" if there is none.

    A card of another version of eigenzoo has another text and counts as not edited. If another process replaces the bundle
    meanwhile, the new one is checked.
    """
    for attempt in range(1, ATTEMPTS + 1):
        snapshot = Snapshot.of(folder)
        try:
            foreign = _foreign(folder)
        except FileNotFoundError:
            if snapshot.is_current or attempt == ATTEMPTS:
                raise
            continue
        if not foreign or snapshot.is_current:
            break
    return foreign


def _foreign(folder: Path) -> str:
    foreign = foreign_files(folder)
    if foreign or not (folder / CARD).is_file():
        return foreign
    try:
        manifest = parse_manifest(
            read_json(folder / MANIFEST, where=MANIFEST, max_bytes=MAX_MANIFEST_BYTES), str(folder)
        )
    except EigenzooError:
        return ""  # A damaged bundle may be replaced.
    text = (folder / CARD).read_bytes()
    is_edited = manifest.eigenzoo_version == version("eigenzoo") and text != card_text(manifest).encode("utf-8")
    return f"holds {CARD!r}, which was changed since eigenzoo wrote it" if is_edited else ""


def card_text(manifest: Manifest) -> str:
    """Return the card: summary, sizes, in-sample and held-out loss, and the models' sources."""
    report, sizes = manifest.report, manifest.report["bytes"]
    licences = _licences(manifest)
    lines = [
        "---",
        *_front_matter(manifest, licences).splitlines(),
        "---",
        "",
        f"# A shared weight subspace of {len(manifest.models)} model{'' if len(manifest.models) == 1 else 's'}",
        "",
        f"Made by eigenzoo {manifest.eigenzoo_version}: view `{manifest.view}`, axes `{', '.join(manifest.axes)}`, "
        f"center `{manifest.center}`, bases in {manifest.dtype}{_coefficients(manifest)}{_core_ranks(manifest)}.",
        "",
        "```bash",
        *_commands(manifest),
        "```",
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
        *_base_lines(manifest),
        "| model | source |",
        "|---|---|",
        *(f"| {markdown_text(model.name)} | {markdown_text(model.source.path)} |" for model in manifest.models),
        "",
        "## Licences",
        "",
        "Those of the models it was made from, as their own READMEs say them; they hold for what is rebuilt, and for the basis.",
        "",
        "| licence | models |",
        "|---|---|",
        *(f"| {markdown_text(licence)} | {markdown_text(', '.join(names))} |" for licence, names in licences.items()),
        "",
        "Rebuild one with `eigenzoo rebuild BUNDLE NAME -o DIR`.",
        "",
    ]
    return "\n".join(lines)


def _core_ranks(manifest: Manifest) -> str:
    """Say to which ranks cores are cut."""
    ranks = sorted({layer.ranks["cores"] for layer in manifest.layers if "cores" in layer.ranks})
    if not ranks:
        return ""
    shown = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    return f", each model's cores cut to rank {shown} and kept as two factors"


def _front_matter(manifest: Manifest, licences: Mapping[str, list[str]]) -> str:
    from huggingface_hub import ModelCardData

    tags = ["eigenzoo", "weight-subspace"]
    bases = list(dict.fromkeys(base["id"] for base in _bases(manifest)))
    options: dict[str, Any] = {}
    if bases:
        options["base_model"] = bases[0] if len(bases) == 1 else bases
        options["base_model_relation"] = "adapter" if manifest.view in ("update", "factors") else "finetune"
    licences_named = set(licences) | {base["licence"] for base in _bases(manifest) if base["licence"]}
    (only, *others) = sorted(licences_named)
    options["license"] = only if not others and _SPDX.fullmatch(only) else "other"
    if options["license"] == "other":
        options["license_name"] = "those-of-the-sources"
    return str(ModelCardData(library_name="eigenzoo", tags=tags, **options).to_yaml())


def _licences(manifest: Manifest) -> dict[str, list[str]]:
    """Return the names of the models under each licence, the unknown licence last."""
    licence_of = manifest.report.get(KEY, {}).get("licences", {})
    names_by_licence: dict[str, list[str]] = {}
    for model in manifest.models:
        names_by_licence.setdefault(str(licence_of.get(model.name) or UNKNOWN), []).append(model.name)
    return dict(sorted(names_by_licence.items(), key=lambda item: (item[0] == UNKNOWN, item[0]))) or {UNKNOWN: []}


def _bases(manifest: Manifest) -> list[dict[str, str]]:
    """Return the records of base models. Records that are not well formed are left out."""
    return [
        {key: str(base.get(key, "")) for key in ("id", "revision", "licence")}
        for base in manifest.report.get(KEY, {}).get("bases", [])
        if isinstance(base, dict) and parse_id(base.get("id")) is not None
    ]


def _base_lines(manifest: Manifest) -> list[str]:
    lines = [
        f"Base model: {markdown_text(base['id'])}, revision {markdown_text(base['revision'] or 'not said')}, "
        f"licence {markdown_text(base['licence'] or 'not read')}."
        for base in _bases(manifest)
    ]
    return [*lines, ""] if lines else []


def _coefficients(manifest: Manifest) -> str:
    """Name the dtype of coefficients where it is not the default."""
    return "" if manifest.coefficients_dtype == "float32" else f", coefficients in {manifest.coefficients_dtype}"


def _commands(manifest: Manifest) -> list[str]:
    """Return the commands that make such a bundle: a fit, or an import, and growth."""
    if "imported" not in manifest.report:
        return [_fit_command(manifest)]
    growth = manifest.report.get("growth")
    lines = ["eigenzoo import FOLDER --like ADAPTER -o BUNDLE"]
    if isinstance(growth, dict):
        lines.append("eigenzoo add BUNDLE MODEL…" + (" --refresh" if growth.get("refreshed") is True else ""))
    return lines


def _fit_command(manifest: Manifest) -> str:
    """Return the command of the fit. Local paths are replaced by placeholders."""
    options, provenance = manifest.options, manifest.report.get(KEY, {})
    ids = list(dict.fromkeys(_hub_id(model.source) for model in manifest.models))
    zoo = ids if len(ids) <= MAX_NAMED and "" not in ids else ["ZOO"]
    words = ["eigenzoo", "fit", *zoo, "--view", manifest.view]
    if manifest.base is not None:
        words += ["--base", _hub_id(manifest.base) or "BASE"]
    words += ["--axes", ",".join(manifest.axes), "--center", manifest.center, "--dtype", manifest.dtype]
    if manifest.coefficients_dtype != "float32":
        words += ["--coefficients-dtype", manifest.coefficients_dtype]
    chosen = [("--budget", options["budget"]), ("--max-error", options["max_error"])]
    rules = dict(options["rules"])
    chosen.append(("--core-rank", rules.pop("cores", None)))
    if all(value is None for _, value in chosen[:2]):
        words += ["--rank", ",".join(f"{axis}={rule}" for axis, rule in rules.items())]
    for option, value in (*chosen, ("--solver", options.get("solver")), ("--precision", options.get("precision"))):
        words += [option, str(value)] if value is not None else []
    for option in ("include", "exclude"):
        patterns = provenance.get(option)
        for pattern in patterns if isinstance(patterns, list) else []:
            words += [f"--{option}", f"'{pattern}'" if re.fullmatch(r"[\w.*?\[\]-]{1,200}", str(pattern)) else "…"]
    words += ["--seed", str(options["seed"]), "-o", "BUNDLE"]
    return " ".join(word if _PLAIN_WORD.fullmatch(word) or word[:1] in ("'", "…") else "…" for word in words)


def _hub_id(source: SourceRecord) -> str:
    hub_id = parse_url(source.path)
    return str(hub_id) if hub_id is not None and _PLAIN_WORD.fullmatch(str(hub_id)) else ""


def _break_even(num_models: int | None) -> str:
    if num_models is None:
        return "With this basis the bundle never becomes smaller than the models' files."
    return f"With this basis the bundle is smaller than the models' files from {num_models:,} models on."


def _lost(report: dict[str, Any]) -> str:
    """Return the sentences about the loss, in-sample and held-out, or that it is unknown."""
    if "imported" in report:
        return (
            f"Imported from {markdown_text(str(report['imported']['tool'])[:100])}: what that had lost of the original adapters, "
            "in-sample or held-out, its files do not say."
        )
    return f"Of the fitted models' energy, {report['residual']:.4%} is lost (in-sample). {_heldout(report)}"


def _heldout(report: dict[str, object]) -> str:
    """Return the sentence about the held-out share of the variance, over the layers that have one."""
    layers = report["layers"]
    assert isinstance(layers, dict)
    measured = [layer for layer in layers.values() if layer["heldout"] is not None]
    if not measured:
        return "Held-out error was not measured by the fit: project models that it has not seen."
    inside, outside = (weighted_share(measured, key) or 0.0 for key in ("captured", "heldout"))
    return (
        f"Of the variance about the mean, the kept directions hold {inside:.1%} in-sample and {outside:.1%} of models "
        f"held out of the fit ({len(measured)} of {len(layers)} layers)."
    )


def write_counted(folder: Path, manifest: Manifest) -> None:
    """Write manifest and card, which contain the bundle's size. They are written again until it is that of the files."""
    for _ in range(8):
        write_manifest(folder, manifest)
        write_card(folder, manifest)
        sizes = file_sizes(folder)
        moments = sizes.pop(MOMENTS, 0)
        counted = {**manifest.report["bytes"], "moments": moments, "whole_bundle": sum(sizes.values())}
        if counted == manifest.report["bytes"]:
            return
        manifest = manifest.model_copy(update={"report": {**manifest.report, "bytes": counted}})
