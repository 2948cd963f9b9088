"""LoRA files in the layouts that people bring, written by diffusers and peft, or by the naming that kohya's programs document."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import save_file
from torch import Tensor, nn

LINEAR = ["to_q", "to_k", "to_v", "to_out.0"]
WITH_CONVOLUTIONS = [*LINEAR, "proj_in", "ff.net.2", "conv1", "conv2", "conv_shortcut", "conv", "time_emb_proj", "conv_in", "conv_out"]
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1"]
RANK, ALPHA = 4, 6.0
TEXT_PARTS = ("text_encoder", "text_encoder_2")


def pipeline_of(folder: Path) -> Any:
    """diffusers' own pipeline of a folder, in float32."""
    pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def write_diffusers(path: Path, model: Path, seed: int = 1, targets: list[str] | None = None, text: bool = True, alpha: float = ALPHA) -> Path:
    """What `save_lora_weights` writes of adapters in the U-Net and the text encoders; peft draws them."""
    torch.manual_seed(seed)
    pipeline = pipeline_of(model)
    layers: dict[str, Any] = {}
    for part in ("unet", *(TEXT_PARTS if text else ())):
        network = getattr(pipeline, part, None)
        if network is not None:
            config = LoraConfig(
                r=RANK, lora_alpha=alpha, init_lora_weights=False, target_modules=(targets or WITH_CONVOLUTIONS) if part == "unet" else TEXT
            )
            inject_adapter_in_model(config, network)
            layers |= {f"{part}_lora_layers": _lora_of(network, config), f"{part}_lora_adapter_metadata": config.to_dict()}
    kind = StableDiffusionXLPipeline if hasattr(pipeline, "text_encoder_2") else StableDiffusionPipeline
    kind.save_lora_weights(path.parent, weight_name=path.name, **layers)
    return path


def _lora_of(network: nn.Module, config: LoraConfig) -> dict[str, Tensor]:
    network.peft_config = {"default": config}  # pyright: ignore[reportArgumentType]
    return get_peft_model_state_dict(network)


def write_peft(folder: Path, network: nn.Module, targets: list[str], seed: int = 1, **settings: Any) -> Path:
    """The folder that peft's own `save_pretrained` writes."""
    torch.manual_seed(seed)
    config = LoraConfig(**{"r": RANK, "lora_alpha": ALPHA, "init_lora_weights": False, "target_modules": targets} | settings)
    get_peft_model(network, config).save_pretrained(folder)  # pyright: ignore[reportArgumentType]
    return folder


def write_kohya(path: Path, names: dict[str, torch.Size], seed: int = 1, rank: int = RANK, alpha: float | None = ALPHA) -> Path:
    """Pairs as sd-scripts names them.

    Args:
        path: of the file.
        names: such as `lora_unet_down_blocks_0_attentions_0_proj_in` -> shape of the weight that is changed.
        seed: of the values.
        rank: of all pairs.
        alpha: of all pairs; None leaves it out.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, shape in names.items():
        down = torch.randn((rank, *shape[1:]), generator=generator) / math.sqrt(shape[1:].numel())
        tensors[f"{name}.lora_down.weight"] = down
        tensors[f"{name}.lora_up.weight"] = torch.randn((shape[0], rank, *[1] * (len(shape) - 2)), generator=generator) / rank
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
    save_file(tensors, path, metadata={"ss_network_dim": str(rank), "ss_network_args": json.dumps({})})
    return path


def kohya_names(model: Path, text: bool = True) -> dict[str, torch.Size]:
    """Names and shapes of a kohya LoRA for an SD folder: U-Net by diffusers' names, convolutions too, and `lora_te`; dots become underscores."""
    pipeline = pipeline_of(model)
    names = {f"lora_unet_{name.replace('.', '_')}": shape for name, shape in weights_of(pipeline.unet, WITH_CONVOLUTIONS).items()}
    if text:
        names |= {f"lora_te_{text_name(name)}": shape for name, shape in weights_of(pipeline.text_encoder, TEXT).items()}
    return names


def text_name(module: str) -> str:
    """A module of CLIP's tower as kohya's programs call it, whose transformers still has the level `text_model`."""
    return f"text_model.{module.removeprefix('text_model.')}".replace(".", "_")


def weights_of(network: nn.Module, targets: list[str]) -> dict[str, torch.Size]:
    """Module -> shape of its weight, for those whose names end in one of the targets."""
    return {
        name: module.weight.shape
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and any(name == target or name.endswith(f".{target}") for target in targets)
    }
