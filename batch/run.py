"""A folder of pictures: what is asked for, what is there already, and the rest drawn. Run it again to go on.

plan.json       which items form which batch, under which names (plan.py)
journal.jsonl   what became of each item (journal.py)
summary.json    counts of the last run

Beside them lie contact-sheet.png (sheet.py) and gallery.html (gallery.py).
"""

import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event
from typing import Any

from ..errors import DataError
from ..pipeline.metadata import encode_picture, read_metadata
from ..pipeline.output import candidates
from ..pipeline.previews import to_image
from .drafts import Drawn, Lost, Stepped, finish
from .engine import Batch, denoise
from .files import publish
from .files import replace as write_whole
from .items import Item
from .journal import Entry, append, read_journal
from .parking import forget, forget_all_but
from .plan import Plan, Planned
from .scores import Scorer, keep_best
from .studio import Studio

SUMMARY_FILE = "summary.json"


@dataclass(frozen=True)
class Summary:
    """What a run came to: done + failed + blocked + skipped = asked.

    Attributes:
        asked: pictures that the file asks for; a bad line counts as one.
        done: pictures that are there, from this run or an earlier one.
        failed: pictures that could not be made.
        blocked: lines that could not be read.
        skipped: pictures that were not tried: of other parts, or after an interruption.
        drawn: pictures that this run made.
        seconds: that it took.
        loads: part of the model -> how often it was loaded.
        died: workers that died and were replaced.
    """

    asked: int
    done: int
    failed: int
    blocked: int
    skipped: int
    drawn: int
    seconds: float
    loads: Mapping[str, int]
    died: int


@dataclass(frozen=True)
class Encoded:
    """A finished picture as the bytes of its file, which can travel between machines."""

    item: Item
    data: bytes
    settings: dict[str, Any]


def encoded(drawn: Drawn) -> Encoded:
    """A picture as its file's bytes."""
    return Encoded(drawn.item, encode_picture(to_image(drawn.pixels), drawn.settings, drawn.item.picture_format), drawn.settings)


def settle(plan: Plan, out: Path) -> dict[str, Entry]:
    """What is done of a plan, by key: those with a file and a line, and those with a file whose line was lost to a kill, which is added.

    Raises:
        OutputError: the journal cannot be written.
    """
    done = there(plan, out)
    for planned in plan.wanted:
        if planned.item.key not in done and (entry := _adopted(planned, out)) is not None:
            append(out, entry)
            done[planned.item.key] = entry
    return done


def there(plan: Plan, out: Path) -> dict[str, Entry]:
    """The items of a plan that have a file and a line, by key."""
    written = read_journal(out)
    entries = [written[planned.item.key] for planned in plan.wanted if planned.item.key in written]
    return {entry.key: entry for entry in entries if entry.file is not None and (out / entry.file).is_file()}


def _adopted(planned: Planned, out: Path) -> Entry | None:
    """The entry of a file that carries the item's key."""
    for name in candidates(planned.name):
        if not (out / name).is_file():
            return None
        with suppress(DataError):
            settings = read_metadata(out / name)
            if settings.get("item") == planned.item.key:
                return _done(planned, name, settings)
    return None


def draw_missing(
    studio: Studio,
    plan: Plan,
    done: Mapping[str, Entry],
    out: Path,
    *,
    part: tuple[int, int],
    window_bytes: int,
    tell: Callable[[Stepped], None],
    kept: Callable[[Entry], None],
    scorer: Scorer | None = None,
) -> None:
    """Draw what is not done, each item in its planned batch.

    The pictures of a batch are written while it is decoded and during the first step of the next, so no more than that is ever lost to a kill. Where
    the studio decodes beside, they are decoded meanwhile too.

    Args:
        studio: the model.
        plan: what is asked for.
        done: from `settle`.
        out: the folder.
        part: (number, of how many) of the batches.
        window_bytes: see `engine.denoise`.
        tell: told after each step; may raise to stop, which loses no finished picture.
        kept: told, in the thread that writes, of each item that was drawn or lost, once it is in the journal; never at the same time as `tell`.
        scorer: of candidates, where items have some.

    Raises:
        OutputError: a picture or the journal cannot be written.
        TuDiffuseError: a part of the model cannot be loaded.
    """
    missing = missing_items(plan, done)
    batches = [drawn_together(batch) for batch in missing_batches(plan, missing, part)]
    decoding: deque[Future[None]] = deque()
    writing: deque[Future[None]] = deque()
    begun: list[Batch] = []
    drawing_pauses = Event()

    def written() -> bool:
        """Wait until the batches that were begun are written; whether any was still being decoded."""
        drawing_pauses.set()
        busy = bool(decoding)
        while decoding:
            decoding.popleft().result()
        drawing_pauses.clear()
        while writing:
            writing.popleft().result()
        while begun:
            forget(begun.pop(), out)
        return busy

    def stepped(event: Stepped) -> None:
        written()
        tell(event)

    def write(results: Iterable[Drawn | Lost]) -> None:
        for result in results if scorer is None else keep_best(results, scorer):
            if result.item.key in missing:
                writing.append(writer.submit(_encode_and_keep, missing[result.item.key], result, out, kept))

    with ThreadPoolExecutor(1, thread_name_prefix="writer") as writer, ThreadPoolExecutor(1, thread_name_prefix="decoder") as decoder:
        try:
            for batch, draft in zip(batches, denoise(studio, batches, window_bytes, out, stepped, written), strict=True):
                written()
                if studio.decodes_beside:
                    decoding.append(decoder.submit(write, finish(studio, draft, drawing_pauses.wait)))
                else:
                    write(finish(studio, draft))
                begun.append(batch)
            written()
        finally:
            drawing_pauses.set()  # the decoder may wait for it


