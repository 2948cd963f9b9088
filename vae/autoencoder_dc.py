"""The deep-compression autoencoder DC-AE (Chen et al. 2024, arXiv 2410.10733), under the names of diffusers' AutoencoderDC.

Residual blocks only. Changes of resolution move pixels into channels and back, and every such step has a shortcut without parameters
(section 3.1, "residual autoencoding"), so that the convolutions learn only what differs from it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ModelError
from .config import frozen, is_count, is_number

NORM_EPS = 1e-5
LOGVAR = -30.0
_ATTENTION_ONLY = ("attention_head_dim", "encoder_qkv_multiscales", "decoder_qkv_multiscales")
_OPTIONAL = ("shift_factor", "latents_mean", "latents_std")


@dataclass(frozen=True)
class AutoencoderDCConfig:
    """Shape and latent scale: the fields, names and defaults of diffusers' `AutoencoderDC`, and three more that `AutoencoderKL` has.

    Attributes:
        in_channels: channels of the pictures, 1 to 64.
        latent_channels: 1 to 1024; divides the last width where a shortcut joins the two.
        encoder_block_types: `ResBlock`, one name or one a level.
        decoder_block_types: as encoder_block_types.
        encoder_block_out_channels: width of each level from the finest to the coarsest; 1 to 8 levels.
        decoder_block_out_channels: as many levels as the encoder.
        encoder_layers_per_block: residual blocks of each level, 1 to 64. With 0 in the first place that level has no features: one step
            goes from the pictures to the second level, and the first width is not used.
        decoder_layers_per_block: as encoder_layers_per_block.
        upsample_block_type: `pixel_shuffle`.
        downsample_block_type: `pixel_unshuffle`.
        decoder_norm_types: `rms_norm`, one name or one a level.
        decoder_act_fns: `silu`, one name or one a level.
        encoder_out_shortcut: add the averaged last features to the latents.
        decoder_in_shortcut: add the repeated latents to the first features.
        decoder_conv_act_fn: `relu` or `silu`, before the last convolution.
        scaling_factor: latents are multiplied by it, > 0.
        shift_factor: subtracted from the autoencoder's own latents before scaling.
        latents_mean: one mean a latent channel, subtracted before scaling; together with latents_std.
        latents_std: one standard deviation a latent channel, divided by after subtracting, > 0.
    """

    in_channels: int = 3
    latent_channels: int = 32
    encoder_block_types: str | tuple[str, ...] = "ResBlock"
    decoder_block_types: str | tuple[str, ...] = "ResBlock"
    encoder_block_out_channels: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
    decoder_block_out_channels: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
    encoder_layers_per_block: tuple[int, ...] = (2, 2, 2, 3, 3, 3)
    decoder_layers_per_block: tuple[int, ...] = (3, 3, 3, 3, 3, 3)
    upsample_block_type: str = "pixel_shuffle"
    downsample_block_type: str = "pixel_unshuffle"
    decoder_norm_types: str | tuple[str, ...] = "rms_norm"
    decoder_act_fns: str | tuple[str, ...] = "silu"
    encoder_out_shortcut: bool = True
    decoder_in_shortcut: bool = True
    decoder_conv_act_fn: str = "relu"
    scaling_factor: float = 1.0
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        """Check every field; ModelError names the first that is not usable."""
        for name, top in (("in_channels", 64), ("latent_channels", 1024)):
            self._require(is_count(getattr(self, name), top), name, f"a whole number from 1 to {top}")
        for side, has_shortcut in (("encoder", "encoder_out_shortcut"), ("decoder", "decoder_in_shortcut")):
            self._require(isinstance(getattr(self, has_shortcut), bool), has_shortcut, "true or false")
            self._check_side(side, getattr(self, has_shortcut))
        levels = len(self.encoder_block_out_channels)
        self._require(len(self.decoder_block_out_channels) == levels, "decoder_block_out_channels", f"{levels} levels, as in the encoder")
        for name, only in (
            ("encoder_block_types", "ResBlock"),
            ("decoder_block_types", "ResBlock"),
            ("decoder_norm_types", "rms_norm"),
            ("decoder_act_fns", "silu"),
        ):
            self._require(getattr(self, name) in (only, (only,) * levels), name, f"{only}, once or {levels} times")
        self._require(self.upsample_block_type == "pixel_shuffle", "upsample_block_type", "pixel_shuffle")
        self._require(self.downsample_block_type == "pixel_unshuffle", "downsample_block_type", "pixel_unshuffle")
        self._require(self.decoder_conv_act_fn in ("relu", "silu"), "decoder_conv_act_fn", "relu or silu")
        self._require(is_number(self.scaling_factor) and 1e-6 < self.scaling_factor < 1e6, "scaling_factor", "a number from 1e-6 to 1e6")
        self._require(self.shift_factor is None or is_number(self.shift_factor), "shift_factor", "a number or null")
        for name in ("latents_mean", "latents_std"):
            values: tuple[float, ...] | None = getattr(self, name)
            usable = values is None or (len(values) == self.latent_channels and all(map(is_number, values)))
            self._require(usable, name, f"{self.latent_channels} numbers (latent_channels) or null")
        self._require(self.latents_std is None or min(self.latents_std) > 0, "latents_std", "numbers above 0")
        self._require((self.latents_mean is None) == (self.latents_std is None), "latents_mean", "set together with latents_std")
        self._require(self.latents_mean is None or self.shift_factor is None, "shift_factor", "null where latents_mean is set")

    def _check_side(self, side: str, shortcut: bool) -> None:
        widths_name, layers_name = f"{side}_block_out_channels", f"{side}_layers_per_block"
        widths: Sequence[int] = getattr(self, widths_name)
        layers: Sequence[int] = getattr(self, layers_name)
        self._require(1 <= len(widths) <= 8 and all(is_count(w, 8192) for w in widths), widths_name, "1 to 8 whole numbers from 1 to 8192")
        usable = len(layers) == len(widths) and all(is_count(n, 64) for n in layers[1:])
        usable = usable and (is_count(layers[0], 64) or (layers[0] == 0 and len(widths) > 1))
        self._require(usable, layers_name, f"{len(widths)} whole numbers from 1 to 64 (the first may be 0)")
        used = widths[1:] if layers[0] == 0 else widths
        for fine, coarse in pairwise(used):
            fits = 4 * fine % coarse == 0 and (side == "decoder" or coarse % 4 == 0)
            self._require(fits, widths_name, "each width a divisor of 4 times the one before (in the encoder also a multiple of 4)")
        if side == "encoder" and layers[0] == 0:
            self._require(used[0] % 4 == 0, widths_name, "a multiple of 4 in the second place")
        self._require(not shortcut or used[-1] % self.latent_channels == 0, "latent_channels", f"a divisor of the last of {widths_name}")

    def _require(self, holds: bool, field: str, wanted: str) -> None:
        if not holds:
            raise _refusal(field, getattr(self, field), wanted)

    @property
    def force_upcast(self) -> bool:
        """Compute in float32 when the weights are float16: always, as AutoencoderDC has no such field."""
        return True

    @property
    def downscale(self) -> int:
        """Pixels to a latent position, along each side."""
        return 2 ** (len(self.encoder_block_out_channels) - 1)

    @classmethod
    def from_dict(cls, config: Mapping[str, object]) -> "AutoencoderDCConfig":
        """Read the content of a `config.json`.

        Keys that begin with an underscore are diffusers' own notes; attention_head_dim and the two qkv_multiscales describe attention
        blocks, which no network of this class has. Both are left out.

        Raises:
            ModelError: a class, key or value that this autoencoder does not cover, named with its value.
        """
        if config.get("_class_name", "AutoencoderDC") != "AutoencoderDC":
            raise _refusal("_class_name", config["_class_name"], "AutoencoderDC")
        given = {key: frozen(value) for key, value in config.items() if not key.startswith("_") and key not in _ATTENTION_ONLY}
        known = {field.name: str(field.type) for field in fields(cls)}
        for key, value in given.items():
            if key not in known:
                raise _refusal(key, value, "no such field")
            if known[key].startswith("tuple") and not isinstance(value, tuple) and (value is not None or key not in _OPTIONAL):
                raise _refusal(key, value, "a list")
        return cls(**given)  # type: ignore[arg-type]  # __post_init__ checks each value

    def to_dict(self) -> dict[str, object]:
        """Return the content of a `config.json` that diffusers' AutoencoderDC reads too; the AutoencoderKL fields only where they are set."""
        values = {key: list(cast(tuple[object, ...], v)) if isinstance(v, tuple) else v for key, v in asdict(self).items()}
        no_attention: list[list[int]] = [[] for _ in self.encoder_block_out_channels]
        return {
            "_class_name": "AutoencoderDC",
            **{key: value for key, value in values.items() if key not in _OPTIONAL or value is not None},
            "encoder_qkv_multiscales": no_attention,
            "decoder_qkv_multiscales": no_attention,
        }


