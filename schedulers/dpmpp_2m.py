"""DPM-Solver++(2M)."""

import math
from collections.abc import Iterator, Sequence

from torch import Tensor

from .step import FEW, BoundDenoiser, NoiseSource, Step, batch_sigma, crosses, intervals


def dpmpp_2m(
    denoise: BoundDenoiser, x: Tensor, sigmas: Tensor, noise: NoiseSource, *, borders: Sequence[float] = (), first: int = 0
) -> Iterator[Step]:
    """Extrapolate x0 from its last two predictions; order 2 with one evaluation a step (Lu et al. 2022, arXiv 2211.01095, algorithm 2, midpoint
    form).

    With lambda = −log sigma and h the step in lambda, in the variance-exploding scale: x' = e^−h·x − (e^−h − 1)·D and
    D = x0 + (x0 − previous x0)/(2r), where r is the previous step over this one. The first step, a step to sigma 0 and the first step of each
    expert are first-order (D = x0): the history of another network is not extrapolated. So is the last of fewer than 15 steps that end above 0, as
    in diffusers.

    Args:
        denoise: predicts x0.
        x: (batch, …) float32 or float64, latents at sigmas[0].
        sigmas: (steps + 1,) falling; the last is usually 0.
        noise: not called; the method is deterministic.
        borders: sigmas at which the expert changes; the history restarts there.
        first: number of the step to begin with, see `step.py`.

    Yields:
        One `Step` for each interval of sigmas.
    """
    del noise
    previous: Tensor | None = None
    h_previous = 0.0
    for i, sigma, sigma_next in intervals(sigmas, first):
        x0 = denoise(x, batch_sigma(sigmas[i], x))
        if sigma_next == 0:
            yield Step(i, sigma, sigma_next, x0, x0)
            return
        h = math.log(sigma / sigma_next)
        last_of_few = i == len(sigmas) - 2 < FEW - 1
        target = x0 if previous is None or last_of_few else x0 + (x0 - previous) * (0.5 * h / h_previous)
        x = x * (sigma_next / sigma) - target * math.expm1(-h)
        previous, h_previous = (None if crosses(borders, sigma, sigma_next) else x0), h
        yield Step(i, sigma, sigma_next, x, x0)
