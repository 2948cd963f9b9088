"""Spacings, initial scale and what the network is told, against diffusers, scipy and published tables."""

import diffusers
import pytest
import scipy.stats
import torch
from diffusers.schedulers import AysSchedules
from tu_diffuse.errors import UsageError
from tu_diffuse.schedulers.noise import NoiseSchedule
from tu_diffuse.schedulers.registry import SAMPLERS
from tu_diffuse.schedulers.schedules import SPACINGS, make_schedule
from tu_diffuse.schedulers.spacings import beta_quantile

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")
CONFIG = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
NOISE = NoiseSchedule.from_config({**CONFIG, "_class_name": "DPMSolverSinglestepScheduler"})


@pytest.mark.parametrize("steps", [1, 3, 7, 20, 30, 50])
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize(
    ("name", "cls"),
    [
        ("euler", "EulerDiscreteScheduler"),
        ("euler_a", "EulerAncestralDiscreteScheduler"),
        ("dpmpp_2m", "DPMSolverMultistepScheduler"),
        ("unipc", "UniPCMultistepScheduler"),
        ("ddim", "DDIMScheduler"),
        ("ddpm", "DDPMScheduler"),
    ],
)
def test_timesteps_sigmas_and_scale(name, cls, spacing, steps):
    reference = getattr(diffusers, cls)(**CONFIG, timestep_spacing=spacing)
    reference.set_timesteps(steps)
    schedule = make_schedule(NOISE, name, steps, spacing=spacing)
    assert torch.equal(schedule.timesteps, reference.timesteps.float())
    if hasattr(reference, "sigmas"):
        assert torch.equal(schedule.sigmas, reference.sigmas)
    else:
        expected = (1 / reference.alphas_cumprod[reference.timesteps] - 1).sqrt()
        torch.testing.assert_close(schedule.sigmas[:-1], expected, rtol=2e-4, atol=0)
    scale = float(reference.init_noise_sigma)
    if SAMPLERS[name].variance_preserving:
        scale *= (float(schedule.sigmas[0]) ** 2 + 1) ** 0.5
    assert schedule.initial_scale == pytest.approx(scale, rel=1e-6)


@pytest.mark.parametrize("steps", [1, 8, 20, 25])
@pytest.mark.parametrize("spacing", ["karras", "exponential", "beta"])
@pytest.mark.parametrize(
    ("name", "cls"), [("euler", "EulerDiscreteScheduler"), ("dpmpp_2m", "DPMSolverMultistepScheduler"), ("unipc", "UniPCMultistepScheduler")]
)
def test_sigma_spacings(name, cls, spacing, steps):
    reference = getattr(diffusers, cls)(**CONFIG, **{f"use_{spacing}_sigmas": True})
    reference.set_timesteps(steps)
    schedule = make_schedule(NOISE, name, steps, spacing=spacing)
    if steps == 1 and name == "euler":  # one linspace timestep is t = 0 there; here the range is always the whole one
        assert float(schedule.sigmas[0]) == pytest.approx(NOISE.sigma_max)
        return
    torch.testing.assert_close(schedule.sigmas, reference.sigmas, rtol=1e-6, atol=0)
    torch.testing.assert_close(schedule.timesteps, reference.timesteps.float(), atol=1e-2 if name == "euler" else 0, rtol=0)


def test_beta_quantile_against_scipy():
    p = torch.linspace(0, 1, 1001, dtype=torch.float64)
    for shape in (0.6, 1.0, 2.5):
        expected = torch.from_numpy(scipy.stats.beta.ppf(p.numpy(), shape, shape))
        torch.testing.assert_close(beta_quantile(p, shape), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("spacing", "key"), [("ays", "StableDiffusion"), ("ays_xl", "StableDiffusionXL")])
def test_ays_tables(spacing, key):
    schedule = make_schedule(NOISE, "dpmpp_2m", 10, spacing=spacing)
    assert schedule.timesteps.tolist() == AysSchedules[f"{key}Timesteps"]
    torch.testing.assert_close(schedule.sigmas, torch.tensor(AysSchedules[f"{key}Sigmas"]), rtol=2e-2, atol=0)
    assert make_schedule(NOISE, "euler", 10, spacing=spacing).timesteps.tolist() == AysSchedules[f"{key}Timesteps"]


