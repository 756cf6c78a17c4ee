"""A LoRA adapter of mlx-lm: `adapters.safetensors` and mlx-lm's own `adapter_config.json`, seen as the PEFT adapter that it equals.

mlx-lm holds the factors of a module as `<module>.lora_a` (inputs, rank) and `<module>.lora_b` (rank, outputs), and adds
scale · (a·b)ᵀ to a linear weight: ΔW = s·B·A with A = aᵀ, B = bᵀ and s the config's `lora_parameters.scale`, which the rank does
not divide. An embedding's update is scale · a·b, rows × dims: PEFT's `lora_embedding_A` and `…_B` are the same transposes.

Source: mlx-lm 0.32, `mlx_lm.tuner.lora` and `mlx_lm.tuner.utils.load_adapters`. Deviation: `alpha` beside `scale`, which early
versions multiplied by and later ones ignore, is refused unless both readings agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from eigenzoo.errors import FormatError, UnsupportedError, UsageError
from eigenzoo.formats.json_file import read_json
from eigenzoo.formats.lora.config import CONFIG_FILE
from eigenzoo.formats.lora.diffusion_keys import name_pattern
from eigenzoo.formats.lora.peft_folder import PREFIX, WEIGHTS_FILE, find_updates
from eigenzoo.formats.model import LoraUpdate, Model, TensorInfo
from eigenzoo.formats.paths import final_name, inside
from eigenzoo.formats.safetensors.file import SafetensorsFile
from eigenzoo.formats.safetensors.tensor_bytes import check_out
from eigenzoo.formats.side_files import list_side_files

MLX_FILE = "adapters.safetensors"

MAX_RANK = 2**20
"""A rank beyond this is a mistake in the config: the factors of a file have it as one of their sizes."""

_FACTOR = name_pattern(r"(?P<module>.+)\.lora_(?P<side>[ab])")
_EMBEDDING = name_pattern(r"(.+\.)?(wte|embed_tokens|embed_in|tok_embeddings|word_embeddings|embeddings)")
_KINDS = {"dora": ": DoRA, a magnitude per output rescales the whole weight", "full": ": full weights of some layers"}
_FUSE = "fuse it with its base model (mlx_lm.fuse) and open that as a checkpoint"


class MlxAdapter(Model):
    """One adapter of mlx-lm under PEFT's names: every tensor is the transpose of the one in the file. It is written back as PEFT's.

    `path` is the folder, or a file of another name with the config beside it, such as `0000100_adapters.safetensors`.
    """

    format = "lora"

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        is_folder = not self.path.is_file()
        self.name = final_name(self.path) if is_folder else self.path.stem
        weights = MLX_FILE if is_folder else self.path.name
        try:
            stated = read_json(inside(self.folder, CONFIG_FILE), where=CONFIG_FILE)
            rank, scale = _rank_and_scale(stated)
            own = frozenset({MLX_FILE, CONFIG_FILE})
            if is_folder:
                self.take_beside(list_side_files(self.path, own))
            self._file = SafetensorsFile(self.folder / weights, self.folder if is_folder else None)
            self._keys = {_renamed(key, info): key for key, info in self._file.tensors.items()}
            self.tensors = MappingProxyType(
                {
                    name: TensorInfo(name, info.dtype, info.shape[::-1], WEIGHTS_FILE)
                    for name, key in self._keys.items()
                    for info in (self._file.tensors[key],)
                }
            )
            self.config = _as_peft(stated, rank, scale, self._file.tensors)
            self._updates = MappingProxyType(find_updates(self.tensors, self.config))
        except FormatError as error:
            raise error.at(str(self.path)) from error.__cause__
        self.metadata = MappingProxyType({WEIGHTS_FILE: {"format": "pt"}})

    @property
    def updates(self) -> Mapping[str, LoraUpdate]:
        """The updates by module, in the order of the file."""
        return self._updates

    def read(self, name: str) -> Tensor:
        """Read one tensor whole, in its own dtype."""
        key = self._keys.get(name)
        if key is None:
            raise FormatError(f"there is no tensor {name[:200]!r}", where=str(self.path))
        return self._file.read(key).T.contiguous()

    def read_flat(self, name: str, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Read values start:stop of the flattened (row-major) tensor, converted into `out` where one is given."""
        values = self.read(name).reshape(-1)
        if not 0 <= start <= stop <= values.numel():
            raise UsageError(f"values {start}:{stop} of a tensor of {values.numel()}", where=f"{self.path}, {name!r}")
        if out is None:
            return values[start:stop].clone()
        check_out(out, stop - start)
        return out.copy_(values[start:stop])

    def weight_files(self) -> tuple[Path, ...]:
        """The one file."""
        return (self._file.path,)


