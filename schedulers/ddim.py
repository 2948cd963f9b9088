"""DDIM, and through its eta every first-order ancestral sampler."""

import math
from collections.abc import Iterator, Sequence

from torch import Tensor

from ..errors import UsageError
from .step import BoundDenoiser, NoiseSource, Step, batch_sigma, intervals


def ddim(
    denoise: BoundDenoiser, x: Tensor, sigmas: Tensor, noise: NoiseSource, *, borders: Sequence[float] = (), first: int = 0, eta: float = 0.0
) -> Iterator[Step]:
    """Jump to the predicted x0 and add back noise of which the share eta² is fresh (Song et al. 2020, arXiv 2010.02502, eq. 12 and 16).

    The paper's x and sigma_t(eta), both divided by sqrt(ābar of the next level), are in the variance-exploding scale

        x' = x0 + sqrt(sigma'² − up²)·(x − x0)/sigma + up·noise,   up = eta·sigma'·sqrt(sigma² − sigma'²)/sigma,

    so eta = 0 is Euler's method and eta = 1 is both DDPM (Ho et al. 2020, eq. 6-7, the smaller variance) and the Euler-ancestral step of
    k-diffusion: the four differ in their sigmas and in the scale of the first noise, not in the step.

    Args:
        denoise: predicts x0.
        x: (batch, …) float32 or float64, latents at sigmas[0].
        sigmas: (steps + 1,) falling; the last is usually 0.
        noise: called once a step when eta > 0, except for a step that ends at sigma 0.
        borders: no effect; there is no history to restart.
        first: number of the step to begin with, see `step.py`.
        eta: 0..1, share of fresh noise.

    Yields:
        One `Step` for each interval of sigmas.

    Raises:
        UsageError: eta outside 0..1.
    """
    del borders
    if not 0 <= eta <= 1:
        raise UsageError(f"eta is {eta}; wanted a number from 0 (deterministic) to 1 (all noise fresh)")
    for i, sigma, sigma_next in intervals(sigmas, first):
        x0 = denoise(x, batch_sigma(sigmas[i], x))
        up = eta * sigma_next * math.sqrt(sigma**2 - sigma_next**2) / sigma
        x = x0 + (x - x0) * (math.sqrt(sigma_next**2 - up**2) / sigma)
        if up > 0:
            x = x + noise() * up
        yield Step(i, sigma, sigma_next, x, x0)
