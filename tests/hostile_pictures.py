"""Pictures that mean harm: name -> the bytes of a file, made of a good picture and the settings that it carries."""

import io
import json
import math
import struct
import zlib
from collections.abc import Callable
from typing import Any

from PIL import Image

Settings = dict[str, Any]


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(*chunks: bytes, width: int = 32, height: int = 32, pixels: bytes | None = None) -> bytes:
    """A PNG of black pixels that begins with these chunks."""
    content = zlib.compress(bytes((3 * width + 1) * height)) if pixels is None else pixels
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + chunk(b"IDAT", content) + chunk(b"IEND", b"")


def text(value: bytes, key: bytes = b"tu-diffuse") -> bytes:
    return chunk(b"tEXt", key + b"\0" + value)


def bomb(megabytes: int) -> bytes:
    """Zeros, compressed a thousandfold."""
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(bytes(1 << 20)) for _ in range(megabytes)) + packer.flush()


def saved(kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32)).save(buffer, kind, **options)
    return buffer.getvalue()


def _xmp(content: str) -> bytes:
    return f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><tu:settings>{content}</tu:settings></x:xmpmeta>'.encode()


FILES: dict[str, Callable[[], bytes]] = {
    "a PNG of 50,000 by 50,000": lambda: png(width=50_000, height=50_000, pixels=bomb(1)),
    "a PNG of 2^31 by 2^31": lambda: png(width=2**31 - 1, height=2**31 - 1, pixels=bomb(1)),
    "a PNG of 10,000 by 10,000": lambda: png(text(b"{}"), width=10_000, height=10_000, pixels=bomb(1)),
    "a PNG of 0 by 0": lambda: png(text(b"{}"), width=0, height=0),
    "a compressed text of 100 MB": lambda: png(chunk(b"zTXt", b"tu-diffuse\0\0" + bomb(100))),
    "an international text of 100 MB": lambda: png(chunk(b"iTXt", b"tu-diffuse\0\1\0\0\0" + bomb(100))),
    "a colour profile of 100 MB": lambda: png(chunk(b"iCCP", b"x\0\0" + bomb(100)), text(b"{}")),
    "a text of 20 MB": lambda: png(text(b'{"prompt": "' + b"a" * 20_000_000 + b'"}')),
    "200 texts of 1 MB": lambda: png(*(text(b"a" * 1_000_000, b"k%d" % number) for number in range(100))),
    "a chunk that claims 2 GB": lambda: png()[:33] + struct.pack(">I", 2**31 - 1) + b"tEXt" + png()[33:],
    "a chunk whose checksum is wrong": lambda: png(text(b"{}")[:-1] + b"!"),
    "an animation of 2^31 frames": lambda: png(chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0))),
    **{f"a PNG cut at {place}": lambda place=place: png(text(b"{}"))[:place] for place in (0, 4, 8, 20, 33, 40, 60)},
    "a JPEG cut": lambda: saved("JPEG")[:200],
    "a JPEG of 65,500 by 65,500": lambda: saved("JPEG").replace(b"\0\x20\0\x20\x03", b"\xff\xdc\xff\xdc\x03", 1),
    "a JPEG whose XMP never ends": lambda: saved("JPEG", xmp=b"<tu:settings>{" + b"a" * 60_000),
    "a JPEG whose XMP is not UTF-8": lambda: saved("JPEG", xmp=b"<tu:settings>\xff\xfe</tu:settings>"),
    "a JPEG whose XMP has entities": lambda: saved("JPEG", xmp=b'<!DOCTYPE x [<!ENTITY a "aaaa">]>' + _xmp("&a;" * 5000)),
    "a WebP cut": lambda: saved("WEBP")[:30],
    "a WebP whose XMP is a list": lambda: saved("WEBP", xmp=_xmp("[1, 2]")),
    "a WebP that claims 4 GB": lambda: b"RIFF\xff\xff\xff\xffWEBP" + saved("WEBP")[12:],
    **{f"a {kind} named .png": lambda kind=kind: saved(kind) for kind in ("GIF", "BMP", "TIFF", "PPM", "TGA", "PCX", "ICO", "PDF", "EPS")},
    "an SVG": lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "nothing": lambda: b"",
    "zeros": lambda: bytes(5000),
    "settings: no JSON": lambda: png(text(b"{'prompt'}")),
    "settings: a list": lambda: png(text(b"[1, 2]")),
    "settings: a number": lambda: png(text(b"7")),
    "settings: null": lambda: png(text(b"null")),
    "settings: 100,000 brackets": lambda: png(text(b"[" * 100_000)),
    "settings: 500 objects in each other": lambda: png(text(b'{"a":' * 500 + b"1" + b"}" * 500)),
    "settings: a number of 500,000 digits": lambda: png(text(b'{"seed": ' + b"9" * 500_000 + b"}")),
    "settings: the same name twice": lambda: png(text(b'{"seed": 1, "seed": 2}')),
    "settings: 300,000 lists": lambda: png(text(b'{"a": [' + b"[]," * 300_000 + b"[]]}")),
    "settings: empty text": lambda: png(text(b"")),
}
"""Refused by `info` and `replay` with exit code 4."""

_ODD: list[Any] = [None, -1, 0.5, 10**30, math.nan, math.inf, "", "../../etc/passwd", "x\x1b[31m", "é" * 5000, [], [1], [[]], {}, {"a": 1}, True]
_PATHS = ("../../../etc/passwd", "/etc/passwd", "\\\\host\\share", "C:\\x", "hf://evil/model", "https://evil.invalid/model", "file:///etc/passwd")


def changed(settings: Settings) -> dict[str, Settings]:
    """Settings of a good picture, changed one at a time; replay refuses, or draws what they ask for."""
    made: dict[str, Settings] = {}
    for key, value in settings.items():
        made[f"without {key}"] = {name: other for name, other in settings.items() if name != key}
        for odd in (one for one in _ODD if json.dumps(one) != json.dumps(value)):
            made[f"{key} = {odd!r:.40}"] = settings | {key: odd}
        if isinstance(value, str):
            for path in _PATHS:
                made[f"{key} = {path!r}"] = settings | {key: path}
    batches = {"100,000 seeds": list(range(100_000)), "17 seeds": list(range(17)), "a seed of text": ["1"], "other seeds": [5, 6]}
    made |= {f"batch: {name}": settings | {"batch": batch} for name, batch in batches.items()}
    made["8192 by 8192, 1000 steps"] = settings | {"width": 8192, "height": 8192, "steps": 1000}
    photo = {"name": "passwd", "sha256": "0" * 64, "width": 32, "height": 32}
    edit = {"init_image": photo, "strength": 0.5, "resize": "crop", "mask": None, "mask_blur": 0.0}
    made["an input picture elsewhere"] = settings | {"edit": edit | {"init_image": photo | {"path": "/etc/passwd"}}}
    made["an input picture above"] = settings | {"edit": edit | {"init_image": photo | {"name": "../../etc/passwd"}}}
    made["a LoRA elsewhere"] = settings | {"loras": [{"name": "../../etc/passwd", "hash": "0" * 64, "weight": 1.0}]}
    made["enlarged a thousand times"] = settings | {"upscale": {"factor": 1000.0, "mode": "pixel", "steps": 1000, "strength": 1.0}}
    made["a model of the hub"] = settings | {"model": {"name": "evil/model", "hash": "0" * 64, "commit": "a" * 40}}
    return made


def with_settings(settings: Settings) -> bytes:
    return png(text(json.dumps(settings).encode("latin-1", "backslashreplace")))
