"""The one attention function that every network here calls: softmax(QKᵀ/√d + bias)V on PyTorch's fused kernels.

Memory is linear in the number of tokens on every backend but `math`.
"""

from contextlib import nullcontext
from enum import StrEnum

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


class AttentionBackend(StrEnum):
    """Which kernel computes attention. `auto` lets PyTorch take the fastest one that fits the inputs."""

    AUTO = "auto"
    FLASH = "flash"
    EFFICIENT = "efficient"
    CUDNN = "cudnn"
    MATH = "math"


_KERNELS = {
    AttentionBackend.FLASH: SDPBackend.FLASH_ATTENTION,
    AttentionBackend.EFFICIENT: SDPBackend.EFFICIENT_ATTENTION,
    AttentionBackend.CUDNN: SDPBackend.CUDNN_ATTENTION,
    AttentionBackend.MATH: SDPBackend.MATH,
}


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    bias: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    backend: AttentionBackend = AttentionBackend.AUTO,
) -> Tensor:
    """Scaled dot-product attention (Vaswani et al. 2017, equation 1).

    Args:
        query: (batch, heads, queries, d).
        key: (batch, heads, keys, d).
        value: (batch, heads, keys, d).
        bias: broadcastable to (batch, heads, queries, keys); bool (True = attend) or float added to the scaled scores.
        causal: each query sees only keys up to its own position; not together with bias.
        scale: factor on QKᵀ; 1/√d when None.
        backend: a backend that cannot take these inputs makes PyTorch raise RuntimeError.

    Returns:
        (batch, heads, queries, d).
    """
    if query.device.type == "cpu" and query.requires_grad and query.dtype is torch.bfloat16:
        # The backward pass of PyTorch's fused CPU kernel is nine times slower in bfloat16 than in float32 (torch 2.14).
        with torch.autocast("cpu", enabled=False):
            return attention(query.float(), key.float(), value.float(), bias=bias, causal=causal, scale=scale, backend=backend).to(query.dtype)
    with nullcontext() if backend is AttentionBackend.AUTO else sdpa_kernel(_KERNELS[backend]):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, is_causal=causal, scale=scale)


def key_mask(mask: Tensor | None) -> Tensor | None:
    """Turn a mask of keys into a bias for `attention`; None when it changes nothing, so that mask-free kernels stay possible.

    Args:
        mask: (batch, keys) bool, True where a key counts, or float, how much it counts: each key's exponential in the softmax is multiplied by it.

    Returns:
        (batch, 1, 1, keys), see `mask_bias`.
    """
    return None if mask is None or bool((mask == 1).all()) else mask_bias(mask)


def mask_bias(mask: Tensor) -> Tensor:
    """(batch, keys) to (batch, 1, 1, keys): the logarithm of a float mask, in its dtype, or a bool mask itself."""
    return (mask.log() if mask.is_floating_point() else mask)[:, None, None, :]


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(batch, tokens, heads·d) to (batch, heads, tokens, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """(batch, heads, tokens, d) to (batch, tokens, heads·d)."""
    return x.transpose(1, 2).flatten(2)
