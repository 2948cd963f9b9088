"""Decoding: three formats and nothing else, whole files, bounded size, pixels as a viewer shows them."""

import ast
import io
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import tu_diffuse
from PIL import Image
from shard_sets import encoded
from tu_diffuse.errors import DataError
from tu_diffuse.pictures import decode_picture, has_signature


def save(picture: Image.Image, picture_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, picture_format, **options)
    return buffer.getvalue()


def gradient(side: int = 32) -> Image.Image:
    ramp = np.arange(side, dtype=np.uint8) * (255 // side)
    return Image.fromarray(
        np.stack([np.broadcast_to(ramp[None], (side, side)), np.broadcast_to(ramp[:, None], (side, side)), np.full((side, side), 90, np.uint8)], -1)
    )


@pytest.mark.parametrize(
    ("picture_format", "options", "near"),
    [("PNG", {}, 0), ("WEBP", {"lossless": True}, 0), ("JPEG", {"quality": 95}, 12), ("WEBP", {"quality": 95}, 16)],
)
def test_formats(picture_format: str, options: dict[str, object], near: int):
    data = save(gradient(), picture_format, **options)
    pixels = decode_picture(data)
    assert (pixels.shape, pixels.dtype) == ((32, 32, 3), np.uint8)
    assert np.abs(pixels.astype(int) - np.asarray(gradient()).astype(int)).max() <= near
    assert has_signature(data[:12])


def test_modes_become_what_a_viewer_shows():
    base = gradient()
    grey16 = Image.fromarray(np.asarray(base.convert("L")).astype(np.uint16) * 257)
    assert np.abs(decode_picture(save(grey16, "PNG")).astype(int) - np.asarray(base.convert("L"))[..., None]).max() <= 1
    see_through = base.convert("RGBA")
    see_through.putalpha(0)
    assert decode_picture(save(see_through, "PNG")).min() == 255  # over white, whatever colour lies beneath
    see_through.putalpha(128)
    assert np.abs(decode_picture(save(see_through, "PNG")).astype(int) - (np.asarray(base).astype(int) + 255) // 2).max() <= 2
    palette = base.quantize(16)
    assert np.array_equal(decode_picture(save(palette, "PNG")), np.asarray(palette.convert("RGB")))
    palette_data = save(palette, "PNG", transparency=0)
    assert (decode_picture(palette_data)[np.asarray(palette) == 0] == 255).all()
    cmyk = decode_picture(save(base.convert("CMYK"), "JPEG", quality=95))
    assert np.abs(cmyk.astype(int) - np.asarray(base)).max() <= 14
    one_bit = base.convert("1")
    assert np.array_equal(decode_picture(save(one_bit, "PNG")), np.asarray(one_bit.convert("RGB")))
    still = decode_picture(save(base, "WEBP", save_all=True, append_images=[base.rotate(90)], lossless=True, duration=50))
    assert np.array_equal(still, np.asarray(base))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_upright(orientation: int):
    exif = Image.Exif()
    exif[274] = orientation
    picture = gradient().crop((0, 0, 32, 16))
    turned = decode_picture(save(picture, "PNG", exif=exif))
    assert turned.shape == ((16, 32, 3) if orientation <= 4 else (32, 16, 3))
    corner = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}[orientation]
    assert turned[corner].tolist() == np.asarray(picture)[0, 0].tolist()


@pytest.mark.parametrize(
    ("picture_format", "options"), [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {}), ("WEBP", {"lossless": True})]
)
def test_every_cut_picture_is_rejected(picture_format: str, options: dict[str, object]):
    """Cut at each hundredth, and at each of the last 20 bytes, where all pixels may be there."""
    data = save(gradient(48), picture_format, **options)
    decode_picture(data)
    cuts = {len(data) * i // 100 for i in range(100)} | {len(data) - i for i in range(1, 21)}
    for cut in cuts:
        with pytest.raises(DataError):
            decode_picture(data[:cut])


def test_bytes_after_the_end_are_no_damage():
    for picture_format in ("JPEG", "PNG"):
        data = save(gradient(), picture_format)
        assert np.array_equal(decode_picture(data + b"trailing bytes of a camera"), decode_picture(data))


def test_flipped_bits_never_raise_anything_else():
    rng = random.Random(0)
    rejected = 0
    for _ in range(1000):
        data = bytearray(encoded(rng.randrange(256), rng.choice(("JPEG", "PNG", "WEBP")), side=24))
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        try:
            assert decode_picture(bytes(data)).ndim == 3
        except DataError:
            rejected += 1
    assert rejected > 200


@pytest.mark.parametrize("picture_format", ["GIF", "BMP", "TIFF", "PPM", "ICO", "PDF", "EPS", "TGA", "PCX", "SGI", "DDS", "JPEG2000", "MSP"])
def test_other_formats_are_rejected_under_any_name(picture_format: str):
    picture = gradient().convert("1" if picture_format == "MSP" else "RGB")
    data = save(picture, picture_format)
    with pytest.raises(DataError, match="cannot be decoded"):
        decode_picture(data)
    assert not has_signature(data[:12])


@pytest.mark.parametrize("side", [8193, 12000, 50_000])
def test_bombs_are_rejected_before_they_are_decoded(side: int):
    """A PNG of a few bytes that claims billions of pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    with pytest.raises(DataError, match=r"claims|Bomb"):
        decode_picture(data)


def test_nothing_switches_truncated_pictures_on_or_unpickles():
    folder = Path(tu_diffuse.__file__).parent / "shards"
    files = list(folder.glob("*.py"))
    assert len(files) > 5
    for path in files:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)} | {
            node.id for node in ast.walk(tree) if isinstance(node, ast.Name)
        }
        imports = {alias.name for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names}
        assert not (names | imports) & {"LOAD_TRUNCATED_IMAGES", "pickle", "extractall", "extract", "Popen", "eval", "exec", "unpack_archive"}, path
