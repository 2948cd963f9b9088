"""The denoising objective against closed forms."""

import math

import pytest
import torch
from tu_diffuse.schedulers.noise import NoiseSchedule
from tu_diffuse.text_encoders.conditioner import Conditioner, ConditionerConfig
from tu_diffuse.training.objective import (
    ConditionedUNet,
    Objective,
    TextFeatures,
    denoising_loss,
    diffuse,
    draw_kept,
    draw_timesteps,
    shifted_cosine_betas,
    text_gap,
)
from tu_diffuse.unet.config import UNetConfig
from tu_diffuse.unet.unet import UNet

SIGMAS = NoiseSchedule.from_betas(torch.tensor(shifted_cosine_betas())).sigmas
OBJECTIVE = Objective(sigmas=SIGMAS, t_min=0, t_max=1000)


def tiny() -> ConditionedUNet:
    torch.manual_seed(0)
    unet = UNet(
        UNetConfig.from_dict(
            {
                "sample_size": 4,
                "in_channels": 4,
                "out_channels": 4,
                "down_block_types": ["CrossAttnDownBlock2D"],
                "up_block_types": ["CrossAttnUpBlock2D"],
                "block_out_channels": [16],
                "layers_per_block": 1,
                "cross_attention_dim": 16,
                "attention_head_dim": 2,
                "norm_num_groups": 8,
                "class_embed_type": "projection",
                "projection_class_embeddings_input_dim": 16,
            }
        )
    )
    shape = ConditionerConfig(clip_width=8, clip_pooled_width=8, t5_width=8, width=16, pooled_width=16)
    return ConditionedUNet(unet, Conditioner(shape))


def features(batch: int) -> TextFeatures:
    generator = torch.Generator().manual_seed(2)
    mask = torch.ones(batch, 5, dtype=torch.bool)
    tokens = [torch.randn(batch, 5, 8, generator=generator) for _ in range(2)]
    return TextFeatures(tokens[0], mask, torch.randn(batch, 8, generator=generator), tokens[1], mask)


def test_schedule_spans_what_its_docstring_says() -> None:
    assert SIGMAS[0].item() == pytest.approx(2 * math.tan(math.pi * 0.004), rel=1e-3)
    assert SIGMAS[-1].item() == pytest.approx(2 * math.tan(math.pi * 0.49), rel=1e-3)


def test_v_target_and_noisy_latents_give_back_x0_and_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(6, 4, 4, 4, generator=generator) for _ in range(2))
    sigma = SIGMAS[torch.tensor([0, 100, 300, 500, 800, 999])]
    noisy, v = diffuse(x0, noise, sigma, "v_prediction")
    alpha = (1 / (1 + sigma**2).sqrt()).float()[:, None, None, None]
    spread = (sigma.float()[:, None, None, None]) * alpha
    assert torch.allclose(alpha * noisy - spread * v, x0, atol=1e-5)
    assert torch.allclose(spread * noisy + alpha * v, noise, atol=1e-5)
    assert torch.equal(diffuse(x0, noise, sigma, "epsilon")[1], noise)


def test_timesteps_are_stratified_over_the_interval() -> None:
    expert = Objective(sigmas=SIGMAS, t_min=200, t_max=600)
    t = draw_timesteps(expert, 40, torch.Generator().manual_seed(0))
    assert sorted((t - 200).div(10, rounding_mode="floor").tolist()) == list(range(40))
    assert t.tolist() != sorted(t.tolist())


def test_dropout_rates() -> None:
    objective = Objective(sigmas=SIGMAS, t_min=0, t_max=1000, drop_all=0.2, drop_one=0.1)
    clip, t5 = draw_kept(objective, 40_000, torch.Generator().manual_seed(0))
    assert (~clip & ~t5).float().mean().item() == pytest.approx(0.2 + 0.8 * 0.01, abs=0.01)
    assert (clip & ~t5).float().mean().item() == pytest.approx(0.8 * 0.9 * 0.1, abs=0.01)


def test_loss_reaches_every_part_and_text_matters_after_training() -> None:
    model = tiny()
    generator = torch.Generator().manual_seed(0)
    text = features(16)
    latents = text.clip_tokens[:, 0, :4, None, None].expand(-1, -1, 4, 4).contiguous()  # what the picture shows is what the first word says
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    first = None
    for _ in range(60):
        losses = denoising_loss(model, Objective(sigmas=SIGMAS, t_min=500, t_max=1000), latents, text, generator)
        first = losses["loss"].item() if first is None else first
        losses["loss"].backward()
        unused = [name for name, p in model.named_parameters() if p.grad is None]
        assert unused == []
        optimizer.step()
        optimizer.zero_grad()
    right, wrong = text_gap(model, OBJECTIVE, latents, text, 800, generator)
    assert losses["loss"].item() < 0.6 * first
    assert wrong > 1.5 * right
