"""Samplers on their own: order on the exactly solvable Gaussian, independence of the batch, suspension, borders."""

import itertools
import math

import pytest
import torch
from tu_diffuse.errors import UsageError
from tu_diffuse.schedulers.names import SAMPLER_NAMES, SPACINGS, TIMESTEP_SPACINGS
from tu_diffuse.schedulers.noise import NoiseSchedule, scaled_linear_betas
from tu_diffuse.schedulers.registry import SAMPLERS, sampler_info
from tu_diffuse.schedulers.schedules import make_schedule
from tu_diffuse.schedulers.spacings import AYS_TIMESTEPS, SIGMA_SPACINGS
from tu_diffuse.schedulers.step import crosses, stages

NOISE = NoiseSchedule.from_betas(scaled_linear_betas(0.00085, 0.012, 1000))
MEAN, SPREAD = 0.8, 0.5
STOCHASTIC = [name for name, info in SAMPLERS.items() if info.stochastic]


def gaussian(x, sigma):
    """The perfect denoiser of data N(MEAN, SPREAD²)."""
    s2 = sigma.to(x).view(-1, 1, 1, 1) ** 2
    return (s2 * MEAN + SPREAD**2 * x) / (SPREAD**2 + s2)


def streams(seeds, shape=(4, 6, 6)):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return lambda: torch.stack([torch.randn(shape, generator=g) for g in generators])


def no_noise():
    raise AssertionError("a deterministic sampler asked for noise")


def ode_error(name, steps, borders=()):
    """Error of the probability-flow ODE from sigma 10 to 0.1 against its closed form."""
    sigmas = torch.exp(torch.linspace(math.log(10), math.log(0.1), steps + 1, dtype=torch.float64))
    x = torch.full((1, 1, 1, 1), 7.0, dtype=torch.float64)
    *_, last = SAMPLERS[name].function(gaussian, x, sigmas, no_noise, borders=borders)
    exact = MEAN + (7.0 - MEAN) * math.sqrt((SPREAD**2 + 0.1**2) / (SPREAD**2 + 10**2))
    return abs(float(last.x) - exact)


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("ddim", 1), ("heun", 2), ("dpmpp_2m", 2), ("unipc", 2)])
def test_measured_order(name, order):
    assert SAMPLERS[name].order == order
    coarse, fine = ode_error(name, 64), ode_error(name, 128)
    assert math.log2(coarse / fine) > order - 0.15
    # Two expert borders cost a first-order step each, not the order.
    coarse, fine = ode_error(name, 64, (3.0, 0.7)), ode_error(name, 128, (3.0, 0.7))
    assert math.log2(coarse / fine) > order - 0.25


# A consistency sampler ends on x0 itself, which under this denoiser spreads less than the data.
@pytest.mark.parametrize("name", [name for name in STOCHASTIC if name != "lcm"])
def test_stochastic_samplers_reproduce_the_distribution(name):
    schedule = make_schedule(NOISE, name, 100, spacing="karras")
    draw = streams(range(1), (16, 40, 40))
    x = draw() * schedule.initial_scale
    *_, last = SAMPLERS[name].function(gaussian, x, schedule.sigmas, draw)
    assert float(last.x.mean()) == pytest.approx(MEAN, abs=0.02)
    assert float(last.x.std()) == pytest.approx(SPREAD, abs=0.03)


def trace(name, seeds, **options):
    schedule = make_schedule(NOISE, name, 6)
    draw = streams(seeds)
    x = draw() * schedule.initial_scale
    wobble = lambda x, sigma: torch.sin(x) * (2 / (2 + sigma.view(-1, 1, 1, 1)))  # noqa: E731
    return list(SAMPLERS[name].function(wobble, x, schedule.sigmas, draw, **options))


