"""The columns of LAION's tables, in all their spellings, under one name each.

A stored 0 is a value; null, NaN and text where a number belongs are missing. Sources: the dataset cards of LAION-400M, -2B, -5B, their -joined,
-aesthetic, -art and improved-aesthetics sets, COYO-700M and DataComp; img2dataset's downloader for the sizes.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from sys import intern

# Our name: the spellings, in lower case, of which the first that has a value counts.
ALIASES: dict[str, tuple[str, ...]] = {
    "language": ("language", "lang"),
    "unsafe": ("punsafe", "nsfw_score_opennsfw2"),
    "nsfw": ("nsfw",),
    "watermark": ("pwatermark", "watermark_score"),
    "similarity": ("similarity", "clip_similarity_vitb32", "clip_b32_similarity_score"),
    "aesthetic_v1": ("aesthetic",),
    "aesthetic_v2": ("aesthetic_score", "aesthetic_score_laion_v2"),
}
# img2dataset writes what it stored as width, height and what it downloaded as original_width, original_height; LAION's own WIDTH and HEIGHT are what
# the web page said. Here upper and lower case differ.
_ORIGINAL = (("original_width", "WIDTH"), ("original_height", "HEIGHT"))


@dataclass(frozen=True, slots=True)
class Columns:
    """What a sample's .json says; None is missing.

    `language` a lower-case code; `unsafe` and `watermark` probabilities; `nsfw` LAION-400M's word (UNLIKELY, UNSURE, NSFW); `similarity` the cosine
    of CLIP ViT-B/32 (ViT-L/14 in some later sets); `aesthetic_v1` LAION's first predictor, `aesthetic_v2` the improved one, both about 0..10 but
    on different scales; sizes in pixels, as stored and as downloaded.
    """

    language: str | None = None
    unsafe: float | None = None
    nsfw: str | None = None
    watermark: float | None = None
    similarity: float | None = None
    aesthetic_v1: float | None = None
    aesthetic_v2: float | None = None
    width: int | None = None
    height: int | None = None
    original_width: int | None = None
    original_height: int | None = None


NUMBERS = ("unsafe", "watermark", "similarity", "aesthetic_v1", "aesthetic_v2")


def read_columns(metadata: Mapping[str, object]) -> Columns:
    """The known columns of one sample's JSON object, whatever their spelling."""
    lower = {name.lower(): value for name, value in metadata.items() if value is not None}
    language, nsfw = (_word(lower.get(name) for name in ALIASES[column]) for column in ("language", "nsfw"))
    unsafe, watermark, similarity, first, second = (_number(lower.get(name) for name in ALIASES[column]) for column in NUMBERS)
    original_width, original_height = (_pixels(metadata.get(name) for name in names) for names in _ORIGINAL)
    return Columns(
        language=None if language is None else intern(language.lower()),
        unsafe=unsafe,
        nsfw=None if nsfw is None else intern(nsfw.upper()),
        watermark=watermark,
        similarity=similarity,
        aesthetic_v1=first,
        aesthetic_v2=second,
        width=_pixels([metadata.get("width")]),
        height=_pixels([metadata.get("height")]),
        original_width=original_width,
        original_height=original_height,
    )


def _word(values: Iterable[object]) -> str | None:
    return next((value.strip() for value in values if isinstance(value, str) and value.strip()), None)


def _number(values: Iterable[object]) -> float | None:
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            continue
        try:
            number = float(value)
        except (ValueError, OverflowError):
            continue
        if math.isfinite(number):
            return number
    return None


def _pixels(values: Iterable[object]) -> int | None:
    number = _number(value for value in values if value not in (0, "0"))
    return int(number) if number is not None and number >= 1 else None
