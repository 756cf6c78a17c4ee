"""A plugin of vLLM that finds the models of bundles by their names, as plain LoRA adapters.

vLLM calls `register` in every process, by the entry point `eigenzoo` of the group `vllm.general_plugins`. Without the environment
variable `EIGENZOO_VLLM_BUNDLE` (a bundle's path, or several with `:` between them) it does nothing. With it, and with
VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, a request may name a model of a bundle: its adapter is rebuilt, checked against the base that
vLLM serves, and loaded. Run with vLLM 0.32.
"""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eigenzoo.errors import EigenzooError, UsageError
from eigenzoo.serve.engines import BUNDLE

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

    if NAME not in LoRAResolverRegistry.get_supported_resolvers():
        LoRAResolverRegistry.register_resolver(NAME, make_resolver(bundles))


def make_resolver(bundles: list[str]) -> Any:
    """Return vLLM's resolver of the models of bundles. They are opened when the first model is asked for."""
    from vllm.lora.request import LoRARequest
    from vllm.lora.resolver import LoRAResolver

    class ZooResolver(LoRAResolver):  # type: ignore[misc]
        """Rebuilds the adapter that a request names."""

        def __init__(self) -> None:
            self._adapters = Adapters(bundles)

        async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
            """Return the adapter, or None for a name that no bundle has, which vLLM answers with status 404.

            Raises ValueError for an adapter that does not fit the base. It runs in a thread, as vLLM waits on its event loop.
            """
            path = await asyncio.to_thread(self._adapters.find, base_model_name, lora_name)
            # vLLM sets the number.
            return None if path is None else LoRARequest(lora_name=lora_name, lora_int_id=1, lora_path=str(path))

    return ZooResolver()


class Adapters:
    """The adapters of several bundles, by name."""

    def __init__(self, bundles: list[str]) -> None:
        self._bundles = bundles
        self._opened: list[HandedOut] | None = None

    def find(self, base: str, name: str) -> Path | None:
        """Return the folder of a model's adapter, or None if no bundle has a model of this name.

        Raises ValueError, which vLLM shows to the client, for an adapter that does not fit the base, and for a broken bundle.
        """
        try:
            for handed_out in self._open(Path(base)):
                if name in handed_out.space.names:
                    return handed_out.path(name)
        except EigenzooError as error:
            logger.error("%s: %s", type(error).__name__, error)
            raise ValueError(str(error)) from error
        return None

    def _open(self, base: Path) -> list[HandedOut]:
        if self._opened is None:
            import eigenzoo as ez
            from eigenzoo.serve.handed_out import HandedOut

            if not base.is_dir():
                raise UsageError(
                    "the base is not a folder here, so adapters cannot be checked against it",
                    where=str(base),
                    next_step="start vLLM with the path of the base's folder",
                )
            self._opened = [HandedOut(ez.load(bundle), base) for bundle in self._bundles]
        return self._opened