@pytest.mark.parametrize("borders", [(), (2.0,)])
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_batch_of_four_equals_four_batches_of_one(name, borders):
    options = {"eta": 0.7} if name == "ddim" else {}
    together = trace(name, [1, 2, 3, 4], borders=borders, **options)
    for row, seed in enumerate([1, 2, 3, 4]):
        for a, b in zip(together, trace(name, [seed], borders=borders, **options), strict=True):
            assert torch.equal(a.x[row], b.x[0])
            assert torch.equal(a.x0[row], b.x0[0])
    assert not torch.equal(together[-1].x[0], together[-1].x[1])


@pytest.mark.parametrize("name", SAMPLERS)
def test_steps_and_suspension(name):
    straight = trace(name, [5])
    assert [step.index for step in straight] == list(range(6))
    assert straight[-1].sigma_next == 0
    assert torch.equal(straight[-1].x, straight[-1].x0)
    for a, b in itertools.pairwise(straight):
        assert a.sigma_next == b.sigma
    # Two runs pulled in turn do not disturb each other.
    schedule = make_schedule(NOISE, name, 6)
    wobble = lambda x, sigma: torch.sin(x) * (2 / (2 + sigma.view(-1, 1, 1, 1)))  # noqa: E731
    runs = []
    for seed in (5, 6):
        draw = streams([seed])
        runs.append(SAMPLERS[name].function(wobble, draw() * schedule.initial_scale, schedule.sigmas, draw))
    woven = list(zip(*runs, strict=True))
    for a, (b, _) in zip(straight, woven, strict=True):
        assert torch.equal(a.x, b.x)


def asked(name, borders):
    """Sigmas at which the network is asked, one list a step, and the step's start."""
    schedule = make_schedule(NOISE, name, 8, spacing="custom", sigmas=[14.0, 10.0, 7.0, 5.0, 3.0, 2.0, 1.0, 0.4])
    calls, per_step = [], []

    def denoise(x, sigma):
        calls.append(float(sigma[0]))
        return x * 0.1

    draw = streams([1])
    for step in SAMPLERS[name].function(denoise, draw() * 14, schedule.sigmas, draw, borders=borders):
        per_step.append((step.sigma, list(calls)))
        calls.clear()
    return per_step


@pytest.mark.parametrize("name", SAMPLERS)
def test_evaluations_a_step(name):
    for sigma, calls in asked(name, ())[:-1]:
        assert calls[0] == pytest.approx(sigma)
        assert len(calls) == SAMPLERS[name].evaluations


@pytest.mark.parametrize("name", ["heun", "dpmpp_sde"])
@pytest.mark.parametrize("border", [4.0, 5.0, 3.0])
def test_a_step_never_asks_across_a_border(name, border):
    for sigma, calls in asked(name, (border,)):
        assert all((call >= border) == (sigma >= border) for call in calls)
    assert sum(len(calls) for _, calls in asked(name, (border,))) == 8 + 7 - 1


@pytest.mark.parametrize("name", ["dpmpp_2m", "dpmpp_2m_sde", "unipc"])
def test_history_restarts_at_a_border(name):
    """From the border on, a run is what a fresh sampler makes of the latents there."""
    sigmas = make_schedule(NOISE, name, 8).sigmas
    border = float(sigmas[4])
    draw = streams([1])
    first = [draw() for _ in range(8)]
    denoise = lambda x, sigma: torch.sin(x) * 0.5  # noqa: E731

    def run(x, sigmas, noises, borders):
        feed = iter(noises)
        return list(SAMPLERS[name].function(denoise, x, sigmas, lambda: next(feed), borders=borders))

    # The step that starts exactly on the border belongs to the upper expert.
    whole = run(first[0] * 10, sigmas, first[1:], (border,))
    lower = run(whole[4].x, sigmas[5:], first[6:], ())
    for a, b in zip(whole[5:], lower, strict=True):
        assert torch.equal(a.x, b.x)
    without = run(first[0] * 10, sigmas, first[1:], ())
    assert not torch.equal(without[-1].x, whole[-1].x)


