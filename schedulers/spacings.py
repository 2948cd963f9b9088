"""Where on the noise schedule the steps of a run lie: timesteps and sigmas of each spacing, without the final 0.

linspace, leading and trailing choose timesteps (Lin et al. 2023, arXiv 2305.08891, table 2); karras, exponential and beta choose sigmas between the
ends of the training schedule; ays is a table found by optimisation (Sabour et al. 2024, arXiv 2404.14507); lcm is the set a latent consistency
model was distilled on.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..errors import UsageError
from .noise import NoiseSchedule

KARRAS_RHO = 7.0
BETA_SHAPE = 0.6
LCM_DISTILLATION_STEPS = 50

# Timesteps of the ten-step schedules that the paper publishes, for networks trained with 1000 timesteps.
AYS_TIMESTEPS = {
    "ays": (999, 850, 736, 645, 545, 455, 343, 233, 124, 24),
    "ays_xl": (999, 845, 730, 587, 443, 310, 193, 116, 53, 13),
}


def whole_spacing(spacing: str, noise: NoiseSchedule, steps: int, grid: str) -> Tensor:
    """Timesteps of linspace, leading and trailing.

    Args:
        spacing: one of the three.
        noise: gives T and the offset of leading.
        steps: >= 1.
        grid: see `registry.SamplerInfo.grid`.

    Returns:
        (steps,) float32, falling; whole numbers except for linspace on the "fractional" grid.
    """
    total = len(noise.sigmas)
    nodes = steps + 1 if grid == "open" else steps
    if spacing == "trailing":
        timesteps = np.arange(total, 0, -total / steps)[:steps].round() - 1
    elif spacing == "leading":
        timesteps = (np.arange(nodes) * (total // nodes))[::-1][:steps] + noise.steps_offset
    else:
        timesteps = np.linspace(0, total - 1, nodes)[::-1][:steps]
        timesteps = timesteps if grid == "fractional" else timesteps.round()
    return torch.from_numpy(np.ascontiguousarray(timesteps, dtype=np.float32))


def lcm_timesteps(noise: NoiseSchedule, steps: int) -> Tensor:
    """`steps` of the 50 timesteps of latent consistency distillation, evenly spread from the top (Luo et al. 2023, arXiv 2310.04378, section 4.3).

    Returns:
        (steps,) float32, falling.

    Raises:
        UsageError: more than 50 steps.
    """
    if steps > LCM_DISTILLATION_STEPS:
        raise UsageError(
            f"{steps} steps were asked of the lcm spacing, which has {LCM_DISTILLATION_STEPS} timesteps; use at most that many (4 to 8 are customary)"
        )
    stride = len(noise.sigmas) // LCM_DISTILLATION_STEPS
    origin = torch.arange(LCM_DISTILLATION_STEPS, 0, -1) * stride - 1
    return origin[torch.arange(steps) * LCM_DISTILLATION_STEPS // steps].float()


def karras_sigmas(noise: NoiseSchedule, steps: int) -> Tensor:
    """Evenly spaced in sigma^(1/7) (Karras et al. 2022, arXiv 2206.00364, eq. 5); (steps,) float64, falling from sigma_max to sigma_min."""
    high, low = noise.sigma_max ** (1 / KARRAS_RHO), noise.sigma_min ** (1 / KARRAS_RHO)
    return (high + _ramp(steps) * (low - high)) ** KARRAS_RHO


def exponential_sigmas(noise: NoiseSchedule, steps: int) -> Tensor:
    """Evenly spaced in log sigma; (steps,) float64, falling from sigma_max to sigma_min."""
    high, low = math.log(noise.sigma_max), math.log(noise.sigma_min)
    return torch.exp(high + _ramp(steps) * (low - high))


def beta_sigmas(noise: NoiseSchedule, steps: int) -> Tensor:
    """Quantiles of Beta(0.6, 0.6) stretched over sigma_min..sigma_max (Lee et al. 2024, arXiv 2407.12173, as diffusers applies it: to sigma, not to
    t).

    Returns:
        (steps,) float64, falling from sigma_max; the last is sigma_min when steps > 1.
    """
    return noise.sigma_min + beta_quantile(1 - _ramp(steps), BETA_SHAPE) * (noise.sigma_max - noise.sigma_min)


SIGMA_SPACINGS: dict[str, Callable[[NoiseSchedule, int], Tensor]] = {"karras": karras_sigmas, "exponential": exponential_sigmas, "beta": beta_sigmas}


def ays_sigmas(noise: NoiseSchedule, spacing: str, steps: int) -> Tensor:
    """Align-Your-Steps sigmas: the published ten, or for another count their interpolation, linear in log sigma over the step index.

    Args:
        noise: the schedule of a network trained with 1000 timesteps.
        spacing: "ays" (SD 1.x) or "ays_xl" (SDXL).
        steps: >= 1.

    Returns:
        (steps,) float64, falling.

    Raises:
        UsageError: the network was not trained with 1000 timesteps.
    """
    if len(noise.sigmas) != 1000:
        raise UsageError(
            f"the {spacing} spacing is a table for 1000 training timesteps and this model has {len(noise.sigmas)}; use karras or trailing"
        )
    # The eleventh node, sigma_min, is where the published tables end before their final 0.
    table = noise.sigma_at(torch.tensor([*AYS_TIMESTEPS[spacing], 0.0])).log()
    position = torch.arange(steps, dtype=torch.float64) * (10 / steps)
    low = position.long()
    return torch.exp(table[low] + (table[low + 1] - table[low]) * (position - low))


def beta_quantile(p: Tensor, shape: float) -> Tensor:
    """Quantile function of the symmetric Beta(shape, shape) distribution, by bisection.

    Args:
        p: (n,) float64 in 0..1.
        shape: > 0.

    Returns:
        (n,) float64 x with I_x(shape, shape) = p, to 1e-15.
    """
    lower_half = torch.minimum(p, 1 - p)
    low, high = torch.zeros_like(p), torch.full_like(p, 0.5)
    for _ in range(60):
        middle = (low + high) / 2
        below = _incomplete_beta(middle, shape) < lower_half
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    # Bisection never lands on its own bounds; the two values it cannot reach are known.
    x = torch.where(lower_half == 0, 0.0, torch.where(lower_half == 0.5, 0.5, (low + high) / 2))
    return torch.where(p <= 0.5, x, 1 - x)


def _incomplete_beta(x: Tensor, a: float) -> Tensor:
    """I_x(a, a) for x <= 1/2 by its power series (Abramowitz & Stegun 26.5.4); terms shrink at least by half, so 60 reach double precision."""
    term, total = torch.ones_like(x), torch.ones_like(x)
    for k in range(1, 61):
        term = term * x * ((2 * a + k - 1) / (a + k))
        total = total + term
    log_front = 2 * math.lgamma(a) - math.lgamma(2 * a)
    return (x * (1 - x)) ** a / (a * math.exp(log_front)) * total


def _ramp(steps: int) -> Tensor:
    """0 to 1 in steps points, float64; (0,) for one step."""
    return torch.linspace(0, 1, steps, dtype=torch.float64)
