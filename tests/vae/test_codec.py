"""The latent codec: scale, rounding, the float32 retry, and the refusal to return a picture that is not finite."""

import copy

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from tu_diffuse.errors import DataError, RenderError, UsageError
from tu_diffuse.vae.autoencoder import Autoencoder
from tu_diffuse.vae.autoencoder_dc import AutoencoderDC, AutoencoderDCConfig
from tu_diffuse.vae.codec import FLOAT32_RETRY, LatentCodec, scale_latents, to_uint8, unscale_latents
from tu_diffuse.vae.config import AutoencoderConfig


def tiny(**fields) -> Autoencoder:
    torch.manual_seed(3)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    return Autoencoder(AutoencoderConfig(block_out_channels=(16, 16, 32), norm_num_groups=8, **blocks, **fields)).eval()


def overflowing_in_half(**fields) -> Autoencoder:
    """A VAE whose widest features are beyond float16's 65504 and whose output is of order one."""
    vae = tiny(**fields)
    with torch.no_grad():
        for block in (vae.decoder.up_blocks[-1].resnets[-1], vae.encoder.mid_block.resnets[-1]):
            block.conv2.weight.mul_(1e5 / block.conv2.weight.abs().max() / 4)
            block.conv2.bias.fill_(6e4)
    return vae


SCALES = [
    {},
    {"scaling_factor": 0.13025},
    {"scaling_factor": 0.3611, "shift_factor": 0.1159},
    {"scaling_factor": 0.5, "latents_mean": (0.1, -0.2, 0.3, 0.0), "latents_std": (0.5, 1.0, 2.0, 3.0)},
]


@pytest.mark.parametrize("scale", SCALES)
@torch.no_grad()
def test_scale_is_applied_once_each_way(scale):
    vae = tiny(**scale)
    codec = LatentCodec(vae)
    pixels = torch.rand(2, 3, 16, 24) * 2 - 1
    encoded = codec.encode(pixels)
    z = vae.encode(pixels)[0]
    torch.testing.assert_close(unscale_latents(vae.config, encoded.latents), z)
    assert not torch.allclose(encoded.latents, z)
    decoded = codec.decode(encoded.latents)
    torch.testing.assert_close(decoded.pixels, vae.decode(z), atol=1e-5, rtol=0)
    assert decoded.fallbacks == encoded.fallbacks == ((), ())


def test_scale_formulas_are_those_of_the_diffusers_pipelines():
    z = torch.randn(1, 4, 2, 2)
    shifted = AutoencoderConfig(scaling_factor=1.5, shift_factor=0.06)
    torch.testing.assert_close(scale_latents(shifted, z), (z - 0.06) * 1.5)
    mean, std = (0.1, -0.2, 0.3, 0.0), (0.5, 1.0, 2.0, 3.0)
    normed = AutoencoderConfig(scaling_factor=0.5, latents_mean=mean, latents_std=std)
    mean, std = (torch.tensor(values).view(1, 4, 1, 1) for values in (mean, std))
    torch.testing.assert_close(scale_latents(normed, z), (z - mean) * 0.5 / std)
    torch.testing.assert_close(unscale_latents(normed, z), z * std / 0.5 + mean)