def test_ays_interpolates_log_linearly():
    ten = make_schedule(NOISE, "euler", 10, spacing="ays").sigmas
    twenty = make_schedule(NOISE, "euler", 20, spacing="ays").sigmas
    torch.testing.assert_close(twenty[:-1:2], ten[:-1], rtol=1e-6, atol=0)
    torch.testing.assert_close(twenty[1], torch.sqrt(ten[0] * ten[1]), rtol=1e-6, atol=0)
    short = NoiseSchedule.from_config({**CONFIG, "_class_name": "EulerDiscreteScheduler", "num_train_timesteps": 100})
    with pytest.raises(UsageError):
        make_schedule(short, "euler", 10, spacing="ays")


def test_custom_sigmas():
    schedule = make_schedule(NOISE, "euler", sigmas=[10.0, 3.0, 0.5])
    assert schedule.sigmas.tolist() == [10.0, 3.0, 0.5, 0.0]
    assert schedule.spacing == "custom"
    assert torch.equal(schedule.sigmas, make_schedule(NOISE, "euler", 3, spacing="custom", sigmas=[10.0, 3.0, 0.5, 0.0]).sigmas)
    torch.testing.assert_close(NOISE.sigma_at(schedule.timesteps).float(), schedule.sigmas[:-1], rtol=1e-4, atol=0)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_combination_is_made_or_refused(sampler, spacing):
    sigmas = [9.0, 1.0] if spacing == "custom" else None
    if sampler == "lcm" and spacing not in ("lcm", "custom"):
        with pytest.raises(UsageError):
            make_schedule(NOISE, sampler, 2, spacing=spacing)
        return
    schedule = make_schedule(NOISE, sampler, 2, spacing=spacing, sigmas=sigmas)
    assert schedule.spacing == spacing
    assert schedule.sigmas.dtype == torch.float32
    assert schedule.sigmas.shape == (3,)
    assert schedule.timesteps.shape == (2,)
    assert float(schedule.sigmas[-1]) == 0


def test_spacings_differ():
    seen = {tuple(make_schedule(NOISE, "euler", 7, spacing=s).sigmas.tolist()) for s in SPACINGS if s != "custom"}
    assert len(seen) == len(SPACINGS) - 1


def test_what_is_told_on_and_off_the_nodes():
    schedule = make_schedule(NOISE, "dpmpp_2m", 9, spacing="karras")
    told = schedule.timestep_at(schedule.sigmas[:-1])
    assert torch.equal(told, schedule.timesteps)
    assert bool((told != NOISE.timestep_at(schedule.sigmas[:-1]).float()).any())  # rounded on the nodes
    off = torch.tensor([5.4321, 0.777])
    torch.testing.assert_close(schedule.timestep_at(off), NOISE.timestep_at(off).float())


@pytest.mark.parametrize(
    ("spacing", "expected"), [(None, {"ddim": "leading", "dpmpp_2m": "linspace", "lcm": "lcm"}), ("trailing", {"ddim": "trailing", "lcm": "lcm"})]
)
def test_default_spacing(spacing, expected):
    noise = NoiseSchedule(NOISE.sigmas, spacing=spacing)
    for sampler, name in expected.items():
        assert make_schedule(noise, sampler, 4).spacing == name


@pytest.mark.parametrize(
    ("sampler", "settings"),
    [
        ("ddim", {"steps": 1001, "spacing": "leading"}),
        ("dpmpp_2m", {"steps": 1000, "spacing": "leading"}),
        ("euler", {"steps": 0}),
        ("euler", {"steps": None}),
        ("euler", {"steps": 5, "spacing": "cubic"}),
        ("euler", {"steps": 5, "spacing": "custom"}),
        ("euler", {"steps": 5, "sigmas": [3.0, 1.0]}),
        ("euler", {"spacing": "karras", "sigmas": [3.0, 1.0]}),
        ("euler", {"sigmas": [1.0, 3.0]}),
        ("euler", {"sigmas": [3.0, float("nan")]}),
        ("euler", {"sigmas": []}),
        ("plms", {"steps": 5}),
        ("lcm", {"steps": 51}),
    ],
)
def test_refusals(sampler, settings):
    with pytest.raises(UsageError):
        make_schedule(NOISE, sampler, **settings)
