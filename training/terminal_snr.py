"""Zero terminal SNR: a model's noise schedule moved so that its last timestep is pure noise."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..errors import UsageError
from ..model_files import read_json
from ..pipeline.model.folder import ModelFolder
from ..schedulers.noise import NoiseSchedule

_RESCALING = ("DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler")


def with_zero_terminal_snr(model: ModelFolder) -> ModelFolder:
    """The model with the schedule of Lin et al. 2023 (arXiv 2305.08891, algorithm 1), sampled from its very last timestep ("trailing", section 3.3).

    A scheduler class of diffusers that cannot rescale becomes DDIM, the one of that paper.

    Raises:
        UsageError: it predicts the noise, or has this schedule already.
    """
    if model.noise.prediction_type == "epsilon":
        raise UsageError(
            f"--zero-terminal-snr is nothing for {model.name!r}, which predicts the noise: at the last timestep its input would be its answer; "
            "use a v-prediction model, or leave it out."
        )
    config = model.configs["scheduler"]
    if config.get("rescale_betas_zero_snr"):
        raise UsageError(f"{model.name!r} has zero terminal SNR already; leave --zero-terminal-snr out.")
    name = config["_class_name"] if config["_class_name"] in _RESCALING else "DDIMScheduler"
    spaced = {field: False for field in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas") if config.get(field)}
    changed = {**config, **spaced, "_class_name": name, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    configs = MappingProxyType({**model.configs, "scheduler": changed})
    return replace(model, configs=configs, noise=NoiseSchedule.from_config(changed))


def write_scheduler(folder: Path, config: Mapping[str, Any]) -> None:
    """Replace the scheduler of a model folder that is being written."""
    path = folder / "scheduler" / "scheduler_config.json"
    path.unlink()  # it may be a link
    path.write_text(json.dumps(dict(config), indent=2) + "\n", encoding="utf-8")
    index = folder / "model_index.json"
    content = read_json(index) | {"scheduler": ["diffusers", config["_class_name"]]}
    index.unlink()
    index.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
