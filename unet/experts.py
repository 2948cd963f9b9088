"""The expert table: which U-Net denoises at which noise level, and `experts.json`, which stores it.

An expert owns sigma_min <= sigma < sigma_max: a border belongs to the noisier side, as in Wan 2.2 and SDXL's base and refiner. Routing looks at sigma
alone, never at a step's number, so it holds for any sampler, any schedule and any number of steps (eDiff-I, arXiv 2211.01324, section 4).
"""

import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..contracts import Conditioning, Denoiser
from ..errors import ModelError
from ..model_files import inside, read_json

_NAME = r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}"
VERSIONS = (1, 2)  # 2 where an expert reads prompts in its own way, which version 1 cannot say
PREFETCH_RATIO = 2.0
"""An expert's lower neighbour is prefetched once sigma is below this multiple of the border: two or three steps ahead in a run of 20 to 30 steps."""


def _nothing() -> None:
    """Prefetch of an expert that is always there."""


@dataclass(frozen=True, eq=False)
class Expert:
    """One expert.

    Attributes:
        name: what pictures and logs call it.
        sigma_min: lowest noise level that it owns.
        sigma_max: where its noise levels end; the next expert owns it. May be infinite.
        load: gives its denoiser, ready to run; called at every step, so it must be quick when nothing has to be loaded.
        guidance: its own guidance scale; None takes the run's.
        prefetch: told when its turn is near; must return at once and may be called often.
        identity: what it computes with; neighbours of equal identity compute the same, as fresh children of a fork do. None is like no other.
    """

    name: str
    sigma_min: float
    sigma_max: float
    load: Callable[[], Denoiser]
    guidance: float | None = None
    prefetch: Callable[[], None] = _nothing
    identity: object = None


