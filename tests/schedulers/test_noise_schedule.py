"""Training schedules against diffusers' tables, and what `from_config` refuses."""

import math

import diffusers
import pytest
import torch
from tu_diffuse.errors import ModelError
from tu_diffuse.schedulers.noise import NoiseSchedule, cosine_betas, linear_betas, scaled_linear_betas

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")
SD = {"_class_name": "EulerDiscreteScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_sigmas_are_bit_equal_to_diffusers(beta_schedule, zero_snr):
    config = {**SD, "beta_schedule": beta_schedule, "rescale_betas_zero_snr": zero_snr, "num_train_timesteps": 500}
    reference = diffusers.DPMSolverMultistepScheduler.from_config(config)
    noise = NoiseSchedule.from_config({**config, "_class_name": "DPMSolverMultistepScheduler"})
    assert torch.equal(noise.sigmas.float(), reference.sigmas)
    torch.testing.assert_close(noise.alphas_cumprod, reference.alphas_cumprod.double(), atol=1e-7, rtol=0)
    if zero_snr:
        assert noise.sigma_max == pytest.approx(4096, abs=0.1)


def test_trained_betas():
    betas = (torch.linspace(0.01, 0.2, 30) ** 1.5).tolist()
    reference = diffusers.DDPMScheduler(num_train_timesteps=30, trained_betas=betas)
    noise = NoiseSchedule.from_config({"_class_name": "DDPMScheduler", "trained_betas": betas})
    torch.testing.assert_close(noise.alphas_cumprod.float(), reference.alphas_cumprod, atol=1e-7, rtol=0)


@pytest.mark.parametrize("prefix", ["DDIM", "EulerDiscrete", "HeunDiscrete", "LCM", "PNDM", "TCD"])
def test_absent_fields_have_the_class_default(prefix):
    name = f"{prefix}Scheduler"
    reference = getattr(diffusers, name)()
    noise = NoiseSchedule.from_config({"_class_name": name})
    torch.testing.assert_close(noise.alphas_cumprod.float(), reference.alphas_cumprod, atol=1e-7, rtol=0)
    assert noise.spacing == reference.config.timestep_spacing
    assert noise.steps_offset == reference.config.steps_offset


def test_a_saved_config_round_trips(tmp_path):
    reference = diffusers.DPMSolverMultistepScheduler.from_config(
        {**SD, "prediction_type": "v_prediction", "use_karras_sigmas": True, "steps_offset": 1}
    )
    noise = NoiseSchedule.from_config(dict(reference.config) | {"_class_name": "DPMSolverMultistepScheduler"})
    assert (noise.prediction_type, noise.spacing, noise.steps_offset) == ("v_prediction", "karras", 1)


@pytest.mark.parametrize(
    "change",
    [
        {"_class_name": "FlowMatchEulerDiscreteScheduler"},
        {"_class_name": "EDMEulerScheduler"},
        {"beta_schedule": "sigmoid"},
        {"prediction_type": "flow_prediction"},
        {"timestep_spacing": "random"},
        {"use_karras_sigmas": True, "use_beta_sigmas": True},
        {"thresholding": True},
        {"use_flow_sigmas": True},
        {"lambda_min_clipped": -5.1},
        {"sigma_min": 0.002},
        {"_class_name": "DDIMScheduler", "clip_sample": True},
        {"trained_betas": [0.0, 0.0, 0.0]},
    ],
)
def test_what_is_not_supported_is_refused(change):
    with pytest.raises(ModelError):
        NoiseSchedule.from_config({**SD, **change})


def test_harmless_values_are_accepted():
    NoiseSchedule.from_config(
        {**SD, "lambda_min_clipped": -math.inf, "sigma_min": None, "clip_sample": True, "thresholding": False, "solver_order": 3}
    )


def test_known_sigmas_of_stable_diffusion():
    noise = NoiseSchedule.from_config(SD)
    assert noise.sigma_min == pytest.approx(0.02917, abs=1e-5)
    assert noise.sigma_max == pytest.approx(14.6146, abs=1e-4)


def test_sigma_and_timestep_are_inverse_on_whole_timesteps():
    noise = NoiseSchedule.from_config(SD)
    t = torch.arange(1000)
    assert torch.equal(noise.sigma_at(t), noise.sigmas)
    torch.testing.assert_close(noise.timestep_at(noise.sigmas), t.double(), atol=1e-9, rtol=0)


def test_between_whole_timesteps():
    noise = NoiseSchedule.from_config(SD)
    assert float(noise.sigma_at(10.25)) == pytest.approx(0.75 * float(noise.sigmas[10]) + 0.25 * float(noise.sigmas[11]))
    middle = torch.sqrt(noise.sigmas[10] * noise.sigmas[11])
    assert float(noise.timestep_at(middle)) == pytest.approx(10.5)
    t = torch.linspace(20, 990, 4321, dtype=torch.float64)
    assert float((noise.timestep_at(noise.sigma_at(t)) - t).abs().max()) < 0.01


def test_outside_the_table_the_ends_are_told():
    noise = NoiseSchedule.from_config(SD)
    assert noise.timestep_at(torch.tensor([1e-3, 100.0])).tolist() == [0, 999]
    assert noise.sigma_at(torch.tensor([-5.0, 5000.0])).tolist() == [noise.sigma_min, noise.sigma_max]


def test_beta_functions():
    assert linear_betas(0.1, 0.3, 3).tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert scaled_linear_betas(0.01, 0.09, 3).tolist() == pytest.approx([0.01, 0.04, 0.09])
    assert float(cosine_betas(100)[-1]) == pytest.approx(0.999)
