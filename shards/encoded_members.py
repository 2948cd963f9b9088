"""Members of encoded shards: `<key>.encoded.safetensors` with a sample's latents and text features, and one `encoding.safetensors` that says how.

Only headers are understood here, without torch; docs/formats.md describes the contents.
"""

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from ..errors import DataError

ENCODED_SUFFIX = "encoded.safetensors"
ENCODING_MEMBER = "encoding.safetensors"
METADATA = "tu-diffuse"  # the one entry of the metadata, JSON: with two, the library would write them in any order
VERSION = 1
_MAX_HEADER = 1 << 16  # ours take about a kilobyte
_PREFIX = struct.Struct("<Q")
_DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I32": 4, "BOOL": 1}


@dataclass(frozen=True)
class Encoding:
    """All that decides the numbers of an encoded shard.

    Attributes:
        family: of the model, see `ModelFolder`.
        parts: the frozen parts that were used (vae, text encoders, tokenizers) -> SHA-256 of their files.
        resolution: side of the square that pictures were cut to, or whose area the buckets have, pixels.
        buckets: cut to the nearest of the buckets instead of the square; always in the middle.
        dtype: of what is stored, float32, float16 or bfloat16.
    """

    family: str
    parts: Mapping[str, str]
    resolution: int
    buckets: bool
    dtype: str

    def to_json(self) -> str:
        """One line, the same for equal encodings."""
        return json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))

    def to_dict(self) -> dict[str, Any]:
        """What an `encoding.safetensors` says."""
        return {"version": VERSION, "cut": "middle", **asdict(self)}

    @property
    def key(self) -> str:
        """SHA-256 of `to_json`, 64 hex digits: what each sample carries."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


class StoredEncoding(NamedTuple):
    """An `encoding.safetensors`: number of the shard; first byte of its header, its content and the next header; the content's size; what it says."""

    shard: int
    start: int
    offset: int
    end: int
    size: int
    encoding: Encoding


class Header(NamedTuple):
    """The header of a safetensors file: its length with the prefix, what we say in it (`METADATA`), and what it says of each tensor."""

    length: int
    said: dict[str, Any]
    tensors: dict[str, dict[str, Any]]


def header_length(prefix: bytes, size: int) -> int:
    """Bytes up to the tensors of a safetensors file of `size` bytes that begins with `prefix`.

    Raises:
        DataError: it cannot be.
    """
    length = _PREFIX.unpack(prefix[: _PREFIX.size])[0] if len(prefix) >= _PREFIX.size else 0
    if not 2 <= length <= min(_MAX_HEADER, size - _PREFIX.size):
        raise DataError(f"its safetensors header claims {length} bytes")
    return _PREFIX.size + length


def read_header(start: bytes, size: int) -> Header:
    """Read the header of a safetensors file of `size` bytes out of its beginning; it must account for every byte.

    Raises:
        DataError: it is damaged, or describes something else than `size` bytes of tensors that we write.
    """
    length = header_length(start, size)
    try:
        content: dict[str, Any] = json.loads(start[_PREFIX.size : length])
        said: dict[str, Any] = dict(json.loads(content.pop("__metadata__")[METADATA]))
        spans = sorted((*entry["data_offsets"], math.prod(entry["shape"]) * _DTYPE_BYTES[entry["dtype"]]) for entry in content.values())
        whole = all(begin + count == end for begin, end, count in spans)
        whole &= [0, *(end for _, end, _ in spans)] == [*(begin for begin, _, _ in spans), size - length]
        sound = whole and all(side > 0 for entry in content.values() for side in entry["shape"])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(f"its safetensors header is damaged ({type(error).__name__})") from error
    if not sound:
        raise DataError("its safetensors header does not describe the bytes that follow")
    return Header(length, said, content)


def content_sha256(header: Header, content: bytes) -> str:
    """Over all of a safetensors file but this hash: how it was encoded, what each tensor is, the tensors."""
    digest = hashlib.sha256(json.dumps([header.said["encoding"], header.tensors], sort_keys=True).encode())
    digest.update(memoryview(content)[header.length :])
    return digest.hexdigest()


def check_content(header: Header, content: bytes) -> None:
    """Compare a whole member with the hash in its header.

    Raises:
        DataError: they differ.
    """
    if "encoding" not in header.said or content_sha256(header, content) != header.said.get("sha256"):
        raise DataError("its content differs from the hash in its header")


def sample_header(start: bytes, size: int) -> tuple[str, tuple[int, int]]:
    """The key of the encoding of a sample's member, and height and width of its latents.

    Raises:
        DataError: the header is damaged or not one of ours.
    """
    header = read_header(start, size)
    shape, key = header.tensors.get("mean", {"shape": []})["shape"], header.said.get("encoding")
    if len(shape) != 3 or not isinstance(key, str):
        raise DataError("its safetensors header names no latents or no encoding")
    return key, (shape[1], shape[2])


def read_encoding(content: bytes) -> Encoding:
    """What a whole `encoding.safetensors` says.

    Raises:
        DataError: it is damaged, or of another version.
    """
    header = read_header(content, len(content))
    check_content(header, content)
    try:
        said = header.said["encoding"]
        known = Encoding(**{name: value for name, value in said.items() if name not in ("version", "cut")})
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(f"it does not say how the shard was encoded ({type(error).__name__})") from error
    if known.to_dict() != said:
        raise DataError(f"it is of version {str(said.get('version'))[:20]}, version {VERSION} was wanted")
    return known


def differences(wanted: Encoding, came: Encoding) -> str:
    """What sets two encodings apart, for people; empty when nothing does."""
    said = [
        f"{name} {getattr(came, name)} instead of {getattr(wanted, name)}"
        for name in ("family", "resolution", "buckets", "dtype")
        if getattr(wanted, name) != getattr(came, name)
    ]
    said += [f"another {part}" for part in sorted({*wanted.parts, *came.parts}) if wanted.parts.get(part) != came.parts.get(part)]
    return ", ".join(said)
