"""Find and name the objects of a picture by pixels and templates alone.

Background: the known one that the border and most pixels agree with. Objects: connected regions of what differs from it. Each region is compared with
every shape, in its own colour, and every sticker at 24 × 24 px. Nothing is learned, and nothing knows the caption.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from drawing import BACKGROUNDS, COLOURS, SHAPES, SIDE, areas, background, mask, sticker
from PIL import Image, ImageFilter

GRID = 24  # px of the crops that are compared by colour
FRAME, AREA = 40, 225.0  # px of the masks that are compared by overlap, and the area that an object is scaled to
DIFFERENT = 45.0  # distance from the background, in sRGB, from which a pixel belongs to an object
SPECK = 60  # px; smaller regions are ignored (the smallest object covers about 250)
FRAGMENT = 150  # px; smaller regions belong to a large one within 4 px
MIN_IOU = 0.6  # a shape must overlap its template by this much
MAX_RMS = 62.0  # a sticker may differ from its template by this much, root mean square over sRGB
MAX_OFFSET = 14.0  # a background's colour may be off by this much per channel

Float = npt.NDArray[np.floating[Any]]
Bool = npt.NDArray[np.bool_]
Kind = TypeVar("Kind", bound=np.generic)


@dataclass(frozen=True)
class Found:
    """One object of a picture: `kind` None when no template fits; `colour` the nearest colour word; centre and box in px; `error` as RMS in sRGB."""

    kind: str | None
    colour: str
    x: float
    y: float
    width: int
    height: int
    error: float

    @property
    def side(self) -> int:
        """The longer side in px."""
        return max(self.width, self.height)


def _neighbours(values: npt.NDArray[Kind], radius: int) -> list[npt.NDArray[Kind]]:
    """`values` (h, w, ...) moved by every step of up to `radius` px, edges repeated."""
    padded = np.pad(values, [(radius, radius)] * 2 + [(0, 0)] * (values.ndim - 2), mode="edge")
    height, width = values.shape[:2]
    span = range(2 * radius + 1)
    return [padded[dy : dy + height, dx : dx + width] for dy in span for dx in span]


@functools.cache
def _envelope(name: str) -> tuple[Float, Float]:
    """Least and greatest value of the background around each pixel, so that a soft horizon or a lost star counts as background."""
    around = np.stack(_neighbours(background(name), 2))
    return around.min(axis=0), around.max(axis=0)


def _distance(picture: Float, name: str, offset: Float, step: int) -> Float:
    """Distance in sRGB of every `step`-th pixel from the background `name` moved by `offset`."""
    low, high = _envelope(name)
    some = picture[::step, ::step] - offset
    outside = np.maximum(low[::step, ::step] - some, 0) + np.maximum(some - high[::step, ::step], 0)
    return np.sqrt((outside**2).sum(axis=2))


def find_background(picture: Float) -> tuple[str | None, Float, Float]:
    """The best known background of `picture` (128, 128, 3), its pixels with the picture's tint, and every pixel's distance from it.

    The name is None when even the best is wrong for most of the border.
    """
    border = np.ones((SIDE, SIDE), bool)
    border[5:-5, 5:-5] = False
    offsets = {
        name: np.clip(np.median((picture - background(name))[border], axis=0), -MAX_OFFSET, MAX_OFFSET).astype(np.float32) for name in BACKGROUNDS
    }

    def cost(name: str) -> float:
        coarse = np.minimum(_distance(picture, name, offsets[name], 3), DIFFERENT)
        return float(coarse.mean() + coarse[border[::3, ::3]].mean() + 0.5 * np.linalg.norm(offsets[name]))

    name = min(BACKGROUNDS, key=cost)
    distance = _distance(picture, name, offsets[name], 1)
    ground = background(name) + offsets[name]
    return (name if float(np.median(distance[border])) < DIFFERENT / 2 else None), ground, distance


def label(different: Bool) -> list[Bool]:
    """The 8-connected regions of a mask, the largest first."""
    marks = np.where(different, np.arange(1, different.size + 1).reshape(different.shape), 0)
    while True:
        spread = np.where(different, functools.reduce(np.maximum, _neighbours(marks, 1)), 0)
        if np.array_equal(spread, marks):
            break
        marks = np.concatenate([[0], spread.ravel()])[spread]  # each pixel takes the mark of the pixel that its mark names
    values, counts = np.unique(marks[marks > 0], return_counts=True)
    return [marks == value for value in values[np.argsort(-counts)]]


def _box(region: Bool) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(region.any(axis=1)), np.flatnonzero(region.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _gap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> int:
    return max(b[0] - a[2], a[0] - b[2], b[1] - a[3], a[1] - b[3])


def regions(different: Bool) -> list[Bool]:
    """Connected regions, fragments joined: those whose boxes overlap, and small ones to a near large one. Specks are dropped."""
    parts = [part for part in label(different) if part.sum() >= SPECK // 5]
    joined = True
    while joined:
        joined = False
        for i, a in enumerate(parts):
            for j in range(i + 1, len(parts)):
                gap, small = _gap(_box(a), _box(parts[j])), parts[j].sum() < min(FRAGMENT, 0.2 * a.sum())
                if gap < 0 or (small and gap <= 4):
                    parts[i] = a | parts.pop(j)
                    joined = True
                    break
            if joined:
                break
    return [part for part in parts if part.sum() >= SPECK]


def _resized(values: Float, size: tuple[int, int]) -> Float:
    """`values` (h, w) or (h, w, 3) averaged to `size` (width, height)."""
    planes = values[..., None] if values.ndim == 2 else values
    small = [np.asarray(Image.fromarray(planes[..., i]).resize(size, Image.Resampling.BOX)) for i in range(planes.shape[2])]
    return np.stack(small, axis=-1).reshape(size[1], size[0], *values.shape[2:])


def _normalised(cover: Float, stretch: float = 1.0) -> Float:
    """A mask moved and scaled so that its centroid is in the middle of FRAME × FRAME and its area is AREA, then stretched."""
    area = float(cover.sum())
    rows, columns = np.mgrid[: cover.shape[0], : cover.shape[1]]
    x, y = float((cover * columns).sum()) / area + 0.5, float((cover * rows).sum()) / area + 0.5
    across, down = math.sqrt(area / AREA) * stretch, math.sqrt(area / AREA) / stretch
    affine = (across, 0, x - across * FRAME / 2, 0, down, y - down * FRAME / 2)
    return np.asarray(Image.fromarray(cover).transform((FRAME, FRAME), Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR))


@functools.cache
def _shape_templates(shape: str) -> tuple[Float, ...]:
    """The slightly soft mask of `shape`, normalised, and the same a little wider and taller."""
    hard = np.pad(mask(shape, 60)[..., 0], 20)
    soft = (
        Image.fromarray((_normalised(hard, stretch) * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(1)) for stretch in (0.92, 1.0, 1.087)
    )
    return tuple(np.asarray(one, np.float32) / np.float32(255) for one in soft)


def shape_overlaps(cover: Float) -> dict[str, float]:
    """Intersection over union, in [0, 1], of a mask (h, w) with every shape's best template."""
    seen = _normalised(cover)
    return {s: max(float(np.minimum(seen, t).sum() / np.maximum(seen, t).sum()) for t in _shape_templates(s)) for s in SHAPES}


