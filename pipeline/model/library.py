"""Architectures that our networks do not cover: diffusers' own classes behind our contracts. Imported only when a folder needs it.

The classes are chosen from the list in `allowed.py`, never from what a folder names freely, and read safetensors only.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_asym_kl import AsymmetricAutoencoderKL
from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from ...contracts import Conditioning
from ...errors import ModelError, UsageError, first_line, out_of_memory
from ...model_files import chosen_variant, read_headers, read_json, weight_files
from ...unet.deltas import chain, check_hashes, expert_sha256, read_expert
from ...unet.denoiser import Residuals
from ...unet.experts import ExpertEntry
from ...unet.layers import Recorder
from ...weights import check_finite, placed
from .folder import ModelFolder
from .quantize import quantized

MAX_WIDTH, MAX_LAYERS = 2**17, 512
_VAES = {
    "AutoencoderKL": AutoencoderKL,
    "AutoencoderDC": AutoencoderDC,
    "AutoencoderTiny": AutoencoderTiny,
    "AsymmetricAutoencoderKL": AsymmetricAutoencoderKL,
}


@dataclass(frozen=True, eq=False)
class LibraryDenoiser:
    """diffusers' U-Net behind the `Denoiser` contract; the formulas are those of `unet/denoiser.py`.

    Attributes:
        unet: in eval mode.
        prediction_type: "epsilon", "v_prediction" or "sample".
        to_timestep: sigma (batch,) to the timestep that the network is told.
        recorder: None; the library's attention cannot be listened to.
        residuals: see `UNetDenoiser`.
    """

    unet: UNet2DConditionModel
    prediction_type: str
    to_timestep: Callable[[Tensor], Tensor]
    recorder: Recorder | None = None
    residuals: Residuals | None = None

    def __post_init__(self) -> None:
        if self.recorder is not None:
            raise UsageError("attention cannot be recorded with a U-Net that diffusers computes; use a model whose architecture is covered.")

    def __call__(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """Predict x0; see `contracts.Denoiser`.

        Raises:
            UsageError: tokens that count other than fully or not at all, for which diffusers has no place.
        """
        if conditioning.mask is not None and conditioning.mask.is_floating_point():
            raise UsageError("--clip-weight and --t5-weight need a U-Net of ours, and diffusers computes this one; leave them out.")
        level = sigma.float().view(-1, 1, 1, 1)
        scale = (level**2 + 1).sqrt()
        dtype = self.unet.dtype
        extra: dict[str, Any] = {}
        if conditioning.size_ids is not None and conditioning.pooled is not None:
            extra["added_cond_kwargs"] = {"text_embeds": conditioning.pooled.to(dtype), "time_ids": conditioning.size_ids}
        elif conditioning.pooled is not None:
            extra["class_labels"] = conditioning.pooled.to(dtype)
        scaled, t = x.float() / scale, self.to_timestep(sigma).to(x.device)
        control = None if self.residuals is None else self.residuals(scaled, t, sigma, conditioning)
        if control is not None:
            extra |= {"down_block_additional_residuals": control[0], "mid_block_additional_residual": control[1]}
        if conditioning.shown is not None:
            scaled = torch.cat([scaled, conditioning.shown], dim=1)
        try:
            output = self.unet(
                scaled.to(dtype),
                t,
                conditioning.tokens.to(dtype),
                encoder_attention_mask=conditioning.mask,
                return_dict=False,
                **extra,
            )[0].float()
        except (RuntimeError, TypeError, ValueError) as error:
            if out_of_memory(error):
                raise
            raise ModelError(f"diffusers cannot compute this U-Net ({first_line(error)}); its config.json is not that of its weights.") from error
        match self.prediction_type:
            case "epsilon":
                return x - level * output
            case "v_prediction":
                return x / scale**2 - output * (level / scale)
            case _:
                return output

    def with_unet(self, unet: UNet2DConditionModel) -> "LibraryDenoiser":
        """The same with other weights."""
        return replace(self, unet=unet)


class LibraryVAE(nn.Module):
    """diffusers' autoencoder with the methods of ours."""

    def __init__(self, vae: nn.Module, factor: int) -> None:
        super().__init__()
        self.vae = vae
        self.config = _Scale(vae.config, factor)
        self.has_variance = isinstance(vae, AutoencoderKL | AsymmetricAutoencoderKL)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures in [-1, 1] to mean and log-variance of their unscaled latents; an autoencoder without variance gets one of e^-30."""
        encoded = self.vae.encode(x)  # pyright: ignore[reportCallIssue]
        if hasattr(encoded, "latent_dist"):
            return encoded.latent_dist.mean, encoded.latent_dist.logvar
        latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent
        return latents, torch.full_like(latents, -30.0)

    def decode(self, z: Tensor) -> Tensor:
        """Unscaled latents to pictures, about [-1, 1]."""
        return self.vae.decode(z, return_dict=False)[0]  # pyright: ignore[reportCallIssue]


class _Scale:
    """The fields of our autoencoders' configs that `LatentCodec` reads, from a library config, which has them or has None."""

    def __init__(self, config: Any, factor: int) -> None:
        self.downscale = factor
        self.scaling_factor = float(config.get("scaling_factor", 1.0))
        self.shift_factor = config.get("shift_factor")
        self.latents_mean = config.get("latents_mean")
        self.latents_std = config.get("latents_std")
        self.force_upcast = bool(config.get("force_upcast", False))


