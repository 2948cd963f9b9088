"""The report of a run: its panels against the log, and a page that needs nothing but itself."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from tu_diffuse.training.curves import HEIGHT, WIDTH, Curve, Panel, _ticks, colours, draw_panel, smoothed
from tu_diffuse.training.run_report import SHOWN_STEPS, panels_of, picture_name, write_report

LOG = [
    {"step": s, "loss": 10 / s, "loss/t0-99": 5 / s, "loss/t100-199": 2 / s, "loss/expert/low": 4 / s, "loss/expert/high": 3 / s, "lr": 1e-4}
    for s in range(20, 400, 20)
]


def test_panels_hold_what_the_log_holds() -> None:
    panels = {panel.title: panel for panel in panels_of(LOG, [{"step": 100, "t100": 0.5, "t300": 0.25}])}
    assert list(panels["Training loss"].curves[0].points) == [(line["step"], line["loss"]) for line in LOG]
    assert [curve.name for curve in panels["Loss by noise level (timesteps)"].curves] == ["0-99", "100-199"]
    assert [curve.name for curve in panels["Loss by expert"].curves] == ["low", "high"]
    assert list(panels["Validation loss at fixed noise levels"].curves[1].points) == [(100, 0.25)]
    assert list(panels["Learning rate"].curves[0].points) == [(line["step"], 1e-4) for line in LOG]
    assert "Length of the gradient" not in panels
    alone = [{name: value for name, value in line.items() if name != "loss/expert/high"} for line in LOG]
    assert "Loss by expert" not in [panel.title for panel in panels_of(alone, [])]


def test_smoothing_keeps_a_line_and_calms_a_zigzag() -> None:
    straight = [(float(i), 2.0 * i) for i in range(100)]
    assert smoothed(straight)[50] == pytest.approx((50, 100))
    zigzag = smoothed([(float(i), float(i % 2)) for i in range(200)])
    assert all(0.4 < value < 0.6 for _, value in zigzag[10:-10])


@pytest.mark.parametrize(
    ("low", "high", "logarithmic", "ticks"),
    [
        (0.0, 1.0, False, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (18.0, 400.0, False, [100, 200, 300, 400]),
        (-1.1, 0.1, True, [0.1, 0.2, 0.5, 1]),
    ],
)
def test_ticks_are_round(low: float, high: float, logarithmic: bool, ticks: list[float]) -> None:
    assert _ticks(low, high, logarithmic) == pytest.approx(ticks)


def _blue(picture: Image.Image, x: int, y: int) -> bool:
    red, _, blue = picture.convert("RGB").getpixel((x, y))  # type: ignore[misc]
    return blue - red > 60


def test_a_falling_curve_is_drawn_from_the_upper_left_to_the_lower_right() -> None:
    picture = draw_panel(Panel("falls", [Curve("a", [(float(i), 100.0 - i) for i in range(100)])]))
    pixels = [(x, y) for x in range(62, WIDTH - 146) for y in range(44, HEIGHT - 36) if _blue(picture, x, y)]
    left, right = ([y for x, y in pixels if lower <= x < lower + 60] for lower in (62, WIDTH - 146 - 60))
    assert max(left) < min(right)


@pytest.mark.parametrize("points", [[(5.0, 0.3)], [(1.0, 0.0), (2.0, 0.0)], [(1.0, 1e-9), (2.0, 1e9)], [(1.0, -5.0), (9.0, 5.0)]])
def test_curves_of_every_shape_are_drawn(points: list[tuple[float, float]]) -> None:
    picture = draw_panel(Panel("any", [Curve("a", points, (200, 0, 0))]))
    assert any(picture.getpixel((x, y)) == (200, 0, 0) for x in range(62, WIDTH - 140) for y in range(40, HEIGHT - 30))


def test_colours_differ() -> None:
    assert len(set(colours(10))) == 10
    assert len(colours(1)) == 1


class Page(HTMLParser):
    """Collects what a page shows and loads."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_holds_all_it_shows(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "validation").mkdir()
    (tmp_path / "checkpoints" / "losses.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LOG))
    for step in range(1, 13):
        for number, colour in enumerate(("red", "blue")):
            Image.new("RGB", (64, 32), colour).save(tmp_path / "validation" / picture_name(step, number))
    prompts = ["a <b>red</b> star & more", "zwölf Äpfel"]
    write_report(tmp_path, "a run", {"lr": 1e-4, "prompts": prompts, "lora": None}, prompts)
    page = Page()
    page.feed((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert not re.search(r"https?://|<script", (tmp_path / "report.html").read_text(encoding="utf-8"))
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    pictures = [Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) for source in page.sources]
    curves, drawn = [p for p in pictures if p.width == WIDTH], [p for p in pictures if p.width != WIDTH]
    assert len(curves) == 4
    assert len(drawn) == 2 * SHOWN_STEPS
    assert [picture.getpixel((5, 5)) for picture in drawn[:2]] == [(255, 0, 0), (0, 0, 255)]
    for text in (*prompts, "step 1", "step 12", "0.0001"):
        assert text in page.text
    assert "lora" not in page.text
    with Image.open(tmp_path / "report.png") as poster:
        assert poster.width >= 2 * WIDTH
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "report.html", "report.png", "validation"]
