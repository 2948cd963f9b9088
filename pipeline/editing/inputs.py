"""Pictures that a request starts from: known by their content, looked up by it, and never trusted to be what they were."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from ...errors import DataError, UsageError
from ...pictures import decode_picture, is_opaque

MAX_BYTES = 1 << 28  # of a picture file


@dataclass(frozen=True)
class InputPicture:
    """A picture file that a request needs.

    Attributes:
        name: of the file, without folders.
        sha256: of its bytes, 64 hex digits.
        width: pixels, upright as EXIF says.
        height: likewise.
        path: where it was; not recorded in pictures, and not part of what the request asks for.
    """

    name: str
    sha256: str
    width: int
    height: int
    path: str

    @property
    def recorded(self) -> dict[str, Any]:
        """What pictures and keys say of it: all but the path."""
        return {name: value for name, value in asdict(self).items() if name != "path"}


def examined(path: Path, what: str) -> InputPicture:
    """Decode a picture file once, so that a bad one is known before a model is loaded.

    Args:
        path: PNG, JPEG or WebP.
        what: the option that names it, such as "init-image".

    Raises:
        UsageError: the file is not there or cannot be read.
        DataError: another format, damaged, or too large.
    """
    try:
        status = path.stat()
        if status.st_size > MAX_BYTES:
            raise DataError(f"--{what} {path.name} has {status.st_size} bytes; a picture of at most {MAX_BYTES} was wanted.")
        return _examined(str(path.absolute()), what, status.st_mtime_ns, status.st_size)
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UsageError(f"--{what} {path.name} cannot be read ({reason}); name a picture that exists.") from None


@lru_cache(maxsize=4096)
def _examined(path: str, what: str, modified: int, size: int) -> InputPicture:
    del modified, size  # with them another content under the same name is another picture
    data, name = Path(path).read_bytes(), Path(path).name
    pixels = _decoded(data, f"--{what} {name}")
    height, width = pixels.shape[:2]
    if what == "mask" and not is_opaque(data):
        raise DataError(f"--mask {name} is partly transparent, which could mean either; save it as black (kept) and white (repainted).")
    if what == "mask" and not pixels.any():
        raise DataError(f"--mask {name} is black everywhere, so that nothing would be repainted; make white what should be.")
    return InputPicture(name, hashlib.sha256(data).hexdigest(), width, height, path)


def pixels_of(picture: InputPicture) -> NDArray[np.uint8]:
    """The pixels, uint8 (height, width, 3), sRGB, upright; transparency over white.

    Raises:
        UsageError: the file is gone, or has changed since it was asked for.
    """
    return _decoded(_bytes_of(picture), picture.name)


def greys_of(mask: InputPicture) -> NDArray[np.uint8]:
    """The luma of a mask, uint8 (height, width).

    Raises:
        UsageError: the file is gone, or has changed since it was asked for.
    """
    return np.asarray(Image.fromarray(pixels_of(mask)).convert("L"))


def unchanged(picture: InputPicture) -> InputPicture:
    """The picture itself.

    Raises:
        UsageError: the file is gone, or has changed since it was asked for.
    """
    _bytes_of(picture)
    return picture


def located(picture: InputPicture, places: Iterable[Path]) -> InputPicture:
    """The picture where its content is now.

    Args:
        picture: as recorded.
        places: files of any name, or folders in which it has its own.

    Raises:
        UsageError: it is in none of them; says which one is missing.
    """
    for place in (Path(picture.path), *(place / picture.name if place.is_dir() else place for place in places)):
        if place.is_file() and hashlib.sha256(place.read_bytes()).hexdigest() == picture.sha256:
            return InputPicture(picture.name, picture.sha256, picture.width, picture.height, str(place.absolute()))
    raise UsageError(
        f"the picture {picture.name} ({picture.width}×{picture.height}, sha256 {picture.sha256[:10]}…) that this one was made from is missing; "
        "put it beside it, or name it with --input."
    )


def picture_from(stored: Mapping[str, Any]) -> InputPicture:
    """A picture from its JSON, with or without a path.

    Raises:
        TypeError, KeyError, ValueError: an entry is missing or cannot be.
    """
    name = str(stored["name"])
    if Path(name).name != name:
        raise ValueError(f"{name!r} is no file name")
    return InputPicture(name, str(stored["sha256"]), int(stored["width"]), int(stored["height"]), str(stored.get("path", "")))


def fitted(pixels: NDArray[np.uint8], width: int, height: int, resize: str) -> NDArray[np.uint8]:
    """Bring a picture to a size; one that has it stays bit for bit as it is.

    Args:
        pixels: (h, w, 3) or (h, w).
        width: wanted, in pixels.
        height: likewise.
        resize: "crop" scales it to cover and cuts off both ends of the longer side alike; "stretch" scales each side for itself.
    """
    if pixels.shape[:2] == (height, width):
        return pixels
    picture, lanczos = Image.fromarray(pixels), Image.Resampling.LANCZOS
    scaled = ImageOps.fit(picture, (width, height), lanczos) if resize == "crop" else picture.resize((width, height), lanczos)
    return np.asarray(scaled)


def _bytes_of(picture: InputPicture) -> bytes:
    try:
        data = Path(picture.path).read_bytes()
    except OSError as error:
        raise UsageError(f"the picture {picture.name} cannot be read any more ({error.strerror}); put it back, then run again.") from None
    if hashlib.sha256(data).hexdigest() != picture.sha256:
        raise UsageError(f"the picture {picture.name} has changed since it was asked for; put the old one back, or run again with the new one.")
    return data


def _decoded(data: bytes, what: str) -> NDArray[np.uint8]:
    try:
        return decode_picture(data)
    except DataError as error:
        raise DataError(f"{what} cannot be used: {error}; give a whole PNG, JPEG or WebP picture.") from None