def _rank_and_scale(config: Mapping[str, Any]) -> tuple[int, float]:
    """Read what mlx-lm multiplies by out of its config; refuses what is not plain LoRA."""
    kind = config.get("fine_tune_type", "lora")
    if kind != "lora":
        meaning = _KINDS.get(kind, "") if isinstance(kind, str) else ""
        raise UnsupportedError(
            f"fine_tune_type is {_shown(kind)}{meaning}",
            where=CONFIG_FILE,
            rule="only mlx-lm adapters of type lora are read",
            next_step=_FUSE,
        )
    parameters = config.get("lora_parameters")
    if not isinstance(parameters, dict):
        raise FormatError(
            "the config has no lora_parameters",
            where=CONFIG_FILE,
            rule="mlx-lm's config states rank and scale there",
            next_step="use the adapter_config.json that mlx_lm.lora wrote beside the adapter",
        )
    rank, scale, alpha = (parameters.get(key) for key in ("rank", "scale", "alpha"))
    if type(rank) is not int or not 1 <= rank <= MAX_RANK:
        raise FormatError(
            f"lora_parameters.rank is {_shown(rank)}", where=CONFIG_FILE, rule="a rank is a positive integer"
        )
    if not isinstance(scale, int | float) or isinstance(scale, bool) or not 0 <= scale < 1e300:
        raise FormatError(
            f"lora_parameters.scale is {_shown(scale)}",
            where=CONFIG_FILE,
            rule="the scale is a finite number of at least 0",
        )
    if alpha is not None and alpha != rank:
        raise UnsupportedError(
            f"lora_parameters has both alpha {_shown(alpha)} and scale {_shown(scale)}",
            where=CONFIG_FILE,
            rule="early versions of mlx-lm multiply by scale · alpha / rank, later ones by scale",
            next_step="remove alpha; if an early version trained the adapter, set scale to scale · alpha / rank",
        )
    return rank, float(scale)


def _renamed(key: str, info: TensorInfo) -> str:
    """Return PEFT's name of a factor of mlx-lm."""
    match = _FACTOR.fullmatch(key)
    if match is None:
        raise UnsupportedError(
            f"{key[:200]!r} is not a factor of an update",
            rule="only updates of the form s·B·A are read",
            next_step=_FUSE,
        )
    module, side = match["module"], match["side"].upper()
    if len(info.shape) != 2:
        raise UnsupportedError(
            f"a factor has shape {info.shape}",
            where=f"module {module[:200]!r}",
            rule="three-axis factors of mixture-of-experts weights are not read",
            next_step=_FUSE,
        )
    if _EMBEDDING.fullmatch(module):
        return f"{PREFIX}{module}.lora_embedding_{side}"
    return f"{PREFIX}{module}.lora_{side}.weight"


def _as_peft(stated: Mapping[str, Any], rank: int, scale: float, tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """Return the config of the PEFT adapter that this one equals: all of its modules by name."""
    base = stated.get("model")
    modules = {match["module"] for key in tensors if (match := _FACTOR.fullmatch(key)) is not None}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base if isinstance(base, str) else None,
        "r": rank,
        "lora_alpha": scale * rank,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": sorted(modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "…"
