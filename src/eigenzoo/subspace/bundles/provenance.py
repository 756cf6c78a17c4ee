"""Collect the models' licences and the base models that adapters name, for a bundle's report."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eigenzoo.formats.model import Model
from eigenzoo.formats.paths import is_regular
from eigenzoo.formats.remote.hub_id import cached_path, hub_url, parse_id, parse_url
from eigenzoo.zoo.zoo import Zoo

KEY = "provenance"
README = "README.md"
MAX_README_BYTES = 2**18
MAX_HEAD, MAX_BRACKETS = 2**16, 500
"""Largest number of characters and brackets of a front matter. The parser's time grows with the square of the nesting."""

_LICENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+ _-]{0,60}")


def provenance(zoo: Zoo) -> dict[str, Any]:
    """Return the licences from the models' READMEs, the bases that the models name, and the options that chose the layers."""
    licences = {name: read_licence(model) for name, model in zip(zoo.names, zoo.models, strict=True)}
    return {
        "licences": {name: licence for name, licence in licences.items() if licence},
        "bases": _bases(zoo.models, zoo.base if zoo.view == "delta" else None),
        "include": list(zoo.selection.include),
        "exclude": list(zoo.selection.exclude),
    }


def joined(report: Mapping[str, Any], added: Mapping[str, Any]) -> dict[str, Any]:
    """Add the provenance of new models to that of a report."""
    old = report.get(KEY, {})
    bases = [*old.get("bases", []), *(base for base in added["bases"] if base not in old.get("bases", []))]
    return {**added, **old, "licences": {**old.get("licences", {}), **added["licences"]}, "bases": bases}


def read_licence(model: Model) -> str:
    """Return the licence in the front matter of a model's README or its repository's, or "" if there is none."""
    licence = _licence_of(model.folder / README)
    url = hub_url(model.folder) if not licence else None
    hub_id = parse_url(url) if url else None
    root = cached_path(f"hf://{hub_id.repo}@{hub_id.revision}") if hub_id else None
    return licence or (_licence_of(root / README) if root is not None else "")


def _licence_of(readme: Path) -> str:
    if not is_regular(readme) or readme.stat().st_size > MAX_README_BYTES:
        return ""
    data = _front_matter(readme.read_text(encoding="utf-8", errors="replace"))
    named = data.get("license")
    if named == "other" and isinstance(data.get("license_name"), str):
        named = data["license_name"]
    texts = [str(item).strip() for item in (named if isinstance(named, list) else [named]) if isinstance(item, str)]
    return " + ".join(texts) if texts and all(_LICENCE.fullmatch(text) for text in texts[:9]) else ""


def _front_matter(text: str) -> dict[str, Any]:
    """Read the YAML at the head of a README. YAML with aliases is not read, because a few bytes can expand to many."""
    if not text.startswith("---"):
        return {}
    from huggingface_hub.repocard import REGEX_YAML_BLOCK
    from yaml import AliasToken, YAMLError, safe_load, scan

    match = REGEX_YAML_BLOCK.search(text)
    try:
        if match is None or len(match[2]) > MAX_HEAD or match[2].count("[") + match[2].count("{") > MAX_BRACKETS:
            return {}
        if any(isinstance(token, AliasToken) for token in scan(match[2])):
            return {}
        data = safe_load(match[2])
    except (YAMLError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def _bases(models: Sequence[Model], base: Model | None) -> list[dict[str, str]]:
    """Return ids, revisions and licences of base models. Local paths are left out."""
    licences: dict[tuple[str, str], str] = {}
    if base is not None:
        url = hub_url(base.folder)
        hub_id = parse_url(url) if url else None
        if hub_id is not None:
            licences[hub_id.repo, hub_id.revision or ""] = read_licence(base)
    for model in models:
        if model.config is not None:
            named, revision = model.config.get("base_model_name_or_path"), model.config.get("revision")
            hub_id = parse_id(named)
            if hub_id is not None and not hub_id.folder and hub_id.revision is None:
                checked_id = parse_id(f"{hub_id.repo}@{revision}") if isinstance(revision, str) else None
                licences.setdefault((hub_id.repo, checked_id.revision or "" if checked_id else ""), "")
    return [{"id": repo, "revision": revision, "licence": licence} for (repo, revision), licence in licences.items()]
