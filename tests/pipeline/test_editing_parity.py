"""The same picture, mask, seed and sampler give the latents of diffusers' own img2img and inpainting pipelines."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parity import PROMPT, TOLERANCE, latents, theirs
from PIL import Image
from tiny_models import NOISE
from tu_diffuse.pipeline.model.folder import open_folder
from tu_diffuse.training.composing import compose
from tu_diffuse.training.intervals import sigma_of

SAMPLERS = [
    ("euler", "EulerDiscreteScheduler", "leading", {"timestep_spacing": "leading"}, 1.0),
    ("euler_a", "EulerAncestralDiscreteScheduler", "linspace", {}, 0.8),
    ("heun", "HeunDiscreteScheduler", "linspace", {}, 0.5),
    ("ddim", "DDIMScheduler", "leading", {"clip_sample": False, "set_alpha_to_one": True}, 0.5),
    ("dpmpp_2m", "DPMSolverMultistepScheduler", "linspace", {}, 0.5),
    ("unipc", "UniPCMultistepScheduler", "linspace", {}, 1.0),
]
"""Name, diffusers' class, spacing, its options, and the strength it is tried with."""
STOCHASTIC = ("euler_a",)


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def sdxl_inpainting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny_models import sdxl_folder

    return sdxl_folder(tmp_path_factory.mktemp("models") / "sdxl-inpainting", shown=5)


@pytest.fixture(scope="module")
def mask(picture: Path) -> Path:
    """Its edges lie on the latents' grid, where our rule (a position is repainted if any of its pixels is) and diffusers' agree."""
    white = np.zeros((32, 32), np.uint8)
    white[8:24, 12:32] = 255
    Image.fromarray(white).save(picture.with_name("mask.png"))
    return picture.with_name("mask.png")


def _compare(folder: Path, kind: str, sampler: Any, strength: float, picture: Path, mask: Path | None) -> None:
    import diffusers

    name, scheduler, schedule, options, _ = sampler
    pipeline = theirs(folder, kind)
    pipeline.scheduler = getattr(diffusers, scheduler)(**NOISE, **options, prediction_type=pipeline.scheduler.config.prediction_type)
    wanted = pipeline(
        PROMPT,
        image=Image.open(picture),
        strength=strength,
        num_inference_steps=8,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(11),
        output_type="latent",
        **({} if mask is None else {"mask_image": Image.open(mask), "height": 32, "width": 32}),
    ).images
    asked = {"steps": 8, "guidance": 4.0, "sampler": name, "schedule": schedule, "init_image": picture, "strength": strength, "mask": mask}
    got = latents(folder, seeds=[11], **asked)
    assert wanted.std() > 0.02
    difference = float((got - wanted).abs().max())
    print(f"{kind} {name} {strength} {difference:.1e} of {float(wanted.abs().max()):.1f}")
    assert difference <= TOLERANCE


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: sampler[0])
def test_img2img(sd1_folder: Path, picture: Path, sampler: Any):
    _compare(sd1_folder, "StableDiffusionImg2ImgPipeline", sampler, sampler[4], picture, None)


@pytest.mark.parametrize(("folder", "kind"), [("sd2_folder", "StableDiffusionImg2ImgPipeline"), ("sdxl_folder", "StableDiffusionXLImg2ImgPipeline")])
def test_img2img_of_other_families(request: pytest.FixtureRequest, picture: Path, folder: str, kind: str):
    for strength in (0.3, 0.8):
        _compare(request.getfixturevalue(folder), kind, SAMPLERS[0], strength, picture, None)


@pytest.mark.parametrize("sampler", [one for one in SAMPLERS if one[0] not in STOCHASTIC], ids=lambda sampler: sampler[0])
def test_inpainting_with_an_ordinary_network(sd1_folder: Path, picture: Path, mask: Path, sampler: Any):
    """Ancestral samplers are left out: diffusers spends a draw on the masked picture, which an ordinary network never sees."""
    _compare(sd1_folder, "StableDiffusionInpaintPipeline", sampler, sampler[4], picture, mask)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: sampler[0])
def test_inpainting_with_an_inpainting_network(inpainting_folder: Path, picture: Path, mask: Path, sampler: Any):
    _compare(inpainting_folder, "StableDiffusionInpaintPipeline", sampler, sampler[4], picture, mask)


def test_sdxl_inpainting(sdxl_folder: Path, picture: Path, mask: Path):
    for strength in (0.5, 1.0):
        _compare(sdxl_folder, "StableDiffusionXLInpaintPipeline", SAMPLERS[0], strength, picture, mask)


