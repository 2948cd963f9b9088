"""Post-hoc EMA: profiles against numerical integrals, reconstruction against averages tracked directly, exact resume."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch import Tensor
from toy_training import CONFIG, run
from tu_diffuse.errors import DataError, OutputError, UsageError
from tu_diffuse.training import posthoc
from tu_diffuse.training.checkpoints import load_newest
from tu_diffuse.training.posthoc import (
    WIDTHS,
    Profile,
    exponent,
    find_snapshots,
    power_averages,
    product,
    reconstruct,
    shares_of,
    update_power_averages,
    write_snapshots,
)

STEPS, EVERY = 640, 20


def walk(steps: int) -> list[dict[str, Tensor]]:
    """Weights near 1 that move by about a thousandth in all, as in fine-tuning: the start, and those after each step."""
    generator = torch.Generator().manual_seed(3)
    moves = 1e-4 * torch.randn(steps, 50, generator=generator).cumsum(0) + 2e-3 * torch.linspace(0, 1, steps)[:, None] ** 0.5
    return [{"w": torch.ones(50)}, *({"w": 1 + move} for move in moves)]


def mean_of(weights: list[dict[str, Tensor]], width: float) -> Tensor:
    """The average over 1-based steps k with weight k^(γ+1) - (k-1)^(γ+1), in float64: the profile's integral over each step."""
    power = exponent(width) + 1
    shares = torch.diff((torch.arange(len(weights), dtype=torch.float64) / (len(weights) - 1)) ** power)
    return sum((share * w["w"].double() for share, w in zip(shares, weights[1:], strict=True)), torch.zeros(50, dtype=torch.float64))


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("averages")
    start, *after = walk(STEPS)
    averages = power_averages(start)
    for step, weights in enumerate(after, 1):
        update_power_averages(averages, weights, step)
        if step % EVERY == 0:
            write_snapshots(folder, averages, start, step, {})
    return folder


@pytest.mark.parametrize("width", [0.02, 0.05, 0.1, 0.25])
def test_a_width_is_the_relative_deviation_of_its_profile(width: float) -> None:
    """The standard deviation of a density proportional to τ^γ on [0, 1], by numerical integration."""
    gamma = exponent(width)
    mass, first, second = (quad(lambda x, n=n: x ** (gamma + n), 0, 1)[0] for n in range(3))
    assert math.sqrt(second / mass - (first / mass) ** 2) == pytest.approx(width, rel=1e-6)


@pytest.mark.parametrize("width", [0.0, 0.3, -1.0, math.nan])
def test_a_width_that_no_profile_has_is_refused(width: float) -> None:
    with pytest.raises(UsageError, match="--sigma-rel"):
        exponent(width)


@pytest.mark.parametrize(("one", "other"), [((10, 0.05), (10, 0.1)), ((7, 0.1), (10, 0.05)), ((10, 0.1), (3, 0.2)), ((4, 0.05), (4, 0.05))])
def test_the_inner_product_is_the_integral(one: tuple[int, float], other: tuple[int, float]) -> None:
    def density(tau: float, step: int, width: float) -> float:
        return (exponent(width) + 1) * tau ** exponent(width) / step ** (exponent(width) + 1)

    integral = quad(lambda tau: density(tau, *one) * density(tau, *other), 0, min(one[0], other[0]))[0]
    assert product(Profile(*one), Profile(*other)) == pytest.approx(integral, rel=1e-6)


def test_the_kept_averages_are_the_weighted_means_of_all_steps() -> None:
    start, *after = walk(STEPS)
    averages = power_averages(start)
    for step, weights in enumerate(after, 1):
        update_power_averages(averages, weights, step)
    for width in WIDTHS:
        wanted = mean_of([start, *after], width)
        assert (averages[f"{width:.2f}/w"] - wanted).abs().max() < 1e-3 * (wanted - 1).abs().max()


