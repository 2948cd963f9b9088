"""The settings that a picture carries: written into PNG, JPEG and WebP, and read back by `info` and `replay`.

Two copies, because there are two kinds of readers:

- ours, key `tu-diffuse`: one JSON object of what was *applied* (fields: `Picture.settings` in text_to_image.py);
- the field's customary `parameters` text (prompt, negative prompt, one line of settings), which other programs show.

| format | `tu-diffuse`                           | `parameters`     |
|--------|----------------------------------------|------------------|
| PNG    | text chunk                             | text chunk       |
| JPEG   | XMP, element `tu:settings`             | EXIF UserComment |
| WebP   | XMP, element `tu:settings`             | EXIF UserComment |

Neither holds a time, a path, a user or a host name: equal settings give equal bytes.
"""

import json
import re
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape, unescape

from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from ..errors import DataError, UsageError
from ..strict_json import parse_json
from .limits import FORMATS, RANGES

KEY = "tu-diffuse"
MAX_SETTINGS = 2**22
MAX_PIXELS = int(RANGES["width"][1] * RANGES["height"][1])

_EXIF_IFD, _USER_COMMENT = 0x8769, 0x9286
_XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:tu="https://tu-diffuse.invalid/ns/1.0/"><tu:settings>{}</tu:settings></rdf:Description></rdf:RDF></x:xmpmeta>'
)


def encode_picture(image: Image.Image, settings: Mapping[str, Any], picture_format: str) -> bytes:
    """A picture file in memory, with its settings inside.

    Args:
        image: RGB.
        settings: JSON-compatible; `prompt`, `negative`, `seed` and so on, as in `Picture.settings`.
        picture_format: "png", "jpeg" (quality 95, no chroma subsampling) or "webp" (lossless).

    Raises:
        UsageError: an unknown format.
    """
    if picture_format not in FORMATS:
        raise UsageError(f"picture format {picture_format!r} is not known; use one of {', '.join(FORMATS)}.")
    data, text, buffer = json.dumps(settings, ensure_ascii=False), parameters_text(settings), BytesIO()
    if picture_format == "png":
        chunks = PngInfo()
        chunks.add_text(KEY, data)
        chunks.add_text("parameters", text)
        image.save(buffer, "PNG", pnginfo=chunks)
        return buffer.getvalue()
    exif = Image.Exif()
    exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = b"UNICODE\0" + text.encode("utf-16-be")
    xmp = _XMP.format(escape(data)).encode()
    quality: dict[str, Any] = {"quality": 95, "subsampling": 0} if picture_format == "jpeg" else {"lossless": True}
    image.save(buffer, FORMATS[picture_format], exif=exif.tobytes(), xmp=xmp, **quality)
    return buffer.getvalue()


def read_metadata(path: Path) -> dict[str, Any]:
    """The settings that a picture was made with.

    Raises:
        DataError: not a PNG, JPEG or WebP picture, or one that carries no settings of ours.
    """
    with open_picture(path) as image:
        if image.format == "PNG":
            data = image.info.get(KEY)
        else:
            xmp = image.info.get("xmp")
            found = re.search(r"<tu:settings>(.*?)</tu:settings>", xmp.decode("utf-8", "replace"), re.DOTALL) if isinstance(xmp, bytes) else None
            data = None if found is None else unescape(found[1])
    if not isinstance(data, str):
        raise DataError(f"{path.name} carries no tu-diffuse settings; it was made by another program, or they were stripped.")
    if len(data) > MAX_SETTINGS:
        raise DataError(f"{path.name} carries {len(data)} characters of settings, more than tu-diffuse writes; it was made by another program.")
    try:
        settings = parse_json(data.encode())
    except (ValueError, RecursionError) as error:
        raise DataError(f"the tu-diffuse settings in {path.name} are not valid JSON ({error}); the file was changed after it was made.") from None
    if not isinstance(settings, dict):
        raise DataError(f"the tu-diffuse settings in {path.name} are not a JSON object; the file was changed after it was made.")
    return settings


def open_picture(path: Path) -> Image.Image:
    """Open a PNG, JPEG or WebP file, and no other kind; its pixels are not decoded yet.

    Raises:
        DataError: missing, unreadable, another format, or of more pixels than we draw, which could exhaust memory.
    """
    try:
        image = Image.open(path, formats=tuple(FORMATS.values()))
    except (UnidentifiedImageError, Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DataError(f"{path.name} is not a PNG, JPEG or WebP picture of sensible size; name a picture that tu-diffuse made.") from None
    except OSError as error:
        raise DataError(f"{path.name} cannot be read ({error.strerror}); name a picture that exists.") from None
    except Exception as error:  # the decoders raise many kinds for damaged chunks
        raise DataError(f"{path.name} is damaged ({error!s:.200}); fetch it again.") from None
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise DataError(f"{path.name} has {image.width}×{image.height} pixels, more than tu-diffuse draws; name a picture that it made.")
    return image


def parameters_text(settings: Mapping[str, Any]) -> str:
    """The field's customary text: prompt, then negative prompt, then one line of `Key: value` pairs."""
    model = settings["model"]
    pairs = {
        "Steps": settings["steps"],
        "Sampler": settings["sampler"],
        "Schedule type": settings["schedule"],
        "CFG scale": settings["guidance"],
        "Seed": settings["seed"],
        "Size": f"{settings['width']}x{settings['height']}",
        **_edit_pairs(settings),
        "Model hash": model["hash"][:10],
        "Model": model["name"],
        "Lora hashes": _hashes(settings, "loras", "name"),
        "TI hashes": _hashes(settings, "embeddings", "token"),
        "Version": settings["software"],
    }
    lines = [settings["prompt"]]
    if settings["negative"]:
        lines.append(f"Negative prompt: {settings['negative']}")
    return "\n".join([*lines, ", ".join(f"{key}: {value}" for key, value in pairs.items() if value is not None)])


def _hashes(settings: Mapping[str, Any], key: str, name: str) -> str | None:
    """What was added to the model, in the quotes that the field puts around a value with commas; None when nothing was."""
    added = settings.get(key)
    return json.dumps(", ".join(f"{one[name]}: {one['hash'][:10]}" for one in added), ensure_ascii=False) if added else None


def _edit_pairs(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What is customarily said of a picture that was made from another one, enlarged while it was drawn, or made to be tiled."""
    pairs: dict[str, Any] = {}
    if "edit" in settings:
        pairs["Denoising strength"] = settings["edit"]["strength"]
    if "upscale" in settings:
        upscale = settings["upscale"]
        pairs |= {"Hires upscale": upscale["factor"], "Hires steps": upscale["steps"], "Hires upscaler": upscale["mode"]}
        pairs |= {"Hires denoising strength": upscale["strength"]}
    return pairs | ({"Tiling": settings["tile"]} if "tile" in settings else {})
