"""Losses of a run told apart by noise level: means over samples, whatever batches they came in."""

import pytest
import torch
from tu_diffuse.training.tallies import Tally, add, means, noise_bins, pairs_of, split


def test_means_are_over_samples_not_over_batches() -> None:
    generator = torch.Generator().manual_seed(0)
    t, errors = torch.randint(0, 1000, (30,), generator=generator), torch.rand(30, generator=generator)
    intervals = noise_bins(1000) | {"all": (0, 1000), "none": (1000, 1001)}
    tally = Tally()
    for rows in (slice(0, 1), slice(1, 8), slice(8, 30)):
        scalars = split(errors[rows], t[rows], intervals)
        add(tally, list(scalars), pairs_of(scalars).flatten().tolist())
    told = means(tally)
    assert told["all"] == pytest.approx(errors.mean().item(), rel=1e-5)
    assert "none" not in told
    for name, (first, end) in noise_bins(1000).items():
        assert told[name] == pytest.approx(errors[(t >= first) & (t < end)].mean().item(), rel=1e-5)


def test_a_plain_value_counts_once() -> None:
    tally = Tally()
    for value in (1.0, 4.0):
        add(tally, ["loss"], pairs_of({"loss": torch.tensor(value, dtype=torch.bfloat16)}).flatten().tolist())
    assert means(tally) == {"loss": 2.5}


def test_bins_cover_every_timestep_once() -> None:
    assert list(noise_bins(1000))[:2] == ["loss/t0-99", "loss/t100-199"]
    for steps in (10, 37, 1000):
        covered = [t for first, end in noise_bins(steps).values() for t in range(first, end)]
        assert covered == list(range(steps))
