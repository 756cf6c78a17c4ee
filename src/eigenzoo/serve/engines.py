"""Commands that serve a bundle's models by engines that people already run: vLLM and llama.cpp."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from eigenzoo.errors import UnsupportedError, UsageError
from eigenzoo.serve.handed_out import check_plain, written_rank
from eigenzoo.subspace.subspace import Subspace
from eigenzoo.weights.renames import nearest

VLLM, LLAMA_CPP = "vllm", "llama.cpp"
ENGINES = (VLLM, LLAMA_CPP)

BUNDLE, MAX_RANK, BASE_FOLDER, MAX_GB = (f"EIGENZOO_VLLM_{word}" for word in ("BUNDLE", "MAX_RANK", "BASE", "MAX_GB"))
"""Environment variables of the plugin of vLLM; see `integrations.vllm_plugin`."""

ALLOW = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"
"""Environment variable of vLLM itself, without which it never asks a plugin for an adapter."""

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values of --max-lora-rank. vLLM pads every adapter to it."""

TOGETHER = 8
"""Different models in one batch of vLLM, unless the bundle has fewer."""


def print_command(
    bundle: Subspace, base: str | os.PathLike[str], engine: str, models: Sequence[str] | None = None
) -> list[str]:
    """Return the lines of a shell script that serves models of a bundle by an engine. Nothing is run or written.

    Args:
        bundle: a bundle of PEFT adapters.
        base: the folder of the model that they change.
        engine: `vllm` or `llama.cpp`.
        models: names of models. Default: all. vLLM finds all by their names; llama.cpp loads these when it starts.

    Raises UsageError for another engine or an unknown model, and UnsupportedError for a bundle of full weights and for a rank that
    vLLM does not accept. Cost: one read of all coefficients; models that were not projected, such as imported ones, are rebuilt.
    """
    if engine not in ENGINES:
        raise UsageError(f"{engine!r} is not an engine", next_step=f"choose {' or '.join(ENGINES)}")
    check_plain(bundle)
    names = list(bundle.names if models is None else models)
    for name in names:
        if name not in bundle.names:
            near = nearest(name, bundle.names, cutoff=0.6)
            raise UsageError(
                f"no model is called {name!r}",
                where=str(bundle.path),
                next_step=f"did you mean {near!r}?" if near else "",
            )
    folder = Path(base).absolute()
    return _vllm(bundle, folder, names) if engine == VLLM else _llama_cpp(bundle, folder, names)


def vllm_rank(rank: int) -> int:
    """Return the smallest --max-lora-rank of vLLM for adapters of a rank. Raises UnsupportedError if there is none.

    >>> vllm_rank(1), vllm_rank(16), vllm_rank(17)
    (8, 16, 32)
    """
    allowed = next((limit for limit in VLLM_RANKS if limit >= rank), None)
    if allowed is None:
        raise UnsupportedError(
            f"the adapters have ranks up to {rank}",
            rule=f"vLLM accepts ranks up to {VLLM_RANKS[-1]}",
            next_step="serve the bundle with eigenzoo serve, or write adapters by eigenzoo rebuild --max-lora-rank",
        )
    return allowed


def _vllm(bundle: Subspace, base: Path, names: Sequence[str]) -> list[str]:
    rank = vllm_rank(written_rank(bundle, names))
    environment = {BUNDLE: str(bundle.path.absolute()), MAX_RANK: str(rank), ALLOW: "1"}
    # A slot more than models: on a CPU, vLLM computes rows of the base with the last one.
    slots = min(TOGETHER, len(names)) + 1
    return [
        "# In vLLM's environment, with eigenzoo and PEFT installed there too:",
        *(f"export {name}={shlex.quote(value)}" for name, value in environment.items()),
        f"vllm serve {shlex.quote(str(base))} --enable-lora --max-lora-rank {rank} --max-loras {slots}",
        f"# A request names a model of the bundle, such as {names[0]!r}.",
    ]


def _llama_cpp(bundle: Subspace, base: Path, names: Sequence[str]) -> list[str]:
    path, shown = shlex.quote(str(bundle.path.absolute())), shlex.quote(str(base))
    files = [f"adapter-{number}" for number in range(len(names))]
    lines = [
        "# In a checkout of llama.cpp, with eigenzoo, PEFT, torch and gguf installed:",
        f"python convert_hf_to_gguf.py {shown} --outfile base.gguf",
    ]
    for name, file in zip(names, files, strict=True):
        steps = (
            f"eigenzoo rebuild {path} {shlex.quote(name)} -o {file}",
            f"eigenzoo verify {file} --against {shown}",
            f"python convert_lora_to_gguf.py --base {shown} {file} --outfile {file}.gguf",
        )
        lines.append(" && ".join(steps))
    # Two defaults of llama-server answer wrongly without a word. With --lora, a request without "lora" gets the sum of all
    # adapters: scale 0 makes it the base. Its cache of prompts in RAM gives one adapter's keys and values to another: it is off.
    adapters = ",".join(f"{file}.gguf:0" for file in files)
    return [
        *lines,
        f"llama-server -m base.gguf --cache-ram 0 --lora-scaled {adapters}",
        f'# A request names an adapter by its number. {names[0]!r}: "lora": [{{"id": 0, "scale": 1.0}}]',
    ]
