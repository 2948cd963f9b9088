"""The order of work: batch by batch where the whole model fits in memory, else many batches expert by expert.

    roomy       for each batch: encode, every expert, decode
    not roomy   for each window: encode all its batches; for each expert, from high noise to low: all batches; decode all

Either way a batch is computed in the same company, so its pixels are the same.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from .drafts import Draft, Drawn, Lost, Stepped, advance, begin, finish
from .items import Item
from .parking import park, taken_up
from .studio import Studio

Batch = Sequence[Item]
Tell = Callable[[Stepped], None]


def render(studio: Studio, batches: Sequence[Batch], window_bytes: int, folder: Path, tell: Tell) -> Iterator[Drawn | Lost]:
    """Draw batches.

    Args:
        studio: the model; whether it is roomy decides the order.
        batches: each is computed together.
        window_bytes: most bytes that the drafts of a window take, where the model does not fit in memory.
        folder: where drafts of a window are parked; `parking.forget` them when their pictures are safe.
        tell: told after each step; may raise to stop.

    Yields:
        Each item's picture, or why there is none.

    Raises:
        TuDiffuseError: a part of the model cannot be loaded.
    """
    if studio.roomy:
        for batch in batches:
            draft = begin(studio, batch)
            while draft.next_expert(studio.table(draft.schedule, draft.request.loras)) is not None:
                draft = advance(studio, draft, tell)
            yield from finish(studio, draft)
        return
    waiting = list(batches)
    while waiting:
        yield from _window(studio, _open_window(studio, waiting, window_bytes, folder), folder, tell)


def _open_window(studio: Studio, waiting: list[Batch], window_bytes: int, folder: Path) -> list[tuple[Batch, Draft]]:
    """Take batches from `waiting` and encode them, until the window is full."""
    window: list[tuple[Batch, Draft]] = []
    size = 0
    while waiting and (not window or size < window_bytes):
        batch = waiting.pop(0)
        draft = taken_up(begin(studio, batch), batch, folder)
        size += draft.bytes
        window.append((batch, draft))
    return window


def _window(studio: Studio, window: list[tuple[Batch, Draft]], folder: Path, tell: Tell) -> Iterator[Drawn | Lost]:
    """Expert by expert through the window; the next expert is fetched while the last batch is still with the one before."""
    names = [entry.name for entry in reversed(studio.folder.experts)]
    for name, below in zip(names, [*names[1:], None], strict=True):
        mine = [i for i, (_, draft) in enumerate(window) if draft.next_expert(studio.table(draft.schedule, draft.request.loras)) == name]
        for i in mine:
            if i == mine[-1] and below is not None:
                studio.experts().get(name)  # it must be there, or fetching the next one would cost its place
                studio.experts().prefetch(below)
            batch, draft = window[i]
            draft = advance(studio, draft, tell)
            park(draft, batch, folder)
            window[i] = (batch, draft)
    for _, draft in window:
        yield from finish(studio, draft)
