"""The layers of the U-Net: time embedding, residual block, attention, feed-forward, transformer. Parameter names are those of diffusers."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import AttentionBackend, attention, join_heads, split_heads
from .config import UNetConfig

Recorder = Callable[[str, Tensor, Tensor], None]


class TextContext(NamedTuple):
    """What every cross-attention layer needs of the prompt.

    Attributes:
        keys_values: for each cross-attention layer its key and value, (batch, heads, tokens, d) each.
        bias: (batch, 1, 1, tokens) bool, True = attend, or float, added to the scaled scores; None when all tokens count.
        recorder: called with layer name, query (batch, heads, h·w, d) and key (batch, heads, tokens, d) by every layer; None to record nothing.
    """

    keys_values: Sequence[tuple[Tensor, Tensor]]
    bias: Tensor | None
    recorder: Recorder | None


def sinusoidal_embedding(values: Tensor, width: int, flip_sin_to_cos: bool, freq_shift: float) -> Tensor:
    """Embed numbers as sines and cosines of geometric frequencies (Vaswani et al. 2017, section 3.5; with SD's order and shift).

    Args:
        values: (n,) float; timesteps or sizes, may be fractional.
        width: of the embedding; an odd one ends in a zero.
        flip_sin_to_cos: cosines first.
        freq_shift: frequency k is 10000^(-k/(width//2 - freq_shift)).

    Returns:
        (n, width) float32.
    """
    half = width // 2
    k = torch.arange(half, dtype=torch.float32, device=values.device)
    angles = values.float()[:, None] * torch.exp(-math.log(10000) / (half - freq_shift) * k)
    parts = (angles.cos(), angles.sin()) if flip_sin_to_cos else (angles.sin(), angles.cos())
    return F.pad(torch.cat(parts, dim=-1), (0, width % 2))


class EmbeddingMLP(nn.Module):
    """Linear, SiLU, linear: from a sinusoidal embedding or any vector (n, width) to the time embedding's space (n, time_width)."""

    def __init__(self, width: int, time_width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width, time_width)
        self.linear_2 = nn.Linear(time_width, time_width)

    def forward(self, x: Tensor) -> Tensor:
        """(n, width) to (n, time_width)."""
        return self.linear_2(F.silu(self.linear_1(x)))


class ResnetBlock(nn.Module):
    """Residual block (norm, SiLU, convolution, twice) with the time embedding added between, or scaling and shifting the second norm."""

    def __init__(self, config: UNetConfig, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.scale_shift = config.resnet_time_scale_shift == "scale_shift"
        self.norm1 = nn.GroupNorm(config.norm_num_groups, in_channels, eps=config.norm_eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(config.block_out_channels[0] * 4, out_channels * (2 if self.scale_shift else 1))
        self.norm2 = nn.GroupNorm(config.norm_num_groups, out_channels, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """(batch, in_channels, h, w) and the activated time embedding (batch, time_width) to (batch, out_channels, h, w)."""
        h = self.conv1(F.silu(self.norm1(x)))
        time = self.time_emb_proj(time)[:, :, None, None]
        if self.scale_shift:
            scale, shift = time.chunk(2, dim=1)
            h = torch.addcmul(shift, self.norm2(h), 1 + scale)
        else:
            h = self.norm2(h + time)
        h = self.conv2(self.dropout(F.silu(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class _Attention(nn.Module):
    """The projections that self- and cross-attention share."""

    def __init__(self, width: int, context_width: int, heads: int, upcast: bool, backend: AttentionBackend) -> None:
        super().__init__()
        self.heads = heads
        self.upcast = upcast
        self.backend = backend
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_width, width, bias=False)
        self.to_v = nn.Linear(context_width, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, tokens, context_width) to key and value, (batch, heads, tokens, d) each."""
        return split_heads(self.to_k(context), self.heads), split_heads(self.to_v(context), self.heads)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        """Attention and output projection: (batch, heads, tokens, d) to (batch, tokens, width)."""
        dtype = query.dtype
        if self.upcast:
            query, key, value = query.float(), key.float(), value.float()
        return self.to_out[0](join_heads(attention(query, key, value, bias=bias, backend=self.backend)).to(dtype))


class SelfAttention(_Attention):
    """Positions of the picture attend to each other."""

    def forward(self, x: Tensor) -> Tensor:
        """(batch, h·w, width) to the same."""
        key, value = self.keys_values(x)
        return self.attend(split_heads(self.to_q(x), self.heads), key, value, None)


class CrossAttention(_Attention):
    """Positions of the picture attend to the prompt's tokens. The U-Net gives each of these layers its name and its place in the list of keys."""

    name: str
    index: int

    def forward(self, x: Tensor, text: TextContext) -> Tensor:
        """(batch, h·w, width) to the same."""
        key, value = text.keys_values[self.index]
        query = split_heads(self.to_q(x), self.heads)
        if text.recorder is not None:
            text.recorder(self.name, query, key)
        return self.attend(query, key, value, text.bias)


class GEGLU(nn.Module):
    """Gated linear unit with GELU (Shazeer 2020, equation 6)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, inner * 2)

    def forward(self, x: Tensor) -> Tensor:
        """(…, width) to (…, inner)."""
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU four times as wide, and back."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([GEGLU(width, width * 4), nn.Identity(), nn.Linear(width * 4, width)])

    def forward(self, x: Tensor) -> Tensor:
        """(…, width) to the same."""
        return self.net[2](self.net[0](x))


class TransformerLayer(nn.Module):
    """Self-attention, cross-attention and feed-forward, each normalised first and added to its input."""

    def __init__(self, config: UNetConfig, width: int, heads: int, backend: AttentionBackend) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = SelfAttention(width, width, heads, config.upcast_attention, backend)
        self.norm2 = nn.LayerNorm(width)
        self.attn2 = CrossAttention(width, config.cross_attention_dim, heads, config.upcast_attention, backend)
        self.norm3 = nn.LayerNorm(width)
        self.ff = FeedForward(width)

    def forward(self, x: Tensor, text: TextContext) -> Tensor:
        """(batch, h·w, width) to the same."""
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), text)
        return x + self.ff(self.norm3(x))


class Transformer(nn.Module):
    """Transformer layers over the positions of a feature map, projected in and out and added to it (Rombach et al. 2022, section 3.3)."""

    def __init__(self, config: UNetConfig, width: int, heads: int, depth: int, backend: AttentionBackend) -> None:
        super().__init__()
        self.linear = config.use_linear_projection
        self.norm = nn.GroupNorm(config.norm_num_groups, width, eps=1e-6)
        self.proj_in = nn.Linear(width, width) if self.linear else nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList([TransformerLayer(config, width, heads, backend) for _ in range(depth)])
        self.proj_out = nn.Linear(width, width) if self.linear else nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, text: TextContext) -> Tensor:
        """(batch, width, h, w) to the same."""
        h = self.norm(x)
        tokens = self.proj_in(_tokens(h)) if self.linear else _tokens(self.proj_in(h))
        for layer in self.transformer_blocks:
            tokens = layer(tokens, text)
        return x + (_map(self.proj_out(tokens), x) if self.linear else self.proj_out(_map(tokens, x)))


def _tokens(x: Tensor) -> Tensor:
    """(batch, width, h, w) to (batch, h·w, width); a view when x is channels-last."""
    return x.flatten(2).transpose(1, 2)


def _map(tokens: Tensor, like: Tensor) -> Tensor:
    """(batch, h·w, width) to a channels-last view (batch, width, h, w)."""
    return tokens.transpose(1, 2).unflatten(2, like.shape[2:])
