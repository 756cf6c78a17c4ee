"""LoRAs of diffusion models as files: scales, headers, what is carried, and what is refused before anything is read."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

import eigenzoo as ez
from builders import random_factors, seeded, write_adapter
from eigenzoo.cli.app import app
from eigenzoo.formats.layout import LORA_FILE, ModelLayout, layout_of
from eigenzoo.formats.lora.diffusion_file import MAX_TEXT
from eigenzoo.formats.lora.diffusion_writer import write_diffusion_lora
from eigenzoo.formats.opening import open_model
from eigenzoo.formats.paths import OUTPUT_RECORD
from remote_servers import FileServer, running

LINEAR, CONV = "lora_unet_mid_block_attentions_0_proj_in", "lora_unet_conv_in"
MODULES = ("unet.mid_block_attentions.0.proj_in", "unet.conv_in")


def kohya(seed: int = 0, rank: int = 3, alpha: Tensor | float | None = 6.0) -> dict[str, Tensor]:
    """A linear layer (8, 6) and a convolution (4, 2, 3, 3)."""
    draw = seeded(seed)
    shapes = {
        f"{LINEAR}.lora_down": (rank, 6),
        f"{LINEAR}.lora_up": (8, rank),
        f"{CONV}.lora_down": (rank, 2, 3, 3),
        f"{CONV}.lora_up": (4, rank, 1, 1),
    }
    tensors = {f"{key}.weight": torch.randn(shape, generator=draw) for key, shape in shapes.items()}
    if alpha is not None:
        tensors |= {f"{stem}.alpha": torch.as_tensor(alpha).clone() for stem in (LINEAR, CONV)}
    return tensors


def diffusers(seed: int = 0, rank: int = 3) -> dict[str, Tensor]:
    """The same layers by diffusers' names."""
    names = {LINEAR: "unet.mid_block.attentions.0.proj_in", CONV: "unet.conv_in"}
    sides = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}
    return {
        f"{names[key.partition('.')[0]]}.{sides[key.partition('.')[2]]}": value
        for key, value in kohya(seed, rank, None).items()
    }


def save(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), path, dict(metadata or {}))
    return path


def described(**config: Any) -> dict[str, str]:
    return {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in config.items()})}


