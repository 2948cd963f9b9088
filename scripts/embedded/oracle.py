"""Adherence oracle: does a picture show what its prompt says? By pixels and templates alone, never by a trained model.

    prompts = evaluation_prompts(n=200, seed=0, stage="shapes")
    rates = score(pictures, prompts)

`python scripts/embedded/oracle.py --stage shapes` calibrates it: rates on true renders, on blurred and noisy ones, and on shuffled prompts.
"""

import argparse
import itertools
import json
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
from drawing import SCENIC, SHAPES, SIDE
from PIL import Image, ImageFilter
from recognition import Found, find_objects
from world import PLACES, SIZES, STAGES, Object, Scene, Stage, all_captions, render, sample_scene

Picture = npt.NDArray[np.uint8]
CATEGORIES = ("object", "colour", "position", "two objects", "relation")


@dataclass(frozen=True)
class Judgement:
    """What of a prompt a picture gets right; what the prompt leaves open counts as right.

    objects: the right kinds, each as often as said; colours: the right colours, whatever has them; binding: each kind with its own colour;
    size: of objects said to be small or big.
    """

    objects_ok: bool
    colours_ok: bool
    position_ok: bool
    count_ok: bool
    binding_ok: bool
    relation_ok: bool
    size_ok: bool
    background_ok: bool

    @property
    def all_ok(self) -> bool:
        """Whether everything is right."""
        return all(asdict(self).values())


@dataclass(frozen=True)
class Prompt:
    """A prompt with the scene it describes; `background_said` tells whether the text names the background."""

    category: str
    text: str
    scene: Scene
    background_said: bool


def _at_place(found: Found, place: str) -> bool:
    """Whether the nearest of the nine places for a box of this size is `place`."""

    def nearest(centre: float, length: int) -> int:
        reach = SIDE / 2 - length / 2 - 8  # from the middle to the side place
        return round(float(np.clip((centre - SIDE / 2) / max(reach, 6), -1, 1)))

    return (nearest(found.x, found.width), nearest(found.y, found.height)) == PLACES[place]


def _related(first: Found, second: Found, relation: str) -> bool:
    dx, dy = second.x - first.x, second.y - first.y
    if relation in ("left of", "right of"):
        return (dx if relation == "left of" else -dx) > abs(dy)
    return relation == "and" or (dy if relation == "above" else -dy) > abs(dx)


def _right_size(found: Found, said: Object) -> bool:
    nearest = min(SIZES, key=lambda size: abs(math.log(found.side / SIZES[size])))
    return said.size == "medium" or nearest == said.size


def judge(picture: Picture, scene: Scene, *, background: bool = True, stickers: tuple[str, ...] = ()) -> Judgement:
    """Compare `picture`, uint8 (128, 128, 3), with what `scene` says.

    `background` False: the prompt does not name one. `stickers` are looked for beside the shapes and those of the scene.
    """
    said = scene.objects
    known = dict.fromkeys((*stickers, *(o.kind for o in said if o.colour is None)))
    ground, found = find_objects(picture, tuple(known))
    colours = Counter(o.colour for o in said if o.colour is not None)
    assignments = [order for order in itertools.permutations(found, len(said)) if all(map(_is, order, said))] if len(found) == len(said) <= 4 else []
    return Judgement(
        objects_ok=Counter(f.kind for f in found) == Counter(o.kind for o in said),
        colours_ok=len(found) == len(said) and not colours - Counter(f.colour for f in found),
        position_ok=scene.count > 1 or said[0].place is None or (len(found) == 1 and _at_place(found[0], said[0].place)),
        count_ok=len(found) == len(said),
        binding_ok=bool(assignments),
        relation_ok=scene.relation is None or any(_related(order[0], order[1], scene.relation) for order in assignments),
        size_ok=(scene.relation is None and scene.count > 1) or any(all(map(_right_size, order, said)) for order in assignments),
        background_ok=not background or ground == scene.background,
    )


def _is(found: Found, said: Object) -> bool:
    return found.kind == said.kind and (said.colour is None or found.colour == said.colour)


