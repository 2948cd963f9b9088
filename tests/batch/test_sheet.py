"""The contact sheet: which pixels and which words are on which page."""

import os
from pathlib import Path
from typing import Any

import pytest
from picture_folders import colour, picture_folder
from PIL import Image, ImageFont
from tu_diffuse.batch.lettering import Lettering
from tu_diffuse.batch.sheet import write_sheet
from tu_diffuse.pipeline.model.folder import ModelFolder

SIDE = 32  # of the tiny model's pictures
HAN = "赤い星が二つと青い月が一つあります"
MESSAGE = "cpu ran out of memory at one picture of 32×32; make it smaller."


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every line that is drawn."""
    lines: list[str] = []
    draw = Lettering.draw

    def spy(self: Lettering, picture: Image.Image, corner: tuple[float, float], text: str, colour: str) -> None:
        lines.append(text)
        draw(self, picture, corner, text, colour)

    monkeypatch.setattr(Lettering, "draw", spy)
    return lines


def areas(page: Path) -> dict[Any, int]:
    """Colour -> pixels."""
    with Image.open(page) as sheet:
        assert sheet.mode == "RGB"
        return {found: count for count, found in sheet.getcolors(1 << 24) or []}


def has_font(name: str) -> bool:
    try:
        ImageFont.truetype(name, 109)
    except OSError:
        return False
    return True


def test_each_picture_is_on_its_page(tmp_path: Path, ensemble: ModelFolder, items: Any):
    made = items(*({"prompt": f"picture {i}", "width": SIDE, "height": SIDE} for i in range(230)))
    pages = write_sheet(ensemble, picture_folder(tmp_path, made), tmp_path)
    assert [page.name for page in pages] == ["contact-sheet.png", "contact-sheet-2.png", "contact-sheet-3.png"]
    for number, page in enumerate(pages):
        on_it = areas(page)
        shown = [i for i in range(230) if on_it.get(colour(i), 0) == SIDE * SIDE]
        assert shown == list(range(number * 100, min(230, number * 100 + 100)))


def test_captions_say_what_differs_and_the_head_what_does_not(tmp_path: Path, ensemble: ModelFolder, items: Any, written: list[str]):
    made = items({"prompt": "a red star", "seed": 5}, {"prompt": "a blue moon", "seed": 5, "steps": 7}, sweep={"guidance": [1.0, 2.5, 4.0]}, steps=3)
    made += items({"prompt": "a third", "seed": 5}, steps=3, guidance=2.5)[:1]
    write_sheet(ensemble, picture_folder(tmp_path, made), tmp_path)
    assert written[0] == "7 pictures"
    assert f"model {ensemble.name} · seed 5 · size {made[0].request.width}x" in written[1]
    captions = [line for line in written if line.startswith("line ")]
    assert captions[:3] == ["line 1 · guidance 1", "line 1 · guidance 2.5", "line 1 · guidance 4"]
    assert "steps 3" in written[1]
    assert sum("steps 7" in line for line in captions) == 3
    assert [line for line in written if line == "a blue moon"] == ["a blue moon"] * 3


def test_failures_are_frames_with_the_reason_and_what_is_not_drawn_is_left_out(tmp_path: Path, ensemble: ModelFolder, items: Any, written: list[str]):
    made = items("first", "second", "third", width=SIDE, height=SIDE)
    (page,) = write_sheet(ensemble, picture_folder(tmp_path, made, failed={1: MESSAGE}, left={2: True}), tmp_path)
    assert written[0] == "1 picture · 1 failed"
    assert "second" in written
    assert "third" not in written
    end = written.index("second")
    assert MESSAGE in " ".join(written[end - 4 : end])
    assert areas(page)[(216, 216, 216)] > 4 * SIDE - 8  # its lines


def test_sizes_are_mixed_never_enlarged_and_never_stretched(tmp_path: Path, ensemble: ModelFolder, items: Any):
    made = items(
        {"prompt": "wide", "width": 512, "height": 128},
        {"prompt": "tall", "width": 64, "height": 256},
        {"prompt": "small", "width": 32, "height": 32},
    )
    (page,) = write_sheet(ensemble, picture_folder(tmp_path, made), tmp_path)
    assert [areas(page)[colour(i)] for i in range(3)] == [256 * 64, 64 * 256, 32 * 32]


def test_a_damaged_picture_costs_its_neighbours_nothing(tmp_path: Path, ensemble: ModelFolder, items: Any, written: list[str]):
    plan = picture_folder(tmp_path, items("one", "two", "three", width=SIDE, height=SIDE))
    damaged = tmp_path / plan.wanted[1].name
    damaged.write_bytes(damaged.read_bytes()[:60])
    (page,) = write_sheet(ensemble, plan, tmp_path)
    assert "damaged" in " ".join(written)
    assert [areas(page).get(colour(i), 0) for i in range(3)] == [SIDE * SIDE, 0, SIDE * SIDE]


def test_only_pages_that_change_are_written_and_old_ones_go(tmp_path: Path, ensemble: ModelFolder, items: Any):
    made = items(*(f"picture {i}" for i in range(205)), width=SIDE, height=SIDE)
    plan = picture_folder(tmp_path, made)
    pages = write_sheet(ensemble, plan, tmp_path)
    for page in pages:
        os.utime(page, ns=(1, 1))
    changed = tmp_path / plan.wanted[150].name
    Image.new("RGB", (SIDE, SIDE), "#ff00ff").save(changed)
    assert write_sheet(ensemble, plan, tmp_path) == pages
    assert [page.stat().st_mtime_ns == 1 for page in pages] == [True, False, True]
    assert areas(pages[1])[(255, 0, 255)] == SIDE * SIDE
    fewer = picture_folder(tmp_path, made[:90], before=plan)
    assert write_sheet(ensemble, fewer, tmp_path) == pages[:1]
    assert sorted(path.name for path in tmp_path.glob("contact-sheet*")) == ["contact-sheet.png"]


def test_a_picture_of_the_sheets_name_is_kept(tmp_path: Path, ensemble: ModelFolder, items: Any):
    made = items({"prompt": "mine", "name": "Contact-Sheet"}, width=SIDE, height=SIDE)
    plan = picture_folder(tmp_path, made)
    before = (tmp_path / plan.wanted[0].name).read_bytes()
    (page,) = write_sheet(ensemble, plan, tmp_path)
    assert page.name == "_contact-sheet.png"
    assert (tmp_path / plan.wanted[0].name).read_bytes() == before


def test_nothing_drawn_is_no_sheet(tmp_path: Path, ensemble: ModelFolder, items: Any):
    assert write_sheet(ensemble, picture_folder(tmp_path, items("a", "b"), left={0: True, 1: True}), tmp_path) == []


@pytest.mark.parametrize(
    "text",
    [
        "a red apple to the left of a blue star in the night sky",
        HAN * 3,
        "Donaudampfschifffahrtsgesellschaftskapitänsmütze" * 2,
        "жёлтая звезда и синяя луна над домом ⭐🌙 " * 2,
        "a\n\nb\tc",
    ],
)
def test_wrapped_lines_fit_and_keep_the_text(text: str):
    lettering = Lettering(13)
    whole = lettering.wrapped(text, 150, 99)
    assert all(lettering.width(line) <= 150.5 for line in whole)
    assert "".join("".join(whole).split()) == "".join(text.split())
    short = lettering.wrapped(text, 150, 2)
    assert len(short) == min(2, len(whole))
    assert short[-1].endswith("…") == (len(whole) > 2)
    assert all(lettering.width(line) <= 150.5 for line in short)


def test_what_no_font_has_is_a_box_and_said(tmp_path: Path, ensemble: ModelFolder, items: Any, written: list[str]):
    """A private-use character is in no font."""
    lettering = Lettering(13)
    assert lettering.lacks("a \ue5f3 b")
    assert not lettering.lacks("a ÿ b")
    drawn = [Image.new("RGB", (60, 20), "white") for _ in range(2)]
    lettering.draw(drawn[0], (2, 2), "a \ue5f3 b", "black")
    lettering.draw(drawn[1], (2, 2), "a   b", "black")
    assert drawn[0].tobytes() != drawn[1].tobytes()
    write_sheet(ensemble, picture_folder(tmp_path, items("a \ue5f3 b")), tmp_path)
    assert written[-1].startswith("Empty boxes stand for")


@pytest.mark.skipif(not has_font("NotoColorEmoji.ttf"), reason="needs Debian's fonts-noto-color-emoji")
def test_emoji_are_drawn_in_colour():
    lettering, picture = Lettering(13), Image.new("RGB", (80, 20), "white")
    assert not lettering.lacks("a ⭐ 👩‍🚀")
    lettering.draw(picture, (2, 2), "a ⭐", "black")
    assert any(red - blue > 100 for _, (red, _, blue) in picture.getcolors(10000) or [])
    assert lettering.width("👩‍🚀") == pytest.approx(lettering.width("⭐"))  # joined to one
