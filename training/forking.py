"""The life of an expert, on model folders: fork, merge, drop, and put trained weights in its place. No folder is ever changed; each call writes one.

Children begin as their parent (eDiff-I, Balaji et al. 2022, arXiv 2211.01324, section 4.1) and are stored as deltas of it, so that a fork costs no
disk until they are trained. They are named by the timesteps that they own, `t0500-1000` for 500 <= t < 1000, so that high and low cannot be confused.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from ..errors import ModelError, UsageError
from ..pipeline.folder import ModelFolder
from ..schedulers.noise import NoiseSchedule
from ..unet.config import UNetConfig
from ..unet.deltas import chain, differing
from ..unet.experts import ExpertEntry
from .expert_files import Draft, Kept, OnBase, Weights, Whole, state_of, verified, weights_for, write_model


@dataclass(frozen=True)
class Merged:
    """What a merge did.

    Attributes:
        expert: the one that took the children's place.
        shares: child -> its weight, as applied.
        parent: name of the folder whose weights the task vectors were measured from; None when none was there and the children were averaged.
    """

    expert: ExpertEntry
    shares: Mapping[str, float]
    parent: str | None


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
            raise UsageError(f"The border {_level(model.noise, border)} is not inside {_owned(model.noise, parent)}; choose one between.")
    if not borders:
        raise UsageError("No border was given to fork at; give --at-timestep or --at-sigma.")
    verified(model)
    source = model.path / parent.subfolder
    drafts = [_kept(model, entry) for entry in model.experts if entry is not parent]
    for low, high in pairwise([parent.sigma_min, *sorted(set(borders)), parent.sigma_max]):
        name = interval_name(model.noise, low, high)
        child = replace(parent, name=name, subfolder=f"unet_{name}", sigma_min=low, sigma_max=high, parent=parent.name)
        drafts.append(Draft(child, Whole(source, state_of(Kept(source))) if whole else OnBase(source, {})))
    entries = write_model(model, drafts, out, link)
    return tuple(entry for entry in entries if parent.sigma_min <= entry.sigma_min < parent.sigma_max)


def merge(model: ModelFolder, out: Path, *, experts: Sequence[str] = (), shares: Mapping[str, float] | None = None, link: bool = False) -> Merged:
    """Make one expert of several: parent + Σ share · (child − parent), the weighted task vectors (Ilharco et al. 2022, arXiv 2212.04089).

    The parent is the nearest base that all of them are deltas of. Without one the children are averaged, with the shares scaled to a sum of 1;
    that is the same as long as the shares sum to 1 anyway, as those by timesteps do (arXiv 2410.06664 merges experts in this way).

    Args:
        model: the ensemble.
        out: the new model folder; an ordinary one when all experts were merged.
        experts: neighbours, at least two; all when empty.
        shares: child -> weight; None weighs each by its share of the timesteps.
        link: see `write_model`.

    Raises:
        UsageError: fewer than two, not neighbours, not there, shares that cannot be used, or `out` exists.
        ModelError: children of different architectures, damaged ones, or values that overflow.
        OutputError: `out` could not be written.
    """
    children = _neighbours(model, experts)
    if any(not _alike(model, children[0], child) for child in children):
        raise ModelError(f"The experts {_names(children)} differ in architecture or in how they read prompts; only equal ones can be merged.")
    verified(model)
    parent = _common_base([model.path / child.subfolder for child in children])
    weights = _shares(model.noise, children, shares, scaled=parent is None)
    states = [state_of(Kept(model.path / child.subfolder)) for child in children]
    origin = None if parent is None else state_of(Kept(parent))
    state = merged_state(states, [weights[child.name] for child in children], origin)
    low, high = children[0].sigma_min, children[-1].sigma_max
    name = interval_name(model.noise, low, high)
    guidance = children[0].guidance if len({child.guidance for child in children}) == 1 else None
    entry = ExpertEntry(name, f"unet_{name}", low, high, guidance, text=children[0].text)
    stored: Weights = Whole(model.path / children[0].subfolder, state)
    if parent is not None and origin is not None:
        own = differing(state, origin)
        stored = OnBase(parent, own) if own else Kept(parent)
    entries = write_model(model, [*(_kept(model, e) for e in model.experts if e not in children), Draft(entry, stored)], out, link)
    written = next(entry for entry in entries if entry.sigma_min == low)
    return Merged(written, weights, None if parent is None else parent.name)


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
        raise UsageError(f"There is no expert {heir} than {gone.name!r} to take over its interval; the experts are {_names(model.experts)}.")
    verified(model)
    neighbour = model.experts[index]
    low, high = min(gone.sigma_min, neighbour.sigma_min), max(gone.sigma_max, neighbour.sigma_max)
    name = interval_name(model.noise, low, high)
    parent = neighbour.parent if neighbour.parent != name else None
    taken = replace(neighbour, name=name, sigma_min=low, sigma_max=high, parent=parent, subfolder=_subfolder(neighbour, name))
    others = [_kept(model, entry) for entry in model.experts if entry not in (gone, neighbour)]
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
    own, *bases = chain(model.path / old.subfolder)
    before = state_of(Kept(own))
    stored: Weights
    if lora is not None:
        state_of(OnBase(own, {}, lora))  # refuses one that does not fit
        untouched = bool(bases) and not differing(before, state_of(Kept(bases[0])))
        stored = OnBase(bases[0] if untouched else own, {}, lora)
    elif tensors is None:
        raise ValueError("Neither tensors nor a LoRA file was given.")
    elif {name: tensor.shape for name, tensor in tensors.items()} != {name: tensor.shape for name, tensor in before.items()}:
        raise ModelError(f"The new weights do not have the names and shapes of the expert {old.name!r}; give all tensors of the same U-Net.")
    else:
        stored = weights_for(own, tensors)
    name = old.name
    taken = f"unet_{name}" if isinstance(stored, OnBase) and stored.base == own else old.subfolder
    drafts = [Draft(replace(e, subfolder=taken), stored) if e is old else _kept(model, e) for e in model.experts]
    entries = write_model(model, drafts, out, link)
    return next(entry for entry in entries if entry.name == name)


def merged_state(states: Sequence[Mapping[str, Tensor]], shares: Sequence[float], parent: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Add weighted task vectors to a parent, or average; see `merge`. Computed in float64, in the parent's dtypes (else the widest).

    A tensor that no child has changed comes out as it is, to the bit.

    Raises:
        ModelError: a value that is not finite.
    """
    merged: dict[str, Tensor] = {}
    for name, first in (states[0] if parent is None else parent).items():
        tensors = [state[name] for state in states]
        if not any(differing({name: tensor}, {name: first}) for tensor in tensors):
            merged[name] = first
            continue
        total = torch.zeros(first.shape, dtype=torch.float64) if parent is None else first.double()
        for tensor, share in zip(tensors, shares, strict=True):
            total = total + share * (tensor.double() if parent is None else tensor.double() - first.double())
        dtype = first.dtype
        for tensor in tensors if parent is None else ():
            dtype = torch.promote_types(dtype, tensor.dtype)
        merged[name] = total.to(dtype)
        if not bool(torch.isfinite(merged[name]).all()):
            raise ModelError(
                f"{name} overflows {dtype} when merged with the weights {', '.join(f'{share:g}' for share in shares)}; give smaller ones."
            )
    return merged


