"""What may be asked for: ranges, names and texts, known without torch, so that a command line or prompt file is checked before it is loaded."""

import unicodedata
from collections.abc import Mapping

from ..errors import UsageError
from ..schedulers.names import SAMPLER_NAMES, SPACINGS
from ..text_encoders.prompts import SYNTAXES

MAX_PROMPT = 4000
MAX_SEED = 2**32 - 1
FORMATS = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP"}
SUFFIXES = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}

RANGES: Mapping[str, tuple[float, float]] = {
    "seed": (0, MAX_SEED),
    "count": (1, 10_000),
    "width": (1, 8192),
    "height": (1, 8192),
    "steps": (1, 1000),
    "eta": (0, 1),
    "guidance": (0, 1000),
    "guidance_rescale": (0, 1),
    "dynamic_threshold": (0.01, 1),
    "strength": (0, 1),
    "mask_blur": (0, 512),
    "upscale": (1, 8),
    "upscale_steps": (1, 1000),
    "upscale_strength": (0, 1),
    "clip_weight": (0, 10),
    "t5_weight": (0, 10),
    "control_scale": (0, 10),
    "control_start": (0, 1),
    "control_end": (0, 1),
}
"""Lowest and highest value, both allowed. Models ask for more of width and height: a multiple of `ModelFolder.factor`."""

CHOICES: Mapping[str, tuple[str, ...]] = {
    "sampler": SAMPLER_NAMES,
    "schedule": SPACINGS,
    "syntax": SYNTAXES,
    "long_prompts": ("chunk", "truncate"),
    "format": tuple(FORMATS),
    "resize": ("crop", "stretch"),
    "upscale_mode": ("latent", "pixel"),
    "tile": ("x", "y", "xy"),
}


def checked_text(what: str, text: str) -> str:
    """Return a prompt as it is.

    Raises:
        UsageError: it is blank, longer than 4000 characters, or holds control characters or lone surrogates.
    """
    if not text.strip():
        raise UsageError(f"{what} is empty; say what the picture should show.")
    if len(text) > MAX_PROMPT:
        raise UsageError(f"{what} is {len(text)} characters long; at most {MAX_PROMPT} are taken, and text encoders read far fewer; shorten it.")
    for position, character in enumerate(text):
        if unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\t":
            raise UsageError(f"{what} holds the control character U+{ord(character):04X} at position {position}; remove it.")
    return text
