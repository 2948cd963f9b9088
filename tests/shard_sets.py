"""Small tar shards, written block by block, so that a test knows where every header lies without asking the reader."""

import io
import json
import random
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

BLOCK = 512
END = bytes(2 * BLOCK)
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


@dataclass(frozen=True)
class Placed:
    """One member where it lies: `start` of its first header, of the one header that tells its size (`main`), its content and the next member."""

    name: str
    content: bytes
    start: int
    main: int
    data: int
    end: int

    @property
    def key(self) -> str:
        return self.name.partition(".")[0]


def encoded(value: int, picture_format: str = "PNG", side: int = 8) -> bytes:
    """A picture with an edge, so that its decoding can be told from a blank one; its top left pixel is (value, 0, 255 - value) in PNG."""
    pixels = np.full((side, side + 1, 3), (value, 0, 255 - value), np.uint8)
    pixels[side // 2 :] = np.arange(side + 1, dtype=np.uint8)[None, :, None] * 25
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, picture_format)
    return buffer.getvalue()


def members_of(count: int, first: int = 0, columns: dict[str, Any] | None = None) -> list[tuple[str, bytes]]:
    """Picture, caption and JSON of `count` whole samples; the JSON has the number as "n" beside the given columns."""
    members: list[tuple[str, bytes]] = []
    for i in range(first, first + count):
        metadata = json.dumps({"n": i} | (columns or {})).encode()
        members += [(f"{i:09d}.png", encoded(i % 256)), (f"{i:09d}.txt", f"caption {i}".encode()), (f"{i:09d}.json", metadata)]
    return members


def tar_bytes(members: Sequence[tuple[str, bytes]], tar_format: str = "ustar", tail: bytes = END) -> tuple[bytes, list[Placed]]:
    """A tar of these members, and where each lies. "pax" has an extended header before every member, as img2dataset writes them."""
    out = io.BytesIO()
    placed: list[Placed] = []
    for name, content in members:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        if tar_format == "pax":
            info.mtime = 1795540665.25  # a fraction does not fit into the old header
        headers = info.tobuf(FORMATS[tar_format])
        start = out.tell()
        out.write(headers + content + bytes(-len(content) % BLOCK))
        data = start + len(headers)
        placed.append(Placed(name, content, start, data - BLOCK, data, out.tell()))
    out.write(tail)
    return out.getvalue(), placed


def write(path: Path, members: Sequence[tuple[str, bytes]], tar_format: str = "ustar") -> Path:
    """Write a whole shard."""
    path.write_bytes(tar_bytes(members, tar_format)[0])
    return path


def checksum_holds(header: bytes) -> bool:
    """Whether a header block has the checksum that POSIX asks for: the sum of its bytes, the checksum field taken as spaces, in octal."""
    try:
        stated = int(header[148:156].split(b"\0")[0].strip(b" ") or b"0", 8)
    except ValueError:
        return False
    rest = header[:148] + b" " * 8 + header[156:]
    return stated in (sum(rest), sum(byte - 256 if byte > 127 else byte for byte in rest))


def flip(data: bytes, place: int, bit: int) -> bytes:
    """The data with one bit flipped."""
    changed = bytearray(data)
    changed[place] ^= 1 << bit
    return bytes(changed)


def some_shard(rng: random.Random) -> tuple[bytes, list[Placed]]:
    """A whole shard of 2 to 6 samples, in any format, with any amount of zeros at its end that a writer leaves."""
    tail = bytes(rng.choice((2, 3, 20)) * BLOCK)
    return tar_bytes(members_of(rng.randint(2, 6), first=rng.randrange(200)), rng.choice(tuple(FORMATS)), tail)
