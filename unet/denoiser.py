"""From a U-Net to a `Denoiser`: scale the input, call the network, turn what it predicts into clean latents."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..contracts import Conditioning
from ..errors import ModelError
from ..offload import device_of
from .layers import Recorder
from .unet import UNet

Residuals = Callable[[Tensor, Tensor, Tensor, Conditioning], tuple[Sequence[Tensor], Tensor] | None]
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


class _Prompt(NamedTuple):
    """A conditioning in the form, dtype and place that one U-Net wants it."""

    keys_values: list[tuple[Tensor, Tensor]]
    mask: Tensor | None
    pooled: Tensor | None
    size_ids: Tensor | None


def _no_prompts() -> WeakKeyDictionary[Conditioning, _Prompt]:
    return WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class UNetDenoiser:
    """A U-Net behind the `Denoiser` contract.

    With x = x0 + sigma·n, the network was trained on x/√(sigma² + 1) (Karras et al. 2022, arXiv 2206.00364, table 1, VP column) and predicts

        epsilon        n,                                      so x0 = x − sigma·n
        v_prediction   (n − sigma·x0)/√(sigma² + 1),           so x0 = x/(sigma² + 1) − v·sigma/√(sigma² + 1)
                       (Salimans & Ho 2022, arXiv 2202.00512, appendix D)
        sample         x0 itself.

    The keys and values of a prompt are computed at its first step and kept as long as its `Conditioning` object lives. `dataclasses.replace` gives a
    denoiser that shares the network and what it remembers; that is how a run brings its own `to_timestep`.

    Attributes:
        unet: in eval mode; weights must not change once prompts were remembered.
        prediction_type: one of `PREDICTION_TYPES`.
        to_timestep: sigma (batch,) float32 to the timestep that the network is told, (batch,), fractional.
        recorder: sees query and key of every cross-attention layer, see `layers.TextContext`; None to record nothing.
        residuals: (scaled x, timestep, sigma, conditioning) to what a ControlNet adds to the skips and to the middle, or to None; None adds nothing.
    """

    unet: UNet
    prediction_type: str
    to_timestep: Callable[[Tensor], Tensor]
    recorder: Recorder | None = None
    residuals: Residuals | None = None
    _prompts: WeakKeyDictionary[Conditioning, _Prompt] = field(default_factory=_no_prompts, repr=False)

    def __post_init__(self) -> None:
        if self.prediction_type not in PREDICTION_TYPES:
            raise ModelError(
                f"The prediction type is {self.prediction_type!r}, wanted was one of {', '.join(PREDICTION_TYPES)}; check the scheduler config."
            )

    def __call__(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """Predict x0; see `contracts.Denoiser`. Computed in float32 around the network, whatever its dtype.

        Raises:
            ModelError: the conditioning does not fit the U-Net.
        """
        prompt = self._prompt(conditioning)
        level = sigma.float().view(-1, *[1] * (x.ndim - 1))
        noise_scale = (level**2 + 1).sqrt()
        scaled = x.float() / noise_scale
        if conditioning.shown is not None:
            scaled = torch.cat([scaled, conditioning.shown], dim=1)
        scaled = scaled.to(self.unet.conv_in.weight.dtype)
        t = self.to_timestep(sigma).to(x.device)
        added = None if self.residuals is None else self.residuals(x.float() / noise_scale, t, sigma, conditioning)
        output = self.unet(scaled, t, prompt.keys_values, prompt.mask, prompt.pooled, prompt.size_ids, self.recorder, added).float()
        if self.prediction_type == "epsilon":
            x0 = x.float() - level * output
        elif self.prediction_type == "v_prediction":
            x0 = x.float() / noise_scale**2 - output * (level / noise_scale)
        else:
            x0 = output
        return x0.to(x.dtype)

    def with_unet(self, unet: UNet) -> "UNetDenoiser":
        """The same with other weights; it remembers no prompts yet."""
        return replace(self, unet=unet, _prompts=_no_prompts())

    def _prompt(self, conditioning: Conditioning) -> _Prompt:
        known = self._prompts.get(conditioning)
        if known is not None:
            return known
        _check_fit(self.unet, conditioning)
        device, dtype = device_of(self.unet), self.unet.conv_in.weight.dtype
        mask, pooled, size_ids = conditioning.mask, conditioning.pooled, conditioning.size_ids
        takes_pooled = self.unet.class_embedding is not None or self.unet.add_embedding is not None
        prompt = _Prompt(
            keys_values=self.unet.text_keys_values(conditioning.tokens.to(device, dtype)),
            # Without a mask every fused kernel is possible; this is the one place where asking costs nothing.
            mask=None if mask is None or bool((mask == 1).all()) else mask.to(device),
            pooled=pooled.to(device, dtype) if takes_pooled and pooled is not None else None,
            size_ids=size_ids.to(device, torch.float32) if self.unet.add_embedding is not None and size_ids is not None else None,
        )
        self._prompts[conditioning] = prompt
        return prompt


def _check_fit(unet: UNet, conditioning: Conditioning) -> None:
    config = unet.config
    shown = 0 if conditioning.shown is None else conditioning.shown.shape[1]
    if shown != (config.out_channels + 1 if config.in_channels == 2 * config.out_channels + 1 else 0):
        raise ModelError(
            f"The U-Net takes {config.in_channels} channels, and {shown} of a masked picture came beside the latents; an inpainting U-Net needs a "
            "masked picture, and no other takes one."
        )
    width = config.cross_attention_dim if config.encoder_hid_dim is None else config.encoder_hid_dim
    if conditioning.tokens.shape[-1] != width:
        raise ModelError(
            f"The text encoders give tokens of width {conditioning.tokens.shape[-1]}, the U-Net takes {width}; they are of different models."
        )
    if config.class_embed_type is None and config.addition_embed_type is None:
        return
    if conditioning.pooled is None or (config.addition_embed_type is not None and conditioning.size_ids is None):
        raise ModelError("The U-Net takes a pooled text vector (and SDXL's size ids), the text encoders gave none; they are of different models.")
    ids = (
        0
        if config.addition_time_embed_dim is None or conditioning.size_ids is None
        else conditioning.size_ids.shape[-1] * config.addition_time_embed_dim
    )
    if conditioning.pooled.shape[-1] + ids != config.projection_class_embeddings_input_dim:
        raise ModelError(
            f"Pooled text and size ids make a vector of {conditioning.pooled.shape[-1]} + {ids}, the U-Net takes "
            f"{config.projection_class_embeddings_input_dim}; they are of different models."
        )
