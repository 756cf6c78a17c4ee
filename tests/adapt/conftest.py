"""Zoos and bundles that several files of tests share, made when they are first asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from once import once


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


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def digits_zoo(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Zoos of six hastily trained models, each with its bundle of rank 4 in `<kind>-bundle` beside it."""
    import eigenzoo as ez
    from eigenzoo.nursery.making import make_zoo
    from eigenzoo.nursery.recipe import Schedule, plan_zoo

    def make(kind: str, root: Path) -> None:
        plan = plan_zoo(kind, 6, 0, False, False, None)
        hasty = replace(plan, schedule=replace(plan.schedule, steps=60))
        if plan.pretraining is not None:
            hasty = replace(hasty, pretraining=Schedule(200, 64, 5e-3))
        make_zoo(hasty, root / kind, False, None)
        head = ["classifier.*"] if kind == "digits-vit" else []
        ez.fit(ez.open_zoo(root / kind, exclude=head), 4).save(root / f"{kind}-bundle")

    return lambda kind: once(tmp_path_factory, f"adapt-{kind}", partial(make, kind)) / kind


@pytest.fixture(scope="session")
def text_zoo(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Five such models and their bundle of rank 3, heads left out."""
    from adapt_cases import write_text_model

    import eigenzoo as ez

    def make(kind: str, root: Path) -> None:
        for number in range(5):
            write_text_model(root / kind / f"m{number}", kind, number)
        zoo = ez.open_zoo(root / kind, exclude=["classifier.*", "score.*"])
        ez.fit(zoo, 3).save(root / f"{kind}-bundle")

    return lambda kind: once(tmp_path_factory, f"adapt-{kind}", partial(make, kind)) / kind
