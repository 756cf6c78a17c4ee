"""A diffusers pipeline: `model_index.json` and a folder per component, such as `unet/`, `vae/` and `text_encoder/`.

Every component that has weights is read as the checkpoint that it is, and its tensors are called by its name:
`unet.conv_in.weight` is `conv_in.weight` in `unet/`. Components without weights (scheduler, tokenizer) are side files.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from weakref import WeakValueDictionary

from eigenzoo.errors import FormatError, UnsupportedError
from eigenzoo.formats.checkpoint import Checkpoint, SafetensorsModel, StateDict
from eigenzoo.formats.json_file import read_json
from eigenzoo.formats.kinds import FILE_SUFFIXES, MODEL_INDEX, WEIGHTS, kind_of_folder
from eigenzoo.formats.paths import final_name, inside, list_folder, relative_name
from eigenzoo.formats.safetensors.file import SafetensorsFile
from eigenzoo.formats.safetensors.header import HeaderContents
from eigenzoo.formats.side_files import Beside, list_side_files

MAX_COMPONENTS = 64


class Pipeline(SafetensorsModel):
    """A folder as diffusers' `save_pretrained` of a pipeline writes it.

    A component whose only weights are of a variant (`diffusion_pytorch_model.fp16.safetensors`) is read by that file, and
    written to it again.

    Attributes:
        components: the names of the components that have weights, in the order of the index.
    """

    format = "pipeline"

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.name = final_name(self.path)
        files: dict[str, SafetensorsFile] = {}
        try:
            listed = _listed_components(self.path)
            beside = list_side_files(self.path, frozenset(listed))
            for component in listed:
                beside += self._open_component(component, files).below(component)
            if not files:
                raise FormatError(
                    "no component has weights",
                    rule=f"components are the folders that {MODEL_INDEX} names",
                    next_step="download them too",
                )
        except FormatError as error:
            raise error.at(str(self.path)) from error.__cause__
        self.take_beside(beside)
        self.components = tuple(dict.fromkeys(file.partition("/")[0] for file in files))
        self.take_files(files)

    def _open_component(self, component: str, files: dict[str, SafetensorsFile]) -> Beside:
        """Add a component's files; returns what lies beside them."""
        folder = self.path / component
        names = list_folder(folder)
        kind = kind_of_folder(names)
        try:
            if kind is None and not any(name.endswith(FILE_SUFFIXES) for name in names):
                return list_side_files(folder, frozenset())
            _refuse_component(kind)
            model = Checkpoint(folder) if kind == "checkpoint" else StateDict(folder)
        except FormatError as error:
            raise error.at(f"component {component!r}") from error.__cause__
        for name, file in model.files.items():
            path = f"{component}/{name}"
            files[path] = file.seen_as(_named_contents(file.contents, component, path))
        return model.beside


def _listed_components(folder: Path) -> list[str]:
    """The components that the index names and that are there as folders of this folder."""
    entries = read_json(inside(folder, MODEL_INDEX), where=MODEL_INDEX)
    # A component is [library, class], or [null, null] where the pipeline goes without it.
    named = [name for name, value in entries.items() if isinstance(value, list) and value and value[0] is not None]
    if len(named) > MAX_COMPONENTS:
        raise FormatError(
            f"the pipeline has {len(named)} components", where=MODEL_INDEX, rule=f"at most {MAX_COMPONENTS} are read"
        )
    for name in named:
        relative_name(name)
        if not name.isidentifier():
            raise FormatError(
                f"a component is called {name[:100]!r}", where=MODEL_INDEX, rule="the name must be a Python identifier"
            )
    return [name for name in named if inside(folder, name).is_dir()]


def _refuse_component(kind: str | None) -> None:
    """Refuse a component with weights that cannot be read as one checkpoint."""
    if kind in ("pickle", "pickle-shards"):
        raise UnsupportedError(
            "the weights are a Python pickle",
            rule="the components of a pipeline are read only from safetensors",
            next_step="load the pipeline with diffusers and save it with save_pretrained, which writes safetensors",
        )
    if kind not in ("checkpoint", "state-dict"):
        raise UnsupportedError(
            "there are no weights in a readable format" if kind != "shards" else "the weights are shards of a variant",
            rule=f"a component has {' or '.join(WEIGHTS)}, its index with the shards, or one .safetensors file of a variant",
            next_step="load the pipeline with diffusers, with variant=… if it has one, and save it without by save_pretrained",
        )


# One object for all files that agree, as their headers are; each holds the header that it was made of.
_cached: WeakValueDictionary[tuple[int, str], HeaderContents] = WeakValueDictionary()


def _named_contents(contents: HeaderContents, component: str, file: str) -> HeaderContents:
    """The same contents with the component's name before the tensors' own."""
    named_contents = _cached.get((id(contents), file))
    if named_contents is None:
        infos = {
            f"{component}.{name}": replace(info, name=f"{component}.{name}", file=file)
            for name, info in contents.tensors.items()
        }
        positions = {f"{component}.{name}": position for name, position in contents.positions.items()}
        named_contents = HeaderContents(
            MappingProxyType(infos), MappingProxyType(positions), contents.metadata, made_of=contents
        )
        _cached[id(contents), file] = named_contents
    return named_contents
