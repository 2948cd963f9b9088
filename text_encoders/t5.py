"""T5 encoder (Raffel et al. 2020, section 2.1): pre-norm transformer without biases, with relative position bias and unscaled attention.

Parameter names are those of transformers' `T5EncoderModel` files; T5 v1.0 (ReLU) and v1.1 (gated GELU; Shazeer 2020) are covered.

Numbers: T5's residual stream leaves the range of float16, so it is float32 whatever the weights' dtype; the feed-forward output
(`wo`), where the large values arise, is computed in float32 too; the other products run in the weights' dtype. Nothing is clamped.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import AttentionBackend, attention, join_heads, split_heads
from ..errors import ModelError
from .config import config_values, require_epsilon, require_layers, require_positive

_FEED_FORWARDS = ("relu", "gated-gelu")


@dataclass(frozen=True)
class T5Config:
    """Shape of a T5 encoder; fields and defaults are those of transformers' `T5Config`."""

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "relu"

    @classmethod
    def from_dict(cls, data: Mapping[str, object]) -> Self:
        """Read a parsed `config.json` of a `t5`.

        Raises:
            ModelError: another architecture or feed-forward, or a size that cannot be.
        """
        kind = data.get("model_type")
        if kind != "t5":
            raise ModelError(f"the text encoder is of type {kind!r:.100}; t5 was wanted; use the library's own loader for it")
        config = cls(**config_values(cls, data, "T5"))
        if config.feed_forward_proj not in _FEED_FORWARDS:
            raise ModelError(
                f"the T5 config has feed_forward_proj = {config.feed_forward_proj!r:.100}; one of {', '.join(_FEED_FORWARDS)} was wanted; "
                "use the library's own loader for it"
            )
        require_positive(
            "T5",
            vocab_size=config.vocab_size,
            d_model=config.d_model,
            d_kv=config.d_kv,
            d_ff=config.d_ff,
            num_heads=config.num_heads,
            relative_attention_num_buckets=config.relative_attention_num_buckets,
            relative_attention_max_distance=config.relative_attention_max_distance,
        )
        require_layers("T5", "num_layers", config.num_layers)
        require_epsilon("T5", config.layer_norm_epsilon)
        buckets, distance = config.relative_attention_num_buckets, config.relative_attention_max_distance
        if buckets < 4 or distance <= buckets // 4:
            raise ModelError(
                f"the T5 config has {buckets} position buckets up to distance {distance}; at least 4, and a distance above a quarter of them"
            )
        return config


class _RMSNorm(nn.Module):
    """x / √(mean x² + ε) · weight (Zhang & Sennrich 2019, equation 4), computed in float32, returned in the weight's dtype."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        normed = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + self.eps)
        return self.weight * normed.to(self.weight.dtype)


class _SelfAttention(nn.Module):
    def __init__(self, config: T5Config, first: bool, backend: AttentionBackend) -> None:
        super().__init__()
        inner = config.num_heads * config.d_kv
        self.heads = config.num_heads
        self.backend = backend
        self.q = nn.Linear(config.d_model, inner, bias=False)
        self.k = nn.Linear(config.d_model, inner, bias=False)
        self.v = nn.Linear(config.d_model, inner, bias=False)
        self.o = nn.Linear(inner, config.d_model, bias=False)
        if first:
            self.relative_attention_bias = nn.Embedding(config.relative_attention_num_buckets, config.num_heads)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        query, key, value = (split_heads(project(x), self.heads) for project in (self.q, self.k, self.v))
        return self.o(join_heads(attention(query, key, value, bias=bias, scale=1.0, backend=self.backend)))


class _AttentionLayer(nn.Module):
    def __init__(self, config: T5Config, first: bool, backend: AttentionBackend) -> None:
        super().__init__()
        self.SelfAttention = _SelfAttention(config, first, backend)
        self.layer_norm = _RMSNorm(config.d_model, config.layer_norm_epsilon)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return x + self.SelfAttention(self.layer_norm(x), bias)


class _Float32Linear(nn.Linear):
    """Computed in float32 whatever its weight's dtype; without bias."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.float())


