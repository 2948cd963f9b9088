"""LAION's columns under all spellings: what is there is read, what is missing stays missing, and zero is not missing."""

import math

import pytest
from tu_diffuse.shards.columns import Columns, read_columns

# What the tables' own names give; from the dataset cards and img2dataset's downloader.
TABLES = {
    "laion-2B-multi": (
        {"URL": "u", "TEXT": "t", "WIDTH": 640, "HEIGHT": 480, "LICENSE": "?", "NSFW": "UNLIKELY", "similarity": 0.31, "LANGUAGE": "en", "key": "0"},
        Columns(language="en", nsfw="UNLIKELY", similarity=0.31, original_width=640, original_height=480),
    ),
    "joined": (
        {"similarity": 0.3, "hash": -5, "punsafe": 0.01, "pwatermark": 0.2, "LANGUAGE": "DE"},
        Columns(language="de", unsafe=0.01, watermark=0.2, similarity=0.3),
    ),
    "laion-aesthetic": ({"aesthetic": 7.2, "pwatermark": 0.1}, Columns(aesthetic_v1=7.2, watermark=0.1)),
    "improved aesthetics": ({"AESTHETIC_SCORE": 5.4, "punsafe": 0.2}, Columns(aesthetic_v2=5.4, unsafe=0.2)),
    "both scores": ({"aesthetic": 7.0, "AESTHETIC_SCORE": 5.0}, Columns(aesthetic_v1=7.0, aesthetic_v2=5.0)),
    "coyo": (
        {"clip_similarity_vitb32": 0.2, "clip_similarity_vitl14": 0.3, "nsfw_score_opennsfw2": 0.4, "nsfw_score_gantman": 0.5, "watermark_score": 0.6,
         "aesthetic_score_laion_v2": 4.9},
        Columns(similarity=0.2, unsafe=0.4, watermark=0.6, aesthetic_v2=4.9),
    ),
    "datacomp": ({"clip_b32_similarity_score": 0.2, "clip_l14_similarity_score": 0.3}, Columns(similarity=0.2)),
    "img2dataset": (
        {"WIDTH": 800, "HEIGHT": 600, "width": 256, "height": 192, "original_width": 801, "original_height": 602, "exif": "{}", "status": "success"},
        Columns(width=256, height=192, original_width=801, original_height=602),
    ),
    "not loaded": ({"WIDTH": 800, "HEIGHT": 600, "width": None, "original_width": None}, Columns(original_width=800, original_height=600)),
    "nothing": ({}, Columns()),
}  # fmt: skip


@pytest.mark.parametrize("table", TABLES)
def test_tables(table: str):
    given, wanted = TABLES[table]
    assert read_columns(given) == wanted


@pytest.mark.parametrize(
    "name",
    ["punsafe", "PUNSAFE", "Punsafe", "pwatermark", "PWATERMARK", "similarity", "SIMILARITY", "aesthetic", "AESTHETIC_SCORE", "aesthetic_score"],
)
def test_zero_is_a_value_and_null_is_missing(name: str):
    canonical = {"p": "unsafe", "s": "similarity"}.get(name[0].lower(), "aesthetic_v2" if "score" in name.lower() else "aesthetic_v1")
    canonical = "watermark" if "water" in name.lower() else canonical
    for zero in (0, 0.0, -0.0, "0", "0.0"):
        assert getattr(read_columns({name: zero}), canonical) == 0.0
    for nothing in (None, math.nan, math.inf, "", "nan", "unknown", [], {}, True, 10**400):
        assert getattr(read_columns({name: nothing}), canonical) is None
    assert getattr(read_columns({name: "0.25"}), canonical) == 0.25


def test_the_first_spelling_with_a_value_counts():
    assert read_columns({"punsafe": None, "nsfw_score_opennsfw2": 0.5}).unsafe == 0.5
    assert read_columns({"punsafe": 0.0, "nsfw_score_opennsfw2": 0.5}).unsafe == 0.0
    assert read_columns({"similarity": "?", "clip_similarity_vitb32": 0.3}).similarity == 0.3


def test_sizes_are_whole_pixels():
    assert read_columns({"width": 0, "height": -3, "original_width": 12.0, "original_height": "34"}) == Columns(original_width=12, original_height=34)
    assert read_columns({"original_width": 0, "WIDTH": 5}).original_width == 5


def test_words():
    assert read_columns({"NSFW": "unsure", "language": " EN "}) == Columns(nsfw="UNSURE", language="en")
    assert read_columns({"NSFW": 3, "LANGUAGE": ""}) == Columns()
