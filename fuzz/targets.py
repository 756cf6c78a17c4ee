"""The table of what is fuzzed, whole in one file.

A target is a function that makes, in an empty folder, sound inputs and a way to read one.
To add one, write a function like those below: `of_file` for a parser of a file, `Parser` for a parser of bytes.
Whatever a reader raises on purpose (`EigenzooError`) is fine; anything else is a finding.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from json import dumps as json_text
from pathlib import Path

import numpy as np
import torch

import eigenzoo as ez
from eigenzoo.adapt import adapter_file, search_state, unfinished
from eigenzoo.cli import options
from eigenzoo.errors import EigenzooError
from eigenzoo.formats.bundle.manifest import parse_manifest
from eigenzoo.formats.feature_file import read_inputs
from eigenzoo.formats.json_file import parse_json
from eigenzoo.formats.layout import ModelLayout, layout_of
from eigenzoo.formats.opening import open_model
from eigenzoo.formats.remote.address import is_url, local_path, scrubbed, shown_url, split_glob
from eigenzoo.formats.remote.hub_files import find_in_tree
from eigenzoo.formats.remote.hub_id import parse_id, parse_url
from eigenzoo.formats.remote.record import Entry, read_record, write_record
from eigenzoo.formats.remote.source import RemoteFile
from eigenzoo.formats.safetensors.file import SafetensorsFile
from eigenzoo.formats.stand_ins import stand_in as known_stand_in
from eigenzoo.subspace.bundles.provenance import read_licence
from eigenzoo.subspace.coefficient_file import FORMAT, is_coefficient_file
from eigenzoo.subspace.fitting.options import resolve_options
from eigenzoo.subspace.fitting.work import Work
from eigenzoo.subspace.moments.moments_cache import MomentsCache
from eigenzoo.weights.splits import parse_split
from eigenzoo.zoo.inspection import inspect
from eigenzoo.zoo.matching import Selection
from eigenzoo.zoo.sources import MAX_DEPTH, find_models, name_models
from fuzz import samples
from fuzz.mutations import BYTES, JSON, SAFETENSORS, TEXT


@dataclass(frozen=True)
class Parser:
    """A way to read bytes, and sound inputs for it; `kind` says how they are changed."""

    kind: str
    seeds: list[bytes]
    read: Callable[[bytes], object]

    def survives(self, data: bytes) -> bool:
        """Read an input, and tell whether it is accepted; anything but acceptance and an EigenzooError comes through."""
        try:
            self.read(data)
        except EigenzooError as error:
            str(error).encode("utf-8")
            return False
        return True


TARGETS: dict[str, Callable[[Path], Parser]] = {}


def target(make: Callable[[Path], Parser]) -> Callable[[Path], Parser]:
    """Put a function into the table under its name."""
    TARGETS[make.__name__] = make
    return make


def of_file(kind: str, path: Path, use: Callable[[], object]) -> Parser:
    """A parser of one file among others that stay sound: its contents are put in place, and `use` reads what they are part of."""

    def read(data: bytes) -> None:
        path.unlink(missing_ok=True)  # it may be a hard link
        path.write_bytes(data)
        use()

    return Parser(kind, [path.read_bytes()], read)


@target
def json(folder: Path) -> Parser:
    return Parser(JSON, [b'{"r": 8, "a": [1.5, null, "x"]}'], lambda data: parse_json(data, where="a file"))


@target
def stand_in(folder: Path) -> Parser:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
    pages = [b"\n<!DOCTYPE html><html><body>", b"<?xml version='1.0'?><Error>", b"<!-- x --><html>", b"Entry not found"]
    return Parser(BYTES, [pointer, *pages], known_stand_in)


@target
def safetensors(folder: Path) -> Parser:
    path = samples.write_file(folder / "model.safetensors", samples.weights(0))

    def use() -> None:
        file = SafetensorsFile(path)
        for name in file.tensors:
            file.read(name)

    return of_file(SAFETENSORS, path, use)


@target
def features(folder: Path) -> Parser:
    seeds = []
    for values in (np.eye(3), np.asfortranarray(np.ones((2, 3), np.uint16))):
        stream = io.BytesIO()
        np.save(stream, values)
        seeds.append(stream.getvalue())
    path = folder / "inputs.npy"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        read_inputs(path)

    return Parser(BYTES, seeds, read)


@target
def checkpoint_index(folder: Path) -> Parser:
    samples.write_shards(folder / "m")
    return of_file(
        JSON, folder / "m" / "model.safetensors.index.json", lambda: samples.read_all(open_model(folder / "m"))
    )


@target
def checkpoint_shard(folder: Path) -> Parser:
    path = samples.write_shards(folder / "m") / "model-00002-of-00002.safetensors"
    return of_file(SAFETENSORS, path, lambda: samples.read_all(open_model(folder / "m")))


@target
def checkpoint_config(folder: Path) -> Parser:
    (path,) = samples.write_models(folder, 1)
    return of_file(JSON, path / "config.json", lambda: samples.read_all(open_model(path)))


@target
def adapter_config(folder: Path) -> Parser:
    path = samples.write_adapter(folder / "m")
    return of_file(JSON, path / "adapter_config.json", lambda: samples.read_all(open_model(path)))


@target
def adapter_weights(folder: Path) -> Parser:
    path = samples.write_adapter(folder / "m")
    return of_file(SAFETENSORS, path / "adapter_model.safetensors", lambda: samples.read_all(open_model(path)))


@target
def pickle(folder: Path) -> Parser:
    path = folder / "m.pt"
    seeds = []
    for zipped in (True, False):
        for state in (samples.weights(0), samples.training_checkpoint()):
            stream = io.BytesIO()
            torch.save(state, stream, _use_new_zipfile_serialization=zipped)
            seeds.append(stream.getvalue())

    def read(data: bytes) -> None:
        path.unlink(missing_ok=True)  # the last one may still be mapped
        path.write_bytes(data)
        samples.read_all(open_model(path, allow_pickle=True))

    return Parser(BYTES, seeds, read)


@target
def pickle_index(folder: Path) -> Parser:
    path = samples.write_pickled_shards(folder / "m")
    return of_file(JSON, path, lambda: samples.read_all(open_model(folder / "m", allow_pickle=True)))


@target
def pipeline(folder: Path) -> Parser:
    path = samples.write_pipeline(folder / "m") / "model_index.json"
    return of_file(JSON, path, lambda: samples.read_all(open_model(folder / "m")))


@target
def kohya_lora(folder: Path) -> Parser:
    path = samples.write_file(folder / "m.safetensors", samples.kohya_factors())
    return of_file(SAFETENSORS, path, lambda: samples.read_all(open_model(path)))


@target
def diffusers_lora(folder: Path) -> Parser:
    path = samples.write_diffusers_lora(folder / "m.safetensors")
    return of_file(SAFETENSORS, path, lambda: samples.read_all(open_model(path)))


@target
def mlx_config(folder: Path) -> Parser:
    path = samples.write_mlx(folder / "m")
    return of_file(JSON, path / "adapter_config.json", lambda: samples.read_all(open_model(path)))


@target
def mlx_weights(folder: Path) -> Parser:
    path = samples.write_mlx(folder / "m") / "adapters.safetensors"
    return of_file(SAFETENSORS, path, lambda: samples.read_all(open_model(path)))


@target
def bare_factors(folder: Path) -> Parser:
    """A file of PEFT's factors under another name, with its config beside it."""
    path = samples.write_adapter(folder) / "adapter_model.safetensors"
    path = path.rename(folder / "style.safetensors")
    return of_file(SAFETENSORS, path, lambda: samples.read_all(open_model(path)))


