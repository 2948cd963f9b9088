"""Names of the U-Net's modules in the original latent diffusion (Rombach et al. 2022), which SDXL's files keep (also called SGM)."""

import re
from collections.abc import Iterable, Sequence

_BLOCK = re.compile(r"(?P<way>down|up)_blocks\.(?P<level>\d+)\.(?P<kind>resnets|attentions|downsamplers|upsamplers)\.(?P<number>\d+)\.(?P<rest>.+)")
_MIDDLE = re.compile(r"mid_block\.(?P<kind>resnets|attentions)\.(?P<number>\d+)\.(?P<rest>.+)")
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def ldm_names(modules: Iterable[str], layers_per_block: int | Sequence[int]) -> dict[str, str]:
    """Original name -> diffusers' name, for the modules that have one.

    In the original every residual block, with the transformer (number 1) after it, is an entry of one list, and so is every change of resolution on
    the way down; entry 0 is `conv_in`. On the way up each level has one residual block more, and the change of resolution lies in the last of them,
    after its transformer if there is one.

    Args:
        modules: diffusers' names of all modules with weights.
        layers_per_block: of the U-Net, one number for all levels or one for each on the way down.
    """
    every = list(modules)
    attending = {match["level"] for name in every if (match := _BLOCK.fullmatch(name)) and (match["way"], match["kind"]) == ("up", "attentions")}
    named = {name: _name(name, layers_per_block, attending) for name in every}
    return {original: name for name, original in named.items() if original is not None}


def _name(module: str, layers_per_block: int | Sequence[int], attending: set[str]) -> str | None:
    middle = _MIDDLE.fullmatch(module)
    if middle is not None:
        entry = 1 if middle["kind"] == "attentions" else 2 * int(middle["number"])
        return f"middle_block.{entry}.{_inner(middle['kind'], middle['rest'])}"
    block = _BLOCK.fullmatch(module)
    if block is None:
        return _OUTSIDE.get(module)
    kind, rest = block["kind"], _inner(block["kind"], block["rest"])
    level, down = int(block["level"]), block["way"] == "down"
    layers = [layers_per_block] * (level + 1) if isinstance(layers_per_block, int) else list(layers_per_block if down else reversed(layers_per_block))
    first = sum(layers[:level]) + level  # each level has an entry more than layers: a change of resolution, or a residual block
    match kind:
        case "downsamplers":
            return f"input_blocks.{first + layers[level] + 1}.0.op"
        case "upsamplers":
            return f"output_blocks.{first + layers[level]}.{2 if block['level'] in attending else 1}.{rest}"
        case _:
            entry = first + int(block["number"]) + down
            return f"{'input' if down else 'output'}_blocks.{entry}.{int(kind == 'attentions')}.{rest}"


def _inner(kind: str, rest: str) -> str:
    return _RESNET.get(rest, rest) if kind == "resnets" else rest
