"""Multistep sampling of a consistency model."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from .step import BoundDenoiser, NoiseSource, Step, batch_sigma, intervals


def lcm(denoise: BoundDenoiser, x: Tensor, sigmas: Tensor, noise: NoiseSource, *, borders: Sequence[float] = (), first: int = 0) -> Iterator[Step]:
    """Predict x0 in one evaluation, add all the noise of the next level afresh, repeat (Luo et al. 2023, arXiv 2310.04378, algorithm 3).

    The paper's c_skip(t) is below 7e-6 at every timestep a model is distilled on, and c_out(t) is as near to 1; they are left out.

    Args:
        denoise: predicts x0.
        x: (batch, …) float32 or float64, latents at sigmas[0].
        sigmas: (steps + 1,) falling; the last is usually 0.
        noise: called once a step, except for a step that ends at sigma 0.
        borders: no effect; there is no history to restart.
        first: number of the step to begin with, see `step.py`.

    Yields:
        One `Step` for each interval of sigmas.
    """
    del borders
    for i, sigma, sigma_next in intervals(sigmas, first):
        x0 = denoise(x, batch_sigma(sigmas[i], x))
        x = x0 if sigma_next == 0 else x0 + noise() * sigma_next
        yield Step(i, sigma, sigma_next, x, x0)
