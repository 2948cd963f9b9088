"""One worker process a device, each with its share of the batches; the folder, its plan and its journal are the same as of one process.

The share goes by a batch's place in the plan, so that the same command again draws it on the same device.
"""

import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Thread
from types import FrameType
from typing import NoReturn

from ..allocator import keep_freed_memory
from ..errors import RenderError, TuDiffuseError
from ..pipeline.model.folder import open_folder
from ..pipeline.model.place import Place
from .drafts import Stepped
from .journal import Entry
from .plan import Plan
from .run import draw_missing, settle
from .scores import ScoreModel, load_scorer
from .studio import Studio

TRIES = 2  # of a worker that dies


@dataclass(frozen=True)
class Job:
    """What a worker does.

    Attributes:
        model: folder of the model.
        place: where it computes.
        roomy: see `Studio`.
        window_bytes: see `engine.denoise`.
        plan: its share.
        out: folder of the pictures.
        clip: what scores candidates, where items have some.
        files: see `Studio`.
        variant: of the model's weights, see `ModelFolder`.
    """

    model: Path
    place: Place
    roomy: bool
    window_bytes: int
    plan: Plan
    out: Path
    clip: ScoreModel | None
    files: Mapping[str, Path] = field(default_factory=dict[str, Path])
    variant: str | None = None


def shares(plan: Plan, part: tuple[int, int], workers: int) -> list[Plan]:
    """The batches of a part, dealt out in turn."""
    number, parts = part
    return [replace(plan, batches=plan.batches[number - 1 + parts * i :: parts * workers]) for i in range(workers)]


def draw_in_workers(jobs: Sequence[Job], loads: Counter[str], tell: Callable[[Stepped], None], died: Callable[[str], None]) -> Iterator[Entry]:
    """Draw what is missing of each job, all at once. A worker that dies is started once more, and goes on where it stopped.

    Args:
        jobs: one a worker, with shares of one plan; the caller holds the folder.
        loads: part of the model -> how often it was loaded; the workers' are added.
        tell: told after each step; may raise to stop, which loses no finished picture.
        died: told of each worker that died, where and how.

    Yields:
        The entry of each item that was drawn or lost, once it is in the journal.

    Raises:
        RenderError: a worker died twice; raised when the others are done.
        TuDiffuseError: as `run.draw_missing`, from any worker.
    """
    context = get_context("spawn")
    running: dict[Connection, tuple[Job, int, BaseProcess]] = {}
    lost: list[str] = []

    def start(job: Job, tries: int) -> None:
        mine, its = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(job, its))
        process.start()
        its.close()
        running[mine] = (job, tries, process)

    try:
        for job in jobs:
            if job.plan.wanted:
                start(job, 1)
        while running:
            for connection in wait(list(running)):
                assert isinstance(connection, Connection)
                job, tries, process = running[connection]
                try:
                    message = connection.recv()
                except (EOFError, OSError):
                    del running[connection]
                    process.join()
                    who = f"{job.place.device} (exit code {process.exitcode})"
                    died(who)
                    if tries < TRIES:
                        start(job, tries + 1)
                    else:
                        lost.append(who)
                    continue
                if isinstance(message, Stepped):
                    tell(message)
                elif isinstance(message, Entry):
                    yield message
                elif isinstance(message, TuDiffuseError):
                    raise message
                else:
                    loads.update(message)
                    del running[connection]
                    process.join()
    finally:
        for _, _, process in running.values():
            process.terminate()
        for _, _, process in running.values():
            process.join()
    if lost:
        raise RenderError(f"the worker on {', '.join(lost)} died {TRIES} times; run the same command again to draw what it left.")


def _work(job: Job, parent: Connection) -> None:
    """The worker: sends steps, entries, and at the end its loads or an error. Ends with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted too, and terminates its workers
    signal.signal(signal.SIGTERM, _stop)  # by way of finally: pictures that wait for the disk are written
    Thread(target=_end_with_parent, daemon=True).start()
    keep_freed_memory()
    try:
        folder = open_folder(job.model, variant=job.variant)
        studio = Studio(folder, job.place, roomy=job.roomy, files=job.files)
        scorer = None if job.clip is None else load_scorer(job.clip, job.place.device)
        done = settle(job.plan, job.out)
        draw_missing(studio, job.plan, done, job.out, part=(1, 1), window_bytes=job.window_bytes, tell=parent.send, kept=parent.send, scorer=scorer)
        parent.send(studio.loads)
    except TuDiffuseError as error:
        parent.send(error)


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    del frame
    sys.exit(128 + number)


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
