"""Run in the environment of the engines: the plugin with vLLM's own classes, without an engine. Prints what they answer as JSON."""

import asyncio
import json
import os
import sys

from vllm.config.lora import LoRAConfig
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry
from vllm.plugins import load_general_plugins


def main() -> None:
    base, name, *others = sys.argv[1:]
    bundles = os.environ.pop("EIGENZOO_VLLM_BUNDLE")
    load_general_plugins()
    found = {"inert": sorted(LoRAResolverRegistry.get_supported_resolvers())}

    from eigenzoo.integrations.vllm_plugin import register

    os.environ["EIGENZOO_VLLM_BUNDLE"] = bundles
    register()
    resolver = LoRAResolverRegistry.get_resolver("eigenzoo")
    register()
    found["same"] = LoRAResolverRegistry.get_resolver("eigenzoo") is resolver
    found["class"] = isinstance(resolver, LoRAResolver)
    request = asyncio.run(resolver.resolve_lora(base, name))
    found["request"] = [isinstance(request, LoRARequest), request.lora_name, request.lora_path]
    found["others"] = [asyncio.run(resolver.resolve_lora(base, other)) for other in others]
    found["rank"] = {rank: refused(request.lora_path, rank) for rank in (1, 8)}
    print(json.dumps(found))


def refused(path: str, max_rank: int) -> str:
    helper = PEFTHelper.from_local_dir(path, max_position_embeddings=512)
    try:
        helper.validate_legal(LoRAConfig(max_lora_rank=max_rank))
    except ValueError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    main()