def _belongs(scene: Scene, category: str) -> bool:
    first = scene.objects[0]
    single = scene.count == 1 and first.kind in SHAPES
    match category:
        case "object" | "colour":
            return single and first.place is None
        case "position":
            return single and first.place is not None
        case "two objects":
            return scene.relation == "and" and len({o.kind for o in scene.objects}) == len({o.colour for o in scene.objects}) == 2
        case "relation":
            return scene.relation not in (None, "and")
        case "sticker":
            return scene.count == 1 and first.kind not in SHAPES
        case _:
            return scene.relation is None and scene.count > 1


def evaluation_prompts(n: int = 200, seed: int = 0, stage: str | Stage = "shapes") -> list[Prompt]:
    """`n` fixed held-out prompts, by category in turn: object, colour, position, two objects, relation, then sticker and count where it has any.

    The same arguments give the same prompts; none describes a scene that training can sample.
    """
    world = STAGES[stage] if isinstance(stage, str) else stage
    rng = random.Random(f"evaluation {world.name} {seed}")
    categories = (*CATEGORIES, *(("sticker",) if world.sticker else ()), *(("count",) if world.counts else ()))
    prompts: list[Prompt] = []
    for i in range(n):
        category = categories[i % len(categories)]
        scene = sample_scene(rng, world, held_out=True)
        while not _belongs(scene, category):
            scene = sample_scene(rng, world, held_out=True)
        said = rng.random() < 0.5
        texts = all_captions(scene, background=said)
        prompts.append(Prompt(category, rng.choice(texts), scene, said or scene.background in SCENIC))
    return prompts


_DECIDES = {
    "object": "objects_ok",
    "colour": "colours_ok",
    "position": "position_ok",
    "two objects": "binding_ok",
    "relation": "relation_ok",
    "sticker": "objects_ok",
    "count": "count_ok",
}


def score(pictures: Sequence[Picture], prompts: Sequence[Prompt], stickers: tuple[str, ...] = ()) -> dict[str, float]:
    """Rates in [0, 1]: by category what the category asks ("object", "relation", ...), over all prompts each flag ("objects_ok", ..., "all_ok")."""
    if len(pictures) != len(prompts):
        raise ValueError(f"There are {len(pictures)} pictures for {len(prompts)} prompts; give one picture for each prompt.")
    judged = [judge(picture, p.scene, background=p.background_said, stickers=stickers) for picture, p in zip(pictures, prompts, strict=True)]
    rates: dict[str, float] = {}
    for category in dict.fromkeys(p.category for p in prompts):
        mine = [getattr(j, _DECIDES[category]) for j, p in zip(judged, prompts, strict=True) if p.category == category]
        rates[category] = sum(mine) / len(mine)
    for flag in (*Judgement.__dataclass_fields__, "all_ok"):
        rates[flag] = sum(getattr(j, flag) for j in judged) / len(judged)
    return rates


def softened(picture: Picture, rng: np.random.Generator, radius: float = 1.2, noise: float = 6.0) -> Picture:
    """`picture` blurred and with noise, about as a strong codec leaves it (29 dB)."""
    soft = np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(radius)), np.float32)
    return np.clip(soft + rng.normal(0, noise, soft.shape), 0, 255).astype(np.uint8)


def main() -> None:
    """Print the calibration as JSON."""
    parser = argparse.ArgumentParser(description="Calibrate the adherence oracle on fresh scenes.")
    parser.add_argument("--stage", choices=tuple(STAGES), default="shapes")
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    stage, noise = STAGES[options.stage], np.random.default_rng(options.seed)
    prompts = evaluation_prompts(options.count, options.seed, stage)
    pictures = [render(p.scene) for p in prompts]
    table = {
        "true renders": score(pictures, prompts, stage.stickers),
        "softened": score([softened(picture, noise) for picture in pictures], prompts, stage.stickers),
        "shuffled": score([*pictures[7:], *pictures[:7]], prompts, stage.stickers),
    }
    print(json.dumps(table, indent=2))


if __name__ == "__main__":
    main()
