"""Which file is a LoRA of a diffusion model, what its layers are called, and which kinds of adapters are refused by name."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eigenzoo.errors import EigenzooError, FormatError, UnsupportedError
from eigenzoo.formats.lora.diffusion_keys import pair_factors, split_key
from eigenzoo.formats.lora.factor_names import DIFFUSION, MLX, PEFT, factor_kind
from eigenzoo.formats.lora.sgm_blocks import to_diffusers

ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
NEMO = [f"decoder.layers.0.mlp.linear_fc{n}.adapter.linear_{side}.weight" for n in (1, 2) for side in ("in", "out")]
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
    "transformer.blocks.7.attn2_add_k_proj": [
        "transformer.blocks.7.attn2.add_k_proj.lora_A.weight",
        "diffusion_model.blocks.7.cross_attn.k_img.lora_A.weight",
        "diffusion_model.blocks.7.cross_attn.k_img.lora_down.weight",
        "lora_unet_blocks_7_cross_attn_k_img.lora_down.weight",
        "blocks.7.cross_attn.k_img.lora_A.default.weight",
    ],
    "transformer.single_transformer_blocks.3.proj_out": [
        "transformer.single_transformer_blocks.3.proj_out.lora_A.weight",
        "lora_transformer_single_transformer_blocks_3_proj_out.lora_down.weight",
        "lora_unet_single_blocks_3_linear2.lora_down.weight",
        "diffusion_model.single_blocks.3.linear2.lora_A.weight",
        "single_blocks.3.proj_out.lora_A.default.weight",
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
        network = "transformer" if module.startswith("transformer.") else ""
        assert (found.side, found.module(network)) == ("A", module), key
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
    with pytest.raises(UnsupportedError, match=r"is not a module of Stable Diffusion's UNet.*save_lora_weights"):
        to_diffusers(name)


KOHYA = ["lora_unet_mid_block_x.lora_down.weight", "lora_unet_mid_block_x.lora_up.weight"]
DIFFUSERS = ["unet.mid_block.x.lora_A.weight", "unet.mid_block.x.lora_B.weight"]


def factors(*modules: str, style: str = ".lora_{}.weight") -> list[str]:
    return [module + style.format(side) for module in modules for side in "AB"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (KOHYA, DIFFUSION),
        (DIFFUSERS, DIFFUSION),
        (["lora_unet_x.hada_w1_a", "lora_unet_x.hada_w1_b"], DIFFUSION),
        (["transformer.x.lokr_w1", "transformer.x.lokr_w2"], DIFFUSION),
        (["encoder.weight", "encoder.bias"], None),
        (["lora_proj.weight", "lora.0.weight", "x.alpha"], None),
        # RWKV-7 calls its own small networks so; a whole model.
        (["model.layers.0.attn.w_lora.lora.0.weight", "model.layers.0.attn.w_lora.lora.2.bias"], None),
        (factors("base_model.model.x"), PEFT),
        (factors("base_model.model.x", style=".lora_{}.default.weight"), PEFT),
        (factors("base_model.model.x", style=".lora_embedding_{}"), PEFT),
        (["base_model.model.x.hada_w1_a", "base_model.model.x.hada_w1_b"], PEFT),
        (["base_model.model.x.ia3_l"], PEFT),
        (["prompt_embeddings"], PEFT),
        # Weights that PEFT saves whole beside an adapter that trains them.
        ([*factors("base_model.model.lm_head"), "base_model.model.lm_head.base_layer.weight"], PEFT),
        # PEFT's names without its prefix say the scale nowhere, and no diffusion model has such layers.
        (factors("model.layers.0.self_attn.q_proj"), PEFT),
        (factors("transformer.h.0.attn.c_attn"), PEFT),
        (factors("transformer.blocks.0.attn.Wqkv"), PEFT),
        (factors("blocks.0.attn.qkv", "blocks.0.mlp.fc1"), PEFT),
        (factors("transformer.blocks.0.attn1.to_q", "transformer.blocks.0.ffn.net.0.proj"), DIFFUSION),
        (factors("blocks.0.self_attn.q", style=".lora_{}.default.weight"), DIFFUSION),
        (factors("diffusion_model.layers.0.attention.qkv"), DIFFUSION),
        (factors("layers.0.attention.to_q", style=".lora_{}.default.weight"), DIFFUSION),
        ([*factors("model.layers.0.self_attn.q_proj"), "model.layers.0.self_attn.q_proj.alpha"], DIFFUSION),
        (["model.layers.0.self_attn.q_proj.lora_a", "model.layers.0.self_attn.q_proj.lora_b"], MLX),
    ],
)
def test_a_file_is_known_by_its_keys(names: list[str], expected: str | None) -> None:
    assert factor_kind(names, "m") == expected


@pytest.mark.parametrize(
    "names",
    [
        [*factors("base_model.model.x", style=".lora_{}.default.weight"), "base_model.model.x.base_layer.weight"],
        [*factors("x"), "x.base_layer.weight"],
        [*factors("x"), "x.weight"],
        [*factors("unet.x"), "unet.x.base_layer.weight"],
        ["x.lora_a", "x.lora_b", "x.linear.weight"],
        ["layers.0.attn.q_proj.lora_a.weight", "layers.0.attn.q_proj.lora_b.weight", "layers.0.attn.q_proj.weight"],
        [*factors("transformer.h.0.attn.qkv", style=".lora_{}"), "transformer.h.0.attn.qkv.linear.weight"],
        # Phi-4-multimodal, which is published so; jina-embeddings-v3.
        [*factors("m.qkv_proj", style=".lora_{}.speech.weight"), *factors("m.qkv_proj", style=".lora_{}.vision.weight"),
         "m.qkv_proj.base_layer.weight"],
        [*factors("m.Wqkv.parametrizations.weight.0", style=".lora_{}"), "m.Wqkv.parametrizations.weight.original"],
    ],
)  # fmt: skip
def test_a_whole_model_with_its_lora_beside_the_weights_is_refused(names: list[str]) -> None:
    with pytest.raises(UnsupportedError, match=r"m: the LoRA of this whole model is not merged.*merge_and_unload"):
        factor_kind(names, "m")


@pytest.mark.parametrize(
    ("names", "tool"),
    [
        (["double_blocks.0.processor.qkv_lora1.down.weight", "double_blocks.0.processor.qkv_lora1.up.weight"], "XLabs"),
        (["single_blocks.0.processor.proj_lora.down.weight", "single_blocks.0.processor.proj_lora.up.weight"], "XLabs"),
        (["layers.0.attn.q_proj.lora_a.weight", "layers.0.attn.q_proj.lora_b.weight"], "torchtune"),
        (factors("transformer.h.0.attn.qkv", style=".lora_{}"), "LitGPT"),
        (factors("decoder.layers.0.self_attn.q_proj", style=".lora_{}"), "loralib"),
        (["unet:0:up", "unet:0:down", "text_encoder:11:up", "text_encoder:11:down", "<token>"], "cloneofsimo"),
        (NEMO, "NeMo"),
        (
            [f"model.layers.0.{name}_adapter.linear_{side}.weight" for name in ("q", "v") for side in ("in", "out")],
            "NeMo",
        ),
        (["model.layers.0.q_proj.lora_right_weight", "model.layers.0.q_proj.lora_left_weight"], "DeepSpeed-Chat"),
        (["layers/dense/lora_kernel_a", "layers/dense/lora_kernel_b"], "Keras"),
        (["layers.embedding.lora_embeddings_a", "layers.embedding.lora_embeddings_b"], "Keras"),
    ],
)
def test_factors_of_other_tools_are_refused_by_the_tools_name(names: list[str], tool: str) -> None:
    with pytest.raises(
        UnsupportedError, match=rf"m: the file has LoRA factors as {tool}.* writes them.*never as weights"
    ):
        factor_kind(names, "m")


@pytest.mark.parametrize(
    "names",
    [
        *(
            ["base_model.model.§.lora_A.weight"],
            ["base_model.model.§.lora_embedding_A"],
            ["base_model.model.§.hada_w1_a"],
        ),
        *(["unet.mid_block.§.lora_A.weight"], ["lora_unet_mid_block_§.lora_down.weight"], ["lora_unet_§.hada_w1_a"]),
        *(["§.lora_a"], ["§.lora_a.weight"], ["§.lora_A"], ["§.adapter.linear_in.weight"], ["§.lora_left_weight"]),
        *(["§.processor.qkv_lora1.down.weight"], ["§/lora_kernel_a"], ["§.lora_A.weight", "§.base_layer.weight"]),
    ],
)
def test_a_newline_in_a_name_changes_nothing(names: list[str]) -> None:
    """Else factors would be read as weights without a word."""

    def kind(module: str) -> str | None:
        try:
            return factor_kind([name.replace("§", module) for name in names], "m")
        except UnsupportedError as error:
            return error.what

    assert kind("xy") is not None
    assert kind("x\ny") == kind("xy")


def test_modules_that_are_called_like_nemos_factors_are_weights() -> None:
    names = [f"vision.adapter.linear_{side}.weight" for side in ("in", "out")]
    assert factor_kind([*names, "vision.norm.weight", "text.weight"], "m") is None
    with pytest.raises(UnsupportedError, match="the LoRA of this whole model is not merged"):
        factor_kind([*names, "vision.to_wrap.weight"], "m")


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
        assert factor_kind(names, "m") == (None if names == ["unet.x.oft_R.weight"] else DIFFUSION)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (KOHYA[:1], r"the factor B \(up\) is missing"),
        (DIFFUSERS[1:], r"the factor A \(down\) is missing"),
        ([*KOHYA, *DIFFUSERS], r"module 'unet.mid_block_x' has two factors A"),
        ([*KOHYA, "lora_unet_y.alpha"], r"'lora_unet_y.alpha' is not a factor"),
        ([*KOHYA, "lora_unet_y.something"], r"'lora_unet_y.something' is not a factor"),
        ([*DIFFUSERS, "unet.y.lora_A.other.weight"], r"the file has factors of several adapters: '', 'other'"),
        (factors("unet.x", style=".lora_{}.weight.other"), r"'unet.x.lora_A.weight.other' is not a factor"),
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
    tops = {"down_blocks.0": "unet.", "transformer_blocks.0": "transformer.", "blocks.0.self_attn": "", "layers.0": ""}
    for top, component in tops.items():
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
    try:
        factor_kind(names, "m")
        pairs = pair_factors(names)
    except EigenzooError:
        return
    assert sum(len(pair.keys) for pair in pairs.values()) == sum(split_key(name) is not None for name in names)
