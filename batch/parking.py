"""Drafts on disk: a batch that waits at a border for the next expert survives the process that drew it so far."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save

from ..pipeline.editing.rounds import Start, round_schedule
from ..pipeline.model.folder import ModelFolder
from .drafts import Draft, Lost
from .files import replace as write_whole
from .items import Item

_PREFIX = ".parked-"


def park(draft: Draft, items: Sequence[Item], folder: Path) -> None:
    """Keep a draft of the batch `items`.

    Raises:
        OutputError: it cannot be written.
    """
    tensors = {"latents": draft.latents.contiguous(), **{f"noise.{row}": state for row, state in enumerate(draft.noise)}}
    facts = {
        "rows": [item.key for item in draft.items],
        "round": draft.round,
        "stage": draft.stage,
        "used": draft.used,
        "lost": [{"key": lost.item.key, "error": lost.error} for lost in draft.lost],
        "fallbacks": draft.fallbacks,
    }
    write_whole(save(tensors, {"draft": json.dumps(facts)}), _path(items, folder))


def taken_up(model: ModelFolder, draft: Draft, items: Sequence[Item], folder: Path) -> Draft:
    """`draft`, whose first round is open, as far as it was parked before; itself when it was not, or the file is damaged."""
    known = {item.key: row for row, item in enumerate(draft.items)}
    every = {item.key: item for item in items}
    try:
        with safe_open(_path(items, folder), "pt") as file:  # pyright: ignore[reportUnknownVariableType]
            facts = json.loads(file.metadata()["draft"])
            latents: torch.Tensor = file.get_tensor("latents")
            noise = tuple(file.get_tensor(f"noise.{row}") for row in range(len(facts["rows"])))
        parked, number = draft.rows([known[key] for key in facts["rows"]]), int(facts["round"])
        if parked.items and number != draft.round:  # the second round, which has no picture to keep
            parked = replace(parked, schedule=round_schedule(model, parked.request, parked.parts[number]), start=Start(latents))
        return replace(
            parked,
            latents=latents,
            noise=noise,
            round=number,
            stage=int(facts["stage"]),
            used=tuple((name, float(a), float(b)) for name, a, b in facts["used"]),
            lost=tuple(Lost(every[one["key"]], one["error"]) for one in facts["lost"]),
            fallbacks=tuple(facts["fallbacks"]),
        )
    except Exception:  # a missing or damaged file of ours, in whatever way: the batch begins anew
        return draft


def forget(items: Sequence[Item], folder: Path) -> None:
    """Remove what was parked of a batch."""
    _path(items, folder).unlink(missing_ok=True)


def forget_all_but(batches: Iterable[Sequence[Item]], folder: Path) -> None:
    """Remove what was parked of any other batches: of those that a killed process finished, and those that nobody asks for any more."""
    kept = {_path(items, folder) for items in batches}
    for path in folder.glob(f"{_PREFIX}*"):
        if path not in kept:
            path.unlink(missing_ok=True)


def _path(items: Sequence[Item], folder: Path) -> Path:
    name = hashlib.sha256(" ".join(item.key for item in items).encode()).hexdigest()[:32]
    return folder / f"{_PREFIX}{name}.safetensors"
