"""Several experts made one: weighted task vectors, on model folders."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError, UsageError
from ..pipeline.model.folder import ModelFolder
from ..schedulers.noise import NoiseSchedule
from ..unet.config import UNetConfig
from ..unet.deltas import chain, differing
from ..unet.experts import ExpertEntry
from .expert_files import Draft, Kept, OnBase, Weights, Whole, kept, state_of, verified, write_model
from .intervals import expert_of, first_timestep, interval_name, names_of


@dataclass(frozen=True)
class Merged:
    """What a merge did.

    Attributes:
        expert: the one that took the children's place.
        shares: child -> its weight, as applied.
        parent: name of the base, or of the model that was given, whose weights the task vectors were measured from; None when there was none and the
            children were averaged.
    """

    expert: ExpertEntry
    shares: Mapping[str, float]
    parent: str | None


def merge(
    model: ModelFolder,
    out: Path,
    *,
    experts: Sequence[str] = (),
    shares: Mapping[str, float] | None = None,
    parent: ModelFolder | None = None,
    link: bool = False,
) -> Merged:
    """Make one expert of several: parent + Σ share · (child − parent), the weighted task vectors (Ilharco et al. 2022, arXiv 2212.04089).

    The parent is the one given, else the nearest base that all of them are deltas of. Without one the children are averaged, with the shares scaled
    to a sum of 1; that is the same as long as the shares sum to 1 anyway, as those by timesteps do (arXiv 2410.06664 merges experts in this way).

    Args:
        model: the ensemble.
        out: the new model folder; an ordinary one when all experts were merged.
        experts: neighbours, at least two; all when empty.
        shares: child -> weight; None weighs each by its share of the timesteps.
        parent: a model of one expert, from which the children were trained.
        link: see `write_model`.

    Raises:
        UsageError: fewer than two, not neighbours, not there, shares that cannot be used, a parent of several experts, or `out` exists.
        ModelError: children or parent of different architectures, damaged ones, or values that overflow.
        OutputError: `out` could not be written.
    """
    children = _neighbours(model, experts)
    if any(not _alike(model, children[0], child) for child in children):
        raise ModelError(f"The experts {names_of(children)} differ in architecture or in how they read prompts; only equal ones can be merged.")
    verified(model)
    base = _common_base([model.path / child.subfolder for child in children])
    given = None if parent is None else _given(parent, model, children[0])
    nearest = base if given is None else given
    weights = _shares(model.noise, children, shares, scaled=nearest is None)
    states = [state_of(Kept(model.path / child.subfolder)) for child in children]
    origin = None if nearest is None else state_of(Kept(nearest))
    state = merged_state(states, [weights[child.name] for child in children], origin)
    low, high = children[0].sigma_min, children[-1].sigma_max
    name = interval_name(model.noise, low, high)
    guidance = children[0].guidance if len({child.guidance for child in children}) == 1 else None
    entry = ExpertEntry(name, f"unet_{name}", low, high, guidance, text=children[0].text)
    stored: Weights = Whole(model.path / children[0].subfolder, state)
    if base is not None:
        own = differing(state, state_of(Kept(base)))
        stored = OnBase(base, own) if own else Kept(base)
    entries = write_model(model, [*(kept(model, e) for e in model.experts if e not in children), Draft(entry, stored)], out, link)
    written = next(entry for entry in entries if entry.sigma_min == low)
    name_of_parent = parent.name if parent is not None else None if base is None else base.name
    return Merged(written, weights, name_of_parent)


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


def _neighbours(model: ModelFolder, names: Sequence[str]) -> list[ExpertEntry]:
    chosen = [expert_of(model, name) for name in names]
    children = [entry for entry in model.experts if not names or entry in chosen]
    if len(children) < 2 or len(set(names)) < len(names):
        raise UsageError(f"To merge takes two experts or more, each named once; {model.name!r} has {names_of(model.experts)}.")
    for lower, higher in pairwise(children):
        if lower.sigma_max != higher.sigma_min:
            raise UsageError(f"The experts {lower.name!r} and {higher.name!r} are not neighbours; name those between them too.")
    return children


def _shares(noise: NoiseSchedule, children: Sequence[ExpertEntry], given: Mapping[str, float] | None, scaled: bool) -> dict[str, float]:
    if given is None:
        steps = {child.name: first_timestep(noise, child.sigma_max) - first_timestep(noise, child.sigma_min) for child in children}
        return {name: number / sum(steps.values()) for name, number in steps.items()}
    if set(given) != {child.name for child in children}:
        raise UsageError(f"Weights were given for {', '.join(given)}, but {names_of(children)} are merged; give one weight for each of these.")
    if not all(math.isfinite(share) for share in given.values()):
        raise UsageError(f"The weights are {', '.join(f'{share:g}' for share in given.values())}; finite numbers were wanted.")
    total = sum(given.values())
    if scaled and not total > 0:
        raise UsageError(f"The weights sum to {total:g}, and without a parent the children are averaged; give weights with a sum above 0.")
    return {name: share / total if scaled else share for name, share in given.items()}


def _given(parent: ModelFolder, model: ModelFolder, child: ExpertEntry) -> Path:
    """The folder of a parent's weights, which have to be of the child's architecture."""
    if len(parent.experts) != 1:
        raise UsageError(f"--parent {parent.name!r} has the experts {names_of(parent.experts)}; a model of one expert was wanted.")
    [entry] = parent.experts
    if not _same_network(parent.configs[entry.subfolder], model.configs[child.subfolder]):
        raise ModelError(f"--parent {parent.name!r} is of another architecture than {child.name!r}; give the model that it was trained from.")
    verified(parent)
    return parent.path / entry.subfolder


def _common_base(folders: Sequence[Path]) -> Path | None:
    """The nearest folder that is in the chain of each."""
    chains = [chain(folder) for folder in folders]
    return next((base for base in chains[0] if all(base in other for other in chains)), None)


def _alike(model: ModelFolder, one: ExpertEntry, other: ExpertEntry) -> bool:
    """Whether two U-Nets are of one architecture and read prompts in the same way."""
    return one.text == other.text and _same_network(model.configs[one.subfolder], model.configs[other.subfolder])


def _same_network(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    try:
        return replace(UNetConfig.from_dict(first), sample_size=None) == replace(UNetConfig.from_dict(second), sample_size=None)
    except ModelError:  # not covered by our network; then all that the files say has to be equal
        return first == second