def library_expert(
    folder: ModelFolder, entry: ExpertEntry, dtype: torch.dtype, device: torch.device, refusal: ModelError, quantize: str = "none"
) -> LibraryDenoiser:
    """Load one expert's U-Net with diffusers.

    Args:
        folder: of the model.
        entry: the expert.
        dtype: of the weights.
        device: where they go.
        refusal: why our own network did not take it; repeated when diffusers does not take it either.
        quantize: see `quantize.quantized`.

    Raises:
        ModelError: diffusers does not take it, or its weights are not the ones that a hash names.
    """
    folders = chain(folder.path / entry.subfolder)
    check_hashes(folders, entry.sha256, lambda path: expert_sha256(path, folder.variant))
    unet = _load(UNet2DConditionModel, folders[-1], dtype, refusal, folder.variant)
    if len(folders) > 1:
        tensors = read_expert(folders[0], folder.variant)
        unet.load_state_dict({name: placed(name, stored.tensor, stored.origin, dtype, "cpu") for name, stored in tensors.items()})
    return LibraryDenoiser(quantized(unet.to(device), quantize), folder.noise.prediction_type, folder.noise.timestep_at)


def library_control(folder: Path, dtype: torch.dtype, device: torch.device) -> ControlNetModel:
    """Load a ControlNet, whose folder was checked, with diffusers.

    Raises:
        ModelError: diffusers does not take it.
    """
    refusal = ModelError(f"The ControlNet {folder.name!r} is not a valid one.")
    config = read_json(folder / "config.json")
    if not is_modest(config):
        raise refusal
    try:
        with torch.device("meta"):
            empty: nn.Module = ControlNetModel.from_config(config)  # pyright: ignore[reportAssignmentType]
    except Exception as error:  # the library raises many kinds
        raise ModelError(f"{refusal} diffusers cannot build it: {first_line(error)}") from error
    stored = sum(math.prod(entry["shape"]) for entry in read_headers(folder).values())
    if sum(tensor.numel() for tensor in empty.state_dict().values()) > stored:  # which the library would make up, and need memory for
        raise ModelError(f"The config.json of the ControlNet {folder.name!r} asks for more numbers than the {stored} that its files hold.")
    return _load(ControlNetModel, folder, dtype, refusal).to(device)


def library_vae(folder: ModelFolder, dtype: torch.dtype, device: torch.device, refusal: ModelError) -> Any:
    """Load the autoencoder with diffusers; arguments and errors as for `library_expert`."""
    scale = folder.configs["vae"].get("scaling_factor", 1.0)
    if not isinstance(scale, int | float) or not 0 < scale < float("inf"):
        raise refusal
    return LibraryVAE(_load(_VAES[folder.parts["vae"]], folder.path / "vae", dtype, refusal, folder.variant), folder.factor).to(device)


def _load(kind: Any, folder: Path, dtype: torch.dtype, refusal: ModelError, variant: str | None = None) -> Any:
    chosen = chosen_variant(folder, "diffusion_pytorch_model", variant)
    weight_files(folder, variant=chosen)  # refuses pickles and file names that lead outside, before the library looks
    config = read_json(folder / "config.json")
    layers, depths = (_numbers(config.get(name, 1)) for name in ("layers_per_block", "transformer_layers_per_block"))
    if "quantization_config" in config:
        raise ModelError(f"The weights of {folder.name!r} are quantized; take them in float16, bfloat16 or float32.")
    if not is_modest(config) or sum(layers) * max(depths, default=1) > MAX_LAYERS:
        raise refusal
    try:
        network, told = kind.from_pretrained(
            folder, torch_dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True, variant=chosen
        )
    except Exception as error:  # the library raises many kinds
        if out_of_memory(error):
            raise
        raise ModelError(f"{refusal} diffusers cannot load {folder.name} either: {first_line(error)}") from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):  # the library only warns of them
        if told[what]:
            raise ModelError(f"The weights in {folder} do not fit the config ({what}: {', '.join(str(key) for key in list(told[what])[:5])}).")
    for name, parameter in network.named_parameters():
        check_finite(name, parameter, folder)
    return network.requires_grad_(False).eval()


def _numbers(value: object) -> list[float]:
    """The numbers of a value, in lists of any depth."""
    if isinstance(value, list):
        return [number for inner in value for number in _numbers(inner)]
    return [value] if isinstance(value, int | float) else []


def is_modest(value: object, layers: bool = False) -> bool:
    """Whether a config asks for no more than real networks have, so that the library does not build without end: its sizes, lists and layers."""
    match value:
        case dict():
            return all(is_modest(inner, "layers" in str(name) or "num_" in str(name)) for name, inner in value.items())
        case list():
            return len(value) <= 4096 and all(is_modest(inner, layers) for inner in value)
        case int() | float():
            return abs(value) <= (MAX_LAYERS if layers else MAX_WIDTH)
        case _:
            return True


def empty_unet(config: Mapping[str, Any]) -> nn.Module:
    """diffusers' U-Net of a config, without storage: names and shapes of its weights.

    Raises:
        ModelError: diffusers does not take the config.
    """
    if not is_modest(config):
        raise ModelError("the U-Net's config asks for more than any real network has; fetch the model again.")
    try:
        with torch.device("meta"):
            return UNet2DConditionModel.from_config(dict(config))  # pyright: ignore[reportReturnType]
    except Exception as error:  # the library raises many kinds
        raise ModelError(f"diffusers cannot build a U-Net of this config: {first_line(error)}") from error
