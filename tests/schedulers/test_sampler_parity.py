"""Each sampler step by step against diffusers' scheduler, with one synthetic nonlinear network and the same injected noise."""

import importlib
import sys
import types

import diffusers
import pytest
import torch
from diffusers.schedulers import (
    scheduling_ddim,
    scheduling_ddpm,
    scheduling_dpmsolver_multistep,
    scheduling_euler_ancestral_discrete,
    scheduling_lcm,
)
from tu_diffuse.schedulers.noise import NoiseSchedule
from tu_diffuse.schedulers.registry import SAMPLERS
from tu_diffuse.schedulers.schedules import make_schedule

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")
CONFIG = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
SHAPE = (2, 4, 8, 8)
SPACINGS = ("linspace", "leading", "trailing")
PREDICTIONS = ("epsilon", "v_prediction", "sample")
TOLERANCE = 1e-5
DETERMINISTIC = [("euler", "EulerDiscreteScheduler"), ("dpmpp_2m", "DPMSolverMultistepScheduler"), ("unipc", "UniPCMultistepScheduler")]
VP = ("ddim", "ddpm", "dpmpp_2m", "dpmpp_2m_sde", "unipc", "lcm")


TABLE = NoiseSchedule.from_config({**CONFIG, "_class_name": "EulerDiscreteScheduler"})


def network(x_vp, t, prediction):
    """Output of a made-up nonlinear network on variance-preserving input; t (batch,) float."""
    share = (t.to(x_vp) / 1000).view(-1, 1, 1, 1)
    x0 = torch.tanh(0.7 * x_vp + 0.3 * x_vp.roll(1, -1)) * (1.1 - share) + 0.1 * torch.sin(3 * x_vp)
    sigma = TABLE.sigma_at(t.double()).to(x_vp).view(-1, 1, 1, 1)
    scale = (1 + sigma**2).sqrt()
    epsilon = (x_vp * scale - x0) / sigma
    return {"sample": x0, "epsilon": epsilon, "v_prediction": (epsilon - sigma * x0) / scale}[prediction]


def adapted(schedule, prediction):
    """The network as `denoise(x, sigma) -> x0` in the variance-exploding scale."""

    def denoise(x, sigma):
        s = sigma.to(x).view(-1, 1, 1, 1)
        out = network(x / (s**2 + 1).sqrt(), schedule.timestep_at(sigma), prediction)
        if prediction == "epsilon":
            return x - s * out
        if prediction == "v_prediction":
            return x / (s**2 + 1) - out * s / (s**2 + 1).sqrt()
        return out

    return denoise


def stream(seed):
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(SHAPE, generator=generator)


def ours(name, schedule, prediction, unit, noise, **options):
    """x after every step."""
    steps = SAMPLERS[name].function(adapted(schedule, prediction), unit * schedule.initial_scale, schedule.sigmas, noise, **options)
    return [step.x for step in steps]


def theirs(scheduler, steps, unit, evaluations=1, **step_kwargs):
    """x after every step in the variance-exploding scale, and the scheduler's timesteps."""
    scheduler.set_timesteps(steps)
    x = unit * scheduler.init_noise_sigma
    trace = []
    for t in scheduler.timesteps:
        out = network(scheduler.scale_model_input(x, t), t.repeat(x.shape[0]), scheduler.config.prediction_type)
        x = scheduler.step(out, t, x, **step_kwargs).prev_sample
        trace.append(x)
    return trace, scheduler.timesteps


def to_ve(name, trace, sigmas):
    return [x * (s**2 + 1) ** 0.5 for x, s in zip(trace, sigmas[1:], strict=True)] if name in VP else trace


def assert_same(mine, reference, schedule, tolerance=TOLERANCE):
    assert len(mine) == len(reference)
    for i, (a, b) in enumerate(zip(mine, reference, strict=True)):
        scale = (float(schedule.sigmas[i + 1]) ** 2 + 1) ** 0.5  # compared at unit variance
        torch.testing.assert_close(a / scale, b / scale, atol=tolerance, rtol=0, msg=lambda m, i=i: f"step {i}: {m}")
    assert reference[-1].std() > 0.05


def unit_noise():
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(7))


