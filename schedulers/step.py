"""What every sampler takes and yields.

A sampler is a generator function `sampler(denoise, x, sigmas, noise, *, borders=(), first=0)`. It keeps its state in its own frame: the caller may
stop pulling, pull from another sampler and come back. At a border no history is left, so there a run can also be stopped for good and taken up by
another call: with the latents that the last step left, the same noise streams, and `first` the number of the next step (`stages` says where). It
draws random numbers from `noise` only. Run it under `torch.no_grad()` or `torch.inference_mode()`: entering such a context is the caller's part,
because a generator would leave it open between two steps.

Coefficients are Python floats (double precision); tensors are touched only by additions and multiplications element by element, so a picture's
numbers do not depend on the batch it is in.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

BoundDenoiser = Callable[[Tensor, Tensor], Tensor]
"""`denoise(x, sigma) -> x0`: a `contracts.Denoiser` with its conditioning already bound. x (batch, …), sigma (batch,)."""

NoiseSource = Callable[[], Tensor]
"""Gives the next unit noise of the shape of x, one independent stream a picture. Called once for each random tensor that a step needs."""

FEW = 15  # where a multistep run of fewer steps ends above sigma 0, diffusers makes its last step first-order


@dataclass(frozen=True, eq=False)
class Step:
    """One finished step.

    Attributes:
        index: 0-based.
        sigma: noise level it started from.
        sigma_next: noise level it arrived at; 0 after the last step.
        x: (batch, …) the latents at sigma_next, in the variance-exploding scale; the finished latents when sigma_next is 0.
        x0: (batch, …) the network's prediction of the clean latents in this step (for two-evaluation samplers the last one).
    """

    index: int
    sigma: float
    sigma_next: float
    x: Tensor
    x0: Tensor


def crosses(borders: Sequence[float], sigma: float, sigma_next: float) -> bool:
    """Tell whether another expert owns sigma_next.

    An expert owns low <= sigma < high, so a step from exactly the border to below it crosses; a step onto the border does not.

    Args:
        borders: sigmas at which the expert changes, in any order.
        sigma: where the step starts.
        sigma_next: where it ends, <= sigma.
    """
    return any(sigma_next < border <= sigma for border in borders)


def intervals(sigmas: Tensor, first: int) -> Iterator[tuple[int, float, float]]:
    """The steps of a run from number `first` on: (number, sigma, next sigma)."""
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        if i >= first:
            yield i, sigma, sigma_next


def stages(sigmas: Tensor, borders: Sequence[float], first: int = 0) -> list[tuple[int, int]]:
    """The runs of steps between borders, [first, end), in their order: what each expert does of a run.

    Args:
        sigmas: (steps + 1,) falling.
        borders: sigmas at which the expert changes, in any order.
        first: number of the step that the run begins with.
    """
    last = len(sigmas) - 1
    ends = [i + 1 for i, sigma, sigma_next in intervals(sigmas, first) if i + 1 < last and crosses(borders, sigma, sigma_next)]
    return list(pairwise([first, *ends, last]))


def batch_sigma(sigma: Tensor, x: Tensor) -> Tensor:
    """Repeat a scalar sigma (any device) for each row of x: (batch,) on x's device, sigma's dtype."""
    return sigma.to(x.device).expand(x.shape[0])
