"""Any number of shards, readers and processes: no hang, each sample once an epoch, one and the same sequence of samples and pixels."""

import signal
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path

import pytest
import torch
from shard_sets import members_of, write
from tu_diffuse.errors import UsageError
from tu_diffuse.pipeline.model.folder import ModelFolder
from tu_diffuse.shards.index import index_shards
from tu_diffuse.training.batches import Fitted
from tu_diffuse.training.config import FinetuneConfig
from tu_diffuse.training.encoded import open_source
from tu_diffuse.training.finetune import Plan, finetune, make_plan, read_batches
from tu_diffuse.training.workers import ALONE, Workers

EPOCHS, BATCH = 3, 4
Batch = list[tuple[int, tuple[Fitted, str]]]


@pytest.fixture(autouse=True)
def _deadline() -> Iterator[None]:
    """A hang becomes a failure with the place where it hangs."""

    def late(number: int, frame: object) -> None:
        raise TimeoutError("the test hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module", params=range(1, 6))
def shards(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """1 to 5 shards of unequal sizes, 24 samples in all."""
    folder = tmp_path_factory.mktemp("shards")
    borders = [0, *(3 + 5 * i for i in range(request.param - 1)), 24]
    spans = pairwise(borders)
    return [str(write(folder / f"{i:05d}.tar", members_of(end - start, first=start))) for i, (start, end) in enumerate(spans)]


def plan_for(shards: list[str], model: ModelFolder, workers: int, batch_size: int = BATCH) -> Plan:
    index = index_shards(shards)
    config = FinetuneConfig(shards=tuple(shards), steps=1, batch_size=batch_size, resolution=8, workers=workers)
    return make_plan(config, model, index, range(len(index.samples)))


def read(plan: Plan, first: int, count: int, workers: Workers = ALONE) -> list[Batch]:
    return list(islice(read_batches(plan, open_source(plan.folder, plan.index, plan.stored, torch.device("cpu")), first, workers), count))


def numbers(batches: list[Batch]) -> list[list[int]]:
    return [[number for number, _ in batch] for batch in batches]


@pytest.mark.parametrize("workers", range(9))
def test_each_sample_once_an_epoch_in_one_order(plain: ModelFolder, shards: list[str], workers: int) -> None:
    plan = plan_for(shards, plain, workers)
    per_epoch = 24 // BATCH
    batches = read(plan, 0, EPOCHS * per_epoch)
    order = [number for batch in numbers(batches) for number in batch]
    epochs = [order[24 * epoch : 24 * epoch + 24] for epoch in range(EPOCHS)]
    assert all(sorted(epoch) == list(range(24)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == EPOCHS
    for batch in batches:
        for number, (fitted, caption) in batch:  # the right picture: `members_of` paints a sample's number into its red
            assert (round((fitted.pixels[0, 0, 0].item() + 1) * 127.5), caption) == (number, f"caption {number}")
    alone = read(plan_for(shards, plain, 0), 0, EPOCHS * per_epoch)
    assert numbers(batches) == numbers(alone)
    for batch, same in zip(batches, alone, strict=True):
        assert all(torch.equal(one.pixels, other.pixels) for (_, (one, _)), (_, (other, _)) in zip(batch, same, strict=True))


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("first", [0, 5])
def test_processes_get_equal_parts_of_the_same_batch(plain: ModelFolder, shards: list[str], processes: int, first: int) -> None:
    plan = plan_for(shards, plain, 2, batch_size=6)
    whole = numbers(read(plan, 0, first + 7))[first:]
    parts = [numbers(read(plan, first, 7, Workers(rank, processes))) for rank in range(processes)]
    for step, batch in enumerate(whole):
        assert {len(part[step]) for part in parts} == {6 // processes}
        assert sorted(number for part in parts for number in part[step]) == sorted(batch)


def test_a_batch_that_processes_cannot_share_is_refused(plain: ModelFolder, shards: list[str], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--batch-size 4 cannot be shared equally by 3"):
        finetune(plan_for(shards, plain, 0), tmp_path / "out", lambda event: None, workers=Workers(1, 3))
    assert not (tmp_path / "out").exists()
