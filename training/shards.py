"""Read LAION-style tar shards as img2dataset writes them: `<key>.jpg|jpeg|png|webp`, `<key>.txt`, `<key>.json`, members of one key adjacent.

Nothing is extracted to disk, unpickled or run; other suffixes are passed over.
"""

import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..errors import DataError

PICTURE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
_PILLOW_FORMATS = ("JPEG", "PNG", "WEBP")
_BLOCK = 512


@dataclass(frozen=True)
class Sample:
    """One picture with its caption.

    `key` as in the shard; `picture` the encoded bytes; `caption` the .txt; `columns` the .json (LAION's columns), empty when there is none.
    """

    key: str
    picture: bytes
    caption: str
    columns: dict[str, Any]


def read_shard(path: Path) -> Iterator[Sample]:
    """Yield the samples of one tar shard in order.

    Raises:
        DataError: the tar is damaged (Python's tarfile takes a bad header for the end: what follows the last member must be zeros), or a
            sample lacks its picture or its caption.
    """
    parts: dict[str, bytes] = {}
    key = ""
    with path.open("rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    stem, _, suffix = Path(member.name).name.partition(".")
                    if not member.isfile() or suffix not in (*PICTURE_SUFFIXES, "txt", "json"):
                        continue
                    if stem != key and parts:
                        yield _sample(path, key, parts)
                        parts = {}
                    key = stem
                    content = tar.extractfile(member)
                    parts[suffix] = b"" if content is None else content.read()
                end = tar.offset
        except tarfile.TarError as error:
            raise DataError(f"Shard {path.name} is damaged ({error}); download it again or leave it out.") from error
        file.seek(end)
        tail = file.read()
    if len(tail) < _BLOCK or tail.strip(b"\0"):
        raise DataError(f"Shard {path.name} is damaged at byte {end}: a tar ends in zeros; download it again or leave it out.")
    if parts:
        yield _sample(path, key, parts)


def _sample(path: Path, key: str, parts: dict[str, bytes]) -> Sample:
    picture = next((parts[suffix] for suffix in PICTURE_SUFFIXES if suffix in parts), None)
    if picture is None or "txt" not in parts:
        missing = "picture" if picture is None else "caption (.txt)"
        raise DataError(f"Sample {key} of shard {path.name} has no {missing}; every sample needs a picture and a caption.")
    columns = json.loads(parts["json"]) if "json" in parts else {}
    return Sample(key, picture, parts["txt"].decode("utf-8"), columns)


def decode_picture(data: bytes) -> NDArray[np.uint8]:
    """Decode JPEG, PNG or WebP bytes to uint8 (height, width, 3), sRGB."""
    with Image.open(io.BytesIO(data), formats=_PILLOW_FORMATS) as picture:
        return np.asarray(picture.convert("RGB"))


def load_shards(paths: Sequence[Path]) -> tuple[NDArray[np.uint8], list[str], list[dict[str, Any]]]:
    """Read whole shards of equally sized pictures into memory.

    Returns:
        pictures (n, height, width, 3) uint8, captions, columns.

    Raises:
        DataError: no shard, a damaged shard, or pictures of different sizes.
    """
    samples = [sample for path in paths for sample in read_shard(path)]
    if not samples:
        raise DataError("No sample was found in the shards; give at least one .tar file with pictures and captions.")
    pictures = [decode_picture(sample.picture) for sample in samples]
    sizes = {picture.shape for picture in pictures}
    if len(sizes) > 1:
        raise DataError(f"The shards hold pictures of {len(sizes)} sizes, such as {sorted(sizes)[:3]}; this reader wants one size.")
    return np.stack(pictures), [sample.caption for sample in samples], [sample.columns for sample in samples]
