"""Filters on closed cases: which side of each limit is kept, what a missing value means, V1 and V2, and the recipe."""

from typing import Any

import pytest
from tu_diffuse.errors import DataError, UsageError
from tu_diffuse.shards.columns import Columns
from tu_diffuse.shards.filters import PRESETS, Filters, active, check_filters, drop_reason, drop_reasons, make_filters

KEPT = None
LIMITS: list[tuple[dict[str, Any], dict[str, Any], str | None]] = [
    ({"language": "en"}, {"language": "en"}, KEPT),
    ({"language": "EN"}, {"language": "en"}, KEPT),
    ({"language": "en"}, {"language": "de"}, "language"),
    ({"max_unsafe": 0.1}, {"unsafe": 0.0}, KEPT),
    ({"max_unsafe": 0.1}, {"unsafe": 0.0999}, KEPT),
    ({"max_unsafe": 0.1}, {"unsafe": 0.1}, "unsafe"),
    ({"max_unsafe": 0.1}, {"unsafe": 0.9}, "unsafe"),
    ({"max_unsafe": 0.1}, {"nsfw": "UNLIKELY"}, KEPT),
    ({"max_unsafe": 0.1}, {"nsfw": "UNSURE"}, "unsafe"),
    ({"max_unsafe": 0.1}, {"nsfw": "NSFW"}, "unsafe"),
    ({"max_unsafe": 0.1}, {"nsfw": "?"}, "unsafe missing"),
    ({"max_unsafe": 0.1}, {"nsfw": "NSFW", "unsafe": 0.0}, KEPT),  # a probability says more than a word
    ({"max_unsafe": 0.1}, {"nsfw": "UNLIKELY", "unsafe": 0.5}, "unsafe"),
    ({"min_aesthetic": 4.5}, {"aesthetic_v2": 4.5}, "aesthetic"),
    ({"min_aesthetic": 4.5}, {"aesthetic_v2": 4.5001}, KEPT),
    ({"min_aesthetic": 4.5}, {"aesthetic_v1": 9.0}, "aesthetic missing"),
    ({"min_aesthetic": 4.5, "aesthetic_version": "v1"}, {"aesthetic_v1": 9.0}, KEPT),
    ({"min_aesthetic": 4.5, "aesthetic_version": "v1"}, {"aesthetic_v1": 1.0, "aesthetic_v2": 9.0}, "aesthetic"),
    ({"min_aesthetic": 4.5, "aesthetic_version": "v1"}, {"aesthetic_v2": 9.0}, "aesthetic missing"),
    ({"min_aesthetic": -1.0}, {"aesthetic_v2": 0.0}, KEPT),
    ({"max_watermark": 0.5}, {"watermark": 0.0}, KEPT),
    ({"max_watermark": 0.5}, {"watermark": 0.5}, "watermark"),
    ({"min_similarity": 0.3}, {"similarity": 0.3}, KEPT),
    ({"min_similarity": 0.3}, {"similarity": 0.2999}, "similarity"),
    ({"min_similarity": 0.0}, {"similarity": 0.0}, KEPT),
    ({"min_size": 512}, {"width": 512, "height": 600}, KEPT),
    ({"min_size": 512}, {"width": 511, "height": 600}, "size"),
    ({"min_size": 512}, {"width": 512, "height": 512, "original_width": 300, "original_height": 300}, "size"),  # it was enlarged
    ({"min_size": 512}, {"width": 256, "height": 256, "original_width": 3000, "original_height": 3000}, "size"),  # it was made smaller
    ({"min_size": 512}, {"width": 512, "original_width": 3000, "original_height": 512}, KEPT),
    ({"min_size": 512}, {"width": 512}, "size missing"),
    ({"aspect": (0.5, 2.0)}, {"width": 10, "height": 20}, KEPT),
    ({"aspect": (0.5, 2.0)}, {"width": 20, "height": 10}, KEPT),
    ({"aspect": (0.5, 2.0)}, {"width": 21, "height": 10}, "aspect"),
    ({"aspect": (0.5, 2.0)}, {"width": 256, "height": 256, "original_width": 1000, "original_height": 100}, "aspect"),  # cropped or with borders
    ({"aspect": (0.5, 2.0)}, {"original_width": 1000}, "aspect missing"),
]