@pytest.mark.parametrize("sampler", [SAMPLERS[0], SAMPLERS[1], SAMPLERS[4]], ids=lambda sampler: sampler[0])
def test_sdxl_inpainting_with_an_inpainting_network(sdxl_inpainting: Path, picture: Path, mask: Path, sampler: Any):
    for strength in (0.5, 1.0):
        _compare(sdxl_inpainting, "StableDiffusionXLInpaintPipeline", sampler, strength, picture, mask)


@pytest.mark.parametrize(("folder", "kind"), [("sd1_folder", "StableDiffusionInpaintPipeline"), ("sdxl_folder", "StableDiffusionXLInpaintPipeline")])
def test_ancestral_inpainting_with_an_ordinary_network(
    request: pytest.FixtureRequest, picture: Path, mask: Path, monkeypatch: pytest.MonkeyPatch, folder: str, kind: str
):
    """Once diffusers takes the masked picture's draw, of which an ordinary network sees nothing, from a stream of its own."""
    path = request.getfixturevalue(folder)
    pipeline = theirs(path, kind)
    prepare = pipeline.prepare_mask_latents

    def from_its_own_stream(*args: Any, **named: Any) -> Any:
        aside = torch.Generator().manual_seed(0)
        return prepare(*(aside if isinstance(one, torch.Generator) else one for one in args), **named)

    with pytest.raises(AssertionError):
        _compare(path, kind, SAMPLERS[1], 0.8, picture, mask)
    monkeypatch.setattr(pipeline, "prepare_mask_latents", from_its_own_stream)
    for strength in (0.5, 0.8, 1.0):
        _compare(path, kind, SAMPLERS[1], strength, picture, mask)


@pytest.mark.parametrize(("strength", "experts"), [(0.8, 2), (0.5, 2), (0.2, 1)])
def test_img2img_on_base_and_refiner(sdxl_folder: Path, refiner_folder: Path, picture: Path, tmp_path: Path, strength: float, experts: int):
    """The base from the strength's step to timestep 200, the refiner from there; at a low strength the refiner alone."""
    folders = [open_folder(folder) for folder in (sdxl_folder, refiner_folder)]
    compose(folders, [sigma_of(folders[0].noise, 200)], tmp_path / "both")
    first, second = (theirs(folder, "StableDiffusionXLImg2ImgPipeline") for folder in (sdxl_folder, refiner_folder))
    for pipeline in (first, second):
        pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    common: dict[str, Any] = {"num_inference_steps": 10, "guidance_scale": 4.0, "output_type": "latent", "prompt": PROMPT}
    begun: dict[str, Any] = {"image": Image.open(picture), "strength": strength, "generator": torch.Generator().manual_seed(11)}
    if experts == 2:
        begun_by_base = first(**common, **begun, denoising_end=0.8).images
        wanted = second(**common, image=begun_by_base, denoising_start=0.8).images
    else:
        wanted = second(**common, **begun).images
    asked: dict[str, Any] = {"steps": 10, "guidance": 4.0, "sampler": "euler", "schedule": "leading", "init_image": picture, "strength": strength}
    got = latents(tmp_path / "both", seeds=[11], **asked)
    print(f"base and refiner, strength {strength}: {float((got - wanted).abs().max()):.1e} of {float(wanted.abs().max()):.1f}")
    assert wanted.std() > 0.02
    assert (got - wanted).abs().max() <= TOLERANCE
    assert (latents(sdxl_folder, seeds=[11], **asked) - wanted).abs().max() > 10 * TOLERANCE


def test_what_is_asked_changes_the_latents(inpainting_folder: Path, sd1_folder: Path, picture: Path, mask: Path, tmp_path: Path):
    """So that the comparisons above cannot pass with picture, mask or strength left out."""
    other, half = tmp_path / "other.png", tmp_path / "half.png"
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(other)
    Image.fromarray(np.repeat(np.array([[0], [255]], np.uint8), 16, 0).repeat(32, 1)).save(half)
    for folder in (inpainting_folder, sd1_folder):
        asked: dict[str, Any] = {"steps": 4, "sampler": "euler", "init_image": picture, "mask": mask, "strength": 0.75}
        base = latents(folder, seeds=[11], **asked)
        for change in ({"init_image": other}, {"mask": half}, {"strength": 0.5}):
            assert (latents(folder, seeds=[11], **(asked | change)) - base).abs().max() > 10 * TOLERANCE, change
