"""Which files of a repository are models, and which of them are read: decided by names and sizes, before any is downloaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from eigenzoo.errors import FormatError, UnsupportedError, ZooError
from eigenzoo.formats.json_file import MAX_CONFIG_BYTES, read_json
from eigenzoo.formats.kinds import (
    INDEXES,
    PICKLE_FILE,
    PICKLE_INDEX,
    PICKLE_SUFFIXES,
    USE_OF_BUNDLE,
    WEIGHTS,
    kind_of_file,
    kind_of_folder,
    pickle_names,
    refuse_unreadable,
)
from eigenzoo.formats.lora.config import CONFIG_FILE
from eigenzoo.formats.lora.mlx_folder import MLX_FILE
from eigenzoo.formats.lora.peft_folder import PICKLE_FILE as PICKLED_ADAPTER
from eigenzoo.formats.lora.peft_folder import WEIGHTS_FILE
from eigenzoo.formats.paths import MAX_SIDE_BYTES, inside, relative_name
from eigenzoo.formats.side_files import is_carried_from, is_side_file, is_too_large
from eigenzoo.formats.tree import Listed, file_names, is_bundle, is_folder, models_at

README = "README.md"
MAX_README_BYTES = 2**20


@dataclass(frozen=True)
class HubModel:
    """One model of a repository.

    Attributes:
        path: its folder in the repository, or its file.
        kind: what `kind_of_folder` says.
        files: what is downloaded of it at first; the shards that an index names come later.
        index: the index, empty where there is none.
        error: why it cannot be read.
        left: what lies beside it and is not downloaded, named from its folder.
    """

    path: str
    kind: str
    files: frozenset[str]
    index: str = ""
    error: FormatError | None = None
    left: frozenset[str] = frozenset()

    @property
    def is_pickled(self) -> bool:
        """Whether pickles are among its files, by their names."""
        return any(name.endswith((*PICKLE_SUFFIXES, PICKLE_INDEX)) for name in self.files)


def tree_of(sizes: Mapping[str, int]) -> Listed:
    """Return the files of a repository as a tree; of each file the whole name."""
    root = Listed()
    for name in sizes:
        root.put(relative_name(name), name)
    return root


def find_in_tree(sizes: Mapping[str, int], root: str, max_depth: int, where: str) -> list[HubModel]:
    """Find the models below a folder of a repository, by the rules for folders of this machine."""
    top = tree_of(sizes).find(root)
    if top is None:
        raise FormatError(f"the repository has no folder {root!r}", where=where)
    if is_bundle(top):
        raise ZooError(
            "this is a bundle, not a zoo or a model",
            where=where,
            next_step=USE_OF_BUNDLE,
        )
    models = models_at(top, max_depth)
    return [_model(entry, sizes) if isinstance(entry, Listed) else _single(entry) for entry in models]


def _single(name: str) -> HubModel:
    return HubModel(name, kind_of_file(name) or "", frozenset({name}))


def _model(folder: Listed, sizes: Mapping[str, int]) -> HubModel:
    path, files = folder.name, file_names(folder)
    kind, prefix = kind_of_folder(set(folder.entries)) or "", f"{path}/" if path else ""
    inner = {name: entry for name, entry in folder.entries.items() if is_folder(entry)}
    listed = {*files, *(f"{above}/{name}" for above, entry in inner.items() for name in file_names(entry))}
    names = {name for name in listed if is_carried_from(name, listed) and not is_too_large(name, sizes[prefix + name])}
    index = ""
    try:
        refuse_unreadable(kind, files, "")
        if kind == "pipeline":
            raise UnsupportedError(
                "this is a diffusers pipeline on the hub",
                rule="only single components of a pipeline are read from the hub",
                next_step="name the folder of a component (org/name/unet), or download the pipeline",
            )
        if kind == "adapter":
            weights = [name for name in (WEIGHTS_FILE, PICKLED_ADAPTER, MLX_FILE) if name in files]
            names |= {CONFIG_FILE, *weights[:1]} & files
        elif kind == "checkpoint":
            weight_files = [name for name in (*WEIGHTS, *INDEXES) if name in files]
            if len(weight_files) > 1:
                raise FormatError(
                    f"found {', '.join(weight_files)}",
                    rule=f"a checkpoint has exactly one of {', '.join(WEIGHTS + INDEXES)}",
                )
            names |= set(weight_files)
            index = prefix + weight_files[0] if weight_files[0] in INDEXES else ""
        elif kind == "state-dict":
            names |= {name for name in files if name.endswith(".safetensors")}
        elif PICKLE_INDEX in files and PICKLE_FILE not in files:
            names.add(PICKLE_INDEX)
            index = prefix + PICKLE_INDEX
        else:
            names |= {PICKLE_FILE} & files or set(pickle_names(files)[:1])
        for name in names & {*filter(is_side_file, names), CONFIG_FILE, *INDEXES, PICKLE_INDEX}:
            limit = MAX_SIDE_BYTES if is_side_file(name) else MAX_CONFIG_BYTES
            if sizes[prefix + name] > limit:
                raise FormatError(
                    f"{name!r} has {sizes[prefix + name]} bytes", rule=f"such a file has at most {limit} bytes"
                )
    except FormatError as error:
        return HubModel(path, kind, frozenset(), error=error)
    # What its author says of it: for the licence.
    names |= {name for name in files & {README} if sizes[prefix + name] <= MAX_README_BYTES}
    wanted = frozenset(prefix + name for name in names)
    return HubModel(path, kind, wanted, index, left=frozenset(listed - names))


def needed_files(model: HubModel, folder: Path, sizes: Mapping[str, int]) -> set[str]:
    """Return the shards that a model's downloaded index names, each a file of the repository."""
    if not model.index:
        return set()
    entries = read_json(inside(folder / model.path, Path(model.index).name), where=model.index).get("weight_map")
    names = {str(shard) for shard in entries.values()} if isinstance(entries, dict) else set()
    prefix = f"{model.path}/" if model.path else ""
    for shard in names:
        if prefix + relative_name(shard) not in sizes:
            raise FormatError(f"the repository has no shard {shard[:100]!r}", where=model.index)
    return {prefix + shard for shard in names}
