"""Our KL autoencoder against diffusers' AutoencoderKL, weight for weight."""

import pytest
import torch
from diffusers import AutoencoderKL
from tu_diffuse.attention import AttentionBackend
from tu_diffuse.errors import ModelError
from tu_diffuse.vae.autoencoder import Autoencoder, modernise_keys
from tu_diffuse.vae.config import AutoencoderConfig

SHAPES = {
    "sd": {"block_out_channels": (16, 32, 64, 64), "layers_per_block": 2, "norm_num_groups": 8},
    "sdxl": {"block_out_channels": (16, 32, 48), "layers_per_block": 2, "norm_num_groups": 16, "force_upcast": True, "scaling_factor": 0.13025},
    "flux": {
        "block_out_channels": (16, 32, 64),
        "layers_per_block": 2,
        "norm_num_groups": 8,
        "latent_channels": 16,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
    "no attention": {"block_out_channels": (16, 32), "norm_num_groups": 8, "mid_block_add_attention": False},
    "embedded": {
        "block_out_channels": (16, 32, 64, 128, 192),
        "latent_channels": 16,
        "norm_num_groups": 8,
        "mid_block_add_attention": False,
    },
}


def oracle_and_ours(shape: str) -> tuple[AutoencoderKL, Autoencoder]:
    torch.manual_seed(7)
    levels = len(SHAPES[shape]["block_out_channels"])
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    oracle = AutoencoderKL(**blocks, **SHAPES[shape]).eval()
    with torch.no_grad():
        for parameter in oracle.parameters():  # norms are born as the identity, which would hide a mistake in them
            parameter.add_(0.02 * torch.randn_like(parameter))
    ours = Autoencoder(AutoencoderConfig.from_dict(dict(oracle.config))).eval()
    ours.load_state_dict(oracle.state_dict(), strict=True)
    return oracle, ours


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_agrees_with_diffusers(shape):
    oracle, ours = oracle_and_ours(shape)
    x = torch.rand(2, 3, 64, 48) * 2 - 1
    posterior = oracle.encode(x).latent_dist
    mean, logvar = ours.encode(x)
    torch.testing.assert_close(mean, posterior.mean, atol=1e-5, rtol=0)
    torch.testing.assert_close(logvar, posterior.logvar, atol=1e-5, rtol=0)
    z = torch.randn(mean.shape)
    torch.testing.assert_close(ours.decode(z), oracle.decode(z).sample, atol=1e-5, rtol=0)


@torch.no_grad()
def test_agrees_with_diffusers_in_channels_last_and_on_the_math_kernel():
    oracle, ours = oracle_and_ours("sd")
    by_math = Autoencoder(ours.config, AttentionBackend.MATH)
    by_math.load_state_dict(ours.state_dict())
    z = torch.randn(1, 4, 8, 6)
    expected = oracle.double().decode(z.double()).sample.float()
    assert (ours.to(memory_format=torch.channels_last).decode(z) - expected).abs().max() < 1e-4
    assert (by_math.decode(z) - expected).abs().max() < 1e-4


def test_log_variance_is_clamped_as_diffusers_clamps_it():
    oracle, ours = oracle_and_ours("no attention")
    with torch.no_grad():
        for vae in (oracle, ours):
            vae.quant_conv.bias[4:] = torch.tensor([-100.0, 100.0, 0.0, 1.0])
        x = torch.rand(1, 3, 16, 16)
        logvar = ours.encode(x)[1]
        torch.testing.assert_close(logvar, oracle.encode(x).latent_dist.logvar, atol=1e-5, rtol=0)
    assert logvar.min() == -30
    assert logvar.max() == 20


def test_every_weight_gets_a_gradient():
    ours = oracle_and_ours("sd")[1]
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    mean, logvar = ours.encode(x)
    (ours.decode(mean + (0.5 * logvar).exp() * torch.randn_like(mean)) - x).square().mean().backward()
    # A bias that a softmax, or a norm over groups of one channel, cancels may have none but rounding; all weights must have one.
    missing = [name for name, p in ours.named_parameters() if p.grad is None or (name.endswith("weight") and not p.grad.abs().sum() > 0)]
    assert missing == []


@torch.no_grad()
def test_takes_attention_weights_under_their_old_names():
    ours = oracle_and_ours("sd")[1]
    old_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, weight in ours.state_dict().items():
        for new, legacy in old_names.items():
            name = name.replace(f".{new}.", f".{legacy}.")
        old[name] = weight[:, :, None, None] if ".attentions." in name and weight.ndim == 2 else weight
    assert "decoder.mid_block.attentions.0.proj_attn.weight" in old
    loaded = Autoencoder(ours.config)
    loaded.load_state_dict(modernise_keys(old), strict=True)
    z = torch.randn(1, 4, 4, 4)
    assert torch.equal(loaded.decode(z), ours.decode(z))


def test_config_survives_a_round_trip_and_diffusers_reads_it():
    config = oracle_and_ours("flux")[1].config
    assert AutoencoderConfig.from_dict(config.to_dict()) == config
    assert config.downscale == 4
    theirs = AutoencoderKL.from_config(config.to_dict())
    Autoencoder(config).load_state_dict(theirs.state_dict(), strict=True)
    assert theirs.config.shift_factor == 0.1159


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("_class_name", "AutoencoderTiny"),
        ("act_fn", "mish"),
        ("block_out_channels", [60, 64]),
        ("block_out_channels", [32] * 9),
        ("block_out_channels", []),
        ("block_out_channels", [True, 64]),
        ("block_out_channels", 64),
        ("block_out_channels", [2**40, 64]),
        ("down_block_types", ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]),
        ("up_block_types", ["UpDecoderBlock2D"]),
        ("layers_per_block", 0),
        ("layers_per_block", 2.0),
        ("in_channels", -3),
        ("out_channels", 10**9),
        ("latent_channels", None),
        ("norm_num_groups", 0),
        ("sample_size", "512"),
        ("scaling_factor", 0.0),
        ("scaling_factor", float("nan")),
        ("scaling_factor", None),
        ("shift_factor", float("inf")),
        ("latents_mean", [0.0] * 3),
        ("latents_mean", [0.0] * 4),
        ("latents_std", [1.0, 1.0, 0.0, 1.0]),
        ("latents_std", ["1", "1", "1", "1"]),
        ("force_upcast", 1),
        ("use_quant_conv", "false"),
        ("mid_block_add_attention", None),
        ("double_z", True),
    ],
)
def test_refuses_what_it_does_not_cover_and_names_it(field, value):
    usable = {
        "block_out_channels": [32, 64],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
    }
    AutoencoderConfig.from_dict(usable)
    with pytest.raises(ModelError, match=field):
        AutoencoderConfig.from_dict(usable | {field: value})
