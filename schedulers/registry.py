"""Every sampler by name, and where ours differ from diffusers' schedulers.

| sampler      | diffusers' counterpart                       | order | evaluations a step | noise |
|--------------|----------------------------------------------|-------|--------------------|-------|
| euler        | EulerDiscrete                                | 1     | 1                  | no    |
| euler_a      | EulerAncestralDiscrete                       | 1     | 1                  | yes   |
| heun         | HeunDiscrete                                 | 2     | 2                  | no    |
| ddim         | DDIM                                         | 1     | 1                  | eta   |
| ddpm         | DDPM (fixed_small)                           | 1     | 1                  | yes   |
| dpmpp_2m     | DPMSolverMultistep (dpmsolver++, midpoint)   | 2     | 1                  | no    |
| dpmpp_2m_sde | DPMSolverMultistep (sde-dpmsolver++)         | 2     | 1                  | yes   |
| dpmpp_sde    | DPMSolverSDE                                 | 2     | 2                  | yes   |
| unipc        | UniPCMultistep (bh2, order 2)                | 2     | 1                  | no    |
| lcm          | LCM                                          | 1     | 1                  | yes   |

"Order" is that of the noise-free part. The same seed, network and settings give the same latents except in these cases:

| case                                 | diffusers                                | here                                             |
|--------------------------------------|------------------------------------------|--------------------------------------------------|
| ddim with linspace; with trailing    | next timestep is t − T//steps            | next node of the schedule; the same for leading, |
| where steps does not divide T        | whatever the spacing                     | and for trailing where steps divides T           |
| karras, exponential, beta with ddim, | ignored                                  | honoured; refused for lcm                        |
| ddpm, euler_a, lcm                   |                                          |                                                  |
| the same three with euler, heun,     | range and initial scale by               | whole training range, scale sigma_max:           |
| dpmpp_sde                            | timestep_spacing                         | as diffusers with linspace                       |
| karras with dpmpp_2m, dpmpp_2m_sde   | timesteps cut off to whole ones          | rounded, as on every other schedule              |
| on a cosine schedule                 |                                          |                                                  |
| zero terminal SNR                    | DDIM, DDPM, LCM: ābar = 0 at the top     | ābar = 2^-24 (sigma 4096) for every sampler      |
| lcm                                  | x0 blended with x by c_skip(t), c_out(t) | not blended: c_skip < 7e-6 for t >= 19           |
| dpmpp_sde                            | Brownian tree with a seed of its own     | two unit noises a step, joined as increments     |
| last step of a noisy sampler         | noise is drawn and multiplied by 0       | none is drawn                                    |
| an expert border                     | no notion of it                          | multistep history restarts; heun and dpmpp_sde   |
|                                      |                                          | take a one-evaluation step over it               |
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from ..errors import UsageError
from .ddim import ddim
from .ddpm import ddpm
from .dpmpp_2m import dpmpp_2m
from .dpmpp_2m_sde import dpmpp_2m_sde
from .dpmpp_sde import dpmpp_sde
from .euler import euler
from .euler_a import euler_a
from .heun import heun
from .lcm import lcm
from .step import Step
from .unipc import unipc


@dataclass(frozen=True)
class SamplerInfo:
    """What the schedule and the caller have to know about a sampler.

    Attributes:
        function: `function(denoise, x, sigmas, noise, *, borders=(), **options)`, see `step.py`.
        order: of the noise-free method.
        evaluations: network evaluations in a full step.
        stochastic: draws noise (ddim: only with eta > 0).
        variance_preserving: diffusers' counterpart starts from plain unit noise, so that ours starts from sqrt(sigma² + 1) of it.
        default_spacing: used when neither the user nor the model folder asks for one.
        grid: how whole timesteps are laid out: "fractional" (n nodes, linspace not rounded), "whole" (n nodes, rounded) or "open" (n + 1 nodes,
            rounded, the lowest left to the final 0).
        whole_timesteps: the network is told whole timesteps even between nodes of the training schedule.
        ending: which of `NoiseSchedule.ends_at_sigma_min` speaks of it; None for a sampler that always ends at 0.
        spacings: the only spacings that have a meaning for it; None for all.
        options: keyword arguments beyond the common ones.
    """

    function: Callable[..., Iterator[Step]]
    order: int = 1
    evaluations: int = 1
    stochastic: bool = False
    variance_preserving: bool = False
    default_spacing: str = "linspace"
    grid: str = "fractional"
    whole_timesteps: bool = False
    ending: str | None = None
    spacings: tuple[str, ...] | None = None
    options: tuple[str, ...] = ()


SAMPLERS: Mapping[str, SamplerInfo] = {
    "euler": SamplerInfo(euler, ending="sigma"),
    "euler_a": SamplerInfo(euler_a, stochastic=True),
    "heun": SamplerInfo(heun, order=2, evaluations=2),
    "ddim": SamplerInfo(ddim, variance_preserving=True, default_spacing="leading", grid="whole", ending="alpha", options=("eta",)),
    "ddpm": SamplerInfo(ddpm, stochastic=True, variance_preserving=True, default_spacing="leading", grid="whole"),
    "dpmpp_2m": SamplerInfo(dpmpp_2m, order=2, variance_preserving=True, grid="open", whole_timesteps=True, ending="sigma"),
    "dpmpp_2m_sde": SamplerInfo(dpmpp_2m_sde, order=2, stochastic=True, variance_preserving=True, grid="open", whole_timesteps=True, ending="sigma"),
    "dpmpp_sde": SamplerInfo(dpmpp_sde, order=2, evaluations=2, stochastic=True),
    "unipc": SamplerInfo(unipc, order=2, variance_preserving=True, grid="open", whole_timesteps=True, ending="sigma"),
    "lcm": SamplerInfo(lcm, stochastic=True, variance_preserving=True, default_spacing="lcm", grid="whole", spacings=("lcm", "custom")),
}


def sampler_info(name: str) -> SamplerInfo:
    """Look a sampler up.

    Raises:
        UsageError: no sampler has this name.
    """
    if name not in SAMPLERS:
        raise UsageError(f"sampler {name!r} is not known; choose one of {', '.join(SAMPLERS)}")
    return SAMPLERS[name]
