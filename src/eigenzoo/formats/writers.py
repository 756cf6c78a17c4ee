"""Writing models in their zoo's own format: checkpoints, bare state dicts and PEFT adapters.

All of them write into a folder that the caller made; that it appears whole or not at all is the caller's part.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eigenzoo.errors import DataError, FormatError, OutputError, UsageError
from eigenzoo.formats.json_file import parse_json
from eigenzoo.formats.kinds import INDEXES
from eigenzoo.formats.layout import ModelLayout, TensorLayout, layout_of
from eigenzoo.formats.lora.config import CONFIG_FILE, MAX_PATTERNS, check_config, merged_config
from eigenzoo.formats.lora.peft_folder import ATTENTION_OUT, WEIGHTS_FILE
from eigenzoo.formats.model import LoraUpdate
from eigenzoo.formats.paths import relative_name
from eigenzoo.formats.safetensors.writer import Entry, file_bytes, write_file
from eigenzoo.formats.side_files import SIDE_FILES, is_side_file

__all__ = ["ModelLayout", "TensorLayout", "all_finite", "layout_of", "write_checkpoint", "write_lora", "write_tensors"]

Mapper = Callable[[Callable[[str], Tensor], Sequence[str]], Iterable[Tensor]]
"""What calls a function with each of many names, and gives the results in their order: `map`, or threads."""

# transformers refuses a safetensors file that does not say for which framework it was saved.
DEFAULT_METADATA = {"format": "pt"}


def write_checkpoint(
    folder: Path,
    layout: ModelLayout,
    read: Callable[[str], Tensor],
    *,
    metadata: Mapping[str, Mapping[str, str]] | None = None,
    side_files: Mapping[str, bytes] | None = None,
    run: Mapper = map,
) -> None:
    """Write full weights: the layout's files with the layout's names, order and dtypes, then index and side files.

    Args:
        folder: an existing folder.
        layout: what to write.
        read: gives a tensor by its name, in the layout's shape; floating values are cast to the layout's dtype,
            all others must have it. One tensor is held at a time.
        run: calls `read` with the names of a file in their order, as `map` does; threads may read ahead.
        metadata: per file the header's string metadata; `{"format": "pt"}` where a file has none.
        side_files: contents by name, of known names only. The index is written anew unless it is among them.
    """
    if layout.format not in ("checkpoint", "state-dict", "pipeline"):
        raise UsageError(f"the layout has format {layout.format!r}", rule="only full weights can be written here")
    side_files = _checked_side_files(side_files or {}, layout)
    for file, tensors in layout.files.items():
        target = folder / relative_name(file)
        _make_parent(target)
        names = {layout.name_in(file, tensor.name): tensor.name for tensor in tensors}
        _write_file(target, tensors, names, read, (metadata or {}).get(file) or DEFAULT_METADATA, run)
    if layout.index is not None and layout.index not in side_files:
        write_bytes(folder / relative_name(layout.index), _index_bytes(layout))
    for name, data in side_files.items():
        write_bytes(folder / name, data)


def _write_file(
    path: Path,
    tensors: Sequence[TensorLayout],
    names: Mapping[str, str],
    read: Callable[[str], Tensor],
    metadata: Mapping[str, str],
    run: Mapper,
) -> None:
    """Write one file; `names` gives for each name in it, in the order of the tensors, the one that `read` knows."""
    named = [replace(tensor, name=name) for name, tensor in zip(names, tensors, strict=True)]

    def with_names(_: Callable[[str], Tensor], written: Sequence[str]) -> Iterable[Tensor]:
        return run(read, [names[name] for name in written])

    write_tensors(path, named, read, metadata, run=with_names)


@dataclass(frozen=True)
class AdapterContents:
    """The weights file of an adapter, before it is written.

    Attributes:
        tensors: in the order of the file that the adapter is like.
        values: by name.
        metadata: the header's string metadata.
        config: `adapter_config.json`; None where the file has none.
    """

    tensors: Sequence[TensorLayout]
    values: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    config: Mapping[str, Any] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return weights_bytes(self.tensors, self.metadata)


def write_lora(
    folder: Path,
    layout: ModelLayout,
    config: Mapping[str, Any],
    factors: Mapping[str, tuple[Tensor, Tensor]],
    *,
    others: Mapping[str, Tensor] | None = None,
    metadata: Mapping[str, str] | None = None,
    side_files: Mapping[str, bytes] | None = None,
    own_ranks: bool = False,
) -> None:
    """Write a PEFT adapter whose updates are B·A, the scale included in the factors.

    Args:
        folder: an existing folder.
        layout, config, factors, others, metadata, own_ranks: as in `lora_contents`.
        side_files: contents by name, of known names only.
    """
    contents = lora_contents(layout, config, factors, others=others, metadata=metadata, own_ranks=own_ranks)
    side_files = _checked_side_files(side_files or {}, layout)
    write_tensors(folder / WEIGHTS_FILE, contents.tensors, contents.values.__getitem__, contents.metadata)
    text = json.dumps(contents.config, indent=2, sort_keys=True)
    write_bytes(folder / CONFIG_FILE, text.encode("utf-8"))
    for name, data in side_files.items():
        write_bytes(folder / name, data)


def lora_contents(
    layout: ModelLayout,
    config: Mapping[str, Any],
    factors: Mapping[str, tuple[Tensor, Tensor]],
    *,
    others: Mapping[str, Tensor] | None = None,
    metadata: Mapping[str, str] | None = None,
    own_ranks: bool = False,
) -> AdapterContents:
    """Return the contents of a PEFT adapter whose updates are B·A, with alpha = r, so that PEFT's scale is 1.

    Args:
        layout: of the adapter that this one is like; gives the keys, the kernels of convolutions and the dtypes.
        config: that adapter's `adapter_config.json`; all of it is kept but rank, alpha and initialisation.
        factors: per module of the layout B (outputs, rank) and A (rank, inputs), any rank.
        others: the tensors that are no factor, by name.
        metadata: the header's string metadata.
        own_ranks: give each module its own rank, by patterns in the config. Otherwise the file has one rank, the largest, and the
            other factors are padded with zeros: some programs read no patterns.
    """
    if layout.format != "lora":
        raise UsageError(f"the layout has format {layout.format!r}", rule="only an adapter can be written here")
    check_config(config)
    if set(factors) != set(layout.updates):
        wrong = sorted(set(factors) ^ set(layout.updates))[:5]
        raise UsageError(
            f"missing or extra factors: {', '.join(wrong)}", rule="each module of the layout needs one pair of factors"
        )
    ranks = {module: max(1, factor_a.shape[0]) for module, (_, factor_a) in factors.items()}
    written = merged_config(config, max(ranks.values(), default=1))
    if own_ranks and len(ranks) <= MAX_PATTERNS:
        patterns, ranks = _rank_patterns(ranks)
        written |= patterns
    else:
        ranks = dict.fromkeys(ranks, written["r"])
    padded: dict[str, Tensor] = {}
    for module, (factor_b, factor_a) in factors.items():
        update = layout.updates[module]
        padded[update.key_a], padded[update.key_b] = _padded(update, factor_b, factor_a, ranks[module])
    values = {**(others or {}), **padded}
    (listed,) = layout.files.values()
    tensors = [
        TensorLayout(tensor.name, tensor.dtype, tuple(padded[tensor.name].shape)) if tensor.name in padded else tensor
        for tensor in listed
    ]
    missing = [tensor.name for tensor in tensors if tensor.name not in values]
    if missing or len(values) != len(tensors):
        raise UsageError(
            f"missing or extra tensors: {', '.join(missing[:5])}", rule="the layout's tensors are needed, and no others"
        )
    return AdapterContents(tensors, values, metadata or DEFAULT_METADATA, written)


def _rank_patterns(ranks: Mapping[str, int]) -> tuple[dict[str, Any], dict[str, int]]:
    """Return the entries of a config for modules of these ranks, with alpha = r, and the ranks that it gives to the modules.

    PEFT takes the first pattern that matches the end of a module's name after a dot, and a config is written with sorted keys: each
    pattern is therefore a whole name from its beginning, which matches no other module. Both projections of torch's attention have
    one name for PEFT, and get the larger rank.
    """
    names = {module: module.removesuffix(ATTENTION_OUT) for module in ranks}
    by_name: dict[str, int] = {}
    for module, name in names.items():
        by_name[name] = max(ranks[module], by_name.get(name, 1))
    rank = Counter(by_name.values()).most_common(1)[0][0] if by_name else 1
    others = {f"^{re.escape(name)}": own for name, own in by_name.items() if own != rank}
    entries = {"r": rank, "lora_alpha": rank, "rank_pattern": others, "alpha_pattern": dict(others)}
    return entries, {module: by_name[name] for module, name in names.items()}


def write_tensors(
    path: Path,
    tensors: Sequence[TensorLayout],
    read: Callable[[str], Tensor],
    metadata: Mapping[str, str],
    *,
    sync: bool = True,
    run: Mapper = map,
) -> None:
    """Write one safetensors file of known contents; wider dtypes first, as the library does, to keep them aligned.

    Without `sync` it need not be on the disk yet when this returns.
    """
    ordered, entries = _in_order(tensors)
    read_in_order = run(read, [tensor.name for tensor in ordered])
    values = (cast_to(tensor, value) for tensor, value in zip(ordered, read_in_order, strict=True))
    write_file(path, entries, values, metadata, sync=sync)


def weights_bytes(tensors: Sequence[TensorLayout], metadata: Mapping[str, str]) -> int:
    """Return how long a file is that `write_tensors` writes."""
    return file_bytes(_in_order(tensors)[1], metadata)


def _in_order(tensors: Sequence[TensorLayout]) -> tuple[list[TensorLayout], list[Entry]]:
    ordered = sorted(tensors, key=lambda tensor: -tensor.torch_dtype.itemsize)
    return ordered, [(tensor.name, tensor.torch_dtype, tensor.shape) for tensor in ordered]


def cast_to(layout: TensorLayout, values: Tensor) -> Tensor:
    """Cast values to the dtype of the layout; only floating values change, and none of them may overflow."""
    where = f"tensor {layout.name!r}"
    if tuple(values.shape) != layout.shape:
        raise FormatError(
            f"the values have shape {tuple(values.shape)}, but the tensor has shape {layout.shape}", where=where
        )
    dtype = layout.torch_dtype
    if values.dtype == dtype:
        return values
    if not (values.is_floating_point() and dtype.is_floating_point):
        raise FormatError(f"{values.dtype} values for a tensor of {dtype}", where=where, rule="counts are never cast")
    cast = values.to(dtype)
    if dtype.itemsize < values.dtype.itemsize and not all_finite(cast) and all_finite(values):
        raise DataError(f"values up to {values.abs().max().item():.3g} overflow {dtype}", where=where)
    return cast


def all_finite(values: Tensor) -> bool:
    """Tell whether no value is NaN or Inf."""
    # Eight-bit floats have no isfinite of their own.
    return bool(torch.isfinite(values if values.dtype.itemsize > 1 else values.to(torch.float32)).all())


def _padded(update: LoraUpdate, factor_b: Tensor, factor_a: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Give A and B with zeros up to the rank of the file, in the shapes they have on disk."""
    outputs, inputs = update.shape
    own = factor_a.shape[0]
    if tuple(factor_a.shape) != (own, inputs) or tuple(factor_b.shape) != (outputs, own):
        raise FormatError(
            f"B has shape {tuple(factor_b.shape)} and A {tuple(factor_a.shape)}, but the update has shape {update.shape}",
            where=f"module {update.module!r}",
        )
    shape_a, shape_b = update.factor_shapes
    wide_a, wide_b = factor_a.new_zeros(rank, inputs), factor_b.new_zeros(outputs, rank)
    wide_a[:own], wide_b[:, :own] = factor_a, factor_b
    return wide_a.reshape(rank, *shape_a[1:]), wide_b.reshape(outputs, rank, *shape_b[2:])


