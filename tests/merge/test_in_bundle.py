"""Models of a bundle merge by their coefficients: exact inside the subspace, a file like any other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import eigenzoo as ez
from builders import random_factors, random_stack, read_update, write_adapter, write_stacks
from eigenzoo.errors import OutputError, UnsupportedError, UsageError
from tolerance import tolerance

MODULES = {"a.q_proj": (12, 10), "b.q_proj": (14, 10)}
WEIGHTS = (0.7, -0.3, 1.1)
SINGLE = tolerance(24, dtype=torch.float32)

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bundle")
    for number in range(4):
        write_adapter(root / "zoo" / f"m{number}", random_factors(MODULES, 2, seed=number))
    ez.fit(root / "zoo", axes=("outputs", "inputs"), rank=1.0).save(root / "whole")
    ez.fit(root / "zoo", axes=("outputs", "inputs"), rank=3).save(root / "small")
    ez.fit(root / "zoo", axes=("outputs", "inputs"), rank=1.0, core_rank=2).save(root / "cut")
    ez.fit(root / "zoo", rank=2).save(root / "stacked")
    return root


def paths(folder: Path, num: int = 3) -> list[Path]:
    return [folder / "zoo" / f"m{number}" for number in range(num)]


def rebuilt(folder: Path, bundle: str, file: Path, out: Path) -> Path:
    from eigenzoo.adapt.rebuilding import rebuild

    return rebuild(ez.load(folder / bundle), file, max_lora_rank="full").save(out)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("task_arithmetic", {"weights": WEIGHTS, "scale": 0.5}),
        ("tsv", {}),
        ("iso_c", {}),
        ("karcher", {}),
        ("wudi", {"scale": 2.0}),
    ],
)
def test_a_whole_subspace_merges_as_the_files_do(
    folder: Path, tmp_path: Path, method: str, options: dict[str, object]
) -> None:
    space = ez.load(folder / "whole")
    merged = ez.merge((space, ["m0", "m1", "m2"]), method, **options)
    file = merged.save(tmp_path / "merged.safetensors")
    out = rebuilt(folder, "whole", file, tmp_path / "out")
    ez.merge(paths(folder), method, **options).save(tmp_path / "of_files")
    for module in MODULES:
        wanted = read_update(tmp_path / "of_files", module)
        assert float((read_update(out, module) - wanted).norm()) <= 1e-5 * float(wanted.norm()), module
    assert merged.certificate.loss.frobenius < SINGLE
    assert all(source.outside is not None and source.outside < SINGLE for source in merged.certificate.models.values())


def test_ties_acts_on_the_cores_of_the_bundle_and_trims_over_all_layers(folder: Path) -> None:
    space = ez.load(folder / "small")
    names = ["m0", "m1", "m2"]
    merged = ez.merge((space, names), "ties", keep=0.3)
    cores = {
        layer: torch.stack([space.coefficients(name).values[layer].double() for name in names]) + basis.removed()
        for layer, basis in space.layers.items()
    }
    flat = torch.cat([each.flatten(1) for each in cores.values()], 1)
    least = flat.abs().sort(descending=True).values[:, int(0.3 * flat.shape[1]) - 1, None, None]
    for layer, each in cores.items():
        trimmed = torch.where(each.abs() >= least, each, 0.0)
        agree = (trimmed.sign() == trimmed.sum(0).sign()) & (trimmed != 0)
        wanted = (trimmed * agree).sum(0) / agree.sum(0).clamp_min(1)
        found = merged.coefficients[layer] + space.layers[layer].removed()
        assert torch.allclose(found, wanted, atol=1e-12)


def test_what_lies_outside_and_what_a_cut_loses_is_stated(folder: Path) -> None:
    space = ez.load(folder / "small")
    merged = ez.merge((space, ["m0", "m1"]), "task_arithmetic")
    for name, source in merged.certificate.models.items():
        assert source.outside == pytest.approx(space.coefficients(name).residual)
        assert source.outside > 0.01
    cut = ez.merge((ez.load(folder / "cut"), ["m0", "m1", "m2"]), "task_arithmetic")
    assert cut.certificate.loss.frobenius > 0.1  # a sum of three updates of rank 2, as cores of rank 2
    assert {layer.rank for layer in cut.certificate.layers.values()} == {2}


def test_models_that_are_numbers_are_averaged(folder: Path, tmp_path: Path) -> None:
    space = ez.load(folder / "stacked")
    merged = ez.merge((space, ["m0", "m1"]), "linear", weights=(1.0, 3.0))
    out = rebuilt(folder, "stacked", merged.save(tmp_path / "merged.safetensors"), tmp_path / "out")
    for module in MODULES:
        one, other = (space.rebuild(name, max_lora_rank="full").layer(module) for name in ("m0", "m1"))
        wanted = (one + 3 * other) / 4
        assert float((read_update(out, module) - wanted).norm()) <= 1e-5 * float(wanted.norm())
    with pytest.raises(UnsupportedError, match=r"method ties. Models.*stay in the subspace only as averages"):
        ez.merge((space, ["m0", "m1"]), "ties")


def test_full_weights_are_averaged(tmp_path: Path) -> None:
    write_stacks(tmp_path / "zoo", {"w": random_stack(4, (6, 5)), "b": random_stack(4, (6,))})
    space = ez.fit(tmp_path / "zoo", rank=3)
    merged = ez.merge((space, ["m0", "m1"]), "mean")
    wanted = (space.rebuild("m0").layer("w") + space.rebuild("m1").layer("w")) / 2
    coefficients = merged.coefficients["w"]
    assert torch.allclose(space.layers["w"].rebuild(coefficients).view(6, 5), wanted, atol=SINGLE)  # type: ignore[union-attr]
    one, other = ({layer: space.rebuild(name).layer(layer) for layer in "wb"} for name in ("m0", "m1"))
    along = sum(float((one[layer] * (one[layer] + other[layer]) / 2).sum()) for layer in "wb")
    own = sum(float(values.square().sum()) for values in one.values())
    assert merged.certificate.models["m0"].kept == pytest.approx(along / own, rel=1e-6)


def test_the_command_writes_a_file_that_rebuild_takes(folder: Path, tmp_path: Path, call: Call) -> None:
    out = tmp_path / "merged.safetensors"
    code, text, err = call("merge", folder / "whole", "m0", "m1", "-o", out, "--method", "ties", "--quiet")
    assert code == 0, err
    assert "outside: the share of the model's energy outside the subspace" in text
    code, text, err = call("rebuild", folder / "whole", out, "--like", "m0", "-o", tmp_path / "rebuilt", "--quiet")
    assert code == 0, err
    code, text, _ = call("merge", folder / "whole", "m0", "m1", "--check", "--json")
    assert code == 0
    assert json.loads(text)["models"]["m0"]["outside"] < SINGLE
    with pytest.raises(OutputError, match="exists already"):
        ez.merge((ez.load(folder / "whole"), ["m0"])).save(out)
    (tmp_path / "mine.safetensors").write_bytes(b"mine")
    with pytest.raises(OutputError, match=r"mine\.safetensors"):
        ez.merge((ez.load(folder / "whole"), ["m0"])).save(tmp_path / "mine.safetensors", force=True)


def test_wrong_names_and_spaces(folder: Path) -> None:
    space = ez.load(folder / "whole")
    with pytest.raises(UsageError, match=r"no model is called 'm7'"):
        ez.merge((space, ["m0", "m7"]))
    with pytest.raises(UsageError, match="space 'full'"):
        ez.merge((space, ["m0", "m1"]), "ties", space="full", rank=2)
    with pytest.raises(UnsupportedError, match="method regmean in a bundle"):
        ez.merge((space, ["m0", "m1"]), "regmean", grams={"m0": {"a.q_proj": torch.eye(10)}})
    with pytest.raises(UsageError, match="budget '1000' for models of a bundle"):
        ez.merge((space, ["m0", "m1"]), budget=1000)
