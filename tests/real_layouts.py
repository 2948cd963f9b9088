"""Models with the layouts, key names and configs of published checkpoints and CLIP's own tokenizer, in smaller widths, with random weights.

Written by diffusers and transformers themselves. Heads have 64 channels where those of the family do, so that a single file says as much as its
folder.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tiny_models import NOISE, noise_predicting, randomised, t5_tokenizer, write_json
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)
from tu_diffuse.text_encoders.clip_vocabulary import clip_merges, clip_words

SIDE = 32  # pixels, 16 latents
_CROSS, _PLAIN = "CrossAttn{}Block2D", "{}Block2D"


def tokenizer(folder: Path, pad: str) -> CLIPTokenizer:
    """CLIP's own, as checkpoints carry it."""
    folder.mkdir(parents=True, exist_ok=True)
    merges = clip_merges()
    write_json(folder / "vocab.json", clip_words(merges, "<|startoftext|>", "<|endoftext|>"))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": pad}
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77, **special)


def _text(width: int, layers: int, act: str, projection: bool, seed: int) -> Any:
    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        max_position_embeddings=77,
        projection_dim=width,
        hidden_act=act,
        bos_token_id=0,
        eos_token_id=2,
    )
    return randomised((CLIPTextModelWithProjection if projection else CLIPTextModel)(config), seed)


def _vae(scale: float) -> AutoencoderKL:
    vae = AutoencoderKL(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=32,
        sample_size=SIDE,
        scaling_factor=scale,
    )
    return randomised(vae, 1)


def _unet(widths: tuple[int, ...], attention: tuple[bool, ...], seed: int, epsilon: bool = True, **options: Any) -> UNet2DConditionModel:
    kinds = [_CROSS if here else _PLAIN for here in attention]
    unet = UNet2DConditionModel(
        sample_size=SIDE // 2,
        block_out_channels=widths,
        down_block_types=tuple(kind.format("Down") for kind in kinds),
        up_block_types=tuple(kind.format("Up") for kind in reversed(kinds)),
        layers_per_block=2,
        **options,
    )
    return calm(randomised(unet, seed), epsilon)


@torch.no_grad()
def calm(unet: UNet2DConditionModel, epsilon: bool) -> UNet2DConditionModel:
    """Make a random network's output of about the size of a trained one's: mostly the noise in its input for epsilon, small for v."""
    unet.conv_out.weight *= 0.3
    return noise_predicting(unet) if epsilon else unet


def sd1(folder: Path, prediction: str = "epsilon", channels: int = 4) -> Path:
    """Stable Diffusion 1: CLIP-L, convolutions around the transformers, 8 heads at every level."""
    unet = _unet((64, 128, 128), (True, True, False), 3, prediction == "epsilon", in_channels=channels, cross_attention_dim=64, attention_head_dim=8)
    return _sd(folder, unet, _text(64, 2, "quick_gelu", False, 2), "<|endoftext|>", DPMSolverMultistepScheduler(**NOISE, prediction_type=prediction))


def sd2(folder: Path, prediction: str = "v_prediction", channels: int = 4) -> Path:
    """Stable Diffusion 2: OpenCLIP-H but for its last layer, heads of 64 channels."""
    options: dict[str, Any] = {"attention_head_dim": (1, 2, 2), "use_linear_projection": True}
    unet = _unet((64, 128, 128), (True, True, False), 4, prediction == "epsilon", in_channels=channels, cross_attention_dim=64, **options)
    return _sd(
        folder,
        unet,
        _text(64, 23, "gelu", False, 5),
        "!",
        DDIMScheduler(**NOISE, prediction_type=prediction, clip_sample=False, set_alpha_to_one=False),
    )


def _sd(folder: Path, unet: UNet2DConditionModel, text: Any, pad: str, scheduler: Any) -> Path:
    StableDiffusionPipeline(
        vae=_vae(0.18215),
        text_encoder=text,
        tokenizer=tokenizer(folder.with_name(folder.name + "-tokenizer"), pad),
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def sdxl(folder: Path, prediction: str = "epsilon", channels: int = 4) -> Path:
    """SDXL base: CLIP-L and OpenCLIP bigG, transformers of growing depth, none at the highest resolution."""
    unet = _unet(
        (64, 128, 128),
        (False, True, True),
        6,
        prediction == "epsilon",
        in_channels=channels,
        cross_attention_dim=64 + 128,
        attention_head_dim=(1, 2, 2),
        transformer_layers_per_block=(1, 2, 3),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=128 + 6 * 16,
    )
    StableDiffusionXLPipeline(
        vae=_vae(0.13025),
        text_encoder=_text(64, 2, "quick_gelu", False, 7),
        text_encoder_2=_text(128, 3, "gelu", True, 8),
        tokenizer=tokenizer(folder.with_name(folder.name + "-tokenizer"), "<|endoftext|>"),
        tokenizer_2=tokenizer(folder.with_name(folder.name + "-tokenizer-2"), "!"),
        unet=unet,
        scheduler=EulerDiscreteScheduler(**NOISE, timestep_spacing="leading", prediction_type=prediction),
    ).save_pretrained(folder)
    return folder


def refiner(folder: Path, prediction: str = "epsilon") -> Path:
    """SDXL's refiner: OpenCLIP bigG alone (that of `sdxl`), four levels, an aesthetic score among the size ids."""
    unet = _unet(
        (64, 64, 128, 128),
        (False, True, True, False),
        9,
        prediction == "epsilon",
        cross_attention_dim=128,
        attention_head_dim=(1, 1, 2, 2),
        transformer_layers_per_block=2,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=128 + 5 * 16,
    )
    StableDiffusionXLImg2ImgPipeline(
        vae=_vae(0.13025),
        text_encoder=None,
        text_encoder_2=_text(128, 3, "gelu", True, 8),
        tokenizer=None,
        tokenizer_2=tokenizer(folder.with_name(folder.name + "-tokenizer-2"), "!"),
        unet=unet,
        scheduler=EulerDiscreteScheduler(**NOISE, timestep_spacing="leading", prediction_type=prediction),
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
    ).save_pretrained(folder)
    return folder


def t5(folder: Path, prediction: str = "epsilon") -> Path:
    """A U-Net that reads T5 alone, in DeepFloyd's manner: a projection of T5's tokens, which it also pools, and text keys within self-attention."""
    unet = UNet2DConditionModel(
        sample_size=SIDE // 2,
        block_out_channels=(64, 128),
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        layers_per_block=2,
        resnet_time_scale_shift="scale_shift",
        act_fn="gelu",
        attention_head_dim=32,
        cross_attention_dim=64,
        cross_attention_norm="group_norm",
        only_cross_attention=(True, False),
        encoder_hid_dim=32,
        encoder_hid_dim_type="text_proj",
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
    )
    encoder = T5Config(vocab_size=103, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu")
    t5_tokenizer(folder.with_name(folder.name + "-tokenizer"))
    StableDiffusionPipeline(
        vae=_vae(0.18215),
        text_encoder=randomised(T5EncoderModel(encoder), 5),
        tokenizer=T5Tokenizer.from_pretrained(folder.with_name(folder.name + "-tokenizer")),
        unet=calm(randomised(unet, 10), prediction == "epsilon"),
        scheduler=EulerDiscreteScheduler(**NOISE, prediction_type=prediction),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


FAMILIES = {"sd1": sd1, "sd2": sd2, "sdxl": sdxl, "sdxl-refiner": refiner}
