"""Sprites and backgrounds of the world: anti-aliased masks of shapes, emoji stickers and known scenes, each drawn once and kept.

Nothing here knows what a scene is; `world` puts the sprites in place. All pictures are 128 × 128 px, sRGB, uint8 or float32 in [0, 255].
"""

import functools
import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from stickers import FLAG, GLYPHS

SIDE = 128
FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")  # where Debian's fonts-noto-color-emoji puts it
FONT_PX = 109  # the only size that the bitmap font has

SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "star", "heart", "ring", "crescent", "hexagon")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (218, 36, 36),
    "orange": (246, 132, 26),
    "yellow": (250, 212, 26),
    "green": (36, 160, 66),
    "blue": (36, 92, 212),
    "purple": (126, 50, 180),
    "pink": (240, 104, 178),
    "black": (26, 26, 28),
    "brown": (120, 72, 38),
    "white": (252, 252, 252),
    "gray": (122, 124, 130),
    "cyan": (40, 202, 216),
}
PLAIN: dict[str, tuple[int, int, int]] = {
    "white": (250, 250, 250),
    "light blue": (172, 216, 240),
    "light green": (186, 228, 176),
    "pink": (250, 206, 220),
    "beige": (240, 226, 200),
    "gray": (174, 176, 182),
    "dark blue": (22, 32, 90),
}
SCENIC: dict[str, tuple[tuple[int, int, int], ...]] = {
    "beach": ((140, 208, 242), (48, 150, 204), (240, 216, 162)),  # sky, sea, sand
    "night": ((20, 24, 62), (28, 58, 56)),  # sky, hills
    "meadow": ((152, 212, 246), (112, 188, 82)),  # sky, grass
}
BACKGROUNDS: tuple[str, ...] = (*PLAIN, *SCENIC)
MIN_CONTRAST = 100.0  # euclidean distance in sRGB between an object and every area of its background
MAX_ALIKE = 0.35  # share of a sticker's pixels that may be nearer than 60 to an area of its background

_OVERSAMPLE = 4
_FILL = {"square": 0.9, "star": 1.1, "triangle": 1.04}  # side of the bounding box by nominal size, so that areas look alike

Mask = npt.NDArray[np.float32]
Picture = npt.NDArray[np.uint8]


def _polygon(points: list[tuple[float, float]], px: int) -> Image.Image:
    """Fill `points` (any units, y down) scaled so that the longer side of their bounding box is `px`."""
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    scale = px / max(max(xs) - min(xs), max(ys) - min(ys))
    size = (round((max(xs) - min(xs)) * scale), round((max(ys) - min(ys)) * scale))
    image = Image.new("L", size)
    ImageDraw.Draw(image).polygon([((x - min(xs)) * scale, (y - min(ys)) * scale) for x, y in points], fill=255)
    return image


def _regular(corners: int, start: float, inner: float | None = None) -> list[tuple[float, float]]:
    """Corners of a regular polygon on the unit circle, the first at `start` degrees; with `inner`, of a star with that inner radius."""
    count = corners if inner is None else 2 * corners
    radius = [1.0 if inner is None or i % 2 == 0 else inner for i in range(count)]
    angles = [math.radians(start + 360 * i / count) for i in range(count)]
    return [(r * math.cos(a), r * math.sin(a)) for r, a in zip(radius, angles, strict=True)]


def _crescent(horn: float, centre: float) -> list[tuple[float, float]]:
    """The unit circle less a circle around (`centre`, 0) that meets it at the angles ±`horn`, in radians."""
    outer = np.linspace(horn, 2 * math.pi - horn, 120)
    bite = math.atan2(math.sin(horn), math.cos(horn) - centre)
    inner = np.linspace(2 * math.pi - bite, bite, 120)
    radius = math.hypot(math.cos(horn) - centre, math.sin(horn))
    x, y = np.concatenate([np.cos(outer), centre + radius * np.cos(inner)]), np.concatenate([np.sin(outer), radius * np.sin(inner)])
    return list(zip(x.tolist(), y.tolist(), strict=True))


def _outline(shape: str, px: int) -> Image.Image:
    """`shape` as a hard-edged mask, longer side `px`, tight in its picture."""
    match shape:
        case "square":
            return Image.new("L", (px, px), 255)
        case "triangle":
            return _polygon(_regular(3, -90), px)
        case "star":
            return _polygon(_regular(5, -90, inner=0.45), px)
        case "hexagon":
            return _polygon(_regular(6, 0), px)
        case "heart":
            t = np.linspace(0, 2 * np.pi, 200)
            x, y = 16 * np.sin(t) ** 3, -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
            return _polygon(list(zip(x.tolist(), y.tolist(), strict=True)), px)
        case "crescent":
            return _polygon(_crescent(horn=math.radians(52), centre=0.42), px)
        case "circle" | "ring":
            image = Image.new("L", (px, px))
            draw = ImageDraw.Draw(image)
            draw.ellipse((0, 0, px - 1, px - 1), fill=255)
            if shape == "ring":
                edge = round(px * 0.24)
                draw.ellipse((edge, edge, px - 1 - edge, px - 1 - edge), fill=0)
            return image
        case _:
            raise ValueError(f"Shape {shape!r} is not one of {', '.join(SHAPES)}.")


