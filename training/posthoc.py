"""Post-hoc EMA: two averages are kept while training, and a model of any other averaging length is made of their snapshots afterwards.

After Karras et al. 2023 (EDM2, arXiv 2312.02696), section 3 and appendix C. The average of relative width σ_rel weighs the weights after step τ by
τ^γ, so that its length grows with the run; σ_rel is the standard deviation of that profile in units of the run's length.
"""

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import DataError, UsageError
from ..pipeline.staging import write_file
from .sharding import part

MAX_WIDTH = 1 / math.sqrt(12)  # of γ = 0, the plain mean of all steps
_METADATA = "tu-diffuse"
_NAMES = "[0-9]" * 8 + "-*.safetensors"


@cache
def exponent(width: float) -> float:
    """The γ of a relative width, above -1: the largest root of σ_rel² (γ + 2)² (γ + 3) = γ + 1 (section 3.1).

    Raises:
        UsageError: the width is not above 0 and below MAX_WIDTH.
    """
    if not 0 < width < MAX_WIDTH:
        raise UsageError(f"--sigma-rel {width:g} is out of range; more than 0 and less than {MAX_WIDTH:.4f} was wanted, usually 0.03 to 0.2.")
    inverse = width**-2
    return max(root.real for root in np.roots([1, 7, 16 - inverse, 12 - inverse]))


WIDTHS = (0.05, 0.10)
"""The relative widths that are kept, those of the paper."""
_EXPONENTS = {f"{width:.2f}": exponent(width) for width in WIDTHS}  # by the width's name in files and keys


@dataclass(frozen=True)
class Profile:
    """How much of each step is in an average: p(τ) = (γ + 1) τ^γ / step^(γ + 1) for 0 ≤ τ ≤ step, γ = `exponent(width)`."""

    step: int
    width: float


@dataclass(frozen=True)
class Snapshot:
    """A stored average: its file, its profile, and the description of its run as in `Checkpoint.config`."""

    path: Path
    profile: Profile
    run: Mapping[str, Any]


def power_averages(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The averages of all `WIDTHS` before the first step, each tensor under its width, a slash and its name."""
    return {f"{width}/{name}": tensor.detach().clone() for width in _EXPONENTS for name, tensor in parameters.items()}


def update_power_averages(averages: Mapping[str, Tensor], current: Mapping[str, Tensor], step: int) -> None:
    """Take the weights after 1-based `step` into the averages, in place: decay β = (1 − 1/step)^(γ + 1) (section 3.1)."""
    with torch.no_grad():
        for key, average in averages.items():
            width, _, name = key.partition("/")
            part(average).lerp_(part(current[name]), 1 - (1 - 1 / step) ** (_EXPONENTS[width] + 1))


def write_snapshots(folder: Path, averages: Mapping[str, Tensor], start: Mapping[str, Tensor], step: int, run: Mapping[str, Any]) -> None:
    """Write a file for each width, whole or not there: how far its average is from `start`, as float16.

    A change is smaller than its weight, so that its rounding error (a 4096th of the change, or 3e-8) is too; the average itself as float16 would lose
    changes below a 4096th of the weight.

    Args:
        folder: of the snapshots.
        averages: as `power_averages` names them.
        start: the weights that the run began from.
        step: steps taken.
        run: its description, JSON-compatible.
    """
    folder.mkdir(exist_ok=True)
    for width in _EXPONENTS:
        moved = {name: (averages[f"{width}/{name}"].to(tensor.device) - tensor).half() for name, tensor in start.items()}
        told = {_METADATA: json.dumps({"step": step, "width": float(width), "run": run}, sort_keys=True)}
        write_file(folder / f"{step:08d}-{width}.safetensors", partial(save_file, moved, metadata=told))


def drop_snapshots_after(folder: Path, step: int) -> None:
    """Delete the snapshots that a resumed run will write again, and what a killed one left half written."""
    for path in (*folder.glob(_NAMES), *folder.glob(f".{_NAMES}.partial")):
        if path.name.startswith(".") or int(path.name.partition("-")[0]) > step:
            path.unlink()


def find_snapshots(folder: Path) -> list[Snapshot]:
    """All snapshots of a folder, by step and width.

    Raises:
        DataError: one of them is damaged.
    """
    return [_snapshot(path) for path in sorted(folder.glob(_NAMES))]


def _snapshot(path: Path) -> Snapshot:
    try:
        with safe_open(path, framework="pt") as file:
            told = json.loads(file.metadata()[_METADATA])
        return Snapshot(path, Profile(told["step"], told["width"]), told["run"])
    except (OSError, SafetensorError, TypeError, KeyError, ValueError, RecursionError) as error:
        raise DataError(f"the snapshot {path.name} is damaged ({error}); remove it, the others are enough if there are many.") from error


def product(one: Profile, other: Profile) -> float:
    """The inner product ∫ p q dτ of two profiles (appendix C)."""
    first, last = sorted((one, other), key=lambda profile: profile.step)
    low, high = exponent(first.width), exponent(last.width)
    return (low + 1) * (high + 1) / (low + high + 1) * (first.step / last.step) ** high / last.step


def shares_of(stored: Sequence[Profile], wanted: Profile) -> tuple[list[float], float]:
    """How much of each stored average makes the wanted one: least squares over the profiles (appendix C), with shares that sum to 1.

    The sum is a condition of ours. What the snapshots cannot reproduce is then an error in the run's changes; without it the weights themselves would
    be scaled, which a short fine-tuning, whose changes are small beside its weights, does not survive.

    Args:
        stored: profiles that differ from each other.
        wanted: the profile to make.

    Returns:
        The shares, and the distance of the profile that they make from the wanted one, relative to its norm.
    """
    norms = np.array([math.sqrt(product(profile, profile)) for profile in stored])
    size = math.sqrt(product(wanted, wanted))
    among = np.array([[product(one, other) for other in stored] for one in stored]) / np.outer(norms, norms)
    with_wanted = np.array([product(profile, wanted) for profile in stored]) / norms / size
    ones = size / norms
    bordered = np.block([[among, ones[:, None]], [ones[None], np.zeros((1, 1))]])  # the condition by a Lagrange multiplier
    scaled = np.linalg.lstsq(bordered, np.append(with_wanted, 1.0), rcond=None)[0][:-1]
    squared = float(scaled @ among @ scaled - 2 * scaled @ with_wanted + 1)
    return [float(share) for share in scaled * size / norms], math.sqrt(max(0.0, squared))


def reconstruct(snapshots: Sequence[Snapshot], shares: Sequence[float], start: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights that the run began from plus the shares of what each snapshot moved; float64 inside, float32 out.

    Raises:
        DataError: a snapshot is damaged, or not of these weights.
    """
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(snapshot.path, framework="pt")) for snapshot in snapshots]
        made: dict[str, Tensor] = {}
        for name, tensor in start.items():
            total = tensor.detach().cpu().double()
            for file, share, snapshot in zip(files, shares, snapshots, strict=True):
                try:
                    total = total + share * file.get_tensor(name).double()
                except (SafetensorError, RuntimeError) as error:
                    raise DataError(f"the snapshot {snapshot.path.name} does not fit the model ({error}); remove it, or give its model.") from error
            made[name] = total.float()
    return made
