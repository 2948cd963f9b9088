"""DPM-Solver++(2M) SDE."""

import math
from collections.abc import Iterator, Sequence

from torch import Tensor

from .step import FEW, BoundDenoiser, NoiseSource, Step, batch_sigma, crosses, intervals


def dpmpp_2m_sde(
    denoise: BoundDenoiser, x: Tensor, sigmas: Tensor, noise: NoiseSource, *, borders: Sequence[float] = (), first: int = 0
) -> Iterator[Step]:
    """DPM-Solver++(2M) on the reverse SDE (Lu et al. 2022, arXiv 2211.01095, appendix D; midpoint form, eta = 1).

    With h the step in −log sigma and in the variance-exploding scale: x' = e^−2h·x + (1 − e^−2h)·D + sigma'·sqrt(1 − e^−2h)·noise, D as in
    `dpmpp_2m`. The first step, a step to sigma 0 and the first step of each expert are first-order.

    Args:
        denoise: predicts x0.
        x: (batch, …) float32 or float64, latents at sigmas[0].
        sigmas: (steps + 1,) falling; the last is usually 0.
        noise: called once a step, except for a step that ends at sigma 0.
        borders: sigmas at which the expert changes; the history restarts there.
        first: number of the step to begin with, see `step.py`.

    Yields:
        One `Step` for each interval of sigmas.
    """
    previous: Tensor | None = None
    h_previous = 0.0
    for i, sigma, sigma_next in intervals(sigmas, first):
        x0 = denoise(x, batch_sigma(sigmas[i], x))
        if sigma_next == 0:
            yield Step(i, sigma, sigma_next, x0, x0)
            return
        h = math.log(sigma / sigma_next)
        fresh = -math.expm1(-2 * h)
        last_of_few = i == len(sigmas) - 2 < FEW - 1
        target = x0 if previous is None or last_of_few else x0 + (x0 - previous) * (0.5 * h / h_previous)
        x = x * (1 - fresh) + target * fresh + noise() * (sigma_next * math.sqrt(fresh))
        previous, h_previous = (None if crosses(borders, sigma, sigma_next) else x0), h
        yield Step(i, sigma, sigma_next, x, x0)