@torch.no_grad()
def test_sampling_agrees_with_diffusers_and_does_not_depend_on_the_batch():
    vae = tiny()
    oracle = AutoencoderKL.from_config(vae.config.to_dict()).eval()
    oracle.load_state_dict(vae.state_dict())
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    together = LatentCodec(vae).encode(pixels, [torch.Generator().manual_seed(seed) for seed in (5, 6)]).latents
    alone = LatentCodec(vae).encode(pixels[1:], [torch.Generator().manual_seed(6)]).latents
    theirs = oracle.encode(pixels[1:]).latent_dist.sample(torch.Generator().manual_seed(6)) * vae.config.scaling_factor
    torch.testing.assert_close(together[1:], alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(alone, theirs, atol=1e-5, rtol=0)
    assert not torch.allclose(alone, LatentCodec(vae).encode(pixels[1:]).latents, atol=1e-3)


def test_to_uint8_rounds_as_diffusers_does():
    pixels = torch.cat([torch.linspace(-1.2, 1.2, 3 * 64 * 64), (torch.arange(3 * 64 * 64) % 256 + 0.5) / 127.5 - 1]).view(2, 3, 64, 64)
    theirs = VaeImageProcessor().postprocess(pixels, output_type="pil")
    ours = to_uint8(pixels)
    assert ours.shape == (2, 64, 64, 3)
    assert ours.dtype == torch.uint8
    assert (ours.numpy() == np.stack([np.asarray(picture) for picture in theirs])).all()


@pytest.mark.parametrize("tile_rows", [None, 2])
def test_a_picture_that_overflows_in_half_precision_is_made_in_float32(tile_rows):
    vae = overflowing_in_half(force_upcast=False)
    latents = torch.randn(2, 4, 4, 4)
    expected = LatentCodec(copy.deepcopy(vae)).decode(latents).pixels
    half = vae.half()
    assert not half.decode(unscale_latents(vae.config, latents).half()).isfinite().all()
    decoded = LatentCodec(half, tile_rows).decode(latents)
    assert decoded.fallbacks == ((FLOAT32_RETRY,), (FLOAT32_RETRY,))
    torch.testing.assert_close(decoded.pixels, expected, atol=2e-2, rtol=0)
    assert decoded.pixels.std() > 0.05
    assert next(half.parameters()).dtype is torch.float16
    encoded = LatentCodec(half, tile_rows).encode(torch.rand(1, 3, 16, 16))
    assert encoded.fallbacks == ((FLOAT32_RETRY,),)
    assert encoded.latents.isfinite().all()


def test_only_the_picture_that_overflowed_is_made_again(monkeypatch):
    vae = tiny(force_upcast=False).half()
    codec = LatentCodec(vae)
    decode = Autoencoder.decode
    seen = []

    def poisoned(self, z):
        pixels = decode(self, z)
        seen.append((len(z), pixels.dtype))
        if pixels.dtype is torch.float16:
            pixels[1, 0, 3, 3] = float("inf")
        return pixels

    latents = torch.randn(3, 4, 4, 4)
    healthy = codec.decode(latents).pixels
    monkeypatch.setattr(Autoencoder, "decode", poisoned)
    decoded = codec.decode(latents)
    assert decoded.fallbacks == ((), (FLOAT32_RETRY,), ())
    assert seen == [(3, torch.float16), (1, torch.float32)]
    assert torch.equal(decoded.pixels[[0, 2]], healthy[[0, 2]])
    assert (decoded.pixels[1] - healthy[1]).abs().max() < 2e-2


def test_force_upcast_turns_float16_weights_to_float32_and_leaves_bfloat16():
    codec = LatentCodec(overflowing_in_half(force_upcast=True).half())
    decoded = codec.decode(torch.randn(1, 4, 4, 4))
    assert next(codec.vae.parameters()).dtype is torch.float32
    assert decoded.fallbacks == ((),)
    assert next(LatentCodec(tiny(force_upcast=True).bfloat16()).vae.parameters()).dtype is torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tile_rows", [None, 2])
def test_values_that_are_never_finite_raise_and_give_no_picture(dtype, tile_rows):
    vae = tiny(force_upcast=False).to(dtype)
    with torch.no_grad():
        vae.decoder.conv_out.bias[1] = float("nan")
        vae.encoder.conv_out.bias[1] = float("inf")
    codec = LatentCodec(vae, tile_rows)
    with pytest.raises(RenderError, match="picture 1, 2 of 2"):
        codec.decode(torch.randn(2, 4, 4, 4))
    with pytest.raises(RenderError, match="float32"):
        codec.encode(torch.rand(1, 3, 16, 16))


def test_latents_that_are_not_finite_are_blamed_on_who_made_them():
    latents = torch.randn(1, 4, 4, 4)
    latents[0, 2, 1, 1] = float("nan")
    with pytest.raises(RenderError, match="latents"):
        LatentCodec(tiny()).decode(latents)


def test_sides_that_do_not_fit_are_refused():
    with pytest.raises(DataError, match="18×16"):
        LatentCodec(tiny()).encode(torch.rand(1, 3, 16, 18))


@torch.no_grad()
def test_tiles_are_used_and_do_not_change_the_picture():
    vae = tiny()
    latents, pixels = torch.randn(1, 4, 9, 5), torch.rand(1, 3, 20, 16)
    whole, tiled = LatentCodec(vae), LatentCodec(vae, tile_rows=2)
    torch.testing.assert_close(tiled.decode(latents).pixels, whole.decode(latents).pixels, atol=1e-4, rtol=0)
    torch.testing.assert_close(tiled.encode(pixels).latents, whole.encode(pixels).latents, atol=1e-4, rtol=0)
    vae.decode = vae.encode = None
    tiled.decode(latents)
    tiled.encode(pixels)


def test_tiles_that_cannot_be_had_are_refused():
    with pytest.raises(UsageError, match="tile_rows = 0"):
        LatentCodec(tiny(), tile_rows=0)
    deep = AutoencoderDC(
        AutoencoderDCConfig(
            encoder_block_out_channels=(32,), decoder_block_out_channels=(32,), encoder_layers_per_block=(1,), decoder_layers_per_block=(1,)
        )
    )
    with pytest.raises(UsageError, match="AutoencoderDC"):
        LatentCodec(deep, tile_rows=4)
