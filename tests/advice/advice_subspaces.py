"""Messages about other tools' subspaces: vLoRA's folders, and adapters of components and loadings."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from advice_case import Case
from safetensors.torch import load_file, save_file
from torch import Tensor

import eigenzoo as ez
from builders import PREFIX, random_factors, seeded, write_adapter
from tolerance import tolerance

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
SHAPES = {"block.q": (6, 5), "block.v": (5, 6)}
RANK, ALPHA = 2, 6

Parts = dict[tuple[str, str], tuple[Tensor, Tensor]]
"""Components (side, K) and loadings (K, rank) of each module's factor A and B."""


def make_parts(task: int, run: int = 0) -> Parts:
    parts: Parts = {}
    for place, (module, (outputs, inputs)) in enumerate(SHAPES.items()):
        for side, size in (("A", inputs), ("B", outputs)):
            components = torch.linalg.qr(torch.randn(size, 3, generator=seeded(10 * run + place)))[0]
            parts[module, side] = components.contiguous(), torch.randn(3, RANK, generator=seeded(100 + task))
    return parts


def write(folder: Path, parts: Parts, *kinds: str) -> Path:
    """Write an adapter of these kinds of parts, by default all."""
    tensors = {}
    for (module, side), pair in parts.items():
        for kind, values in zip(("components", "loadings"), pair, strict=True):
            if kind in (kinds or ("components", "loadings")):
                tensors[f"{PREFIX}{module}.subspaceadapter_{side}.{kind}"] = values
    folder.mkdir(parents=True)
    save_file(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps({"peft_type": "SUBSPACEADAPTER", "r": RANK}))
    return folder


def write_tasks(root: Path, *kinds: str) -> None:
    for task in range(2):
        write(root / "theirs" / f"t{task}", make_parts(task), *kinds)


def assert_imported(space: ez.Subspace, scale: float = ALPHA / RANK, *, first: int = 0) -> None:
    """Every factor is components · loadings, B with the scale."""
    for task, name in enumerate(space.names, first):
        for (module, side), (components, loadings) in make_parts(task).items():
            product = components @ loadings
            expected = product.T if side == "A" else scale * product
            found = space.rebuild(name).layer(f"{module}.lora_{side}")
            assert (found - expected).abs().max() <= tolerance(
                100, dtype=torch.float32, scale=float(expected.abs().max())
            )


def import_components_alone(root: Path) -> None:
    write(root / "theirs" / "t0", make_parts(0), "components")
    write(root / "theirs" / "t1", make_parts(0), "loadings")
    ez.import_subspace(root / "theirs" / "t0", alpha=ALPHA)


def name_the_loadings(root: Path) -> None:
    """The test named that folder too, the loadings' first; the factors are components times loadings."""
    space = ez.import_subspace(root / "theirs" / "t1", components=root / "theirs" / "t0" / WEIGHTS, alpha=ALPHA)
    assert_imported(space)


def import_loadings_alone(root: Path) -> None:
    write_tasks(root, "loadings")
    tensors = {f"{module}.lora_{side}.weight": pair[0] for (module, side), pair in make_parts(0).items()}
    save_file(tensors, root / "components.safetensors")
    ez.import_subspace(root / "theirs", alpha=ALPHA)


def name_the_components(root: Path) -> None:
    """The test named the file of the components; the factors are components times loadings."""
    assert_imported(ez.import_subspace(root / "theirs", components=root / "components.safetensors", alpha=ALPHA))


def import_two_runs(root: Path) -> None:
    write(root / "theirs" / "t0", make_parts(0))
    write(root / "theirs" / "t1", make_parts(1, run=1))
    ez.import_subspace(root / "theirs", alpha=ALPHA)


def import_one_run(root: Path) -> None:
    """The test imported the adapter of one run; its factors are components times loadings."""
    assert_imported(ez.import_subspace(root / "theirs" / "t0", alpha=ALPHA))


