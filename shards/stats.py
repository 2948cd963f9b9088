"""What a set of shards holds, in numbers: each column's distribution and missing values, and what each filter would drop."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from .check import Sample
from .columns import NUMBERS, Columns
from .filters import Filters, active, aspect_ratio, drop_reasons, smaller_side, verdicts

Range = tuple[float | None, float | None]
BINS = 30
_WORDS = 12  # of a column of words as many are told apart, the rest is "other"


@dataclass(frozen=True)
class Distribution:
    """The numbers of one column: how many samples have one, how many do not, lowest, median, highest, and a histogram.

    `counts[i]` samples lie from `edges[i]` up to `edges[i + 1]`, the last bin includes its upper edge. `kept` is the range that the filters keep,
    with None for no end, None without a filter. All of the histogram is empty when no sample has a number.
    """

    name: str
    present: int
    missing: int
    lowest: float | None
    median: float | None
    highest: float | None
    edges: tuple[float, ...]
    counts: tuple[int, ...]
    kept: Range | None


@dataclass(frozen=True)
class Words:
    """The words of one column with the number of samples that have each, most frequent first, and of those that have none.

    `kept` is the one word that the filters keep, None without a filter.
    """

    name: str
    missing: int
    counts: dict[str, int]
    kept: str | None


@dataclass(frozen=True)
class FilterEffect:
    """One filter given alone: how many samples it drops, how many of them for a missing value, and how many no other filter given would drop."""

    name: str
    dropped: int
    missing: int
    only: int


def distributions(samples: Sequence[Sample], filters: Filters) -> list[Distribution]:
    """Histograms of the numeric columns, of the smaller side and the aspect ratio that the filters look at, and of the captions' length."""
    columns = [sample.columns for sample in samples]
    ranges = _kept_ranges(filters)
    values: dict[str, list[float | None]] = {name: [getattr(each, name) for each in columns] for name in NUMBERS}
    values |= {
        "smaller_side": [smaller_side(each) for each in columns],
        "aspect": [aspect_ratio(each) for each in columns],
        "caption_characters": [len(sample.caption) for sample in samples],
    }
    return [_distribution(name, numbers, ranges.get(name)) for name, numbers in values.items()]


def words(samples: Sequence[Sample], filters: Filters) -> list[Words]:
    """Languages and NSFW words."""
    language = None if filters.language is None else filters.language.lower()
    return [_words(name, [getattr(sample.columns, name) for sample in samples], kept) for name, kept in (("language", language), ("nsfw", None))]


def effects(filters: Filters, columns: Sequence[Columns]) -> tuple[list[FilterEffect], int]:
    """What each active filter drops, and how many samples all of them drop together."""
    found: list[FilterEffect] = []
    reasons = [drop_reasons(filters, each) for each in columns]
    verdict = [verdicts(filters, each) for each in columns]
    for name in active(filters):
        mine = [any(reason in (name, f"{name} missing") for reason in each) for each in reasons]
        only = sum(own and len(each) == 1 for own, each in zip(mine, reasons, strict=True))
        found.append(FilterEffect(name, sum(mine), sum(each[name] is None for each in verdict), only))
    return found, sum(bool(each) for each in reasons)


def _distribution(name: str, values: Sequence[float | None], kept: Range | None) -> Distribution:
    numbers = np.array([value for value in values if value is not None], dtype=np.float64)
    missing = len(values) - len(numbers)
    if not len(numbers):
        return Distribution(name, 0, missing, None, None, None, (), (), kept)
    low, high = float(numbers.min()), float(numbers.max())
    if name in ("unsafe", "watermark"):
        edges = np.linspace(min(0.0, low), max(1.0, high), BINS + 1)
    elif name == "aspect":
        edges = np.geomspace(low / 1.05, high * 1.05, BINS + 1)
    else:
        spread = high - low if high > low else 1.0
        edges = np.linspace(low - spread / (2 * BINS), high + spread / (2 * BINS), BINS + 1)
    counts, _ = np.histogram(numbers, edges)
    return Distribution(name, len(numbers), missing, low, float(np.median(numbers)), high, tuple(map(float, edges)), tuple(map(int, counts)), kept)


def _words(name: str, values: Iterable[str | None], kept: str | None) -> Words:
    counts = Counter(values)
    missing = counts.pop(None, 0)
    common = {word: count for word, count in counts.most_common(_WORDS) if word is not None}
    rest = counts.total() - sum(common.values())
    return Words(name, missing, common | ({"other": rest} if rest else {}), kept)


def _kept_ranges(filters: Filters) -> dict[str, Range]:
    """Between which values of which column a sample passes the filters."""
    ranges: dict[str, Range] = {
        "unsafe": (None, filters.max_unsafe),
        "watermark": (None, filters.max_watermark),
        "similarity": (filters.min_similarity, None),
        f"aesthetic_{filters.aesthetic_version}": (filters.min_aesthetic, None),
        "smaller_side": (filters.min_size, None),
        "aspect": filters.aspect or (None, None),
    }
    return {name: limits for name, limits in ranges.items() if limits != (None, None)}