def inject(monkeypatch, module, noise):
    monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: noise())


def schedule_for(name, spacing, prediction, steps, **config):
    noise = NoiseSchedule.from_config({**CONFIG, "_class_name": "EulerDiscreteScheduler", "prediction_type": prediction, **config})
    return make_schedule(noise, name, steps, spacing=spacing)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(
    ("name", "cls"), [("euler", "EulerDiscreteScheduler"), ("dpmpp_2m", "DPMSolverMultistepScheduler"), ("unipc", "UniPCMultistepScheduler")]
)
def test_deterministic_on_whole_timesteps(name, cls, spacing, prediction):
    schedule = schedule_for(name, spacing, prediction, 12)
    scheduler = getattr(diffusers, cls)(**CONFIG, timestep_spacing=spacing, prediction_type=prediction)
    reference, timesteps = theirs(scheduler, 12, unit_noise())
    torch.testing.assert_close(schedule.timesteps, timesteps.float(), atol=1e-4, rtol=0)
    torch.testing.assert_close(schedule.sigmas, scheduler.sigmas, atol=0, rtol=1e-6)
    assert_same(ours(name, schedule, prediction, unit_noise(), None), to_ve(name, reference, schedule.sigmas), schedule)


@pytest.mark.parametrize("steps", [1, 2, 3, 20])
@pytest.mark.parametrize(
    ("name", "cls"), [("euler", "EulerDiscreteScheduler"), ("dpmpp_2m", "DPMSolverMultistepScheduler"), ("unipc", "UniPCMultistepScheduler")]
)
def test_step_counts(name, cls, steps):
    schedule = schedule_for(name, "trailing", "epsilon", steps)
    scheduler = getattr(diffusers, cls)(**CONFIG, timestep_spacing="trailing")
    reference, _ = theirs(scheduler, steps, unit_noise())
    assert_same(ours(name, schedule, "epsilon", unit_noise(), None), to_ve(name, reference, schedule.sigmas), schedule)


@pytest.mark.parametrize("spacing", ["karras", "exponential", "beta"])
@pytest.mark.parametrize(
    ("name", "cls"),
    [
        ("euler", "EulerDiscreteScheduler"),
        ("heun", "HeunDiscreteScheduler"),
        ("dpmpp_2m", "DPMSolverMultistepScheduler"),
        ("unipc", "UniPCMultistepScheduler"),
    ],
)
def test_sigma_spacings(name, cls, spacing):
    schedule = schedule_for(name, spacing, "epsilon", 9)
    scheduler = getattr(diffusers, cls)(**CONFIG, **{f"use_{spacing}_sigmas": True})
    reference, timesteps = theirs(scheduler, 9, unit_noise())
    told = timesteps[::2] if name == "heun" else timesteps
    torch.testing.assert_close(schedule.timesteps, told.float(), atol=2e-2, rtol=0)
    reference = reference[1::2] + reference[-1:] if name == "heun" else reference
    assert_same(ours(name, schedule, "epsilon", unit_noise(), None), to_ve(name, reference, schedule.sigmas), schedule)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_heun(spacing, prediction):
    schedule = schedule_for("heun", spacing, prediction, 10)
    scheduler = diffusers.HeunDiscreteScheduler(**CONFIG, timestep_spacing=spacing, prediction_type=prediction)
    reference, _ = theirs(scheduler, 10, unit_noise())
    assert_same(ours("heun", schedule, prediction, unit_noise(), None), reference[1::2] + reference[-1:], schedule)


