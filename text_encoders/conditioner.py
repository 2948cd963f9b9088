"""The CLIP/T5 join: from the outputs of two frozen encoders to one conditioning (eDiff-I, Balaji et al. 2022, section 4.2).

Each encoder's tokens are normalised, projected to a common width and marked with a learned type embedding, then joined along the
sequence: CLIP, T5, and one learned null token that is never masked, so that a prompt without any token is still well defined.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import AttentionBackend, attention, join_heads, key_mask, split_heads
from ..contracts import Conditioning
from ..errors import ModelError
from .config import config_values, require_heads, require_layers, require_positive

_POOLED = ("clip", "clip+t5")


@dataclass(frozen=True)
class ConditionerConfig:
    """Shape of the join.

    Attributes:
        clip_width: width of the CLIP tokens.
        clip_pooled_width: width of the projected pooled CLIP vector.
        t5_width: width of the T5 tokens.
        width: width of the joined tokens, the U-Net's cross-attention width.
        pooled_width: width of the pooled vector that leaves.
        pooled: what it is made of, `clip` or `clip+t5`.
        refiner_layers: transformer layers over the joined sequence, 0 for none.
        refiner_heads: their attention heads, a divisor of width.
    """

    clip_width: int
    clip_pooled_width: int
    t5_width: int
    width: int
    pooled_width: int
    pooled: str = "clip+t5"
    refiner_layers: int = 0
    refiner_heads: int = 4

    @classmethod
    def from_dict(cls, data: Mapping[str, object]) -> Self:
        """Read the parsed `config.json` of a model folder's `conditioner/`.

        Raises:
            ModelError: another class, a value of `pooled` that is not known, or a size that cannot be.
        """
        if data.get("_class_name") != "Conditioner":
            raise ModelError(f"the conditioner is of class {data.get('_class_name')!r:.100}; Conditioner was wanted; repair its config.json")
        config = cls(**config_values(cls, data, "conditioner"))
        if config.pooled not in _POOLED:
            raise ModelError(
                f"the conditioner config has pooled = {config.pooled!r:.100}; one of {', '.join(_POOLED)} was wanted; repair its config.json"
            )
        require_positive(
            "conditioner",
            clip_width=config.clip_width,
            clip_pooled_width=config.clip_pooled_width,
            t5_width=config.t5_width,
            width=config.width,
            pooled_width=config.pooled_width,
            refiner_heads=config.refiner_heads,
        )
        require_layers("conditioner", "refiner_layers", config.refiner_layers, 0)
        require_heads("conditioner", config.width, config.refiner_heads)
        return config

    def to_dict(self) -> dict[str, object]:
        """The content of `config.json`; `from_dict` reads it back."""
        return {"_class_name": "Conditioner", **asdict(self)}


class _RefinerLayer(nn.Module):
    """Pre-norm transformer layer whose residual branches start at zero, so that it starts as the identity."""

    def __init__(self, width: int, heads: int, backend: AttentionBackend) -> None:
        super().__init__()
        self.heads = heads
        self.backend = backend
        self.norm1 = nn.LayerNorm(width)
        self.to_qkv = nn.Linear(width, 3 * width)
        self.to_out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        for last in (self.to_out, self.fc2):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        query, key, value = (split_heads(part, self.heads) for part in self.to_qkv(self.norm1(x)).chunk(3, dim=-1))
        x = x + self.to_out(join_heads(attention(query, key, value, bias=bias, backend=self.backend)))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class _TokenProjection(nn.Module):
    """LayerNorm, then Linear to the common width; `type_embedding` is what marks the encoder."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width_in)
        self.linear = nn.Linear(width_in, width)
        self.type_embedding = nn.Parameter(nn.init.normal_(torch.empty(width), std=0.5))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.linear(self.norm(tokens))


