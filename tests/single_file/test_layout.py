"""Single files at their published sizes, without storage: diffusers recognises what we write, and we read back what we wrote."""

from functools import cache, partial
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint, infer_diffusers_model_type
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
from tu_diffuse.errors import ModelError
from tu_diffuse.single_file.documents import documents
from tu_diffuse.single_file.layout import TEXT_PREFIXES, Layout, layout_of
from tu_diffuse.single_file.writing import metadata, text_tensors, unet_tensors, vae_tensors
from tu_diffuse.text_encoders.clip import clip_state_dict
from tu_diffuse.weights import without_storage

# The configs of the published folders.
CROSS, UP = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3
SD: dict[str, Any] = {"block_out_channels": [320, 640, 1280, 1280], "down_block_types": CROSS, "up_block_types": UP, "layers_per_block": 2}
TIME: dict[str, Any] = {"addition_embed_type": "text_time", "addition_time_embed_dim": 256, "use_linear_projection": True}
UNETS: dict[str, dict[str, Any]] = {
    "sd1": SD | {"cross_attention_dim": 768, "attention_head_dim": 8},
    "sd2": SD | {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True},
    "sdxl": TIME
    | {
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "layers_per_block": 2,
        "transformer_layers_per_block": [1, 2, 10],
        "cross_attention_dim": 2048,
        "attention_head_dim": [5, 10, 20],
        "projection_class_embeddings_input_dim": 2816,
    },
    "sdxl-refiner": TIME
    | {
        "block_out_channels": [384, 768, 1536, 1536],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "layers_per_block": 2,
        "transformer_layers_per_block": 4,
        "cross_attention_dim": 1280,
        "attention_head_dim": [6, 12, 24, 24],
        "projection_class_embeddings_input_dim": 2560,
    },
}
VAE: dict[str, Any] = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
}
CLIP_L: dict[str, Any] = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "projection_dim": 768}
CLIP_H: dict[str, Any] = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16, "hidden_act": "gelu"}
CLIP_G: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
TEXTS = {
    "sd1": {"text_encoder": (CLIPTextModel, CLIP_L)},
    "sd2": {"text_encoder": (CLIPTextModel, CLIP_H)},
    "sdxl": {"text_encoder": (CLIPTextModel, CLIP_L), "text_encoder_2": (CLIPTextModelWithProjection, CLIP_G)},
    "sdxl-refiner": {"text_encoder_2": (CLIPTextModelWithProjection, CLIP_G)},
}
DIFFUSERS_NAMES = {"sd1": "v1", "sd2": "v2", "sdxl": "xl_base", "sdxl-refiner": "xl_refiner"}


@cache
def unet_state(family: str, in_channels: int = 4) -> dict[str, Tensor]:
    return without_storage(lambda: UNet2DConditionModel(**UNETS[family], in_channels=in_channels)).state_dict()


@cache
def published(family: str, in_channels: int = 4) -> dict[str, Tensor]:
    """A single file's tensors at the published size, on the meta device."""
    tensors = unet_tensors(unet_state(family, in_channels), UNETS[family])
    tensors |= vae_tensors(without_storage(lambda: AutoencoderKL(**VAE)).state_dict(), VAE)
    for part, (kind, text) in TEXTS[family].items():
        state = clip_state_dict(without_storage(partial(kind, CLIPTextConfig(**text))).state_dict())
        tensors |= text_tensors(state, text, family, part)
    return tensors


def read(tensors: dict[str, Tensor], **said: str) -> Layout:
    return layout_of("file", {name: {"shape": list(tensor.shape)} for name, tensor in tensors.items()}, said)


@pytest.mark.parametrize("family", UNETS)
def test_published_sizes(family: str):
    tensors = published(family)
    assert infer_diffusers_model_type(tensors) == DIFFUSERS_NAMES[family]
    layout = read(tensors)
    assert (layout.family, layout.prediction, layout.side) == (family, None, None)
    unet, vae = layout.configs["unet"], layout.configs["vae"]
    for name, value in UNETS[family].items():
        if name != "transformer_layers_per_block":
            assert unet.get(name) == value, name
    wanted = {name: tensor.shape for name, tensor in unet_state(family).items()}
    # Depths of levels without attention differ and decide nothing.
    ours = without_storage(lambda: UNet2DConditionModel(**{name: value for name, value in unet.items() if not name.startswith("_")})).state_dict()
    assert {name: tensor.shape for name, tensor in ours.items()} == wanted
    assert {name: piece.shape for name, piece in layout.components["unet"].items()} == wanted
    assert {name: value for name, value in vae.items() if name in VAE} == VAE
    assert vae["scaling_factor"] == (0.13025 if family.startswith("sdxl") else 0.18215)
    for part, (kind, text) in TEXTS[family].items():
        config = layout.configs[part]
        assert config["architectures"] == [kind.__name__]
        wanted_text = CLIPTextConfig(**text | ({"projection_dim": text["hidden_size"]} if family == "sd2" else {})).to_dict()
        names = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"]
        assert all(config[name] == wanted_text[name] for name in [*names, "hidden_act", "projection_dim", "layer_norm_eps"])
    size = {"sd1": 64, "sd2": 64}.get(family, 128)
    assert documents(layout, "epsilon")["unet/config.json"]["sample_size"] == size
    assert documents(layout, "v_prediction")["unet/config.json"]["sample_size"] == (96 if family == "sd2" else size)


