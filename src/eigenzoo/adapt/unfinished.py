"""Write and read checkpoints of an unfinished training: the exact state on which the next steps depend.

One safetensors file that is replaced every few steps, completely or not at all. It contains for each trained tensor its values and
Adam's two moments (`value.0`, `first.0`, `second.0`, …) and number of updates (`moved`), the loss of every step, and in the
metadata the step and the fingerprint of the run. It has no state of a random generator, because batches and draws of a step depend
only on seed and step.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from eigenzoo.errors import FormatError, UsageError
from eigenzoo.formats.output.whole import new_file, remove_left
from eigenzoo.formats.safetensors.dtypes import dtype_name
from eigenzoo.formats.safetensors.file import SafetensorsFile
from eigenzoo.formats.writers import TensorLayout, write_tensors

FORMAT = "eigenzoo-training"
AGAIN = "delete it to begin anew"


def write(
    path: Path, run: str, parameters: Sequence[nn.Parameter], optimizer: torch.optim.Adam, losses: Sequence[float]
) -> None:
    """Replace the file by the state after len(losses) steps."""
    tensors = {
        "moved": torch.zeros(len(parameters), dtype=torch.float64),
        "losses": torch.tensor(losses, dtype=torch.float64),
    }
    for number, parameter in enumerate(parameters):
        state = optimizer.state.get(parameter, {})
        nothing = torch.zeros_like(parameter)
        tensors["moved"][number] = float(state.get("step", 0.0))
        for kind, values in (
            ("value", parameter),
            ("first", state.get("exp_avg", nothing)),
            ("second", state.get("exp_avg_sq", nothing)),
        ):
            tensors[f"{kind}.{number}"] = values.detach().cpu().contiguous()
    layout = [TensorLayout(name, dtype_name(values.dtype), tuple(values.shape)) for name, values in tensors.items()]
    with new_file(path, force=True, own=_is_checkpoint) as staging:
        metadata = {"format": FORMAT, "run": run, "step": str(len(losses))}
        write_tensors(staging, layout, tensors.__getitem__, metadata, sync=False)


def read(
    path: Path, run: str, parameters: Sequence[nn.Parameter], optimizer: torch.optim.Adam, steps: int
) -> list[float]:
    """Load parameters and optimiser from the file. Return the losses of the finished steps.

    Raises UsageError if the file is of another run, and FormatError if it is not a checkpoint.
    """
    try:
        file = SafetensorsFile(path)
    except FormatError as error:
        raise FormatError(f"is no checkpoint of a training ({error.what})", where=str(path), next_step=AGAIN) from error
    if file.metadata.get("format") != FORMAT:
        raise FormatError("is no checkpoint of a training", where=str(path), next_step="name another file")
    if file.metadata.get("run") != run:
        raise UsageError(
            "is the checkpoint of another run",
            where=str(path),
            rule="a run goes on with the same bundle, model, start, data, options and seed",
            next_step=f"ask for what that run was asked for, or {AGAIN}",
        )
    _check(file, parameters, steps, path)
    moved = file.read("moved")
    with torch.no_grad():
        for number, parameter in enumerate(parameters):
            parameter.copy_(file.read(f"value.{number}"))
            optimizer.state[parameter] = {
                "step": torch.tensor(float(moved[number])),
                "exp_avg": file.read(f"first.{number}").to(parameter.device),
                "exp_avg_sq": file.read(f"second.{number}").to(parameter.device),
            }
    return [float(loss) for loss in file.read("losses")]


def _is_checkpoint(path: Path) -> bool:
    try:
        return SafetensorsFile(path).metadata.get("format") == FORMAT
    except FormatError:
        return False


def remove(path: Path) -> None:
    """Remove a checkpoint, and temporary files beside it from killed processes."""
    path.unlink(missing_ok=True)
    remove_left(path)


def _check(file: SafetensorsFile, parameters: Sequence[Tensor], steps: int, path: Path) -> None:
    """Raise unless the file has exactly the tensors that `write` writes."""
    done = file.metadata.get("step", "")
    num_done = int(done) if done.isascii() and done.isdigit() and len(done) < 12 else -1
    expected: dict[str, tuple[int, ...]] = {"moved": (len(parameters),), "losses": (num_done,)}
    dtypes = {"moved": torch.float64, "losses": torch.float64}
    for number, parameter in enumerate(parameters):
        for kind in ("value", "first", "second"):
            expected[f"{kind}.{number}"], dtypes[f"{kind}.{number}"] = tuple(parameter.shape), parameter.dtype
    shapes = {name: info.shape for name, info in file.tensors.items()}
    if (
        shapes != expected
        or any(file.tensors[name].dtype != dtype for name, dtype in dtypes.items())
        or not 0 <= num_done <= steps
    ):
        raise FormatError("is damaged: it does not hold what its run trains", where=str(path), next_step=AGAIN)
