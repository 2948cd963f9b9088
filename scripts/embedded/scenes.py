"""What a picture of the world shows, as plain data: objects with their places, sizes and colours on a background."""

from dataclasses import dataclass

SIZES = {"small": 30, "medium": 46, "big": 70}  # nominal side in px
PLACES: dict[str, tuple[int, int]] = {  # column and row: -1 is left or top, +1 right or bottom
    "centre": (0, 0),
    "left": (-1, 0),
    "right": (1, 0),
    "top": (0, -1),
    "bottom": (0, 1),
    "top left": (-1, -1),
    "top right": (1, -1),
    "bottom left": (-1, 1),
    "bottom right": (1, 1),
}
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above", "and": "and"}


@dataclass(frozen=True)
class Object:
    """One shape or sticker.

    `kind` is a shape or a sticker's name, `colour` None for stickers, `size` a key of SIZES, `x`, `y` the centre in px of 128 from the top left,
    `px` the drawn side in px, `place` a key of PLACES when a caption states it.
    """

    kind: str
    colour: str | None
    size: str
    x: int
    y: int
    px: int
    place: str | None = None

    @property
    def name(self) -> str:
        """Colour and kind, as in "red star", or the sticker's name."""
        return self.kind if self.colour is None else f"{self.colour} {self.kind}"


@dataclass(frozen=True)
class Scene:
    """One to four objects on a background.

    Two objects with `relation` read "objects[0] relation objects[1]"; several objects with `relation` None are equal ones, to be counted.
    `seed` decides the jitter of colours, so a scene is always drawn alike.
    """

    background: str
    objects: tuple[Object, ...]
    relation: str | None = None
    seed: int = 0

    @property
    def count(self) -> int:
        """How many objects there are."""
        return len(self.objects)
