"""The plan of a run: which items form which batch, and under which names. Fixed at the start and stored; a later run of a changed file keeps what is
unchanged.

A picture's last bits depend on the batch that it is computed in, so a batch is never packed anew: what is missing of it is drawn again in the whole
of it. Items that are no longer asked for stay in it as company for the others, and leave the plan with the last of them.
"""

import json
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import DataError, OutputError
from ..pipeline.adapters.adapters import LoraUse
from ..pipeline.adapters.embeddings import EmbeddingUse
from ..pipeline.editing.control import control_from
from ..pipeline.editing.edits import edit_from, upscale_from
from ..pipeline.editing.inputs import InputPicture
from ..pipeline.output import candidates
from ..pipeline.request import DRAWING, EARLIER, GUIDING, Request, most_together
from .files import replace as write_whole
from .items import Item

PLAN_FILE = "plan.json"
VERSION = 1
_ANY = InputPicture("", "", 0, 0, "")  # stands for pictures that may differ within a batch


@dataclass(frozen=True)
class Planned:
    """An item in a plan.

    Attributes:
        item: what to draw.
        name: of its file.
        wanted: False where it only keeps its batch company.
    """

    item: Item
    name: str
    wanted: bool = True


@dataclass(frozen=True)
class Plan:
    """What a folder of pictures is made of.

    Attributes:
        model: fingerprint of the model.
        batches: the items that are computed together; order and company never change.
        numbered: how many items the folder has had, for the names of more.
    """

    model: str
    batches: tuple[tuple[Planned, ...], ...] = ()
    numbered: int = 0

    @property
    def wanted(self) -> list[Planned]:
        """The items that are asked for."""
        return [planned for batch in self.batches for planned in batch if planned.wanted]


def extend(plan: Plan, items: Sequence[Item], batch_size: int | None) -> Plan:
    """The plan for `items`: batches of `plan` that still hold one of them, then new batches for the others.

    Args:
        plan: what the folder has; a new one has none.
        items: what is asked for, with distinct keys.
        batch_size: most pictures in a new batch, candidates counted; None takes as many as 16 pictures and a million pixels.
    """
    asked = {item.key: item for item in items}
    kept: list[tuple[Planned, ...]] = []
    for batch in plan.batches:
        again = tuple(replace(p, item=asked.get(p.item.key, p.item), wanted=p.item.key in asked) for p in batch)
        if any(p.wanted for p in again):
            kept.append(again)
    planned = {p.item.key for batch in kept for p in batch}
    taken = {_folded(p.name) for batch in kept for p in batch}
    number = plan.numbered
    groups: dict[tuple[Any, ...], list[Planned]] = defaultdict(list)
    for item in items:
        if item.key in planned:
            continue
        number += 1
        groups[_shared(item.request)].append(Planned(item, _free_name(item, number, taken)))
    new = [batch for group in groups.values() for batch in _cut(group, batch_size)]
    return Plan(plan.model, (*kept, *new), number)


def _shared(request: Request) -> tuple[Any, ...]:
    """What the rows of a batch have in common; which pictures they begin with may differ."""
    edit = None if request.edit is None else (request.edit.strength, request.edit.mask is None)
    control = None if request.control is None else replace(request.control, image=_ANY)
    return (*(getattr(request, name) for name in (*DRAWING, *GUIDING, "loras")), edit, request.upscale, request.tile, control)


def _cut(group: Sequence[Planned], batch_size: int | None) -> Iterable[tuple[Planned, ...]]:
    first = group[0].item.request
    size = most_together(first) if batch_size is None else batch_size
    size = max(1, size // group[0].item.best_of)
    return (tuple(group[i : i + size]) for i in range(0, len(group), size))


def _free_name(item: Item, number: int, taken: set[str]) -> str:
    """The item's name, with "-2" and so on where another has it on a system that ignores case."""
    name = next(name for name in candidates(item.file_name(number)) if _folded(name) not in taken)
    taken.add(_folded(name))
    return name


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def save_plan(plan: Plan, folder: Path) -> None:
    """Write `plan.json`, whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    batches = [[{**_stored(p.item), "name": p.name, "wanted": p.wanted} for p in batch] for batch in plan.batches]
    content = {"version": VERSION, "model": plan.model, "numbered": plan.numbered, "batches": batches}
    write_whole((json.dumps(content, indent=1) + "\n").encode(), folder / PLAN_FILE)


def load_plan(folder: Path, model: str) -> Plan:
    """The folder's plan; an empty one where there is none, or where it is another model's.

    Raises:
        DataError: `plan.json` is not one.
        OutputError: it cannot be read.
    """
    try:
        content = json.loads((folder / PLAN_FILE).read_text(encoding="utf-8"))
        if content["version"] != VERSION:
            raise DataError(f"{PLAN_FILE} has version {content['version']!r}, this program reads {VERSION}; render into another folder.")
        if content["model"] != model:
            return Plan(model, numbered=int(content["numbered"]))
        batches = tuple(tuple(Planned(_item(one), _inside(one["name"]), one["wanted"]) for one in batch) for batch in content["batches"])
        return Plan(model, batches, int(content["numbered"]))
    except FileNotFoundError:
        return Plan(model)
    except OSError as error:
        raise OutputError(f"{PLAN_FILE} cannot be read ({error.strerror}); see to the folder's disk and permissions, then run again.") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{PLAN_FILE} cannot be read ({error}); remove it to plan anew, which keeps the pictures.") from None


def _inside(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name:
        raise ValueError(f"the name {name!r} leads out of the folder")
    return name


def _stored(item: Item) -> dict[str, Any]:
    return {
        "key": item.key,
        "line": item.line,
        "template": item.template,
        "format": item.picture_format,
        "best_of": item.best_of,
        "request": asdict(item.request),
    }


def _item(stored: dict[str, Any]) -> Item:
    values: dict[str, Any] = {}
    asked = {**EARLIER, **stored["request"]}
    for field in fields(Request):
        if field.default is MISSING or field.name in asked:
            value = asked[field.name]
            values[field.name] = tuple(value) if isinstance(value, list) else value
    for name, read in (("edit", edit_from), ("upscale", upscale_from), ("control", control_from)):
        if values.get(name) is not None:
            values[name] = read(values[name])
    values["loras"] = tuple(LoraUse.stored(lora) for lora in values["loras"])
    values["embeddings"] = tuple(EmbeddingUse.stored(one) for one in values["embeddings"])
    return Item(stored["key"], int(stored["line"]), Request(**values), stored["template"], stored["format"], int(stored.get("best_of", 1)))
