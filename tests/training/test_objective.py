"""The denoising objective against closed forms."""

import math
from dataclasses import replace

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
    draw,
    draw_kept,
    draw_timesteps,
    shifted_cosine_betas,
    snr_weights,
    text_gap,
)
from tu_diffuse.training.tallies import noise_bins
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
    objective = Objective(sigmas=SIGMAS, t_min=0, t_max=1000, drop_all=0.2, drop_clip=0.1, drop_t5=0.3)
    clip, t5 = draw_kept(objective, 40_000, torch.Generator().manual_seed(0))
    assert (~clip & ~t5).float().mean().item() == pytest.approx(0.2 + 0.8 * 0.1 * 0.3, abs=0.01)
    assert (clip & ~t5).float().mean().item() == pytest.approx(0.8 * 0.9 * 0.3, abs=0.01)
    assert (~clip & t5).float().mean().item() == pytest.approx(0.8 * 0.1 * 0.7, abs=0.01)


def test_loss_reaches_every_part_and_text_matters_after_training() -> None:
    model = tiny()
    generator = torch.Generator().manual_seed(0)
    text = features(16)
    latents = text.clip_tokens[:, 0, :4, None, None].expand(-1, -1, 4, 4).contiguous()  # what the picture shows is what the first word says
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    first = None
    objective = Objective(sigmas=SIGMAS, t_min=500, t_max=1000)
    for _ in range(60):
        drawn = draw(objective, tuple(latents.shape), generator)
        losses = denoising_loss(lambda x, t, drawn: model(x, t, text, drawn.keep_clip, drawn.keep_t5), objective, latents, drawn)
        first = losses["loss"].item() if first is None else first
        losses["loss"].backward()
        unused = [name for name, p in model.named_parameters() if p.grad is None]
        assert unused == []
        optimizer.step()
        optimizer.zero_grad()
    right, wrong = text_gap(model, OBJECTIVE, latents, text, 800, generator)
    assert losses["loss"].item() < 0.6 * first
    assert wrong > 1.5 * right


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weights_against_the_paper(gamma: float) -> None:
    snr = SIGMAS**-2
    least = torch.minimum(snr, torch.full_like(snr, gamma))
    torch.testing.assert_close(snr_weights(SIGMAS, gamma, "epsilon"), least / snr)
    torch.testing.assert_close(snr_weights(SIGMAS, gamma, "v_prediction"), least / (snr + 1))
    torch.testing.assert_close(snr_weights(SIGMAS, gamma, "sample"), least)


def test_loss_of_a_perfect_and_of_a_blind_network() -> None:
    """Predicting v exactly costs nothing; predicting 0 costs the mean of v², split over the quarters of the interval."""
    x0 = torch.randn(64, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    drawn = draw(OBJECTIVE, tuple(x0.shape), torch.Generator().manual_seed(3))
    _, v = diffuse(x0, drawn.noise, SIGMAS[drawn.t], "v_prediction")
    assert denoising_loss(lambda x, t, drawn: v, OBJECTIVE, x0, drawn)["loss"].item() == 0
    told_apart = noise_bins(1000) | {"loss/expert/low": (0, 300), "loss/expert/high": (300, 1000)}
    blind = denoising_loss(lambda x, t, drawn: torch.zeros_like(x), replace(OBJECTIVE, told_apart=told_apart), x0, drawn)
    assert blind["loss"].item() == pytest.approx(v.square().mean().item(), rel=1e-5)
    for name, (first, end) in told_apart.items():
        rows = (drawn.t >= first) & (drawn.t < end)
        total, count = blind[name].tolist()
        assert count == rows.sum() > 0
        assert total / count == pytest.approx(v[rows].square().mean().item(), rel=1e-5)
    weighted = denoising_loss(lambda x, t, drawn: torch.zeros_like(x), replace(OBJECTIVE, min_snr=5.0), x0, drawn)
    expected = (v.square().mean(dim=(1, 2, 3)) * snr_weights(SIGMAS[drawn.t], 5.0, "v_prediction")).mean().item()
    assert weighted["loss"].item() == pytest.approx(expected, rel=1e-5)


def test_rows_of_a_draw_are_those_of_the_whole() -> None:
    drawn = draw(OBJECTIVE, (6, 4, 4, 4), torch.Generator().manual_seed(3))
    mine, other = drawn.rows(slice(0, None, 2)), drawn.rows(slice(1, None, 2))
    assert torch.equal(torch.stack([mine.noise, other.noise], 1).flatten(0, 1), drawn.noise)
    assert torch.equal(torch.stack([mine.t, other.t], 1).flatten(), drawn.t)


def test_noise_offset_is_equal_over_a_channel() -> None:
    plain, moved = (draw(replace(OBJECTIVE, noise_offset=offset), (512, 3, 8, 8), torch.Generator().manual_seed(3)).noise for offset in (0.0, 0.5))
    added = moved - plain
    assert torch.allclose(added, added[..., :1, :1].expand_as(added), atol=1e-6)
    assert added[..., 0, 0].std().item() == pytest.approx(0.5, rel=0.1)