@functools.cache
def mask(shape: str, px: int) -> Mask:
    """Coverage in [0, 1] of `shape` with nominal size `px`, tight: float32 (h, w, 1)."""
    image = _outline(shape, round(px * _FILL.get(shape, 1.0)) * _OVERSAMPLE)
    size = (max(1, round(image.width / _OVERSAMPLE)), max(1, round(image.height / _OVERSAMPLE)))
    return (np.asarray(image.resize(size, Image.Resampling.BOX), dtype=np.float32) / np.float32(255))[..., None]


def _flag() -> Image.Image:
    """Three stripes on a pole: the object of the fine-tune example, which the embedded model has never seen and which needs no font."""
    image = Image.new("RGBA", (176, 192))
    draw = ImageDraw.Draw(image)
    for stripe, colour in enumerate(("red", "yellow", "blue")):
        draw.rectangle((16, 8 + 40 * stripe, 175, 47 + 40 * stripe), fill=COLOURS[colour])
    draw.rectangle((0, 0, 19, 191), fill=COLOURS["black"])
    return image


@functools.cache
def _glyph(name: str) -> Image.Image:
    if name == FLAG:
        return _flag()
    font = ImageFont.truetype(str(FONT), FONT_PX)
    image = Image.new("RGBA", (180, 180))
    ImageDraw.Draw(image).text((20, 20), GLYPHS[name], font=font, embedded_color=True)
    box = image.getchannel("A").getbbox()
    if box is None:
        raise ValueError(f"The font {FONT} has no glyph for the sticker {name!r}; install fonts-noto-color-emoji 2.042 or newer.")
    return image.crop(box)


@functools.cache
def sticker(name: str, px: int) -> tuple[npt.NDArray[np.float32], Mask]:
    """Colour (h, w, 3) in [0, 255] and coverage (h, w, 1) in [0, 1] of the sticker `name` with longer side `px`."""
    glyph = _glyph(name)
    scale = px / max(glyph.size)
    image = glyph.resize((max(1, round(glyph.width * scale)), max(1, round(glyph.height * scale))), Image.Resampling.LANCZOS)
    rgba = np.asarray(image, dtype=np.float32)
    return rgba[..., :3].copy(), rgba[..., 3:] / np.float32(255)


@functools.cache
def background(name: str) -> npt.NDArray[np.float32]:
    """The background `name` without jitter: float32 (128, 128, 3) in [0, 255]."""
    if name in PLAIN:
        return np.broadcast_to(np.array(PLAIN[name], np.float32), (SIDE, SIDE, 3))
    side = SIDE * _OVERSAMPLE
    image = Image.new("RGB", (side, side), SCENIC[name][0])
    draw = ImageDraw.Draw(image)
    if name == "beach":
        draw.rectangle((0, 0.5 * side, side, side), fill=SCENIC[name][1])
        draw.rectangle((0, 0.7 * side, side, side), fill=SCENIC[name][2])
    elif name == "meadow":
        draw.rectangle((0, 0.62 * side, side, side), fill=SCENIC[name][1])
    else:
        for x, y in ((0.08, 0.1), (0.24, 0.3), (0.4, 0.08), (0.55, 0.22), (0.7, 0.06), (0.86, 0.16), (0.95, 0.36), (0.1, 0.45)):
            draw.ellipse((x * side - 4, y * side - 4, x * side + 4, y * side + 4), fill=(235, 232, 200))
        draw.ellipse((-0.4 * side, 0.7 * side, 0.7 * side, 1.6 * side), fill=SCENIC[name][1])
        draw.ellipse((0.4 * side, 0.76 * side, 1.5 * side, 1.7 * side), fill=SCENIC[name][1])
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float32)


def areas(name: str) -> tuple[tuple[int, int, int], ...]:
    """The colours of the large areas of the background `name`."""
    return (PLAIN[name],) if name in PLAIN else SCENIC[name]


@functools.cache
def visible(kind: str, colour: str | None, ground: str) -> bool:
    """Whether a shape of this colour, or a sticker (`colour` None), stands out from every area of the background `ground`."""
    if colour is not None:
        return colour != ground and all(math.dist(COLOURS[colour], area) >= MIN_CONTRAST for area in areas(ground))
    rgb, alpha = sticker(kind, 44)
    pixels = rgb[alpha[..., 0] > 0.5]
    return all(float((np.linalg.norm(pixels - np.array(area, np.float32), axis=1) < 60).mean()) <= MAX_ALIKE for area in areas(ground))
