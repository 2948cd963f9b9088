"""Noise levels as people name them: timesteps, borders, and the experts that own what lies between."""

import math
from collections.abc import Sequence

import torch

from ..errors import UsageError
from ..pipeline.model.folder import ModelFolder
from ..schedulers.noise import NoiseSchedule
from ..unet.experts import ExpertEntry


def interval_name(noise: NoiseSchedule, sigma_min: float, sigma_max: float) -> str:
    """Name an interval by its whole timesteps: `t0500-1000` owns those with 500 <= t < 1000.

    Raises:
        UsageError: it owns none.
    """
    low, high = (first_timestep(noise, sigma) for sigma in (sigma_min, sigma_max))
    if low >= high:
        raise UsageError(
            f"The noise levels from sigma {sigma_min:g} to {sigma_max:g} hold no whole timestep of the model's schedule; choose other borders."
        )
    return f"t{low:04d}-{high:04d}"


def sigma_of(noise: NoiseSchedule, timestep: float) -> float:
    """The border at a timestep: what lies at or above it belongs to the noisier expert.

    Raises:
        UsageError: not a border within the schedule.
    """
    if not 0 < timestep <= len(noise.sigmas) - 1:
        raise UsageError(f"The border {timestep:g} is no timestep inside the model's schedule; give one above 0 and up to {len(noise.sigmas) - 1}.")
    # Interpolation may miss the table by a rounding, and with it the border.
    return float(noise.sigmas[int(timestep)] if timestep == int(timestep) else noise.sigma_at(timestep))


def first_timestep(noise: NoiseSchedule, sigma: float) -> int:
    """The first whole timestep whose sigma is not below this one; the number of timesteps when all are."""
    return int(torch.searchsorted(noise.sigmas, sigma))


def expert_of(model: ModelFolder, name: str | None) -> ExpertEntry:
    """The expert of that name; None means the only one.

    Raises:
        UsageError: there is none, or None could mean several.
    """
    if name is None and len(model.experts) == 1:
        return model.experts[0]
    found = next((entry for entry in model.experts if entry.name == name), None)
    if found is None:
        asked = "none was named" if name is None else f"{name!r} is none of them"
        raise UsageError(f"{model.name!r} has the experts {names_of(model.experts)}, and {asked}; name one with --expert.")
    return found


def names_of(entries: Sequence[ExpertEntry]) -> str:
    """Names of experts, for messages."""
    return ", ".join(entry.name for entry in entries)


def level_text(noise: NoiseSchedule, sigma: float) -> str:
    """A noise level, for messages."""
    return f"sigma {sigma:.6g} (timestep {float(noise.timestep_at(sigma)):.6g})"


def owned_text(noise: NoiseSchedule, entry: ExpertEntry) -> str:
    """An expert and what it owns, for messages."""
    high = "infinity" if math.isinf(entry.sigma_max) else f"{entry.sigma_max:.6g}"
    steps = f"timesteps {first_timestep(noise, entry.sigma_min)} to {first_timestep(noise, entry.sigma_max)}"
    return f"the expert {entry.name!r}, which owns sigma {entry.sigma_min:.6g} to {high} ({steps})"
