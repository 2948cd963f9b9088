"""A U-Net that reads T5 alone draws what diffusers draws."""

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tu_diffuse.pipeline.model.folder import open_folder
from tu_diffuse.pipeline.model.loading import load_model
from tu_diffuse.pipeline.model.readers import load_text
from tu_diffuse.pipeline.resolve import resolve
from tu_diffuse.pipeline.text_to_image import Picture, Progress, text_to_image
from tu_diffuse.text_encoders.encode import encode_t5
from tu_diffuse.training.sources import text_features

STEPS, SEED, PROMPT = 4, 11, "a red apple"


def drawn(folder: Path, prompt: str = PROMPT) -> tuple[torch.Tensor, list[str]]:
    model = load_model(open_folder(folder), dtype="float32", device="cpu")
    asked: dict[str, Any] = {"steps": STEPS, "sampler": "euler", "schedule": "leading", "guidance": 4.0, "width": 32, "height": 32}
    events = list(text_to_image(model, resolve(model.folder, prompt, [SEED], **asked)))
    [settings] = [event.settings for event in events if isinstance(event, Picture)]
    return [event.x0 for event in events if isinstance(event, Progress)][-1], settings["fallbacks"]


def test_t5_alone(tmp_path: Path):
    from diffusers import DiffusionPipeline, EulerDiscreteScheduler
    from real_layouts import NOISE, t5

    folder = t5(tmp_path / "t5")
    model = open_folder(folder)
    assert model.family == "t5"
    pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = EulerDiscreteScheduler(**NOISE, timestep_spacing="leading")
    asked: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": 4.0, "width": 32, "height": 32, "output_type": "latent"}
    wanted = pipeline(PROMPT, generator=torch.Generator().manual_seed(SEED), **asked).images
    got, fallbacks = drawn(folder)
    assert wanted.std() > 0.05
    assert (got - wanted).abs().max() <= 1e-4
    assert fallbacks == ["unet-by-diffusers"]
    assert (drawn(folder, "a blue star")[0] - wanted).abs().max() > 1e-4

    # Training reads the same tokens.
    place = load_model(model, dtype="float32", device="cpu").place
    part = load_text(model, place)
    tokens = text_features(part, [PROMPT])["tokens"]
    assert torch.equal(tokens, encode_t5([PROMPT], part).conditioning.tokens)  # pyright: ignore[reportArgumentType]
    theirs = pipeline.encode_prompt(PROMPT, torch.device("cpu"), 1, False)[0]
    assert (tokens - theirs).abs().max() <= 1e-5


def test_a_lone_variant_and_shards_are_found(sd1_folder: Path, tmp_path: Path):
    """A folder that holds only `.fp16` files, one of them in shards, draws like the plain one."""
    from diffusers import UNet2DConditionModel

    folder = shutil.copytree(sd1_folder, tmp_path / "model")
    UNet2DConditionModel.from_pretrained(sd1_folder / "unet").save_pretrained(folder / "unet", variant="fp16", max_shard_size="40KB")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert len(list((folder / "unet").glob("*.fp16-*.safetensors"))) + len(list((folder / "unet").glob("*-of-*.fp16.safetensors"))) > 1
    for part, stem in (("vae", "diffusion_pytorch_model"), ("text_encoder", "model")):
        (folder / part / f"{stem}.safetensors").rename(folder / part / f"{stem}.fp16.safetensors")
    assert torch.equal(drawn(folder)[0], drawn(sd1_folder)[0])
    state = load_file(folder / "vae" / "diffusion_pytorch_model.fp16.safetensors")
    save_file({name: tensor * 2 for name, tensor in state.items()}, folder / "vae" / "diffusion_pytorch_model.safetensors")
    assert open_folder(folder).fingerprint != open_folder(sd1_folder).fingerprint