class Conditioner(nn.Module):
    """The join as a module; its weights lie in `conditioner/diffusion_pytorch_model.safetensors`."""

    def __init__(self, config: ConditionerConfig, backend: AttentionBackend = AttentionBackend.AUTO) -> None:
        super().__init__()
        self.config = config
        self.clip = _TokenProjection(config.clip_width, config.width)
        self.t5 = _TokenProjection(config.t5_width, config.width)
        self.null_token = nn.Parameter(nn.init.normal_(torch.empty(config.width)))
        self.refiner = nn.ModuleList(_RefinerLayer(config.width, config.refiner_heads, backend) for _ in range(config.refiner_layers))
        self.norm_out = nn.LayerNorm(config.width)
        self.pooled_clip_norm = nn.LayerNorm(config.clip_pooled_width)
        pooled_in = config.clip_pooled_width + (config.width if config.pooled == "clip+t5" else 0)
        self.pooled_mlp = nn.Sequential(
            nn.Linear(pooled_in, config.pooled_width),
            nn.SiLU(),
            nn.Linear(config.pooled_width, config.pooled_width),
            nn.LayerNorm(config.pooled_width),
        )

    def forward(
        self,
        clip_tokens: Tensor,
        clip_mask: Tensor,
        clip_pooled: Tensor,
        t5_tokens: Tensor,
        t5_mask: Tensor,
        keep_clip: Tensor | None = None,
        keep_t5: Tensor | None = None,
        clip_weight: float = 1.0,
        t5_weight: float = 1.0,
    ) -> Conditioning:
        """Join the outputs of the two encoders.

        Args:
            clip_tokens: (batch, clip tokens, clip_width), after CLIP's final norm.
            clip_mask: (batch, clip tokens) bool, False at pads.
            clip_pooled: (batch, clip_pooled_width), CLIP's projected pooled vector.
            t5_tokens: (batch, t5 tokens, t5_width).
            t5_mask: (batch, t5 tokens) bool, False at pads.
            keep_clip: (batch,) bool; False drops CLIP from that row: its tokens are masked, its share of the pooled vector is zero.
                None keeps all. Rows are dropped independently for each encoder in training (eDiff-I, section 4.2).
            keep_t5: the same for T5.
            clip_weight: how much each CLIP token counts beside the others: the numerators of every softmax over the joined tokens are multiplied by
                it, here and in the U-Net, and so is CLIP's share of the pooled vector; 0 drops CLIP.
            t5_weight: the same for T5.

        Returns:
            Tokens (batch, clip tokens + t5 tokens + 1, width) and pooled (batch, pooled_width), both layer-normed, so of standard
            deviation about 1; and the joint mask, 1 at the null token, which is last; it is bool where both weights are 0 or 1.
        """
        batch = len(clip_tokens)
        clip_kept = clip_mask if keep_clip is None else clip_mask & keep_clip[:, None]
        t5_kept = t5_mask if keep_t5 is None else t5_mask & keep_t5[:, None]
        t5_projected = self.t5(t5_tokens)
        null = self.null_token.expand(batch, 1, -1)
        tokens = torch.cat([self.clip(clip_tokens) + self.clip.type_embedding, t5_projected + self.t5.type_embedding, null], dim=1)
        mask = torch.cat([_counted(clip_kept, clip_weight), _counted(t5_kept, t5_weight), clip_kept.new_ones(batch, 1)], dim=1)
        bias = key_mask(mask)
        for layer in self.refiner:
            tokens = layer(tokens, bias)

        pooled = self.pooled_clip_norm(clip_pooled)
        if keep_clip is not None:
            pooled = pooled * keep_clip[:, None]
        pooled = pooled * clip_weight
        if self.config.pooled == "clip+t5":
            pooled = torch.cat([pooled, masked_mean(t5_projected, t5_kept) * t5_weight], dim=1)
        return Conditioning(tokens=self.norm_out(tokens), mask=mask, pooled=self.pooled_mlp(pooled))


def _counted(mask: Tensor, weight: float) -> Tensor:
    """How much each token of a mask counts; bool where that is all or nothing."""
    return mask & bool(weight) if weight in (0, 1) else mask * float(weight)


def masked_mean(tokens: Tensor, mask: Tensor) -> Tensor:
    """Mean of tokens (batch, n, width) over those that mask (batch, n) holds True; zero for a row without any. (batch, width)."""
    weight = mask.to(tokens.dtype)[..., None]
    return (tokens * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)
