"""The weights of linear layers as 8-bit integers, by torchao: a quarter of the memory of float32, half of float16, for small differences."""

import ctypes
import logging
from contextlib import suppress
from importlib.util import find_spec
from typing import TypeVar

import torch
from torch import nn

from ..errors import UsageError

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


def quantized(network: N, kind: str) -> N:
    """The network itself, with its linear layers quantized: one scale for each output of a layer; what they compute stays in the network's dtype.

    Args:
        network: with its weights, on its device.
        kind: of `KINDS`.
    """
    if kind == "int8":
        logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # torchao's import is told of a deprecation
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        for layer in [module for module in network.modules() if isinstance(module, nn.Linear)]:
            quantize_(layer, Int8WeightOnlyConfig())
            _give_back_freed_memory()
    return network


def _give_back_freed_memory() -> None:
    """The float copies that a layer was quantized from lie between weights that stay, where the C library of Linux would keep their memory."""
    with suppress(AttributeError, OSError, TypeError):  # other systems have no such function
        ctypes.CDLL(None).malloc_trim(0)
