"""What this machine can do for tu-diffuse: everything that is reported was tried, not looked up."""

import os
import platform
from importlib import metadata
from typing import Any

import torch

from .. import __version__
from ..attention import AttentionBackend, attention
from .model.folder import EMBEDDED

_LIBRARIES = (
    "torch",
    "diffusers",
    "transformers",
    "open-clip-torch",
    "accelerate",
    "tokenizers",
    "sentencepiece",
    "safetensors",
    "numpy",
    "pillow",
    "typer",
    "rich",
)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def diagnose() -> dict[str, Any]:
    """Versions, memory, and for each device its name, memory, the dtypes it computes in and the attention backends that work; JSON-compatible."""
    return {
        "tu_diffuse": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "memory_gb": _memory_gb(),
        "embedded_model": (EMBEDDED / "model_index.json").is_file(),
        "libraries": {name: _version(name) for name in _LIBRARIES},
        "devices": [_device(name) for name in devices()],
    }


def devices() -> list[str]:
    """Device types that are there, the fastest first; "cpu" is always last."""
    return [*(["cuda"] if torch.cuda.is_available() else []), *(["mps"] if torch.backends.mps.is_available() else []), "cpu"]


def _device(name: str) -> dict[str, Any]:
    cuda = torch.cuda.get_device_properties(0) if name == "cuda" else None
    return {
        "device": name,
        "name": platform.processor() if cuda is None else cuda.name,
        "memory_gb": _memory_gb() if cuda is None else round(cuda.total_memory / 2**30, 1),
        "dtypes": [str(dtype).removeprefix("torch.") for dtype in _DTYPES if _works(name, dtype, AttentionBackend.AUTO, masked=False)],
        "attention": {
            backend.value: [
                f"{str(dtype).removeprefix('torch.')}{' with mask' if masked else ''}"
                for dtype in _DTYPES
                for masked in (False, True)
                if _works(name, dtype, backend, masked)
            ]
            for backend in AttentionBackend
        },
    }


def _works(device: str, dtype: torch.dtype, backend: AttentionBackend, masked: bool) -> bool:
    """Compute a small attention and a convolution, and look whether the numbers are right."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn((1, 2, 16, 64), generator=generator) for _ in range(3))
    mask = torch.arange(16)[None, None, None, :] < 9 if masked else None
    wanted = attention(query, key, value, bias=mask, backend=AttentionBackend.MATH)
    moved = [tensor.to(device, dtype) for tensor in (query, key, value)]
    try:
        got = attention(*moved, bias=None if mask is None else mask.to(device), backend=backend)
        torch.nn.functional.conv2d(got, torch.ones((2, 2, 3, 3), device=device, dtype=dtype))
    except (RuntimeError, NotImplementedError):
        return False
    return bool((got.float().cpu() - wanted).abs().max() < (1e-4 if dtype is torch.float32 else 5e-2))


def _memory_gb() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):  # not on every system
        return None


def _version(library: str) -> str | None:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None
