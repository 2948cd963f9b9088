"""Which samples to train on, by the columns of LAION's tables."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..errors import DataError, UsageError
from .columns import Columns

Missing = Literal["keep", "drop"]
NAMES = ("language", "unsafe", "aesthetic", "watermark", "similarity", "size", "aspect")


@dataclass(frozen=True)
class Filters:
    """What a sample must be to be kept; None asks for nothing.

    Attributes:
        language: equal to this code, without regard to case.
        max_unsafe: probability strictly below, as in LAION's recipes (punsafe < 0.1). Where a set has no probability but LAION-400M's word, UNLIKELY
            passes, and UNSURE and NSFW are dropped.
        min_aesthetic: score strictly above.
        aesthetic_version: which score that is, of the first ("v1") or the improved predictor ("v2"); their scales differ.
        max_watermark: probability strictly below.
        min_similarity: cosine at least.
        min_size: the smaller side in pixels at least, both of what is stored and, where it is known, of the original.
        aspect: width / height of the original (where unknown: as stored) between the two, both included.
        missing: "drop" or "keep" a sample that lacks what a filter asks about. A stored 0 is not missing.

    Raises:
        UsageError: at construction, a limit that no sample or every sample meets.
    """

    language: str | None = None
    max_unsafe: float | None = None
    min_aesthetic: float | None = None
    aesthetic_version: Literal["v1", "v2"] = "v2"
    max_watermark: float | None = None
    min_similarity: float | None = None
    min_size: int | None = None
    aspect: tuple[float, float] | None = None
    missing: Missing = "drop"

    def __post_init__(self) -> None:
        for option, value, low, high in (
            ("max-unsafe", self.max_unsafe, 0.0, 1.0),
            ("min-aesthetic", self.min_aesthetic, -10.0, 20.0),
            ("max-watermark", self.max_watermark, 0.0, 1.0),
            ("min-similarity", self.min_similarity, -1.0, 1.0),
            ("min-size", self.min_size, 1, 65536),
        ):
            if value is not None and not low <= value <= high:
                raise UsageError(f"--{option} {value} is out of range; give a number from {low:g} to {high:g}.")
        if self.language is not None and not self.language.isalpha():
            raise UsageError(f"--language {self.language!r} is no language code; write for example en.")
        if self.aspect is not None and not 0 < self.aspect[0] <= self.aspect[1] < math.inf:
            raise UsageError(f"--aspect {self.aspect[0]:g},{self.aspect[1]:g} is no range of width / height; write for example 0.5,2.")
        for option, value, known in (("aesthetic-version", self.aesthetic_version, ("v1", "v2")), ("missing", self.missing, ("keep", "drop"))):
            if value not in known:
                raise UsageError(f"--{option} {value!r} is not known; use {' or '.join(known)}.")


# The recipe of LAION's aesthetic subsets: English, unsafe < 0.1, aesthetic > 4.5 of the improved predictor.
PRESETS = {"laion-aesthetic": Filters(language="en", max_unsafe=0.1, min_aesthetic=4.5)}


def make_filters(preset: str | None = None, **limits: object) -> Filters:
    """The filters of a preset, changed by every limit that is not None; limits are the attributes of `Filters`.

    Raises:
        UsageError: the preset is not known, or as `Filters`.
    """
    if preset is not None and preset not in PRESETS:
        raise UsageError(f"--filter {preset!r} is not known; use {', '.join(PRESETS)}, or the single filters such as --max-unsafe.")
    given: dict[str, Any] = {name: limit for name, limit in limits.items() if limit is not None}
    return replace(Filters() if preset is None else PRESETS[preset], **given)


def aspect_range(text: str | None) -> tuple[float, float] | None:
    """The two numbers of "low,high"; None stays None.

    Raises:
        UsageError: it is not two numbers.
    """
    if text is None:
        return None
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--aspect {text!r} is not two numbers; write for example 0.5,2.") from None
    return low, high


def drop_reasons(filters: Filters, columns: Columns) -> tuple[str, ...]:
    """Every reason for which a sample is dropped, in the order of `NAMES`: a name where the value fails, "NAME missing" where there is none."""
    return tuple(
        name if passes is False else f"{name} missing"
        for name, passes in verdicts(filters, columns).items()
        if passes is False or (passes is None and filters.missing == "drop")
    )


def drop_reason(filters: Filters, columns: Columns) -> str | None:
    """The first reason for which a sample is dropped, None when it is kept; see `drop_reasons`."""
    return next(iter(drop_reasons(filters, columns)), None)


def verdicts(filters: Filters, columns: Columns) -> dict[str, bool | None]:
    """Whether a sample passes each active filter, None where it lacks what the filter asks about."""
    return {name: _passes(name, filters, columns) for name in active(filters)}


def active(filters: Filters) -> tuple[str, ...]:
    """The names, of `NAMES`, of the filters that ask for something."""
    limits = (
        filters.language,
        filters.max_unsafe,
        filters.min_aesthetic,
        filters.max_watermark,
        filters.min_similarity,
        filters.min_size,
        filters.aspect,
    )
    return tuple(name for name, limit in zip(NAMES, limits, strict=True) if limit is not None)


def check_filters(filters: Filters, columns: Sequence[Columns]) -> None:
    """Refuse a filter that asks about what no sample has: it would keep all or drop all, whatever its limit.

    Raises:
        DataError: such a filter, with the other version of the aesthetic score where the samples have that one.
    """
    for name in active(filters):
        if columns and all(_passes(name, filters, each) is None for each in columns):
            other = {"v1": "v2", "v2": "v1"}[filters.aesthetic_version]
            has_other = name == "aesthetic" and any((each.aesthetic_v1 if other == "v1" else each.aesthetic_v2) is not None for each in columns)
            what = f"{name} ({filters.aesthetic_version})" if name == "aesthetic" else name
            advice = f"they have {other}, see --aesthetic-version" if has_other else "leave this filter out"
            raise DataError(f"No sample has a column for the filter {what}; {advice}.")


def _passes(name: str, filters: Filters, columns: Columns) -> bool | None:
    match name:
        case "language":
            return None if columns.language is None else columns.language == str(filters.language).lower()
        case "unsafe":
            if columns.unsafe is not None:
                return columns.unsafe < _limit(filters.max_unsafe)
            return {"UNLIKELY": True, "UNSURE": False, "NSFW": False}.get(columns.nsfw or "")
        case "aesthetic":
            score = columns.aesthetic_v1 if filters.aesthetic_version == "v1" else columns.aesthetic_v2
            return None if score is None else score > _limit(filters.min_aesthetic)
        case "watermark":
            return None if columns.watermark is None else columns.watermark < _limit(filters.max_watermark)
        case "similarity":
            return None if columns.similarity is None else columns.similarity >= _limit(filters.min_similarity)
        case "size":
            side = smaller_side(columns)
            return None if side is None else side >= _limit(filters.min_size)
        case _:
            ratio, (low, high) = aspect_ratio(columns), filters.aspect or (0.0, math.inf)
            return None if ratio is None else low <= ratio <= high


def smaller_side(columns: Columns) -> int | None:
    """The smallest of the known sides, stored and original, in pixels; None when neither size is known."""
    sides = [(columns.width, columns.height), (columns.original_width, columns.original_height)]
    known = [min(width, height) for width, height in sides if width is not None and height is not None]
    return min(known, default=None)


def aspect_ratio(columns: Columns) -> float | None:
    """Width / height of the original, where unknown as stored; None when neither is known."""
    for width, height in ((columns.original_width, columns.original_height), (columns.width, columns.height)):
        if width is not None and height is not None:
            return width / height
    return None


def _limit(value: float | None) -> float:
    assert value is not None  # the filter is active
    return value