def zoo_of(root: Path, *models: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    for number, tensors in enumerate(models):
        save(root / f"m{number}.safetensors", tensors, metadata)
    return root


@pytest.mark.parametrize(
    ("alpha", "scale"),
    [
        (6.0, 2.0),
        (torch.tensor(1.5, dtype=torch.bfloat16), 0.5),
        (torch.tensor([9], dtype=torch.int64), 3.0),
        (torch.tensor(-3.0, dtype=torch.float16), -1.0),
        (torch.tensor(0.1), float(torch.tensor(0.1)) / 3),
        (None, 1.0),
    ],
)
def test_alpha_over_rank_is_the_scale_and_comes_back_to_the_bit(
    tmp_path: Path, alpha: Tensor | float | None, scale: float
) -> None:
    zoo = zoo_of(tmp_path / "zoo", kohya(0, alpha=alpha), kohya(1, rank=2, alpha=alpha))
    model = open_model(zoo / "m0.safetensors")
    assert model.format == "diffusion-lora"
    assert tuple(sorted(model.updates)) == tuple(sorted(MODULES))
    assert {update.scale for update in model.updates.values()} == {scale}
    assert model.updates[MODULES[1]].shape == (4, 18)
    assert model.other_tensors == ()
    space = ez.load(ez.fit(zoo, rank=1.0).save(tmp_path / "bundle"))
    after = load_file(space.rebuild("m0").save(tmp_path / "out") / LORA_FILE)
    before = load_file(zoo / "m0.safetensors")
    assert set(after) == set(before)
    for key, value in before.items():
        assert (after[key].dtype, after[key].shape) == (value.dtype, value.shape)
        assert torch.equal(after[key], value) or not key.endswith(".alpha")
    for stem in (LINEAR, CONV):
        first, second = (
            tensors[f"{stem}.lora_up.weight"].double().flatten(1)
            @ tensors[f"{stem}.lora_down.weight"].double().flatten(1)
            for tensors in (before, after)
        )
        assert (first - second).norm() <= 1e-6 * first.norm()


@pytest.mark.parametrize(
    ("alpha", "message"),
    [
        (float("nan"), r"conv_in.*α is nan.*finite"),
        (float("-inf"), r"conv_in.*α is -inf.*finite"),
        (torch.ones(2), r"α has shape \(2,\).*one number"),
        (torch.ones(1, 1), r"α has shape \(1, 1\).*one number"),
        (torch.tensor(True), r"α has shape \(\) and dtype torch.bool"),
        (torch.tensor(1j), r"α has shape \(\) and dtype torch.complex64"),
    ],
)
def test_an_alpha_that_is_no_finite_number_is_refused(tmp_path: Path, alpha: Any, message: str) -> None:
    tensors = {**kohya(), f"{CONV}.alpha": torch.as_tensor(alpha)}
    with pytest.raises(ez.FormatError, match=message):
        open_model(save(tmp_path / "m.safetensors", tensors))


def test_alpha_of_one_layer_only(tmp_path: Path) -> None:
    """The other has none, and scale 1; the file that is written has it for the one alone again."""
    tensors = kohya()
    del tensors[f"{CONV}.alpha"]
    zoo = zoo_of(tmp_path / "zoo", tensors, kohya(1))
    scales = {module: update.scale for module, update in open_model(zoo / "m0.safetensors").updates.items()}
    assert scales == dict(zip(MODULES, (2.0, 1.0), strict=True))
    assert set(load_file(ez.fit(zoo, rank=1.0).rebuild("m0").save(tmp_path / "out") / LORA_FILE)) == set(tensors)


def test_files_that_differ_in_alpha_alone_have_other_scales(tmp_path: Path) -> None:
    """Their headers are the same to the byte, and what is known of one must not be taken for the other's."""
    for number, alpha in enumerate((6.0, -6.0, 6.0)):
        save(tmp_path / "zoo" / f"m{number}" / "lora.safetensors", kohya(0, alpha=alpha))
    zoo = ez.open_zoo(tmp_path / "zoo")
    assert [zoo.keys(MODULES[0])[place][1] for place in range(3)] == [2.0, -2.0, 2.0]
    assert zoo.models[0].updates is zoo.models[2].updates
    found = ez.inspect(zoo)
    assert found.same_function == (("m0", "m2"),)
    assert {model.format for model in found.models} == {"diffusion-lora"}
    assert found.left_out == ()


@pytest.mark.parametrize(
    ("config", "scales"),
    [
        ({"r": 3, "lora_alpha": 6}, (2.0, 2.0)),
        ({"r": 3, "lora_alpha": 6, "use_rslora": True}, (6 / 3**0.5, 6 / 3**0.5)),
        ({"r": 9, "rank_pattern": {"proj_in": 3, "^conv_in": 3}, "lora_alpha": 3, "alpha_pattern": {"conv_in": 1}}, (1, 1 / 3)),
        # Of another component only: this one has no config, and α = rank.
        ({}, (1.0, 1.0)),
    ],
)  # fmt: skip
def test_the_headers_config_is_the_scale(
    tmp_path: Path, config: Mapping[str, Any], scales: tuple[float, float]
) -> None:
    model = open_model(save(tmp_path / "m.safetensors", diffusers(), described(**config)))
    assert tuple(model.updates[module].scale for module in MODULES) == pytest.approx(scales, rel=1e-12)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"r": 4, "lora_alpha": 4}, r"the rank is 3 in the file but 4 in lora_adapter_metadata"),
        ({"r": 3, "lora_alpha": 3, "use_dora": True}, r"use_dora is True: DoRA"),
        ({"r": 3, "lora_alpha": "3"}, r"lora_alpha is '3'.*finite number"),
        ({"r": 3, "lora_alpha": 3, "init_lora_weights": "pissa"}, r"changed the base weights"),
        ({"r": 3, "lora_alpha": 3, "peft_type": "LOKR"}, r"peft_type is 'LOKR'"),
    ],
)
def test_a_config_that_is_not_plain_lora_or_not_true_is_refused(
    tmp_path: Path, config: Mapping[str, Any], message: str
) -> None:
    with pytest.raises(ez.FormatError, match=message):
        open_model(save(tmp_path / "m.safetensors", diffusers(), described(**config)))


@pytest.mark.parametrize("text", ["{", "[]", '{"unet.r": 3, "unet.r": 4}', "9" * 5000])
def test_a_config_that_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ez.FormatError, match=r"lora_adapter_metadata"):
        open_model(save(tmp_path / "m.safetensors", diffusers(), {"lora_adapter_metadata": text}))


