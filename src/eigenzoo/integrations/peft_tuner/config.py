"""The config that PEFT saves with an adapter's coefficients: the bundle, the basis and the start of training."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eigenzoo.adapt.trained import MEAN, RANDOM, ZERO, Start, find_start
from eigenzoo.errors import BundleError, UsageError
from eigenzoo.formats.bundle.folder import is_bundle
from eigenzoo.formats.remote.hub_id import find_id
from eigenzoo.integrations.peft_tuner.registration import PeftConfig, peft_type
from eigenzoo.seeds import check_seed
from eigenzoo.subspace.bundles.loading import load
from eigenzoo.subspace.subspace import Subspace

BUNDLES = "EIGENZOO_BUNDLE"
"""Environment variable with paths of moved bundles, joined by the separator of PATH."""


@dataclass
class EigenzooConfig(PeftConfig):  # type: ignore[misc]
    """The config of an adapter with coefficients in a bundle's frozen basis.

    Attributes:
        bundle: path of the bundle, as given.
        start: see `eigenzoo.adapt.find_start`; `zero` changes nothing before training.
        target_modules: the bundle's layers to adapt, as names or a pattern like in PEFT. Default: all.
        exclude_modules: layers not to adapt.
        modules_to_save: other modules that are trained and saved whole, such as a head.
        seed: seed of start `random` and of a random basis.
        random_basis: as a control, use random directions of the same number and scale.
        prefix: the prefix of the model's names, such as `bert.`. Default: none, or else the only prefix that makes all layers names
            of the model.
        basis: the id of the basis, set when the bundle is opened, and checked when an adapter is loaded.
        modules: kind and bundle's layer of each adapted module; set and checked in the same way.

    A new path of a moved bundle is given by `PeftModel.from_pretrained(base, adapter, bundle="…")`, by `config.bundle` if a config
    is passed, or for all adapters of a process by the environment variable EIGENZOO_BUNDLE.
    """

    bundle: str | None = field(default=None)
    start: str = field(default=ZERO)
    target_modules: list[str] | str | None = field(default=None)
    exclude_modules: list[str] | str | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)
    seed: int = field(default=0)
    random_basis: bool = field(default=False)
    prefix: str | None = field(default=None)
    basis: str | None = field(default=None)
    modules: dict[str, list[str]] | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.seed = check_seed(self.seed)
        self.peft_type = peft_type()
        self.bundle = None if self.bundle is None else os.fspath(self.bundle)
        self.start = os.fspath(self.start)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str,
        subfolder: str | None = None,
        bundle: str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> EigenzooConfig:
        """Read the config of a saved adapter. `bundle` is the current path of its bundle."""
        config: EigenzooConfig = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if bundle is not None:
            config.bundle = os.fspath(bundle)
        return config


def open_bundle(config: EigenzooConfig) -> Subspace:
    """Open the bundle of a config, at its path or one in the environment variable, and set `basis`.

    Raises BundleError if there is no bundle, and with both ids if its basis is not the adapter's.
    """
    if config.bundle is None:
        raise UsageError(
            "no bundle is named", rule="an adapter needs the basis of a bundle", next_step="EigenzooConfig(bundle=…)"
        )
    path: str | Path = config.bundle
    if config.basis is not None and find_id(path) is None and not is_bundle(Path(path)):
        path = _moved(Path(path), config.basis)
    space = load(path)
    found = space.manifest.basis_id
    if config.basis not in (None, found):
        raise BundleError(
            f"the bundle has basis {found}",
            where=str(path),
            rule=f"the adapter was trained in basis {config.basis}",
            next_step=f"name the bundle of the training: bundle=…, or {BUNDLES}",
        )
    config.basis = found
    return space


def start_of(config: EigenzooConfig, space: Subspace, *, is_known: bool) -> Start:
    """Return the start of an adapter.

    A saved adapter has its coefficients in its file and does not need the model of its start.
    """
    named = config.start in (ZERO, MEAN, RANDOM, *space.names)
    if not named and is_known and (config.inference_mode or not Path(config.start).exists()):
        return Start(True, {})
    return find_start(space, config.start, config.seed)


def _moved(path: Path, basis: str) -> Path:
    """Return the bundle of this basis among those in the environment variable, if there is none at `path`."""
    found = [Path(entry) for entry in os.environ.get(BUNDLES, "").split(os.pathsep) if entry]
    for candidate in found:
        if is_bundle(candidate) and load(candidate).manifest.basis_id == basis:
            return candidate
    places = f"nor any of {BUNDLES}={os.environ[BUNDLES]}" if found else f"and {BUNDLES} is not set"
    raise BundleError(
        "there is no bundle at this path",
        where=str(path),
        rule=f"the adapter needs basis {basis}, {places}",
        next_step=f"give the current path of the bundle: bundle=…, or {BUNDLES}",
    )