def import_two_in_one(root: Path) -> None:
    write_tasks(root)
    path = root / "theirs" / "t0" / WEIGHTS
    tensors = {}
    for task in range(2):
        for key, values in load_file(root / "theirs" / f"t{task}" / WEIGHTS).items():
            stem, _, kind = key.rpartition(".")
            tensors[f"{stem}.task{task}.{kind}"] = values
    save_file(tensors, path)
    ez.import_subspace(root / "theirs", alpha=ALPHA)


def save_one_by_one(root: Path) -> None:
    """The test saved each adapter to a folder of its own; the factors are components times loadings."""
    shutil.rmtree(root / "theirs")
    write_tasks(root)
    assert_imported(ez.import_subspace(root / "theirs", alpha=ALPHA))


def import_nan(root: Path) -> None:
    write_tasks(root)
    path = root / "theirs" / "t1" / WEIGHTS
    tensors = load_file(path)
    tensors[f"{PREFIX}block.q.subspaceadapter_A.loadings"][0, 0] = float("nan")
    save_file(tensors, path)
    ez.import_subspace(root / "theirs", alpha=ALPHA)


def write_it_without(root: Path) -> None:
    """The test left the adapter out; the other's factors are components times loadings."""
    shutil.rmtree(root / "theirs" / "t1")
    assert_imported(ez.import_subspace(root / "theirs", alpha=ALPHA))


def like(name: str, change: Callable[[Path], object]) -> Callable[[Path], object]:
    """Import like an adapter that is not of the zoo."""

    def provoke(root: Path) -> None:
        write_tasks(root)
        factors = random_factors(SHAPES, RANK, 0)
        write_adapter(root / "zoo" / "a0", factors, lora_alpha=ALPHA)
        change(root / name)
        ez.import_subspace(root / "theirs", like=root / name)

    return provoke


def take_one_of_the_zoo(root: Path) -> None:
    """The test named one of the zoo; the factors are components times loadings, B with that adapter's scale."""
    assert_imported(ez.import_subspace(root / "theirs", like=root / "zoo" / "a0"))


def as_config_of_other_rank(path: Path) -> None:
    path.write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": ALPHA, "target_modules": [*SHAPES]}))


def of_other_modules(path: Path) -> None:
    write_adapter(path, random_factors({"block.k": (6, 5)}, RANK, 0))


def of_other_shapes(path: Path) -> None:
    write_adapter(path, random_factors({"block.q": (9, 5), "block.v": (5, 9)}, RANK, 0))


def import_mixed_ranks(root: Path) -> None:
    for task in range(2):
        parts = make_parts(task)
        for side in "AB":
            components, loadings = parts["block.v", side]
            parts["block.v", side] = components, loadings[:, :1].contiguous()
        write(root / "theirs" / f"t{task}", parts)
    ez.import_subspace(root / "theirs", alpha=ALPHA)


def name_a_config(root: Path) -> None:
    """The test named a config with both ranks; B is components times loadings times each module's α over rank."""
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": [*SHAPES],
        "rank_pattern": {"block.v": 1},
    }
    (root / CONFIG).write_text(json.dumps(config))
    space = ez.import_subspace(root / "theirs", like=root / CONFIG)
    for module, rank in (("block.q", 2), ("block.v", 1)):
        components, loadings = make_parts(1)[module, "B"]
        expected = ALPHA / rank * (components @ loadings[:, :rank])
        found = space.rebuild("t1").layer(f"{module}.lora_B")
        assert (found - expected).abs().max() <= tolerance(100, dtype=torch.float32, scale=float(expected.abs().max()))


def write_vlora(folder: Path, tasks: dict[str, str]) -> None:
    """A folder as vLoRA writes it, of these tasks and files; each task's loadings are its number."""
    directions = {"a": ("components_a", [2, 5]), "b": ("components_b", [6, 2])}
    values = {}
    for place, (letter, (part, shape)) in enumerate(directions.items()):
        size = shape[0] * shape[1]
        values[f"block.q.{part}"] = torch.linalg.qr(torch.randn(size, 2, generator=seeded(place)))[0].T.contiguous()
        values |= {f"block.q.mean_{letter}": torch.ones(size), f"block.q.sv_{letter}": torch.ones(2)}
    folder.mkdir()
    save_file(values, folder / "subspace.safetensors")
    about = {"layer_names": ["block.q"], "task_ids": [*tasks], "rank": 2, "num_components": 2}
    about |= {"task_filenames": tasks, "shapes_a": {"block.q": [2, 5]}, "shapes_b": {"block.q": [6, 2]}}
    for number, file in enumerate(tasks.values()):
        loadings = {f"block.q.loadings_{letter}": torch.full((2,), float(number)) for letter in "ab"}
        save_file(loadings, folder / f"task_{file}.safetensors")
    (folder / "subspace_meta.json").write_text(json.dumps(about))


