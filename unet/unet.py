"""The cross-attention U-Net of latent diffusion (Rombach et al. 2022): a lean network that takes diffusers' weight files as they are."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import AttentionBackend, mask_bias
from .blocks import DownBlock, MidBlock, UpBlock
from .config import UNetConfig
from .layers import CrossAttention, EmbeddingMLP, Recorder, TextContext, sinusoidal_embedding


class UNet(nn.Module):
    """Predicts noise, velocity or clean latents from noisy latents, a timestep and a prompt.

    The prompt's keys and values are the same at every step, so they are an input: compute them once with `text_keys_values`.
    """

    def __init__(self, config: UNetConfig, backend: AttentionBackend = AttentionBackend.AUTO) -> None:
        super().__init__()
        self.config = config
        widths = config.block_out_channels
        levels, time_width = len(widths), widths[0] * 4
        projected = config.projection_class_embeddings_input_dim
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = EmbeddingMLP(widths[0], time_width)
        self.class_embedding = EmbeddingMLP(projected, time_width) if config.class_embed_type is not None and projected is not None else None
        self.add_embedding = EmbeddingMLP(projected, time_width) if config.addition_embed_type is not None and projected is not None else None
        self.encoder_hid_proj = None if config.encoder_hid_dim is None else nn.Linear(config.encoder_hid_dim, config.cross_attention_dim)
        self.down_blocks = nn.ModuleList([DownBlock(config, level, backend) for level in range(levels)])
        self.mid_block = None if config.mid_block_type is None else MidBlock(config, backend)
        self.up_blocks = nn.ModuleList([UpBlock(config, index, backend) for index in range(levels)])
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[0], eps=config.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)
        for index, (name, layer) in enumerate(self.cross_attention_layers()):
            layer.name, layer.index = name, index

    def cross_attention_layers(self) -> list[tuple[str, CrossAttention]]:
        """Name and module of every cross-attention layer; the order of `text_keys_values`."""
        return [(name, module) for name, module in self.named_modules() if isinstance(module, CrossAttention)]

    def text_keys_values(self, tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Compute what the cross-attention layers need of a prompt, once for all steps.

        Args:
            tokens: (batch, tokens, width) in the network's dtype; width is `encoder_hid_dim`, or `cross_attention_dim` when that is None.

        Returns:
            A (key, value) for each layer, (batch, heads, tokens, d) each.
        """
        if self.encoder_hid_proj is not None:
            tokens = self.encoder_hid_proj(tokens)
        return [layer.keys_values(tokens) for _, layer in self.cross_attention_layers()]

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        keys_values: Sequence[tuple[Tensor, Tensor]],
        mask: Tensor | None = None,
        pooled: Tensor | None = None,
        size_ids: Tensor | None = None,
        recorder: Recorder | None = None,
        added: tuple[Sequence[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Run the network.

        Args:
            x: (batch, in_channels, h, w) noisy latents, scaled as the network was trained (variance-preserving for every known checkpoint).
            t: (batch,) timesteps, 0 to 999 for known checkpoints; fractions are fine.
            keys_values: from `text_keys_values`.
            mask: (batch, tokens) bool, True where a token counts, or float, how much it does; a row without any counts as all True, as in diffusers.
                None when all do.
            pooled: (batch, pooled_width); the pooled text, for `class_embed_type` "projection" and `addition_embed_type` "text_time".
            size_ids: (batch, n) SDXL's size ids, for "text_time".
            recorder: see `TextContext`; the fused attention path stays in place.
            added: what a ControlNet adds to each kept feature map, in their order, and to the middle; None for nothing.

        Returns:
            (batch, out_channels, h, w).

        Raises:
            ValueError: `pooled` or `size_ids` is missing where the config asks for it, or given where the config has no use for it.
        """
        text = TextContext(keys_values, None if mask is None else _bias(mask, x.dtype), recorder)
        time = F.silu(self._time(t, pooled, size_ids))
        x = self.conv_in(x)
        kept = [x]
        for block in self.down_blocks:
            kept += block(x, time, text)
            x = kept[-1]
        if self.mid_block is not None:
            x = self.mid_block(x, time, text)
        if added is not None:
            kept = [own + more.to(own.dtype) for own, more in zip(kept, added[0], strict=True)]
            x = x + added[1].to(x.dtype)
        for block in self.up_blocks:
            x = block(x, kept, time, text)
        return self.conv_out(F.silu(self.conv_norm_out(x)))

    def _time(self, t: Tensor, pooled: Tensor | None, size_ids: Tensor | None) -> Tensor:
        config, dtype = self.config, self.time_embedding.linear_1.weight.dtype
        if (pooled is None) != (self.class_embedding is None and self.add_embedding is None):
            raise ValueError(f"pooled text was {'not ' if pooled is None else ''}given, which this U-Net's config does not fit.")
        if (size_ids is None) != (self.add_embedding is None):
            raise ValueError(f"size ids were {'not ' if size_ids is None else ''}given, which this U-Net's config does not fit.")
        time = self.time_embedding(sinusoidal_embedding(t, config.block_out_channels[0], config.flip_sin_to_cos, config.freq_shift).to(dtype))
        if self.class_embedding is not None and pooled is not None:
            time = time + self.class_embedding(pooled.to(dtype))
        if self.add_embedding is not None and pooled is not None and size_ids is not None and config.addition_time_embed_dim is not None:
            sizes = sinusoidal_embedding(size_ids.flatten(), config.addition_time_embed_dim, config.flip_sin_to_cos, config.freq_shift)
            time = time + self.add_embedding(torch.cat([pooled.to(dtype), sizes.unflatten(0, size_ids.shape).flatten(1).to(dtype)], dim=-1))
        return time


def _bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    mask = torch.where(mask.any(dim=1, keepdim=True), mask, True)
    return mask_bias(mask.to(dtype) if mask.is_floating_point() else mask)
