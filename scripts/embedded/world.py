"""The synthetic world of the embedded model: sample a scene, draw it, say it.

Held-out rule. A scene is held out, that is, never seen in training, when it holds
  - a coloured shape with sha256("<colour> <shape>")[0] % 8 == 0 (9 of the 96 pairs; of the first 64: orange triangle, orange star, yellow circle,
    yellow crescent, blue square, purple heart, purple ring), or
  - two different objects with sha256("<first> | <second>")[0] % 10 == 0, where first is the object on the left or on top. The rule is about the
    order in the picture, so a held-out pair is unseen in every phrasing, while the same two objects the other way round are trained on; or
  - a single sticker at a stated place with sha256("<sticker> @ <place>")[0] % 8 == 0.
Every shape keeps at least 7 and every colour at least 6 partners.

    rng = random.Random(0)
    scene = sample_scene(rng, STAGES["shapes"])
    picture, caption = render(scene), captions(scene, rng)
"""

import hashlib
import random
from dataclasses import dataclass, replace

import numpy as np
from drawing import BACKGROUNDS, COLOURS, PLAIN, SHAPES, SIDE, Picture, background, mask, sticker, visible
from phrasing import all_captions, captions, document
from scenes import INVERSE, PLACES, SIZES, Object, Scene
from stickers import FLAG, STICKERS

__all__ = [
    "BACKGROUNDS",
    "COLOURS",
    "FLAG",
    "INVERSE",
    "PLACES",
    "SHAPES",
    "SIDE",
    "SIZES",
    "STAGES",
    "STICKERS",
    "Object",
    "Scene",
    "Stage",
    "all_captions",
    "captions",
    "document",
    "held_out",
    "render",
    "sample_scene",
    "swap",
]

GAP = 4  # least px between two objects
MARGIN = 3  # least px between an object and the border
JITTER = 4  # largest change of a colour channel per picture
_COUNT_PX = {2: 46, 3: 34, 4: 34}
_COUNT_LAYOUT = {2: ((-1, 0), (1, 0)), 3: ((-1, 0), (0, 0), (1, 0)), 4: ((-1, -1), (1, -1), (-1, 1), (1, 1))}


@dataclass(frozen=True)
class Stage:
    """What part of the world is drawn: kinds, colours, backgrounds, and the shares of each kind of scene.

    `two` is the share of scenes with two objects and `counts` with 2-4 equal ones; the rest has one. `plain_and` is the share of the
    two-object scenes with no relation but "and"; `sticker` the chance that an object is a sticker; `placed` that a single object's place is
    stated; `sizes` the shares of small, medium, big.
    """

    name: str
    colours: tuple[str, ...]
    stickers: tuple[str, ...]
    backgrounds: tuple[str, ...]
    two: float
    counts: float
    shapes: tuple[str, ...] = SHAPES
    plain_and: float = 0.1
    sticker: float = 0.0
    placed: float = 0.6
    sizes: tuple[float, float, float] = (0.2, 0.6, 0.2)


_FIRST_COLOURS = tuple(COLOURS)[:8]
STAGES: dict[str, Stage] = {
    "shapes": Stage("shapes", _FIRST_COLOURS, (), tuple(PLAIN), two=0.6, counts=0.0),
    "stickers": Stage("stickers", _FIRST_COLOURS, STICKERS[:12], BACKGROUNDS, two=0.6, counts=0.0, sticker=0.45),
    "flag": Stage("flag", _FIRST_COLOURS, (FLAG,), BACKGROUNDS, two=0.4, counts=0.0, sticker=0.5),
    "full": Stage("full", tuple(COLOURS), STICKERS, BACKGROUNDS, two=0.5, counts=0.15, sticker=0.6),
}


def _hash(text: str) -> int:
    return hashlib.sha256(text.encode()).digest()[0]


def _in_order(scene: Scene) -> tuple[Object, ...]:
    """The objects of a relation from left to right, or from top to bottom."""
    vertical = scene.relation in ("above", "below")
    return tuple(sorted(scene.objects, key=lambda thing: thing.y if vertical else thing.x))


def held_out(scene: Scene) -> bool:
    """Whether the written rule (see the module's docstring) keeps this scene out of training."""
    if any(thing.colour is not None and _hash(f"{thing.colour} {thing.kind}") % 8 == 0 for thing in scene.objects):
        return True
    if scene.relation is None:
        only = scene.objects[0]
        return only.colour is None and only.place is not None and _hash(f"{only.kind} @ {only.place}") % 8 == 0
    first, second = (thing.name for thing in _in_order(scene))
    return first != second and _hash(f"{first} | {second}") % 10 == 0


def extent(thing: Object) -> tuple[int, int]:
    """Width and height in px of the sprite of `thing`."""
    alpha = mask(thing.kind, thing.px) if thing.colour is not None else sticker(thing.kind, thing.px)[1]
    return alpha.shape[1], alpha.shape[0]


