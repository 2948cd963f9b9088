"""Architectures that ours do not cover are drawn by diffusers' classes, with the same latents as diffusers' own pipeline."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_models import randomised
from tu_diffuse.errors import ModelError
from tu_diffuse.pipeline.folder import open_folder
from tu_diffuse.pipeline.loading import load_model
from tu_diffuse.pipeline.request import resolve
from tu_diffuse.pipeline.text_to_image import Picture, Progress, text_to_image


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


def test_what_nobody_covers_is_one_error(odd_folder: Path, tmp_path: Path):
    folder = tmp_path / "worse"
    shutil.copytree(odd_folder, folder)
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps(config | {"down_block_types": ["NoSuchBlock", "CrossAttnDownBlock2D"]}))
    model = load_model(open_folder(folder), dtype="float32", device="cpu")
    with pytest.raises(ModelError, match="diffusers cannot load unet either"):
        list(text_to_image(model, resolve(model.folder, "a cat", [3], steps=2)))
