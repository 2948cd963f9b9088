"""Tiny model folders with random weights, written by diffusers' and transformers' own `save_pretrained`: oracles and food for whole runs."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, T5Config, T5EncoderModel
from tu_diffuse.text_encoders.conditioner import Conditioner, ConditionerConfig
from tu_diffuse.unet.experts import ExpertEntry, write_experts

LENGTH = 16
CLIP_PAIR: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
NOISE: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "steps_offset": 1}
_VAE: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
    "latent_channels": 4,
    "sample_size": 32,
}
_UNET: dict[str, Any] = {
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "norm_num_groups": 8,
    "layers_per_block": 1,
    "sample_size": 16,
}


def clip_tokenizer(folder: Path) -> CLIPTokenizer:
    """Byte-level BPE without merges: every letter is a token. Written to the folder with vocab.json and merges.txt as checkpoints carry them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(letter + "</w>" for letter in alphabet), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": LENGTH, "tokenizer_class": "CLIPTokenizer"}))
    return CLIPTokenizer.from_pretrained(folder, model_max_length=LENGTH)


def clip_config(width: int, act: str = "quick_gelu") -> CLIPTextConfig:
    """Two layers; the ids of `clip_tokenizer`."""
    return CLIPTextConfig(
        vocab_size=514,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        projection_dim=width,
        hidden_act=act,
        bos_token_id=512,
        eos_token_id=513,
    )


def randomised(module: nn.Module, seed: int) -> nn.Module:
    """Fill with weights whose effect is large enough to be seen: deviation 0.5/√fan-in, norms near one."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        scale = 0.1 if parameter.ndim < 2 else 1.0 if "embedding" in name else 0.5 / parameter[0].numel() ** 0.5
        centre = 1.0 if parameter.ndim == 1 and name.endswith("weight") else 0.0
        parameter.data = centre + scale * noise
    return module.eval()


@torch.no_grad()
def noise_predicting(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Make a random epsilon network return mostly the noise in its input, as a trained one does, so that its latents are of the usual size.

    Channels 2c and 2c + 1 carry +x_c and −x_c from `conv_in` over the last skip to `conv_out`, where silu(a) − silu(−a) = a.
    Everything else that the network computes is added at a tenth.
    """
    latents = unet.config["out_channels"]
    signs = torch.eye(latents).repeat_interleave(2, dim=0) * torch.tensor([1.0, -1.0]).repeat(latents)[:, None]  # (2·latents, latents)
    carried = slice(0, 2 * latents)
    unet.conv_in.weight[carried], unet.conv_in.bias[carried] = 0, 0
    unet.conv_in.weight[carried, :latents, 1, 1] = signs
    last, width = unet.up_blocks[-1].resnets[-1], unet.conv_in.out_channels
    last.conv_shortcut.weight[carried], last.conv_shortcut.bias[carried] = 0, 0
    last.conv_shortcut.weight[carried, width : width + 2 * latents, 0, 0] = torch.eye(2 * latents)
    attentions = [unet.up_blocks[-1].attentions[-1].proj_out] if hasattr(unet.up_blocks[-1], "attentions") else []
    for layer in (last.conv2, *attentions, unet.conv_out):
        layer.weight *= 0.1
        layer.bias *= 0.1
    unet.conv_norm_out.weight[carried], unet.conv_norm_out.bias[carried] = 1, 0
    unet.conv_out.weight[:, carried] = 0
    unet.conv_out.weight[:, carried, 1, 1] = signs.T
    return unet


