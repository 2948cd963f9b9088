"""Checkpoints and a full disk: room is looked for before the first step, and a disk that fills up later stops the run or makes it wait."""

import errno
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from ..errors import OutputError
from .checkpoints import Checkpoint, save
from .train_config import TrainConfig

POLL_SECONDS = 5.0


def save_or_wait(folder: Path, checkpoint: Checkpoint, config: TrainConfig, report: Callable[[str], None]) -> None:
    """Save a checkpoint; on a full disk do as `config.when_full` says.

    Raises:
        OutputError: it could not be written; the one before is whole.
    """
    while True:
        try:
            save(folder, checkpoint)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise OutputError(
                    f"the checkpoint of step {checkpoint.step} could not be written ({error.strerror}); the one before is whole."
                ) from error
            if config.when_full == "stop":
                raise OutputError(f"the disk is full at step {checkpoint.step}; make room and run again: the checkpoint before is whole.") from error
            report(f"step {checkpoint.step}: the disk is full; waiting for room")
            time.sleep(POLL_SECONDS)
        else:
            return


def wait_for_room(
    folder: Path, parameters: Mapping[str, Tensor], average: Mapping[str, Tensor], config: TrainConfig, report: Callable[[str], None]
) -> None:
    """Check before the first step that two checkpoints fit: the newest is whole before the one before it is deleted.

    Raises:
        OutputError: they do not, and `config.when_full` is "stop".
    """
    one = 3 * _bytes(parameters) + _bytes(average)  # weights and the two moments of AdamW
    while shutil.disk_usage(folder).free < 2 * one:
        free = shutil.disk_usage(folder).free
        if config.when_full == "stop":
            raise OutputError(f"the disk has {free / 2**20:.0f} MiB free, two checkpoints of this run need {2 * one / 2**20:.0f}; make room first.")
        report(f"the disk has {free / 2**20:.0f} MiB free, {2 * one / 2**20:.0f} are needed; waiting for room")
        time.sleep(POLL_SECONDS)


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
