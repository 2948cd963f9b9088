from dataclasses import replace

import numpy as np
import pytest
from drawing import FONT, SHAPES
from oracle import evaluation_prompts, judge, score, softened
from recognition import label
from world import STAGES, Object, Scene, held_out, render

needs_font = pytest.mark.skipif(not FONT.exists(), reason="Noto Color Emoji is not installed")
STAGE_NAMES = ["shapes", pytest.param("stickers", marks=needs_font)]
STAR = Object("star", "red", "medium", 36, 64, 46)
CIRCLE = Object("circle", "blue", "medium", 92, 64, 46)
PAIR = Scene("white", (STAR, CIRCLE), "left of")


@pytest.mark.parametrize("stage", STAGE_NAMES)
def test_true_renders_are_right_and_shuffled_ones_wrong(stage):
    prompts, stickers = evaluation_prompts(30, 1, stage), STAGES[stage].stickers
    pictures = [render(p.scene) for p in prompts]
    soft = [softened(p, np.random.default_rng(i)) for i, p in enumerate(pictures)]
    assert score(pictures, prompts, stickers)["all_ok"] >= 0.97
    assert score(soft, prompts, stickers)["all_ok"] >= 0.9
    shuffled = score([*pictures[7:], *pictures[:7]], prompts, stickers)
    assert shuffled["all_ok"] <= 0.1
    assert shuffled["binding_ok"] <= 0.15


def test_prompts_are_fixed_held_out_and_of_every_category():
    prompts = evaluation_prompts(50, 2)
    assert prompts == evaluation_prompts(50, 2) != evaluation_prompts(50, 3)
    assert all(held_out(p.scene) for p in prompts)
    assert {p.category for p in prompts} == {"object", "colour", "position", "two objects", "relation"}
    named = [p for p in prompts if p.background_said]
    assert 10 < len(named) < 40
    assert all(p.scene.background in p.text for p in named)


def test_wrong_pictures_lose_exactly_what_is_wrong():
    said = judge(render(PAIR), PAIR)
    assert said.all_ok
    exchanged = judge(render(replace(PAIR, objects=(replace(STAR, colour="blue"), replace(CIRCLE, colour="red")))), PAIR)
    assert exchanged.objects_ok
    assert exchanged.colours_ok
    assert not exchanged.binding_ok
    assert not exchanged.relation_ok
    mirrored = judge(render(replace(PAIR, objects=(replace(STAR, x=92), replace(CIRCLE, x=36)))), PAIR)
    assert mirrored.binding_ok
    assert not mirrored.relation_ok
    alone = judge(render(Scene("white", (STAR,))), PAIR)
    assert not alone.count_ok
    assert not alone.objects_ok
    elsewhere = judge(render(replace(PAIR, background="beige")), PAIR)
    assert elsewhere.relation_ok
    assert not elsewhere.background_ok
    assert judge(render(replace(PAIR, background="beige")), PAIR, background=False).all_ok


def test_place_and_size_are_judged_when_said():
    corner = Scene("beige", (replace(STAR, x=28, y=28, place="top left"),))
    assert judge(render(corner), corner).all_ok
    moved = judge(render(Scene("beige", (replace(STAR, x=100, y=28),))), corner)
    assert moved.binding_ok
    assert not moved.position_ok
    small = Scene("beige", (replace(STAR, x=64, px=30, size="small"),))
    assert judge(render(small), small).all_ok
    assert not judge(render(Scene("beige", (replace(STAR, x=64, px=70),))), small).size_ok


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_is_no_other_shape(shape):
    picture = render(Scene("light blue", (Object(shape, "purple", "medium", 64, 64, 46),)))
    right = [other for other in SHAPES if judge(picture, Scene("light blue", (Object(other, "purple", "medium", 64, 64, 46),))).all_ok]
    assert right == [shape]


def test_empty_and_noisy_pictures_show_nothing():
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3)).astype(np.uint8)
    for picture in (np.zeros((128, 128, 3), np.uint8), np.full((128, 128, 3), 250, np.uint8), noise):
        judged = judge(picture, PAIR)
        assert not judged.objects_ok
        assert not judged.binding_ok
        assert not judged.all_ok


def test_equal_objects_are_counted():
    three = Scene("white", tuple(Object("star", "green", "medium", x, 64, 34) for x in (24, 64, 104)))
    assert judge(render(three), three).all_ok
    assert not judge(render(replace(three, objects=three.objects[:2])), three).count_ok


def test_labels_are_the_connected_regions():
    field = np.zeros((9, 9), bool)
    field[1:4, 1:4] = field[4, 4] = True  # touching at a corner
    field[7, 0:7] = True
    assert [int(r.sum()) for r in label(field)] == [10, 7]


def test_one_picture_for_each_prompt():
    with pytest.raises(ValueError, match="0 pictures for 5 prompts"):
        score([], evaluation_prompts(5))
