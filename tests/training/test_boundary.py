"""Where to fork: borders that are known by construction, gains against losses after real steps, and a model's own gradients."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from tu_diffuse.errors import ModelError, UsageError
from tu_diffuse.pipeline.model.folder import ModelFolder
from tu_diffuse.shards.index import ShardIndex, index_shards
from tu_diffuse.training.boundary import FOLDS, Batch, border_gains, measure, suggest_boundary
from world import STAGES
from write_shards import write_shard

BINS = 10


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    return index_shards([str(write_shard(tmp_path_factory.mktemp("shards"), 0, 16, STAGES["shapes"], 5, "png"))])


def folds_of(weight: nn.Parameter, target: Callable[[int], Tensor], noise: float, count: int = FOLDS) -> list[list[Batch]]:
    """In every bin the squared distance to a target, seen through noise that differs by fold."""

    def batch(fold: int) -> Batch:
        seen = noise * torch.randn(BINS, len(weight), generator=torch.Generator().manual_seed(fold))
        return 1.0, lambda bin: (weight - target(bin) - seen[bin]).square().sum() / 2

    return [[batch(fold)] for fold in range(count)]


def two_tasks(border: int) -> Callable[[int], Tensor]:
    """Bins below the border want one half of the weights at 1, the others the other half."""
    half = torch.arange(64) < 32
    return lambda bin: (half if bin < border else ~half).float()


@pytest.mark.parametrize("border", [1, 3, 5, 9])
@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_the_border_between_two_tasks_is_found(border: int, noise: float):
    weight = nn.Parameter(torch.full((64,), 0.5))
    _, products = measure([weight], folds_of(weight, two_tasks(border), noise), BINS, seed=0)
    gains = border_gains(products, torch.full((BINS,), 1 / BINS))
    assert int(gains.argmax()) == border - 1
    assert gains.max().item() == pytest.approx(1.0, abs=1e-6 if noise == 0 else 0.25)


def test_bins_that_agree_gain_nothing():
    weight = nn.Parameter(torch.zeros(64))
    losses, products = measure([weight], folds_of(weight, lambda _: torch.ones(64), 0.0), BINS, seed=0)
    assert losses.tolist() == pytest.approx([32.0] * BINS)
    assert border_gains(products, torch.full((BINS,), 1 / BINS)).abs().max() < 1e-6


def test_gains_are_what_two_networks_win_in_one_small_step():
    """The loss after one step of one network, and of two, taken for each border with shares that differ."""
    generator = torch.Generator().manual_seed(1)
    targets = torch.randn(BINS, 64, generator=generator)
    shares = torch.rand(BINS, generator=generator)
    shares /= shares.sum()
    weight = nn.Parameter(torch.zeros(64))
    _, products = measure([weight], folds_of(weight, lambda bin: targets[bin], 0.0, count=2), BINS, seed=0)
    gradients = (weight.detach() - targets).double()
    metric = gradients.square().mean(dim=0).sqrt()
    rate = 1e-4

    def won(bins: range) -> float:
        """By how much a step lowers the losses of these bins, each by its share, when the step follows them alone."""
        part = shares[list(bins)].double()
        step = rate * (part @ gradients[list(bins)]) / part.sum() / metric
        before, after = ((at - targets[list(bins)]).square().sum(dim=1).double() / 2 for at in (weight.detach(), weight.detach() - step))
        return float((part * (before - after)).sum())

    together, apart = won(range(BINS)), sum(won(range(bin, bin + 1)) for bin in range(BINS))
    wanted = [(won(range(border)) + won(range(border, BINS)) - together) / (apart - together) for border in range(1, BINS)]
    assert border_gains(products, shares).tolist() == pytest.approx(wanted, rel=1e-2)


def test_products_of_a_folds_noise_with_itself_are_left_out():
    """Pure noise: what a biased estimate would call a gain near 1 is one near 0, as often below as above."""
    weight = nn.Parameter(torch.zeros(64))
    _, products = measure([weight], folds_of(weight, lambda _: torch.zeros(64), 1.0), BINS, seed=0)
    alone = products.diagonal().sum(dim=-1).diagonal().sum()
    assert abs(float(products.sum(dim=(0, 1)).diagonal().sum() - alone)) < 0.5 * float(alone)
    with pytest.raises(ModelError, match="not finite"):
        measure([weight], folds_of(weight, lambda _: torch.full((64,), float("nan")), 0.0), BINS, seed=0)


def test_a_models_losses_and_gradients_are_measured_the_same_in_any_batches(plain: ModelFolder, index: ShardIndex):
    one = suggest_boundary(plain, index, bins=4, samples=16, batch_size=2)
    other = suggest_boundary(plain, index, bins=4, samples=16, batch_size=1)
    assert one.edges == (0, 250, 500, 750, 1000)
    assert one.losses == pytest.approx(other.losses, rel=1e-4)
    assert one.gains == pytest.approx(other.gains, abs=1e-3)
    assert min(one.losses) > 1e-3
    assert len(set(one.gains)) == 3
    assert (one.timestep is None) == (max(one.gains) <= 2 * one.error)


def test_an_expert_is_measured_on_what_it_owns(ensemble: ModelFolder, index: ShardIndex):
    found = suggest_boundary(ensemble, index, expert="high", bins=2, samples=8)
    owned = int((ensemble.noise.sigmas < 1.5).sum())
    assert (found.expert, found.edges[0], found.edges[-1], found.samples) == ("high", owned, 1000, 8)


@pytest.mark.parametrize(
    ("asked", "said"),
    [({"bins": 1}, "--bins 1"), ({"bins": 1001}, "1001"), ({"samples": 7}, "--samples 7"), ({"samples": 64}, "hold 16"), ({"expert": "x"}, "'x'")],
)
def test_what_cannot_be_measured_is_said(plain: ModelFolder, index: ShardIndex, asked: dict[str, int], said: str, tmp_path: Path):
    with pytest.raises(UsageError, match=said):
        suggest_boundary(plain, index, **asked)