@pytest.mark.parametrize(("limits", "columns", "reason"), LIMITS)
def test_limits(limits: dict[str, Any], columns: dict[str, Any], reason: str | None):
    assert drop_reason(Filters(**limits), Columns(**columns)) == reason
    kept_when_missing = None if reason is not None and reason.endswith("missing") else reason
    assert drop_reason(Filters(**limits, missing="keep"), Columns(**columns)) == kept_when_missing
    assert drop_reason(Filters(), Columns(**columns)) is None


FULL = Columns(language="en", unsafe=0.05, watermark=0.1, similarity=0.3, aesthetic_v2=5.0, width=512, height=512)
ALL = Filters(language="en", max_unsafe=0.1, min_aesthetic=4.5, max_watermark=0.5, min_similarity=0.28, min_size=256, aspect=(0.5, 2.0))


@pytest.mark.parametrize("name", ["language", "unsafe", "aesthetic", "watermark", "similarity", "size", "aspect"])
def test_a_missing_value_is_dropped_or_kept_as_asked(name: str):
    lacking = {"aesthetic": "aesthetic_v2", "size": "width", "aspect": "width"}.get(name, name)
    given = {field: getattr(FULL, field) for field in Columns.__slots__ if field != lacking}
    expected = ("size missing", "aspect missing") if lacking == "width" else (f"{name} missing",)
    assert drop_reasons(ALL, FULL) == ()
    assert drop_reasons(ALL, Columns(**given)) == expected
    keep = Filters(**{field: getattr(ALL, field) for field in ALL.__dataclass_fields__ if field != "missing"}, missing="keep")
    assert drop_reasons(keep, Columns(**given)) == ()


def test_all_reasons_are_given_in_order():
    assert drop_reasons(ALL, Columns(language="de", unsafe=0.5, aesthetic_v2=1.0, similarity=0.1)) == (
        "language",
        "unsafe",
        "aesthetic",
        "watermark missing",
        "similarity",
        "size missing",
        "aspect missing",
    )


def test_the_recipe():
    recipe = make_filters("laion-aesthetic")
    assert recipe == PRESETS["laion-aesthetic"] == Filters(language="en", max_unsafe=0.1, min_aesthetic=4.5)
    assert active(recipe) == ("language", "unsafe", "aesthetic")
    assert drop_reason(recipe, Columns(language="en", unsafe=0.0, aesthetic_v2=4.6)) is None
    changed = make_filters("laion-aesthetic", max_unsafe=0.0, min_size=64, missing="keep", aspect=None)
    assert changed == Filters(language="en", max_unsafe=0.0, min_aesthetic=4.5, min_size=64, missing="keep")
    assert make_filters() == Filters()
    with pytest.raises(UsageError, match="'laion' is not known; use laion-aesthetic"):
        make_filters("laion")


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_unsafe": 1.5}, "--max-unsafe 1.5"),
        ({"max_unsafe": float("nan")}, "--max-unsafe nan"),
        ({"max_watermark": -0.1}, "--max-watermark -0.1"),
        ({"min_similarity": 30}, "--min-similarity 30"),
        ({"min_aesthetic": 100}, "--min-aesthetic 100"),
        ({"min_size": 0}, "--min-size 0"),
        ({"aspect": (2.0, 0.5)}, "--aspect 2,0.5"),
        ({"aspect": (0.0, 1.0)}, "--aspect 0,1"),
        ({"aspect": (1.0, float("inf"))}, "--aspect 1,inf"),
        ({"language": "e n"}, "--language 'e n'"),
        ({"missing": "ignore"}, "--missing 'ignore'"),
        ({"aesthetic_version": "v3"}, "--aesthetic-version 'v3'"),
    ],
)
def test_limits_that_make_no_sense_are_refused(limits: dict[str, Any], message: str):
    with pytest.raises(UsageError, match=message):
        Filters(**limits)


def test_a_filter_that_no_sample_can_answer_is_refused():
    with pytest.raises(DataError, match="No sample has a column for the filter watermark; leave this filter out"):
        check_filters(Filters(max_watermark=0.5, missing="keep"), [Columns(unsafe=0.1)] * 3)
    with pytest.raises(DataError, match=r"the filter aesthetic \(v2\); they have v1, see --aesthetic-version"):
        check_filters(Filters(min_aesthetic=5), [Columns(aesthetic_v1=6.0)] * 3)
    check_filters(Filters(max_watermark=0.5), [Columns(), Columns(watermark=0.0)])
