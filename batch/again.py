"""Drawing one picture of a folder again, in the company that it was drawn in."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import DataError, RenderError
from ..pipeline.model.folder import ModelFolder
from ..pipeline.model.place import Place
from .drafts import Drawn
from .engine import render
from .items import Item
from .plan import load_plan
from .studio import Studio


def company_of(picture: Path, settings: Mapping[str, Any]) -> list[Item] | None:
    """The items of the batch that a picture was drawn in, from the plan beside it or up to two folders above; None when there is no such plan."""
    for folder in picture.absolute().parents[:3]:
        with suppress(DataError, KeyError):
            for batch in load_plan(folder, settings["model"]["hash"]).batches:
                if any(planned.item.key == settings["item"] for planned in batch):
                    return [one for planned in batch for one in planned.item.candidates]
    return None


def draw_again(folder: ModelFolder, place: Place, items: Sequence[Item], key: str, seed: int, files: Mapping[str, Path] | None = None) -> Drawn:
    """Draw a batch and give the picture of the item `key`, or of its candidate with the seed; for `files` see `Studio`.

    Raises:
        RenderError: it could not be made.
    """
    for result in render(Studio(folder, place, roomy=True, files=files), [items], 0, None, lambda _: None):
        if (result.item.asked, result.item.seed) == (key, seed):
            if isinstance(result, Drawn):
                return result
            raise RenderError(result.error)
    raise AssertionError("the items hold the key")
