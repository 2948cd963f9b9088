"""The sigmas of one run: which noise levels a sampler visits and what the network is told at each."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UsageError
from .names import SPACINGS, TIMESTEP_SPACINGS
from .noise import NoiseSchedule
from .registry import SamplerInfo, sampler_info
from .spacings import AYS_TIMESTEPS, SIGMA_SPACINGS, ays_sigmas, lcm_timesteps, whole_spacing


@dataclass(frozen=True, eq=False)
class SigmaSchedule:
    """The noise levels of one run.

    Attributes:
        noise: the training schedule they lie on.
        sigmas: (steps + 1,) float32, strictly falling, the last 0; or where the model folder ends a sampler's runs early, the smallest training
            sigma, which the one before may equal.
        timesteps: (steps,) float32; what the network is told at each of the first `steps` sigmas.
        initial_scale: factor on unit noise that gives the latents at sigmas[0] in the variance-exploding scale.
        final_scale: factor on the latents at sigmas[-1] that gives those to decode: 1, or below it where a variance-preserving sampler ends early.
        spacing: the spacing that was applied (one of `SPACINGS`).
    """

    noise: NoiseSchedule
    sigmas: Tensor
    timesteps: Tensor
    initial_scale: float
    final_scale: float
    spacing: str

    def timestep_at(self, sigma: Tensor) -> Tensor:
        """What the network is told at a sigma.

        Args:
            sigma: any shape, float32, > 0.

        Returns:
            float32 of the same shape and device: the run's own timestep where sigma is one of the run's, else the training schedule's fractional one.
        """
        own = sigma.cpu().unsqueeze(-1) == self.sigmas[:-1]
        told = self.timesteps[own.int().argmax(-1)]
        return torch.where(own.any(-1), told, self.noise.timestep_at(sigma).float()).to(sigma.device)


def make_schedule(
    noise: NoiseSchedule,
    sampler: str,
    steps: int | None = None,
    *,
    spacing: str | None = None,
    sigmas: Sequence[float] | None = None,
) -> SigmaSchedule:
    """Lay the steps of a run out on a training schedule, as diffusers' counterpart of the sampler does (differences: table in `registry.py`).

    Args:
        noise: the training schedule.
        sampler: a name in `registry.SAMPLERS`.
        steps: >= 1; with custom sigmas it may be left out.
        spacing: one of `SPACINGS`; None takes the model's recommendation, or where the model has none, or one without meaning for this sampler, the
            sampler's default.
        sigmas: custom noise levels, strictly falling and > 0, with or without a final 0; goes with spacing "custom" or None.

    Returns:
        The schedule. initial_scale is sigma_0 where diffusers' counterpart scales its noise that way (Euler, Heun and their kin, except with
        leading), else sqrt(sigma_0² + 1).

    Raises:
        UsageError: an unknown name, a spacing that has no meaning for the sampler, contradicting arguments, or more steps than fit.
    """
    info = sampler_info(sampler)
    chosen = _spacing_for(sampler, info, noise, spacing, sigmas)
    if sigmas is not None:
        levels, timesteps = _custom(noise, steps, sigmas)
    elif steps is None or steps < 1:
        raise UsageError(f"steps is {steps}; wanted a whole number from 1 up")
    else:
        levels, timesteps = _spaced(noise, info, chosen, steps)
    end = noise.sigma_min if info.ending in noise.ends_at_sigma_min and sigmas is None else 0.0
    levels = torch.cat([levels.float(), torch.tensor([end])])
    if not bool((levels[:-1].diff() < 0).all()) or float(levels[-1]) > float(levels[-2]) or float(timesteps[0]) > len(noise.sigmas) - 1:
        raise UsageError(
            f"{len(timesteps)} steps of spacing {chosen} do not fit on {len(noise.sigmas)} training timesteps without repeats; use fewer steps"
        )
    highest = float(levels[0])
    plain_scale = not info.variance_preserving and chosen != "leading"
    initial_scale = highest if plain_scale else math.sqrt(highest**2 + 1)
    final_scale = 1 / math.sqrt(end**2 + 1) if info.variance_preserving else 1.0
    return SigmaSchedule(noise, levels, timesteps, initial_scale, final_scale, chosen)


def _spacing_for(sampler: str, info: SamplerInfo, noise: NoiseSchedule, spacing: str | None, sigmas: Sequence[float] | None) -> str:
    if sigmas is not None:
        if spacing not in (None, "custom"):
            raise UsageError(f"both custom sigmas and spacing {spacing!r} were given; leave one out")
        return "custom"
    if spacing is None:
        recommended = noise.spacing is not None and (info.spacings is None or noise.spacing in info.spacings)
        return noise.spacing if recommended and noise.spacing is not None else info.default_spacing
    if spacing == "custom":
        raise UsageError("spacing 'custom' was given without sigmas; give the list of sigmas, or name another spacing")
    if spacing not in SPACINGS:
        raise UsageError(f"spacing {spacing!r} is not known; choose one of {', '.join(SPACINGS)}")
    if info.spacings is not None and spacing not in info.spacings:
        raise UsageError(
            f"spacing {spacing!r} has no meaning for sampler {sampler}, whose networks know their own timesteps; use "
            f"{info.default_spacing} or custom sigmas"
        )
    return spacing


def _spaced(noise: NoiseSchedule, info: SamplerInfo, spacing: str, steps: int) -> tuple[Tensor, Tensor]:
    """Levels (steps,) float64 and timesteps (steps,) float32 of a named spacing."""
    if spacing in TIMESTEP_SPACINGS:
        timesteps = whole_spacing(spacing, noise, steps, info.grid)
        return noise.sigma_at(timesteps), timesteps
    if spacing == "lcm":
        timesteps = lcm_timesteps(noise, steps)
        return noise.sigma_at(timesteps), timesteps
    levels = ays_sigmas(noise, spacing, steps) if spacing in AYS_TIMESTEPS else SIGMA_SPACINGS[spacing](noise, steps)
    timesteps = noise.timestep_at(levels)
    if info.whole_timesteps and spacing in ("exponential", "beta"):
        # diffusers cuts these off, and its float32 logarithm puts the topmost just below T − 1: the whole timestep below, then.
        timesteps = (timesteps.ceil() - 1).clamp(min=0)
    elif info.whole_timesteps or (spacing in AYS_TIMESTEPS and steps == 10):
        timesteps = timesteps.round()
    return levels, timesteps.float()


def _custom(noise: NoiseSchedule, steps: int | None, sigmas: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Levels (steps,) float64 and fractional timesteps (steps,) float32 of the user's own sigmas."""
    levels = torch.tensor(list(sigmas), dtype=torch.float64)
    levels = levels[:-1] if len(levels) and float(levels[-1]) == 0 else levels
    if len(levels) == 0 or not bool((levels > 0).all()) or not bool((levels.diff() < 0).all()) or not bool(levels.isfinite().all()):
        raise UsageError(
            f"the custom sigmas {list(sigmas)} do not fall; wanted one or more numbers > 0, each smaller than the one before, optionally a final 0"
        )
    if steps is not None and steps != len(levels):
        raise UsageError(f"{steps} steps were asked for and {len(levels)} custom sigmas given; leave steps out or make them equal")
    return levels, noise.timestep_at(levels).float()
