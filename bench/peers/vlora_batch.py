"""vLoRA 1.0: all adapters loaded, then `SharedSubspace.from_adapters`, an SVD of each factor's stack; it ignores alpha."""

from __future__ import annotations

import vlora
from torch import Tensor

from bench.collection import Array
from bench.peers.work import Work


def fit(work: Work) -> vlora.SharedSubspace:
    with work.phase("open"):
        adapters = [vlora.load_adapter(path) for path in work.collection.paths]
    with work.phase("fit"):
        return vlora.SharedSubspace.from_adapters(adapters, num_components=work.rank)


def spectra(work: Work, found: vlora.SharedSubspace) -> dict[str, Array]:
    return {name: found_of(found, "singular_values", name).numpy() ** 2 for name in work.names}


def basis(work: Work, found: vlora.SharedSubspace, name: str) -> Array | None:
    return found_of(found, "components", name).numpy()


def found_of(space: vlora.SharedSubspace, what: str, name: str) -> Tensor:
    """The tensor of one factor: vLoRA has a dictionary for all A's and one for all B's."""
    module, _, factor = name.rpartition(".lora_")
    found: Tensor = getattr(space, f"{what}_{factor.lower()}")[module]
    return found.double()
