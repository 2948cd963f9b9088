"""Means over many steps: a sum and a count under each name, so that a mean is one over samples whatever batches they came in."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

Tally = dict[str, tuple[float, float]]
"""Name -> sum and count since the last line of the log."""


def pairs_of(scalars: Mapping[str, Tensor]) -> Tensor:
    """Sum and count of each scalar, (n, 2) float32: a value () counts once, a pair (2,) is a sum and a count."""
    told = {name: value.detach().float() for name, value in scalars.items()}
    return torch.stack([value if value.ndim else torch.stack([value, torch.ones_like(value)]) for value in told.values()])


def add(tally: Tally, names: Sequence[str], values: Sequence[float]) -> None:
    """Count in the sum and the count of each name; `values` are twice as many as `names`."""
    for name, total, count in zip(names, values[::2], values[1::2], strict=True):
        before, counted = tally.get(name, (0.0, 0.0))
        tally[name] = (before + total, counted + count)


def means(tally: Tally) -> dict[str, float]:
    """The mean of everything that was counted at least once, to six digits."""
    return {name: float(f"{total / count:.6g}") for name, (total, count) in tally.items() if count}


def noise_bins(steps: int, bins: int = 10) -> dict[str, tuple[int, int]]:
    """Equal parts of the training timesteps 0 to `steps` − 1 by the name of their loss, "loss/t0-99" and so on: [first, end)."""
    edges = [steps * i // bins for i in range(bins + 1)]
    return {f"loss/t{first}-{end - 1}": (first, end) for first, end in pairwise(edges)}


def split(errors: Tensor, t: Tensor, intervals: Mapping[str, tuple[int, int]]) -> dict[str, Tensor]:
    """Sum and count (2,) of the errors (batch,) whose timesteps t (batch,) lie in each interval [first, end)."""
    t = t.to(errors.device)
    inside = {name: (t >= first) & (t < end) for name, (first, end) in intervals.items()}
    return {name: torch.stack([(errors.detach() * rows).sum(), rows.sum().to(errors.dtype)]) for name, rows in inside.items()}
