"""Training checkpoints: all tensors safetensors, all else JSON; whole or not there.

A checkpoint is staged in a temporary folder, fsynced, its manifest of hashes written last, and renamed once. The newest whole one is loaded; a
torn one is passed over.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import DataError
from ..pipeline.staging import sync

_PARTS = ("model", "average", "power_averages", "optimizer")
_STATE = ("step", "numbers", "scaler", "config", "tally")


@dataclass(frozen=True)
class Checkpoint:
    """The state after `step` steps.

    Trained weights, their moving average, those of `posthoc.power_averages` (both empty where none is kept), the optimizer's tensors and other
    values by parameter name, the state of the loss scale (empty without one), the run's config, and the sums and counts that wait for the next line
    of the log.
    """

    step: int
    model: dict[str, Tensor]
    average: dict[str, Tensor]
    power_averages: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    numbers: Mapping[str, float]
    scaler: dict[str, Any]
    config: Mapping[str, Any]
    tally: Mapping[str, tuple[float, float]]


def save(folder: Path, checkpoint: Checkpoint, keep: int = 2) -> Path:
    """Write `checkpoint` below `folder` and delete all but it and the `keep` - 1 before it; returns its folder.

    Checkpoints of later steps are deleted too: they are torn ones that `load_newest` passed over.
    """
    final = folder / f"checkpoint-{checkpoint.step:08d}"
    staged = folder / f".staged-{checkpoint.step:08d}"
    for left in folder.glob(".staged-*"):
        shutil.rmtree(left)
    staged.mkdir(parents=True)
    for part in _PARTS:
        tensors: dict[str, Tensor] = getattr(checkpoint, part)
        save_file(_unshared(tensors), staged / f"{part}.safetensors")
    (staged / "state.json").write_text(json.dumps({name: getattr(checkpoint, name) for name in _STATE}))
    hashes = {file.name: _sha256(file) for file in sorted(staged.iterdir())}
    (staged / "manifest.json").write_text(json.dumps(hashes))
    for file in staged.iterdir():
        sync(file)
    sync(staged)
    shutil.rmtree(final, ignore_errors=True)
    staged.rename(final)
    sync(folder)
    before = sorted(path for path in folder.glob("checkpoint-*") if path.name < final.name)
    later = [path for path in folder.glob("checkpoint-*") if path.name > final.name]
    for gone in [*before[: max(0, len(before) + 1 - keep)], *later]:
        shutil.rmtree(gone)
    return final


def load_newest(folder: Path, report: Callable[[str], None] | None = None) -> Checkpoint | None:
    """The newest checkpoint below `folder` whose files match their manifest, or None without any; `report` is told of each torn one passed over.

    Raises:
        DataError: there are checkpoints, and all are torn.
    """
    candidates = sorted(folder.glob("checkpoint-*"), reverse=True)
    for candidate in candidates:
        if _is_whole(candidate):
            with suppress(OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
                return _read(candidate)
        if report is not None:
            report(f"{candidate.name} is damaged and passed over for the one before it")
    if candidates:
        raise DataError(f"none of the {len(candidates)} checkpoints in {folder.name!r} is whole; give the run another folder to begin anew.")
    return None


def _read(folder: Path) -> Checkpoint:
    state = json.loads((folder / "state.json").read_text())
    files = {part: folder / f"{part}.safetensors" for part in _PARTS}
    tensors = {part: load_file(file) if file.exists() else {} for part, file in files.items()}
    tally = {name: (total, count) for name, (total, count) in state.get("tally", {}).items()}
    told = {"step": state["step"], "numbers": state.get("numbers", {}), "scaler": state.get("scaler", {}), "config": state["config"]}
    return Checkpoint(**tensors, **told, tally=tally)


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors of which no two share memory, as safetensors wants them: tied weights are written twice."""
    seen: set[int] = set()
    separate: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        separate[name] = tensor.detach().clone() if tensor.data_ptr() in seen else tensor.detach().contiguous()
        seen.add(tensor.data_ptr())
    return separate


def _is_whole(folder: Path) -> bool:
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        return all(_sha256(folder / name) == digest for name, digest in manifest.items())
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
