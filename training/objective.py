"""The denoising objective: what a U-Net is asked to predict, at which noise levels, and which text it is given."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..contracts import Conditioning
from ..text_encoders.conditioner import Conditioner
from ..unet.unet import UNet
from .tallies import split


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What to train for.

    Attributes:
        sigmas: (T,) float64; sigma of each training timestep.
        t_min: first timestep trained, 0 to T − 1.
        t_max: one past the last timestep trained; an expert trains on its own interval only.
        prediction_type: "v_prediction" (Salimans & Ho 2022, v = α·n − σ·x0), "epsilon" or "sample".
        drop_all: chance that a row loses all its text (classifier-free guidance, Ho & Salimans 2022).
        drop_clip: chance that a row loses the text of CLIP, independent of the others (eDiff-I, section 4.2).
        drop_t5: the same for T5.
        min_snr: γ of the Min-SNR weights (Hang et al. 2023, arXiv 2303.09556): min(SNR, γ)/SNR for epsilon, min(SNR, γ)/(SNR + 1) for v,
            min(SNR, γ) for x0; None weighs all timesteps alike.
        noise_offset: share of noise that is equal over a whole channel, for very dark and very bright pictures; the target includes it.
        told_apart: intervals of timesteps [first, end) whose loss is also told by itself, by name.
    """

    sigmas: Tensor
    t_min: int
    t_max: int
    prediction_type: str = "v_prediction"
    drop_all: float = 0.1
    drop_clip: float = 0.05
    drop_t5: float = 0.05
    min_snr: float | None = None
    noise_offset: float = 0.0
    told_apart: Mapping[str, tuple[int, int]] = field(default_factory=dict[str, tuple[int, int]])


@dataclass(frozen=True, eq=False)
class Draw:
    """All that chance decides about one batch.

    Attributes:
        t: (batch,) int64, timesteps.
        noise: (batch, c, h, w).
        keep_clip: (batch,) bool, False where the row loses the text of CLIP.
        keep_t5: the same for T5.
    """

    t: Tensor
    noise: Tensor
    keep_clip: Tensor
    keep_t5: Tensor

    def rows(self, rows: slice) -> "Draw":
        """The part of these rows: what one of several processes trains on."""
        return Draw(self.t[rows], self.noise[rows], self.keep_clip[rows], self.keep_t5[rows])


Predict = Callable[[Tensor, Tensor, Draw], Tensor]
"""`predict(x, t, drawn)`: the network's output for scaled noisy latents x (batch, c, h, w) at timesteps t (batch,), its text dropped as drawn."""


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


def draw(objective: Objective, shape: tuple[int, ...], generator: torch.Generator) -> Draw:
    """Draw for a batch of latents of `shape` (batch, c, h, w). Each process draws for the whole batch and takes its rows."""
    batch, channels = shape[:2]
    noise = torch.randn(shape, generator=generator)
    if objective.noise_offset:
        noise += objective.noise_offset * torch.randn((batch, channels, 1, 1), generator=generator)
    t = draw_timesteps(objective, batch, generator)
    return Draw(t, noise, *draw_kept(objective, batch, generator))


def draw_timesteps(objective: Objective, batch: int, generator: torch.Generator) -> Tensor:
    """(batch,) int64, uniform over [t_min, t_max) and stratified: one draw from each of `batch` equal slices, in random order."""
    slices = torch.randperm(batch, generator=generator) + torch.rand(batch, generator=generator)
    return objective.t_min + (slices / batch * (objective.t_max - objective.t_min)).long().clamp(max=objective.t_max - objective.t_min - 1)


def draw_kept(objective: Objective, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Which rows keep CLIP and which keep T5: two (batch,) bool tensors."""
    some, clip, t5 = (torch.rand(batch, generator=generator) >= dropped for dropped in (objective.drop_all, objective.drop_clip, objective.drop_t5))
    return some & clip, some & t5


def denoising_loss(predict: Predict, objective: Objective, latents: Tensor, drawn: Draw) -> dict[str, Tensor]:
    """Weighted mean squared error of the prediction, and how it splits over noise levels.

    Args:
        predict: the network.
        objective: what it is asked for.
        latents: (batch, c, h, w), standardised x0.
        drawn: for the same rows.

    Returns:
        "loss", (), and without gradients the plain squared error of each interval of `objective.told_apart`: sum and count of its rows, (2,).
    """
    sigma = objective.sigmas[drawn.t]
    noisy, target = diffuse(latents, drawn.noise.to(latents), sigma, objective.prediction_type)
    predicted = predict(noisy, drawn.t.to(latents), drawn)
    errors = F.mse_loss(predicted.float(), target, reduction="none").mean(dim=(1, 2, 3))
    weighted = errors if objective.min_snr is None else errors * snr_weights(sigma, objective.min_snr, objective.prediction_type).to(errors)
    return {"loss": weighted.mean(), **split(errors, drawn.t, objective.told_apart)}


def snr_weights(sigma: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """Min-SNR weights, see `Objective.min_snr`; sigma any shape. Finite for every sigma > 0, epsilon at SNR 0 included (weight 1)."""
    snr = sigma**-2
    match prediction_type:
        case "epsilon":
            return (gamma * sigma**2).clamp(max=1)
        case "v_prediction":
            return snr.clamp(max=gamma) / (snr + 1)
        case _:
            return snr.clamp(max=gamma)


def diffuse(latents: Tensor, noise: Tensor, sigma: Tensor, prediction_type: str) -> tuple[Tensor, Tensor]:
    """Noisy latents α·x0 + σ'·n in the variance-preserving scale (α = 1/√(1+σ²), σ' = σ·α) and the training target; both (batch, c, h, w)."""
    alpha = (1 + sigma**2).rsqrt()[:, None, None, None].to(latents)
    spread = (sigma * (1 + sigma**2).rsqrt())[:, None, None, None].to(latents)
    target = {"v_prediction": alpha * noise - spread * latents, "epsilon": noise, "sample": latents}[prediction_type]
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
