"""Decoding and encoding in strips gives the untiled result: no seam, no change of colour, less memory."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary
from tu_diffuse.vae.autoencoder import Autoencoder
from tu_diffuse.vae.config import AutoencoderConfig
from tu_diffuse.vae.tiling import tiled_decode, tiled_encode


def sd_shaped(dtype=torch.float32, **fields) -> Autoencoder:
    torch.manual_seed(11)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    config = AutoencoderConfig(block_out_channels=(16, 32, 64, 64), layers_per_block=2, norm_num_groups=8, **blocks, **fields)
    return Autoencoder(config).eval().to(dtype)


def uneven_latents(height: int, width: int, dtype=torch.float32) -> torch.Tensor:
    """Latents whose mean and contrast change from top to bottom, so that statistics of a part are not those of the whole."""
    ramp = torch.linspace(0.1, 3, height, dtype=dtype)[:, None]
    return torch.randn(1, 4, height, width, dtype=dtype) * ramp + ramp


@pytest.mark.parametrize("rows", [1, 4, 50])
@torch.no_grad()
def test_decoding_in_strips_gives_the_untiled_picture(rows):
    vae, z = sd_shaped(torch.float64), uneven_latents(9, 7, torch.float64)
    # Statistics are kept in float32, so that is the precision to expect even in float64.
    torch.testing.assert_close(tiled_decode(vae, z, rows), vae.decode(z), atol=2e-5, rtol=0)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("fields", [{}, {"mid_block_add_attention": False, "use_quant_conv": False, "use_post_quant_conv": False}])
@torch.no_grad()
def test_strips_agree_in_float32(memory_format, fields):
    vae = sd_shaped(**fields).to(memory_format=memory_format)
    z = torch.cat([uneven_latents(10, 6), 2 - uneven_latents(10, 6)])
    torch.testing.assert_close(tiled_decode(vae, z, 3), vae.decode(z), atol=1e-4, rtol=0)
    x = torch.rand(2, 3, 72, 40) * torch.linspace(0, 2, 72)[:, None] - 1
    before = x.clone()
    for ours, whole in zip(tiled_encode(vae, x, 2), vae.encode(x), strict=True):
        torch.testing.assert_close(ours, whole, atol=1e-4, rtol=0)
    assert torch.equal(x, before)


@torch.no_grad()
def test_tiles_decoded_apart_would_differ():
    """The trap itself: the same strips decoded one after the other are far off, so the tests above can fail."""
    vae, z = sd_shaped(), uneven_latents(12, 6)
    apart = torch.cat([vae.decode(strip) for strip in z.split(3, dim=2)], dim=2)
    assert (apart - vae.decode(z)).abs().max() > 0.1


@torch.no_grad()
def test_no_step_at_the_borders_of_strips():
    vae, rows = sd_shaped(), 3
    z = torch.linspace(0.5, 2, 15)[:, None] * torch.randn(1, 4, 1, 1).expand(1, 4, 1, 8)  # smooth, as a sky is: there a seam shows
    tiled, whole = tiled_decode(vae, z, rows), vae.decode(z)
    apart = torch.cat([vae.decode(strip) for strip in z.split(rows, dim=2)], dim=2)
    steps, expected, seams = ((x[:, :, 1:] - x[:, :, :-1]).abs().mean((0, 1, 3)) for x in (tiled, whole, apart))
    border = torch.zeros_like(steps, dtype=torch.bool)
    border[rows * 8 - 1 :: rows * 8] = True
    assert border.sum() == 4
    torch.testing.assert_close(steps, expected, atol=1e-5, rtol=0)
    inner = border & (torch.arange(len(border)) < 80)  # the last border is where the zero padding of the edge reaches
    # Rows of the same phase (8 pixels a latent) between the borders show what a step may be.
    usual = steps[(torch.arange(len(steps)) % 8 == 7) & ~border].median()
    assert steps[inner].max() <= 1.25 * usual
    assert seams[inner].min() > 3 * usual  # strips decoded apart do have seams


class _PeakBytes(TorchDispatchMode):
    """Bytes of all storages that operators have made and that are alive, at most."""

    def __init__(self):
        super().__init__()
        self.alive = WeakIdKeyDictionary()
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.alive[tensor.untyped_storage()] = tensor.untyped_storage().nbytes()
        self.peak = max(self.peak, sum(self.alive.values()))
        return result


@torch.no_grad()
def test_strips_hold_less_at_once():
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    vae = Autoencoder(AutoencoderConfig(block_out_channels=(16, 32, 32), norm_num_groups=8, **blocks)).to(memory_format=torch.channels_last)
    z = torch.randn(1, 4, 32, 8)
    with _PeakBytes() as whole:
        vae.decode(z)
    with _PeakBytes() as tiled:
        tiled_decode(vae, z, 1)
    widest = 32 * 128 * 32 * 4  # bytes of the widest feature map: 32 channels at full resolution
    assert tiled.peak < 1.35 * widest
    assert whole.peak > 2 * widest
