"""Which file is a LoRA of a diffusion model, what its layers are called, and which kinds of adapters are refused by name."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eigenzoo.errors import EigenzooError, FormatError, UnsupportedError
from eigenzoo.formats.lora.diffusion_keys import is_diffusion_lora, pair_factors, split_key
from eigenzoo.formats.lora.sgm_blocks import to_diffusers

ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
ALIKE = {
    "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1_to_q": [
        f"unet.{ATTENTION}.to_q.lora_A.weight",
        f"unet.{ATTENTION}.to_q.lora.down.weight",
        f"unet.{ATTENTION}.processor.to_q_lora.down.weight",
        f"unet.{ATTENTION}.processor.to_q.lora_A.weight",
        f"lora_unet_{ATTENTION.replace('.', '_')}_to_q.lora_down.weight",
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_down.weight",
    ],
    "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1_to_out.0": [
        f"unet.{ATTENTION}.to_out.0.lora_A.weight",
        f"unet.{ATTENTION}.processor.to_out_lora.down.weight",
        f"lora_unet_{ATTENTION.replace('.', '_')}_to_out_0.lora_down.weight",
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_out_0.lora_down.weight",
    ],
    "unet.up_blocks.0.resnets.1.conv1": [
        "unet.up_blocks.0.resnets.1.conv1.lora_A.weight",
        "lora_unet_up_blocks_0_resnets_1_conv1.lora_down.weight",
        "lora_unet_output_blocks_1_0_in_layers_2.lora_down.weight",
    ],
    "text_encoder.encoder_layers.0.self_attn_q_proj": [
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight",
        "text_encoder.encoder.layers.0.self_attn.q_proj.lora_A.weight",
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.down.weight",
        "text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora.down.weight",
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight",
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight",
    ],
    "text_encoder_2.encoder_layers.31.self_attn_out_proj": [
        "text_encoder_2.text_model.encoder.layers.31.self_attn.out_proj.lora_A.weight",
        "text_encoder_2.text_model.encoder.layers.31.self_attn.to_out_lora.down.weight",
        "lora_te2_text_model_encoder_layers_31_self_attn_out_proj.lora_down.weight",
    ],
    "text_encoder_2.text_projection": [
        "text_encoder_2.text_projection.lora_A.weight",
        "lora_te2_text_projection.lora_down.weight",
    ],
    "transformer.transformer_blocks.3.attn_to_k": [
        "transformer.transformer_blocks.3.attn.to_k.lora_A.weight",
        "lora_transformer_transformer_blocks_3_attn_to_k.lora_down.weight",
    ],
}


@pytest.mark.parametrize("module", ALIKE)
def test_a_layer_is_called_alike_whatever_the_keys(module: str) -> None:
    for key in ALIKE[module]:
        found = split_key(key)
        assert found is not None, key
        assert (found.side, found.module("")) == ("A", module), key
        up = key.replace("lora_A", "lora_B").replace("down.weight", "up.weight")
        assert split_key(up).side == "B", up


@pytest.mark.parametrize(
    ("sgm", "expected"),
    [
        ("input_blocks_0_0", "conv_in"),
        ("input_blocks_3_0_op", "down_blocks_0_downsamplers_0_conv"),
        ("input_blocks_8_1_proj_out", "down_blocks_2_attentions_1_proj_out"),
        ("input_blocks_11_0_out_layers_3", "down_blocks_3_resnets_1_conv2"),
        ("middle_block_1_proj_in", "mid_block_attentions_0_proj_in"),
        ("output_blocks_2_1_conv", "up_blocks_0_upsamplers_0_conv"),
        ("output_blocks_8_2_conv", "up_blocks_2_upsamplers_0_conv"),
        ("output_blocks_6_0_skip_connection", "up_blocks_2_resnets_0_conv_shortcut"),
        ("out_2", "conv_out"),
    ],
)
def test_sgm_numbers_its_blocks_through(sgm: str, expected: str) -> None:
    """Counted in SD 1.5's and SDXL's own networks; all of a tiny SDXL beside diffusers' conversion in the round trips."""
    assert to_diffusers(sgm) == expected
    assert to_diffusers(expected) == expected


@pytest.mark.parametrize(
    "name", ["input_blocks_13_0_op", "input_blocks_3_1_proj_in", "middle_block_3_proj_in", "output_blocks_4_3_x"]
)
def test_places_that_no_such_network_has_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedError, match=r"is no place of a UNet of Stable Diffusion.*save_lora_weights"):
        to_diffusers(name)


