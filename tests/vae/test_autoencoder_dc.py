"""Our AutoencoderDC against diffusers' class, its refusals, and its gradients."""

import json

import pytest
import torch
from diffusers import AutoencoderDC as DiffusersAutoencoderDC
from tu_diffuse.errors import ModelError
from tu_diffuse.vae.autoencoder_dc import AutoencoderDC, AutoencoderDCConfig

EMBEDDED = {
    "latent_channels": 32,
    "encoder_block_out_channels": [24, 24, 48, 96, 192],
    "decoder_block_out_channels": [24, 24, 48, 96, 192],
    "encoder_layers_per_block": [0, 1, 1, 2, 2],
    "decoder_layers_per_block": [0, 1, 2, 2, 2],
}
# A full-resolution first level, groups of 1, 2, 4 and 8 channels, other widths on the two sides, one name a level, no outer shortcuts.
ASYMMETRIC = {
    "latent_channels": 5,
    "encoder_block_types": ["ResBlock"] * 5,
    "decoder_norm_types": ["rms_norm"] * 5,
    "decoder_act_fns": ["silu"] * 5,
    "encoder_block_out_channels": [16, 64, 128, 128, 64],
    "decoder_block_out_channels": [12, 16, 16, 32, 16],
    "encoder_layers_per_block": [1, 1, 1, 1, 1],
    "decoder_layers_per_block": [2, 1, 1, 1, 1],
    "encoder_out_shortcut": False,
    "decoder_in_shortcut": False,
    "decoder_conv_act_fn": "silu",
    "scaling_factor": 0.41407,
}


def pair(config: dict[str, object]) -> tuple[AutoencoderDC, DiffusersAutoencoderDC]:
    torch.manual_seed(0)
    parsed = AutoencoderDCConfig.from_dict(config)
    theirs = DiffusersAutoencoderDC.from_config(json.loads(json.dumps(parsed.to_dict())))
    with torch.no_grad():
        for parameter in theirs.parameters():  # norms begin as the identity: make every weight and bias count
            parameter.add_(0.1 * torch.randn_like(parameter) / parameter[0].numel() ** 0.5)
    ours = AutoencoderDC(parsed)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


@pytest.mark.parametrize("config", [EMBEDDED, ASYMMETRIC], ids=["embedded", "asymmetric"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
@torch.no_grad()
def test_parity_with_diffusers(config: dict[str, object], layout: torch.memory_format) -> None:
    ours, theirs = pair(config)
    ours.to(memory_format=layout)
    theirs.to(memory_format=layout)  # the kernels of the two layouts round differently, by up to 1e-5
    x = (torch.rand(2, 3, 64, 32) * 2 - 1).to(memory_format=layout)
    mean, logvar = ours.encode(x)
    wanted = theirs.encode(x).latent
    assert mean.shape == (2, ours.config.latent_channels, 64 // ours.config.downscale, 32 // ours.config.downscale)
    assert wanted.std() > 1e-2
    assert (mean - wanted).abs().max() <= 1e-5
    assert logvar.shape == mean.shape
    assert (logvar == -30.0).all()
    z = torch.randn_like(wanted)
    wanted = theirs.decode(z).sample
    assert wanted.std() > 1e-2
    assert (ours.decode(z) - wanted).abs().max() <= 1e-5


def test_gradients_agree_with_diffusers_for_every_parameter_and_the_picture() -> None:
    ours, theirs = pair(EMBEDDED)
    x = torch.randn(1, 3, 32, 32)
    ours_x, theirs_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    (ours(ours_x) - x).square().mean().backward()
    (theirs(theirs_x).sample - x).square().mean().backward()
    wanted = {name: parameter.grad for name, parameter in theirs.named_parameters()} | {"x": theirs_x.grad}
    got = {name: parameter.grad for name, parameter in ours.named_parameters()} | {"x": ours_x.grad}
    for name, gradient in wanted.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


@torch.no_grad()
def test_half_precision_norms_in_float32() -> None:
    ours, _ = pair(EMBEDDED)
    x = torch.full((1, 24, 2, 2), 3000.0)  # its square is beyond float16
    norm = ours.encoder.down_blocks[1][0].norm
    assert (norm.half()(x.half()).float() - norm.float()(x)).abs().max() < 1e-2


def test_picture_sides_that_do_not_fit_are_refused() -> None:
    ours, _ = pair(EMBEDDED)
    with pytest.raises(RuntimeError, match="pixel_unshuffle"):
        ours.encode(torch.zeros(1, 3, 40, 32))


def test_config_round_trip_keeps_latent_statistics() -> None:
    config = AutoencoderDCConfig.from_dict(EMBEDDED | {"latents_mean": [0.5] * 32, "latents_std": [2.0] * 32, "_diffusers_version": "0.42.1"})
    assert AutoencoderDCConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.latents_std == (2.0,) * 32
    assert config.downscale == 16
    assert AutoencoderDCConfig.from_dict(EMBEDDED | {"shift_factor": 0.25}).to_dict()["shift_factor"] == 0.25


@pytest.mark.parametrize("key", ["encoder_block_out_channels", "decoder_block_out_channels", "encoder_layers_per_block", "scaling_factor"])
def test_defaults_are_those_of_diffusers(key: str) -> None:
    with torch.device("meta"):
        assert DiffusersAutoencoderDC().config[key] == getattr(AutoencoderDCConfig(), key)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("_class_name", "AutoencoderKL"),
        ("encoder_block_types", ["ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock", "EfficientViTBlock"]),
        ("decoder_block_types", "EfficientViTBlock"),
        ("encoder_block_out_channels", [24, 24, 48, 96]),
        ("encoder_block_out_channels", [24, 24, 48, 96, 200]),
        ("encoder_block_out_channels", 24),
        ("decoder_block_out_channels", [24, 24, 44, 96, 192]),
        ("encoder_layers_per_block", [0, 1, 0, 2, 2]),
        ("decoder_layers_per_block", [0, 1, 2, 2]),
        ("latent_channels", 31),
        ("in_channels", True),
        ("upsample_block_type", "interpolate"),
        ("downsample_block_type", "Conv"),
        ("decoder_norm_types", "batch_norm"),
        ("decoder_act_fns", ["silu", "silu", "relu", "silu", "silu"]),
        ("decoder_conv_act_fn", "gelu"),
        ("encoder_out_shortcut", 1),
        ("scaling_factor", 0.0),
        ("shift_factor", float("nan")),
        ("latents_mean", [0.0] * 32),
        ("latents_std", [1.0] * 31),
        ("timesteps", 3),
    ],
)
def test_what_is_not_covered_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ModelError) as refusal:
        AutoencoderDCConfig.from_dict(EMBEDDED | {field: value})
    related = {"encoder_block_out_channels": "encoder_", "latents_std": "latents_"}.get(field, field)
    assert related in str(refusal.value)


def test_scale_and_shift_must_not_meet_channel_statistics() -> None:
    with pytest.raises(ModelError, match="shift_factor"):
        AutoencoderDCConfig.from_dict(EMBEDDED | {"latents_mean": [0.0] * 32, "latents_std": [1.0] * 32, "shift_factor": 0.1})
    with pytest.raises(ModelError, match="latents_std"):
        AutoencoderDCConfig.from_dict(EMBEDDED | {"latents_mean": [0.0] * 32, "latents_std": [0.0] + [1.0] * 31})