@functools.cache
def _sticker_template(name: str, ground: tuple[int, int, int]) -> tuple[Float, float]:
    """The sticker on a plain colour, cut to what differs from that colour, at GRID × GRID; and width / height of the cut."""
    rgb, alpha = sticker(name, 64)
    colour = np.array(ground, np.float32)
    picture = colour + (rgb - colour) * alpha
    left, top, right, bottom = _box(np.linalg.norm(picture - colour, axis=2) > DIFFERENT)
    return _resized(np.ascontiguousarray(picture[top:bottom, left:right]), (GRID, GRID)), (right - left) / (bottom - top)


def nearest_colour(rgb: npt.NDArray[np.floating]) -> str:
    """The colour word nearest to `rgb`."""
    return min(COLOURS, key=lambda name: float(np.linalg.norm(rgb - np.array(COLOURS[name]))))


def _core(region: Bool, distance: Float) -> Bool:
    """The inner pixels of a region, without its soft edge."""
    inner = functools.reduce(np.logical_and, _neighbours(region, 1))
    return inner if inner.sum() >= 20 else region & (distance >= np.median(distance[region]))


def _rms(template: Float, crop: Float) -> float:
    """Root mean square difference of two crops, each averaged over 3 × 3 px."""
    return math.sqrt(float((np.mean(_neighbours(template - crop, 1), axis=0) ** 2).mean()))