def _refusal(field: str, value: object, wanted: str) -> ModelError:
    return ModelError(
        f"The VAE config has {field} = {value!r:.100}; wanted: {wanted}; check that config.json is of an AutoencoderDC with ResBlock levels."
    )


class ChannelRMSNorm(nn.Module):
    """x / sqrt(mean over channels of x²) · weight + bias at each position (Zhang and Sennrich 2019, equation 4), computed in float32."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, h, w) to the same shape."""
        # With contiguous tensors, reducing over dim 1 takes 17 to 29 % less time (with the gradient, one core) than moving the channels last;
        # with channels_last tensors it takes up to 19 % more.
        inverse = x.float().square().mean(1, keepdim=True).add(NORM_EPS).rsqrt()
        return (x * inverse).to(x.dtype) * self.weight[:, None, None] + self.bias[:, None, None]


class ResBlock(nn.Module):
    """x + norm(conv(silu(conv(x))))."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = ChannelRMSNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, h, w) to the same shape."""
        return x + self.norm(self.conv2(F.silu(self.conv1(x))))


class DownBlock(nn.Module):
    """Half the resolution: convolution and pixels into channels; the shortcut averages groups of unshuffled channels (figure 4)."""

    def __init__(self, in_channels: int, out_channels: int, shortcut: bool):
        super().__init__()
        self.group = 4 * in_channels // out_channels if shortcut else 0
        self.conv = nn.Conv2d(in_channels, out_channels // 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in_channels, h, w) to (batch, out_channels, h/2, w/2)."""
        y = F.pixel_unshuffle(self.conv(x), 2)
        return y + _average_channels(F.pixel_unshuffle(x, 2), self.group) if self.group else y


class UpBlock(nn.Module):
    """Twice the resolution: convolution and channels into pixels; the shortcut repeats each channel before the shuffle (figure 4)."""

    def __init__(self, in_channels: int, out_channels: int, shortcut: bool):
        super().__init__()
        self.shortcut = shortcut
        self.conv = nn.Conv2d(in_channels, 4 * out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in_channels, h, w) to (batch, out_channels, 2h, 2w)."""
        return F.pixel_shuffle(_add_repeated(self.conv(x), x) if self.shortcut else self.conv(x), 2)


def _average_channels(x: Tensor, group: int) -> Tensor:
    """Average each run of `group` channels."""
    return x if group == 1 else x.unflatten(1, (-1, group)).mean(2)


def _add_repeated(y: Tensor, x: Tensor) -> Tensor:
    """Add to y the channels of x, each repeated so often that there are as many as y has; broadcast, so that no repeat is ever stored."""
    return (y.unflatten(1, (x.shape[1], -1)) + x.unsqueeze(2)).flatten(1, 2)


class Encoder(nn.Module):
    """Pictures to latents."""

    def __init__(self, config: AutoencoderDCConfig):
        super().__init__()
        widths, layers = config.encoder_block_out_channels, config.encoder_layers_per_block
        direct = layers[0] == 0
        self.conv_in = DownBlock(config.in_channels, widths[1], shortcut=False) if direct else nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for level, (width, count) in enumerate(zip(widths, layers, strict=True)):
            blocks: list[nn.Module] = [ResBlock(width) for _ in range(count)]
            if count and level + 1 < len(widths):
                blocks.append(DownBlock(width, widths[level + 1], shortcut=True))
            self.down_blocks.append(nn.Sequential(*blocks))
        self.conv_out = nn.Conv2d(widths[-1], config.latent_channels, 3, padding=1)
        self.group = widths[-1] // config.latent_channels if config.encoder_out_shortcut else 0

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in_channels, h, w) to (batch, latent_channels, h/f, w/f), f = config.downscale."""
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(x) + _average_channels(x, self.group) if self.group else self.conv_out(x)


class Decoder(nn.Module):
    """Latents to pictures."""

    def __init__(self, config: AutoencoderDCConfig):
        super().__init__()
        widths, layers = config.decoder_block_out_channels, config.decoder_layers_per_block
        direct = layers[0] == 0
        self.shortcut = config.decoder_in_shortcut
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.up_blocks = nn.ModuleList()
        for level, (width, count) in enumerate(zip(widths, layers, strict=True)):
            blocks: list[nn.Module] = [ResBlock(width) for _ in range(count)]
            if count and level + 1 < len(widths):
                blocks.insert(0, UpBlock(widths[level + 1], width, shortcut=True))
            self.up_blocks.append(nn.Sequential(*blocks))
        last = widths[1] if direct else widths[0]
        self.norm_out = ChannelRMSNorm(last)
        self.activation = F.relu if config.decoder_conv_act_fn == "relu" else F.silu
        self.conv_out = UpBlock(last, config.in_channels, shortcut=False) if direct else nn.Conv2d(last, config.in_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """(batch, latent_channels, h, w) to (batch, in_channels, f·h, f·w), f = config.downscale."""
        x = _add_repeated(self.conv_in(z), z) if self.shortcut else self.conv_in(z)
        for block in reversed(self.up_blocks):
            x = block(x)
        return self.conv_out(self.activation(self.norm_out(x)))


class AutoencoderDC(nn.Module):
    """The whole autoencoder; its latents are unscaled (`codec.py` scales them)."""

    has_variance = False

    def __init__(self, config: AutoencoderDCConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Give the latents as a diagonal Gaussian, the contract of the KL autoencoder.

        A DC-AE has no variance of its own and its config names none: the log-variance is the constant -30 (standard deviation 3e-7), so
        that a sample is the mean. Noise that training adds to the latents belongs to the training.

        Args:
            x: (batch, in_channels, h, w) in [-1, 1]; h and w multiples of f = config.downscale.

        Returns:
            mean and log-variance, each (batch, latent_channels, h/f, w/f).

        Raises:
            RuntimeError: h or w not a multiple of f (PyTorch's own words).
        """
        mean = self.encoder(x)
        return mean, torch.full_like(mean, LOGVAR)

    def decode(self, z: Tensor) -> Tensor:
        """(batch, latent_channels, h, w) to pictures (batch, in_channels, f·h, f·w), about [-1, 1] but not clamped."""
        return self.decoder(z)

    def forward(self, x: Tensor) -> Tensor:
        """Encode to the mean and decode it again."""
        return self.decode(self.encode(x)[0])
