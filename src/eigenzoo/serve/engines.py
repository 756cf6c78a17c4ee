"""Commands that serve a bundle's models by engines that people already run: vLLM and llama.cpp."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from eigenzoo.errors import UnsupportedError, UsageError
from eigenzoo.serve.handed_out import HandedOut

VLLM, LLAMA_CPP = "vllm", "llama.cpp"
ENGINES = (VLLM, LLAMA_CPP)

BUNDLE = "EIGENZOO_VLLM_BUNDLE"
"""Environment variable of the plugin of vLLM; see `integrations.vllm_plugin`."""

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM accepts as the largest rank. It pads every adapter to it."""

TOGETHER = 8
"""Different models of one batch of vLLM, unless the bundle has fewer."""


def print_command(engine: str, bundle: Path, base: Path, handed_out: HandedOut, names: Sequence[str]) -> list[str]:
    """Return the lines of a shell script that serves models of a bundle by an engine.

    Args:
        engine: `vllm` or `llama.cpp`.
        names: the models. vLLM finds all of the bundle by their names; llama.cpp loads these when it starts.

    Raises UsageError for another engine, and UnsupportedError for a rank that vLLM does not accept.
    """
    if engine == VLLM:
        return _vllm(bundle, base, handed_out)
    if engine == LLAMA_CPP:
        return _llama_cpp(base, handed_out, names)
    raise UsageError(f"{engine!r} is not an engine", next_step=f"choose {' or '.join(ENGINES)}")


def vllm_rank(rank: int) -> int:
    """Return the smallest --max-lora-rank of vLLM for adapters of a rank. Raises UnsupportedError if there is none."""
    allowed = next((limit for limit in VLLM_RANKS if limit >= rank), None)
    if allowed is None:
        raise UnsupportedError(
            f"the adapters have ranks up to {rank}",
            rule=f"vLLM accepts ranks up to {VLLM_RANKS[-1]}",
            next_step="rebuild them with --max-lora-rank, or serve the bundle with eigenzoo serve",
        )
    return allowed


def _vllm(bundle: Path, base: Path, handed_out: HandedOut) -> list[str]:
    together = min(TOGETHER, len(handed_out.space.names))
    environment = {BUNDLE: str(bundle.absolute()), "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    return [
        "# In vLLM's environment, with eigenzoo installed there too (it brings the plugin):",
        *(f"export {name}={shlex.quote(value)}" for name, value in environment.items()),
        # A slot more than models: on a CPU, vLLM computes rows of the base with the last one.
        f"vllm serve {shlex.quote(str(base.absolute()))} --enable-lora --max-lora-rank {vllm_rank(handed_out.max_rank)} "
        f"--max-loras {together + 1}",
        f'# A request names a model of the bundle: "model": "{handed_out.space.names[0]}"',
    ]


def _llama_cpp(base: Path, handed_out: HandedOut, names: Sequence[str]) -> list[str]:
    shown = shlex.quote(str(base.absolute()))
    lines = ["# In a checkout of llama.cpp:", f"python convert_hf_to_gguf.py {shown} --outfile base.gguf"]
    for number, name in enumerate(names):
        adapter = shlex.quote(str(handed_out.path(name)))
        lines.append(f"python convert_lora_to_gguf.py --base {shown} {adapter} --outfile adapter-{number}.gguf")
    adapters = " ".join(f"--lora adapter-{number}.gguf" for number in range(len(names)))
    lines.append(f"llama-server -m base.gguf {adapters} --lora-init-without-apply")
    lines.append('# A request names an adapter by its place: "lora": [{"id": 0, "scale": 1.0}]')
    return lines
