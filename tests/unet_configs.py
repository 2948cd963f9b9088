"""Tiny configs in the shapes of the families that the U-Net covers, and U-Nets filled with random weights for them."""

from typing import Any

import torch
from torch import nn
from tu_diffuse.unet.config import UNetConfig
from tu_diffuse.unet.unet import UNet

_SMALL: dict[str, Any] = {"norm_num_groups": 8, "sample_size": 8, "layers_per_block": 1}
FAMILIES: dict[str, dict[str, Any]] = {
    "sd1": _SMALL
    | {
        "block_out_channels": [16, 32, 32],
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
        "attention_head_dim": 8,
        "cross_attention_dim": 24,
        "layers_per_block": 2,
    },
    "sd2": _SMALL
    | {
        "block_out_channels": [16, 32],
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "attention_head_dim": [2, 4],
        "cross_attention_dim": 32,
        "use_linear_projection": True,
        "upcast_attention": True,
    },
    "sdxl": _SMALL
    | {
        "block_out_channels": [16, 32, 48],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "attention_head_dim": [2, 4, 4],
        "transformer_layers_per_block": [1, 2, 3],
        "cross_attention_dim": 40,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 20 + 6 * 8,
    },
    "refiner": _SMALL
    | {
        "block_out_channels": [16, 32, 48, 48],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "attention_head_dim": [2, 4, 4, 4],
        "transformer_layers_per_block": 2,
        "cross_attention_dim": 20,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 20 + 5 * 8,
    },
    "embedded": _SMALL
    | {
        "in_channels": 16,
        "out_channels": 16,
        "block_out_channels": [32, 48],
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
        "attention_head_dim": [4, 6],
        "cross_attention_dim": 24,
        "class_embed_type": "projection",
        "projection_class_embeddings_input_dim": 20,
        "resnet_time_scale_shift": "scale_shift",
        "use_linear_projection": True,
    },
    "inpaint": _SMALL
    | {
        "in_channels": 9,
        "block_out_channels": [16, 32],
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "attention_head_dim": 4,
        "cross_attention_dim": 24,
        "encoder_hid_dim": 30,
        "encoder_hid_dim_type": "text_proj",
        "mid_block_type": None,
        "freq_shift": 1,
        "flip_sin_to_cos": False,
    },
}
POOLED_WIDTH = 20
SIZE_IDS = {"sdxl": 6, "refiner": 5}


def randomize(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter random and far from its initial value, scaled so that the output is of order 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(0.2 * noise + (1 if "norm" in name and name.endswith("weight") else 0))
    return module


def random_unet(family: str, seed: int = 0) -> UNet:
    """A U-Net of that family with random weights, in eval mode."""
    unet = UNet(UNetConfig.from_dict(FAMILIES[family]))
    randomize(unet, seed)
    return unet.eval().requires_grad_(False)


def inputs(family: str, batch: int = 2, size: tuple[int, int] = (8, 8), tokens: int = 7, seed: int = 1) -> dict[str, torch.Tensor]:
    """Random x, t and tokens, and pooled and size_ids where the family takes them."""
    config = UNetConfig.from_dict(FAMILIES[family])
    generator = torch.Generator().manual_seed(seed)
    width = config.cross_attention_dim if config.encoder_hid_dim is None else config.encoder_hid_dim
    made = {
        "x": torch.randn((batch, config.in_channels, *size), generator=generator),
        "t": torch.rand(batch, generator=generator) * 999,
        "tokens": torch.randn((batch, tokens, width), generator=generator),
    }
    if config.class_embed_type is not None or config.addition_embed_type is not None:
        made["pooled"] = torch.randn((batch, POOLED_WIDTH), generator=generator)
    if family in SIZE_IDS:
        made["size_ids"] = torch.randint(1, 1024, (batch, SIZE_IDS[family]), generator=generator).float()
    return made
