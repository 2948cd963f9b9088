"""A model folder's tensors as those of a single file: what `layout.py` reads, the other way round."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .layout import TEXT_PREFIXES, UNET, VAE
from .names import JOINT, PARAMETERS, levels_of, open_clip_modules, renamed, unet_modules, vae_modules

_ARCHITECTURES = {
    "sd1": "stable-diffusion-v1",
    "sd2": "stable-diffusion-v2-512",
    "sd2-v": "stable-diffusion-v2-768-v",
    "sdxl": "stable-diffusion-xl-v1-base",
    "sdxl-refiner": "stable-diffusion-xl-v1-refiner",
}
_IMPLEMENTATIONS = {"sd1": "https://github.com/CompVis/stable-diffusion", "sd2": "https://github.com/Stability-AI/stablediffusion"}
_ATTENTION = re.compile(r".*\.attentions\.\d+\.to_(q|k|v|out\.0)\.weight")


def unet_tensors(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """A U-Net's tensors under the file's names.

    Args:
        state: under diffusers' names.
        config: the U-Net's `config.json`.

    Raises:
        KeyError: a tensor that a single file has no name for.
    """
    modules = unet_modules(levels_of(config))
    return {UNET + _name(name, modules): tensor for name, tensor in state.items()}


def vae_tensors(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """An autoencoder's tensors under the file's names, where attention projects by 1×1 convolutions; arguments and errors as for `unet_tensors`."""
    modules = vae_modules(len(config["block_out_channels"]), config.get("layers_per_block", 1))
    return {VAE + _name(name, modules): tensor[:, :, None, None] if _ATTENTION.match(name) else tensor for name, tensor in state.items()}


def text_tensors(state: Mapping[str, Tensor], config: Mapping[str, Any], family: str, part: str) -> dict[str, Tensor]:
    """A text tower's tensors under the file's names.

    Args:
        state: under the names of `CLIPText`.
        config: the tower's `config.json`.
        family: a key of `TEXT_PREFIXES`.
        part: "text_encoder" or "text_encoder_2".

    Raises:
        KeyError: a tensor that a single file has no name for.
    """
    prefix = TEXT_PREFIXES[family][part]
    if not prefix.endswith(".model."):
        return {prefix + name: tensor for name, tensor in state.items()}
    layers = int(config["num_hidden_layers"])
    modules = open_clip_modules(layers)
    joint = {f"text_model.encoder.layers.{layer}.{ours}": (layer, theirs) for layer in range(layers) for ours, (theirs, _) in JOINT.items()}
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name in PARAMETERS:
            tensors[PARAMETERS[name]] = tensor.T.contiguous() if name == "text_projection.weight" else tensor
        elif name in joint:
            layer, theirs = joint[name]
            if ".q_proj." in name:
                thirds = [state[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"]
                tensors[f"transformer.resblocks.{layer}.{theirs}"] = torch.cat(thirds)
        else:
            tensors[_name(name, modules)] = tensor
    return {prefix + name: tensor for name, tensor in tensors.items()}


def metadata(family: str, prediction: str, side: int, title: str) -> dict[str, str]:
    """The header's metadata (Stability AI's Model Metadata Standard 1.0.1).

    Args:
        family: a key of `TEXT_PREFIXES`.
        prediction: "epsilon" or "v_prediction".
        side: of the training pictures, in pixels.
        title: the model's name.
    """
    said = "v" if prediction == "v_prediction" else "epsilon"
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": _ARCHITECTURES["sd2-v" if (family, said) == ("sd2", "v") else family],
        "modelspec.implementation": _IMPLEMENTATIONS.get(family, "https://github.com/Stability-AI/generative-models"),
        "modelspec.title": title,
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.prediction_type": said,
    }


def _name(name: str, modules: Mapping[str, str]) -> str:
    theirs = renamed(name, modules)
    if theirs is None:
        raise KeyError(name)
    return theirs
