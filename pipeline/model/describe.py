"""What a model folder holds, read from its JSON files and the headers of its safetensors files: no weights are loaded."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

from ...errors import ModelError
from ...model_files import file_metadata, read_header, read_headers, read_json, tensor_bytes, weight_bytes, within_single_file
from ...unet.deltas import LORA, TENSORS, chain, own_files
from ...unet.experts import ExpertEntry
from ...unet.lora import read_lora
from ..hub.models import CONFIGS, origin_of
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
        {"name": name, "class": kind}
        | _weights(folder.path / name, "model" if name.startswith("text_encoder") else "diffusion_pytorch_model", folder.variant)
        for name, kind in folder.parts.items()
        if name in ("vae", "conditioner") or name.startswith("text_encoder")
    ]
    experts: list[dict[str, Any]] = [
        {"name": e.name, "folder": e.subfolder, "sigma_min": e.sigma_min, "sigma_max": _finite(e.sigma_max), "guidance": e.guidance}
        | _weights(chain(folder.path / e.subfolder)[-1], "diffusion_pytorch_model", folder.variant)
        | {"megabytes": round(_own_bytes(folder.path / e.subfolder, folder.variant) / 1e6, 1)}
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


def describe_weights(path: Path) -> dict[str, Any]:
    """Facts about a LoRA file, or a folder of one network such as a T5 encoder, JSON-compatible.

    Returns:
        kind ("lora" or "network"), name, commit (of a hub's model), licence, architecture (as the file or its config names it, else None), tensors,
        parameters, dtype, megabytes.

    Raises:
        ModelError: a damaged file, or there are no weights.
    """
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{path.name!r} holds no safetensors weights; give a model folder, a single file or a LoRA.")
    metadata, root = file_metadata(files[0]), path.parent if path.is_file() else path
    config = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    named = config.get("_class_name") or next(iter(config.get("architectures") or ()), None)
    origin = origin_of(root)
    tensors = [entry for file in files for entry in read_header(file).values()]
    return {
        "kind": "lora" if path.is_file() else "network",
        "name": path.resolve().name if origin is None else origin.repo,
        "commit": None if origin is None else origin.revision,
        "licence": metadata.get("modelspec.license") or (None if path.is_file() and origin is None else licence(root)),
        "architecture": named or metadata.get("modelspec.architecture") or metadata.get("ss_base_model_version"),
        "tensors": len(tensors),
        **_parameters(tensors),
        "megabytes": round(sum(file.stat().st_size for file in files) / 1e6, 1),
    }


def is_weights_alone(path: Path) -> bool:
    """Whether `describe_weights` describes this: a LoRA file, by the names of its tensors, or a folder of one network."""
    if path.is_file():
        return path.suffix == ".safetensors" and any("lora" in name for name in read_header(path))
    return not (path / "model_index.json").is_file() and any((path / config).is_file() for config in CONFIGS)


def licence(folder: Path) -> str | None:
    """What a model says of its licence: a single file in its metadata (`modelspec.license`), a folder in the front matter of its card, as
    `license_name` where there is one, else as `license`. None where it says nothing.
    """
    inner = within_single_file(folder)
    if inner is not None:
        return file_metadata(inner.file).get("modelspec.license")
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
    sizes = {name: tensor_bytes(tensor) for name, tensor in read_headers(whole, variant=folder.variant).items()}
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
        "bytes": _own_bytes(own, folder.variant),
        "shared_bytes": sum(size for name, size in sizes.items() if name not in changed),
    }


def _changed(folder: Path) -> set[str]:
    """Names of the tensors that a delta does not take from its base as they are."""
    own = set(read_header(folder / TENSORS)) if (folder / TENSORS).exists() else set[str]()
    return own | ({f"{module}.weight" for module in read_lora(folder / LORA)} if (folder / LORA).exists() else set[str]())


def _finite(sigma: float) -> float | None:
    return None if math.isinf(sigma) else sigma


def _own_bytes(folder: Path, variant: str | None) -> int:
    """What an expert's own files take, or its share of a single file."""
    return weight_bytes(folder) if within_single_file(folder) is not None else sum(path.stat().st_size for path in own_files(folder, variant))


def _weights(folder: Path, stem: str, variant: str | None = None) -> dict[str, Any]:
    return _parameters(read_headers(folder, stem, variant).values()) | {"megabytes": round(weight_bytes(folder, stem, variant) / 1e6, 1)}


def _parameters(tensors: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    parameters: Counter[str] = Counter()
    for entry in tensors:
        parameters[entry["dtype"]] += prod(entry["shape"])
    return {"parameters": parameters.total(), "dtype": "+".join(sorted(parameters))}
