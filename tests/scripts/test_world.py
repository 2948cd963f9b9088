import itertools
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from drawing import FONT
from stickers import GLYPHS
from world import (
    COLOURS,
    INVERSE,
    SHAPES,
    STAGES,
    STICKERS,
    Object,
    Scene,
    all_captions,
    captions,
    document,
    fits,
    held_out,
    render,
    sample_scene,
    swap,
)

needs_font = pytest.mark.skipif(not FONT.exists(), reason="Noto Color Emoji is not installed")
STAGE_NAMES = ["shapes", pytest.param("stickers", marks=needs_font), pytest.param("full", marks=needs_font)]
WORDS = {
    "left of": ("to the left of", "left of"),
    "right of": ("to the right of", "right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}


def scenes(stage, count, seed=0, **options):
    rng = random.Random(seed)
    return [sample_scene(rng, STAGES[stage], **options) for _ in range(count)]


def read(caption):
    """First and second object of a relation as (left or upper, right or lower), read from the words alone."""
    for body in (caption.split(" on a ")[0],):
        for here, there in ((" on the left", " on the right"), (" at the top", " at the bottom")):
            if here in body and there in body:
                one, two = body.split(" and ")
                first, second = (one, two) if here in one else (two, one)
                return first.replace(here, ""), second.replace(there, "")
        for tail, before in ((" to its left", True), (" above it", True), (" to its right", False), (" below it", False)):
            if body.endswith(tail):
                one, two = body.removesuffix(tail).split(" with ")
                return (two, one) if before else (one, two)
        for relation, words in WORDS.items():
            for word in words:
                if f" {word} " in body:
                    one, two = body.split(f" {word} ")
                    return (one, two) if relation in ("left of", "above") else (two, one)
    raise AssertionError(caption)


@pytest.mark.parametrize("stage", STAGE_NAMES)
def test_same_seed_gives_the_same_scenes_pictures_and_captions(stage):
    first, again, other = scenes(stage, 20), scenes(stage, 20), scenes(stage, 20, seed=1)
    assert first == again
    assert first != other
    assert all(np.array_equal(render(a), render(b)) for a, b in zip(first, again, strict=True))
    assert [captions(s, random.Random(3)) for s in first] == [captions(s, random.Random(3)) for s in again]


def test_numpy_generators_serve_too():
    stage = STAGES["shapes"]
    assert sample_scene(np.random.default_rng(4), stage) == sample_scene(np.random.default_rng(4), stage)


@pytest.mark.parametrize("stage", STAGE_NAMES)
def test_training_never_sees_a_held_out_scene(stage):
    assert not any(held_out(s) for s in scenes(stage, 400))
    assert all(held_out(s) for s in scenes(stage, 60, held_out=True))


def test_held_out_pairs_leave_five_partners_to_every_shape_and_colour():
    def single(colour, shape):
        return Scene("white", (Object(shape, colour, "medium", 64, 64, 46),))

    pairs = {(c, s) for c in COLOURS for s in SHAPES if held_out(single(c, s))}
    assert {(c, s) for c, s in pairs if c in STAGES["shapes"].colours} == {
        ("orange", "triangle"),
        ("orange", "star"),
        ("yellow", "circle"),
        ("yellow", "crescent"),
        ("blue", "square"),
        ("purple", "heart"),
        ("purple", "ring"),
    }
    assert all(sum((c, s) not in pairs for s in SHAPES) >= 5 for c in COLOURS)
    assert all(sum((c, s) not in pairs for c in STAGES["shapes"].colours) >= 5 for s in SHAPES)


def test_pair_rule_is_about_the_order_in_the_picture():
    found = Counter()
    for scene in (s for s in scenes("shapes", 600) + scenes("shapes", 300, held_out=True) if s.relation not in (None, "and")):
        first, second = scene.objects
        said_otherwise = replace(scene, objects=(second, first), relation=INVERSE[scene.relation])
        assert held_out(said_otherwise) == held_out(scene)
        found[held_out(scene)] += 1
    assert min(found[True], found[False]) > 100


@pytest.mark.parametrize("stage", STAGE_NAMES)
def test_objects_are_apart_inside_and_visible(stage):
    for scene in scenes(stage, 200):
        assert fits(scene)
        picture = render(scene).astype(float)
        empty = render(replace(scene, objects=())).astype(float)
        for thing in scene.objects:
            box = tuple(slice(max(0, at - thing.px // 2), at + thing.px // 2) for at in (thing.y, thing.x))
            clear = np.linalg.norm(picture[box] - empty[box], axis=2) > 50
            assert clear.mean() > 0.15, scene


def test_relations_hold_in_the_picture():
    holds = {
        "left of": lambda a, b: a.x < b.x,
        "right of": lambda a, b: a.x > b.x,
        "above": lambda a, b: a.y < b.y,
        "below": lambda a, b: a.y > b.y,
        "and": lambda a, b: True,
    }
    related = [s for s in scenes("shapes", 300) if s.relation is not None]
    assert {s.relation for s in related} == set(holds)
    assert all(holds[s.relation](*s.objects) for s in related)


def test_pictures_differ_and_have_the_colours_of_their_objects():
    made = [s for s in scenes("shapes", 60) if s.count == 1 and s.objects[0].kind in ("circle", "square", "hexagon")]
    pictures = [render(s) for s in made]
    assert len({p.tobytes() for p in pictures}) == len(made) > 3
    for scene, picture in zip(made, pictures, strict=True):
        thing = scene.objects[0]
        assert picture.shape == (128, 128, 3)
        assert picture.dtype == np.uint8
        assert np.abs(picture[thing.y, thing.x].astype(int) - COLOURS[thing.colour]).max() <= 5


def test_edges_are_anti_aliased():
    scene = Scene("white", (Object("circle", "black", "big", 64, 64, 70),))
    assert len(np.unique(render(scene)[:, :, 0])) > 10


def test_smaller_pictures_are_averages():
    scene = scenes("shapes", 1)[0]
    large, small = render(scene).astype(float), render(scene, 64).astype(float)
    assert small.shape == (64, 64, 3)
    assert np.abs(large.reshape(64, 2, 64, 2, 3).mean(axis=(1, 3)) - small).max() <= 1
    with pytest.raises(ValueError, match="render_size is 100"):
        render(scene, 100)


@pytest.mark.parametrize("stage", ["shapes", pytest.param("full", marks=needs_font)])
def test_every_phrasing_of_a_relation_means_the_same(stage):
    for scene in [s for s in scenes(stage, 150) if s.relation not in (None, "and")]:
        said = all_captions(replace(scene, background="white"), background=False)
        assert len(said) >= 7
        assert len({read(text) for text in said}) == 1, said
        first, second = (o.kind for o in sorted(scene.objects, key=lambda o: (o.x, o.y)[scene.relation in ("above", "below")]))
        upper, lower = read(said[0])
        assert upper.endswith(first)
        assert lower.endswith(second)


def test_inverted_relation_is_among_the_phrasings():
    scene = Scene("white", (Object("star", "red", "medium", 30, 64, 46), Object("circle", "blue", "medium", 90, 64, 46)), "left of")
    said = all_captions(scene, background=False)
    assert {"a red star left of a blue circle", "a blue circle to the right of a red star", "a blue circle with a red star to its left"} <= set(said)
    assert not any("below" in text or "above" in text for text in said)


@pytest.mark.parametrize("stage", STAGE_NAMES)
def test_captions_are_short_lower_case_with_right_articles(stage):
    rng = random.Random(0)
    for scene in scenes(stage, 300):
        said = captions(scene, rng)
        assert said == said.lower().strip()
        assert "  " not in said
        assert len(said.split()) <= 24
        words = said.split()
        for article, word in itertools.pairwise(words):
            if article in ("a", "an"):
                assert (article == "an") == (word[0] in "aeiou" and word not in ("unicorn", "ufo")), said


def test_documents_join_two_or_three_phrasings():
    rng = random.Random(0)
    assert {document(s, rng).count(". ") for s in scenes("shapes", 40)} == {1, 2}


@needs_font
def test_natural_colours_and_counts_are_said():
    apple = Object("apple", None, "medium", 30, 64, 46)
    assert all_captions(Scene("white", (apple,)), background=False, natural=True) == ["a red apple"]
    star = Object("star", "green", "medium", 30, 64, 34)
    assert all_captions(Scene("white", (star, star, star)), background=False) == ["three green stars"]
    pair = Scene("white", (apple, Object("star", "blue", "medium", 90, 64, 46)), "left of")
    assert "a red apple to the left of a blue star" in all_captions(pair, background=False, natural=True)


@pytest.mark.parametrize("stage", STAGE_NAMES)
def test_hard_negatives_say_and_show_something_else(stage):
    rng = random.Random(0)
    for scene in scenes(stage, 150):
        other = swap(scene, rng)
        assert not held_out(other)
        assert fits(other)
        assert not set(all_captions(other)) & set(all_captions(scene))
        assert not np.array_equal(render(other), render(scene))


def test_there_are_150_stickers_with_the_first_twelve_of_the_stage():
    assert len(STICKERS) == len(set(GLYPHS.values())) == 150
    assert STICKERS[:12] == ("apple", "cat", "tree", "car", "house", "rocket", "sun", "pizza", "frog", "ghost", "banana", "fish")
