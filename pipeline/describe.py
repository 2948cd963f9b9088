"""What a model folder holds, read from its JSON files and the headers of its safetensors files: no weights are loaded."""

from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

from ..weights import read_header, weight_files
from .folder import ModelFolder


def describe(folder: ModelFolder) -> dict[str, Any]:
    """Facts about a model folder, JSON-compatible.

    Returns:
        kind ("model"), name, hash, family, prediction (what the U-Nets put out), size_multiple (of width and height, in pixels), parameters,
        defaults, experts (name, folder, sigma interval, guidance, parameters, dtype) and parts (name, class, parameters, dtype, megabytes).

    Raises:
        ModelError: a weight file is missing or not valid.
    """
    parts: list[dict[str, Any]] = [
        {"name": name, "class": kind} | _weights(folder.path / name, "model" if name.startswith("text_encoder") else "diffusion_pytorch_model")
        for name, kind in folder.parts.items()
        if name in ("vae", "conditioner") or name.startswith("text_encoder")
    ]
    experts: list[dict[str, Any]] = [
        {"name": e.name, "folder": e.subfolder, "sigma_min": e.sigma_min, "sigma_max": e.sigma_max, "guidance": e.guidance}
        | _weights(folder.path / e.subfolder, "diffusion_pytorch_model")
        for e in folder.experts
    ]
    defaults = folder.defaults
    return {
        "kind": "model",
        "name": folder.name,
        "hash": folder.fingerprint,
        "family": folder.family,
        "prediction": folder.noise.prediction_type,
        "size_multiple": folder.factor,
        "parameters": sum(part["parameters"] for part in [*parts, *experts]),
        "defaults": {name: getattr(defaults, name) for name in ("width", "height", "steps", "sampler", "schedule", "guidance")},
        "experts": experts,
        "parts": parts,
    }


def _weights(folder: Path, stem: str) -> dict[str, Any]:
    tensors = [entry for path in weight_files(folder, stem) for entry in read_header(path).values()]
    parameters: Counter[str] = Counter()
    for entry in tensors:
        parameters[entry["dtype"]] += prod(entry["shape"])
    size = sum(path.stat().st_size for path in weight_files(folder, stem))
    return {"parameters": parameters.total(), "dtype": "+".join(sorted(parameters)), "megabytes": round(size / 1e6, 1)}
