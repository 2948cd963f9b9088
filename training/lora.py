"""LoRA by peft: adapters put into networks, and written as files that diffusers and kohya's programs read."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import save_file
from torch import Tensor, nn

from ..single_file.names import ldm_names
from ..text_encoders.clip import CLIPText
from ..text_encoders.t5 import T5Encoder
from ..unet.lora import METADATA
from ..unet.unet import UNet

# The linear layers of attention, as diffusers' and kohya's training scripts adapt them.
_TARGETS: dict[type[nn.Module], tuple[str, ...]] = {
    UNet: ("to_q", "to_k", "to_v", "to_out.0"),
    CLIPText: ("q_proj", "k_proj", "v_proj", "out_proj"),
    T5Encoder: ("SelfAttention.q", "SelfAttention.k", "SelfAttention.v", "SelfAttention.o"),
}
_ADAPTER = "default"
# What sd-scripts calls text encoders: SD's only one; SDXL's two; CLIP and T5 as in its scripts for SD 3 and Flux.
_KOHYA_TEXT = {
    "sd": {"text_encoder": "lora_te"},
    "sdxl": {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"},
    "sdxl-refiner": {"text_encoder_2": "lora_te2"},
    "clip-t5": {"text_encoder": "lora_te1", "text_encoder_2": "lora_te3"},
    "sd-t5": {"text_encoder": "lora_te", "text_encoder_2": "lora_te3"},
    "sdxl-t5": {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2", "text_encoder_3": "lora_te3"},
    "sdxl-refiner-t5": {"text_encoder_2": "lora_te2", "text_encoder_3": "lora_te3"},
}

Pairs = Mapping[str, tuple[Tensor, Tensor]]
"""Module name -> (down, up): what is added to its weight is alpha/rank · up · down."""


def add_adapters(networks: Iterable[nn.Module], rank: int, alpha: float, seed: int) -> None:
    """Freeze networks and put a low-rank pair beside each linear layer of their attention (Hu et al. 2021, arXiv 2106.09685): W + alpha/rank · B·A.

    The join of CLIP and T5 gets one beside every linear layer. A is drawn with deviation 1/rank from `seed`, B is zero, so that nothing changes at
    first.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    for network in networks:
        every = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
        targets = list(_TARGETS.get(type(network), every))
        network.requires_grad_(False)
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, init_lora_weights=False)  # pyright: ignore[reportArgumentType]
        inject_adapter_in_model(config, network, _ADAPTER)
        for name, parameter in network.named_parameters():
            if f".lora_A.{_ADAPTER}." in name:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / rank)
            elif f".lora_B.{_ADAPTER}." in name:
                parameter.data.zero_()


def pairs_of(weights: Mapping[str, Tensor], network: str) -> dict[str, tuple[Tensor, Tensor]]:
    """The pairs of one network, from weights whose names are `network`, a dot, and what `add_adapters` makes of the module's name."""
    prefix, middle = f"{network}.", f".lora_A.{_ADAPTER}.weight"
    downs = {name: tensor for name, tensor in weights.items() if name.startswith(prefix) and name.endswith(middle)}
    return {name.removeprefix(prefix).removesuffix(middle): (down, weights[name.replace(".lora_A.", ".lora_B.")]) for name, down in downs.items()}


def with_pairs(state: Mapping[str, Tensor], pairs: Pairs, scale: float) -> dict[str, Tensor]:
    """A network's own tensors out of those with adapters beside them, each pair added to its weight."""
    plain = {name.replace(".base_layer.", "."): tensor for name, tensor in state.items() if ".lora_A." not in name and ".lora_B." not in name}
    for module, (down, up) in pairs.items():
        plain[f"{module}.weight"] = plain[f"{module}.weight"] + scale * (up @ down)
    return plain


def write_diffusers(path: Path, pairs: Mapping[str, Pairs], rank: int, alpha: float) -> None:
    """Write a file for diffusers' `load_lora_weights`: peft's names after that of the component (`unet`, `text_encoder`), settings in the header.

    Args:
        path: of the file.
        pairs: component -> its pairs.
        rank: of all.
        alpha: of all.
    """
    tensors: dict[str, Tensor] = {}
    settings: dict[str, object] = {}
    for component, own in pairs.items():
        for module, (down, up) in own.items():
            tensors[f"{component}.{module}.lora_A.weight"] = down.detach().cpu().contiguous()
            tensors[f"{component}.{module}.lora_B.weight"] = up.detach().cpu().contiguous()
        ends = sorted({module.rpartition(".")[2] if not module[-1].isdigit() else ".".join(module.split(".")[-2:]) for module in own})
        settings |= {f"{component}.r": rank, f"{component}.lora_alpha": alpha, f"{component}.target_modules": ends}
    save_file(tensors, path, metadata={"format": "pt", METADATA: json.dumps(settings, sort_keys=True)})


def write_kohya(path: Path, pairs: Mapping[str, Pairs], alpha: float, family: str, unet: Mapping[str, Any]) -> None:
    """Write the layout of kohya's programs: `<name>.lora_down.weight`, `.lora_up.weight` and `.alpha`, dots of a module's name turned to underscores.

    The name begins with `lora_unet_`, or for text encoders `lora_te_` (SD), `lora_te1_` and `lora_te2_` (SDXL) or `lora_te3_` (T5). SDXL's U-Net has
    the block names of the original network there, `input_blocks`, `middle_block` and `output_blocks`.

    Args:
        path: of the file.
        pairs: component -> its pairs; the join of CLIP and T5 has no name there.
        alpha: of all.
        family: of the model.
        unet: the U-Net's `config.json`.
    """
    tensors: dict[str, Tensor] = {}
    for component, own in pairs.items():
        prefix = "lora_unet" if component == "unet" else _KOHYA_TEXT[family][component]
        original = ldm_names(own, unet) if component == "unet" and family.startswith("sdxl") else {}
        renamed = {module: name for name, module in original.items()}
        for module, (down, up) in own.items():
            name = f"{prefix}_{renamed.get(module, module).replace('.', '_')}"
            tensors[f"{name}.lora_down.weight"] = down.detach().cpu().contiguous()
            tensors[f"{name}.lora_up.weight"] = up.detach().cpu().contiguous()
            tensors[f"{name}.alpha"] = torch.tensor(float(alpha))
    save_file(tensors, path, metadata={"format": "pt"})
