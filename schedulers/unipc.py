"""UniPC."""

import math
from collections.abc import Iterator, Sequence

from torch import Tensor

from .step import BoundDenoiser, NoiseSource, Step, batch_sigma, crosses, intervals


def unipc(denoise: BoundDenoiser, x: Tensor, sigmas: Tensor, noise: NoiseSource, *, borders: Sequence[float] = (), first: int = 0) -> Iterator[Step]:
    """Predict as DPM-Solver++(2M) does, then correct the arrival with the evaluation made there; order 2, one evaluation a step.

    Zhao et al. 2023, arXiv 2302.04867, algorithms 5 and 6 (data prediction, B(h) = e^h − 1, p = 2), in the variance-exploding scale. Each evaluation
    serves twice: it corrects the step that led to it and starts the next. The first step, the last one and the first of each expert
    predict with order 1; an arrival across a border is not corrected, because that would judge one expert's step by another's output.

    Args:
        denoise: predicts x0.
        x: (batch, …) float32 or float64, latents at sigmas[0].
        sigmas: (steps + 1,) falling; the last is usually 0.
        noise: not called; the method is deterministic.
        borders: sigmas at which the expert changes; history and correction restart there.
        first: number of the step to begin with, see `step.py`.

    Yields:
        One `Step` for each interval of sigmas; its x is the prediction, which the next step corrects.
    """
    del noise
    start = x  # corrected latents at the start of the previous step
    history: list[tuple[float, Tensor]] = []  # (sigma, x0) of this expert's last two evaluations
    for i, sigma, sigma_next in intervals(sigmas, first):
        x0 = denoise(x, batch_sigma(sigmas[i], x))
        if history:
            x = _correct(start, sigma, x0, history)
        start = x
        history = [*history[-1:], (sigma, x0)]
        if sigma_next == 0:
            yield Step(i, sigma, sigma_next, x0, x0)
            return
        x = _predict(x, sigma_next, history[-1:] if i == len(sigmas) - 2 else history)
        if crosses(borders, sigma, sigma_next):
            history = []
        yield Step(i, sigma, sigma_next, x, x0)


def _predict(x: Tensor, sigma_next: float, history: list[tuple[float, Tensor]]) -> Tensor:
    """UniP: from the last level of history to sigma_next, order = length of history."""
    sigma, x0 = history[-1]
    h = math.log(sigma / sigma_next)
    target = x0
    if len(history) == 2:
        sigma_before, x0_before = history[0]
        target = x0 + (x0 - x0_before) * (0.5 * h / math.log(sigma_before / sigma))
    return x * (sigma_next / sigma) - target * math.expm1(-h)


def _correct(start: Tensor, sigma_next: float, x0_next: Tensor, history: list[tuple[float, Tensor]]) -> Tensor:
    """UniC: redo the step from the last level of history to sigma_next, knowing x0 at its end."""
    sigma, x0 = history[-1]
    h = math.log(sigma / sigma_next)
    growth = math.expm1(-h)
    target = x0 + (x0_next - x0) * 0.5
    if len(history) == 2:
        sigma_before, x0_before = history[0]
        r = -math.log(sigma_before / sigma) / h
        # The paper's 2×2 system R·rho = b for the nodes r and 1, solved by hand: rho_r + rho_1 = b1, r·rho_r + rho_1 = b2.
        phi = growth / -h - 1
        b1, b2 = phi / growth, 2 * (phi / -h - 0.5) / growth
        rho_r = (b1 - b2) / (1 - r)
        target = x0 + (x0_before - x0) * (rho_r / r) + (x0_next - x0) * (b1 - rho_r)
    return start * (sigma_next / sigma) - target * growth
