"""The denoising objective: what a U-Net is asked to predict, at which noise levels, and which text it is given."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..contracts import Conditioning
from ..text_encoders.conditioner import Conditioner
from ..unet.unet import UNet


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What to train for.

    Attributes:
        sigmas: (T,) float64; sigma of each training timestep.
        t_min: first timestep trained, 0 to T − 1.
        t_max: one past the last timestep trained; an expert trains on its own interval only.
        prediction_type: "v_prediction" (Salimans & Ho 2022, v = α·n − σ·x0) or "epsilon".
        drop_all: chance that a row loses all its text (classifier-free guidance, Ho & Salimans 2022).
        drop_one: chance that a row loses the text of one encoder, for each encoder (eDiff-I, section 4.2).
    """

    sigmas: Tensor
    t_min: int
    t_max: int
    prediction_type: str = "v_prediction"
    drop_all: float = 0.1
    drop_one: float = 0.05


@dataclass(frozen=True)
class TextFeatures:
    """What the frozen encoders say about a batch of captions: the arguments of `Conditioner.forward` up to the dropout."""

    clip_tokens: Tensor
    clip_mask: Tensor
    clip_pooled: Tensor
    t5_tokens: Tensor
    t5_mask: Tensor


class ConditionedUNet(nn.Module):
    """A U-Net with the conditioner that is trained along with it."""

    def __init__(self, unet: UNet, conditioner: Conditioner) -> None:
        super().__init__()
        self.unet = unet
        self.conditioner = conditioner

    def forward(self, x: Tensor, t: Tensor, text: TextFeatures, keep_clip: Tensor | None = None, keep_t5: Tensor | None = None) -> Tensor:
        """Predict from scaled noisy latents x (batch, c, h, w), timesteps t (batch,), and text; `keep_*` as in `Conditioner.forward`."""
        said: Conditioning = self.conditioner(
            text.clip_tokens, text.clip_mask, text.clip_pooled, text.t5_tokens, text.t5_mask, keep_clip=keep_clip, keep_t5=keep_t5
        )
        return self.unet(x, t, self.unet.text_keys_values(said.tokens), mask=said.mask, pooled=said.pooled)


def draw_timesteps(objective: Objective, batch: int, generator: torch.Generator) -> Tensor:
    """(batch,) int64, uniform over [t_min, t_max) and stratified: one draw from each of `batch` equal slices, in random order."""
    slices = torch.randperm(batch, generator=generator) + torch.rand(batch, generator=generator)
    return objective.t_min + (slices / batch * (objective.t_max - objective.t_min)).long().clamp(max=objective.t_max - objective.t_min - 1)


def draw_kept(objective: Objective, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Which rows keep CLIP and which keep T5: two (batch,) bool tensors."""
    some = torch.rand(batch, generator=generator) >= objective.drop_all
    clip, t5 = (some & (torch.rand(batch, generator=generator) >= objective.drop_one) for _ in range(2))
    return clip, t5


def denoising_loss(
    model: ConditionedUNet,
    objective: Objective,
    latents: Tensor,
    text: TextFeatures,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Mean squared error of the prediction, and how it splits over noise levels.

    Args:
        model: predicts.
        objective: says what.
        latents: (batch, c, h, w), standardised x0.
        text: of the same batch.
        generator: source of timesteps, noise and dropout.

    Returns:
        "loss", and without gradients its mean over the lower and the upper half of the timesteps ("loss_low", "loss_high").
    """
    batch = len(latents)
    t = draw_timesteps(objective, batch, generator)
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    keep_clip, keep_t5 = draw_kept(objective, batch, generator)
    noisy, target = diffuse(latents, noise, objective.sigmas[t], objective.prediction_type)
    predicted = model(noisy, t.to(latents), text, keep_clip, keep_t5)
    errors = F.mse_loss(predicted, target, reduction="none").mean(dim=(1, 2, 3))
    high = t >= (objective.t_min + objective.t_max) / 2
    return {"loss": errors.mean(), "loss_low": errors.detach()[~high].mean(), "loss_high": errors.detach()[high].mean()}


def diffuse(latents: Tensor, noise: Tensor, sigma: Tensor, prediction_type: str) -> tuple[Tensor, Tensor]:
    """Noisy latents α·x0 + σ'·n in the variance-preserving scale (α = 1/√(1+σ²), σ' = σ·α) and the training target; both (batch, c, h, w)."""
    alpha = (1 + sigma**2).rsqrt()[:, None, None, None].to(latents)
    spread = (sigma * (1 + sigma**2).rsqrt())[:, None, None, None].to(latents)
    target = alpha * noise - spread * latents if prediction_type == "v_prediction" else noise
    return alpha * latents + spread * noise, target


def text_gap(
    model: ConditionedUNet, objective: Objective, latents: Tensor, text: TextFeatures, t: int, generator: torch.Generator
) -> tuple[float, float]:
    """Loss at timestep `t` with the right captions and with captions shifted by one row: equal numbers mean that the text is ignored."""
    batch = len(latents)
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    steps = torch.full((batch,), t)
    noisy, target = diffuse(latents, noise, objective.sigmas[steps], objective.prediction_type)
    shifted = TextFeatures(*(getattr(text, name).roll(1, dims=0) for name in TextFeatures.__dataclass_fields__))
    with torch.no_grad():
        right, wrong = (F.mse_loss(model(noisy, steps.to(latents), said), target).item() for said in (text, shifted))
    return right, wrong


def shifted_cosine_betas(steps: int = 1000, shift: float = -2 * math.log(2), first: float = 0.008, last: float = 0.98) -> list[float]:
    """Betas of the cosine schedule with its log-SNR moved by `shift` (Hoogeboom et al. 2023, equation 3): for a scheduler's `trained_betas`.

    log SNR(u) = −2·log tan(πu/2) + shift, with u from `first` to `last`, so sigma from 0.025 to 64 at the defaults.
    """
    alphas_cumprod: list[float] = []
    for i in range(steps):
        u = first + (last - first) * i / (steps - 1)
        alphas_cumprod.append(1 / (1 + math.exp(2 * math.log(math.tan(math.pi * u / 2)) - shift)))
    return [1 - now / before for before, now in zip([1.0, *alphas_cumprod], alphas_cumprod, strict=False)]