def write_side_files(folder: Path, side_files: Mapping[str, bytes], layout: ModelLayout) -> None:
    """Write the files beside the weights, of known names only."""
    for name, data in _checked_side_files(side_files, layout).items():
        write_bytes(folder / name, data)


def _checked_side_files(side_files: Mapping[str, bytes], layout: ModelLayout) -> Mapping[str, bytes]:
    """Only known names are written: a bundle that others made must not place files of its choice."""
    for name, data in side_files.items():
        component, inner_name = _split_component(name, layout)
        if inner_name == layout.index or (component and inner_name in INDEXES):
            entries = parse_json(data, where=name).get("weight_map")
            if entries != _weight_map(layout, component):
                raise FormatError("its weight_map does not match the files that are written", where=name[:100])
        elif not is_side_file(inner_name):
            rule = "only a pipeline has folders (one per component), and a sentence-transformers model (one per module)"
            raise FormatError(
                f"{name[:100]!r} is not a known side file",
                rule=rule if "/" in name else f"the known side files are {', '.join(sorted(SIDE_FILES))}",
            )
        elif name in layout.files:
            raise FormatError(f"{name[:100]!r} is both a side file and a weights file", where="layout")
    return side_files


def _split_component(name: str, layout: ModelLayout) -> tuple[str, str]:
    """Cut a pipeline's component off a side file's name; of any other name there is none."""
    component, slash, rest = name.partition("/")
    if slash and layout.format == "pipeline" and component.isidentifier() and not is_side_file(name):
        return component, rest
    return "", name


def _weight_map(layout: ModelLayout, component: str = "") -> dict[str, str]:
    """What the index says: in which file each tensor is; of a pipeline, that of one of its components."""
    return {
        layout.name_in(file, tensor.name): file.removeprefix(f"{component}/")
        for file, tensors in layout.files.items()
        for tensor in tensors
        if not component or file.startswith(f"{component}/")
    }


def _index_bytes(layout: ModelLayout) -> bytes:
    total = sum(tensor.nbytes for tensor in layout.tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": _weight_map(layout)}
    return (json.dumps(index, indent=2, sort_keys=True) + "\n").encode("utf-8")


def _make_parent(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot be created ({error.strerror})", where=str(path.parent)) from error


def write_bytes(path: Path, data: bytes) -> None:
    """Write a new small file, made sure of on the disk."""
    _make_parent(path)
    try:
        with path.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OutputError(f"cannot be written ({error.strerror})", where=str(path)) from error