KOHYA = ["lora_unet_mid_block_x.lora_down.weight", "lora_unet_mid_block_x.lora_up.weight"]
DIFFUSERS = ["unet.mid_block.x.lora_A.weight", "unet.mid_block.x.lora_B.weight"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (KOHYA, True),
        (DIFFUSERS, True),
        (["lora_unet_x.hada_w1_a", "lora_unet_x.hada_w1_b"], True),
        (["transformer.x.lokr_w1", "transformer.x.lokr_w2"], True),
        (["encoder.weight", "encoder.bias"], False),
        (["lora_proj.weight", "lora.0.weight", "x.alpha"], False),
        # PEFT's own file: its config says the scale, and is missing.
        (["base_model.model.x.lora_A.weight", "base_model.model.x.lora_B.weight"], False),
        # A whole model that was saved with its adapters in it.
        (["x.base_layer.weight", "x.lora_A.weight", "x.lora_B.weight"], False),
        (["x.weight", "x.lora_A.weight", "x.lora_B.weight"], False),
    ],
)
def test_a_file_is_known_by_its_keys(names: list[str], expected: bool) -> None:
    assert is_diffusion_lora(names) is expected


@pytest.mark.parametrize(
    ("name", "meaning"),
    [
        ("lora_unet_x.hada_w1_a", "LoHa"),
        ("lora_unet_x.hada_t1", "LoHa"),
        ("lycoris_x.lokr_w1", "LoKr"),
        ("lora_unet_x.lokr_w2_b", "LoKr"),
        ("lora_unet_x.lora_mid.weight", "Tucker"),
        ("lora_unet_mid_block_x.dora_scale", "DoRA"),
        ("unet.mid_block.x.lora_magnitude_vector", "DoRA"),
        ("unet.mid_block.x.lora_magnitude_vector.weight", "DoRA"),
        ("lora_unet_x.oft_blocks", "OFT"),
        ("lora_unet_x.oft_diag", "OFT"),
        ("unet.x.oft_R.weight", "OFT"),
        ("lora_unet_x.a1.weight", "GLoRA"),
        ("lora_unet_x.on_input", "IA3"),
        ("lora_unet_x.diff", "difference"),
        ("lora_unet_x.diff_b", "difference"),
        ("lora_unet_x.w_norm", "norm"),
        ("lora_unet_x.scalar", "trained scale"),
        ("unet.mid_block.x.lora_B.bias", "bias of its own"),
    ],
)
def test_other_adapters_are_refused_by_name(name: str, meaning: str) -> None:
    """Beside plain factors and alone; a file of nothing else is still known for what it is."""
    for names in ([name], [*KOHYA, name], [*DIFFUSERS, name]):
        with pytest.raises(UnsupportedError, match=rf"{re.escape(name)}' belongs to .*{meaning}.*[Mm]erge it"):
            pair_factors(names)
        # PEFT writes OFT without a word that is LoRA's.
        assert is_diffusion_lora(names) == (names != ["unet.x.oft_R.weight"])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (KOHYA[:1], r"the factor B \(up\) is missing"),
        (DIFFUSERS[1:], r"the factor A \(down\) is missing"),
        ([*KOHYA, *DIFFUSERS], r"two factors A of module 'unet.mid_block_x'"),
        ([*KOHYA, "lora_unet_y.alpha"], r"'lora_unet_y.alpha' is no factor"),
        ([*KOHYA, "lora_unet_y.something"], r"'lora_unet_y.something' is no factor"),
        ([*DIFFUSERS, "unet.y.lora_A.other.weight"], r"'unet.y.lora_A.other.weight' is no factor"),
    ],
)
def test_incomplete_and_unknown_parts_are_refused(names: list[str], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        pair_factors(names)


def test_what_is_no_part_of_a_lora_is_left_alone() -> None:
    pairs = pair_factors([*KOHYA, "lora_unet_mid_block_x.alpha", "bundle_emb.style.string_to_param.*"])
    assert list(pairs) == ["unet.mid_block_x"]
    assert pairs["unet.mid_block_x"].alpha == "lora_unet_mid_block_x.alpha"


def test_a_models_own_adapter_is_named_by_its_blocks() -> None:
    """Without a component in front, what the layers are part of is told by the others of the file."""
    for top, component in (("down_blocks.0", "unet."), ("transformer_blocks.0", "transformer."), ("blocks.0", "")):
        names = [f"{name}.lora_{side}.weight" for name in (f"{top}.y", "proj_out") for side in "AB"]
        assert f"{component}proj_out" in pair_factors(names)


PARTS = st.sampled_from(
    [
        *(
            "lora_unet_",
            "unet.",
            "lora_te1_",
            "text_encoder.",
            "input_blocks_",
            "4",
            "_",
            ".",
            "to_q",
            "to_out",
            "_lora",
        ),
        *(".lora_down.weight", ".lora_A.weight", ".lora.up.weight", ".lora_B.weight", ".alpha", "0", "x", "\n", "é"),
        ".hada_w1_a",
    ]
)


@settings(max_examples=300)
@given(st.lists(st.lists(PARTS, max_size=8).map("".join), max_size=6, unique=True))
def test_any_keys_raise_nothing_but_our_own_errors(names: list[str]) -> None:
    is_diffusion_lora(names)
    try:
        pairs = pair_factors(names)
    except EigenzooError:
        return
    assert sum(len(pair.keys) for pair in pairs.values()) == sum(split_key(name) is not None for name in names)
