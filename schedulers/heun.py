"""Heun's method on the probability-flow ODE."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from .step import BoundDenoiser, NoiseSource, Step, batch_sigma, crosses, intervals


def heun(denoise: BoundDenoiser, x: Tensor, sigmas: Tensor, noise: NoiseSource, *, borders: Sequence[float] = (), first: int = 0) -> Iterator[Step]:
    """Average the slopes at both ends of the step; order 2, two evaluations (Karras et al. 2022, arXiv 2206.00364, algorithm 1 without churn).

    A step to sigma 0 is an Euler step, as in the paper, and so is a step across a border: its second evaluation would ask one expert about a level
    that it was not trained on, or mix two experts in one slope. One Euler step of local error O(h²) at each border leaves the global order at 2.

    Args:
        denoise: predicts x0.
        x: (batch, …) float32 or float64, latents at sigmas[0].
        sigmas: (steps + 1,) falling; the last is usually 0.
        noise: not called; the method is deterministic.
        borders: sigmas at which the expert changes.
        first: number of the step to begin with, see `step.py`.

    Yields:
        One `Step` for each interval of sigmas.
    """
    del noise
    for i, sigma, sigma_next in intervals(sigmas, first):
        x0 = denoise(x, batch_sigma(sigmas[i], x))
        slope = (x - x0) * (1 / sigma)
        if sigma_next == 0 or crosses(borders, sigma, sigma_next):
            x = x0 + slope * sigma_next
        else:
            ahead = x0 + slope * sigma_next
            x0 = denoise(ahead, batch_sigma(sigmas[i + 1], x))
            x = x + (slope + (ahead - x0) * (1 / sigma_next)) * (0.5 * (sigma_next - sigma))
        yield Step(i, sigma, sigma_next, x, x0)
