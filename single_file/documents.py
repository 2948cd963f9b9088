"""The JSON files that a single-file checkpoint would have as a model folder."""

from typing import Any

from .layout import Layout

_PIPELINES = {
    "sd1": "StableDiffusionPipeline",
    "sd2": "StableDiffusionPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "sdxl-refiner": "StableDiffusionXLImg2ImgPipeline",
}
# The schedulers of the published folders, with their own settings: SD 1.5 and 2 (base), 2.1 (v), SDXL and its refiner.
_SCHEDULERS: dict[str, dict[str, Any]] = {
    "PNDMScheduler": {"set_alpha_to_one": False, "skip_prk_steps": True},
    "DDIMScheduler": {"set_alpha_to_one": False, "clip_sample": False},
    "EulerDiscreteScheduler": {"interpolation_type": "linear"},
}
_SIDES = {"sd1": 512, "sd2": 512, "sdxl": 1024, "sdxl-refiner": 1024}
_SIDE_V = 768  # of Stable Diffusion 2 and 2.1 with v-prediction


def documents(layout: Layout, prediction: str) -> dict[str, dict[str, Any]]:
    """The content of each JSON file, by its path in the folder; equal to the published folders' wherever it decides a picture.

    Args:
        layout: of the file.
        prediction: "epsilon" or "v_prediction", what the U-Net puts out.
    """
    family, texts = layout.family, [part for part in layout.configs if part.startswith("text_encoder")]
    second_v = family == "sd2" and prediction == "v_prediction"
    scheduler = "EulerDiscreteScheduler" if family.startswith("sdxl") else "DDIMScheduler" if second_v else "PNDMScheduler"
    side = layout.side or (_SIDE_V if second_v else _SIDES[family])
    factor = 2 ** (len(layout.configs["vae"]["block_out_channels"]) - 1)

    index: dict[str, Any] = {"_class_name": _PIPELINES[family]}
    if family.startswith("sdxl"):
        index |= {"force_zeros_for_empty_prompt": family == "sdxl", "text_encoder": [None, None], "tokenizer": [None, None]}
        index |= {"requires_aesthetics_score": True} if family == "sdxl-refiner" else {}
    else:
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    index |= {part: ["transformers", layout.configs[part]["architectures"][0]] for part in texts}
    index |= {part.replace("text_encoder", "tokenizer"): ["transformers", "CLIPTokenizer"] for part in texts}
    index |= {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"], "scheduler": ["diffusers", scheduler]}

    files = {f"{part}/config.json": dict(config) for part, config in layout.configs.items()}
    files["unet/config.json"]["sample_size"] = max(1, side // factor)
    files["scheduler/scheduler_config.json"] = {
        "_class_name": scheduler,
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": prediction,
        "timestep_spacing": "trailing" if layout.zero_terminal_snr else "leading",
        "steps_offset": 1,
        **({"rescale_betas_zero_snr": True} if layout.zero_terminal_snr else {}),
        **_SCHEDULERS[scheduler],
    }
    for part in texts:
        config = layout.configs[part]
        files[f"{part.replace('text_encoder', 'tokenizer')}/tokenizer_config.json"] = {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": config["max_position_embeddings"],
            "bos_token": "<|startoftext|>",
            "eos_token": "<|endoftext|>",
            "unk_token": "<|endoftext|>",
            "pad_token": "!" if config["hidden_act"] == "gelu" else "<|endoftext|>",  # OpenCLIP's is token 0
        }
    return {"model_index.json": index, **files}
