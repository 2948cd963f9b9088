"""Random ControlNets and depth networks in the published layouts, in miniature, saved by diffusers and transformers."""

import json
from pathlib import Path
from typing import Any

import torch

BACKBONES = ("dpt", "hybrid", "beit", "swinv2", "depth_anything")


def control_network(folder: Path, out: Path) -> Path:
    """A ControlNet for a model folder's U-Net."""
    from diffusers import ControlNetModel
    from tiny_models import randomised

    config = json.loads((folder / "unet" / "config.json").read_text())
    names = ("block_out_channels", "down_block_types", "layers_per_block", "norm_num_groups", "cross_attention_dim", "attention_head_dim")
    names = (*names, "use_linear_projection", "addition_embed_type", "addition_time_embed_dim", "projection_class_embeddings_input_dim")
    network = ControlNetModel(**{name: config[name] for name in names if config.get(name) is not None}, conditioning_embedding_out_channels=(4, 8))
    randomised(network, 5).save_pretrained(out)
    return out


def depth_network(out: Path, kind: str = "dpt") -> Path:
    """What estimates depth: DPT with its own encoder, with BiT's (hybrid), BEiT's or Swin V2's, or Depth Anything with DINOv2's."""
    import transformers as t

    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
    shared: dict[str, Any] = {"fusion_hidden_size": 8, "image_size": 64, "patch_size": 16, "hidden_size": 16}
    plain = sizes | {"intermediate_size": 16, "backbone_out_indices": [0, 1, 2, 3]}
    stages = [f"stage{number}" for number in range(1, 5)]
    processing: dict[str, Any] = {"size": {"height": 64, "width": 64}}
    match kind:
        case "dpt":
            network = t.DPTForDepthEstimation(t.DPTConfig(**shared | plain, neck_hidden_sizes=[4, 8, 8, 8]))
        case "hybrid":
            layers: dict[str, Any] = {"depths": [1, 1, 1], "hidden_sizes": [8, 16, 32, 64], "num_groups": 4, "embedding_size": 8}
            inner = t.BitConfig(**layers, layer_type="bottleneck", global_padding="same", out_features=stages[:3], embedding_dynamic_padding=True)
            extra: dict[str, Any] = {"is_hybrid": True, "neck_ignore_stages": [0, 1], "backbone_featmap_shape": [1, 32, 4, 4]}
            network = t.DPTForDepthEstimation(t.DPTConfig(**shared | plain | extra, backbone_config=inner, neck_hidden_sizes=[8, 16, 8, 8]))
        case "beit":
            inner = t.BeitConfig(**sizes, intermediate_size=16, image_size=64, patch_size=16, out_features=stages, reshape_hidden_states=False)
            network = t.DPTForDepthEstimation(t.DPTConfig(**shared, backbone_config=inner, backbone_out_indices=None, neck_hidden_sizes=[4, 8, 8, 8]))
        case "swinv2":
            layers = {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 2], "window_size": 4, "patch_size": 4}
            inner = t.Swinv2Config(**layers, image_size=64, out_features=stages)
            widths: dict[str, Any] = {"neck_hidden_sizes": [8, 16, 32, 64], "backbone_out_indices": None}
            network = t.DPTForDepthEstimation(t.DPTConfig(**shared, **widths, backbone_config=inner))
        case _:
            inner = t.Dinov2Config(**sizes, image_size=28, patch_size=14, out_indices=[1, 2, 3, 4], reshape_hidden_states=False)
            widths = {"reassemble_hidden_size": 16, "neck_hidden_sizes": [4, 8, 8, 8], "head_hidden_size": 4}
            network = t.DepthAnythingForDepthEstimation(t.DepthAnythingConfig(backbone_config=inner, patch_size=14, fusion_hidden_size=8, **widths))
            processing |= {"ensure_multiple_of": 14, "keep_aspect_ratio": True}
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
            if parameter.numel() == 1:  # the last bias: depth stays above zero
                parameter.fill_(5.0)
    network.save_pretrained(out)
    t.DPTImageProcessor(**processing).save_pretrained(out)
    return out
