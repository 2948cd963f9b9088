"""What decided a picture, as its file carries it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .. import __version__
from .model.folder import ModelFolder
from .model.place import Place
from .request import Request, recorded


def applied_settings(
    folder: ModelFolder,
    place: Place,
    request: Request,
    seed: int,
    used: Sequence[tuple[str, float, float]],
    truncated: Mapping[str, str],
    fallbacks: Sequence[str],
) -> dict[str, Any]:
    """All that decided a picture, as the JSON object that its file carries.

    Args:
        folder: the model that drew it.
        place: where it was computed.
        request: what was asked for; its fields are copied, except that `seeds` is called `batch` (results are exactly equal only in an equal batch).
        seed: the picture's own.
        used: (expert, sigma, next sigma) of every step that was taken; written as one entry for each run of steps by the same expert.
        truncated: encoder -> the words that it did not see.
        fallbacks: what had to be done differently.
    """
    experts: list[dict[str, Any]] = []
    for step, (name, sigma, sigma_next) in enumerate(used):
        if not experts or experts[-1]["name"] != name or sigma > experts[-1]["sigma_to"]:
            experts.append({"name": name, "first_step": step + 1, "sigma_from": sigma})
        experts[-1] |= {"last_step": step + 1, "sigma_to": sigma_next}
    asked = recorded(request)
    asked["batch"] = list(asked.pop("seeds"))
    del asked["strict"]  # decides whether there is a picture, not what it looks like
    return {
        "version": 1,
        "software": f"tu-diffuse {__version__}",
        "torch": torch.__version__,
        "model": {
            "name": folder.name,
            "commit": folder.commit,
            "hash": folder.fingerprint,
            "prediction_type": folder.noise.prediction_type,
            **({} if folder.variant is None else {"variant": folder.variant}),
        },
        **asked,
        "seed": seed,
        "dtype": str(place.dtype).removeprefix("torch."),
        "device": place.device.type,
        "attention": str(place.attention),
        "quantize": place.quantize,
        "experts": experts,
        "truncated": dict(truncated),
        "fallbacks": list(dict.fromkeys(fallbacks)),
    }
