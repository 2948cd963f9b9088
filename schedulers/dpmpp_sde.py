"""DPM-Solver++(2S) SDE, the "DPM++ SDE" of k-diffusion."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .step import BoundDenoiser, NoiseSource, Step, batch_sigma, crosses, intervals


def dpmpp_sde(
    denoise: BoundDenoiser, x: Tensor, sigmas: Tensor, noise: NoiseSource, *, borders: Sequence[float] = (), first: int = 0
) -> Iterator[Step]:
    """Two ancestral steps from the same start: to the midpoint in log sigma, then, with the x0 found there, to the end (k-diffusion's
    `sample_dpmpp_sde`, r = 1/2).

    An ancestral step from sigma to sigma' with prediction D is x' = D + (sigma'/sigma)²(x − D) + up·noise, up² = sigma'²(sigma² − sigma'²)/sigma².
    The two noises belong to one Brownian path in sigma: the whole step's is the sum of those of its two parts. A step to sigma 0 returns x0; a step
    whose midpoint or end lies across a border is a single ancestral step, so that no expert is asked about a level that it was not trained on.

    Args:
        denoise: predicts x0.
        x: (batch, …) float32 or float64, latents at sigmas[0].
        sigmas: (steps + 1,) falling; the last is usually 0.
        noise: called twice a step; once for a step across a border, not at all for a step that ends at sigma 0.
        borders: sigmas at which the expert changes.
        first: number of the step to begin with, see `step.py`.

    Yields:
        One `Step` for each interval of sigmas.
    """
    for i, sigma, sigma_next in intervals(sigmas, first):
        x0 = denoise(x, batch_sigma(sigmas[i], x))
        if sigma_next == 0:
            x = x0
        elif crosses(borders, sigma, sigma_next):
            x = _ancestral(x, x0, sigma, sigma_next, noise())
        else:
            middle = math.sqrt(sigma * sigma_next)
            early, late = noise(), noise()
            ahead = _ancestral(x, x0, sigma, middle, early)
            x0 = denoise(ahead, batch_sigma(torch.tensor(middle, dtype=sigmas.dtype), x))
            share = (sigma - middle) / (sigma - sigma_next)
            x = _ancestral(x, x0, sigma, sigma_next, early * math.sqrt(share) + late * math.sqrt(1 - share))
        yield Step(i, sigma, sigma_next, x, x0)


def _ancestral(x: Tensor, x0: Tensor, sigma: float, sigma_next: float, unit_noise: Tensor) -> Tensor:
    up = sigma_next * math.sqrt(sigma**2 - sigma_next**2) / sigma
    return x0 + (x - x0) * (sigma_next / sigma) ** 2 + unit_noise * up