@target
def fused_lora(folder: Path) -> Parser:
    """A LoRA of Flux with fused layers, beside one that has them apart."""
    path = samples.write_flux_zoo(folder)

    def use() -> None:
        for model in ez.open_zoo(folder, allow_missing=True).models:
            samples.read_all(model)

    return of_file(SAFETENSORS, path, use)


def _with_zeros(folder: Path) -> Callable[[], object]:
    """Read adapters of which one lacks a module: it gets an update of zero."""

    def use() -> None:
        for model in ez.open_zoo(folder, missing="zero", allow_missing=True).models:
            samples.read_all(model)

    return use


@target
def lacking_config(folder: Path) -> Parser:
    """The config of an adapter that lacks a module: it is written anew with that module among its targets."""
    samples.write_adapter(folder / "m0")
    path = samples.write_adapter(folder / "m1", modules=("block.q",))
    return of_file(JSON, path / "adapter_config.json", _with_zeros(folder))


@target
def lacking_weights(folder: Path) -> Parser:
    """The weights of such an adapter: a module may be trained in another way, or be there by half."""
    samples.write_adapter(folder / "m0")
    path = samples.write_adapter(folder / "m1", modules=("block.q",))
    return of_file(SAFETENSORS, path / "adapter_model.safetensors", _with_zeros(folder))