def import_one_file_for_two(root: Path) -> None:
    write_vlora(root / "vlora", {"a/b": "a_b", "a b": "a_b"})
    ez.import_subspace(root / "vlora", alpha=2)


def save_under_plain_names(root: Path) -> None:
    """The test saved them under such names; each task's A is the mean and its own loadings' directions."""
    shutil.rmtree(root / "vlora")
    write_vlora(root / "vlora", {"a-b": "a-b", "a.b": "a.b"})
    space = ez.import_subspace(root / "vlora", alpha=2)
    directions = load_file(root / "vlora" / "subspace.safetensors")["block.q.components_a"]
    for number, name in enumerate(("a-b", "a.b")):
        expected = (1 + number * directions.sum(0)).reshape(2, 5)
        found = space.rebuild(name).layer("block.q.lora_A")
        assert (found - expected).abs().max() <= tolerance(100, dtype=torch.float32, scale=float(expected.abs().max()))


def import_no_task(root: Path) -> None:
    write_vlora(root / "vlora", {"x": "x"})
    path = root / "vlora" / "subspace_meta.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "task_ids": []}))
    ez.import_subspace(root / "vlora", alpha=2)


def name_one_with_tasks(root: Path) -> None:
    """The test named the folder of one with tasks; their A are the mean and their loadings' directions."""
    save_under_plain_names(root)


OF_THE_ZOO = "ame an adapter of the zoo that the subspace was made from"

CASES = [
    Case(
        "Components without loadings",
        import_components_alone,
        ("the files have components, but no loadings", "ame the folders whose files hold loadings too"),
        name_the_loadings,
    ),
    Case(
        "Loadings without components",
        import_loadings_alone,
        ("no file has components", "ame the file of the components"),
        name_the_components,
    ),
    Case(
        "Components of two runs",
        import_two_runs,
        ("differ from those of", "mport adapters of one run at a time"),
        import_one_run,
    ),
    Case(
        "Two adapters of components in one file",
        import_two_in_one,
        ("two tensors", "ave each adapter to its own file"),
        save_one_by_one,
    ),
    Case("NaN in a subspace", import_nan, ("NaN or Inf", "rite the subspace again without it"), write_it_without),
    Case(
        "A subspace like a config of another rank",
        like("other.json", as_config_of_other_rank),
        ("the rank is 2, but 4", OF_THE_ZOO),
        take_one_of_the_zoo,
    ),
    Case(
        "A subspace like an adapter of other modules",
        like("other", of_other_modules),
        ("has no such module", OF_THE_ZOO),
        take_one_of_the_zoo,
    ),
    Case(
        "A subspace like an adapter of other shapes",
        like("other", of_other_shapes),
        ("factors have shapes", OF_THE_ZOO),
        take_one_of_the_zoo,
    ),
    Case(
        "A subspace like the folder of a zoo",
        like("zoo", lambda path: None),
        ("no adapter", OF_THE_ZOO),
        take_one_of_the_zoo,
    ),
    Case(
        "A subspace of several ranks with one alpha",
        import_mixed_ranks,
        ("the modules have several ranks", "ame an adapter or its config"),
        name_a_config,
    ),
    Case(
        "Two tasks of vLoRA in one file",
        import_one_file_for_two,
        ("have one file", "ave them again under names of letters"),
        save_under_plain_names,
    ),
    Case(
        "A subspace without a model",
        import_no_task,
        ("there is no task", "ame the folder of a subspace"),
        name_one_with_tasks,
    ),
]