class ExpertTable:
    """A `Denoiser` that asks the expert who owns the noise level."""

    def __init__(self, experts: Sequence[Expert], covers: tuple[float, float] = (0.0, math.inf)) -> None:
        """Check the table.

        Args:
            experts: in any order.
            covers: (lowest, highest) sigma that the run may ask for.

        Raises:
            ModelError: no experts, an interval that is none, a gap or an overlap, or `covers` is not covered; says between which sigmas.
        """
        self.experts = tuple(sorted(experts, key=lambda expert: expert.sigma_min))
        check_intervals([(e.name, e.sigma_min, e.sigma_max) for e in self.experts], covers)

    @property
    def borders(self) -> tuple[float, ...]:
        """The sigmas at which the expert changes to another that computes something else, rising; each belongs to the expert above it."""
        pairs = pairwise(self.experts)
        return tuple(above.sigma_min for below, above in pairs if below.identity is None or below.identity != above.identity)

    def expert_for(self, sigma: float) -> Expert:
        """The expert that owns a noise level.

        Raises:
            ModelError: none does (or sigma is NaN).
        """
        for expert in self.experts:
            if expert.sigma_min <= sigma < expert.sigma_max:
                return expert
        low, high = self.experts[0].sigma_min, self.experts[-1].sigma_max
        raise ModelError(f"No expert owns sigma {sigma:g}, they cover {low:g} up to {high:g}; choose a schedule inside.")

    def __call__(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """Predict x0; see `contracts.Denoiser`. Rows that belong to different experts are computed apart and joined again.

        Raises:
            ModelError: no expert owns a row's sigma.
        """
        levels: list[float] = sigma.tolist()
        owners = [self.expert_for(level) for level in levels]
        if not owners:
            raise ValueError("The batch has no rows.")
        x0 = self._split(x, sigma, conditioning, owners) if len(set(owners)) > 1 else owners[0].load()(x, sigma, conditioning)
        lowest = min(levels)
        index = self.experts.index(self.expert_for(lowest))
        if index > 0 and lowest < PREFETCH_RATIO * self.experts[index].sigma_min:
            self.experts[index - 1].prefetch()
        return x0

    def _split(self, x: Tensor, sigma: Tensor, conditioning: Conditioning, owners: list[Expert]) -> Tensor:
        x0 = torch.empty_like(x)
        for expert in self.experts:
            rows = [row for row, owner in enumerate(owners) if owner is expert]
            if rows:
                x0[rows] = expert.load()(x[rows], sigma[rows], _rows(conditioning, rows))
        return x0


def check_intervals(intervals: Sequence[tuple[str, float, float]], covers: tuple[float, float] = (0.0, math.inf)) -> None:
    """Check that (name, sigma_min, sigma_max), rising, leave no gap and do not overlap.

    Raises:
        ModelError: they do not; says where.
    """
    if not intervals:
        raise ModelError("The expert table is empty; at least one expert was wanted.")
    names = [name for name, _, _ in intervals]
    if len(set(names)) < len(names):
        raise ModelError(f"Two experts have the same name ({', '.join(names)}); rename one.")
    for name, low, high in intervals:
        if not 0 <= low < high or math.isinf(low):
            raise ModelError(f"Expert {name!r} has the sigma interval {low:g} to {high:g}; wanted 0 <= sigma_min < sigma_max.")
    for (name, _, end), (next_name, start, _) in pairwise(intervals):
        if start != end:
            what = "a gap" if start > end else "an overlap"
            raise ModelError(
                f"There is {what} between the experts {name!r} and {next_name!r}, sigma {min(start, end):g} to {max(start, end):g}; make them meet."
            )
    lowest, highest = intervals[0][1], intervals[-1][2]
    if lowest > covers[0]:
        raise ModelError(f"No expert covers sigma {covers[0]:g} to {lowest:g}; extend {names[0]!r} downward.")
    # The end of the last interval is outside it, so a finite highest sigma must lie below.
    if highest < covers[1] or (highest == covers[1] and math.isfinite(highest)):
        raise ModelError(f"No expert covers sigma {highest:g} to {covers[1]:g}; extend {names[-1]!r} upward.")


@dataclass(frozen=True)
class ExpertText:
    """How an expert reads prompts, where it does not read them as the rest of the model does (SDXL's refiner has one text encoder, its base two).

    Attributes:
        family: see `pipeline.model.folder.ModelFolder.family`.
        parts: part of that family, such as "text_encoder_2" -> the component of the model folder that plays it.
        zero_negative: see `pipeline.model.folder.ModelFolder.zero_negative`.
    """

    family: str
    parts: Mapping[str, str]
    zero_negative: bool


@dataclass(frozen=True)
class ExpertEntry:
    """One entry of `experts.json`.

    Attributes:
        name: letters, digits, dot, dash and underscore.
        subfolder: of its U-Net, inside the model folder: whole weights, or a delta against another expert's (see `deltas.py`).
        sigma_min: as in `Expert`.
        sigma_max: as in `Expert`; infinity is written as null.
        guidance: as in `Expert`.
        parent: name of the expert that it was forked from; need not be there any more.
        sha256: of its weights (`deltas.expert_sha256`), 64 hex digits.
        text: how it reads prompts; None as the model folder does.
    """

    name: str
    subfolder: str
    sigma_min: float = 0.0
    sigma_max: float = math.inf
    guidance: float | None = None
    parent: str | None = None
    sha256: str | None = None
    text: ExpertText | None = None


def read_experts(folder: Path) -> tuple[ExpertEntry, ...]:
    """Read a model folder's `experts.json`, from low to high noise; without one, the folder is an ensemble of its `unet/` alone.

    Raises:
        ModelError: the file is not valid, of an unknown version, points outside the folder, or its intervals leave a gap or overlap.
    """
    path = folder / "experts.json"
    if not path.exists():
        return (ExpertEntry("unet", "unet"),)
    content = read_json(path)
    if content.get("version") not in VERSIONS or isinstance(content.get("version"), bool):
        raise ModelError(f"{path} has version {content.get('version')!r}, this program reads versions {' and '.join(map(str, VERSIONS))}; update it.")
    listed = content.get("experts")
    if not isinstance(listed, list) or not 1 <= len(listed) <= 1000:
        raise ModelError(f"{path} has no list of 1 to 1000 experts; write it again.")
    entries = sorted((_entry(path, item) for item in listed), key=lambda entry: entry.sigma_min)
    check_intervals([(e.name, e.sigma_min, e.sigma_max) for e in entries])
    _check_parents(path, entries)
    return tuple(entries)


def write_experts(folder: Path, entries: Sequence[ExpertEntry]) -> Path:
    """Write `experts.json`, under a temporary name first.

    Raises:
        ModelError: the entries would be refused by `read_experts`.
        OSError: the file could not be written.
    """
    path = folder / "experts.json"
    listed = [_item(entry) for entry in entries]
    version = 1 if all(entry.text is None for entry in entries) else 2
    ordered = sorted((_entry(path, item) for item in listed), key=lambda entry: entry.sigma_min)
    check_intervals([(e.name, e.sigma_min, e.sigma_max) for e in ordered])
    _check_parents(path, ordered)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump({"version": version, "experts": listed}, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    return path


def _check_parents(path: Path, entries: Sequence[ExpertEntry]) -> None:
    """Parents that are experts too must not go round in a circle."""
    parents = {entry.name: entry.parent for entry in entries}
    for entry in entries:
        seen, name = {entry.name}, entry.parent
        while name in parents:
            if name in seen:
                raise ModelError(f"{path} has experts that are their own ancestors ({', '.join(sorted(seen))}); correct their parents.")
            seen.add(name)
            name = parents[name]


def _entry(path: Path, item: Any) -> ExpertEntry:
    if not isinstance(item, dict) or item.keys() - ExpertEntry.__dataclass_fields__.keys():
        raise ModelError(f"{path} has an expert {item!r:.200}; wanted an object with {', '.join(ExpertEntry.__dataclass_fields__)}.")
    name, subfolder = item.get("name"), item.get("subfolder")
    if not isinstance(name, str) or not re.fullmatch(_NAME, name):
        raise ModelError(f"{path} has an expert named {name!r:.200}; wanted 1 to 64 letters, digits, dots, dashes and underscores, no dot first.")
    inside(path.parent, subfolder)
    low, high = _number(path, item, "sigma_min"), math.inf if item.get("sigma_max") is None else _number(path, item, "sigma_max")
    guidance = None if item.get("guidance") is None else _number(path, item, "guidance")
    for field, pattern in (("parent", _NAME), ("sha256", r"[0-9a-f]{64}")):
        value = item.get(field)
        if value is not None and not (isinstance(value, str) and re.fullmatch(pattern, value)):
            raise ModelError(f"{path} gives expert {name!r} {field} {value!r:.200}; wanted null or text like {pattern}.")
    text = None if item.get("text") is None else _text(path, name, item["text"])
    return ExpertEntry(name, str(subfolder), low, high, guidance, item.get("parent"), item.get("sha256"), text)


def _text(path: Path, name: str, item: Any) -> ExpertText:
    match item:
        case {"family": str(family), "parts": dict(parts), "zero_negative": bool(zeros), **rest} if not rest:
            if all(isinstance(word, str) and re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}", word) for pair in parts.items() for word in pair):
                return ExpertText(family, {str(part): str(component) for part, component in parts.items()}, zeros)
        case _:
            pass
    raise ModelError(f"{path} gives expert {name!r} text {item!r:.200}; wanted family, parts (part -> component) and zero_negative.")


def _item(entry: ExpertEntry) -> dict[str, Any]:
    item = asdict(entry) | {"sigma_max": None if math.isinf(entry.sigma_max) else entry.sigma_max}
    return item if entry.text is not None else {name: value for name, value in item.items() if name != "text"}


def _number(path: Path, item: dict[str, Any], field: str) -> float:
    value = item.get(field)
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    raise ModelError(f"{path} gives expert {item.get('name')!r} {field} = {value!r:.200}; wanted a finite number.")


def _rows(conditioning: Conditioning, rows: list[int]) -> Conditioning:
    rest = (conditioning.mask, conditioning.pooled, conditioning.size_ids, conditioning.shown, conditioning.hint)
    return Conditioning(conditioning.tokens[rows], *(None if t is None else t[rows] for t in rest))