@pytest.mark.parametrize("border", ["between steps", "on a step"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_run_is_taken_up_at_a_border(name, border):
    """Stopped for good at each border and begun again from latents and noise streams alone, a run is bit for bit the one that went through."""
    schedule = make_schedule(NOISE, name, 8)
    sigmas = schedule.sigmas
    borders = (float(sigmas[3]) if border == "on a step" else float(sigmas[2] + sigmas[3]) / 2, float(sigmas[6] + sigmas[7]) / 2)
    options = {"eta": 0.7} if name == "ddim" else {}
    wobble = lambda x, sigma: torch.sin(x) * (2 / (2 + sigma.view(-1, 1, 1, 1)))  # noqa: E731
    draw = streams([1, 2])
    whole = list(SAMPLERS[name].function(wobble, draw() * schedule.initial_scale, sigmas, draw, borders=borders, **options))
    parts = stages(sigmas, borders)
    assert len(parts) == 3
    assert parts[0][0] == 0
    assert parts[-1][1] == 8
    draw = streams([1, 2])
    x = draw() * schedule.initial_scale
    for first, end in parts:
        steps = SAMPLERS[name].function(wobble, x, sigmas, draw, borders=borders, first=first, **options)
        for a, b in zip(whole[first:end], steps, strict=False):
            assert torch.equal(a.x, b.x)
            assert (a.index, a.sigma) == (b.index, b.sigma)
            x = b.x


def test_stages():
    sigmas = torch.tensor([10.0, 8.0, 5.0, 3.0, 1.0, 0.0])
    assert stages(sigmas, ()) == [(0, 5)]
    assert stages(sigmas, (5.0,)) == [(0, 3), (3, 5)]  # the step that starts on the border is the upper expert's
    assert stages(sigmas, (0.5, 6.0)) == [(0, 2), (2, 5)]  # the step to 0 ends the run, whatever lies below it
    assert stages(sigmas, (20.0, 6.0, 5.5)) == [(0, 2), (2, 5)]


def test_crosses():
    assert crosses((2.0,), 3.0, 1.0)
    assert crosses((2.0,), 2.0, 1.0)
    assert not crosses((2.0,), 3.0, 2.0)
    assert not crosses((2.0,), 1.5, 1.0)
    assert not crosses((), 3.0, 0.0)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_noise_is_used(name):
    schedule = make_schedule(NOISE, name, 4)
    x = streams([1])() * schedule.initial_scale
    ends = []
    for seed in (2, 3):
        *_, last = SAMPLERS[name].function(gaussian, x, schedule.sigmas, streams([seed]))
        ends.append(last.x)
    assert not torch.allclose(*ends, atol=1e-3)


def test_the_first_order_family_is_one_step_rule():
    sigmas = make_schedule(NOISE, "euler", 5).sigmas
    x = streams([1])() * 14

    def end(name, **options):
        *_, last = SAMPLERS[name].function(gaussian, x, sigmas, streams([2]), **options)
        return last.x

    torch.testing.assert_close(end("euler"), end("ddim", eta=0.0))
    assert torch.equal(end("euler_a"), end("ddim", eta=1.0))
    assert torch.equal(end("ddpm"), end("ddim", eta=1.0))
    assert not torch.allclose(end("ddim", eta=0.3), end("ddim", eta=0.0), atol=1e-3)


def test_refusals_of_names_and_eta():
    with pytest.raises(UsageError):
        sampler_info("plms")
    with pytest.raises(UsageError):
        next(iter(SAMPLERS["ddim"].function(gaussian, torch.ones(1, 1, 1, 1), torch.tensor([1.0, 0.0]), no_noise, eta=1.5)))


def test_the_names_known_without_torch_are_all_there_are():
    assert tuple(SAMPLERS) == SAMPLER_NAMES
    assert set(SPACINGS) == {*TIMESTEP_SPACINGS, *SIGMA_SPACINGS, *AYS_TIMESTEPS, "lcm", "custom"}
