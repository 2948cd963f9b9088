"""Encoded pictures, of shards or to be edited, to pixels. Three formats, whole files only, and no more pixels than a picture can have."""

import io
import warnings

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from .errors import DataError

MAX_PIXELS = 1 << 26  # 8192 x 8192; a small file can claim billions
SIGNATURE_BYTES = 12
_FORMATS = ("JPEG", "PNG", "WEBP")  # Pillow tries no other decoder
_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"

warnings.filterwarnings("error", category=Image.DecompressionBombWarning)  # else Pillow prints a line before our own check


def decode_picture(data: bytes) -> NDArray[np.uint8]:
    """Decode JPEG, PNG or WebP bytes to uint8 (height, width, 3), sRGB.

    The first frame of an animation; turned upright as EXIF says; transparency over white; 16-bit greys scaled to 8 bits.

    Raises:
        DataError: another format, a picture that is cut or damaged, or more than 2**26 pixels.
    """
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise DataError(f"it claims {picture.width} x {picture.height} pixels, more than {MAX_PIXELS}")
            if _is_cut(data):
                raise DataError("it is cut: its end is missing")
            return np.asarray(_to_rgb(ImageOps.exif_transpose(picture)))
    except DataError:
        raise
    except Exception as error:  # Pillow's decoders raise a dozen kinds for damaged data
        raise DataError(f"it cannot be decoded ({type(error).__name__}: {error})") from error


def is_opaque(data: bytes) -> bool:
    """Whether no pixel of a picture that `decode_picture` takes is transparent, even in part."""
    with Image.open(io.BytesIO(data), formats=_FORMATS) as picture:
        return not picture.has_transparency_data or bool((np.asarray(picture.convert("RGBA"))[:, :, 3] == 255).all())


def has_signature(start: bytes) -> bool:
    """Whether the first 12 bytes of a file are those of a JPEG, PNG or WebP."""
    return start.startswith((_JPEG, _PNG)) or (start[:4] == b"RIFF" and start[8:12] == b"WEBP")


def _is_cut(data: bytes) -> bool:
    """Whether the end marker is missing, which Pillow forgives when all pixels came before it; libwebp does not forgive."""
    if data.startswith(_JPEG):
        return data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda")  # no end of image after the last start of scan; neither occurs in scan data
    return data.startswith(_PNG) and b"IEND\xaeB`\x82" not in data


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):
        return Image.fromarray((np.asarray(picture).astype(np.uint32) >> 8).astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        above = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", above.size, (255, 255, 255, 255)), above).convert("RGB")
    return picture.convert("RGB")
