"""Captions of a scene: several phrasings that mean the same, all lower case, with the articles right."""

import itertools
import random
from dataclasses import replace

from scenes import INVERSE, Object, Scene
from stickers import NATURAL_COLOUR

PREFIXES = ("", "a picture of ", "a drawing of ")
LOOSE = 0.25  # share of relations that a caption tells as a mere "and"
NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four"}
_SCENIC = {
    "beach": ("on a beach", "at the beach", "on the beach"),
    "night": ("at night", "under a night sky", "in front of dark hills at night"),
    "meadow": ("on a meadow", "in a meadow", "in a green field"),
}
_RELATIONS = {
    "left of": ("to the left of", "left of"),
    "right of": ("to the right of", "right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
    "and": ("and", "next to"),
}
_SIDES = {"left of": ("on the left", "on the right"), "above": ("at the top", "at the bottom")}
_POSSESSIVE = {"left of": "to its left", "right of": "to its right", "above": "above it", "below": "below it"}
_SYNONYMS = {"big": ("large", "huge"), "small": ("little", "tiny"), "gray": ("grey",), "centre": ("center",), "picture": ("image",)}
_PLURALS = {
    "fish": "fish",
    "mouse": "mice",
    "sheep": "sheep",
    "maple leaf": "maple leaves",
    "die": "dice",
    "deer": "deer",
    "wolf": "wolves",
    "key": "keys",
}
_UNCOUNTED = {"grapes", "cherries", "pancakes", "fries", "sushi", "corn", "bread", "broccoli", "cheese", "fire"}  # said without article or plural s


def plural(kind: str) -> str:
    """The plural of a shape's or sticker's name."""
    if kind in _PLURALS:
        return _PLURALS[kind]
    if kind in _UNCOUNTED:
        return kind
    if kind.endswith(("s", "sh", "ch", "x")):
        return f"{kind}es"
    if kind.endswith("y") and kind[-2] not in "aeiou":
        return f"{kind[:-1]}ies"
    return f"{kind}es" if kind in {"tomato", "potato"} else f"{kind}s"


def _adjectives(thing: Object, natural: bool) -> str:
    size = "" if thing.size == "medium" else f"{thing.size} "
    colour = thing.colour if thing.colour is not None else NATURAL_COLOUR.get(thing.kind) if natural else None
    return size if colour is None else f"{size}{colour} "


def _article(phrase: str) -> str:
    return f"an {phrase}" if phrase[0] in "aeiou" and not phrase.startswith(("uni", "ufo")) else f"a {phrase}"


def noun(thing: Object, natural: bool = False) -> str:
    """The object with its article: "a small red star"; `natural` names a sticker's natural colour."""
    phrase = f"{_adjectives(thing, natural)}{thing.kind}"
    return phrase if thing.kind in _UNCOUNTED else _article(phrase)


def place_phrases(place: str) -> tuple[str, ...]:
    """Ways to say the place of a single object."""
    if place == "centre":
        return ("in the centre", "in the middle")
    if " " in place:
        return (f"in the {place} corner", f"at the {place}")
    return (f"on the {place}", f"on the {place} side") if place in ("left", "right") else (f"at the {place}",)


def background_phrases(background: str) -> tuple[str, ...]:
    """Ways to say the background."""
    if background in _SCENIC:
        return _SCENIC[background]
    return (f"on a {background} background", f"on {background}", f"with a {background} background")


def _statements(scene: Scene, natural: bool) -> list[str]:
    """The scene without its background, in every phrasing."""
    first = scene.objects[0]
    if scene.relation is None and scene.count == 1:
        name = noun(first, natural)
        return [name] if first.place is None else [f"{name} {phrase}" for phrase in place_phrases(first.place)]
    if scene.relation is None:
        return [f"{NUMBERS[scene.count]} {_adjectives(first, natural)}{plural(first.kind)}"]
    a, b = noun(first, natural), noun(scene.objects[1], natural)
    said: list[str] = []
    for one, other, relation in ((a, b, scene.relation), (b, a, INVERSE[scene.relation])):
        said += [f"{one} {words} {other}" for words in _RELATIONS[relation]]
        if relation in _POSSESSIVE:
            said.append(f"{other} with {one} {_POSSESSIVE[relation]}")
        if relation in _SIDES:
            here, there = _SIDES[relation]
            said.append(f"{one} {here} and {other} {there}")
    return said


def all_captions(scene: Scene, *, background: bool = True, prefixes: bool = False, natural: bool = False) -> list[str]:
    """Every phrasing of `scene`, all of the same meaning; inverted relations included.

    `background` False leaves the background unsaid (plain ones only), `prefixes` adds "a picture of" and "a drawing of".
    """
    grounds = background_phrases(scene.background) if background or scene.background in _SCENIC else ("",)
    starts = PREFIXES if prefixes else ("",)
    return [f"{start}{body} {ground}".strip() for start, body, ground in itertools.product(starts, _statements(scene, natural), grounds)]


def captions(scene: Scene, rng: random.Random, loose: float = LOOSE) -> str:
    """One random caption of `scene`: synonyms, a prefix at times, and at times no word about a plain background.

    `loose` is the chance that a relation is said as a mere "and".
    """
    if scene.relation is not None and rng.random() < loose:
        scene = replace(scene, relation="and")
    body = rng.choice(_statements(scene, natural=rng.random() < 0.3))
    silent = scene.background not in _SCENIC and rng.random() < 0.25
    ground = "" if silent else rng.choice(background_phrases(scene.background))
    prefix = rng.choices(PREFIXES, (0.8, 0.1, 0.1))[0]
    words = f"{prefix}{body} {ground}".split()
    said = " ".join(rng.choice(_SYNONYMS[word]) if word in _SYNONYMS and rng.random() < 0.2 else word for word in words)
    return said.replace("a image", "an image")


def document(scene: Scene, rng: random.Random) -> str:
    """Two or three phrasings of `scene` joined by ". ", for the span corruption of T5."""
    return ". ".join(captions(scene, rng) for _ in range(rng.choice((2, 3))))
