"""The peers: one method a file behind one small interface, each run as a process of its own by `python -m bench.peers NAME …`.

A peer's file has three functions, of which only the first is timed:

    fit(work)             do the whole job from the files: spectrum and basis of every layer of `work.names`
    spectra(work, found)  the centred eigenvalues, descending, not divided by N − 1, of the values as they are stored
    basis(work, found, name)  the leading directions of one layer of `work.sample`, (K, D), or None where there are none

Importing the file imports the library, so that memory can be counted from there on.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

LORA, VIT = "lora", "vit"


@dataclass(frozen=True)
class Peer:
    """One method.

    Attributes:
        title: what the table calls it.
        module: its file.
        kinds: the collections that it can take.
        truth: what it is compared with (see `truth`), which also is the product that its ceiling is of; columns have none.
        requires: modules that must be installed.
        exact: whether its eigenvalues are right but for round-off.
        one_matrix: it is timed on one layer, and its time scaled by the number of values.
        options: what its `fit` is told besides.
    """

    title: str
    module: str
    kinds: tuple[str, ...] = (LORA, VIT)
    truth: str = "weights"
    requires: tuple[str, ...] = ()
    exact: bool = False
    one_matrix: bool = False
    options: tuple[tuple[str, str], ...] = ()

    @property
    def missing(self) -> str | None:
        """Why it cannot be run here, or None."""
        absent = [name for name in self.requires if find_spec(name) is None]
        return f"{', '.join(absent)} is not installed" if absent else None


PEERS = {
    "eigenzoo": Peer("eigenzoo", "eigenzoo_fit", exact=True),
    "eigenzoo-delta": Peer(
        "eigenzoo, differences from the parent", "eigenzoo_fit", (VIT,), exact=True, options=(("view", "delta"),)
    ),
    "eigenzoo-unwritten": Peer("eigenzoo, writing apart", "eigenzoo_fit", exact=True, options=(("write", "no"),)),
    "eigenzoo-update": Peer(
        "eigenzoo, updates s·B·A", "eigenzoo_fit", (LORA,), "updates", exact=True, options=(("view", "update"),)
    ),
    "eigenzoo-update-unwritten": Peer(
        "eigenzoo, updates s·B·A, writing apart",
        "eigenzoo_fit",
        (LORA,),
        "updates",
        exact=True,
        options=(("view", "update"), ("write", "no")),
    ),
    "vlora": Peer("vLoRA, batch", "vlora_batch", (LORA,), requires=("vlora",), exact=True),
    "vlora-streaming": Peer("vLoRA, streaming", "vlora_streaming", (LORA,), requires=("vlora",)),
    "sklearn": Peer("scikit-learn PCA", "sklearn_pca", requires=("sklearn",)),
    "sklearn-incremental": Peer("scikit-learn IncrementalPCA", "sklearn_incremental", requires=("sklearn",)),
    "paper": Peer("PCA of all rows (the paper's way)", "paper", (LORA,), "columns", requires=("sklearn",)),
    "tensorly": Peer(
        "TensorLy Tucker, axis models", "tensorly_tucker", requires=("tensorly",), exact=True, one_matrix=True
    ),
    "svd-lowrank": Peer("torch.svd_lowrank", "svd_lowrank"),
    "numpy": Peer("numpy SVD", "numpy_svd", exact=True, one_matrix=True),
}