@pytest.mark.parametrize("family", UNETS)
def test_names_are_those_that_diffusers_reads(family: str):
    tensors, layout = published(family), read(published(family))
    config = dict(layout.configs["unet"])
    theirs = convert_ldm_unet_checkpoint(dict(tensors), config | {"class_embed_type": None})
    assert {name: tensor.shape for name, tensor in theirs.items()} == {name: piece.shape for name, piece in layout.components["unet"].items()}
    wanted = convert_ldm_vae_checkpoint(dict(tensors), dict(layout.configs["vae"]))
    assert {name: tensor.shape for name, tensor in wanted.items()} == {name: piece.shape for name, piece in layout.components["vae"].items()}


def test_inpainting_is_told_by_its_channels():
    tensors = published("sd1", in_channels=9)
    assert infer_diffusers_model_type(tensors) == "inpainting"
    assert read(tensors).configs["unet"]["in_channels"] == 9


@pytest.mark.parametrize(
    ("said", "prediction", "side"),
    [
        ({}, None, None),
        (metadata("sd2", "v_prediction", 768, "a"), "v_prediction", 768),
        (metadata("sd2", "epsilon", 512, "a"), "epsilon", 512),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v"}, "v_prediction", None),
    ],
)
def test_metadata_say_what_is_predicted(said: dict[str, str], prediction: str | None, side: int | None):
    layout = read(published("sd2"), **said)
    assert (layout.prediction, layout.side) == (prediction, side)


def test_v_prediction_sdxl_says_so_by_empty_tensors():
    tensors = published("sdxl")
    assert read(tensors | {"v_pred": torch.zeros(0)}).prediction == "v_prediction"
    layout = read(tensors | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)})
    assert documents(layout, "v_prediction")["scheduler/scheduler_config.json"]["rescale_betas_zero_snr"] is True
    assert "rescale_betas_zero_snr" not in documents(read(tensors), "v_prediction")["scheduler/scheduler_config.json"]


def some(*names: str) -> dict[str, Tensor]:
    return {name: torch.zeros(1) for name in names}


STRANGERS = {
    "empty": ({}, "it is empty"),
    "lora-kohya": (some("lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"), "a LoRA file"),
    "lora-peft": (some("unet.mid_block.attentions.0.proj_in.lora_A.weight"), "a LoRA file"),
    "controlnet": (some("control_model.time_embed.0.weight"), "a ControlNet"),
    "sd3": (some("model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight"), "a diffusion transformer"),
    "flux": (some("double_blocks.0.img_attn.qkv.weight"), "a diffusion transformer"),
    "unet": (some("down_blocks.0.resnets.0.conv1.weight"), "a component in diffusers' layout"),
    "other": (some("a", "b"), "it holds a, b, …"),
    "unet-alone": (some("model.diffusion_model.input_blocks.0.0.weight"), "is no checkpoint"),
}


@pytest.mark.parametrize("name", STRANGERS)
def test_strangers_are_refused_not_guessed(name: str):
    tensors, message = STRANGERS[name]
    with pytest.raises(ModelError, match=message):
        read(tensors)


def without(tensors: dict[str, Tensor], *prefixes: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(prefixes)}


def test_what_does_not_fit_together_is_refused():
    sd1, sdxl = published("sd1"), published("sdxl")
    unet = "model.diffusion_model."
    for tensors, message in (
        (without(sd1, "first_stage_model."), "holds no autoencoder"),
        (without(sd1, "cond_stage_model."), "is no checkpoint"),
        (without(sd1, f"{unet}out.2."), r"lacks the tensor 'out\.2\.weight'"),
        (without(sdxl, f"{unet}label_emb."), r"lacks the tensor 'model\.diffusion_model\.label_emb\.0\.0\.weight'"),
        (sdxl | {name: tensor for name, tensor in sd1.items() if name.startswith("cond_stage_model.")}, "is no checkpoint"),
        (without(published("sd2"), unet) | {name: tensor for name, tensor in sd1.items() if name.startswith(unet)}, "width 1024 .* reads 768"),
        (sd1 | some(f"{unet}input_blocks.1.2.norm.weight"), "1 tensors that no Stable Diffusion checkpoint has"),
        (sdxl | some("edm_mean"), "EDM"),
    ):
        with pytest.raises(ModelError, match=message):
            read(tensors)


def test_what_training_leaves_behind_is_not_in_the_way():
    sd1 = published("sd1")
    prefix = TEXT_PREFIXES["sd1"]["text_encoder"]
    text = [f"{prefix}text_model.embeddings.position_ids", f"{prefix}logit_scale"]
    more = some("alphas_cumprod", "model_ema.decay", "first_stage_model.loss.logvar", *text)
    assert read(sd1 | more).components == read(sd1).components


def test_more_blocks_than_any_network_has():
    sd1 = published("sd1")
    for name in (
        "model.diffusion_model.input_blocks.{}.0.op.weight",
        "first_stage_model.encoder.down.{}.x",
        "first_stage_model.encoder.down.0.block.{}.x",
    ):
        with pytest.raises(ModelError, match="tensors of other shapes"):
            read(sd1 | some(*(name.format(number) for number in range(9000))))


def test_damaged_headers():
    for entry in ({}, {"shape": None}, {"shape": ["a"]}):
        with pytest.raises(ModelError, match="damaged safetensors header"):
            layout_of("file", {"a": entry}, {})
