"""What a run would do, said before it is done."""

import json
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from ..pipeline.model.place import Place
from ..pipeline.request import rounds
from .drafts import advance, begin, finish, open_round
from .items import Item
from .plan import Plan, Planned
from .run import SUMMARY_FILE, missing_batches, missing_items, there
from .studio import Studio, model_bytes

_STEPS = 4  # of the calibration; the quickest counts, since an expert's first one loads it


@dataclass(frozen=True)
class Expected:
    """What a run would do.

    Attributes:
        pictures: asked for.
        there: of them done already.
        missing: to be drawn, by this part.
        batches: in which they are computed.
        loads: of model parts.
        megabytes: of memory for the model and the largest batch's drafts.
        seconds: for what is missing.
        source: where the time comes from.
        names: of the files to be drawn.
    """

    pictures: int
    there: int
    missing: int
    batches: int
    loads: int
    megabytes: float
    seconds: float
    source: str
    names: tuple[str, ...]


def expect(studio: Studio, plan: Plan, out: Path, part: tuple[int, int], window_bytes: int, places: Sequence[Place]) -> Expected:
    """Look at a plan, and measure: a folder whose last run drew pictures says how long one takes, else a batch is drawn in a few steps.

    Args:
        studio: the model, where it is slowest: each worker draws as many batches, so the slowest says when all are done.
        plan: what is asked for; nothing is written.
        out: the folder.
        part: see `run.draw_missing`.
        window_bytes: see `engine.denoise`.
        places: of all workers that share the batches; those that share a place share its speed, too.
    """
    done = there(plan, out)
    missing = missing_items(plan, done)
    batches = missing_batches(plan, missing, part)
    mine = [planned for batch in batches for planned in batch if planned.item.key in missing]
    seconds, source = _past(out, len(mine)) or _calibrated(studio, batches, places.count(studio.place) / len(places))
    asked = [planned.item.request for planned in mine]
    networks = {request.control.sha256 for request in asked if request.control is not None}
    parts = len(studio.folder.experts) + 2 + len(networks)
    windows = 1 if studio.roomy else max(1, _draft_bytes(studio, batches) // window_bytes)
    whole = model_bytes(studio.folder, studio.place, asked)
    return Expected(
        pictures=len(plan.wanted),
        there=len(done),
        missing=len(mine),
        batches=len(batches),
        loads=parts * max(windows, min(len(places), len(batches))) if batches else 0,
        megabytes=round((whole if studio.roomy else min(whole, window_bytes) + whole // parts) / 1e6, 1),
        seconds=round(seconds, 3),
        source=source,
        names=tuple(planned.name for planned in mine),
    )


def _past(out: Path, pictures: int) -> tuple[float, str] | None:
    """From the folder's last run."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        last = json.loads((out / SUMMARY_FILE).read_text())
        if last["drawn"]:
            return pictures * last["seconds"] / last["drawn"], "the folder's last run"
    return None


def _calibrated(studio: Studio, batches: Sequence[Sequence[Planned]], share: float) -> tuple[float, str]:
    """From a run of the first batch in `_STEPS` steps and its decoding, by pixels and steps; loading is left out.

    `share` of the batches are computed where the studio is.
    """
    if not batches:
        return 0.0, "nothing to do"
    items = [_short(one) for planned in batches[0] for one in planned.item.candidates]
    draft = open_round(studio, begin(studio, items))
    if studio.roomy:
        studio.codec()
    spans: list[float] = []
    while draft.next_expert(studio) is not None:
        marks = [time.perf_counter()]
        draft = advance(studio, draft, lambda _, marks=marks: marks.append(time.perf_counter()))
        spans += [after - before for before, after in pairwise(marks)]
    started = time.perf_counter()
    decoded = len(list(finish(studio, draft)))
    decode = (time.perf_counter() - started) / decoded
    step = min(spans, default=0.0) / max(1, len(draft.items))
    pixels = items[0].request.width * items[0].request.height
    work = ((p.item.best_of, part.width * part.height / pixels, part) for batch in batches for p in batch for part in rounds(p.item.request))
    return sum(n * area * (step * (part.steps - part.first) + decode) for n, area, part in work) * share, f"{_STEPS} steps of the first batch"


def _short(item: Item) -> Item:
    edit = None if item.request.edit is None else replace(item.request.edit, strength=1.0)
    control = None if item.request.control is None else replace(item.request.control, start=0.0, end=1.0)
    schedule = "linspace" if item.request.sampler != "lcm" else "lcm"
    return replace(item, request=replace(item.request, steps=_STEPS, sigmas=None, schedule=schedule, edit=edit, upscale=None, control=control))


def _draft_bytes(studio: Studio, batches: Sequence[Sequence[Planned]]) -> int:
    """Bytes of all drafts, from the first batch's."""
    return 0 if not batches else begin(studio, [one for planned in batches[0] for one in planned.item.candidates]).bytes * len(batches)
