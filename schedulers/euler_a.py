"""Euler-ancestral."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from .ddim import ddim
from .step import BoundDenoiser, NoiseSource, Step


def euler_a(
    denoise: BoundDenoiser, x: Tensor, sigmas: Tensor, noise: NoiseSource, *, borders: Sequence[float] = (), first: int = 0
) -> Iterator[Step]:
    """Step down past the next level and add the missing noise back (k-diffusion's `sample_euler_ancestral`).

    With up² = sigma'²(sigma² − sigma'²)/sigma² and down² = sigma'² − up² this is `ddim` at eta = 1; what makes it Euler-ancestral is its schedule
    and initial scale (`registry.py`).

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
    yield from ddim(denoise, x, sigmas, noise, borders=borders, first=first, eta=1.0)
