"""The columns of a set of shards as one picture: a panel for each column, what the filters drop in grey."""

import itertools
import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from .stats import Distribution, Words

_COLUMNS = 3
_WIDTH, _HEIGHT = 440, 250  # of one panel in pixels
_LEFT, _TOP, _RIGHT, _BOTTOM = 24, 62, 24, 34  # what a panel keeps free around its bars
_INK, _SOFT, _BAR, _DROPPED, _LINE = (32, 32, 36), (120, 120, 128), (54, 116, 181), (196, 200, 206), (208, 70, 50)
_TITLES = {
    "unsafe": "unsafe (probability)",
    "watermark": "watermark (probability)",
    "similarity": "similarity of picture and text",
    "aesthetic_v1": "aesthetic score, V1",
    "aesthetic_v2": "aesthetic score, V2",
    "smaller_side": "smaller side (pixels)",
    "aspect": "width / height",
    "caption_characters": "caption (characters)",
    "nsfw": "NSFW word",
}


def draw_plot(distributions: Sequence[Distribution], words: Sequence[Words], title: str) -> Image.Image:
    """Draw the columns that have values, three panels in a row, under a title; the columns without any are named below it. RGB."""
    shown = [each for each in distributions if each.present]
    spoken = [each for each in words if each.counts]
    empty = [_TITLES.get(each.name, each.name) for each in distributions if not each.present]
    empty += [_TITLES.get(each.name, each.name) for each in words if not each.counts]
    rows = math.ceil((len(shown) + len(spoken)) / _COLUMNS)
    head = 84
    picture = Image.new("RGB", (_COLUMNS * _WIDTH, head + rows * _HEIGHT), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((_LEFT, 16), title, _INK, _font(24))
    if empty:
        draw.text((_LEFT, 52), f"without values: {', '.join(empty)}", _SOFT, _font(14))
    for place, panel in enumerate([*shown, *spoken]):
        origin = (place % _COLUMNS * _WIDTH, head + place // _COLUMNS * _HEIGHT)
        if isinstance(panel, Distribution):
            _draw_distribution(draw, origin, panel)
        else:
            _draw_words(draw, origin, panel)
    return picture


def _draw_distribution(draw: ImageDraw.ImageDraw, origin: tuple[int, int], panel: Distribution) -> None:
    x, y = origin
    _draw_head(draw, origin, panel.name, panel.present, panel.missing)
    logarithmic = panel.name == "aspect"
    first, last = (_scaled(edge, logarithmic) for edge in (panel.edges[0], panel.edges[-1]))
    left, width, floor = x + _LEFT, _WIDTH - _LEFT - _RIGHT, y + _HEIGHT - _BOTTOM

    def column(value: float) -> int:
        return left + round((min(max(_scaled(value, logarithmic), first), last) - first) / (last - first) * width)

    highest = max(panel.counts)
    lowest_kept, highest_kept = panel.kept or (None, None)
    low = -math.inf if lowest_kept is None else lowest_kept
    high = math.inf if highest_kept is None else highest_kept
    for count, start, end in zip(panel.counts, panel.edges[:-1], panel.edges[1:], strict=True):
        if count:
            top = floor - max(1, round(count / highest * (floor - y - _TOP)))
            kept = start >= low and end <= high
            for begin, stop, colour in _parts(start, end, low, high) if not kept else [(start, end, _BAR)]:
                if column(stop) - 1 > column(begin):
                    draw.rectangle((column(begin), top, column(stop) - 1 - (stop == end), floor - 1), colour)
    draw.line((left, floor, left + width, floor), _SOFT)
    small = _font(13)
    limits = [limit for limit in (low, high) if math.isfinite(limit)]
    for limit in limits:
        draw.line((column(limit), y + _TOP - 6, column(limit), floor), _LINE, 2)
    if limits:
        least = "above " if panel.name.startswith("aesthetic") else "from "
        sign = least if high == math.inf else "below " if low == -math.inf else ""
        text = f"kept: {sign}{' to '.join(map(_number, limits))}"
        draw.text((left + width, y + 32), text, _LINE, small, anchor="ra")
    draw.text((left, floor + 5), _number(panel.edges[0] if panel.name in ("unsafe", "watermark") else panel.lowest), _SOFT, small)
    draw.text(
        (left + width, floor + 5), _number(panel.edges[-1] if panel.name in ("unsafe", "watermark") else panel.highest), _SOFT, small, anchor="ra"
    )
    draw.text((left + width // 2, floor + 5), f"median {_number(panel.median)}", _SOFT, small, anchor="ma")


def _parts(start: float, end: float, low: float, high: float) -> list[tuple[float, float, tuple[int, int, int]]]:
    """A bar cut where the limits of what is kept run through it."""
    cuts = [start, *(limit for limit in (low, high) if start < limit < end), end]
    return [(a, b, _BAR if low <= (a + b) / 2 <= high else _DROPPED) for a, b in itertools.pairwise(cuts)]


def _draw_words(draw: ImageDraw.ImageDraw, origin: tuple[int, int], panel: Words) -> None:
    x, y = origin
    _draw_head(draw, origin, panel.name, sum(panel.counts.values()), panel.missing)
    small, most = _font(13), max(panel.counts.values())
    step = min(24, (_HEIGHT - _TOP - _BOTTOM) // len(panel.counts))
    for row, (word, count) in enumerate(panel.counts.items()):
        top = y + _TOP + row * step
        colour = _BAR if panel.kept in (None, word) else _DROPPED
        draw.text((x + _LEFT, top), _short(word), _INK, small)
        draw.rectangle((x + 130, top + 2, x + 130 + max(1, round(count / most * 200)), top + min(step - 3, 16)), colour)
        draw.text((x + 338, top), f"{count}", _SOFT, small)


def _draw_head(draw: ImageDraw.ImageDraw, origin: tuple[int, int], name: str, present: int, missing: int) -> None:
    x, y = origin
    draw.text((x + _LEFT, y + 8), _TITLES.get(name, name), _INK, _font(17))
    draw.text((x + _LEFT, y + 32), f"{present} samples" + (f", {missing} without" if missing else ""), _SOFT, _font(13))


def _short(word: str) -> str:
    text = "".join(letter for letter in word if letter.isprintable())
    return text if len(text) <= 12 else f"{text[:11]}…"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _scaled(value: float, logarithmic: bool) -> float:
    return math.log(value) if logarithmic and value > 0 else -math.inf if logarithmic else value


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
