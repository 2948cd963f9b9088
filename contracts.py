"""The two contracts through which the parts of the system meet: what a prompt becomes, and what a denoiser is.

Text encoders produce a `Conditioning`; U-Nets, experts and guidance are all a `Denoiser`; samplers and the pipeline know nothing else.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Conditioning:
    """What the text encoders say about a batch of prompts.

    Compared by identity, so that a network may cache the keys and values it computes from one (see `unet/denoiser.py`).

    Attributes:
        tokens: (batch, tokens, width) float; the encoders' token sequences, joined.
        mask: (batch, tokens) bool, True where a token counts, or float, how much it does (`attention.key_mask`); None when all count once.
        pooled: (batch, pooled_width) float; one vector a prompt, or None when the model takes none.
        size_ids: (batch, 5 or 6) float; SDXL's micro-conditioning (heights, widths, crops, score), else None.
        shown: (batch, 1 + channels, h, w) float; what an inpainting network sees beside x: the mask, 1 where it repaints, and the latents of the
            masked picture; None for every other network.
        hint: (batch, 3, H, W) float in 0..1, in pixels; what a ControlNet reads, else None.
    """

    tokens: Tensor
    mask: Tensor | None = None
    pooled: Tensor | None = None
    size_ids: Tensor | None = None
    shown: Tensor | None = None
    hint: Tensor | None = None


class Denoiser(Protocol):
    """Predicts the clean latents x0 from noisy ones."""

    def __call__(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """Predict x0.

        Args:
            x: (batch, channels, h, w); x = x0 + sigma·noise (variance-exploding scale).
            sigma: (batch,) float32; noise level, > 0.
            conditioning: one row for each row of x.

        Returns:
            x0, the shape of x.
        """
        ...
