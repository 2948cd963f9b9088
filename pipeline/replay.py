"""Drawing a picture again from the settings that it carries."""

from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from ..errors import DataError, UsageError
from .adapters.adapters import LoraUse
from .adapters.embeddings import EmbeddingUse
from .editing.control import control_from
from .editing.edits import edit_from, upscale_from
from .hub.models import HubName, cached, hub_name, is_commit
from .metadata import encode_picture, open_picture
from .model.folder import ModelFolder
from .model.loading import Model
from .previews import to_image
from .request import DRAWING, EARLIER, GUIDING, READING, Request, batches, rounds
from .resolve import resolve
from .text_to_image import Picture, text_to_image


@dataclass(frozen=True)
class Difference:
    """How two pictures differ.

    Attributes:
        largest: 0..255, over all pixels and channels.
        pixels: how many pixels differ at all.
    """

    largest: int
    pixels: int


def made_with(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """The `model` of a picture's settings.

    Raises:
        DataError: there is none, or its name, hash or variant is no text.
    """
    match settings.get("model"):
        case {"name": str(), "hash": str()} as recorded if isinstance(recorded.get("variant", ""), str | None):
            return recorded
        case other:
            raise DataError(f"the picture's settings name the model as {other!r:.100}; they were changed after it was made.")


def model_of(named: Path | None, made_with: Mapping[str, Any]) -> Path | None:
    """The model that a picture is drawn with again: at the recorded commit, where it came from the hub.

    Args:
        named: what a person named; None takes the recorded model from the hub's cache, for a picture makes nobody ask the network.
        made_with: the `model` of the picture's settings.

    Raises:
        UsageError: nothing was named, and the recorded model is not in the cache.
    """
    recorded = hub_name(f"{made_with.get('name')}@{made_with.get('commit')}")
    if recorded is None or not is_commit(str(recorded.revision)):
        return named
    if named is None:
        there = cached(recorded)
        if there is None:
            raise UsageError(f"the picture was made with {recorded}, which is not in the hub's cache; first run tu-diffuse models pull {recorded}.")
        return there
    return Path(str(recorded)) if not named.exists() and hub_name(named.as_posix()) == HubName(recorded.repo) else named


def request_of(folder: ModelFolder, settings: Mapping[str, Any]) -> tuple[Request, int]:
    """The request that a picture was made with, and the picture's place in its batch; its input pictures are yet to be `inputs.located`.

    Raises:
        DataError: the settings lack an entry or hold one that cannot be.
    """
    try:
        known = {**EARLIER, **settings}
        copied: dict[str, Any] = {name: known[name] for name in ("negative", *DRAWING, *GUIDING, *READING)}
        if copied["schedule"] == "custom":
            del copied["schedule"]  # the sigmas say it
        interval, template = copied["guidance_interval"], known["template"]
        copied["guidance_interval"] = None if interval is None else (interval[0], interval[1])
        loras = [LoraUse.stored(lora) for lora in known["loras"]]
        request = resolve(
            folder,
            settings["prompt"],
            settings["batch"],
            guidance=None if settings["expert_guidance"] else settings["guidance"],
            loras=loras,
            embeddings=[EmbeddingUse.stored(one) for one in known["embeddings"]],
            template=None if template is None else (template[0], template[1]),
            **copied,
            edit=None if "edit" not in settings else edit_from(_without_paths(settings["edit"])),
            upscale=None if "upscale" not in settings else upscale_from(settings["upscale"]),
            tile=settings.get("tile"),
            control=None if "control" not in settings else control_from(_without_paths(settings["control"])),
        )
        index = request.seeds.index(settings["seed"])
        texts = [settings[name] for name in ("dtype", "device", "attention")] + [*(template or ())]
        wholes = [request.width, request.height, request.steps, *request.seeds]
        if not all(isinstance(text, str) for text in texts) or not all(type(whole) is int for whole in wholes):
            raise TypeError("text where a number should be, or a number where a text should be")
        if len(batches(request)) > 1:
            raise ValueError(f"a batch of {len(request.seeds)} pictures is more than are drawn at once")
        return request, index
    except (KeyError, AttributeError, TypeError, ValueError, IndexError) as error:
        raise DataError(f"the picture's settings lack or garble an entry ({error}); they were changed after it was made.") from None


def _without_paths(stored: Mapping[str, Any]) -> dict[str, Any]:
    """An edit or control as pictures record it; a path in it was put there by somebody else."""
    return {name: _without_paths(value) if isinstance(value, dict) else value for name, value in stored.items() if name != "path"}


def check_size(path: Path, request: Request) -> None:
    """Check that a picture is as large as what would be drawn for it, before anything is.

    Raises:
        DataError: it is smaller.
    """
    last = rounds(request)[-1]
    with open_picture(path) as picture:
        if picture.width * picture.height < last.width * last.height:
            raise DataError(
                f"{path.name} is {picture.width}×{picture.height} pixels but its settings say {last.width}×{last.height}; it was resized."
            )


def redraw(model: Model, request: Request, index: int) -> Picture:
    """Draw one picture of a request again.

    Args:
        model: the one it was made with.
        request: its whole batch: exactly equal pixels are promised for an equal batch.
        index: its place in the batch.

    Raises:
        RenderError: the picture could not be made.
    """
    pictures = [event for event in text_to_image(model, request) if isinstance(event, Picture)]
    return next(picture for picture in pictures if picture.index == index)


def compare(path: Path, pixels: Tensor, settings: Mapping[str, Any]) -> Difference:
    """Compare a picture file with what was drawn again, in the file's own format.

    Args:
        path: the picture file.
        pixels: (height, width, 3) uint8.
        settings: of the new picture.

    Raises:
        DataError: the file is damaged, or of another size than its settings say.
    """
    try:
        with open_picture(path) as old:
            picture_format, (width, height) = str(old.format).lower(), old.size
            same_size = (height, width) == tuple(pixels.shape[:2])
            before = np.asarray(old.convert("RGB"), dtype=np.int16) if same_size else None
    except DataError:
        raise
    except Exception as error:  # the decoders raise many kinds for damaged chunks
        raise DataError(f"{path.name} is damaged ({error!s:.200}); fetch it again.") from None
    if before is None:
        raise DataError(f"{path.name} is {width}×{height} pixels but its settings say {pixels.shape[1]}×{pixels.shape[0]}; it was resized.")
    with Image.open(BytesIO(encode_picture(to_image(pixels), settings, picture_format))) as encoded:
        after = np.asarray(encoded.convert("RGB"), dtype=np.int16)
    difference = np.abs(before - after)
    return Difference(int(difference.max()), int((difference.max(axis=2) > 0).sum()))