@pytest.mark.parametrize("prediction", PREDICTIONS[:2])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_euler_a(monkeypatch, spacing, prediction):
    inject(monkeypatch, scheduling_euler_ancestral_discrete, stream(3))
    schedule = schedule_for("euler_a", spacing, prediction, 12)
    scheduler = diffusers.EulerAncestralDiscreteScheduler(**CONFIG, timestep_spacing=spacing, prediction_type=prediction)
    reference, _ = theirs(scheduler, 12, unit_noise())
    assert_same(ours("euler_a", schedule, prediction, unit_noise(), stream(3)), reference, schedule)


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_ddim(monkeypatch, spacing, prediction, eta):
    inject(monkeypatch, scheduling_ddim, stream(3))
    schedule = schedule_for("ddim", spacing, prediction, 10)
    scheduler = diffusers.DDIMScheduler(**CONFIG, timestep_spacing=spacing, prediction_type=prediction, clip_sample=False)
    reference, _ = theirs(scheduler, 10, unit_noise(), eta=eta)
    assert_same(ours("ddim", schedule, prediction, unit_noise(), stream(3), eta=eta), to_ve("ddim", reference, schedule.sigmas), schedule)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_ddpm(monkeypatch, spacing, prediction):
    inject(monkeypatch, scheduling_ddpm, stream(3))
    schedule = schedule_for("ddpm", spacing, prediction, 12)
    scheduler = diffusers.DDPMScheduler(**CONFIG, timestep_spacing=spacing, prediction_type=prediction, clip_sample=False)
    reference, _ = theirs(scheduler, 12, unit_noise())
    assert_same(ours("ddpm", schedule, prediction, unit_noise(), stream(3)), to_ve("ddpm", reference, schedule.sigmas), schedule)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("spacing", [*SPACINGS, "karras"])
def test_dpmpp_2m_sde(monkeypatch, spacing, prediction):
    inject(monkeypatch, scheduling_dpmsolver_multistep, stream(3))
    schedule = schedule_for("dpmpp_2m_sde", spacing, prediction, 12)
    settings = {"use_karras_sigmas": True} if spacing == "karras" else {"timestep_spacing": spacing}
    scheduler = diffusers.DPMSolverMultistepScheduler(**CONFIG, **settings, algorithm_type="sde-dpmsolver++", prediction_type=prediction)
    reference, _ = theirs(scheduler, 12, unit_noise())
    mine = ours("dpmpp_2m_sde", schedule, prediction, unit_noise(), stream(3))
    assert_same(mine, to_ve("dpmpp_2m_sde", reference, schedule.sigmas), schedule)


@pytest.mark.parametrize("steps", [1, 4, 7])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_lcm(monkeypatch, prediction, steps):
    inject(monkeypatch, scheduling_lcm, stream(3))
    schedule = schedule_for("lcm", None, prediction, steps)
    scheduler = diffusers.LCMScheduler(**CONFIG, prediction_type=prediction)
    reference, timesteps = theirs(scheduler, steps, unit_noise())
    assert torch.equal(schedule.timesteps, timesteps.float())
    assert_same(ours("lcm", schedule, prediction, unit_noise(), stream(3)), to_ve("lcm", reference, schedule.sigmas), schedule)


def brownian_noise(noise):
    """Stand-in for the Brownian tree: unit noise of [sigma, sigma_next], consistent over the two intervals of a step."""
    state = {}

    def sample(sigma, sigma_next):
        sigma, sigma_next = float(sigma), float(sigma_next)
        if sigma not in state:
            state[sigma] = (sigma_next, noise(), noise())
            return state[sigma][1]
        middle, first, second = state[sigma]
        return (first * (sigma - middle) ** 0.5 + second * (middle - sigma_next) ** 0.5) / (sigma - sigma_next) ** 0.5

    return sample


@pytest.mark.parametrize("prediction", PREDICTIONS[:2])
@pytest.mark.parametrize("spacing", [*SPACINGS, "karras"])
def test_dpmpp_sde(monkeypatch, spacing, prediction):
    # torchsde is only the source of the noise, which is replaced here.
    monkeypatch.setitem(sys.modules, "torchsde", types.ModuleType("torchsde"))
    cls = importlib.import_module("diffusers.schedulers.scheduling_dpmsolver_sde").DPMSolverSDEScheduler
    schedule = schedule_for("dpmpp_sde", spacing, prediction, 10)
    settings = {"use_karras_sigmas": True} if spacing == "karras" else {"timestep_spacing": spacing}
    scheduler = cls(**CONFIG, **settings, prediction_type=prediction)
    scheduler.set_timesteps(10)
    scheduler.noise_sampler = brownian_noise(stream(3))
    monkeypatch.setattr(scheduler, "set_timesteps", lambda steps: None)
    reference, _ = theirs(scheduler, 10, unit_noise())
    mine = ours("dpmpp_sde", schedule, prediction, unit_noise(), stream(3))
    assert_same(mine, reference[1::2] + reference[-1:], schedule)


