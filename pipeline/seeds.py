"""Every random number of a picture comes from the picture's own stream: one CPU generator per picture, seeded with the picture's seed.

So a picture depends on its seed and settings only, not on the batch it was drawn in, the order, the device, or what was drawn before.
"""

import secrets
from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor

from .limits import MAX_SEED


def random_seed(count: int = 1) -> int:
    """The first of `count` seeds in a row, from the operating system: what pictures get when the user names none."""
    return secrets.randbelow(MAX_SEED + 2 - count)


def streams(seeds: Sequence[int]) -> tuple[Generator, ...]:
    """One CPU generator per picture, in the order of the seeds."""
    return tuple(Generator("cpu").manual_seed(seed) for seed in seeds)


def draw(generators: Sequence[Generator], shape: tuple[int, int, int]) -> Tensor:
    """Standard normal noise, one draw from each picture's stream.

    Args:
        generators: one per picture; each advances by one draw.
        shape: (channels, h, w) of one picture's latents.

    Returns:
        (pictures, channels, h, w) float32 on the CPU. For one picture this is the field's
        `torch.randn((1, channels, h, w), generator=Generator("cpu").manual_seed(seed))`, so a seed means the same picture as in diffusers.
    """
    return torch.cat([torch.randn((1, *shape), generator=generator, dtype=torch.float32) for generator in generators])


def noise_source(generators: Sequence[Generator], shape: tuple[int, int, int], device: torch.device) -> Callable[[], Tensor]:
    """The function from which a stochastic sampler takes each step's noise, (pictures, channels, h, w) float32 on `device`."""
    return lambda: draw(generators, shape).to(device)
