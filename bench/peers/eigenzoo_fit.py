"""eigenzoo by its public functions: LoRA factors (A and B apart, as the peers take them), whole updates, or checkpoints.

`fit` here is `open_zoo` and `fit`, whose basis is on the disk at the end. Spectra come from the moments that a fit keeps.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import eigenzoo as ez
from bench.collection import Array
from bench.peers.work import Work

# Names are imported at first use: memory is counted from after that.
_ = ez.fit, ez.open_zoo, ez.load

WRITES_NOTHING: dict[str, Any] | None = None
"""What `ez.fit` is told to write no basis; None while it has no such way, and then the peer `eigenzoo-moments` says so."""


def fit(work: Work) -> ez.Subspace:
    collection = work.collection
    view = work.options.get("view", "factors" if collection.recipe.kind == "lora" else "weight")
    silent: dict[str, Any] = {}
    if work.options.get("write") == "no":
        if WRITES_NOTHING is None:
            raise SystemExit("ez.fit has no way yet to write nothing")
        silent = WRITES_NOTHING
    base = collection.parent if view == "delta" else None
    with work.phase("open"):
        zoo = ez.open_zoo(collection.paths, view=view, base=base)
    with work.phase("fit"):
        return ez.fit(zoo, rank=work.rank, workspace=work.scratch, **silent)


def spectra(work: Work, found: ez.Subspace) -> dict[str, Array]:
    return spectra_of(found, work.collection.recipe.scale)


def spectra_of(space: ez.Subspace, scale: float) -> dict[str, Array]:
    """Eigenvalues of every layer's centred Gram; those of s·B as of B, which is what the files hold."""
    import numpy as np

    found = {}
    for name in space.layers:
        values = np.linalg.eigvalsh(space.moments(name).centered_NN.numpy())[::-1][:-1]
        found[name] = values / (scale**2 if name.endswith(".lora_B") else 1.0)
    return found


def basis(work: Work, found: ez.Subspace, name: str) -> Array | None:
    """Read from the bundle by its documented format; updates have none that is not a sum of all of them."""
    return basis_of(found.path, name) if name in found.layers else None


def basis_of(folder: Path, name: str) -> Array | None:
    from safetensors import safe_open

    for file in sorted(folder.glob("basis*.safetensors")):
        with safe_open(file, "numpy") as tensors:
            if f"{name}/models" in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
                found: Array = tensors.get_tensor(f"{name}/models")
                return found.reshape(len(found), -1)
    return None
