"""The template of a model in a zoo."""

from __future__ import annotations

from torch import Tensor

from eigenzoo.formats.bundle.contents import Template
from eigenzoo.formats.bundle.manifest import MAX_LEFT
from eigenzoo.formats.layout import layout_of
from eigenzoo.formats.model import Model
from eigenzoo.formats.remote import remote_url
from eigenzoo.formats.side_files import listed_first
from eigenzoo.zoo.zoo import Zoo


class ZooTemplate(Template):
    """What makes coefficients of one of a zoo's models a complete model again, read from the model's own files."""

    def __init__(self, zoo: Zoo, index: int) -> None:
        self._zoo, self._index = zoo, index
        self._model: Model = zoo.models[index]
        self.layout = layout_of(self._model)
        self.config = self._model.config
        self.metadata = self._model.metadata
        self.carried = zoo.carried(index)
        self.left_at = remote_url(self._model.path) or ""
        self.side_files = self._model.side_files
        self.not_carried = listed_first(self._model.beside, MAX_LEFT)

    def read_carried(self, name: str) -> Tensor:
        """Read a tensor that comes unchanged."""
        return self._zoo.read_carried(self._index, name)

    def read_side_file(self, name: str) -> bytes:
        """Read a file beside the weights."""
        return self._model.read_side_file(name)
