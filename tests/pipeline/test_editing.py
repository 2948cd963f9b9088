"""Pictures made from pictures: what is kept is kept, the strength decides who draws, edges meet, and bad pictures are one sentence."""

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tu_diffuse.contracts import Conditioning
from tu_diffuse.errors import DataError, UsageError
from tu_diffuse.pipeline.editing.inputs import examined, fitted, located, pixels_of
from tu_diffuse.pipeline.model.folder import open_folder
from tu_diffuse.pipeline.model.loading import Model, load_model
from tu_diffuse.pipeline.request import rounds, steps_of
from tu_diffuse.pipeline.resolve import resolve
from tu_diffuse.pipeline.text_to_image import Picture, Progress, text_to_image
from tu_diffuse.text_encoders.prompts import Reading, Text

NOISE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def model(ensemble_folder: Path) -> Model:
    return load_model(open_folder(ensemble_folder), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def embedded() -> Model:
    return load_model(open_folder(None), dtype="float32", device="cpu")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    return _saved(tmp_path / "picture.png", NOISE)


def _saved(path: Path, pixels: Any) -> Path:
    Image.fromarray(np.asarray(pixels, np.uint8)).save(path)
    return path


def _drawn(model: Model, prompt: str = "a", seed: int = 1, **asked: Any) -> Picture:
    return next(event for event in text_to_image(model, resolve(model.folder, prompt, [seed], **asked)) if isinstance(event, Picture))


@pytest.mark.parametrize(("strength", "experts"), [(0.25, ["low"]), (0.5, ["high", "low"]), (1.0, ["high", "low"])])
def test_the_strength_decides_which_experts_draw(model: Model, picture: Path, strength: float, experts: list[str]):
    request = resolve(model.folder, "a", [1], init_image=picture, strength=strength)
    events = list(text_to_image(model, request))
    steps, drawn = [event for event in events if isinstance(event, Progress)], events[-1]
    assert list(dict.fromkeys(step.expert for step in steps)) == experts
    assert len(steps) == steps_of(request) == round(4 * strength)
    assert isinstance(drawn, Picture)
    assert [entry["name"] for entry in drawn.settings["experts"]] == experts
    assert drawn.settings["edit"]["init_image"].keys() == {"name", "sha256", "width", "height"}
    assert str(picture.parent) not in str(drawn.settings)


@pytest.mark.parametrize("blur", [0, 3])
def test_kept_pixels_are_untouched(model: Model, picture: Path, tmp_path: Path, blur: float):
    mask = np.zeros((32, 32), np.uint8)
    mask[5:20, 9:31] = 255
    mask[25:27, 3:5] = 90
    new = _drawn(model, init_image=picture, mask=_saved(tmp_path / "mask.png", mask), mask_blur=blur).pixels.numpy().astype(int)
    changed = np.abs(new - NOISE).max(axis=2)
    assert not changed[mask == 0].any()
    assert (changed[mask == 255] > 0).mean() > (0.9 if blur == 0 else 0.5)
    assert changed[(mask > 0) & (mask < 255)].any() or blur


def test_a_mask_may_be_smaller_than_its_picture(model: Model, picture: Path, tmp_path: Path):
    half = np.zeros((16, 16), np.uint8)
    half[8:] = 255
    new = _drawn(model, init_image=picture, mask=_saved(tmp_path / "mask.png", half)).pixels.numpy()
    assert np.array_equal(new[:15], NOISE[:15])
    assert not np.array_equal(new[17:], NOISE[17:])


def test_a_picture_is_cropped_or_stretched_to_the_size_asked_for(model: Model, tmp_path: Path):
    wide = np.zeros((32, 64, 3), np.uint8)
    wide[:, 16:48] = 255
    path = _saved(tmp_path / "wide.png", wide)
    assert fitted(pixels_of(examined(path, "init-image")), 32, 32, "crop").min() == 255
    assert fitted(wide, 32, 32, "stretch")[:, [0, 31]].max() == 0
    request = resolve(model.folder, "a", [1], init_image=path)
    assert (request.width, request.height) == (64, 32)
    with pytest.raises(UsageError, match=r"--width 31 of odd.png is not a multiple of 4.* 28 and 32"):
        resolve(model.folder, "a", [1], init_image=_saved(tmp_path / "odd.png", NOISE[:, :31]))
    with pytest.raises(UsageError, match="give both"):
        resolve(model.folder, "a", [1], init_image=path, width=32)


@pytest.mark.parametrize("mode", ["latent", "pixel"])
def test_an_enlarged_drawing(model: Model, mode: str):
    asked: dict[str, Any] = {"upscale": 2.0, "upscale_mode": mode, "upscale_steps": 6, "upscale_strength": 0.5}
    first, again, plain = _drawn(model, **asked), _drawn(model, **asked), _drawn(model)
    assert first.pixels.shape == (64, 64, 3)
    assert torch.equal(first.pixels, again.pixels)
    assert first.pixels.float().std() > 5
    small = np.asarray(Image.fromarray(first.pixels.numpy()).resize((32, 32), Image.Resampling.BOX)).astype(float)
    other = _drawn(model, seed=9, **asked).pixels.numpy()
    unlike = np.asarray(Image.fromarray(other).resize((32, 32), Image.Resampling.BOX)).astype(float)
    assert np.abs(small - plain.pixels.numpy()).mean() < np.abs(unlike - plain.pixels.numpy()).mean()
    assert first.settings["experts"][-1]["last_step"] == 4 + 3
    assert [(part.width, part.steps, part.first) for part in rounds(resolve(model.folder, "a", [1], **asked))] == [(32, 4, 0), (64, 6, 3)]


def _around(model: Model, tile: str | None, latents: torch.Tensor, told: Conditioning) -> tuple[torch.Tensor, torch.Tensor]:
    """What U-Net and decoder make of latents."""
    network = model.experts.table(model.folder.noise.timestep_at, tile=tile)
    with torch.no_grad():
        return network(latents, torch.tensor([1.0]), told), model.codec.tiled(tile).decode(latents).pixels


@pytest.mark.parametrize("folder", ["sd1_folder", "ensemble_folder"])
@pytest.mark.parametrize("axes", ["x", "y", "xy"])
def test_tiling_has_no_edge_and_leaves_nothing_behind(request: pytest.FixtureRequest, folder: str, axes: str):
    """A network that sees no edge commutes with rolling the picture, by steps that its strides divide."""
    model = load_model(open_folder(request.getfixturevalue(folder)), dtype="float32", device="cpu")
    told = next(iter(model.readers.values()))(Text("a", "", 32, 32, Reading()))[0].conditioning
    latents = torch.randn(1, model.folder.channels, 16, 16, generator=torch.Generator().manual_seed(0))
    before = _around(model, None, latents, told)
    plain = _around(model, axes, latents, told)
    for axis, dim in (("x", 3), ("y", 2)):
        rolled = _around(model, axes, latents.roll(4, dim), told)
        for scale, made, shifted in zip((1, model.folder.factor), plain, rolled, strict=True):
            away = (made.roll(4 * scale, dim) - shifted).abs().max()
            assert (away < 1e-4) if axis in axes else (away > 1e-3), (axis, scale, float(away))
    for old, new in zip(before, _around(model, None, latents, told), strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize("axes", ["x", "y", "xy"])
def test_tiling_in_strips(sd1_folder: Path, axes: str):
    codec = load_model(open_folder(sd1_folder), dtype="float32", device="cpu").codec
    latents = torch.randn(1, 4, 12, 8, generator=torch.Generator().manual_seed(0))
    pixels = torch.rand(1, 3, 24, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    made: list[tuple[torch.Tensor, torch.Tensor]] = []
    for rows in (None, 5):
        codec.tile_rows = rows
        tiled = codec.tiled(axes)
        made.append((tiled.decode(latents).pixels, tiled.encode(pixels).latents))
    for whole, strips in zip(*made, strict=True):
        assert (whole - strips).abs().max() < 1e-4
    assert (made[0][0] - codec.decode(latents).pixels).abs().max() > 1e-2


def test_the_step_around_the_edge_is_no_larger_than_elsewhere(embedded: Model):
    """Of the embedded model's picture: mean difference between neighbouring columns or rows, at the edge against inside."""
    asked: dict[str, Any] = {"prompt": "a red apple on a beach", "seed": 5, "steps": 8}
    tiled, plain = (_drawn(embedded, tile=tile, **asked).pixels.float() for tile in ("xy", None))
    for dim in (0, 1):
        steps = (tiled - tiled.roll(1, dim)).abs().mean(dim=(1 - dim, 2))
        assert steps[0] <= steps[1:].max()
        ordinary = (plain - plain.roll(1, dim)).abs().mean(dim=(1 - dim, 2))
        print(f"dim {dim}: tiled {steps[0]:.2f} of {steps[1:].max():.2f}, plain {ordinary[0]:.2f} of {ordinary[1:].max():.2f}")
        assert steps[0] < ordinary[0]


def test_pictures_of_any_mode(tmp_path: Path):
    base = Image.fromarray(NOISE).resize((32, 16))
    exif = Image.Exif()
    exif[0x0112] = 6
    base.save(tmp_path / "turned.jpg", exif=exif)
    assert (examined(tmp_path / "turned.jpg", "init-image").width, examined(tmp_path / "turned.jpg", "init-image").height) == (16, 32)
    for mode in ("CMYK", "L", "P", "1", "LA", "RGBA"):
        path = tmp_path / f"{mode}.{'jpg' if mode == 'CMYK' else 'png'}"
        base.convert(mode).save(path)
        pixels = pixels_of(examined(path, "init-image"))
        assert pixels.shape == (16, 32, 3)
        wanted = np.asarray(base.convert("L" if mode in ("L", "LA") else "1" if mode == "1" else "RGB").convert("RGB")).astype(int)
        assert np.abs(pixels - wanted).mean() < 25, mode
    deep = (np.arange(512, dtype=np.uint16).reshape(16, 32) * 128).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert np.array_equal(pixels_of(examined(tmp_path / "deep.png", "init-image"))[:, :, 0], deep >> 8)
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert pixels_of(examined(tmp_path / "clear.png", "init-image")).min() == 255


def _bomb(path: Path) -> Path:
    """A PNG of a few kilobytes that claims 50000×50000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100_000))) + chunk(b"IEND", b""))
    return path


def test_bad_pictures_are_one_sentence(model: Model, picture: Path, tmp_path: Path):
    cut = tmp_path / "cut.png"
    cut.write_bytes(picture.read_bytes()[:-40])
    text = tmp_path / "text.png"
    text.write_text("no picture")
    Image.fromarray(NOISE).save(tmp_path / "moving.gif")
    bad = {cut: "cut", text: "UnidentifiedImageError", tmp_path / "moving.gif": "PNG, JPEG or WebP", _bomb(tmp_path / "bomb.png"): "bomb"}
    for path, said in bad.items():
        with pytest.raises(DataError, match=said) as raised:
            resolve(model.folder, "a", [1], init_image=path)
        assert "\n" not in str(raised.value)
    for path in (tmp_path / "missing.png", tmp_path, Path("nul\0.png")):
        with pytest.raises(UsageError, match="cannot be read"):
            resolve(model.folder, "a", [1], init_image=path)
    clear, black, wide = tmp_path / "clear.png", _saved(tmp_path / "black.png", NOISE * 0), _saved(tmp_path / "wide.png", NOISE[:16])
    Image.new("RGBA", (32, 32), (255, 255, 255, 99)).save(clear)
    for mask, error, said in ((clear, DataError, "transparent"), (black, DataError, "black everywhere"), (wide, UsageError, "size")):
        with pytest.raises(error, match=said):
            resolve(model.folder, "a", [1], init_image=picture, mask=mask)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"strength": 0.5}, "--strength needs --init-image"),
        ({"resize": "crop"}, "--resize needs --init-image"),
        ({"mask": "m.png"}, "--mask needs --init-image"),
        ({"init_image": True, "mask_blur": 1.0}, "--mask-blur needs --mask"),
        ({"init_image": True, "strength": 0.1}, "less than one step"),
        ({"init_image": True, "strength": 1.5}, "--strength 1.5 is out of range"),
        ({"init_image": True, "resize": "pad"}, "--resize 'pad'"),
        ({"upscale_mode": "pixel"}, "--upscale-mode needs --upscale"),
        ({"upscale": 9.0}, "--upscale 9 is out of range"),
        ({"upscale": 1.3}, "--upscale 1.3 makes the width 41.6"),
        ({"upscale": 2.0, "upscale_strength": 0.01}, "less than one step"),
        ({"init_image": True, "mask": True, "upscale": 2.0}, "--upscale would change the pixels that --mask keeps"),
        ({"tile": "z"}, "--tile 'z'"),
    ],
)
def test_what_contradicts_itself_is_refused(model: Model, picture: Path, asked: dict[str, Any], said: str):
    with pytest.raises(UsageError) as raised:
        resolve(model.folder, "a", [1], **{name: picture if value is True else value for name, value in asked.items()})
    assert said in str(raised.value)


def test_an_inpainting_model_needs_a_mask(inpainting_folder: Path, picture: Path):
    folder = open_folder(inpainting_folder)
    assert (folder.inpaints, folder.channels) == (True, 4)
    for asked in ({}, {"init_image": picture}):
        with pytest.raises(UsageError, match="only repaints parts of pictures; give --init-image and --mask"):
            resolve(folder, "a", [1], **asked)


def test_a_picture_that_changed_or_went_is_named(model: Model, picture: Path, tmp_path: Path):
    request = resolve(model.folder, "a", [1], init_image=picture)
    assert request.edit is not None
    moved = tmp_path / "elsewhere" / "other-name.png"
    moved.parent.mkdir()
    moved.write_bytes(picture.read_bytes())
    _saved(picture, NOISE[::-1])
    with pytest.raises(UsageError, match=r"picture.png has changed"):
        list(text_to_image(model, request))
    assert located(request.edit.init_image, [tmp_path, moved]).path == str(moved)
    with pytest.raises(UsageError, match=r"picture.png \(32×32, sha256 .*--input"):
        located(request.edit.init_image, [tmp_path])
