"""What a U-Net config takes, and what it refuses by name."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from tu_diffuse.errors import ModelError
from tu_diffuse.unet.config import UNetConfig
from unet_configs import FAMILIES

SD1 = FAMILIES["sd1"]


def test_defaults_are_those_of_diffusers():
    with torch.device("meta"):
        model = UNet2DConditionModel()
    assert UNetConfig.from_dict(dict(model.config)) == UNetConfig()


def test_legacy_spellings():
    config = UNetConfig.from_dict(SD1 | {"only_cross_attention": [False] * 3, "transformer_layers_per_block": 1, "num_attention_heads": None})
    assert config.attention_head_dim == (8, 8, 8)
    assert config.layers_per_block == (2, 2, 2)
    assert config.transformer_layers_per_block == (1, 1, 1)


def test_fields_that_say_nothing_about_the_network_are_passed_over():
    ema = {
        "decay": 0.9999,
        "inv_gamma": 1.0,
        "min_decay": 0.0,
        "optimization_step": 470000,
        "power": 0.75,
        "update_after_step": 0,
        "use_ema_warmup": True,
    }
    notes = {"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.6.0", "_name_or_path": "x", "addition_embed_type_num_heads": 64}
    assert UNetConfig.from_dict(SD1 | ema | notes | {"field_of_the_future": None}) == UNetConfig.from_dict(SD1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("in_channels", -4),
        ("in_channels", 10**9),
        ("in_channels", True),
        ("in_channels", "4"),
        ("block_out_channels", [16, 32]),
        ("block_out_channels", [16, 32, 10**9]),
        ("block_out_channels", []),
        ("block_out_channels", 16),
        ("layers_per_block", 10**9),
        ("layers_per_block", 0),
        ("transformer_layers_per_block", [1, -1, 1]),
        ("transformer_layers_per_block", [[1, 1], [1, 1], [1, 1]]),
        ("cross_attention_dim", [24, 24, 24]),
        ("cross_attention_dim", 10**9),
        ("attention_head_dim", 5),
        ("attention_head_dim", [8, 8]),
        ("norm_num_groups", 7),
        ("norm_num_groups", None),
        ("norm_eps", float("nan")),
        ("dropout", 1.5),
        ("sample_size", -1),
        ("freq_shift", float("inf")),
        ("class_embed_type", "timestep"),
        ("class_embed_type", "projection"),
        ("addition_embed_type", "text"),
        ("addition_embed_type", "text_time"),
        ("num_class_embeds", 10),
        ("num_attention_heads", 8),
        ("only_cross_attention", True),
        ("only_cross_attention", [True, True, False]),
        ("dual_cross_attention", True),
        ("mid_block_type", "UNetMidBlock2DSimpleCrossAttn"),
        ("down_block_types", ["CrossAttnDownBlock2D", "AttnDownBlock2D", "DownBlock2D"]),
        ("resnet_time_scale_shift", "spatial"),
        ("time_cond_proj_dim", 256),
        ("time_embedding_type", "fourier"),
        ("encoder_hid_dim_type", "ip_image_proj"),
        ("encoder_hid_dim", -2),
        ("act_fn", "gelu"),
        ("conv_in_kernel", 1),
        ("mid_block_scale_factor", True),
        ("attention_type", "gated"),
        ("use_linear_projection", "yes"),
        ("_class_name", "FluxTransformer2DModel"),
        ("field_of_the_future", 3),
    ],
)
def test_refused_by_name_and_value(field, value):
    with pytest.raises(ModelError) as raised:
        UNetConfig.from_dict(SD1 | {field: value})
    message = str(raised.value)
    assert "\n" not in message
    named = {"block_out_channels": ("block_out_channels", "_types", "attention_head_dim"), "class_embed_type": ("class_embed_type",)}.get(
        field, (field,)
    )
    assert any(name in message for name in named)


def test_encoder_hid_dim_type_needs_a_width():
    with pytest.raises(ModelError, match="encoder_hid_dim"):
        UNetConfig.from_dict(SD1 | {"encoder_hid_dim_type": "text_proj"})


def test_the_pooled_vector_has_one_place():
    with pytest.raises(ModelError, match="pooled"):
        UNetConfig.from_dict(FAMILIES["sdxl"] | {"class_embed_type": "projection"})
