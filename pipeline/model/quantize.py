"""The weights of linear layers as 8-bit integers, by torchao: a quarter of the memory of float32, half of float16, for small differences."""

import ctypes
import logging
from collections.abc import Mapping
from contextlib import suppress
from importlib.util import find_spec
from typing import TypeVar

import torch
from torch import Tensor, nn

from ...errors import UsageError
from ...offload import Waiting, remember

KINDS = ("none", "int8")

N = TypeVar("N", bound=nn.Module)


def check_quantize(kind: str, device: torch.device) -> str:
    """The kind itself, where it can be used.

    Raises:
        UsageError: a kind that is not known, torchao is not installed, or it has no such kernels for the device.
    """
    if kind not in KINDS:
        raise UsageError(f"--quantize {kind!r} is not known; use one of {', '.join(KINDS)}.")
    if kind != "none" and device.type not in ("cpu", "cuda"):
        raise UsageError(f"--quantize {kind} cannot be used on {device.type}, for which torchao has no integer kernels; leave it out.")
    if kind != "none" and find_spec("torchao") is None:
        raise UsageError(f"--quantize {kind} is done by torchao, which is not installed; pip install 'tu-diffuse[quantize]', or leave it out.")
    return kind


def quantized(network: N, kind: str, stored: Mapping[str, Tensor] | None = None) -> N:
    """The network itself, with its linear layers quantized: one scale for each output of a layer; what they compute stays in the network's dtype.

    Args:
        network: with its weights, on its device.
        kind: of `KINDS`.
        stored: the tensors of its files, mapped; with them LoRAs can be added (`offload.changed`). None where they are not to be had.
    """
    if kind == "int8":
        first = next(network.parameters())
        if stored is not None:
            remember(network, Waiting(stored, first.device, first.dtype, finish=_int8))
        for layer in [module for module in network.modules() if isinstance(module, nn.Linear)]:
            layer.weight = nn.Parameter(_int8(layer.weight.detach()), requires_grad=False)
            _give_back_freed_memory()
    return network


def _int8(weight: Tensor) -> Tensor:
    """The weight of a linear layer as integers and scales."""
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # torchao's import is told of a deprecation
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    quantize_(layer, Int8WeightOnlyConfig())
    return layer.weight


def _give_back_freed_memory() -> None:
    """The float copies that a layer was quantized from lie between weights that stay, where the C library of Linux would keep their memory."""
    with suppress(AttributeError, OSError, TypeError):  # other systems have no such function
        ctypes.CDLL(None).malloc_trim(0)
