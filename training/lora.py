"""LoRA by peft: adapters put into U-Nets, and written as files that diffusers and kohya's programs read."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import save_file
from torch import Tensor, nn

from ..unet.lora import METADATA

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")  # the linear layers of attention, as diffusers' training scripts adapt them
_ADAPTER = "default"


def add_adapters(unets: nn.ModuleDict, rank: int, alpha: float, seed: int) -> None:
    """Freeze the U-Nets and put a low-rank pair beside each linear layer of their attention (Hu et al. 2021, arXiv 2106.09685): W + alpha/rank · B·A.

    A is drawn with deviation 1/rank from `seed`, B is zero, so that nothing changes at first.
    """
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(TARGETS), init_lora_weights=False)  # pyright: ignore[reportArgumentType]
    generator = torch.Generator("cpu").manual_seed(seed)
    for unet in unets.values():
        unet.requires_grad_(False)
        inject_adapter_in_model(config, unet, _ADAPTER)
        for name, parameter in unet.named_parameters():
            if f".lora_A.{_ADAPTER}." in name:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / rank)
            elif f".lora_B.{_ADAPTER}." in name:
                parameter.data.zero_()


def pairs_of(weights: Mapping[str, Tensor], expert: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Module name -> (down, up) of one expert, from weights named as `add_adapters` leaves them in a ModuleDict."""
    prefix, middle = f"{expert}.", f".lora_A.{_ADAPTER}.weight"
    downs = {name: tensor for name, tensor in weights.items() if name.startswith(prefix) and name.endswith(middle)}
    return {name.removeprefix(prefix).removesuffix(middle): (down, weights[name.replace(".lora_A.", ".lora_B.")]) for name, down in downs.items()}


def write_diffusers(path: Path, pairs: Mapping[str, tuple[Tensor, Tensor]], rank: int, alpha: float) -> None:
    """Write `pytorch_lora_weights.safetensors` for diffusers' `load_lora_weights`: peft's names, its settings in the header."""
    tensors: dict[str, Tensor] = {}
    for module, (down, up) in pairs.items():
        tensors[f"unet.{module}.lora_A.weight"] = down.detach().cpu().contiguous()
        tensors[f"unet.{module}.lora_B.weight"] = up.detach().cpu().contiguous()
    settings = {"unet.r": rank, "unet.lora_alpha": alpha, "unet.target_modules": list(TARGETS)}
    save_file(tensors, path, metadata={"format": "pt", METADATA: json.dumps(settings, sort_keys=True)})


def write_kohya(path: Path, pairs: Mapping[str, tuple[Tensor, Tensor]], alpha: float) -> None:
    """Write the layout of kohya's programs: `lora_unet_<module>.lora_down.weight`, `.lora_up.weight` and `.alpha`, dots turned to underscores."""
    tensors: dict[str, Tensor] = {}
    for module, (down, up) in pairs.items():
        name = "lora_unet_" + module.replace(".", "_")
        tensors[f"{name}.lora_down.weight"] = down.detach().cpu().contiguous()
        tensors[f"{name}.lora_up.weight"] = up.detach().cpu().contiguous()
        tensors[f"{name}.alpha"] = torch.tensor(float(alpha))
    save_file(tensors, path, metadata={"format": "pt"})
