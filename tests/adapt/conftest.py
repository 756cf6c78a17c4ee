"""Zoos and bundles that several files of tests share, made when they are first asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """Gives a case of `peft_models.FITS` by its name."""
    from peft_models import make

    root, zoos, bundles = tmp_path_factory.mktemp("peft"), {}, {}

    def get(name: str) -> Any:
        if name not in bundles:
            bundles[name] = make(root, name, zoos)
        return bundles[name]

    return get
