"""Where and how networks compute: device, number format, attention kernel, 8-bit weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from ...attention import AttentionBackend
from ...errors import UsageError
from ...model_files import read_weights
from ...offload import offloaded
from ...weights import fill, placed
from .quantize import check_quantize, quantized

N = TypeVar("N", bound=nn.Module)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Place:
    """Where and how networks compute.

    Attributes:
        device: where they are.
        dtype: of their weights.
        attention: the kernel that was asked for.
        quantize: how the linear layers of text encoders and experts are stored, one of `quantize.KINDS`.
        offload: weights wait where they are stored and move in to compute, see `offload.py`; pixels do not depend on it.
    """

    device: torch.device
    dtype: torch.dtype
    attention: AttentionBackend
    quantize: str = "none"
    offload: bool = False


def choose_place(dtype: str = "auto", device: str = "auto", attention: str = "auto", quantize: str = "none", offload: bool = False) -> Place:
    """Where and how to compute, by name.

    Args:
        dtype: "float32", "float16", "bfloat16", or "auto": float32 on a CPU, float16 elsewhere.
        device: see `choose_device`.
        attention: a name in `AttentionBackend`.
        quantize: see `quantize.check_quantize`.
        offload: see `Place`.

    Raises:
        UsageError: a name that is not known, a device that is not there, as `check_quantize`, or to quantize what is offloaded.
    """
    if offload and quantize != "none":
        raise UsageError(f"--offload and --quantize {quantize} contradict each other, since quantized weights stay in memory; leave one of them out.")
    where = choose_device(device)
    if dtype != "auto" and dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype!r} is not known; use one of auto, {', '.join(DTYPES)}.")
    if attention not in [backend.value for backend in AttentionBackend]:
        raise UsageError(f"--attention {attention!r} is not known; use one of {', '.join(AttentionBackend)}.")
    number = DTYPES[dtype] if dtype != "auto" else torch.float32 if where.type == "cpu" else torch.float16
    return Place(where, number, AttentionBackend(attention), check_quantize(quantize, where), offload)


def filled(
    network: N,
    folder: Path,
    place: Place,
    stem: str = "diffusion_pytorch_model",
    convert: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] | None = None,
    *,
    variant: str | None = None,
    whole: bool = False,
) -> N:
    """The network with the weights of its folder, where they belong; arguments and errors as of `weights.load_weights` and `offload.offloaded`.

    Of those that compute as a whole, the linear layers are not quantized.
    """
    read = read_weights(folder, stem, variant)
    state = read if convert is None else convert(read)
    if place.offload:
        return offloaded(network, state, folder, place.device, place.dtype, whole=whole)
    filled = fill(network, state, folder, lambda name, tensor: placed(name, tensor, folder, place.dtype, place.device))
    return filled if whole else quantized(filled, place.quantize, state)


def choose_device(name: str) -> torch.device:
    """The device of a name: "cpu", "cuda", "cuda:1", "mps", or "auto", the fastest there is.

    Raises:
        UsageError: a name that is not known, or a device that is not there.
    """
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device(next(device for device in ("cuda", "mps", "cpu") if there[device]))
    kind, colon, number = name.partition(":")
    if kind not in there or (colon and not (kind == "cuda" and number.isdecimal())):
        raise UsageError(f"--device {name!r} is not known; use one of auto, {', '.join(there)}, cuda:1.")
    if not there[kind] or (colon and int(number) >= torch.cuda.device_count()):
        raise UsageError(f"--device {name} is not there, or this PyTorch was built without it; use --device cpu, and see tu-diffuse doctor.")
    return torch.device(name)
