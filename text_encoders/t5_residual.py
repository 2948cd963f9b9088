"""What T5 adds to the tokens of a model that was trained with CLIP alone; nothing at first.

    tokens + w·to_out(attention(to_q(norm(tokens)), to_k(norm(T5)), to_v(norm(T5))))

`to_out` starts at zero, as the last layers of ControlNet do (Zhang et al. 2023, arXiv 2302.05543, section 3.1): the model draws what it drew, bit by
bit, and the gradient of `to_out` is not zero, so that training opens it. T5's tokens cannot simply stand beside CLIP's: even zeros take their share
of the U-Net's softmax.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Self

import torch
from torch import Tensor, nn

from ..attention import AttentionBackend, attention, join_heads, split_heads
from ..errors import ModelError
from .config import config_values, require_heads, require_positive


@dataclass(frozen=True)
class T5ResidualConfig:
    """Its shape.

    Attributes:
        clip_width: width of the CLIP tokens.
        t5_width: width of the T5 tokens.
        heads: attention heads, a divisor of clip_width.
    """

    clip_width: int
    t5_width: int
    heads: int

    @classmethod
    def from_dict(cls, data: Mapping[str, object]) -> Self:
        """Read the parsed `config.json` of a model folder's `conditioner/`.

        Raises:
            ModelError: another class, or a size that cannot be.
        """
        if data.get("_class_name") != "T5Residual":
            raise ModelError(f"the conditioner is of class {data.get('_class_name')!r}; T5Residual was wanted; repair its config.json")
        config = cls(**config_values(cls, data, "conditioner"))
        require_positive("conditioner", clip_width=config.clip_width, t5_width=config.t5_width, heads=config.heads)
        require_heads("conditioner", config.clip_width, config.heads)
        return config

    def to_dict(self) -> dict[str, object]:
        """The content of `config.json`; `from_dict` reads it back."""
        return {"_class_name": "T5Residual", **asdict(self)}


class T5Residual(nn.Module):
    """The residual; its weights lie in `conditioner/diffusion_pytorch_model.safetensors`."""

    def __init__(self, config: T5ResidualConfig, backend: AttentionBackend = AttentionBackend.AUTO) -> None:
        super().__init__()
        self.config = config
        self.backend = backend
        self.norm_clip = nn.LayerNorm(config.clip_width)
        self.norm_t5 = nn.LayerNorm(config.t5_width)
        self.to_q = nn.Linear(config.clip_width, config.clip_width)
        self.to_k = nn.Linear(config.t5_width, config.clip_width)
        self.to_v = nn.Linear(config.t5_width, config.clip_width)
        self.to_out = nn.Linear(config.clip_width, config.clip_width)
        nn.init.zeros_(self.to_out.weight)
        nn.init.zeros_(self.to_out.bias)

    def forward(self, clip_tokens: Tensor, t5_tokens: Tensor, t5_mask: Tensor, t5_weight: float = 1.0) -> Tensor:
        """Add what T5 says.

        Args:
            clip_tokens: (batch, clip tokens, clip_width), as the U-Net was trained with them.
            t5_tokens: (batch, t5 tokens, t5_width).
            t5_mask: (batch, t5 tokens) bool, False at pads; a row without any True stays as it is.
            t5_weight: w; 1 as trained.

        Returns:
            The shape of clip_tokens.
        """
        said = t5_mask.any(dim=1)
        bias = (t5_mask | ~said[:, None])[:, None, None, :]
        t5 = self.norm_t5(t5_tokens)
        query, key, value = (split_heads(part, self.config.heads) for part in (self.to_q(self.norm_clip(clip_tokens)), self.to_k(t5), self.to_v(t5)))
        added = self.to_out(join_heads(attention(query, key, value, bias=bias, backend=self.backend)))
        return clip_tokens + torch.where(said[:, None, None], added * t5_weight, 0.0)