@target
def lacking_lora(folder: Path) -> Parser:
    """A LoRA of a diffusion model that lacks a layer, whose header has configs of its components."""
    samples.write_diffusers_lora(folder / "m0.safetensors")
    path = samples.write_diffusers_lora(folder / "m1.safetensors", num_layers=1)
    return of_file(SAFETENSORS, path, _with_zeros(folder))


@target
def vlora_record(folder: Path) -> Parser:
    path = samples.write_vlora(folder / "m")
    return of_file(JSON, path / "subspace_meta.json", lambda: ez.import_subspace(path, alpha=4))


@target
def vlora_values(folder: Path) -> Parser:
    path = samples.write_vlora(folder / "m")
    return of_file(SAFETENSORS, path / "subspace.safetensors", lambda: ez.import_subspace(path, alpha=4))


@target
def components_and_loadings(folder: Path) -> Parser:
    path = samples.write_components(folder / "m")
    return of_file(SAFETENSORS, path / "adapter_model.safetensors", lambda: ez.import_subspace(path, alpha=4))


@target
def hub_listing(folder: Path) -> Parser:
    names = [
        "model.safetensors",
        "config.json",
        "a/adapter_config.json",
        "a/adapter_model.bin",
        "b/c/pytorch_model.bin",
    ]

    def read(data: bytes) -> None:
        sizes = {name: size for name, size in parse_json(data, where="it").items() if type(size) is int}
        for model in find_in_tree(sizes, "", MAX_DEPTH, "it"):
            assert model.files <= {*sizes}

    return Parser(JSON, [json_text(dict.fromkeys(names, 10)).encode()], read)


@target
def readme(folder: Path) -> Parser:
    (path,) = samples.write_models(folder, 1)
    model = open_model(path)
    head = "---\nlicense: [mit, apache-2.0]\nlicense_name: x\ntags:\n- a: {b: [1, 2]}\n---\n# A model\n"
    (path / "README.md").write_text(head)
    return of_file(TEXT, path / "README.md", lambda: read_licence(model))


@target
def zoo_of_models(folder: Path) -> Parser:
    path, *_ = samples.write_models(folder)

    def use() -> None:
        zoo = ez.open_zoo(folder, allow_missing=True)
        inspect(zoo)
        ez.fit(zoo, 1, cache=False)

    return of_file(SAFETENSORS, path / "model.safetensors", use)


@target
def zoo_of_adapters(folder: Path) -> Parser:
    path, *_ = [samples.write_adapter(folder / f"m{place}", place) for place in range(3)]
    return of_file(SAFETENSORS, path / "adapter_model.safetensors", lambda: ez.fit(ez.open_zoo(folder), 1, cache=False))


@target
def zoo_of_adapters_that_lack_modules(folder: Path) -> Parser:
    """Whatever an adapter's keys say, each of the others gets an update of zero for its modules."""
    path, *_ = [samples.write_adapter(folder / f"m{place}", place) for place in range(3)]
    return of_file(
        SAFETENSORS,
        path / "adapter_model.safetensors",
        lambda: ez.fit(ez.open_zoo(folder, missing="zero"), 1, cache=False).rebuild("m1").ranks(),
    )


@target
def manifest(folder: Path) -> Parser:
    path = samples.write_bundle(folder, "tucker") / "manifest.json"
    return Parser(JSON, [path.read_bytes()], lambda data: parse_manifest(parse_json(data, where="it"), "it"))


