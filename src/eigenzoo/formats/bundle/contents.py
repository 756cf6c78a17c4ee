"""rest/ of a bundle: what rebuilt models need and no layer holds, once per content; and the templates made of it."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from eigenzoo.errors import BundleError
from eigenzoo.formats.bundle.manifest import SourceRecord
from eigenzoo.formats.carried import carried_values
from eigenzoo.formats.json_file import parse_json
from eigenzoo.formats.layout import ModelLayout
from eigenzoo.formats.model import Model
from eigenzoo.formats.opening import open_model
from eigenzoo.formats.paths import inside, read_bounded
from eigenzoo.formats.remote import is_url
from eigenzoo.formats.renaming import renamed_model
from eigenzoo.formats.safetensors.dtypes import dtype_name
from eigenzoo.formats.safetensors.file import SafetensorsFile
from eigenzoo.formats.side_files import MAX_SIDE_BYTES
from eigenzoo.formats.splitting import cut_model
from eigenzoo.formats.writers import TensorLayout, write_tensors

VALUE = "value"


class Template(ABC):
    """What makes coefficients a complete model again: its files' layout, its configs, the tensors that no layer holds.

    Attributes:
        layout: the files and their tensors.
        config: an adapter's config; None for full weights.
        metadata: per file, the header's string metadata.
        carried: names of the tensors that come unchanged.
        side_files: names of the files beside the weights.
        not_carried: what lay beside the weights and is not among them: those of weights first, the first `MAX_LEFT`.
        left_at: the URL where other tensors were left, for `read_carried` to find; empty where there are none.
    """

    layout: ModelLayout
    config: Mapping[str, Any] | None
    metadata: Mapping[str, Mapping[str, str]]
    carried: tuple[str, ...]
    side_files: tuple[str, ...]
    not_carried: tuple[str, ...] = ()
    left_at: str = ""

    @abstractmethod
    def read_carried(self, name: str) -> Tensor:
        """Read a tensor that comes unchanged."""

    @abstractmethod
    def read_side_file(self, name: str) -> bytes:
        """Read a file beside the weights."""


def tensor_id(values: Tensor) -> str:
    """Return the id of a tensor's content: the hash of its dtype, shape and bytes."""
    digest = hashlib.sha256(f"{dtype_name(values.dtype)} {list(values.shape)} ".encode())
    digest.update(values.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


class ContentStore:
    """Write contents into a folder, each once; returns the id that finds it again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put_tensor(self, values: Tensor) -> str:
        """Store a tensor under the hash of its dtype, shape and bytes."""
        layout = TensorLayout(VALUE, dtype_name(values.dtype), tuple(values.shape))
        return self._put(
            tensor_id(values),
            ".safetensors",
            lambda path: write_tensors(path, [layout], lambda _: values, {}, sync=False),
        )

    def put_bytes(self, data: bytes, suffix: str) -> str:
        """Store bytes under their hash, with a suffix that says what they are: `.json` or `.bin`."""
        return self._put(hashlib.sha256(data).hexdigest()[:32], suffix, lambda path: _write(path, data))

    def put_json(self, document: Any) -> str:
        """Store a JSON document in one canonical form."""
        return self.put_bytes(canonical_json(document), ".json")

    def _put(self, content: str, suffix: str, write: Callable[[Path], object]) -> str:
        path = self.folder / f"{content}{suffix}"
        if not path.exists():
            self.folder.mkdir(exist_ok=True)
            write(path)
        return content


def canonical_json(document: Any) -> bytes:
    """Write a JSON document in the one form that is stored and hashed."""
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def put_template(store: ContentStore, template: Template) -> dict[str, Any]:
    """Store everything of a template; returns the fields of its model's record in the manifest."""
    return {
        "layout": store.put_json(template.layout.to_json()),
        "config": None if template.config is None else store.put_json(dict(template.config)),
        "metadata": {file: dict(entries) for file, entries in template.metadata.items()},
        "side_files": {name: store.put_bytes(template.read_side_file(name), ".bin") for name in template.side_files},
        "carried": {name: store.put_tensor(template.read_carried(name)) for name in template.carried},
        "not_carried": list(template.not_carried),
    }


class StoredTemplate(Template):
    """A template read back from a bundle, lazily."""

    def __init__(
        self,
        root: Path,
        *,
        layout: str,
        config: str | None,
        metadata: Mapping[str, Mapping[str, str]],
        side_files: Mapping[str, str],
        carried: Mapping[str, str],
        not_carried: Sequence[str] = (),
        source: SourceRecord | None = None,
    ) -> None:
        self._source = source
        self._root, self._side_files, self._carried = root, side_files, carried
        self._layout, self._config = layout, config
        self.metadata = metadata
        self.carried, self.side_files, self.not_carried = tuple(carried), tuple(side_files), tuple(not_carried)

    @property
    def layout(self) -> ModelLayout:  # type: ignore[override]
        """The files and their tensors, checked on reading."""
        return _layout(self._root, self._layout)

    @property
    def config(self) -> Mapping[str, Any] | None:  # type: ignore[override]
        """An adapter's config."""
        return None if self._config is None else self._json(self._config)

    def read_carried(self, name: str) -> Tensor:
        """Read a tensor that comes unchanged: from rest/, or, of a model in a store, what was left there."""
        if name not in self._carried:
            layout = self.layout
            model = renamed_model(self._at_source(), {written: seen for seen, written in layout.names.items()})
            return carried_values(cut_model(model, layout.splits), name)
        file = SafetensorsFile(inside(self._root, f"rest/{self._carried[name]}.safetensors"))
        if VALUE not in file.tensors:
            raise BundleError(f"rest/{self._carried[name]}.safetensors has no tensor {VALUE!r}", where=str(self._root))
        values = file.read(VALUE)
        return values if tensor_id(values) == self._carried[name] else _changed(file.path)

    @property
    def left_at(self) -> str:  # type: ignore[override]
        """The model's URL."""
        return self._source.path if self._source is not None and is_url(self._source.path) else ""

    def _at_source(self) -> Model:
        """Open the model in its store again, and make sure that it is the one that was fitted."""
        assert self._source is not None
        model = _open_again(self._source.path)
        if not self._is_fitted(model):
            _open_again.cache_clear()  # it may have changed since this process opened it
            model = _open_again(self._source.path)
        if not self._is_fitted(model):
            raise BundleError(
                "the model at this path is not the one that was fitted",
                where=self._source.path,
                rule="excluded tensors stay in the store and are read from there",
                next_step="fit the zoo again; without --include and --exclude the bundle carries all tensors",
            )
        return model

    def _is_fitted(self, model: Model) -> bool:
        """Tell by sizes and times whether a model's files are those that were fitted."""
        assert self._source is not None
        for path in model.weight_files():
            name = path.relative_to(model.folder).as_posix() if path.is_relative_to(model.folder) else path.name
            status, record = path.stat(), self._source.files.get(name)
            if record is None or (status.st_size, status.st_mtime_ns) != (record.bytes, record.mtime_ns):
                return False
        return True

    def read_side_file(self, name: str) -> bytes:
        """Read a file beside the weights."""
        file = f"rest/{self._side_files[name]}.bin"
        return _bytes(self._root, file)

    def _json(self, content: str) -> dict[str, Any]:
        return _json(self._root, content)


@lru_cache(maxsize=4)
def _open_again(url: str) -> Model:
    return open_model(url)


@lru_cache(maxsize=64)
def _layout(root: Path, content: str) -> ModelLayout:
    """Read a layout, which hundreds of models have in common, once: its name is the hash of what it says."""
    return ModelLayout.from_json(_json(root, content))


def _json(root: Path, content: str) -> dict[str, Any]:
    file = f"rest/{content}.json"
    return parse_json(_bytes(root, file), where=file)


def _bytes(root: Path, file: str) -> bytes:
    data = read_bounded(inside(root, file), MAX_SIDE_BYTES, where=file)
    return data if hashlib.sha256(data).hexdigest()[:32] == Path(file).stem else _changed(root / file)


def _changed(path: Path) -> NoReturn:
    raise BundleError(
        "the content does not match the hash in its name", where=str(path), next_step="copy the whole bundle again"
    )