def sd_folder(folder: Path, prediction_type: str = "epsilon", shown: int = 0) -> Path:
    """Stable Diffusion 1 (epsilon) or 2 (v_prediction) in miniature: 32 pixels, 16 latents; with channels that show an inpainting network more."""
    second = prediction_type == "v_prediction"
    unet = randomised(
        UNet2DConditionModel(
            **_UNET,
            in_channels=4 + shown,
            cross_attention_dim=16,
            attention_head_dim=(2, 4) if second else 4,
            use_linear_projection=second,
        ),
        3,
    )
    StableDiffusionPipeline(
        vae=randomised(AutoencoderKL(**_VAE), 1),
        text_encoder=randomised(CLIPTextModel(clip_config(16, "gelu" if second else "quick_gelu")), 2),
        tokenizer=clip_tokenizer(folder.with_name(folder.name + "-tokenizer")),
        unet=unet if second else noise_predicting(unet),
        scheduler=EulerDiscreteScheduler(**NOISE, prediction_type=prediction_type),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def inpainting_folder(folder: Path) -> Path:
    """Stable Diffusion 1's inpainting model in miniature: a U-Net of 9 channels."""
    return sd_folder(folder, shown=5)


def sdxl_folder(folder: Path, shown: int = 0) -> Path:
    """SDXL base in miniature: two CLIPs joined on features, size ids; with channels that show an inpainting network more."""
    unet = UNet2DConditionModel(
        **_UNET,
        in_channels=4 + shown,
        cross_attention_dim=16 + 24,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24 + 6 * 8,
    )
    tokenizer = clip_tokenizer(folder.with_name(folder.name + "-tokenizer"))
    StableDiffusionXLPipeline(
        vae=randomised(AutoencoderKL(**_VAE, scaling_factor=0.13025), 1),
        text_encoder=randomised(CLIPTextModel(clip_config(16)), 2),
        text_encoder_2=randomised(CLIPTextModelWithProjection(clip_config(24, "gelu")), 4),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=noise_predicting(randomised(unet, 3)),
        scheduler=EulerDiscreteScheduler(**NOISE, timestep_spacing="leading"),
    ).save_pretrained(folder)
    return folder


def refiner_folder(folder: Path) -> Path:
    """SDXL's refiner in miniature: only the second CLIP of `sdxl_folder`, a U-Net of other widths, an aesthetic score among the size ids."""
    unet = UNet2DConditionModel(
        **_UNET | {"block_out_channels": (24, 32)},
        cross_attention_dim=24,
        attention_head_dim=(3, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24 + 5 * 8,
    )
    StableDiffusionXLImg2ImgPipeline(
        vae=randomised(AutoencoderKL(**_VAE, scaling_factor=0.13025), 1),
        text_encoder=None,
        text_encoder_2=randomised(CLIPTextModelWithProjection(clip_config(24, "gelu")), 4),
        tokenizer=None,
        tokenizer_2=clip_tokenizer(folder.with_name(folder.name + "-tokenizer")),
        unet=noise_predicting(randomised(unet, 8)),
        scheduler=EulerDiscreteScheduler(**NOISE, timestep_spacing="leading"),
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
    ).save_pretrained(folder)
    return folder


def ensemble_folder(folder: Path) -> Path:
    """A tu-diffuse ensemble in miniature: CLIP and T5 joined by a conditioner, two experts, AutoencoderDC (factor 4), defaults.json."""
    channels, width, pooled = 8, 24, 20
    clip_tokenizer(folder / "tokenizer")
    t5_tokenizer(folder / "tokenizer_2")
    randomised(CLIPTextModelWithProjection(clip_config(16)), 2).save_pretrained(folder / "text_encoder")
    t5 = T5Config(vocab_size=103, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu")
    randomised(T5EncoderModel(t5), 5).save_pretrained(folder / "text_encoder_2")
    unet = _UNET | {
        "in_channels": channels,
        "out_channels": channels,
        "sample_size": 8,
        "cross_attention_dim": width,
        "attention_head_dim": 4,
        "class_embed_type": "projection",
        "projection_class_embeddings_input_dim": pooled,
    }
    randomised(UNet2DConditionModel(**unet), 3).save_pretrained(folder / "unet")
    randomised(UNet2DConditionModel(**unet), 6).save_pretrained(folder / "unet_low")
    vae = AutoencoderDC(
        latent_channels=channels,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=(8, 16, 16),
        decoder_block_out_channels=(8, 16, 16),
        encoder_layers_per_block=(0, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), ()),
        decoder_qkv_multiscales=((), (), ()),
        upsample_block_type="pixel_shuffle",
        downsample_block_type="pixel_unshuffle",
        decoder_act_fns="silu",
        scaling_factor=1.0,
    )
    randomised(vae, 1).save_pretrained(folder / "vae")
    EulerDiscreteScheduler(**NOISE, prediction_type="v_prediction", timestep_spacing="trailing").save_pretrained(folder / "scheduler")
    config = ConditionerConfig(clip_width=16, clip_pooled_width=16, t5_width=16, width=width, pooled_width=pooled)
    (folder / "conditioner").mkdir()
    (folder / "conditioner" / "config.json").write_text(json.dumps(config.to_dict()))
    save_file(randomised(Conditioner(config), 7).state_dict(), folder / "conditioner" / "diffusion_pytorch_model.safetensors")
    write_json(
        folder / "model_index.json",
        {
            "_class_name": "TuDiffusePipeline",
            "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "text_encoder_2": ["transformers", "T5EncoderModel"],
            "tokenizer_2": ["transformers", "T5Tokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderDC"],
            "scheduler": ["diffusers", "EulerDiscreteScheduler"],
            "conditioner": ["tu_diffuse", "Conditioner"],
        },
    )
    write_experts(folder, [ExpertEntry("low", "unet_low", 0.0, 1.5), ExpertEntry("high", "unet", 1.5)])
    write_json(folder / "defaults.json", {"steps": 4, "sampler": "dpmpp_2m", "schedule": "trailing", "guidance": 3.0, "width": 32, "height": 32})
    return folder


def t5_tokenizer(folder: Path) -> None:
    """A unigram tokenizer over single letters, as `tokenizer.json`."""
    letters = [chr(c) for c in range(32, 127) if chr(c) != " "]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in letters)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single=["$A", "</s>"], special_tokens=[("</s>", 1)])
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json", {"model_max_length": 24, "tokenizer_class": "T5Tokenizer", "eos_token": "</s>", "pad_token": "<pad>"}
    )


def write_json(path: Path, value: object) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(value))


def clip_pair_folder(folder: Path) -> Path:
    """A random CLIP pair in open_clip's layout."""
    import open_clip

    folder.mkdir(parents=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": CLIP_PAIR, "preprocess_cfg": {}}))
    torch.manual_seed(0)
    save_file(open_clip.CLIP(**CLIP_PAIR).state_dict(), folder / "open_clip_model.safetensors")
    return folder
