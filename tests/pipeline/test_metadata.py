import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tu_diffuse.errors import DataError
from tu_diffuse.pipeline.limits import FORMATS
from tu_diffuse.pipeline.metadata import encode_picture, read_metadata

_IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8))


def _settings(prompt: str) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "negative": "blurry & <dull>",
        "seed": 7,
        "steps": 20,
        "sampler": "euler",
        "schedule": "trailing",
        "guidance": 2.5,
        "width": 40,
        "height": 24,
        "model": {"name": "tiny", "hash": "ab" * 32},
        "software": "tu-diffuse 0",
        "experts": [{"name": "high", "sigma_from": 14.6}],
    }


@pytest.mark.parametrize("picture_format", FORMATS)
@given(prompt=st.text(alphabet=st.characters(exclude_categories=("Cc", "Cs")), min_size=1, max_size=80))
@settings(max_examples=25, deadline=None)
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, picture_format: str, prompt: str):
    path = tmp_path_factory.mktemp("m") / f"a.{picture_format}"
    path.write_bytes(encode_picture(_IMAGE, _settings(prompt), picture_format))
    assert read_metadata(path) == _settings(prompt)


@pytest.mark.parametrize("prompt", ["&" * 4000, "🍎" * 4000, "é\n" * 2000, '"' * 4000])
@pytest.mark.parametrize("picture_format", FORMATS)
def test_the_longest_prompts_fit(tmp_path: Path, picture_format: str, prompt: str):
    wanted = _settings(prompt) | {"negative": prompt}
    (tmp_path / "a").write_bytes(encode_picture(_IMAGE, wanted, picture_format))
    assert read_metadata(tmp_path / "a") == wanted


def test_other_programs_find_the_customary_text(tmp_path: Path):
    for picture_format in FORMATS:
        path = tmp_path / f"a.{picture_format}"
        path.write_bytes(encode_picture(_IMAGE, _settings("a café"), picture_format))
        with Image.open(path) as image:
            image.load()
            comment = image.getexif().get_ifd(0x8769).get(0x9286, b"")
            text = image.info["parameters"] if picture_format == "png" else comment.removeprefix(b"UNICODE\0").decode("utf-16-be")
        assert text.startswith(
            "a café\nNegative prompt: blurry & <dull>\nSteps: 20, Sampler: euler, Schedule type: trailing, CFG scale: 2.5, Seed: 7, Size: 40x24"
        )


def test_lossless_formats_keep_every_pixel(tmp_path: Path):
    for picture_format in ("png", "webp"):
        (tmp_path / "a").write_bytes(encode_picture(_IMAGE, _settings("x"), picture_format))
        with Image.open(tmp_path / "a") as image:
            assert np.array_equal(np.asarray(image.convert("RGB")), np.asarray(_IMAGE))


def test_equal_settings_give_equal_bytes():
    for picture_format in FORMATS:
        assert encode_picture(_IMAGE, _settings("x"), picture_format) == encode_picture(_IMAGE, _settings("x"), picture_format)


def test_foreign_and_broken_pictures_are_named(tmp_path: Path):
    path = tmp_path / "a.png"
    _IMAGE.save(path)
    with pytest.raises(DataError, match="no tu-diffuse settings"):
        read_metadata(path)
    path.write_bytes(b"GIF89a not a picture")
    with pytest.raises(DataError, match="not a PNG, JPEG or WebP"):
        read_metadata(path)
    whole = encode_picture(_IMAGE, _settings("x"), "png")
    path.write_bytes(whole.replace(json.dumps("tiny").encode(), b'"tin'))
    with pytest.raises(DataError):
        read_metadata(path)
    path.write_bytes(whole[:60])
    with pytest.raises(DataError):
        read_metadata(path)
    with pytest.raises(DataError, match="cannot be read"):
        read_metadata(tmp_path / "absent.png")
