"""Controls of what a zoo seems to show: one file per control, each of which returns a record; `evidence` runs them all.

The room and the function that it exists for have one name: `eigenzoo.evidence(zoo, axes=(), center="models", seed=0,
thresholds=None, view=None, base=None, include=(), exclude=(), progress=…)` calls `eigenzoo.evidence.evidence.evidence`, whose
docstring has shapes, costs and errors.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Room(ModuleType):
    """A package that can be called: importing any of its files puts the package in the place of the public function."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        from eigenzoo.evidence.evidence import evidence

        return evidence(*args, **options)


sys.modules[__name__].__class__ = _Room