@target
def bundle_manifest(folder: Path) -> Parser:
    path = samples.write_bundle(folder, "flat")
    return of_file(JSON, path / "manifest.json", samples.use_bundle(path))


@target
def bundle_basis(folder: Path) -> Parser:
    path = samples.write_bundle(folder, "stacked")
    return of_file(SAFETENSORS, path / "basis.safetensors", samples.use_bundle(path))


@target
def bundle_basis_of_sides(folder: Path) -> Parser:
    path = samples.write_bundle(folder, "tucker")
    return of_file(SAFETENSORS, path / "basis.safetensors", samples.use_bundle(path))


@target
def bundle_codes(folder: Path) -> Parser:
    path = samples.write_bundle(folder, "stacked", dtype="nf4")
    return of_file(SAFETENSORS, path / "basis.safetensors", samples.use_bundle(path))


@target
def bundle_codes_of_sides(folder: Path) -> Parser:
    path = samples.write_bundle(folder, "tucker", dtype="int8", coefficients_dtype="float16")
    return of_file(SAFETENSORS, path / "basis.safetensors", samples.use_bundle(path))


@target
def bundle_coefficients(folder: Path) -> Parser:
    path = samples.write_bundle(folder, "flat")
    return of_file(SAFETENSORS, path / "coefficients" / "m0.safetensors", samples.use_bundle(path))


@target
def bundle_moments(folder: Path) -> Parser:
    path = samples.write_bundle(folder, "stacked")
    return of_file(SAFETENSORS, path / "moments.safetensors", samples.use_bundle(path))


@target
def layout(folder: Path) -> Parser:
    models = [open_model(samples.write_shards(folder / "m")), open_model(samples.write_adapter(folder / "a"))]
    from eigenzoo.formats.bundle.contents import canonical_json

    seeds = [canonical_json(layout_of(model).to_json()) for model in models]
    return Parser(JSON, seeds, lambda data: ModelLayout.from_json(parse_json(data, where="it")))


@target
def adapted_coefficients(folder: Path) -> Parser:
    space = ez.load(samples.write_bundle(folder, "flat"))
    values = torch.cat([value.reshape(-1) for value in space.coefficients("m0").values.values()])
    about = {"format": FORMAT, "basis": space.manifest.basis_id, "mean": "true"}
    path = samples.write_file(folder / "a.safetensors", {"coefficients": values, "besides.head": torch.ones(2)}, about)

    def use() -> None:
        is_coefficient_file(path)
        adapter_file.read(path, space, augmented=True)
        adapter_file.read(path, space)

    return of_file(SAFETENSORS, path, use)


@target
def training_state(folder: Path) -> Parser:
    path = folder / "state"
    parameters = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2, 2))]
    optimizer = torch.optim.Adam(parameters)
    unfinished.write(path, "run", parameters, optimizer, [1.0, 0.5])
    return of_file(SAFETENSORS, path, lambda: unfinished.read(path, "run", parameters, optimizer, 5))


@target
def search(folder: Path) -> Parser:
    path = folder / "state"
    state = search_state.SearchState(torch.ones(3), [1.0, 0.5, 0.25], torch.ones(2, 3, dtype=torch.float64).numpy())
    search_state.write_state(path, "key", state)
    return of_file(SAFETENSORS, path, lambda: search_state.read_state(path, "key", 3, 3))


def _work(folder: Path) -> tuple[Path, Callable[[], object]]:
    """The unfinished work of a fit that stopped after its layers."""
    from unittest import mock

    zoo = ez.open_zoo(samples.write_models(folder / "zoo"))
    with mock.patch("eigenzoo.subspace.fitting.writing.write_moments", side_effect=KeyboardInterrupt):
        try:
            ez.fit(zoo, 2, cache=False, workspace=folder)
        except KeyboardInterrupt:
            (left,) = folder.glob(".eigenzoo-fit-*")
    return left / "layers", lambda: Work(left, list(zoo.layers.values()))


@target
def work_record(folder: Path) -> Parser:
    layers, use = _work(folder)
    return of_file(JSON, layers / "00000.json", use)


@target
def work_values(folder: Path) -> Parser:
    layers, use = _work(folder)
    return of_file(SAFETENSORS, layers / "00000.safetensors", use)


