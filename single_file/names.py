"""Names of modules in single-file checkpoints and in model folders, in both directions.

The names on the file's side are those of the modules in CompVis' latent-diffusion and Stability's generative-models (`ldm`, `sgm`) and in open_clip;
on the folder's side those of diffusers' and transformers' classes. Both number the same blocks: the file counts through all levels of the U-Net,
the folder within each.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_USUAL_BLOCKS = (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D")  # where a config names none
_VAE_RESNET = {name: name for name in ("norm1", "conv1", "norm2", "conv2")} | {"conv_shortcut": "nin_shortcut"}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP_BLOCK = {
    "layer_norm1": "ln_1",
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


@dataclass(frozen=True)
class Level:
    """One resolution of a U-Net on its way down.

    Attributes:
        resnets: residual blocks; the way up has one more.
        attention: whether each is followed by transformer layers.
    """

    resnets: int
    attention: bool


def levels_of(config: Mapping[str, Any]) -> list[Level]:
    """The levels of a U-Net's `config.json`."""
    kinds, resnets = config.get("down_block_types", _USUAL_BLOCKS), config.get("layers_per_block", 2)
    each = [resnets] * len(kinds) if isinstance(resnets, int) else resnets
    return [Level(count, kind == "CrossAttnDownBlock2D") for count, kind in zip(each, kinds, strict=True)]


def unet_modules(levels: Sequence[Level]) -> dict[str, str]:
    """Folder name -> file name of each module of a U-Net, below `model.diffusion_model.` in the file."""
    modules = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_in": "input_blocks.0.0",
        "mid_block.attentions.0": "middle_block.1",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    modules |= _all("mid_block.resnets.0", "middle_block.0", RESNET) | _all("mid_block.resnets.1", "middle_block.2", RESNET)
    block = 1
    for number, level in enumerate(levels):
        for layer in range(level.resnets):
            modules |= _all(f"down_blocks.{number}.resnets.{layer}", f"input_blocks.{block}.0", RESNET)
            if level.attention:
                modules[f"down_blocks.{number}.attentions.{layer}"] = f"input_blocks.{block}.1"
            block += 1
        if number < len(levels) - 1:
            modules[f"down_blocks.{number}.downsamplers.0.conv"] = f"input_blocks.{block}.0.op"
            block += 1
    block = 0
    for number, level in enumerate(reversed(levels)):
        for layer in range(level.resnets + 1):
            modules |= _all(f"up_blocks.{number}.resnets.{layer}", f"output_blocks.{block}.0", RESNET)
            if level.attention:
                modules[f"up_blocks.{number}.attentions.{layer}"] = f"output_blocks.{block}.1"
            block += 1
        if number < len(levels) - 1:
            modules[f"up_blocks.{number}.upsamplers.0.conv"] = f"output_blocks.{block - 1}.{2 if level.attention else 1}.conv"
    return modules


def ldm_names(modules: Iterable[str], config: Mapping[str, Any]) -> dict[str, str]:
    """File name -> folder name for the modules of a U-Net that have one, as SDXL's LoRA files call them (also known as SGM).

    Args:
        modules: names on the folder's side.
        config: the U-Net's `config.json`.
    """
    table = unet_modules(levels_of(config))
    return {theirs: name for name in modules if (theirs := renamed(name, table)) is not None}


def vae_modules(levels: int, resnets: int) -> dict[str, str]:
    """Folder name -> file name of each module of a KL autoencoder, below `first_stage_model.` in the file.

    Args:
        levels: resolutions.
        resnets: residual blocks a level in the encoder; the decoder has one more.
    """
    modules = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for half in ("encoder", "decoder"):
        modules |= {f"{half}.conv_in": f"{half}.conv_in", f"{half}.conv_norm_out": f"{half}.norm_out", f"{half}.conv_out": f"{half}.conv_out"}
        modules |= _all(f"{half}.mid_block.attentions.0", f"{half}.mid.attn_1", _VAE_ATTENTION)
        for layer in (0, 1):
            modules |= _all(f"{half}.mid_block.resnets.{layer}", f"{half}.mid.block_{layer + 1}", _VAE_RESNET)
    for level in range(levels):
        for layer in range(resnets):
            modules |= _all(f"encoder.down_blocks.{level}.resnets.{layer}", f"encoder.down.{level}.block.{layer}", _VAE_RESNET)
        modules[f"encoder.down_blocks.{level}.downsamplers.0.conv"] = f"encoder.down.{level}.downsample.conv"
        up = levels - 1 - level
        for layer in range(resnets + 1):
            modules |= _all(f"decoder.up_blocks.{up}.resnets.{layer}", f"decoder.up.{level}.block.{layer}", _VAE_RESNET)
        modules[f"decoder.up_blocks.{up}.upsamplers.0.conv"] = f"decoder.up.{level}.upsample.conv"
    return modules


def open_clip_modules(layers: int) -> dict[str, str]:
    """Folder name -> file name of each module of an OpenCLIP text tower, but for those that `PARAMETERS` and `JOINT` name."""
    modules = {"text_model.embeddings.token_embedding": "token_embedding", "text_model.final_layer_norm": "ln_final"}
    for layer in range(layers):
        modules |= _all(f"text_model.encoder.layers.{layer}", f"transformer.resblocks.{layer}", _OPEN_CLIP_BLOCK)
    return modules


PARAMETERS = {"text_model.embeddings.position_embedding.weight": "positional_embedding", "text_projection.weight": "text_projection"}
"""Tensors of an OpenCLIP text tower that belong to no module in the file; the projection is transposed there."""

JOINT = {f"self_attn.{part}_proj.{kind}": (f"attn.in_proj_{kind}", third) for kind in ("weight", "bias") for third, part in enumerate("qkv")}
"""Tensors of a layer that are a third of one in the file: its name, and which third of its rows."""


def renamed(name: str, modules: Mapping[str, str]) -> str | None:
    """A tensor's name with its module's replaced by what the table has for it; None where the table has neither it nor a module around it."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        other = modules.get(".".join(parts[:end]))
        if other is not None:
            return ".".join([other, *parts[end:]])
    return None


def _all(folder: str, file: str, names: Mapping[str, str]) -> dict[str, str]:
    return {f"{folder}.{ours}": f"{file}.{theirs}" for ours, theirs in names.items()}
