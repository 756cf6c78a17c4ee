"""Pages of a few kinds, made once for all tests of a folder."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from report_documents import make_document

from eigenzoo.report import render_html

KINDS: dict[str, dict[str, Any]] = {
    "subspace": {"axes": True, "warned": True},
    "nothing": {"regime": "no-shared-structure", "function": False, "sizes": False, "bundle": False, "nulls": False},
    "lineage": {"regime": "shared-lineage", "num_models": 60, "num_layers": 42},
    "hostile": {"hostile": True},
    "small": {"num_models": 5, "num_layers": 2, "still": False},
    "large": {"num_models": 500, "num_layers": 200, "regime": "shared-lineage"},
}


@cache
def made(kind: str) -> tuple[dict[str, Any], str]:
    document = make_document(**KINDS[kind])
    return document, render_html(document)


@pytest.fixture(scope="session")
def page() -> Callable[[str], tuple[dict[str, Any], str]]:
    """Document and page of a kind."""
    return made