def test_a_scale_that_is_said_twice_is_refused(tmp_path: Path) -> None:
    tensors = {**diffusers(), "unet.conv_in.alpha": torch.tensor(3.0)}
    assert open_model(save(tmp_path / "m.safetensors", tensors)).updates[MODULES[1]].scale == 1.0
    with pytest.raises(ez.FormatError, match=r"both tensors of α and lora_adapter_metadata"):
        open_model(save(tmp_path / "n.safetensors", tensors, described(r=3, lora_alpha=6)))


def test_a_rebuilt_config_says_what_is_in_the_file(tmp_path: Path) -> None:
    """α = rank, for each layer its own; every other entry stays, of other components too."""
    config = {"r": 3, "lora_alpha": 6, "use_rslora": True, "target_modules": ["proj_in"], "lora_dropout": 0.5}
    document = {**json.loads(described(**config)["lora_adapter_metadata"]), "text_encoder.r": 7}
    zoo = zoo_of(tmp_path / "zoo", diffusers(0), metadata={"lora_adapter_metadata": json.dumps(document)})
    save(zoo / "m1.safetensors", diffusers(1, rank=5))
    # 6 of 8 outputs and one input: the linear layer keeps rank 1, and the convolution, whose sides are cut alike, as well.
    space = ez.fit(zoo, rank={"outputs": 2, "inputs": 8}, include=["*proj_in"])
    file = space.rebuild("m0").save(tmp_path / "out") / LORA_FILE
    with safe_open(file, "pt") as opened:
        found = json.loads(opened.metadata()["lora_adapter_metadata"])
    ranks = {"conv_in": 3, "mid_block.attentions.0.proj_in": 2}
    common, other = (found["unet.r"], next(iter(found["unet.rank_pattern"])))
    assert found["unet.lora_alpha"] == common
    assert found["unet.rank_pattern"] == found["unet.alpha_pattern"] == {other: ranks[other[1:]]}
    assert {common, ranks[other[1:]]} == {2, 3}
    assert found["unet.use_rslora"] is False
    assert (found["unet.lora_dropout"], found["unet.target_modules"]) == (0.5, ["proj_in"])
    assert found["text_encoder.r"] == 7
    assert {update.rank for update in open_model(file).updates.values()} == {2, 3}
    assert {update.scale for update in open_model(file).updates.values()} == {1.0}


def test_of_the_header_short_texts_are_carried_and_hashes_are_not(tmp_path: Path) -> None:
    metadata = {
        "ss_network_dim": "3",
        "ss_tag_frequency": "x" * (MAX_TEXT + 1),
        "sshs_model_hash": "0" * 64,
        "modelspec.title": "<b>",
    }
    zoo = zoo_of(tmp_path / "zoo", kohya(0), kohya(1), metadata=metadata)
    space = ez.load(ez.fit(zoo, rank=1.0).save(tmp_path / "bundle"))
    with safe_open(space.rebuild("m0").save(tmp_path / "out") / LORA_FILE, "pt") as file:
        assert file.metadata() == {"ss_network_dim": "3", "modelspec.title": "<b>"}


def test_other_tensors_are_carried(tmp_path: Path) -> None:
    """An embedding that was trained with the LoRA; it differs from model to model."""
    key = "bundle_emb.style.string_to_param.*"
    models = [{**kohya(seed), key: torch.full((2, 3), float(seed))} for seed in range(2)]
    space = ez.load(ez.fit(zoo_of(tmp_path / "zoo", *models), rank=1.0).save(tmp_path / "bundle"))
    for seed in range(2):
        after = load_file(space.rebuild(f"m{seed}").save(tmp_path / f"m{seed}") / LORA_FILE)
        assert torch.equal(after[key], models[seed][key])


def test_a_folder_of_one_file_is_one_model(tmp_path: Path) -> None:
    for number in range(2):
        save(tmp_path / "zoo" / f"m{number}" / "pytorch_lora_weights.safetensors", diffusers(number))
    space = ez.fit(tmp_path / "zoo", rank=1.0)
    assert space.names == ("m0", "m1")
    assert {path.name for path in space.rebuild("m1").save(tmp_path / "out").iterdir()} == {LORA_FILE, OUTPUT_RECORD}


