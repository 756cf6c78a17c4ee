"""eigenzoo by its public functions: LoRA factors (A and B apart, as the peers take them), whole updates, or checkpoints.

`fit` here is `open_zoo` and `fit`, whose basis is on the disk at the end. Spectra come from the moments that a fit keeps.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import eigenzoo as ez
from bench.collection import Array
from bench.peers.work import Work
from eigenzoo.passes.workers import local_workers
from eigenzoo.records import no_progress
from eigenzoo.subspace.fitting.fit_layers import LayerPass
from eigenzoo.subspace.fitting.options import resolve_options
from eigenzoo.subspace.fitting.work import Work as Finished
from eigenzoo.subspace.moments.layer_moments import LayerMoments
from eigenzoo.subspace.moments.moments_cache import MomentsCache

# Names are imported at first use: memory is counted from after that.
_ = ez.fit, ez.open_zoo, ez.load


@dataclass(frozen=True)
class Unwritten:
    """A fit whose bases were computed and let go: what is left of it are the moments."""

    found: dict[str, LayerMoments]

    @property
    def layers(self) -> dict[str, LayerMoments]:
        return self.found

    def moments(self, name: str) -> LayerMoments:
        return self.found[name]


class Nothing:
    """Takes what a fit writes, and keeps none of it."""

    def append(self, name: str, tensor: Any) -> None:
        pass

    def begin(self, name: str, dtype: Any, shape: Any) -> None:
        pass

    def write_flat(self, name: str, start: int, tensor: Any) -> None:
        pass


def fit(work: Work) -> ez.Subspace | Unwritten:
    collection = work.collection
    view = work.options.get("view", "factors" if collection.recipe.kind == "lora" else "weight")
    base = collection.parent if view == "delta" else None
    with work.phase("open"):
        zoo = ez.open_zoo(collection.paths, view=view, base=base)
    with work.phase("fit"):
        if work.options.get("write") == "no":
            return fit_unwritten(zoo, work.rank)
        return ez.fit(zoo, rank=work.rank, workspace=work.scratch)


def fit_unwritten(zoo: ez.Zoo, rank: int) -> Unwritten:
    """The pass of `ez.fit`: the same tasks on the same workers, with coefficients and bases, and nothing put on a disk."""
    options = resolve_options(rank, None, "models", "float32", None, None, 0)
    with local_workers() as workers:
        layers = LayerPass(zoo, options, {}, workers, cast(Any, Nothing()), {}, MomentsCache(zoo, None), Finished(), {})
        _, moments = layers.run(no_progress)
    return Unwritten(moments)


def spectra(work: Work, found: ez.Subspace | Unwritten) -> dict[str, Array]:
    return spectra_of(found, work.collection.recipe.scale)


def spectra_of(space: ez.Subspace | Unwritten, scale: float) -> dict[str, Array]:
    """Eigenvalues of every layer's centred Gram; those of s·B as of B, which is what the files hold."""
    import numpy as np

    found = {}
    for name in space.layers:
        values = np.linalg.eigvalsh(space.moments(name).centered_NN.numpy())[::-1][:-1]
        found[name] = values / (scale**2 if name.endswith(".lora_B") else 1.0)
    return found


def basis(work: Work, found: ez.Subspace | Unwritten, name: str) -> Array | None:
    """Read from the bundle by its documented format; updates have none that is not a sum of all of them."""
    if isinstance(found, Unwritten):
        return None
    return basis_of(found.path, name) if name in found.layers else None


def basis_of(folder: Path, name: str) -> Array | None:
    from safetensors import safe_open

    for file in sorted(folder.glob("basis*.safetensors")):
        with safe_open(file, "numpy") as tensors:
            if f"{name}/models" in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
                found: Array = tensors.get_tensor(f"{name}/models")
                return found.reshape(len(found), -1)
    return None
