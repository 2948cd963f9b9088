"""Curves over the steps of a run, drawn with Pillow: a panel with axes, thin and thick lines, and a legend with each curve's last value."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]

WIDTH, HEIGHT = 620, 340  # of one panel in pixels
_SCALE = 2  # drawn larger and reduced, so that lines are smooth
_LEFT, _TOP, _BOTTOM, _LEGEND = 62, 44, 34, 132
INK, SOFT, GRID, BLUE = (32, 32, 36), (120, 120, 128), (230, 231, 235), (54, 116, 181)


@dataclass(frozen=True)
class Curve:
    """A line through (step, value) points; `faint` ones are drawn thin and pale and are not in the legend."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: Colour = BLUE
    faint: bool = False


@dataclass(frozen=True)
class Panel:
    """Curves that share their axes; there is at least one, with at least one point. `linear` keeps the axis of the values so."""

    title: str
    curves: Sequence[Curve]
    linear: bool = False


def colours(count: int) -> list[Colour]:
    """`count` colours from violet over blue and green to orange, for curves that have an order."""
    stops = [(96, 60, 150), (54, 116, 181), (40, 150, 140), (110, 170, 70), (225, 165, 40), (208, 70, 50)]
    places = [i * (len(stops) - 1) / max(1, count - 1) for i in range(count)]
    pairs = [(stops[int(p)], stops[min(int(p) + 1, len(stops) - 1)], p % 1) for p in places]
    return [(round(a[0] + (b[0] - a[0]) * x), round(a[1] + (b[1] - a[1]) * x), round(a[2] + (b[2] - a[2]) * x)) for a, b, x in pairs]


def smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """A centred mean over a tenth of the points."""
    reach = len(points) // 20
    windows = [points[max(0, i - reach) : i + reach + 1] for i in range(len(points))]
    return [(step, sum(value for _, value in window) / len(window)) for (step, _), window in zip(points, windows, strict=True)]


def draw_panel(panel: Panel) -> Image.Image:
    """Draw a panel, WIDTH by HEIGHT, RGB; the values' axis is logarithmic where they are positive and differ over 30 times, unless `linear`."""
    picture = Image.new("RGB", (WIDTH * _SCALE, HEIGHT * _SCALE), "white")
    draw = ImageDraw.Draw(picture)
    values = [value for curve in panel.curves for _, value in curve.points]
    steps = [step for curve in panel.curves for step, _ in curve.points]
    logarithmic = not panel.linear and min(values) > 0 and max(values) > 30 * min(values)
    low, high = _limits(values, logarithmic)
    first, last = (min(steps), max(steps)) if max(steps) > min(steps) else (min(steps) - 1, max(steps) + 1)
    right, floor = WIDTH - _LEGEND - 14, HEIGHT - _BOTTOM

    def place(step: float, value: float) -> tuple[float, float]:
        height = (_scaled(value, logarithmic) - low) / (high - low)
        return (_LEFT + (step - first) / (last - first) * (right - _LEFT)) * _SCALE, (floor - height * (floor - _TOP)) * _SCALE

    draw.text((14 * _SCALE, 10 * _SCALE), panel.title, INK, _font(17))
    for tick in _ticks(low, high, logarithmic):
        y = place(first, tick)[1]
        draw.line((_LEFT * _SCALE, y, right * _SCALE, y), GRID, _SCALE)
        draw.text(((_LEFT - 7) * _SCALE, y), f"{tick:.4g}", SOFT, _font(12), anchor="rm")
    for tick in _ticks(first, last, False):
        x = place(tick, 10**low if logarithmic else low)[0]
        draw.line((x, floor * _SCALE, x, (floor + 4) * _SCALE), SOFT, _SCALE)
        draw.text((x, (floor + 7) * _SCALE), f"{tick:g}", SOFT, _font(12), anchor="ma")
    draw.line((_LEFT * _SCALE, floor * _SCALE, right * _SCALE, floor * _SCALE), SOFT, _SCALE)
    for curve in sorted(panel.curves, key=lambda curve: not curve.faint):
        colour = _pale(curve.colour) if curve.faint else curve.colour
        line = [place(step, value) for step, value in curve.points]
        if len(line) > 1:
            draw.line(line, colour, _SCALE if curve.faint else 2 * _SCALE, joint="curve")
        if len(line) <= 12:
            for x, y in line:
                draw.ellipse((x - 3 * _SCALE, y - 3 * _SCALE, x + 3 * _SCALE, y + 3 * _SCALE), colour)
    for row, curve in enumerate(curve for curve in panel.curves if not curve.faint):
        y = (_TOP + 6 + row * 22) * _SCALE
        draw.line(((right + 14) * _SCALE, y, (right + 28) * _SCALE, y), curve.colour, 3 * _SCALE)
        draw.text(((right + 34) * _SCALE, y), curve.name[:14], INK, _font(11), anchor="lm")
        draw.text(((WIDTH - 8) * _SCALE, y), f"{curve.points[-1][1]:.3g}", SOFT, _font(11), anchor="rm")
    return picture.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)


def _limits(values: Sequence[float], logarithmic: bool) -> tuple[float, float]:
    scaled = [_scaled(value, logarithmic) for value in values]
    low, high = min(scaled), max(scaled)
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return (0.0 if not logarithmic and 0 <= low < 0.4 * high else low - margin), high + margin


def _ticks(low: float, high: float, logarithmic: bool) -> list[float]:
    """Round values between two limits, which are exponents of ten where `logarithmic`: 1, 2 or 5 times a power of ten, about five of them."""
    if logarithmic:
        found = [factor * 10.0**power for power in range(math.floor(low), math.ceil(high) + 1) for factor in (1, 2, 5)]
        inside = [tick for tick in found if low <= math.log10(tick) <= high]
        return inside if len(inside) <= 7 else [tick for tick in inside if math.log10(tick) % 1 < 1e-9]
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _scaled(value: float, logarithmic: bool) -> float:
    return math.log10(value) if logarithmic else value


def _pale(colour: Colour) -> Colour:
    red, green, blue = ((2 * 255 + part) // 3 for part in colour)
    return red, green, blue


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size * _SCALE)