@pytest.mark.parametrize("view", ["update", "factors"])
def test_files_that_are_alike_are_described_once(tmp_path: Path, view: str) -> None:
    """Else what a bundle says of a file's keys, and each α, would outweigh what it holds of the model."""
    zoo = zoo_of(tmp_path / "zoo", *(kohya(seed) for seed in range(4)))
    bundle = ez.fit(zoo, rank=1.0, view=view).save(tmp_path / "bundle")
    assert len([*(bundle / "rest").iterdir()]) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{LINEAR}.lora_up.weight": torch.ones(8, 2)}, r"proj_in.*The second size of B must equal"),
        ({f"{LINEAR}.lora_up.weight": torch.ones(8, 3, 1, 1)}, r"proj_in.*A must have shape \(rank, inputs, \*kernel\)"),
        ({f"{CONV}.lora_up.weight": torch.ones(4, 3, 3, 3)}, r"conv_in.*A must have shape \(rank, inputs, \*kernel\)"),
        ({f"{LINEAR}.lora_down.weight": torch.ones(3, 6, dtype=torch.int8)}, r"proj_in.*the factors have dtypes torch.int8"),
        ({f"{LINEAR}.lora_down.weight": torch.ones(0, 6), f"{LINEAR}.lora_up.weight": torch.ones(8, 0)}, r"A must have shape"),
        ({f"{LINEAR}.dora_scale": torch.ones(8)}, r"dora_scale' belongs to DoRA.*[Mm]erge it into its base model"),
    ],
)  # fmt: skip
def test_factors_that_do_not_fit_are_refused(tmp_path: Path, change: Mapping[str, Tensor], message: str) -> None:
    with pytest.raises(ez.FormatError, match=message):
        open_model(save(tmp_path / "m.safetensors", {**kohya(), **change}))


def test_pickles_are_refused_with_permission_too(tmp_path: Path) -> None:
    torch.save(kohya(), tmp_path / "m.pt")
    with pytest.raises(ez.FormatError, match=r"the file is a pickle with a LoRA of a diffusion model.*save_file"):
        open_model(tmp_path / "m.pt", allow_pickle=True)


def test_a_zoo_with_peft_adapters_is_refused(tmp_path: Path) -> None:
    """One names modules with all their dots; that nothing matches would be true, and would not help."""
    style = save(tmp_path / "style.safetensors", kohya())
    adapter = write_adapter(tmp_path / "adapter", random_factors({"conv_in": (4, 18)}, 3, 0))
    with pytest.raises(
        ez.MismatchError,
        match=r"adapter is a lora and style is a diffusion-lora.*have the same format.*save_lora_weights",
    ):
        ez.open_zoo([adapter, style])


def test_values_of_alpha_at_a_url_are_asked_for_at_once(tmp_path: Path) -> None:
    files = {f"zoo/m{seed}.safetensors": save(tmp_path / f"{seed}", kohya(seed)).read_bytes() for seed in range(2)}
    with running(FileServer(files)) as server:
        model = open_model(f"{server.url}/zoo/m0.safetensors")
        assert {update.scale for update in model.updates.values()} == {2.0}
        # The header, then a range of four bytes for each α.
        assert sorted(stop - start for _, start, stop in server.ranges[-2:]) == [4, 4]
        space = ez.fit([f"{server.url}/{name}" for name in files], rank=1.0)
        after = load_file(space.rebuild("m1").save(tmp_path / "out") / LORA_FILE)
    first, second = (
        tensors[f"{LINEAR}.lora_up.weight"].double() @ tensors[f"{LINEAR}.lora_down.weight"].double()
        for tensors in (kohya(1), after)
    )
    assert (first - second).norm() <= 1e-6 * first.norm()


