"""Pixels to scaled latents and back, with a float32 retry: a picture comes back finite, or RenderError is raised."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import DataError, RenderError, UsageError
from ..offload import present
from ..seamless import wrapped
from .autoencoder import Autoencoder
from .autoencoder_dc import AutoencoderDC, AutoencoderDCConfig
from .config import AutoencoderConfig
from .tiling import tiled_decode, tiled_encode

LatentModel = Autoencoder | AutoencoderDC
LatentConfig = AutoencoderConfig | AutoencoderDCConfig

FLOAT32_RETRY = "vae-float32-retry"


@dataclass(frozen=True, eq=False)
class Encoded:
    """Scaled latents, and for each picture what had to be done differently.

    Attributes:
        latents: (batch, latent_channels, h/f, w/f) float32.
        fallbacks: one tuple a picture, empty or holding `vae-float32-retry`.
    """

    latents: Tensor
    fallbacks: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, eq=False)
class Decoded:
    """Decoded pictures, and for each what had to be done differently.

    Attributes:
        pixels: (batch, out_channels, h, w) float32, finite, about [-1, 1] but not clamped.
        fallbacks: one tuple a picture, empty or holding `vae-float32-retry`.
    """

    pixels: Tensor
    fallbacks: tuple[tuple[str, ...], ...]


def scale_latents(config: LatentConfig, z: Tensor) -> Tensor:
    """Bring the VAE's own latents to the scale that the denoiser is trained in.

    (z − shift)·scaling (Rombach et al. 2022, section D.1; the shift as SD3 has it), or (z − mean)·scaling/std where the config carries
    latents_mean and latents_std (as the SDXL family does it).

    Args:
        config: of the VAE.
        z: (batch, latent_channels, h, w).
    """
    shift, scale = _affine(config, z)
    return (z - shift) * scale


def unscale_latents(config: LatentConfig, latents: Tensor) -> Tensor:
    """Invert `scale_latents`: (batch, latent_channels, h, w) from the denoiser's scale to the VAE's own."""
    shift, scale = _affine(config, latents)
    return latents / scale + shift


def _affine(config: LatentConfig, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
    if config.latents_mean is not None and config.latents_std is not None:
        mean, std = (like.new_tensor(values)[:, None, None] for values in (config.latents_mean, config.latents_std))
        return mean, config.scaling_factor / std
    return 0.0 if config.shift_factor is None else config.shift_factor, config.scaling_factor


def sample_posterior(mean: Tensor, std: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """One draw from each Gaussian of mean and std (batch, c, h, w), with one CPU generator a row."""
    noise = torch.cat([torch.randn((1, *mean.shape[1:]), generator=generator) for generator in generators])
    return mean + std * noise.to(mean.device)


def to_uint8(pixels: Tensor) -> Tensor:
    """(batch, 3, h, w) in [-1, 1] to (batch, h, w, 3) uint8: clamped to [0, 1] after (x + 1)/2, times 255, rounded to nearest (even at .5)."""
    return ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)


class LatentCodec:
    """The VAE as the pipeline sees it: pictures to latents in the denoiser's scale, and back.

    Args:
        vae: used as it is, in its own device and dtype; float16 weights are turned to float32 in place where the config says force_upcast.
        tile_rows: latent rows computed at a time, without a change in the result and in half the memory (see `tiling.py`); None: all at once.

    Raises:
        UsageError: tile_rows below 1, or with a VAE other than `Autoencoder`.
    """

    def __init__(self, vae: LatentModel, tile_rows: int | None = None):
        if tile_rows is not None and (tile_rows < 1 or not isinstance(vae, Autoencoder)):
            raise UsageError(f"tile_rows = {tile_rows} came with a {type(vae).__name__}; wanted 1 or more, with an AutoencoderKL; leave it out.")
        forced = vae.config.force_upcast and _dtype(vae) is torch.float16
        self.vae = vae.float() if forced else vae
        self.config = vae.config
        self.tile_rows = tile_rows

    @property
    def has_variance(self) -> bool:
        """Whether q(z|x) has a variance of its own; where it has none, a sample is the mean and takes no noise."""
        return self.vae.has_variance

    def tiled(self, axes: str | None) -> "LatentCodec":
        """A codec of pictures that meet themselves along `axes` ("x", "y" or "xy"), over the same weights; this one where there are none.

        Raises:
            UsageError: the autoencoder is the library's, whose padding is its own.
        """
        if axes is None:
            return self
        if not isinstance(self.vae, LatentModel):  # pyright: ignore[reportUnnecessaryIsInstance]  # the library's is passed off as ours
            raise UsageError("--tile needs an autoencoder that our own network covers, and this model's is computed by diffusers; leave it out.")
        return LatentCodec(wrapped(self.vae, axes), self.tile_rows)

    @torch.no_grad()
    def encode(self, pixels: Tensor, generators: Sequence[torch.Generator] | None = None) -> Encoded:
        """Encode pictures to latents in the denoiser's scale.

        Args:
            pixels: (batch, in_channels, h, w) in [-1, 1]; h and w multiples of config.downscale.
            generators: one CPU generator a picture to sample q(z|x) with; None takes the mean.

        Raises:
            DataError: sides that are not multiples of config.downscale.
            RenderError: values that are not finite, in the pictures or in float32 latents.
        """
        mean, std, fallbacks = self.posterior(pixels)
        return Encoded(mean if generators is None else sample_posterior(mean, std, generators), fallbacks)

    @torch.no_grad()
    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor, tuple[tuple[str, ...], ...]]:
        """The diagonal Gaussian q(z|x) of each picture in the denoiser's scale: mean and standard deviation, float32; and `Encoded.fallbacks`.

        Arguments and errors as of `encode`.
        """
        factor = self.config.downscale
        if pixels.shape[2] % factor or pixels.shape[3] % factor:
            raise DataError(
                f"A picture of {pixels.shape[3]}×{pixels.shape[2]} came to the VAE; wanted sides that are multiples of {factor}; crop it."
            )
        gaussian, fallbacks = _finite(self.vae, self._moments, pixels, "pictures to encode")
        mean, logvar = gaussian.chunk(2, dim=1)
        _, scale = _affine(self.config, mean)
        return scale_latents(self.config, mean), (0.5 * logvar).exp() * scale, fallbacks

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Decoded:
        """Decode latents (batch, latent_channels, h, w) in the denoiser's scale to pictures.

        Raises:
            RenderError: values that are not finite, in the latents or in float32 pictures; a picture that is not right is never returned.
        """
        pixels, fallbacks = _finite(self.vae, self._pixels, unscale_latents(self.config, latents.float()), "latents to decode")
        return Decoded(pixels, fallbacks)

    def _moments(self, vae: LatentModel, x: Tensor) -> Tensor:
        if self.tile_rows is not None and isinstance(vae, Autoencoder):
            return torch.cat(tiled_encode(vae, x, self.tile_rows), dim=1)
        return torch.cat(vae.encode(x), dim=1)

    def _pixels(self, vae: LatentModel, z: Tensor) -> Tensor:
        if self.tile_rows is not None and isinstance(vae, Autoencoder):
            return tiled_decode(vae, z, self.tile_rows)
        return vae.decode(z)


def _dtype(vae: LatentModel) -> torch.dtype:
    return next(vae.parameters()).dtype


def _finite(vae: LatentModel, compute: Callable[[LatentModel, Tensor], Tensor], x: Tensor, what: str) -> tuple[Tensor, tuple[tuple[str, ...], ...]]:
    """Return compute(vae, x) as float32, the rows that were not finite computed again in float32; with one tuple of fallbacks a row."""
    if not x.isfinite().all():
        raise RenderError(f"The {what} hold NaN or infinite values; wanted finite ones; what made them overflowed, so run it in float32.")
    dtype = _dtype(vae)
    with present(vae):
        y = compute(vae, x.to(dtype)).float()
    retried = _non_finite_rows(y) if dtype in (torch.float16, torch.bfloat16) else []
    if retried:
        exact = copy.deepcopy(vae).float()
        with present(exact):
            y[retried] = compute(exact, x[retried].float())
    broken = _non_finite_rows(y)
    if broken:
        rows = ", ".join(str(row + 1) for row in broken)
        raise RenderError(f"The VAE gave NaN or infinite values in float32 for picture {rows} of {len(y)}; use another VAE.")
    return y, tuple((FLOAT32_RETRY,) if row in retried else () for row in range(len(y)))


def _non_finite_rows(x: Tensor) -> list[int]:
    return [row for row, finite in enumerate(x.isfinite().flatten(1).all(dim=1).tolist()) if not finite]