def interval_name(noise: NoiseSchedule, sigma_min: float, sigma_max: float) -> str:
    """Name an interval by its whole timesteps: `t0500-1000` owns those with 500 <= t < 1000.

    Raises:
        UsageError: it owns none.
    """
    low, high = (first_timestep(noise, sigma) for sigma in (sigma_min, sigma_max))
    if low >= high:
        raise UsageError(
            f"The noise levels from sigma {sigma_min:g} to {sigma_max:g} hold no whole timestep of the model's schedule; choose other borders."
        )
    return f"t{low:04d}-{high:04d}"


def sigma_of(noise: NoiseSchedule, timestep: float) -> float:
    """The border at a timestep: what lies at or above it belongs to the noisier expert.

    Raises:
        UsageError: not a border within the schedule.
    """
    if not 0 < timestep <= len(noise.sigmas) - 1:
        raise UsageError(f"The border {timestep:g} is no timestep inside the model's schedule; give one above 0 and up to {len(noise.sigmas) - 1}.")
    # Interpolation may miss the table by a rounding, and with it the border.
    return float(noise.sigmas[int(timestep)] if timestep == int(timestep) else noise.sigma_at(timestep))


def first_timestep(noise: NoiseSchedule, sigma: float) -> int:
    """The first whole timestep whose sigma is not below this one; the number of timesteps when all are."""
    return int(torch.searchsorted(noise.sigmas, sigma))