@pytest.mark.parametrize("name", ["euler", "euler_a", "dpmpp_2m", "unipc"])
def test_zero_terminal_snr(monkeypatch, name):
    cls = {"euler": "EulerDiscrete", "euler_a": "EulerAncestralDiscrete", "dpmpp_2m": "DPMSolverMultistep", "unipc": "UniPCMultistep"}[name]
    inject(monkeypatch, scheduling_euler_ancestral_discrete, stream(3))
    schedule = schedule_for(name, "trailing", "v_prediction", 10, rescale_betas_zero_snr=True)
    assert abs(schedule.initial_scale - 4096) < 0.1
    settings = {"timestep_spacing": "trailing", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    reference, _ = theirs(getattr(diffusers, f"{cls}Scheduler")(**CONFIG, **settings), 10, unit_noise())
    mine = ours(name, schedule, "v_prediction", unit_noise(), stream(3))
    # diffusers' Euler subtracts 4081 from 4096 standard deviations in float32 and loses 6e-5; ours is held to the exact run.
    assert_same(mine, to_ve(name, reference, schedule.sigmas), schedule, 1e-4)
    assert_same(mine, [x.float() for x in ours(name, schedule, "v_prediction", unit_noise().double(), stream(3))], schedule)


@pytest.mark.parametrize("beta_schedule", ["linear", "squaredcos_cap_v2"])
def test_other_training_schedules(beta_schedule):
    schedule = schedule_for("dpmpp_2m", "leading", "v_prediction", 12, beta_schedule=beta_schedule)
    config = {**CONFIG, "beta_schedule": beta_schedule}
    scheduler = diffusers.DPMSolverMultistepScheduler(**config, timestep_spacing="leading", prediction_type="v_prediction")
    reference, _ = theirs(scheduler, 12, unit_noise())
    mine = ours("dpmpp_2m", schedule, "v_prediction", unit_noise(), None)
    assert_same(mine, to_ve("dpmpp_2m", reference, schedule.sigmas), schedule)


@pytest.mark.parametrize("steps", [6, 16])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize(("name", "cls"), [*DETERMINISTIC, ("dpmpp_2m_sde", "DPMSolverMultistepScheduler")])
def test_runs_that_end_at_the_smallest_sigma(monkeypatch, name, cls, spacing, steps):
    inject(monkeypatch, scheduling_dpmsolver_multistep, stream(3))
    schedule = schedule_for(name, spacing, "epsilon", steps, final_sigmas_type="sigma_min")
    kind = {"algorithm_type": "sde-dpmsolver++"} if name == "dpmpp_2m_sde" else {}
    scheduler = getattr(diffusers, cls)(**CONFIG, timestep_spacing=spacing, final_sigmas_type="sigma_min", **kind)
    reference, _ = theirs(scheduler, steps, unit_noise())
    assert float(schedule.sigmas[-1]) == pytest.approx(TABLE.sigma_min, rel=1e-6)
    mine = ours(name, schedule, "epsilon", unit_noise(), stream(3))
    assert_same(mine, to_ve(name, reference, schedule.sigmas), schedule)
    torch.testing.assert_close(mine[-1] * schedule.final_scale, reference[-1], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_ddim_without_alpha_one(monkeypatch, eta, offset):
    inject(monkeypatch, scheduling_ddim, stream(3))
    schedule = schedule_for("ddim", "leading", "epsilon", 10, set_alpha_to_one=False, steps_offset=offset)
    scheduler = diffusers.DDIMScheduler(**{**CONFIG, "steps_offset": offset}, set_alpha_to_one=False, clip_sample=False)
    reference, _ = theirs(scheduler, 10, unit_noise(), eta=eta)
    mine = ours("ddim", schedule, "epsilon", unit_noise(), stream(3), eta=eta)
    assert_same(mine, to_ve("ddim", reference, schedule.sigmas), schedule)
    torch.testing.assert_close(mine[-1] * schedule.final_scale, reference[-1], atol=TOLERANCE, rtol=0)
    assert (mine[-1] - mine[-2]).abs().max() > 0 or offset == 0
