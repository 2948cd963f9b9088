"""Euler's method on the probability-flow ODE."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from .step import BoundDenoiser, NoiseSource, Step, batch_sigma, intervals


def euler(denoise: BoundDenoiser, x: Tensor, sigmas: Tensor, noise: NoiseSource, *, borders: Sequence[float] = (), first: int = 0) -> Iterator[Step]:
    """Follow dx/dsigma = (x − x0)/sigma with one evaluation a step; order 1 (Karras et al. 2022, arXiv 2206.00364, algorithm 1 without its lines
    6-8).

    Args:
        denoise: predicts x0.
        x: (batch, …) float32 or float64, latents at sigmas[0].
        sigmas: (steps + 1,) falling; the last is usually 0.
        noise: not called; Euler is deterministic.
        borders: no effect; Euler has no history to restart.
        first: number of the step to begin with, see `step.py`.

    Yields:
        One `Step` for each interval of sigmas.
    """
    del noise, borders
    for i, sigma, sigma_next in intervals(sigmas, first):
        x0 = denoise(x, batch_sigma(sigmas[i], x))
        x = x0 + (x - x0) * (sigma_next / sigma)
        yield Step(i, sigma, sigma_next, x, x0)
