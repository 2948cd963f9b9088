"""Several model folders into one ensemble: base and refiner, or any models of one latent space and one noise schedule."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from ..errors import ModelError, UsageError
from ..model_files import files_sha256, read_json, weight_files
from ..pipeline.model.folder import TEXT_PARTS, ModelFolder
from ..unet.experts import ExpertEntry, ExpertText
from .expert_files import Component, Draft, Kept, verified, write_model
from .intervals import interval_name

_SAYS_NOTHING = ("sample_size", "force_upcast", "transformers_version", "torch_dtype", "dtype", "name_or_path", "special_tokens_map_file")


@dataclass(frozen=True)
class Composed:
    """An ensemble as written.

    Attributes:
        experts: from low to high noise.
        notes: what the models did not agree on, and what was taken.
    """

    experts: tuple[ExpertEntry, ...]
    notes: tuple[str, ...]


def compose(models: Sequence[ModelFolder], borders: Sequence[float], out: Path, link: bool = False) -> Composed:
    """Give each model the noise levels between two borders; what an ensemble brings keeps its own borders inside.

    Everything but the U-Nets comes from the first model. An expert of a model with other text encoders, or another way of reading prompts, brings
    these along. Networks and text encoders that models have in common are stored once.

    Args:
        models: from high noise to low: the base before its refiner.
        borders: sigmas, one fewer, in any order; each belongs to the model above it.
        out: the new model folder.
        link: see `write_model`.

    Raises:
        UsageError: fewer than two models, borders that do not fit them, a piece without a timestep, or `out` exists.
        ModelError: models of different latents or noise schedules, or damaged weights.
        OutputError: `out` could not be written.
    """
    falling = sorted(set(borders), reverse=True)
    if len(models) < 2 or len(falling) != len(models) - 1:
        raise UsageError(f"{len(models)} models and {len(falling)} borders were given; give two models or more, and a border between each two.")
    if not all(0 < border < float("inf") for border in falling):
        raise UsageError(f"The borders {', '.join(f'{border:g}' for border in falling)} are no noise levels; give sigmas above 0.")
    first = models[0]
    notes: list[str] = []
    for other in models[1:]:
        notes += _agreement(first, other)
    for model in models:
        verified(model)
    drafts: list[Draft] = []
    added: dict[str, Component] = {}
    for model, (high, low) in zip(models, pairwise([float("inf"), *falling, 0.0]), strict=True):
        for entry in model.experts:
            bottom, top = max(low, entry.sigma_min), min(high, entry.sigma_max)
            if bottom >= top:
                continue
            name = interval_name(first.noise, bottom, top)
            text = _text_in(first, added, model, entry, name)
            piece = replace(entry, name=name, subfolder=f"unet_{name}", sigma_min=bottom, sigma_max=top, parent=None, text=text)
            drafts.append(Draft(piece, Kept(model.path / entry.subfolder)))
    return Composed(write_model(first, drafts, out, link, added), tuple(notes))


def _agreement(first: ModelFolder, other: ModelFolder) -> list[str]:
    """Check that two models can share a picture's latents.

    Raises:
        ModelError: they cannot.
    """
    both = f"{first.name!r} and {other.name!r}"
    if first.noise.prediction_type != other.noise.prediction_type:
        kinds = f"{first.noise.prediction_type} and {other.noise.prediction_type}"
        raise ModelError(f"{both} predict {kinds}; experts of one model have to predict the same.")
    if len(first.noise.sigmas) != len(other.noise.sigmas) or not torch.allclose(first.noise.sigmas, other.noise.sigmas, rtol=1e-6, atol=0):
        raise ModelError(f"{both} were trained on different noise schedules, so that a timestep means different noise to each; take models of one.")
    channels = [model.configs[entry.subfolder].get("in_channels", 4) for model in (first, other) for entry in model.experts]
    if len(set(channels)) > 1 or first.parts["vae"] != other.parts["vae"] or not _same_config(first.configs["vae"], other.configs["vae"]):
        raise ModelError(f"{both} have different latents (their VAEs' configs or the U-Nets' channels differ); take models of one latent space.")
    if _weights_sha256(first.path / "vae") != _weights_sha256(other.path / "vae"):
        return [f"the VAEs of {both} have different weights; that of {first.name!r} was taken"]
    return []


def _text_in(first: ModelFolder, added: dict[str, Component], model: ModelFolder, entry: ExpertEntry, name: str) -> ExpertText | None:
    """How an expert reads prompts in the new folder; components that only it has are put into `added`."""
    own = ExpertText(model.family, {part: part for part in TEXT_PARTS[model.family]}, model.zero_negative) if entry.text is None else entry.text
    parts = {part: _component_in(first, added, model, component, f"{part}_{name}") for part, component in own.parts.items()}
    as_first = own.family == first.family and own.zero_negative == first.zero_negative and all(part == there for part, there in parts.items())
    return None if as_first else replace(own, parts=parts)


def _component_in(first: ModelFolder, added: dict[str, Component], model: ModelFolder, component: str, name: str) -> str:
    """The name under which the new folder has a component: that of an equal one which is there, else a new one."""
    folder = model.path / component
    if model is first:
        return component
    there = {one: first.path / one for one, kind in first.parts.items() if kind == model.parts[component]}
    there |= {one: other.folder for one, other in added.items() if other.kind[1] == model.parts[component]}
    for one, other in sorted(there.items(), key=lambda found: found[0] != component):  # the one of the same name first
        if other == folder or _same_component(other, folder):
            return one
    library, kind = read_json(model.path / "model_index.json")[component]
    added[name] = Component(folder, (library, kind))
    return name


def _same_component(one: Path, other: Path) -> bool:
    """Whether two folders hold the same text encoder, tokenizer or conditioner."""
    documents = [{path.name: path for path in sorted(folder.iterdir()) if path.suffix in (".json", ".txt", ".model")} for folder in (one, other)]
    documents = [{name: path for name, path in found.items() if not name.endswith(".index.json")} for found in documents]
    if documents[0].keys() != documents[1].keys():
        return False
    if not all(_same_document(path, documents[1][name]) for name, path in documents[0].items()):
        return False
    return _weights_sha256(one) == _weights_sha256(other)


def _same_document(one: Path, other: Path) -> bool:
    if one.read_bytes() == other.read_bytes():
        return True
    try:
        return one.suffix == ".json" and _same_config(json.loads(one.read_text("utf-8")), json.loads(other.read_text("utf-8")))
    except ValueError:
        return False


def _same_config(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two JSON objects are equal but for names that decide nothing."""
    first, second = (
        {name: value for name, value in config.items() if value is not None and not name.startswith("_") and name not in _SAYS_NOTHING}
        for config in (one, other)
    )
    return first == second


def _weights_sha256(folder: Path) -> str:
    stem = "model" if (folder.name.startswith("text_encoder")) else "diffusion_pytorch_model"
    return files_sha256(weight_files(folder, stem) if any(folder.glob("*.safetensors")) else ())
