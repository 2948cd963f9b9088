"""Whose turn a training step is.

A batch is one expert's: its rows have timesteps that it owns, and one network computes and has gradients at a time, however many there are.
So are the experts of eDiff-I trained (Balaji et al. 2022, arXiv 2211.01324), on batches of their own interval.
"""

from collections.abc import Mapping

from ..errors import UsageError
from ..pipeline.model.folder import ModelFolder
from ..unet.experts import ExpertEntry

MARGIN = 50  # timesteps beyond its borders that a single expert is trained on: hard disjoint ranges are fragile (MEME, arXiv 2306.04990)

_GOLDEN = (5**0.5 - 1) / 2

Owned = Mapping[str, tuple[int, int]]
"""Expert's name -> the timesteps [first, end) that it is trained on; together they leave no gap."""


def owned_timesteps(folder: ModelFolder, expert: str | None) -> dict[str, tuple[int, int]]:
    """The timesteps [first, end) that each expert of a run is trained on: all experts on what they own, or one on its own and a margin.

    Raises:
        UsageError: there is no expert of that name, or one owns nothing.
    """
    known = {entry.name: entry for entry in folder.experts}
    if expert is None:
        return {name: _timesteps(folder, entry) for name, entry in known.items()}
    if expert not in known:
        raise UsageError(f"--expert {expert!r} is not in {folder.name!r}; it has {', '.join(known)}.")
    (first, end), last = _timesteps(folder, known[expert]), len(folder.noise.sigmas)
    return {expert: (max(0, first - MARGIN), min(last, end + MARGIN))}


def span(owned: Owned) -> tuple[int, int]:
    """First timestep that is trained and one past the last."""
    return min(first for first, _ in owned.values()), max(end for _, end in owned.values())


def expert_at(owned: Owned, t: int) -> str:
    """The expert that owns a timestep."""
    return next(name for name, (first, end) in owned.items() if first <= t < end)


def expert_of_step(owned: Owned, step: int) -> str:
    """The expert whose turn a step is, from 0: each in proportion to the timesteps that it owns, and as evenly spaced as can be.

    The multiples of the golden ratio modulo 1 are spread over an interval however many there are (Knuth, The Art of Computer Programming 3, 6.4).
    """
    first, end = span(owned)
    return expert_at(owned, first + int(step * _GOLDEN % 1 * (end - first)))


def steps_for_all(owned: Owned) -> int:
    """How many steps it takes from the first until every expert has had a turn."""
    seen: set[str] = set()
    steps = 0
    while len(seen) < len(owned):
        seen.add(expert_of_step(owned, steps))
        steps += 1
    return steps


def _timesteps(folder: ModelFolder, entry: ExpertEntry) -> tuple[int, int]:
    inside = (folder.noise.sigmas >= entry.sigma_min) & (folder.noise.sigmas < entry.sigma_max)
    numbers = inside.nonzero().flatten().tolist()
    if not numbers:
        raise UsageError(f"expert {entry.name!r} owns no training timestep of {folder.name!r}, so there is nothing to train it on.")
    return numbers[0], numbers[-1] + 1