def forget_finished(plan: Plan, done: Mapping[str, Entry], out: Path) -> None:
    """Remove parked drafts of batches that are done, or that nobody asks for any more."""
    forget_all_but((drawn_together(batch) for batch in missing_batches(plan, missing_items(plan, done), (1, 1))), out)


def drawn_together(batch: Sequence[Planned]) -> list[Item]:
    """The items of a batch, each with its candidates: what is computed together."""
    return [one for planned in batch for one in planned.item.candidates]


def missing_items(plan: Plan, done: Mapping[str, Entry]) -> dict[str, Planned]:
    """The items that are asked for and not done, by key."""
    return {planned.item.key: planned for planned in plan.wanted if planned.item.key not in done}


def missing_batches(plan: Plan, missing: Mapping[str, Planned], part: tuple[int, int]) -> list[tuple[Planned, ...]]:
    """The batches of a part that hold a missing item."""
    number, parts = part
    return [batch for i, batch in enumerate(plan.batches) if i % parts == number - 1 and any(p.item.key in missing for p in batch)]


def _encode_and_keep(planned: Planned, result: Drawn | Lost, out: Path, kept: Callable[[Entry], None]) -> None:
    keep(planned, result if isinstance(result, Lost) else encoded(result), out, kept)


def keep(planned: Planned, result: Encoded | Lost, out: Path, kept: Callable[[Entry], None]) -> None:
    """Write a picture and its line, and tell of it.

    Raises:
        OutputError: one of them cannot be written.
    """
    if isinstance(result, Lost):
        entry = Entry(planned.item.key, planned.item.line, "failed", error=result.error)
    else:
        path = publish(result.data, out, planned.name)
        entry = _done(planned, path.relative_to(out).as_posix(), result.settings)
    append(out, entry)
    kept(entry)


def _done(planned: Planned, name: str, settings: Mapping[str, Any]) -> Entry:
    scores = settings["best_of"]["scores"] if "best_of" in settings else {}
    return Entry(
        planned.item.key,
        planned.item.line,
        "done",
        file=name,
        truncated=dict(settings["truncated"]),
        fallbacks=tuple(settings["fallbacks"]),
        score=scores.get(str(settings["seed"])),
        scores=scores,
    )


def summarise(
    plan: Plan,
    out: Path,
    blocked: int,
    before: Mapping[str, Entry],
    *,
    part: tuple[int, int],
    started: float,
    loads: Mapping[str, int],
    died: int,
) -> Summary:
    """Count what is there now and write `summary.json`.

    Args:
        plan: what is asked for.
        out: the folder.
        blocked: lines that could not be read.
        before: from `settle`; what else is done now of the part was drawn by this run.
        part: see `draw_missing`.
        started: `time.monotonic()` when it began.
        loads, died: see `Summary`.

    Raises:
        OutputError: it cannot be written.
    """
    written = read_journal(out)
    states = [(planned.item.key, _state(written.get(planned.item.key), out)) for planned in plan.wanted]
    counts = {state: sum(one == state for _, one in states) for state in ("done", "failed", "skipped")}
    missing = missing_items(plan, before)
    mine = {planned.item.key for batch in missing_batches(plan, missing, part) for planned in batch if planned.item.key in missing}
    drawn = sum(state == "done" and key in mine for key, state in states)
    seconds = round(time.monotonic() - started, 3)
    summary = Summary(asked=len(states) + blocked, blocked=blocked, drawn=drawn, seconds=seconds, loads=dict(loads), died=died, **counts)
    write_whole((json.dumps(asdict(summary), indent=1) + "\n").encode(), out / SUMMARY_FILE)
    return summary


def _state(entry: Entry | None, out: Path) -> str:
    if entry is None:
        return "skipped"
    return entry.status if entry.file is None or (out / entry.file).is_file() else "skipped"