@target
def kept_moments(folder: Path) -> Parser:
    zoo = ez.open_zoo(samples.write_models(folder / "zoo"))
    space = ez.fit(zoo, 2, cache=False)
    kept = MomentsCache(zoo, folder / "cache")
    kept.put("block.weight", "models", "default", space.moments("block.weight"))
    (path,) = (folder / "cache").iterdir()
    return of_file(SAFETENSORS, path, lambda: kept.get("block.weight", "models", "default"))


@target
def mirror_record(folder: Path) -> Parser:
    entry = Entry(RemoteFile("s3://bucket", "zoo/m0", "s3://bucket/zoo/m0", 10, "tag"), 8, "0" * 64)
    write_record(folder, "s3://bucket/zoo", {"m0": entry})
    return of_file(JSON, folder / ".eigenzoo-remote.json", lambda: read_record(folder))


@target
def zoo_list(folder: Path) -> Parser:
    samples.write_models(folder, 2)
    path = folder / "zoo.txt"
    path.write_text("# a zoo\nm0\nm*\nm1/model.safetensors\n[m]?\n**\n")

    def read(data: bytes) -> None:
        # Neither the whole disk nor the network is the parser's.
        words = data.decode("utf-8", "replace")
        if (
            ".." in words
            or "://" in words
            or any(parse_id(line.strip()) for line in words.split("\n"))
            or any(line.strip()[:1] in ("/", "~") for line in words.split("\n"))
        ):
            return
        path.write_bytes(data)
        name_models([found for found in find_models(os.fspath(path)) if isinstance(found, Path)])

    return Parser(TEXT, [path.read_bytes()], read)


@target
def zoo_glob(folder: Path) -> Parser:
    samples.write_models(folder, 2)

    def read(data: bytes) -> None:
        words = data.decode("utf-8", "surrogateescape")
        if ".." not in words and "://" not in words:
            find_models([f"{folder}/{word}" for word in words.split("\n")])

    return Parser(TEXT, [b"m*", b"m0\nm1/*.safetensors", b"**", b"[!x]?"], read)


@target
def layer_globs(folder: Path) -> Parser:
    def read(data: bytes) -> None:
        include, _, exclude = data.decode("utf-8", "surrogateescape").partition("\n")
        selection = Selection("weight", tuple(include.split(",")), tuple(exclude.split(",")))
        for layer in ("model.layers.0.self_attn.q_proj.weight", "lm_head.weight", "a" * 200):
            selection.excludes(layer)

    return Parser(TEXT, [b"*.q_proj.*,norm\nlm_head*", b"[a-z]*?[!0-9]\n"], read)


@target
def command_words(folder: Path) -> Parser:
    def read(data: bytes) -> None:
        words = [*data.decode("utf-8", "surrogateescape").split("\n"), "", "", ""]
        options.parse_bytes(words[2], "--budget")
        if "=" not in words[0]:
            options.parse_rule(words[0])
        if words[3]:
            parse_split(words[3])
        rank = options.parse_rank(words[0])
        resolve_options(rank, options.parse_axes(words[1]), "models", "float32", None, None, 0)

    words = [
        "16 models 2GB *.qkv.*=q:4,k:1,v:1",
        "0.95 models,outputs 1.5GiB",
        "outputs=64,inputs=auto outputs,inputs 500000",
        "auto models 1kb",
    ]
    seeds = [line.replace(" ", "\n").encode() for line in words]
    return Parser(TEXT, seeds, read)


@target
def urls(folder: Path) -> Parser:
    def read(data: bytes) -> None:
        for word in data.decode("utf-8", "surrogateescape").split("\n"):
            parse_id(word)
            parse_url(word)
            shown_url(word)
            scrubbed(word)
            local_path(word)
            if is_url(word):
                split_glob(word)

    words = [
        "https://me:secret@host:8080/zoo/*?sig=1",
        "zip://m0::s3://b/zoo.zip",
        "file:///tmp/x",
        "hf://a/b@main/[ab]",
        "org/name/folder@refs/pr/1",
    ]
    return Parser(TEXT, [word.encode() for word in words], read)