LAYOUTS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "another format": (lambda d: d.update(format="lora"), "there is a tensor of α, but the adapter's config states α"),
    "no updates": (lambda d: d.update(updates={}), "other formats have no updates"),
    "no such alpha": (lambda d: d["updates"][MODULES[0]].update(key_alpha="x"), "α is not a tensor of one value"),
    "no name": (lambda d: d["updates"][MODULES[0]].update(key_alpha=3), "α is not a tensor of one value"),
    "a factor": (
        lambda d: d["updates"][MODULES[0]].update(key_alpha=f"{LINEAR}.lora_up.weight"),
        "α is not a tensor of one value",
    ),
    "another's": (lambda d: d["updates"][MODULES[0]].update(key_alpha=f"{CONV}.alpha"), "used twice"),
    "more": (lambda d: d["updates"][MODULES[0]].update(key_beta="x"), "not an object with exactly"),
    "infinite": (lambda d: d["updates"][MODULES[0]].update(scale=1e301), "is not a finite number"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_hostile_layouts_are_refused(tmp_path: Path, name: str) -> None:
    change, message = LAYOUTS[name]
    document = layout_of(open_model(save(tmp_path / "m.safetensors", kohya()))).to_json()
    assert ModelLayout.from_json(document).to_json() == document
    change(document)
    with pytest.raises(ez.FormatError, match=message):
        ModelLayout.from_json(document)


@pytest.mark.parametrize(
    ("dtype", "scale", "message"),
    [
        ("F16", 1e6, r"α = 3e\+06 does not fit into torch.float16"),
        ("F16", 1e-12, r"α = 3e-12 rounds to zero in torch.float16"),
        ("U8", -1.0, r"α = -3 does not fit into torch.uint8"),
        ("I64", 1e299, r"α = 3e\+299 does not fit into torch.int64"),
        ("BOOL", 1.0, r"α has dtype torch.bool"),
    ],
)
def test_an_alpha_that_its_tensor_cannot_hold_is_refused(
    tmp_path: Path, dtype: str, scale: float, message: str
) -> None:
    """Of a layout that others wrote: the reader takes no such file."""
    document = layout_of(open_model(save(tmp_path / "m.safetensors", kohya()))).to_json()
    for tensors in document["files"].values():
        for tensor in tensors:
            tensor[1] = dtype if tensor[0].endswith(".alpha") else tensor[1]
    for update in document["updates"].values():
        update["scale"] = scale
    layout = ModelLayout.from_json(document)
    factors = {MODULES[0]: (torch.ones(8, 1), torch.ones(1, 6)), MODULES[1]: (torch.ones(4, 1), torch.ones(1, 18))}
    with pytest.raises(ez.FormatError, match=message):
        write_diffusion_lora(tmp_path, layout, factors)


def test_the_command_line_names_the_format_and_writes_the_other(tmp_path: Path) -> None:
    zoo = zoo_of(tmp_path / "zoo", kohya(0), kohya(1))
    run = CliRunner().invoke
    found = run(app, ["inspect", str(zoo), "--json"])
    assert {model["format"] for model in json.loads(found.stdout)["models"]} == {"diffusion-lora"}
    assert run(app, ["fit", str(zoo), "-o", str(tmp_path / "bundle"), "--rank", "1.0", "--quiet"]).exit_code == 0
    words = ["rebuild", str(tmp_path / "bundle"), "m0", "-o", str(tmp_path / "out"), "--format", "diffusers"]
    assert run(app, words).exit_code == 0
    assert set(load_file(tmp_path / "out" / LORA_FILE)) == set(diffusers())


def test_only_diffusion_loras_have_another_format(tmp_path: Path) -> None:
    factors = {"a.b": (4, 6)}
    for number in range(2):
        write_adapter(tmp_path / "zoo" / f"m{number}", random_factors(factors, 2, number))
    rebuilt = ez.fit(tmp_path / "zoo", rank=1.0).rebuild("m0")
    with pytest.raises(ez.EigenzooError, match=r"format 'kohya' for a lora.*leave it out|Leave it out"):
        rebuilt.save(tmp_path / "out", format="kohya")


def test_a_name_that_no_bundle_can_hold_is_refused_and_can_be_left_out(tmp_path: Path) -> None:
    tensors = [
        {
            **kohya(number),
            **{key.replace(CONV, "lora_unet" + "_1" * 600): value for key, value in kohya(number).items()},
        }
        for number in range(3)
    ]
    zoo_of(tmp_path / "zoo", *tensors)
    with pytest.raises(
        ez.FormatError,
        match=r"layer name of 1,204 characters.*at most 1,024.*--exclude 'unet\.1\.1\.1\.1\.1\.1\.1\.1\*'",
    ):
        ez.fit(tmp_path / "zoo", rank=1)
    zoo = ez.open_zoo(tmp_path / "zoo", exclude=["unet.1.1.1.1.1.1.1.1*"])
    assert ez.fit(zoo, rank=1).rebuild(zoo.names[0]).save(tmp_path / "out").is_dir()
