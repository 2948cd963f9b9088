"""DDPM's ancestral sampler."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from .ddim import ddim
from .step import BoundDenoiser, NoiseSource, Step


def ddpm(denoise: BoundDenoiser, x: Tensor, sigmas: Tensor, noise: NoiseSource, *, borders: Sequence[float] = (), first: int = 0) -> Iterator[Step]:
    """Sample the posterior q(x' | x, x0) with the smaller of the two variances (Ho et al. 2020, arXiv 2006.11239, eq. 6 and 7).

    In the variance-exploding scale its mean is x0 + (sigma'²/sigma²)(x − x0) and its variance sigma'²(sigma² − sigma'²)/sigma², which is `ddim` at
    eta = 1 (Song et al. 2020, section 4.1).

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