class _FeedForward(nn.Module):
    """v1.0: wo(ReLU(wi x)); v1.1: wo(GELU(wi_0 x) ⊙ wi_1 x), GELU in its tanh form (Shazeer 2020, equation 6)."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.gated = config.feed_forward_proj == "gated-gelu"
        if self.gated:
            self.wi_0 = nn.Linear(config.d_model, config.d_ff, bias=False)
            self.wi_1 = nn.Linear(config.d_model, config.d_ff, bias=False)
        else:
            self.wi = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wo = _Float32Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.wi_0(x).float(), approximate="tanh") * self.wi_1(x).float() if self.gated else F.relu(self.wi(x)).float()
        return self.wo(hidden)


class _FeedForwardLayer(nn.Module):
    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.DenseReluDense = _FeedForward(config)
        self.layer_norm = _RMSNorm(config.d_model, config.layer_norm_epsilon)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.DenseReluDense(self.layer_norm(x))


class _Block(nn.Module):
    def __init__(self, config: T5Config, first: bool, backend: AttentionBackend) -> None:
        super().__init__()
        self.layer = nn.ModuleList([_AttentionLayer(config, first, backend), _FeedForwardLayer(config)])

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return self.layer[1](self.layer[0](x, bias))


class _Stack(nn.Module):
    def __init__(self, config: T5Config, backend: AttentionBackend) -> None:
        super().__init__()
        self.block = nn.ModuleList(_Block(config, layer == 0, backend) for layer in range(config.num_layers))
        self.final_layer_norm = _RMSNorm(config.d_model, config.layer_norm_epsilon)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        for block in self.block:
            x = block(x, bias)
        return self.final_layer_norm(x)


class T5Encoder(nn.Module):
    """The encoder. `load_state_dict(t5_state_dict(file), strict=True)` takes transformers' files, encoder-only or whole."""

    def __init__(self, config: T5Config, backend: AttentionBackend = AttentionBackend.AUTO) -> None:
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = _Stack(config, backend)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Encode token ids.

        Args:
            ids: (batch, tokens) int64.
            mask: (batch, tokens) bool, True where a token may be attended to; None for all.

        Returns:
            (batch, tokens, d_model) after the final norm, in the weights' dtype.
        """
        return self.encoder(self.shared(ids).float(), self._bias(torch.arange(ids.shape[1], device=ids.device), mask))

    def _bias(self, position: Tensor, mask: Tensor | None) -> Tensor:
        """Position bias of the first block, shared by all blocks: (1 or batch, heads, tokens, tokens), lowest finite value at pads."""
        table: nn.Embedding = self.encoder.block[0].layer[0].SelfAttention.relative_attention_bias  # pyright: ignore
        buckets = position_buckets(
            position[None, :] - position[:, None], self.config.relative_attention_num_buckets, self.config.relative_attention_max_distance
        )
        bias = table(buckets).permute(2, 0, 1)[None]
        return bias if mask is None else bias.masked_fill(~mask[:, None, None, :], torch.finfo(bias.dtype).min)


def position_buckets(offset: Tensor, buckets: int, max_distance: int) -> Tensor:
    """Bucket of each relative position (Raffel et al. 2020, section 2.1).

    Half of the buckets are for keys after the query. Of each half, one half holds one distance each, the other half grows
    logarithmically up to `max_distance`, beyond which all share the last bucket.

    Args:
        offset: int64, key position minus query position, any shape.
        buckets: number of buckets, a multiple of 4.
        max_distance: in tokens.

    Returns:
        int64 in [0, buckets), the shape of offset.
    """
    side = buckets // 2
    exact = side // 2
    distance = offset.abs()
    spread = torch.log(distance.clamp(min=exact).float() / exact) / math.log(max_distance / exact) * (side - exact)
    far = (exact + spread.long()).clamp(max=side - 1)
    return torch.where(offset > 0, side, 0) + torch.where(distance < exact, distance, far)


def t5_state_dict(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of a T5 file's tensors those of `T5Encoder`: no decoder, no head, and the tied embedding once, under whichever of its names it was saved."""
    left_out = ("decoder.", "lm_head.", "encoder.embed_tokens.")
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith(left_out)}
    if "encoder.embed_tokens.weight" in weights:
        kept.setdefault("shared.weight", weights["encoder.embed_tokens.weight"])
    return kept


def initialise_t5(model: T5Encoder) -> None:
    """Draw the weights for training from scratch with the scales of T5 (Mesh TensorFlow): variance 1/fan-in, queries 1/(d_model·d_kv)."""
    config = model.config
    inner = config.num_heads * config.d_kv
    std = {"q": (config.d_model * config.d_kv) ** -0.5, "o": inner**-0.5, "wo": config.d_ff**-0.5}
    nn.init.normal_(model.shared.weight, std=1.0)
    for name, module in model.encoder.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=std.get(name.rpartition(".")[2], config.d_model**-0.5))
