"""The levels of the U-Net, down, middle and up. Parameter names are those of diffusers' blocks."""

from collections.abc import Sequence
from itertools import zip_longest

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import AttentionBackend
from .config import UNetConfig
from .layers import ResnetBlock, TextContext, Transformer


class Downsample(nn.Module):
    """Halves a feature map with a strided convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, h, w) to (batch, channels, ⌈h/2⌉, ⌈w/2⌉)."""
        return self.conv(x)


class Upsample(nn.Module):
    """Enlarges a feature map (nearest neighbour) and smooths it with a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        """(batch, channels, h, w) to (batch, channels, *size)."""
        return self.conv(F.interpolate(x, size=list(size), mode="nearest"))


class DownBlock(nn.Module):
    """One level on the way down; every feature map it makes is kept for the way up."""

    def __init__(self, config: UNetConfig, level: int, backend: AttentionBackend) -> None:
        super().__init__()
        widths = config.block_out_channels
        width, layers = widths[level], config.layers_per_block[level]
        before = [widths[max(level - 1, 0)], *[width] * (layers - 1)]
        self.resnets = nn.ModuleList([ResnetBlock(config, channels, width) for channels in before])
        crossed = config.down_block_types[level] == "CrossAttnDownBlock2D"
        heads, depth = config.attention_head_dim[level], config.transformer_layers_per_block[level]
        self.attentions = nn.ModuleList([Transformer(config, width, heads, depth, backend) for _ in range(layers if crossed else 0)])
        self.downsamplers = nn.ModuleList([Downsample(width)] if level < len(widths) - 1 else [])

    def forward(self, x: Tensor, time: Tensor, text: TextContext) -> list[Tensor]:
        """(batch, channels, h, w) to every feature map of the level, the last one being its output."""
        maps: list[Tensor] = []
        for resnet, transformer in zip_longest(self.resnets, self.attentions):
            x = resnet(x, time)
            x = x if transformer is None else transformer(x, text)
            maps.append(x)
        for downsample in self.downsamplers:
            maps.append(downsample(maps[-1]))
        return maps


class MidBlock(nn.Module):
    """Residual block, transformer, residual block at the lowest resolution."""

    def __init__(self, config: UNetConfig, backend: AttentionBackend) -> None:
        super().__init__()
        width = config.block_out_channels[-1]
        heads, depth = config.attention_head_dim[-1], config.transformer_layers_per_block[-1]
        self.attentions = nn.ModuleList([Transformer(config, width, heads, depth, backend)])
        self.resnets = nn.ModuleList([ResnetBlock(config, width, width), ResnetBlock(config, width, width)])

    def forward(self, x: Tensor, time: Tensor, text: TextContext) -> Tensor:
        """(batch, width, h, w) to the same."""
        return self.resnets[1](self.attentions[0](self.resnets[0](x, time), text), time)


class UpBlock(nn.Module):
    """One level on the way up; each of its residual blocks takes one kept feature map along."""

    def __init__(self, config: UNetConfig, index: int, backend: AttentionBackend) -> None:
        super().__init__()
        level = len(config.block_out_channels) - 1 - index
        widths = config.block_out_channels
        width, layers = widths[level], config.layers_per_block[level] + 1
        before = [widths[min(level + 1, len(widths) - 1)], *[width] * (layers - 1)]
        kept = [*[width] * (layers - 1), widths[max(level - 1, 0)]]
        self.resnets = nn.ModuleList([ResnetBlock(config, a + b, width) for a, b in zip(before, kept, strict=True)])
        crossed = config.up_block_types[index] == "CrossAttnUpBlock2D"
        heads, depth = config.attention_head_dim[level], config.up_transformer_layers[index]
        self.attentions = nn.ModuleList([Transformer(config, width, heads, depth, backend) for _ in range(layers if crossed else 0)])
        self.upsamplers = nn.ModuleList([Upsample(width)] if level > 0 else [])

    def forward(self, x: Tensor, kept: list[Tensor], time: Tensor, text: TextContext) -> Tensor:
        """(batch, channels, h, w) to the next level's input; takes its feature maps off the end of `kept`."""
        for resnet, transformer in zip_longest(self.resnets, self.attentions):
            x = resnet(torch.cat([x, kept.pop()], dim=1), time)
            x = x if transformer is None else transformer(x, text)
        for upsample in self.upsamplers:
            x = upsample(x, kept[-1].shape[2:])
        return x
