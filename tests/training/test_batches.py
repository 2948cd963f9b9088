"""Batches: each sample once an epoch whatever the buckets, the same for any number of readers; buckets and cuts on closed cases."""

import itertools
import threading
from collections import Counter

import numpy as np
import pytest
import torch
from tu_diffuse.training.batches import ahead, batch_plan, crop_generator, fit, make_buckets, nearest_bucket


@pytest.mark.parametrize("buckets", [1, 2, 5])
@pytest.mark.parametrize("batch_size", [1, 4, 7])
def test_every_sample_once_before_any_twice_more(buckets: int, batch_size: int) -> None:
    bucket_of = [i % buckets for i in range(60)]
    plan = batch_plan(bucket_of, batch_size, seed=3)
    seen: Counter[int] = Counter()
    for batch in itertools.islice(plan, 4 * 60 // batch_size):
        assert len({bucket_of[sample] for sample in batch}) == 1
        assert len(batch) == batch_size
        seen.update(batch)
    # What waits in unfilled batches is less than one batch a bucket.
    assert sum(seen.values()) == 4 * 60 // batch_size * batch_size
    assert min(seen[sample] for sample in range(60)) >= 3 - (batch_size > 1)
    assert max(seen.values()) <= 5


def test_one_bucket_gives_whole_epochs_in_different_orders() -> None:
    plan = batch_plan([0] * 20, 5, seed=1)
    epochs = [[sample for batch in itertools.islice(plan, 4) for sample in batch] for _ in range(3)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    again = batch_plan([0] * 20, 5, seed=1)
    assert [sample for batch in itertools.islice(again, 4) for sample in batch] == epochs[0]


@pytest.mark.parametrize("threads", [0, 1, 2, 8])
def test_reading_ahead_keeps_the_order(threads: int) -> None:
    names: set[str] = set()

    def make(row: int) -> int:
        names.add(threading.current_thread().name)
        return row * row

    made = list(ahead(make, iter([(i, i + 1) for i in range(0, 40, 2)]), threads))
    assert made == [[i * i, (i + 1) ** 2] for i in range(0, 40, 2)]
    assert (threading.current_thread().name in names) == (threads == 0)


@pytest.mark.parametrize("threads", [0, 2])
def test_an_error_comes_with_its_own_batch(threads: int) -> None:
    batches = ahead(lambda row: 1 / row, iter([(1,), (2,), (0,), (3,)]), threads)
    assert [next(batches), next(batches)] == [[1.0], [0.5]]
    with pytest.raises(ZeroDivisionError):
        next(batches)


def test_buckets_have_equal_areas_and_mirror_each_other() -> None:
    buckets = make_buckets(512, 64)
    assert buckets[0] == (512, 512)
    assert {(h, w) for w, h in buckets} == set(buckets)
    assert all(w % 64 == h % 64 == 0 and abs(w * h / 512**2 - 1) < 0.1 and max(w, h) / min(w, h) <= 2 for w, h in buckets)
    assert nearest_bucket(1000, 1000, buckets) == 0
    wide = buckets[nearest_bucket(1920, 1080, buckets)]
    assert wide[0] / wide[1] == pytest.approx(16 / 9, rel=0.12)


def test_fit_covers_and_cuts() -> None:
    picture = np.zeros((40, 80, 3), np.uint8)
    picture[:, 40:] = 255
    middle = fit(picture, (20, 20))
    assert middle.pixels.shape == (3, 20, 20)
    assert middle.original == (40, 80)
    assert middle.corner == (0, 10)
    assert middle.pixels[:, :, :8].mean() == pytest.approx(-1, abs=0.02)
    assert middle.pixels[:, :, -8:].mean() == pytest.approx(1, abs=0.02)
    cuts = {fit(picture, (20, 20), crop_generator(0, sample)).corner for sample in range(50)}
    assert {top for top, _ in cuts} == {0}
    assert min(left for _, left in cuts) < 4
    assert max(left for _, left in cuts) > 16
    again = fit(picture, (20, 20), crop_generator(0, 7))
    assert torch.equal(again.pixels, fit(picture, (20, 20), crop_generator(0, 7)).pixels)


def test_a_picture_that_fits_is_not_touched() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    pixels = fit(picture, (32, 32), crop_generator(0, 1)).pixels
    assert torch.equal(((pixels + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0), torch.from_numpy(picture))
