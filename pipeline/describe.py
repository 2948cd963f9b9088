"""What a model folder holds, read from its JSON files and the headers of its safetensors files: no weights are loaded."""

import math
import re
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

from ..unet.deltas import LORA, TENSORS, chain, own_files
from ..unet.experts import ExpertEntry
from ..unet.lora import read_lora
from ..weights import read_header, read_headers, tensor_bytes, weight_bytes, within_single_file
from .folder import ModelFolder, expert_bytes

CARD_CHARACTERS = 65536  # of a model card's beginning, that are read


def describe(folder: ModelFolder) -> dict[str, Any]:
    """Facts about a model folder, JSON-compatible.

    Returns:
        kind ("model"), name, commit (of a hub's model), hash, licence, family, prediction (what the U-Nets put out), size_multiple (of width and
        height, in pixels), parameters, megabytes (of all weight files, each once), defaults, experts (name, folder, sigma interval, null for no end,
        guidance, parameters, dtype, megabytes of its own files) and parts (name, class, parameters, dtype, megabytes).

    Raises:
        ModelError: a weight file is missing or not valid.
    """
    parts: list[dict[str, Any]] = [
        {"name": name, "class": kind} | _weights(folder.path / name, "model" if name.startswith("text_encoder") else "diffusion_pytorch_model")
        for name, kind in folder.parts.items()
        if name in ("vae", "conditioner") or name.startswith("text_encoder")
    ]
    experts: list[dict[str, Any]] = [
        {"name": e.name, "folder": e.subfolder, "sigma_min": e.sigma_min, "sigma_max": _finite(e.sigma_max), "guidance": e.guidance}
        | _weights(chain(folder.path / e.subfolder)[-1], "diffusion_pytorch_model")
        | {"megabytes": round(_own_bytes(folder.path / e.subfolder) / 1e6, 1)}
        for e in folder.experts
    ]
    defaults = folder.defaults
    return {
        "kind": "model",
        "name": folder.name,
        "commit": folder.commit,
        "hash": folder.fingerprint,
        "licence": licence(folder.path),
        "family": folder.family,
        "prediction": folder.noise.prediction_type,
        "size_multiple": folder.factor,
        "parameters": sum(part["parameters"] for part in [*parts, *experts]),
        "megabytes": round(sum(part["megabytes"] for part in parts) + expert_bytes(folder) / 1e6, 1),
        "defaults": {name: getattr(defaults, name) for name in ("width", "height", "steps", "sampler", "schedule", "guidance")},
        "experts": experts,
        "parts": parts,
    }


def describe_experts(folder: ModelFolder) -> dict[str, Any]:
    """Facts about the experts of a model folder, JSON-compatible.

    Returns:
        kind ("experts"), name, bytes (all U-Net files, each once), and experts, from high to low noise: name, folder, stored ("whole", "delta",
        "lora" or "delta+lora"), base (folder), parent (name), guidance, the interval as sigma_min and sigma_max (null: no end), timestep_min and
        timestep_max (fractional; the expert owns timestep_min <= t < timestep_max) and log_snr_min and log_snr_max (of sigma: −2·ln sigma; null: no
        end), and its tensors: tensors, shared_tensors (taken from bases), bytes (its own files) and shared_bytes (of the tensors from bases).

    Raises:
        ModelError: a weight file is missing or not valid.
    """
    return {
        "kind": "experts",
        "name": folder.name,
        "bytes": expert_bytes(folder),
        "experts": [_expert(folder, entry) for entry in reversed(folder.experts)],
    }


def licence(folder: Path) -> str | None:
    """What a model card says of its licence in its front matter: `license_name` where there is one, else `license`; None where it says nothing."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    with card.open(encoding="utf-8", errors="replace") as file:
        front = re.match(r"---\r?\n(.*?)\n---", file.read(CARD_CHARACTERS), re.DOTALL)
    said = {} if front is None else dict(re.findall(r"^(license|license_name):[ \t]*[\"']?([^\s\"'#]+)", front[1], re.MULTILINE))
    return said.get("license_name", said.get("license"))


def _expert(folder: ModelFolder, entry: ExpertEntry) -> dict[str, Any]:
    own, *bases = chain(folder.path / entry.subfolder)
    present = [kind for kind, name in (("delta", TENSORS), ("lora", LORA)) if (own / name).exists()]
    whole = bases[-1] if bases else own
    sizes = {name: tensor_bytes(tensor) for name, tensor in read_headers(whole).items()}
    changed = _changed(own) if bases else set(sizes)
    noise, low, high = folder.noise, entry.sigma_min, entry.sigma_max
    return {
        "name": entry.name,
        "folder": entry.subfolder,
        "stored": "whole" if not bases else "+".join(present) if present else "delta",
        "base": bases[0].name if bases else None,
        "parent": entry.parent,
        "guidance": entry.guidance,
        "sigma_min": low,
        "sigma_max": _finite(high),
        "timestep_min": 0.0 if low <= noise.sigma_min else round(float(noise.timestep_at(low)), 6),
        "timestep_max": float(len(noise.sigmas)) if high > noise.sigma_max else round(float(noise.timestep_at(high)), 6),
        "log_snr_min": None if math.isinf(high) else -2 * math.log(high),
        "log_snr_max": None if low == 0 else -2 * math.log(low),
        "tensors": len(sizes),
        "shared_tensors": len(sizes.keys() - changed),
        "bytes": _own_bytes(own),
        "shared_bytes": sum(size for name, size in sizes.items() if name not in changed),
    }


def _changed(folder: Path) -> set[str]:
    """Names of the tensors that a delta does not take from its base as they are."""
    own = set(read_header(folder / TENSORS)) if (folder / TENSORS).exists() else set[str]()
    return own | ({f"{module}.weight" for module in read_lora(folder / LORA)} if (folder / LORA).exists() else set[str]())


def _finite(sigma: float) -> float | None:
    return None if math.isinf(sigma) else sigma


def _own_bytes(folder: Path) -> int:
    """What an expert's own files take, or its share of a single file."""
    return weight_bytes(folder) if within_single_file(folder) is not None else sum(path.stat().st_size for path in own_files(folder))


def _weights(folder: Path, stem: str) -> dict[str, Any]:
    parameters: Counter[str] = Counter()
    for entry in read_headers(folder, stem).values():
        parameters[entry["dtype"]] += prod(entry["shape"])
    size = weight_bytes(folder, stem)
    return {"parameters": parameters.total(), "dtype": "+".join(sorted(parameters)), "megabytes": round(size / 1e6, 1)}
