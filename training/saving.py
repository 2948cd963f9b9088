"""Checkpoints and a full disk: room is looked for before the first step, and a disk that fills up later stops the run or makes it wait."""

import errno
import re
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from ..errors import OutputError
from .posthoc import WIDTHS
from .train_config import TrainConfig

POLL_SECONDS = 5.0


def save_or_wait(write: Callable[[], object], step: int, config: TrainConfig, report: Callable[[str], None]) -> None:
    """Have written what a step leaves; on a full disk do as `config.when_full` says.

    Args:
        write: writes it, whole or not at all.
        step: steps taken.
        config: of the run.
        report: told of waiting.

    Raises:
        OutputError: it could not be written; the one before is whole.
    """
    while True:
        try:
            write()
        except (OSError, SafetensorError) as error:
            if _number(error) not in (errno.ENOSPC, errno.EDQUOT):
                raise OutputError(f"what step {step} leaves could not be written ({error}); the checkpoint before is whole.") from error
            if config.when_full == "stop":
                raise OutputError(f"the disk is full at step {step}; make room and run again: the checkpoint before is whole.") from error
            report(f"step {step}: the disk is full; waiting for room")
            time.sleep(POLL_SECONDS)
        else:
            return


def wait_for_room(
    folder: Path,
    parameters: Mapping[str, Tensor],
    averages: Mapping[str, Tensor],
    first: int,
    config: TrainConfig,
    report: Callable[[str], None],
) -> None:
    """Check before the first step that two checkpoints and the snapshots to come fit: the newest is whole before the one before it is deleted.

    Raises:
        OutputError: they do not, and `config.when_full` is "stop".
    """
    one = 3 * _bytes(parameters) + _bytes(averages)  # weights and the two moments of AdamW
    snapshots = sum(config.snapshot_due(step) for step in range(first + 1, config.steps + 1))
    needed = 2 * one + snapshots * len(WIDTHS) * _bytes(parameters) // 2
    while shutil.disk_usage(folder).free < needed:
        free = shutil.disk_usage(folder).free
        if config.when_full == "stop":
            raise OutputError(f"the disk has {free / 2**20:.0f} MiB free, the files of this run need {needed / 2**20:.0f}; make room first.")
        report(f"the disk has {free / 2**20:.0f} MiB free, {needed / 2**20:.0f} are needed; waiting for room")
        time.sleep(POLL_SECONDS)


def _number(error: OSError | SafetensorError) -> int | None:
    """The system's number of an error; safetensors has it in its text."""
    told = re.search(r"\(os error (\d+)\)", str(error))
    return error.errno if isinstance(error, OSError) else int(told[1]) if told else None


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
