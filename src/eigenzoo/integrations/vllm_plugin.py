"""A plugin of vLLM that finds the models of bundles by their names, as plain LoRA adapters.

vLLM calls `register` in each of its processes, by the entry point `eigenzoo` of the group `vllm.general_plugins`. Without the
environment variable EIGENZOO_VLLM_BUNDLE (a bundle's path, or several with `:` between them) it does nothing. With it, and with
VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, a request may name a model of a bundle: its adapter is rebuilt, checked against the base that
vLLM serves, and loaded. Run with vLLM 0.32.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eigenzoo.errors import EigenzooError, UsageError, require
from eigenzoo.serve.engines import ALLOW, BASE_FOLDER, BUNDLE, MAX_GB, MAX_RANK

if TYPE_CHECKING:
    from eigenzoo.serve.handed_out import HandedOut

NAME = "eigenzoo"
logger = logging.getLogger(__name__)


def register() -> None:
    """Register the resolver, if the environment variable names bundles. It may be called several times."""
    bundles = [path for path in os.environ.get(BUNDLE, "").split(os.pathsep) if path]
    if not bundles:
        return
    from vllm.lora.resolver import LoRAResolverRegistry

    if NAME in LoRAResolverRegistry.get_supported_resolvers():
        return
    if os.environ.get(ALLOW, "").lower() not in ("1", "true"):
        logger.warning("%s is set, but vLLM asks for no model of a bundle without %s=1", BUNDLE, ALLOW)
    LoRAResolverRegistry.register_resolver(NAME, make_resolver(bundles))


def make_resolver(bundles: Sequence[str]) -> Any:
    """Return vLLM's resolver of the models of bundles. They are opened when the first model is asked for."""
    from vllm.lora.request import LoRARequest
    from vllm.lora.resolver import LoRAResolver

    class BundleResolver(LoRAResolver):  # type: ignore[misc]
        """Rebuilds the adapter that a request names."""

        def __init__(self) -> None:
            self._adapters = Adapters(bundles)

        async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
            """Return the adapter, or None for a name that no bundle has, which vLLM answers with status 404.

            Raises ValueError for an adapter that cannot be handed out. It runs in a thread, because vLLM waits on its event loop.
            """
            path = await asyncio.to_thread(self._adapters.find, base_model_name, lora_name)
            # vLLM replaces the number.
            return None if path is None else LoRARequest(lora_name=lora_name, lora_int_id=1, lora_path=str(path))

    return BundleResolver()


class Adapters:
    """The adapters of several bundles, by name. The first bundle that has a name gives the model."""

    def __init__(self, bundles: Sequence[str]) -> None:
        self._bundles = bundles
        self._opened: list[HandedOut] | None = None
        self._opening = threading.Lock()

    def find(self, base: str, name: str) -> Path | None:
        """Return the folder of a model's adapter, or None if no bundle has a model of this name.

        Raises ValueError, which vLLM shows to the client, for an adapter that cannot be handed out and for a broken bundle.
        """
        try:
            for handed_out in self._open(base):
                if name in handed_out.space.names:
                    return handed_out.path(name)
        except EigenzooError as error:
            logger.error("%s: %s", type(error).__name__, error)
            raise ValueError(str(error)) from error
        return None

    def _open(self, base: str) -> list[HandedOut]:
        with self._opening:
            if self._opened is None:
                self._opened = _open_bundles(self._bundles, Path(os.environ.get(BASE_FOLDER) or base))
            return self._opened


def _open_bundles(bundles: Sequence[str], base: Path) -> list[HandedOut]:
    # Without PEFT nothing decides whether an adapter has an effect, and none would be handed out.
    require("peft", "transformers", where=f"the environment of vLLM ({BUNDLE})", extra="peft")

    import eigenzoo as ez
    from eigenzoo.integrations.dry_loading import load_dry
    from eigenzoo.serve.handed_out import MAX_BYTES, HandedOut

    if not base.is_dir():
        raise UsageError(
            "the base is not a folder, so that adapters cannot be checked against it",
            where=str(base),
            next_step=f"start vLLM with the path of the base's folder, or set {BASE_FOLDER} to it",
        )
    max_rank, max_gb = _read_number(MAX_RANK), _read_number(MAX_GB)
    return [
        HandedOut(
            ez.load(bundle),
            base,
            load_dry,
            max_rank=max_rank,
            max_bytes=MAX_BYTES if max_gb is None else max_gb * 10**9,
        )
        for bundle in bundles
    ]


def _read_number(variable: str) -> int | None:
    text = os.environ.get(variable)
    if not text:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"{text[:40]!r} is not a whole number of 1 or more", where=variable)
    return int(text)
