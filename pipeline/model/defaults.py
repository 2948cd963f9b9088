"""What a model draws best with: what its maker says in `defaults.json`, or what its family is known for."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...errors import ModelError
from ...model_files import read_json
from ...schedulers.noise import NoiseSchedule
from ...schedulers.registry import SAMPLERS

SAMPLER_OF = {
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "PNDMScheduler": "dpmpp_2m",
    "LMSDiscreteScheduler": "dpmpp_2m",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_a",
    "HeunDiscreteScheduler": "heun",
    "KDPM2DiscreteScheduler": "heun",
    "KDPM2AncestralDiscreteScheduler": "dpmpp_sde",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "DPMSolverSinglestepScheduler": "dpmpp_2m",
    "DPMSolverSDEScheduler": "dpmpp_sde",
    "DEISMultistepScheduler": "dpmpp_2m",
    "SASolverScheduler": "dpmpp_2m_sde",
    "UniPCMultistepScheduler": "unipc",
    "LCMScheduler": "lcm",
    "TCDScheduler": "lcm",
}
"""The sampler that comes closest to each scheduler class; the spacing is read from the scheduler's own config."""


@dataclass(frozen=True)
class Defaults:
    """What a model draws best with; sizes in pixels."""

    width: int
    height: int
    steps: int
    sampler: str
    schedule: str
    guidance: float


def read_defaults(folder: Path, family: str, configs: Mapping[str, Mapping[str, Any]], factor: int, noise: NoiseSchedule) -> Defaults:
    """`defaults.json`, or what the family is known for: 30 steps (LCM 8), guidance 7.5 (SDXL 5), the size the U-Net was trained at.

    The scheduler's class gives the sampler and its config the spacing.
    """
    sample_size = configs["unet"].get("sample_size")
    side = factor * (sample_size if isinstance(sample_size, int) and 1 <= sample_size <= 1024 else 64)
    sampler = SAMPLER_OF[configs["scheduler"].get("_class_name") or "DDPMScheduler"]
    spacing = SAMPLERS[sampler].default_spacing if sampler == "lcm" or noise.spacing is None else noise.spacing
    steps, guidance = (8, 1.0) if sampler == "lcm" else (30, 5.0 if family.startswith("sdxl") else 7.5)
    known = asdict(Defaults(width=side, height=side, steps=steps, sampler=sampler, schedule=spacing, guidance=guidance))
    given = read_json(folder / "defaults.json") if (folder / "defaults.json").is_file() else {}
    for key, value in given.items():
        wanted = type(known[key]) if key in known else None
        if wanted is None or not (type(value) is wanted or (wanted is float and type(value) is int)):
            raise ModelError(f"defaults.json of {folder.name!r} says {key!r:.100} = {value!r:.100}; wanted {', '.join(known)} with usable values.")
    return Defaults(**(known | given))
