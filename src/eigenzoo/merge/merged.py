"""A merged adapter: its updates as they are written, and its certificate."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from eigenzoo.errors import UsageError
from eigenzoo.formats.adapter_writer import OTHER_FORMATS, write_adapter
from eigenzoo.formats.bundle.contents import Template
from eigenzoo.formats.output.own import recorded, write_record
from eigenzoo.formats.output.whole import new_folder
from eigenzoo.linalg.lora import Factors
from eigenzoo.merge.certificate import Certificate
from eigenzoo.merge.files import MERGED, write_certificate
from eigenzoo.merge.interference import Interference
from eigenzoo.records import Progress, no_progress
from eigenzoo.zoo.zoo import Zoo


class Merged:
    """Adapters merged into one.

    Attributes:
        certificate: what the merge lost, and what is left of each source.
        interference: how much the updates get in each other's way, where it was asked for.
        recipe: the recipe, which is written beside the adapter, if there was one.
    """

    recipe: bytes | None = None

    def __init__(
        self,
        zoo: Zoo,
        template: Template,
        factors: Mapping[str, Factors],
        others: Mapping[str, Tensor],
        certificate: Certificate,
        interference: Interference | None = None,
        *,
        own_ranks: bool = False,
    ) -> None:
        self._zoo, self._template, self._factors, self._others = zoo, template, factors, others
        self.certificate, self.interference, self._own_ranks = certificate, interference, own_ranks

    def __repr__(self) -> str:
        return f"Merged({self.certificate!r})"

    def factors(self, layer: str) -> Factors:
        """Return one merged update as (B, A) as a reader of the file gets them, with the scale in B."""
        return self._factors[layer]

    def save(
        self,
        folder: str | os.PathLike[str],
        *,
        force: bool = False,
        format: str | None = None,
        progress: Progress = no_progress,
    ) -> Path:
        """Write the adapter in the format of the first source, with α = r, into a new folder, and return the folder.

        It appears complete or not at all. `force` replaces a folder that contains only a merged model, unchanged. `format`
        chooses other keys, as in `RebuiltModel.save`.
        """
        kind = self._template.layout.format
        if format is not None and format not in OTHER_FORMATS.get(kind, ()):
            raise UsageError(f"format {format[:40]!r} for a {kind}", next_step="leave it out")
        with new_folder(Path(folder), force=force, foreign=recorded(MERGED)) as staging:
            write_adapter(staging, self._template, self._factors, self._others, format, own_ranks=self._own_ranks)
            write_certificate(staging, self.certificate, self._zoo, self.recipe)
            write_record(staging, MERGED)
        return Path(folder)
