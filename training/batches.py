"""Which samples form a batch, and their pixels: buckets by aspect ratio, an order that depends on seed and epoch alone, pictures decoded ahead.

Nothing here depends on how many threads decode or how many processes train: the plan is made of sample numbers only.
"""

import math
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count, islice
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ..errors import UsageError
from ..pipeline.model.folder import ModelFolder
from ..shards.index import ShardIndex
from .loop import epoch_order, generator_for

Row = TypeVar("Row")
Made = TypeVar("Made")

AHEAD = 4  # batches that are read while one is trained on


@dataclass(frozen=True)
class Fitted:
    """A picture cut to its bucket.

    Attributes:
        pixels: (3, height, width) float32 in [-1, 1].
        original: its height and width before, pixels.
        corner: top and left of the cut, in pixels of the picture scaled to cover the bucket (SDXL's crop coordinates).
    """

    pixels: Tensor
    original: tuple[int, int]
    corner: tuple[int, int]


def make_buckets(side: int, multiple: int, longest: float = 2.0) -> list[tuple[int, int]]:
    """Sizes (width, height) of about side² pixels, both multiples of `multiple`, from 1:longest to longest:1; the square one first.

    Raises:
        ValueError: side is not a multiple of `multiple`.
    """
    if side % multiple:
        raise ValueError(f"side is {side}, which is not a multiple of {multiple}")
    sizes = [(side, side)]
    for width in range(multiple, side, multiple):
        height = round(side * side / width / multiple) * multiple
        if height / width <= longest:
            sizes += [(width, height), (height, width)]
    return sizes


def sizes_for(folder: ModelFolder, resolution: int | None, buckets: bool) -> tuple[tuple[int, int], ...]:
    """The buckets of a model, or its one square; `resolution` in pixels, None for the model's.

    Raises:
        UsageError: the model cannot work at that resolution.
    """
    multiple = folder.factor * 2 ** (len(folder.configs["unet"]["block_out_channels"]) - 1)
    side = folder.defaults.width if resolution is None else resolution
    if side % multiple:
        below = side - side % multiple
        near = f"{below or multiple} or {below + multiple}"
        raise UsageError(f"--resolution {side} is not a multiple of {multiple}, which this model needs; take {near}.")
    return tuple(make_buckets(side, multiple)) if buckets else ((side, side),)


def bucket_of(index: ShardIndex, number: int, sizes: Sequence[tuple[int, int]]) -> int:
    """The bucket of a picture, by its columns where they tell its size."""
    if len(sizes) == 1:
        return 0
    columns = index.samples[number].columns
    if columns.width is not None and columns.height is not None:
        return nearest_bucket(columns.width, columns.height, sizes)
    height, width = index.picture(number).shape[:2]
    return nearest_bucket(width, height, sizes)


def nearest_bucket(width: int, height: int, buckets: Sequence[tuple[int, int]]) -> int:
    """The number of the bucket whose aspect ratio is nearest in its logarithm."""
    wanted = math.log(width / height)
    return min(range(len(buckets)), key=lambda i: abs(math.log(buckets[i][0] / buckets[i][1]) - wanted))


def batch_plan(bucket_of: Sequence[int], batch_size: int, seed: int) -> Iterator[tuple[int, ...]]:
    """Sample numbers of one batch after another, without end; every batch is of one bucket.

    Each epoch visits every sample once, in an order of its own. A bucket's samples wait until they fill a batch, over the end of an epoch too: none
    is left out, and none is repeated before the others had their turn.

    Args:
        bucket_of: bucket of each sample.
        batch_size: samples a batch, of all processes together.
        seed: of the order.
    """
    waiting: dict[int, list[int]] = defaultdict(list)
    for epoch in count():
        for sample in epoch_order(len(bucket_of), seed, epoch).tolist():
            queue = waiting[bucket_of[sample]]
            queue.append(sample)
            if len(queue) == batch_size:
                yield tuple(queue)
                queue.clear()


def ahead(make: Callable[[Row], Made], batches: Iterator[Sequence[Row]], threads: int) -> Generator[list[Made], None, None]:
    """Make the rows of each batch, up to AHEAD batches ahead on `threads` threads (0: when they are asked for); order and result stay the same.

    Raises:
        Exception: what `make` raised, when its batch is asked for.
    """
    if threads == 0:
        for batch in batches:
            yield [make(row) for row in batch]
        return
    with ThreadPoolExecutor(threads, thread_name_prefix="reader") as pool:
        made: deque[list[Future[Made]]] = deque()
        try:
            while True:
                made.extend([pool.submit(make, row) for row in batch] for batch in islice(batches, AHEAD - len(made)))
                if not made:
                    return
                yield [future.result() for future in made.popleft()]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def fit(picture: NDArray[np.uint8], size: tuple[int, int], generator: torch.Generator | None = None) -> Fitted:
    """Scale a picture (height, width, 3) uint8 to cover `size` (width, height), Lanczos, and cut: at random with a generator, else the middle.

    The arithmetic is NumPy's: it runs on readers' threads, where PyTorch's would start OpenMP threads that slow the computing ones (`ExpertPool`).
    """
    height, width = picture.shape[:2]
    scale = max(size[0] / width, size[1] / height)
    scaled = (max(size[0], round(width * scale)), max(size[1], round(height * scale)))
    image = Image.fromarray(picture)
    if scaled != (width, height):
        image = image.resize(scaled, Image.Resampling.LANCZOS)
    room = (scaled[0] - size[0], scaled[1] - size[1])
    shares = (0.5, 0.5) if generator is None else tuple(torch.rand(2, generator=generator).tolist())
    left, top = (int(share * (free + 1)) if free else 0 for share, free in zip(shares, room, strict=True))
    left, top = min(left, room[0]), min(top, room[1])
    cut = np.asarray(image)[top : top + size[1], left : left + size[0]]
    pixels = cut.transpose(2, 0, 1).astype(np.float32) / np.float32(127.5) - np.float32(1)
    return Fitted(torch.from_numpy(pixels), (height, width), (top, left))


def crop_generator(seed: int, sample: int) -> torch.Generator:
    """The generator of a sample's cut: keyed by the sample, not by who reads it."""
    return generator_for(seed, (1 << 38) + sample)