@pytest.mark.parametrize(("width", "step", "error"), [(0.07, STEPS, 0.002), (0.15, STEPS, 0.005), (0.03, STEPS, 0.02), (0.07, STEPS // 2, 0.01)])
def test_another_width_is_that_of_an_average_tracked_directly(stored: Path, width: float, step: int, error: float) -> None:
    snapshots = [snapshot for snapshot in find_snapshots(stored) if snapshot.profile.step <= step]
    shares, distance = shares_of([snapshot.profile for snapshot in snapshots], Profile(step, width))
    start, *after = walk(STEPS)
    made = reconstruct(snapshots, shares, start)["w"].double() - 1
    moved = mean_of([start, *after[:step]], width) - 1
    assert (made - moved).norm() < error * moved.norm()
    assert 0 < distance < 10 * error
    nearest = min(((mean_of([start, *after[:step]], kept) - 1) - moved).norm().item() for kept in WIDTHS)
    assert (made - moved).norm() < 0.3 * nearest  # it is not one of the kept averages


def test_a_stored_average_is_made_of_itself_alone(stored: Path) -> None:
    snapshots = find_snapshots(stored)
    shares, distance = shares_of([snapshot.profile for snapshot in snapshots], snapshots[-1].profile)
    assert shares == pytest.approx([0.0] * (len(snapshots) - 1) + [1.0], abs=1e-8)
    assert distance < 1e-6
    start, *after = walk(STEPS)
    made = reconstruct(snapshots, shares, start)["w"].double() - 1
    wanted = mean_of([start, *after], snapshots[-1].profile.width) - 1
    assert (made - wanted).abs().max() < 1e-3 * wanted.abs().max()


@pytest.mark.parametrize("width", [0.03, 0.2])
def test_shares_sum_to_one_and_cost_little(width: float) -> None:
    """Against the unconstrained least squares of densities on a fine grid."""
    profiles = [Profile(step, kept) for step in range(100, 900, 100) for kept in WIDTHS]
    shares, distance = shares_of(profiles, Profile(800, width))
    assert sum(shares) == pytest.approx(1, abs=1e-9)
    tau = (np.arange(80_000) + 0.5) / 100

    def density(profile: Profile) -> np.ndarray:
        gamma = exponent(profile.width)
        return np.where(tau < profile.step, (gamma + 1) * (tau / profile.step) ** gamma / profile.step, 0.0)

    columns, wanted = np.stack([density(profile) for profile in profiles], 1), density(Profile(800, width))
    assert distance == pytest.approx(np.linalg.norm(columns @ shares - wanted) / np.linalg.norm(wanted), rel=1e-3)
    free = np.linalg.lstsq(columns, wanted, rcond=None)[0]
    best = np.linalg.norm(columns @ free - wanted) / np.linalg.norm(wanted)
    assert best <= distance < 1.1 * best
    assert abs(free.sum() - 1) > 5e-3  # which would scale the weights


POSTHOC = replace(CONFIG, snapshot_every=3, save_every=4)


@pytest.mark.parametrize("stop_at", [2, 4, 7, 11])
def test_killed_and_resumed_leaves_the_same_snapshots_bit_for_bit(tmp_path: Path, stop_at: int) -> None:
    run(tmp_path / "whole", POSTHOC)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", POSTHOC, stop_at=stop_at)
    (tmp_path / "killed" / "averages").mkdir(exist_ok=True)
    (tmp_path / "killed" / "averages" / ".00000012-0.05.safetensors.partial").write_bytes(b"half")
    run(tmp_path / "killed", POSTHOC)
    files = [{path.name: path.read_bytes() for path in (tmp_path / name / "averages").iterdir()} for name in ("whole", "killed")]
    assert sorted(files[0]) == [f"{step:08d}-{width:.2f}.safetensors" for step in (3, 6, 9, 12) for width in WIDTHS]
    assert files[0] == files[1]
    one, other = (load_newest(tmp_path / name) for name in ("whole", "killed"))
    assert one is not None
    assert other is not None
    assert all(torch.equal(tensor, other.power_averages[name]) for name, tensor in one.power_averages.items())
    assert one.power_averages["0.05/0.weight"].abs().max() > 0.1


def test_snapshots_of_a_run_reproduce_what_its_checkpoint_holds(tmp_path: Path) -> None:
    model, _ = run(tmp_path, POSTHOC)
    torch.manual_seed(0)
    fresh = type(model)(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    found, snapshots = load_newest(tmp_path), find_snapshots(tmp_path / "averages")
    assert found is not None
    made = reconstruct([snapshots[-1]], [1.0], dict(fresh.named_parameters()))
    for name, tensor in made.items():
        assert torch.allclose(tensor, found.power_averages[f"{WIDTHS[-1]:.2f}/{name}"], rtol=0, atol=2e-4)
    assert snapshots[-1].run["snapshot_every"] == 3


def test_the_averages_change_nothing_of_the_training(tmp_path: Path) -> None:
    with_them, _ = run(tmp_path / "with", POSTHOC)
    without, _ = run(tmp_path / "without", CONFIG)
    assert torch.equal(with_them[0].weight, without[0].weight)  # type: ignore[index]
    assert not (tmp_path / "without" / "averages").exists()


def test_snapshots_of_steps_that_a_run_will_take_again_are_deleted_first(tmp_path: Path) -> None:
    """Killed after the end's snapshot and then lengthened: the end is none any more."""
    short = replace(POSTHOC, steps=8, cooldown=0, save_every=5)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, replace(short, steps=20), stop_at=10)
    (tmp_path / "averages" / "00000011-0.05.safetensors").write_bytes(b"of a run that ended there")
    run(tmp_path, replace(short, steps=20))
    assert sorted({snapshot.profile.step for snapshot in find_snapshots(tmp_path / "averages")}) == [3, 6, 9, 12, 15, 18, 20]


def test_a_full_disk_stops_before_a_snapshot_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors import SafetensorError

    def full(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        del tensors, path, metadata
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(posthoc, "save_file", full)
    with pytest.raises(OutputError, match="disk is full at step 3"):
        run(tmp_path, POSTHOC)
    assert not find_snapshots(tmp_path / "averages")


def test_room_is_wanted_for_all_snapshots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """65 weights of 4 bytes: two checkpoints with three averages each take 2 · 6 · 260 bytes, four snapshots of 2 files 4 · 260."""
    needed = 2 * 6 * 260 + 4 * 260
    usage = type("Usage", (), {"free": needed - 1})
    monkeypatch.setattr("tu_diffuse.training.saving.shutil.disk_usage", lambda folder: usage)
    with pytest.raises(OutputError, match="make room first"):
        run(tmp_path / "tight", POSTHOC)
    monkeypatch.setattr(usage, "free", needed)
    run(tmp_path / "enough", POSTHOC)
    assert find_snapshots(tmp_path / "enough" / "averages")


def test_a_damaged_snapshot_is_named(stored: Path, tmp_path: Path) -> None:
    (tmp_path / "00000020-0.05.safetensors").write_bytes((stored / "00000020-0.05.safetensors").read_bytes()[:-1])
    with pytest.raises(DataError, match=r"00000020-0\.05"):
        find_snapshots(tmp_path)
