"""The order of work: batch by batch where the whole model fits in memory, else many batches expert by expert.

    roomy       for each batch: encode, every expert, decode
    not roomy   for each window: encode all its batches; for each expert, from high noise to low: all batches; decode all

A picture that is enlarged while it is drawn goes through the experts twice.

Either way a batch is computed in the same company, so its pixels are the same.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from .drafts import Draft, Drawn, Lost, Settle, Stepped, advance, alone, begin, finish, open_round
from .items import Item
from .parking import park, taken_up
from .studio import Studio

Batch = Sequence[Item]
Tell = Callable[[Stepped], None]


def render(studio: Studio, batches: Sequence[Batch], window_bytes: int, folder: Path | None, tell: Tell) -> Iterator[Drawn | Lost]:
    """Draw batches: each item's picture, or why there is none. See `denoise`."""
    for draft in denoise(studio, batches, window_bytes, folder, tell):
        yield from finish(studio, draft)


def denoise(studio: Studio, batches: Sequence[Batch], window_bytes: int, folder: Path | None, tell: Tell, settle: Settle = alone) -> Iterator[Draft]:
    """Draw batches up to their decoding.

    Args:
        studio: the model; whether it is roomy decides the order.
        batches: each is computed together.
        window_bytes: most bytes that the drafts of a window take, where the model does not fit in memory.
        folder: where drafts of a window are parked; `parking.forget` them when their pictures are safe. None parks none.
        tell: told after each step; may raise to stop.
        settle: see `drafts.Settle`; asked when memory runs out, before what took it is tried once more.

    Yields:
        Each batch, to be given to `drafts.finish` before the next is asked for. Where the studio is roomy, decoding may go on beside the next one.

    Raises:
        TuDiffuseError: a part of the model cannot be loaded.
    """
    if studio.roomy:
        for batch in batches:
            draft = begin(studio, batch, settle)
            for _ in draft.parts:
                draft = open_round(studio, draft, settle)
                while draft.next_expert(studio) is not None:
                    draft = advance(studio, draft, tell, settle)
            yield draft
        return
    waiting = list(batches)
    while waiting:
        yield from _window(studio, _open_window(studio, waiting, window_bytes, folder), folder, tell)


def _open_window(studio: Studio, waiting: list[Batch], window_bytes: int, folder: Path | None) -> list[tuple[Batch, Draft]]:
    """Take batches from `waiting` and encode their prompts, until the window is full; then the pictures that they begin with."""
    window: list[tuple[Batch, Draft]] = []
    size = 0
    while waiting and (not window or size < window_bytes):
        batch = waiting.pop(0)
        draft = begin(studio, batch)
        size += draft.bytes
        window.append((batch, draft))
    opened = [(batch, open_round(studio, draft)) for batch, draft in window]
    return opened if folder is None else [(batch, taken_up(studio.folder, draft, batch, folder)) for batch, draft in opened]


def _window(studio: Studio, window: list[tuple[Batch, Draft]], folder: Path | None, tell: Tell) -> Iterator[Draft]:
    """Round by round, and expert by expert through the window."""
    for number in range(max(len(draft.parts) for _, draft in window)):
        for i, (batch, draft) in enumerate(window):
            if draft.round < number < len(draft.parts):
                window[i] = batch, open_round(studio, draft)
        _through_experts(studio, window, folder, tell)
    for _, draft in window:
        yield draft


def _through_experts(studio: Studio, window: list[tuple[Batch, Draft]], folder: Path | None, tell: Tell) -> None:
    """All that is left of the open rounds; the next expert is fetched while the last batch is still with the one before."""
    names = [entry.name for entry in reversed(studio.folder.experts)]
    for name, below in zip(names, [*names[1:], None], strict=True):
        mine = [i for i, (_, draft) in enumerate(window) if draft.next_expert(studio) == name]
        for i in mine:
            if i == mine[-1] and below is not None:
                studio.experts().get(name)  # it must be there, or fetching the next one would cost its place
                studio.experts().prefetch(below)
            batch, draft = window[i]
            draft = advance(studio, draft, tell)
            if folder is not None:
                park(draft, batch, folder)
            window[i] = (batch, draft)