def expert_of(model: ModelFolder, name: str | None) -> ExpertEntry:
    """The expert of that name; None means the only one.

    Raises:
        UsageError: there is none, or None could mean several.
    """
    if name is None and len(model.experts) == 1:
        return model.experts[0]
    found = next((entry for entry in model.experts if entry.name == name), None)
    if found is None:
        asked = "none was named" if name is None else f"{name!r} is none of them"
        raise UsageError(f"{model.name!r} has the experts {_names(model.experts)}, and {asked}; name one with --expert.")
    return found


def _kept(model: ModelFolder, entry: ExpertEntry) -> Draft:
    """An expert that stays as it is."""
    return Draft(replace(entry, subfolder=_subfolder(entry, entry.name)), Kept(model.path / entry.subfolder))


def _subfolder(entry: ExpertEntry, name: str) -> str:
    """Where an expert of that name goes: `unet` stays, names without the old name stay, all experts lie beside each other."""
    stays = entry.subfolder == "unet" or (name == entry.name and "/" not in entry.subfolder)
    return entry.subfolder if stays else f"unet_{name}"


def _neighbours(model: ModelFolder, names: Sequence[str]) -> list[ExpertEntry]:
    chosen = [expert_of(model, name) for name in names]
    children = [entry for entry in model.experts if not names or entry in chosen]
    if len(children) < 2 or len(set(names)) < len(names):
        raise UsageError(f"To merge takes two experts or more, each named once; {model.name!r} has {_names(model.experts)}.")
    for lower, higher in pairwise(children):
        if lower.sigma_max != higher.sigma_min:
            raise UsageError(f"The experts {lower.name!r} and {higher.name!r} are not neighbours; name those between them too.")
    return children


def _shares(noise: NoiseSchedule, children: Sequence[ExpertEntry], given: Mapping[str, float] | None, scaled: bool) -> dict[str, float]:
    if given is None:
        steps = {child.name: first_timestep(noise, child.sigma_max) - first_timestep(noise, child.sigma_min) for child in children}
        return {name: number / sum(steps.values()) for name, number in steps.items()}
    if set(given) != {child.name for child in children}:
        raise UsageError(f"Weights were given for {', '.join(given)}, but {_names(children)} are merged; give one weight for each of these.")
    if not all(math.isfinite(share) for share in given.values()):
        raise UsageError(f"The weights are {', '.join(f'{share:g}' for share in given.values())}; finite numbers were wanted.")
    total = sum(given.values())
    if scaled and not total > 0:
        raise UsageError(f"The weights sum to {total:g}, and without a parent the children are averaged; give weights with a sum above 0.")
    return {name: share / total if scaled else share for name, share in given.items()}


def _common_base(folders: Sequence[Path]) -> Path | None:
    """The nearest folder that is in the chain of each."""
    chains = [chain(folder) for folder in folders]
    return next((base for base in chains[0] if all(base in other for other in chains)), None)


def _alike(model: ModelFolder, one: ExpertEntry, other: ExpertEntry) -> bool:
    """Whether two U-Nets are of one architecture and read prompts in the same way."""
    if one.text != other.text:
        return False
    first, second = model.configs[one.subfolder], model.configs[other.subfolder]
    try:
        return replace(UNetConfig.from_dict(first), sample_size=None) == replace(UNetConfig.from_dict(second), sample_size=None)
    except ModelError:  # not covered by our network; then all that the files say has to be equal
        return first == second


def _names(entries: Sequence[ExpertEntry]) -> str:
    return ", ".join(entry.name for entry in entries)


def _level(noise: NoiseSchedule, sigma: float) -> str:
    return f"sigma {sigma:.6g} (timestep {float(noise.timestep_at(sigma)):.6g})"


def _owned(noise: NoiseSchedule, entry: ExpertEntry) -> str:
    high = "infinity" if math.isinf(entry.sigma_max) else f"{entry.sigma_max:.6g}"
    steps = f"timesteps {first_timestep(noise, entry.sigma_min)} to {first_timestep(noise, entry.sigma_max)}"
    return f"the expert {entry.name!r}, which owns sigma {entry.sigma_min:.6g} to {high} ({steps})"
