"""From lines of a prompt file to items: one picture each, with every setting resolved and a key that stays the same as long as the settings do."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from ..errors import DataError, ModelError, UnsafeError, UsageError
from ..pipeline.adapters.adapters import Shelf
from ..pipeline.hub.models import hub_name
from ..pipeline.model.folder import ModelFolder
from ..pipeline.output import picture_name
from ..pipeline.request import Request, recorded
from ..pipeline.resolve import resolve_all
from ..pipeline.seeds import MAX_SEED
from .lines import Line, Problem

Sweep = Mapping[str, Sequence[Any]]
"""Option to the values that multiply every line."""

MAX_ITEMS = 1_000_000
_NOT_SETTINGS = ("count", "seed", "seeds", "name", "format", "lora", "embedding")  # of a line, but not of `resolve`
_FILES = ("init_image", "mask", "control_image", "control_model", "control_depth_model")  # options of a line that name files
_CANDIDATE_STRIDE = 2654435769  # 2³² over the golden ratio, odd: candidates of one seed are all different, and far from those of its neighbours
NAME = "{number}-{prompt}-{seed}"


@dataclass(frozen=True)
class Item:
    """One picture to make.

    Attributes:
        key: 32 hex digits of all that decides the picture and its file; equal lines differ in it by their order.
        line: 1-based line of the prompt file.
        request: what is asked for, with one seed.
        template: of its file name.
        picture_format: "png", "jpeg" or "webp".
        best_of: how many candidates are drawn, of which the best is kept.
    """

    key: str
    line: int
    request: Request
    template: str
    picture_format: str
    best_of: int = 1

    @property
    def candidates(self) -> list["Item"]:
        """What is drawn of it: itself, and with `best_of` others that differ in key and seed."""
        seeds = [(self.seed + i * _CANDIDATE_STRIDE) % (MAX_SEED + 1) for i in range(self.best_of)]
        return [replace(self, key=f"{self.key}.{i}" if i else self.key, request=replace(self.request, seeds=(s,))) for i, s in enumerate(seeds)]

    @property
    def asked(self) -> str:
        """The key of the item that it is a candidate of."""
        return self.key.partition(".")[0]

    @property
    def seed(self) -> int:
        """The picture's seed."""
        return self.request.seeds[0]

    def file_name(self, number: int) -> str:
        """The wanted name of its file; `number` is its place in the plan, from 1."""
        return picture_name(self.template, self.picture_format, self.request.words, self.seed, f"{number:05d}")


def make_items(
    folder: ModelFolder,
    lines: Iterable[Line],
    *,
    defaults: Mapping[str, Any],
    sweep: Sweep,
    circumstances: Mapping[str, Any],
    shelf: Shelf | None = None,
    best_of: int = 1,
    name_of: Callable[[Line, int], str] | None = None,
    beside: Path = Path(),
) -> tuple[list[Item], list[Problem]]:
    """Multiply lines by `count`, `seeds` and the sweep, and resolve every item against the model.

    A line without a seed gets one from its own text (first 32 bits of a hash over prompt, negative prompt and how many equal lines came before), so
    that the same file gives the same pictures and a line keeps its pictures wherever it moves; `count` adds 1, 2, … to it.

    Args:
        folder: the model.
        lines: checked lines.
        defaults: options that lines may override, checked as theirs.
        sweep: option -> values; a line's own value of that option is replaced.
        circumstances: what else decides pixels: dtype, device and so on; goes into every key.
        shelf: where LoRA files are found again; None for one that nobody else needs.
        best_of: see `Item`; from 2 on, `circumstances` must hold it and what scores.
        beside: the folder of the prompt file, from which the lines name their pictures; defaults and sweep name them from the current folder.
        name_of: a line and the place of a picture among those of the line, from 0, to the picture's file name without suffix; in place of `name`.

    Returns:
        The items in the order of the lines, and what the model cannot do, by line.
    """
    loras = Shelf(folder) if shelf is None else shelf
    items: list[Item] = []
    problems: list[Problem] = []
    told: Counter[tuple[str, str]] = Counter()
    seen: Counter[str] = Counter()
    for line in lines:
        values = {**defaults, **line.values, **{name: _beside(beside, line.values[name]) for name in _FILES if line.values.get(name)}}
        text = (values["prompt"], values.get("negative", ""))
        try:
            seeds = _seeds(values, text, told[text])
            for place, (choice, seed) in enumerate(product(_choices(sweep), seeds)):
                named = {} if name_of is None else {"name": name_of(line, place)}
                item = _item(loras, line.number, {**values, **choice, **named}, seed, circumstances, seen)
                items.append(replace(item, best_of=best_of))
            if len(items) > MAX_ITEMS:
                raise UsageError(f"line {line.number} brings the pictures to {len(items)}; at most {MAX_ITEMS} are taken in one run; split the file.")
        except (UsageError, DataError) as error:
            option = next((name for name in line.columns if f"--{name.replace('_', '-')} " in f"{error} "), None)
            problems.append(Problem(line.number, 1 if option is None else line.columns[option], str(error)))
        except (ModelError, UnsafeError) as error:
            problems.append(Problem(line.number, line.columns.get("lora", line.columns.get("embedding", 1)), str(error)))
        told[text] += 1
    return items, problems


def _beside(folder: Path, name: str) -> str:
    """A file or folder that a line names, from the prompt file's folder; a name of the hub that is nothing there stays as it is."""
    path = folder / name
    return name if hub_name(name) is not None and not path.exists() else str(path)


def _seeds(values: Mapping[str, Any], text: tuple[str, str], before: int) -> list[int]:
    if values.get("seeds") is not None:
        if values.get("seed") is not None or values.get("count") is not None:
            raise UsageError("--seeds stands beside --seed or --count; give the list, or a first seed and how many.")
        return list(values["seeds"])
    first, count = values.get("seed"), values.get("count") or 1
    if first is None:
        first = int(hashlib.sha256(json.dumps([*text, before]).encode()).hexdigest()[:8], 16)
        return [(first + i) % (MAX_SEED + 1) for i in range(count)]
    return list(range(first, first + count))


def _choices(sweep: Sweep) -> Iterable[dict[str, Any]]:
    return (dict(zip(sweep, values, strict=True)) for values in product(*sweep.values()))


def _item(shelf: Shelf, line: int, values: Mapping[str, Any], seed: int, circumstances: Mapping[str, Any], seen: Counter[str]) -> Item:
    settings = {name: value for name, value in values.items() if name not in (*_NOT_SETTINGS, "prompt") and value is not None}
    folder, loras = shelf.folder, [shelf.lora(text) for text in values.get("lora") or ()]
    embeddings = [shelf.embedding(text) for text in values.get("embedding") or ()]
    [request] = resolve_all(folder, values["prompt"], [seed], loras=loras, embeddings=embeddings, **settings)
    template, picture_format = values.get("name") or NAME, values.get("format") or "png"
    decided = {"request": recorded(request), "model": folder.fingerprint, "name": template, "format": picture_format, **circumstances}
    digest = hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()[:32]
    seen[digest] += 1
    key = digest if seen[digest] == 1 else hashlib.sha256(f"{digest} {seen[digest]}".encode()).hexdigest()[:32]
    return Item(key, line, request, template, picture_format)
