"""The same folder, seed and sampler give the latents of diffusers' own pipelines."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import PROMPT, TOLERANCE, latents, theirs
from tiny_models import NOISE

NEGATIVE = "grey"


@dataclass(frozen=True)
class Case:
    sampler: str
    scheduler: str
    schedule: str
    steps: int = 6
    options: tuple[tuple[str, Any], ...] = ()
    eta: float | None = None


CASES = [
    Case("euler", "EulerDiscreteScheduler", "leading", options=(("timestep_spacing", "leading"),)),
    Case("euler", "EulerDiscreteScheduler", "trailing", options=(("timestep_spacing", "trailing"),)),
    Case("euler", "EulerDiscreteScheduler", "karras", options=(("timestep_spacing", "linspace"), ("use_karras_sigmas", True))),
    Case("euler_a", "EulerAncestralDiscreteScheduler", "linspace"),
    Case("heun", "HeunDiscreteScheduler", "linspace"),
    Case("ddim", "DDIMScheduler", "leading", options=(("clip_sample", False), ("set_alpha_to_one", True))),
    Case("ddim", "DDIMScheduler", "leading", options=(("clip_sample", False), ("set_alpha_to_one", True)), eta=0.7),
    Case("ddpm", "DDPMScheduler", "leading", options=(("clip_sample", False), ("timestep_spacing", "leading"))),
    Case("dpmpp_2m", "DPMSolverMultistepScheduler", "linspace"),
    Case("dpmpp_2m_sde", "DPMSolverMultistepScheduler", "linspace", options=(("algorithm_type", "sde-dpmsolver++"),)),
    Case("unipc", "UniPCMultistepScheduler", "linspace"),
    Case("lcm", "LCMScheduler", "lcm", steps=4, options=(("clip_sample", False),)),
]


def _compare(folder: Path, case: Case, negative: str, guidance: float) -> None:
    import diffusers

    pipeline = theirs(folder)
    prediction = pipeline.scheduler.config.prediction_type
    pipeline.scheduler = getattr(diffusers, case.scheduler)(**NOISE, **dict(case.options), prediction_type=prediction)
    wanted = pipeline(
        PROMPT,
        negative_prompt=negative if negative else None,
        num_inference_steps=case.steps,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(11),
        output_type="latent",
        **({} if case.eta is None else {"eta": case.eta}),
    ).images
    got = latents(
        folder, seeds=[11], negative=negative, steps=case.steps, guidance=guidance, sampler=case.sampler, schedule=case.schedule, eta=case.eta
    )
    assert wanted.std() > 0.05
    difference = float((got - wanted).abs().max())
    print(f"{folder.name} {case.sampler} {case.schedule} {difference:.1e} of {float(wanted.abs().max()):.1f}")
    assert difference <= TOLERANCE


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.sampler}-{case.schedule}{'' if case.eta is None else '-eta'}")
@pytest.mark.parametrize("fixture", ["sd1_folder", "sd2_folder", "sdxl_folder"])
def test_latents_equal_diffusers(request: pytest.FixtureRequest, fixture: str, case: Case):
    _compare(request.getfixturevalue(fixture), case, negative="", guidance=4.0)


@pytest.mark.parametrize("fixture", ["sd1_folder", "sd2_folder", "sdxl_folder"])
def test_negative_prompt_and_no_guidance(request: pytest.FixtureRequest, fixture: str):
    folder = request.getfixturevalue(fixture)
    _compare(folder, CASES[1], negative=NEGATIVE, guidance=4.0)
    _compare(folder, CASES[1], negative="", guidance=1.0)


# The scheduler files of published checkpoints: Stable Diffusion 2 (base), 2.1 (v), SDXL base.
PUBLISHED = [
    ("sd1_folder", "DDIMScheduler", {"set_alpha_to_one": False, "clip_sample": False, "skip_prk_steps": True}),
    ("sd2_folder", "DDIMScheduler", {"set_alpha_to_one": False, "clip_sample": False, "prediction_type": "v_prediction"}),
    ("sdxl_folder", "EulerDiscreteScheduler", {"timestep_spacing": "leading", "interpolation_type": "linear", "sample_max_value": 1.0}),
    ("sd1_folder", "DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min", "use_karras_sigmas": True}),
]


@pytest.mark.parametrize(("fixture", "scheduler", "settings"), PUBLISHED, ids=lambda value: value if isinstance(value, str) else "")
def test_a_folder_runs_on_its_own_scheduler_file(
    request: pytest.FixtureRequest, tmp_path: Path, fixture: str, scheduler: str, settings: dict[str, Any]
):
    """Nothing is named on our side: sampler, spacing and where the run ends come from the folder."""
    import diffusers

    folder = shutil.copytree(request.getfixturevalue(fixture), tmp_path / "model")
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": scheduler, **NOISE, **settings}))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "scheduler": ["diffusers", scheduler]}))
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    wanted = pipeline(PROMPT, num_inference_steps=8, guidance_scale=4.0, generator=torch.Generator().manual_seed(11), output_type="latent").images
    got = latents(folder, seeds=[11], steps=8, guidance=4.0)
    assert wanted.std() > 0.05
    assert (got - wanted).abs().max() <= TOLERANCE


def test_settings_change_the_latents(sd1_folder: Path):
    """So that the comparisons above cannot pass with the prompt, seed, guidance or size left out."""
    asked: dict[str, Any] = {"seeds": [11], "steps": 3, "sampler": "euler", "guidance": 4.0}
    base = latents(sd1_folder, **asked)
    for change in ({"seeds": [12]}, {"negative": "grey"}, {"guidance": 2.0}, {"guidance_rescale": 0.7}, {"apg": True}, {"dynamic_threshold": 0.9}):
        assert (latents(sd1_folder, **(asked | change)) - base).abs().max() > 1e-2, change
