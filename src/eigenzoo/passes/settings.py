"""Torch settings that change results: they are set to torch's defaults while eigenzoo computes, and restored afterwards.

A default device and autocast belong to the calling thread. The precision of float32 products (TF32 on GPUs, bfloat16 on CPUs)
belongs to the process.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from eigenzoo.passes.process import SharedSetting, Undo

HIGHEST = "highest"
"""Torch's name for float32 products without TF32 and bfloat16."""


@contextmanager
def own_settings() -> Iterator[None]:
    """Compute with torch's default settings, whatever the user has set.

    Inside, new tensors are on the CPU, autocast is off, and float32 products are computed in float32. Several threads may be
    inside at once: the last one to leave restores the precision of products.
    """
    with ExitStack() as settings:
        # Each context is entered only if needed: a device context slows down every call of torch.
        if torch.get_default_device().type != "cpu":
            settings.enter_context(torch.device("cpu"))
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                settings.enter_context(torch.autocast(kind, enabled=False))
        settings.enter_context(_float32.changed())
        yield


def _full_float32(undos: list[Undo]) -> None:
    """Compute float32 products in float32. Append functions that restore the user's setting, to be called in reverse order.

    Torch has two ways to set it. From 2.9 on `fp32_precision` is per backend, and the older call raises an error where it reads
    a mix of both. So the backends are set first and restored last.
    """
    # A backend set to "none" inherits from a parent, and reading it returns the inherited value.
    parents = {torch.backends.cuda.matmul: torch.backends.cudnn}
    if hasattr(torch.backends.mkldnn, "matmul"):
        parents[torch.backends.mkldnn.matmul] = torch.backends.mkldnn
    backends = [backend for backend in parents if hasattr(backend, "fp32_precision")]
    usual = [backend.fp32_precision for backend in backends]
    if backends and set(usual) <= {"none", "ieee"}:
        return

    def restore() -> None:
        for backend, value in zip(backends, usual, strict=True):
            inherited = value == parents[backend].fp32_precision
            backend.fp32_precision = "none" if inherited else value

    undos.append(restore)
    for backend in backends:
        backend.fp32_precision = "ieee"
    precision = torch.get_float32_matmul_precision()
    if precision != HIGHEST:
        undos.append(lambda: torch.set_float32_matmul_precision(precision))
        torch.set_float32_matmul_precision(HIGHEST)


_float32 = SharedSetting(_full_float32)
