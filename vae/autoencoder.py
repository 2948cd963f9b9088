"""The KL autoencoder of latent diffusion (Rombach et al. 2022, section 3.1), under the parameter names of diffusers' AutoencoderKL."""

from collections.abc import Mapping
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import AttentionBackend
from .config import AutoencoderConfig
from .layers import DownBlock, MidBlock, UpBlock, group_norm


class Encoder(nn.Module):
    """Pictures to the mean and log-variance of their latents, before `quant_conv`."""

    def __init__(self, config: AutoencoderConfig, backend: AttentionBackend):
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            [
                DownBlock(a, b, config.layers_per_block, groups, downsample=level < len(widths) - 1)
                for level, (a, b) in enumerate(pairwise((widths[0], *widths)))
            ]
        )
        self.mid_block = MidBlock(widths[-1], groups, config.mid_block_add_attention, backend)
        self.conv_norm_out = group_norm(widths[-1], groups)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in_channels, h, w) to (batch, 2·latent_channels, h/f, w/f), f = config.downscale."""
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.head(self.mid_block(x))

    def head(self, x: Tensor) -> Tensor:
        """Norm, activation and last convolution on the features of the coarsest level."""
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Decoder(nn.Module):
    """Latents, after `post_quant_conv`, to pictures."""

    def __init__(self, config: AutoencoderConfig, backend: AttentionBackend):
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups, config.mid_block_add_attention, backend)
        self.up_blocks = nn.ModuleList(
            [
                UpBlock(a, b, config.layers_per_block + 1, groups, upsample=level < len(widths) - 1)
                for level, (a, b) in enumerate(pairwise((widths[0], *widths)))
            ]
        )
        self.conv_norm_out = group_norm(widths[-1], groups)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """(batch, latent_channels, h, w) to (batch, out_channels, f·h, f·w), f = config.downscale."""
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Autoencoder(nn.Module):
    """The whole VAE; its latents are unscaled (`codec.py` scales them).

    Args:
        config: shape of the network.
        backend: kernel of the attention at the coarsest level.
    """

    has_variance = True

    def __init__(self, config: AutoencoderConfig, backend: AttentionBackend = AttentionBackend.AUTO):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config, backend)
        self.decoder = Decoder(config, backend)
        channels = config.latent_channels
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1) if config.use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(channels, channels, 1) if config.use_post_quant_conv else None

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Give the diagonal Gaussian of the latents, q(z|x).

        Args:
            x: (batch, in_channels, h, w) in [-1, 1].

        Returns:
            mean and log-variance, each (batch, latent_channels, h/f, w/f) with f = config.downscale; log-variance within [-30, 20].
        """
        return self.moments(self.encoder(x))

    def moments(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Split the encoder's (batch, 2·latent_channels, h, w) output into mean and log-variance."""
        mean, logvar = (features if self.quant_conv is None else self.quant_conv(features)).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def decode(self, z: Tensor) -> Tensor:
        """(batch, latent_channels, h, w) to pictures (batch, out_channels, f·h, f·w), about [-1, 1] but not clamped."""
        return self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z))

    def forward(self, x: Tensor) -> Tensor:
        """Encode to the mean and decode it again."""
        return self.decode(self.encode(x)[0])


_LEGACY_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def modernise_keys(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the attention weights of VAE files from before diffusers 0.17 (query, key, value, proj_attn); other names stay.

    The 1×1-convolution form of those weights, (channels, channels, 1, 1), becomes the linear one.
    """
    renamed: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if ".attentions." in name:
            for old, new in _LEGACY_NAMES.items():
                name = name.replace(old, new)
            weight = weight.flatten(1) if weight.ndim == 4 else weight
        renamed[name] = weight
    return renamed
