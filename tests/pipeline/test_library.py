"""Architectures that ours do not cover are drawn by diffusers' classes, with the same latents as diffusers' own pipeline."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from lora_files import LINEAR, pipeline_of, write_diffusers
from PIL import Image
from safetensors.torch import load_file
from tiny_models import randomised
from tu_diffuse.errors import ModelError, UsageError
from tu_diffuse.pipeline.adapters.adapters import Shelf
from tu_diffuse.pipeline.model.folder import open_folder
from tu_diffuse.pipeline.model.loading import adapted_to, load_model
from tu_diffuse.pipeline.resolve import resolve
from tu_diffuse.pipeline.text_to_image import Picture, Progress, text_to_image
from tu_diffuse.training.forking import fork, put_weights
from tu_diffuse.training.intervals import sigma_of


@pytest.fixture(scope="module")
def odd_folder(sd1_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SD 1 with resampling blocks that ours lacks, and a tiny autoencoder instead of the KL one."""
    from diffusers import AutoencoderTiny, UNet2DConditionModel

    folder = tmp_path_factory.mktemp("odd") / "odd"
    shutil.copytree(sd1_folder, folder)
    for part in ("unet", "vae"):
        shutil.rmtree(folder / part)
    unet = UNet2DConditionModel(
        block_out_channels=(16, 32),
        down_block_types=("ResnetDownsampleBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        norm_num_groups=8,
        layers_per_block=1,
        sample_size=16,
        cross_attention_dim=16,
        attention_head_dim=4,
    )
    randomised(unet, 3).save_pretrained(folder / "unet")
    vae = AutoencoderTiny(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))
    randomised(vae, 4).save_pretrained(folder / "vae")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"vae": ["diffusers", "AutoencoderTiny"]}))
    return folder


def test_fallback_draws_what_diffusers_draws(odd_folder: Path):
    from diffusers import DiffusionPipeline

    model = load_model(open_folder(odd_folder), dtype="float32", device="cpu")
    events = list(text_to_image(model, resolve(model.folder, "a cat", [3], steps=4, guidance=3.0)))
    latents = [event.x0 for event in events if isinstance(event, Progress)][-1]
    picture = next(event for event in events if isinstance(event, Picture))
    pipeline = DiffusionPipeline.from_pretrained(odd_folder)
    pipeline.set_progress_bar_config(disable=True)
    asked = {"num_inference_steps": 4, "guidance_scale": 3.0}
    wanted = pipeline("a cat", generator=torch.Generator().manual_seed(3), output_type="latent", **asked).images
    image = pipeline("a cat", generator=torch.Generator().manual_seed(3), output_type="pt", **asked).images[0]
    assert wanted.std() > 0.1
    assert (latents - wanted).abs().max() <= 1e-4 * max(1.0, float(wanted.abs().max()))
    assert (picture.pixels.permute(2, 0, 1) / 255 - image).abs().max() <= 2 / 255
    assert picture.settings["fallbacks"] == ["vae-by-diffusers", "unet-by-diffusers"]


def test_fallback_begins_with_pictures(odd_folder: Path, tmp_path: Path):
    from diffusers import StableDiffusionImg2ImgPipeline

    picture = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(picture)
    model = load_model(open_folder(odd_folder), dtype="float32", device="cpu")
    request = resolve(model.folder, "a cat", [3], steps=4, guidance=3.0, init_image=picture, strength=0.75)
    latents = [event.x0 for event in text_to_image(model, request) if isinstance(event, Progress)][-1]
    pipeline = StableDiffusionImg2ImgPipeline.from_pretrained(odd_folder)
    pipeline.set_progress_bar_config(disable=True)
    asked = {"num_inference_steps": 4, "guidance_scale": 3.0, "strength": 0.75, "output_type": "latent"}
    wanted = pipeline("a cat", image=Image.open(picture), generator=torch.Generator().manual_seed(3), **asked).images
    assert wanted.std() > 0.02
    assert (latents - wanted).abs().max() <= 1e-4 * max(1.0, float(wanted.abs().max()))
    with pytest.raises(UsageError, match="--tile needs"):
        list(text_to_image(model, resolve(model.folder, "a cat", [3], tile="x")))


def test_deltas_of_what_the_library_computes(odd_folder: Path, tmp_path: Path):
    """A trained child draws the same stored as a delta and stored whole, and other pictures than its parent."""
    model = open_folder(odd_folder)

    def pixels(folder: Path) -> torch.Tensor:
        loaded = load_model(open_folder(folder), dtype="float32", device="cpu")
        return next(event.pixels for event in text_to_image(loaded, resolve(loaded.folder, "a cat", [3], steps=4)) if isinstance(event, Picture))

    for name, whole in (("delta", False), ("whole", True)):
        fork(model, [sigma_of(model.noise, 500)], tmp_path / name, whole=whole)
        assert torch.equal(pixels(tmp_path / name), pixels(odd_folder))
        state = load_file(odd_folder / "unet" / "diffusion_pytorch_model.safetensors")
        state["conv_out.bias"] += 0.5
        put_weights(open_folder(tmp_path / name), "t0000-0500", tmp_path / f"{name}-trained", tensors=state)
    assert torch.equal(pixels(tmp_path / "delta-trained"), pixels(tmp_path / "whole-trained"))
    assert not torch.equal(pixels(tmp_path / "delta-trained"), pixels(odd_folder))
    (tmp_path / "delta-trained" / "unet_t0000-0500" / "delta.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="are not the ones that"):
        pixels(tmp_path / "delta-trained")


def test_loras_of_what_the_library_computes(odd_folder: Path, tmp_path: Path):
    path = write_diffusers(tmp_path / "a.safetensors", odd_folder, targets=[*LINEAR, "conv1"])
    shelf = Shelf(open_folder(odd_folder))
    request = resolve(shelf.folder, "a cat", [3], steps=4, guidance=3.0, loras=[shelf.lora(f"{path}:0.2")])
    plain = load_model(shelf.folder, dtype="float32", device="cpu")
    events = list(text_to_image(adapted_to(plain, shelf, request), request))
    latents = [event.x0 for event in events if isinstance(event, Progress)][-1]
    pipeline = pipeline_of(odd_folder)
    asked = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "latent"}
    before = pipeline("a cat", generator=torch.Generator().manual_seed(3), **asked).images
    pipeline.load_lora_weights(tmp_path, weight_name=path.name, adapter_name="a")
    pipeline.set_adapters(["a"], [0.2])
    wanted = pipeline("a cat", generator=torch.Generator().manual_seed(3), **asked).images
    scale = max(1.0, float(wanted.abs().max()))
    assert (wanted - before).abs().max() > 5e-3 * scale
    assert (latents - wanted).abs().max() <= 1e-4 * scale


def test_what_nobody_covers_is_one_error(odd_folder: Path, tmp_path: Path):
    folder = tmp_path / "worse"
    shutil.copytree(odd_folder, folder)
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps(config | {"down_block_types": ["NoSuchBlock", "CrossAttnDownBlock2D"]}))
    model = load_model(open_folder(folder), dtype="float32", device="cpu")
    with pytest.raises(ModelError, match="diffusers cannot load unet either"):
        list(text_to_image(model, resolve(model.folder, "a cat", [3], steps=2)))
