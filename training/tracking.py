"""Progress told to trackers (TensorBoard, Weights & Biases, …) through accelerate's classes."""

import hashlib
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import UsageError
from .loop import Logged


@dataclass(frozen=True)
class Validated:
    """A validation after `step` steps: the loss on held-out samples by noise level, and the pictures of the prompts by prompt."""

    step: int
    losses: dict[str, float]
    pictures: dict[str, Path]

    def __str__(self) -> str:
        losses = " ".join(f"{name} {loss:.4f}" for name, loss in self.losses.items())
        return f"step {self.step}: validation" + (f" loss {losses}" if losses else "") + (f", {len(self.pictures)} pictures" if self.pictures else "")


Event = Logged | Validated | str


def check_trackers(names: Sequence[str]) -> None:
    """Check that trackers are known and their libraries installed.

    Raises:
        UsageError: one is not.
    """
    if not names:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    known, installed = sorted(map(str, LOGGER_TYPE_TO_CLASS)), set(map(str, get_available_trackers()))
    for name in names:
        if name not in known:
            raise UsageError(f"--track {name!r} is not known; use one of {', '.join(known)}.")
        if name not in installed:
            fix = "pip install 'tu-diffuse[track]'" if name == "tensorboard" else f"install {name}'s package"
            raise UsageError(f"--track {name} needs its library, which is not installed; {fix}, or leave it out.")


@contextmanager
def trackers(names: Sequence[str], out: Path, options: dict[str, Any]) -> Generator[Callable[[Event], None]]:
    """Open trackers at the first event that is told; notes are left out.

    A run that was resumed tells some steps again: TensorBoard drops what it had of them, and Weights & Biases goes on with the run and ignores them.

    Args:
        names: of accelerate's trackers.
        out: the run's folder; those that write files do so below it.
        options: of the run.
    """
    opened: list[Any] = []

    def tell(event: Event) -> None:
        if isinstance(event, str):
            return
        if not opened:
            opened.extend(_opened(name, out, options, event.step) for name in names)
        for tracker in opened:
            if isinstance(event, Logged):
                tracker.log(event.scalars, step=event.step)
            else:
                tracker.log({f"validation/{name}": loss for name, loss in event.losses.items()}, step=event.step)
                _tell_pictures(tracker, event)

    try:
        yield tell
    finally:
        for tracker in opened:
            tracker.finish()


def _opened(name: str, out: Path, options: dict[str, Any], first: int) -> Any:
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    extra: dict[str, Any] = {}
    if name == "tensorboard":
        extra = {"purge_step": first}
    elif name == "wandb":
        extra = {"id": hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:16], "resume": "allow", "dir": str(out), "name": out.name}
    PartialState()  # accelerate's logger asks for it
    made: Any = next(kind for key, kind in LOGGER_TYPE_TO_CLASS.items() if str(key) == name)
    tracker: Any = made(name, str(out), **extra) if made.requires_logging_directory else made("tu-diffuse", **extra)
    tracker.main_process_only = False  # only the process that writes opens one
    tracker.start()
    if name != "tensorboard":  # whose hyperparameters would be a second run in its list
        tracker.store_init_configuration({key: value if isinstance(value, int | float | str) else str(value) for key, value in options.items()})
    return tracker


def _tell_pictures(tracker: Any, event: Validated) -> None:
    for prompt, path in event.pictures.items():
        with Image.open(path) as opened:
            picture = opened.convert("RGB")
        if tracker.name == "tensorboard":
            tracker.log_images({prompt: np.asarray(picture)[None]}, step=event.step, dataformats="NHWC")
        elif tracker.name in ("wandb", "swanlab"):
            tracker.log_images({prompt: [picture]}, step=event.step)