def recognise(picture: Float, ground: Float, distance: Float, region: Bool, name: str, stickers: tuple[str, ...]) -> Found:
    """Name one region by the best template: shapes by the overlap of their masks, stickers by colour; the smaller RMS of the two wins."""
    inner = _core(region, distance)
    colour = np.median(picture[inner], axis=0).astype(np.float32)
    away = colour - ground
    near = functools.reduce(np.logical_or, _neighbours(region, 1))
    cover = np.where(near, np.clip(((picture - ground) * away).sum(2) / np.maximum((away**2).sum(2), 1), 0, 1), 0).astype(np.float32)
    solid = cover > 0.5
    left, top, right, bottom = _box(solid if solid.any() else region)
    overlap = shape_overlaps(cover) if solid.any() else dict.fromkeys(SHAPES, 0.0)
    shape = max(overlap, key=lambda one: overlap[one])
    size = (max(1, right - left), max(1, bottom - top))
    whole = _fitted(shape)
    local = ground[top:bottom, left:right]
    crop = _resized(np.ascontiguousarray(picture[top:bottom, left:right]), (GRID, GRID))
    below = _resized(np.ascontiguousarray(local), (GRID, GRID))
    word = nearest_colour(colour)
    paint = np.array(COLOURS[word], np.float32) + np.clip(colour - np.array(COLOURS[word], np.float32), -MAX_OFFSET, MAX_OFFSET)
    uneven = math.sqrt(float(((picture[region] - colour) ** 2).mean(axis=1).clip(0, 80**2)[inner[region]].mean()))
    error = _rms(below + (paint - below) * whole[..., None], crop) + 0.6 * uneven
    best = Found(shape if overlap[shape] >= MIN_IOU else None, word, (left + right) / 2, (top + bottom) / 2, *size, error)

    left, top, right, bottom = _box(region)
    crop = _resized(np.ascontiguousarray(picture[top:bottom, left:right]), (GRID, GRID))
    middle = np.median(ground[top:bottom, left:right].reshape(-1, 3), axis=0)
    plain = min(areas(name), key=lambda area: float(np.linalg.norm(middle - np.array(area))))
    for kind in stickers:
        template, aspect = _sticker_template(kind, plain)
        rms = _rms(template, crop) + 25 * abs(math.log((right - left) / (bottom - top) / aspect))
        if rms < best.error:
            best = Found(kind if rms <= MAX_RMS else None, best.colour, (left + right) / 2, (top + bottom) / 2, right - left, bottom - top, rms)
    return best


@functools.cache
def _fitted(shape: str) -> Float:
    """The mask of `shape` stretched to GRID × GRID."""
    return _resized(np.ascontiguousarray(mask(shape, 96)[..., 0]), (GRID, GRID))


def find_objects(picture: npt.NDArray[np.uint8], stickers: tuple[str, ...]) -> tuple[str | None, list[Found]]:
    """The background and the objects of `picture`, uint8 (128, 128, 3); `stickers` are the ones that are looked for beside the shapes.

    A region is cut where its difference falls below half its median, when the pieces match their templates better than the whole: objects that touch
    by their soft edges.
    """
    values = picture.astype(np.float32)
    name, ground, distance = find_background(values)
    if name is None:
        return None, []
    found: list[Found] = []
    for region in regions(distance > DIFFERENT):
        whole = recognise(values, ground, distance, region, name, stickers)
        pieces = regions(region & (distance > 0.5 * np.median(distance[region])))
        parts = [recognise(values, ground, distance, piece, name, stickers) for piece in pieces] if len(pieces) > 1 else []
        better = bool(parts) and sum(part.error for part in parts) / len(parts) < whole.error and all(part.kind for part in parts)
        found += parts if better else [whole]
    return name, found