def fits(scene: Scene) -> bool:
    """Whether every object lies inside the margins and any two have at least GAP px between their boxes."""
    boxes: list[tuple[int, int, int, int]] = []
    for thing in scene.objects:
        width, height = extent(thing)
        left, top = thing.x - width // 2, thing.y - height // 2
        boxes.append((left, top, left + width, top + height))
    inside = all(min(box) >= MARGIN - 1 and max(box) <= SIDE - MARGIN + 1 for box in boxes)
    apart = [max(b[0] - a[2], a[0] - b[2], b[1] - a[3], a[1] - b[3]) for i, a in enumerate(boxes) for b in boxes[:i]]
    return inside and all(gap >= GAP - 1 for gap in apart)


def _thing(rng: random.Random, stage: Stage, ground: str) -> Object:
    """A visible object in the middle, of a random kind and size."""
    while True:
        if rng.random() < stage.sticker:
            kind, colour = rng.choice(stage.stickers), None
        else:
            kind, colour = rng.choice(stage.shapes), rng.choice(stage.colours)
        if visible(kind, colour, ground):
            size = rng.choices(tuple(SIZES), stage.sizes)[0]
            return Object(kind, colour, size, SIDE // 2, SIDE // 2, round(SIZES[size] * rng.uniform(0.95, 1.05)))


def _placed(thing: Object, place: str | None, rng: random.Random) -> Object:
    """`thing` moved to `place` (None: near the centre) with a small jitter."""
    column, row = (0, 0) if place is None else PLACES[place]
    at = [
        SIDE // 2 + rng.randint(-5, 5) if side == 0 else SIDE // 2 + side * (SIDE // 2 - half - rng.randint(MARGIN, MARGIN + 8))
        for side, half in zip((column, row), ((length + 1) // 2 for length in extent(thing)), strict=True)
    ]
    return replace(thing, x=at[0], y=at[1], place=place)


def _pair(first: Object, second: Object, relation: str, rng: random.Random) -> tuple[Object, Object] | None:
    """Both objects moved so that `relation` holds, with at least GAP px between them; None when they do not fit."""
    vertical = relation in ("above", "below")
    forward = relation in ("left of", "above") or (relation == "and" and rng.random() < 0.5)
    lengths = [extent(thing)[1 if vertical else 0] for thing in (first, second)]
    across = [extent(thing)[0 if vertical else 1] for thing in (first, second)]
    room = SIDE - 2 * MARGIN - sum(lengths) - 2
    if room < GAP:
        return None
    gap = rng.randint(GAP, min(room, GAP + 14))
    start = (SIDE - sum(lengths) - gap) // 2
    start += rng.randint(-min(4, start - MARGIN), min(4, start - MARGIN))
    order = (0, 1) if forward else (1, 0)
    centres = {order[0]: start + lengths[order[0]] // 2, order[1]: start + lengths[order[0]] + gap + lengths[order[1]] // 2}
    moved: list[Object] = []
    for i, thing in enumerate((first, second)):
        drift = min(5, SIDE // 2 - MARGIN - (across[i] + 1) // 2)
        other = SIDE // 2 + rng.randint(-drift, drift)
        moved.append(replace(thing, x=other, y=centres[i]) if vertical else replace(thing, x=centres[i], y=other))
    return moved[0], moved[1]


def _counted(thing: Object, count: int, rng: random.Random) -> tuple[Object, ...]:
    """`count` copies of `thing` in a row, or in a square when there are four."""
    small = replace(thing, size="medium", px=round(_COUNT_PX[count] * rng.uniform(0.95, 1.0)))
    width, height = extent(small)
    pitch = max(width, height) + GAP + rng.randint(0, 3)
    step = pitch if count == 3 else (pitch + 1) // 2
    x, y = (SIDE // 2 + rng.randint(-3, 3) for _ in range(2))
    return tuple(replace(small, x=x + step * column, y=y + step * row) for column, row in _COUNT_LAYOUT[count])


def _draw_scene(rng: random.Random, stage: Stage) -> Scene | None:
    ground, seed, dice = rng.choice(stage.backgrounds), rng.getrandbits(32), rng.random()
    first = _thing(rng, stage, ground)
    if dice < stage.two:
        second = _thing(rng, stage, ground)
        relation = "and" if rng.random() < stage.plain_and else rng.choice(("left of", "right of", "above", "below"))
        pair = None if first.name == second.name else _pair(first, second, relation, rng)
        return None if pair is None else Scene(ground, pair, relation, seed)
    if dice < stage.two + stage.counts:
        scene = Scene(ground, _counted(first, rng.choice((2, 3, 4)), rng), None, seed)
        return scene if fits(scene) else None
    place = rng.choice(tuple(PLACES)) if rng.random() < stage.placed else None
    return Scene(ground, (_placed(first, place, rng),), None, seed)


_is_held_out = held_out  # sample_scene's argument has the same name


def sample_scene(rng: random.Random | np.random.Generator, stage: Stage, *, held_out: bool = False) -> Scene:
    """A random scene of `stage`: never a held-out one, or with `held_out` always one (for evaluation).

    The same state of `rng` gives the same scene; a numpy generator serves as the seed of a `random.Random`.
    """
    source = rng if isinstance(rng, random.Random) else random.Random(int(rng.integers(1 << 63)))
    while True:
        scene = _draw_scene(source, stage)
        if scene is not None and _is_held_out(scene) == held_out:
            return scene


def render(scene: Scene, render_size: int = SIDE) -> Picture:
    """Draw `scene`: uint8 (render_size, render_size, 3), sRGB; 128 must be a multiple of `render_size` (smaller pictures are box averages)."""
    if SIDE % render_size:
        raise ValueError(f"render_size is {render_size}, but {SIDE} must be a multiple of it; use 128, 64 or 32.")
    jitter = random.Random(scene.seed)

    def shift() -> list[int]:
        return [jitter.randint(-JITTER, JITTER) for _ in range(3)]

    canvas = background(scene.background) + np.array(shift(), np.float32)
    tint = shift()  # equal objects of a count share their colour; a pair draws once more
    for thing in scene.objects:
        if thing.colour is None:
            rgb, alpha = sticker(thing.kind, thing.px)
        else:
            alpha = mask(thing.kind, thing.px)
            rgb = np.array([c + d for c, d in zip(COLOURS[thing.colour], tint, strict=True)], np.float32)
        height, width = alpha.shape[:2]
        left, top = thing.x - width // 2, thing.y - height // 2
        region = canvas[top : top + height, left : left + width]
        region += (rgb - region) * alpha
        if scene.relation is not None:
            tint = shift()
    np.clip(canvas, 0, 255, out=canvas)
    factor = SIDE // render_size
    if factor > 1:
        canvas = canvas.reshape(render_size, factor, render_size, factor, 3).mean(axis=(1, 3))
    return (canvas + 0.5).astype(np.uint8)


def _mirrored(scene: Scene) -> Scene:
    """Both objects on each other's side: the relation is inverted, gaps and margins are kept."""
    vertical = scene.relation in ("above", "below")
    objects = tuple(replace(o, y=SIDE - o.y) if vertical else replace(o, x=SIDE - o.x) for o in scene.objects)
    return replace(scene, objects=objects, relation=None if scene.relation is None else INVERSE[scene.relation])


def _in_stead(thing: Object, kind: str) -> Object:
    """The sticker `kind` in the box of `thing`."""
    new = replace(thing, kind=kind)
    return replace(new, px=int(thing.px * min(1.0, *(old / length for old, length in zip(extent(thing), extent(new), strict=True)))))


def _alternatives(scene: Scene) -> list[Scene]:
    """Scenes that differ from `scene` in one thing that is easily confused."""
    first = scene.objects[0]
    found: list[Scene] = []
    if scene.relation is not None:
        second = scene.objects[1]
        if scene.relation != "and":
            found.append(_mirrored(scene))
        if first.colour is not None and second.colour is not None and first.colour != second.colour and first.kind != second.kind:
            found.append(replace(scene, objects=(replace(first, colour=second.colour), replace(second, colour=first.colour))))
    elif scene.count == 1 and first.place is not None and first.place != "centre":
        column, row = PLACES[first.place]
        place = next(name for name, at in PLACES.items() if at == (-column, -row))
        found.append(replace(scene, objects=(replace(first, x=SIDE - first.x, y=SIDE - first.y, place=place),)))
    return found


def swap(scene: Scene, rng: random.Random) -> Scene:
    """A hard negative: relation or place mirrored, or colours exchanged; failing these, another colour or kind for the first object.

    The negative of a training scene is never a held-out one.
    """
    found = [other for other in _alternatives(scene) if held_out(scene) or not held_out(other)]
    if found:
        return rng.choice(found)
    first = scene.objects[0]
    options = [replace(first, colour=c) for c in COLOURS] if first.colour is not None else [_in_stead(first, kind) for kind in STICKERS[:12]]
    rng.shuffle(options)
    for new in options:
        objects = tuple(replace(new, x=o.x, y=o.y) if o.name == first.name else o for o in scene.objects)
        other = replace(scene, objects=objects)
        distinct = new.name != first.name and len({o.name for o in objects}) == len({o.name for o in scene.objects})
        if distinct and visible(new.kind, new.colour, scene.background) and (held_out(scene) or not held_out(other)):
            return other
    raise ValueError(f"No hard negative exists for {scene}.")
