"""Experts of a model folder forked, dropped, and given trained weights. No folder is ever changed; each call writes one.

Children begin as their parent (eDiff-I, Balaji et al. 2022, arXiv 2211.01324, section 4.1) and are stored as deltas of it, so that a fork costs no
disk until they are trained. They are named by the timesteps that they own, `t0500-1000` for 500 <= t < 1000, so that high and low cannot be confused.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from torch import Tensor

from ..errors import ModelError, UsageError
from ..pipeline.model.folder import ModelFolder
from ..unet.deltas import origin
from ..unet.experts import ExpertEntry
from .expert_files import Draft, Kept, OnBase, Weights, Whole, kept, state_of, verified, weights_for, write_model
from .intervals import expert_of, interval_name, level_text, names_of, owned_text


def fork(
    model: ModelFolder, borders: Sequence[float], out: Path, *, expert: str | None = None, whole: bool = False, link: bool = False
) -> tuple[ExpertEntry, ...]:
    """Split an expert at noise levels; each child owns a part of its interval and begins with its weights.

    Args:
        model: what is forked.
        borders: sigmas inside the expert's interval, in any order; each belongs to the child above it.
        out: the new model folder.
        expert: which one; may be None when there is one only.
        whole: give each child whole weights of its own, which diffusers loads as a U-Net, instead of a delta.
        link: see `write_model`.

    Returns:
        The children, from low to high noise.

    Raises:
        UsageError: no such expert, a border outside its interval, a child without a timestep, or `out` exists.
        ModelError: weights that are not the ones that were recorded.
        OutputError: `out` could not be written.
    """
    parent = expert_of(model, expert)
    for border in borders:
        if not parent.sigma_min < border < parent.sigma_max:
            raise UsageError(f"The border {level_text(model.noise, border)} is not inside {owned_text(model.noise, parent)}; choose one between.")
    if not borders:
        raise UsageError("No border was given to fork at; give --at-timestep or --at-sigma.")
    verified(model)
    source, _ = origin(model.path / parent.subfolder, None)
    drafts = [kept(model, entry) for entry in model.experts if entry is not parent]
    for low, high in pairwise([parent.sigma_min, *sorted(set(borders)), parent.sigma_max]):
        name = interval_name(model.noise, low, high)
        child = replace(parent, name=name, subfolder=f"unet_{name}", sigma_min=low, sigma_max=high, parent=parent.name)
        drafts.append(Draft(child, Whole(source, state_of(Kept(source))) if whole else OnBase(source, {})))
    entries = write_model(model, drafts, out, link)
    return tuple(entry for entry in entries if parent.sigma_min <= entry.sigma_min < parent.sigma_max)


def drop(model: ModelFolder, expert: str, out: Path, *, heir: str, link: bool = False) -> ExpertEntry:
    """Remove an expert; its neighbour takes over its interval.

    Args:
        model: the ensemble.
        expert: which one goes.
        out: the new model folder; an ordinary one when one expert is left.
        heir: "lower" or "higher": the neighbour in noise level.
        link: see `write_model`.

    Returns:
        The neighbour, under the name of what it owns now.

    Raises:
        UsageError: no such expert or neighbour, or `out` exists.
        ModelError: weights that are not the ones that were recorded.
        OutputError: `out` could not be written.
    """
    gone = expert_of(model, expert)
    index = model.experts.index(gone) + {"lower": -1, "higher": 1}[heir]
    if not 0 <= index < len(model.experts):
        raise UsageError(f"There is no expert {heir} than {gone.name!r} to take over its interval; the experts are {names_of(model.experts)}.")
    verified(model)
    neighbour = model.experts[index]
    low, high = min(gone.sigma_min, neighbour.sigma_min), max(gone.sigma_max, neighbour.sigma_max)
    name = interval_name(model.noise, low, high)
    parent = neighbour.parent if neighbour.parent != name else None
    taken = replace(neighbour, name=name, sigma_min=low, sigma_max=high, parent=parent, subfolder=f"unet_{name}")
    others = [kept(model, entry) for entry in model.experts if entry not in (gone, neighbour)]
    entries = write_model(model, [*others, Draft(taken, Kept(model.path / neighbour.subfolder))], out, link)
    return next(entry for entry in entries if entry.sigma_min == low)


def put_weights(
    model: ModelFolder, expert: str | None, out: Path, *, tensors: Mapping[str, Tensor] | None = None, lora: Path | None = None, link: bool = False
) -> ExpertEntry:
    """Give an expert new weights, as training does: all its tensors, or a LoRA file that is added to the ones it has.

    A delta stays a delta of its base, holding what differs. A LoRA on whole weights makes a delta of these, which stay as its base; but an expert
    that is alone keeps whole weights, and a LoRA is merged into them.

    Args:
        model: the ensemble.
        expert: whose weights; may be None when there is one only.
        out: the new model folder.
        tensors: every tensor of the U-Net; or None.
        lora: in diffusers' layout, see `lora.read_lora`; or None. Exactly one of the two.
        link: see `write_model`.

    Raises:
        UsageError: no such expert, or `out` exists.
        ModelError: weights that do not fit it.
        OutputError: `out` could not be written.
    """
    old = expert_of(model, expert)
    verified(model)
    own = model.path / old.subfolder
    before = state_of(Kept(own))
    stored: Weights
    if lora is not None:
        state_of(OnBase(own, {}, lora))  # refuses one that does not fit
        stored = OnBase(origin(own, None)[0], {}, lora)
    elif tensors is None:
        raise ValueError("Neither tensors nor a LoRA file was given.")
    elif {name: tensor.shape for name, tensor in tensors.items()} != {name: tensor.shape for name, tensor in before.items()}:
        raise ModelError(f"The new weights do not have the names and shapes of the expert {old.name!r}; give all tensors of the same U-Net.")
    else:
        stored = weights_for(own, tensors)
    name = old.name
    taken = f"unet_{name}" if isinstance(stored, OnBase) and stored.base == own else old.subfolder
    drafts = [Draft(replace(e, subfolder=taken), stored) if e is old else kept(model, e) for e in model.experts]
    entries = write_model(model, drafts, out, link)
    return next(entry for entry in entries if entry.name == name)
