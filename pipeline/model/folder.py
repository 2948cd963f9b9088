"""A model folder as its JSON files describe it: which parts it has, whether it is safe, and what its maker recommends. Reads no weights.

A model folder is a diffusers folder: `model_index.json` names the class of each part, `unet/`, `vae/`, `text_encoder/` and so on hold them. An
ensemble adds `experts.json` and, when CLIP and T5 are joined, `conditioner/`; `defaults.json` says what the model draws best with. A single-file
checkpoint is read as the folder that it would be (`single_file/`).
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ...errors import ModelError, UnsafeError, UsageError
from ...model_files import has_variant, is_pickle_name, read_json, single_file_layout, weight_bytes, within_single_file
from ...schedulers.noise import NoiseSchedule
from ...single_file import SUFFIX
from ...single_file.documents import documents
from ...single_file.layout import PREDICTIONS
from ...unet.deltas import chain, own_files
from ...unet.experts import ExpertEntry, read_experts
from ..hub.found import found
from ..hub.models import origin_of
from .allowed import allowed_parts, refuse_code, refuse_files, refuse_pickles
from .defaults import Defaults, read_defaults
from .fingerprint import add_sample, fingerprint

EMBEDDED = Path(__file__).parents[2] / "models" / "embedded"

TEXT_PARTS = {
    "sd": ("text_encoder", "tokenizer"),
    "sdxl": ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
    "sdxl-refiner": ("text_encoder_2", "tokenizer_2"),
    "clip-t5": ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "conditioner"),
    "t5": ("text_encoder", "tokenizer"),
    "sd-t5": ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "conditioner"),
    "sdxl-t5": ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3", "conditioner"),
    "sdxl-refiner-t5": ("text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3", "conditioner"),
}
"""The families of models, and the parts that each reads prompts with."""
T5_ADDED = {"sd": "sd-t5", "sdxl": "sdxl-t5", "sdxl-refiner": "sdxl-refiner-t5"}
"""Families of CLIP alone -> what they are with T5 added (`T5Residual`)."""


@dataclass(frozen=True)
class ModelFolder:
    """What the JSON files of a model folder say.

    Attributes:
        path: the folder, or the way into a single file (see `model_files.within_single_file`).
        name: the folder's or file's own name, or of a hub's model owner/name; what pictures record.
        commit: of a hub's model, what it was resolved to; None of any other.
        fingerprint: 64 hex digits over the names, sizes and sampled contents of its files, see `fingerprint`.
        family: "sd" (one CLIP), "sdxl" (two CLIPs joined on features), "sdxl-refiner" (the second of them only), "clip-t5" (CLIP and T5 joined by
            `conditioner/`), "sd-t5" (one CLIP, to which `conditioner/` adds T5; so of SDXL "sdxl-t5" and "sdxl-refiner-t5"), "t5" (T5 alone).
        parts: component -> class, for those that are there.
        configs: component or expert's subfolder -> its parsed JSON config; of an expert that is a delta, its base's.
        experts: from low to high noise; one that covers all when there is no `experts.json`.
        factor: pixels to a latent position; width and height are multiples of it.
        noise: the training schedule.
        defaults: what the maker recommends, or what its family is known for.
        variant: such as "fp16": the weights that are loaded where a part has them; None takes the plain ones, or else the only ones there are.
        zero_negative: the unconditional side of an absent negative prompt is zeros (SDXL base), not the empty prompt.
    """

    path: Path
    name: str
    commit: str | None
    fingerprint: str
    family: str
    parts: Mapping[str, str]
    configs: Mapping[str, Mapping[str, Any]]
    experts: tuple[ExpertEntry, ...]
    factor: int
    noise: NoiseSchedule
    defaults: Defaults
    zero_negative: bool
    variant: str | None = None

    @property
    def families(self) -> set[str]:
        """Those of all experts."""
        return {self.family if expert.text is None else expert.text.family for expert in self.experts}

    @property
    def channels(self) -> int:
        """Of the latents."""
        return int(self.configs["unet"].get("out_channels" if self.inpaints else "in_channels", 4))

    @property
    def inpaints(self) -> bool:
        """Its networks see a mask and the masked picture beside the latents: 9 channels for latents of 4."""
        seen, told = (self.configs["unet"].get(name, 4) for name in ("in_channels", "out_channels"))
        return seen == 2 * told + 1


def open_folder(path: Path | None, prediction_type: str | None = None, variant: str | None = None) -> ModelFolder:
    """Read and check a model folder or single-file checkpoint; None is the embedded model.

    Args:
        path: a folder, a `.safetensors` file, or a `ModelFolder.path`; or a name of the hub, owner/name (see `hub.found`).
        prediction_type: of a single file, "epsilon" or "v"; None is what the file says, epsilon where it says nothing. A folder has its own.
        variant: of a folder, see `ModelFolder`.

    Raises:
        UsageError: there is no such folder or file, a prediction type that is not known or for a folder, or a variant that no part has.
        UnsafeError: it brings code along, names a class that is not allowed, or its weights are pickles.
        ModelError: a file is missing or not valid.
    """
    folder = EMBEDDED if path is None else found(path, variant=variant)
    if folder.is_file() or within_single_file(folder) is not None:
        if variant is not None:
            raise UsageError(f"--variant is for model folders, and {folder.name!r} is a single file; leave it out.")
        return _open_single_file(folder, prediction_type)
    if prediction_type is not None:
        raise UsageError("--prediction-type is for single-file checkpoints; a model folder says in scheduler/scheduler_config.json what it predicts.")
    if not folder.is_dir():
        named = "this installation has no embedded model" if path is None else f"model folder {str(path)!r} is not there"
        raise UsageError(f"{named}; give a diffusers folder or a .safetensors file with --model.")
    if not (folder / "model_index.json").is_file():
        refuse_pickles(folder)
        raise ModelError(f"{folder.name!r} holds no model_index.json; a folder that diffusers' save_pretrained or tu-diffuse wrote was wanted.")
    refuse_files(folder)
    index = read_json(folder / "model_index.json")
    parts = _checked_parts(folder, index)
    experts = read_experts(folder)
    chains = {expert.subfolder: chain(folder / expert.subfolder) for expert in experts}
    weights = [base.relative_to(folder).as_posix() for bases in chains.values() for base in bases]
    folders = [*dict.fromkeys([*parts, *weights])]
    refuse_code(folder, index, folders)
    if variant is not None and not any(has_variant(folder / name, variant) for name in folders):
        raise UsageError(f"no part of {folder.name!r} has weights of the variant {variant!r:.100}; name another, or fetch them with models pull.")
    configs = {name: read_json(folder / name / _config_name(name)) for name in parts if not name.startswith("tokenizer")}
    configs |= {name: read_json(bases[-1] / "config.json") for name, bases in chains.items()}
    channels = configs["unet"].get("in_channels", 4)
    if type(channels) is not int or not 1 <= channels <= 1024:
        raise ModelError(f"the U-Net's config.json has in_channels = {channels!r:.100}; a whole number up to 1024 was wanted; fetch the model again.")
    family = _family(folder, parts)
    _check_texts(folder, parts, experts)
    factor = _factor(configs["vae"])
    noise = NoiseSchedule.from_config(configs["scheduler"])
    origin = origin_of(folder)
    return ModelFolder(
        path=folder,
        name=folder.resolve().name if origin is None else origin.repo,
        commit=None if origin is None else origin.revision,
        fingerprint=fingerprint(folder, folders, variant),
        variant=variant,
        family=family,
        parts=MappingProxyType(parts),
        configs=MappingProxyType(configs),
        experts=experts,
        factor=factor,
        noise=noise,
        defaults=read_defaults(folder, family, configs, factor, noise),
        zero_negative=bool(index.get("force_zeros_for_empty_prompt", family in ("sdxl", "sdxl-t5"))),
    )


def _open_single_file(path: Path, prediction_type: str | None) -> ModelFolder:
    """Read a single-file checkpoint as the folder that it would be; see `open_folder`."""
    inner = within_single_file(path)
    file = path if inner is None else inner.file
    if is_pickle_name(file.name):
        raise UnsafeError(f"{file.name!r} is a pickle file, which can run code when loaded; convert the model to safetensors first.")
    if file.suffix != SUFFIX:
        raise ModelError(f"{file.name!r} is not a model; a .safetensors file or a folder in diffusers' layout was wanted.")
    if prediction_type is not None and prediction_type not in PREDICTIONS:
        raise UsageError(f"--prediction-type {prediction_type!r} is not known; use one of {', '.join(PREDICTIONS)}.")
    layout = single_file_layout(file)
    asked = None if prediction_type is None else PREDICTIONS[prediction_type]
    prediction = asked or (layout.prediction or "epsilon" if inner is None else inner.prediction)
    folder = file / prediction
    files = documents(layout, prediction)
    index = files["model_index.json"]
    parts = {name: value[1] for name, value in index.items() if isinstance(value, list) and value != [None, None]}
    configs = {name: files[f"{name}/{_config_name(name)}"] for name in parts if not name.startswith("tokenizer")}
    family, factor, noise = _family(folder, parts), _factor(configs["vae"]), NoiseSchedule.from_config(configs["scheduler"])
    digest = hashlib.sha256(f"{prediction}\0".encode())
    add_sample(digest, file)
    origin = origin_of(file.parent)
    return ModelFolder(
        path=folder,
        name=file.resolve().name if origin is None else origin.repo,
        commit=None if origin is None else origin.revision,
        fingerprint=digest.hexdigest(),
        family=family,
        parts=MappingProxyType(parts),
        configs=MappingProxyType(configs),
        experts=read_experts(folder),
        factor=factor,
        noise=noise,
        defaults=read_defaults(folder, family, configs, factor, noise),
        zero_negative=bool(index.get("force_zeros_for_empty_prompt", False)),
    )


def expert_bytes(folder: ModelFolder) -> int:
    """What all experts' weights take on disk; shared bases count once."""
    if within_single_file(folder.path) is not None:
        return weight_bytes(folder.path / "unet")
    folders = {base for entry in folder.experts for base in chain(folder.path / entry.subfolder)}
    return sum(path.stat().st_size for base in folders for path in own_files(base, folder.variant))


def _checked_parts(folder: Path, index: Mapping[str, Any]) -> dict[str, str]:
    parts = allowed_parts(folder.name, index)
    for part in parts:
        if not (folder / part).is_dir():
            raise ModelError(f"{folder.name!r} names a part {part!r} but has no folder of that name; fetch the model again.")
    for part in ("unet", "vae", "scheduler"):
        if part not in parts:
            raise ModelError(f"{folder.name!r} has no part {part!r} in its model_index.json; fetch the model again.")
    return parts


def _config_name(part: str) -> str:
    return "scheduler_config.json" if part == "scheduler" else "config.json"


def _family(folder: Path, parts: Mapping[str, str]) -> str:
    encoders = tuple(parts.get(part) for part in ("text_encoder", "text_encoder_2"))
    third = parts.get("text_encoder_3")
    if third is not None:
        rest = _family(folder, {name: kind for name, kind in parts.items() if name != "text_encoder_3"})
        if rest.startswith("sdxl") and (third, parts.get("conditioner")) == ("T5EncoderModel", "T5Residual"):
            return T5_ADDED[rest]
        raise ModelError(f"{folder.name!r} has a third text encoder {third}; only SDXL with T5 and a conditioner T5Residual has one.")
    match encoders:
        case ("CLIPTextModel" | "CLIPTextModelWithProjection", "T5EncoderModel") if "conditioner" in parts:
            return "sd-t5" if parts["conditioner"] == "T5Residual" else "clip-t5"
        case ("CLIPTextModel" | "CLIPTextModelWithProjection", "CLIPTextModelWithProjection"):
            return "sdxl"
        case (None, "CLIPTextModelWithProjection"):
            return "sdxl-refiner"
        case ("CLIPTextModel" | "CLIPTextModelWithProjection", None):
            return "sd"
        case ("T5EncoderModel", None):
            return "t5"
        case _:
            wanted = "one CLIP, two CLIPs, T5, or CLIP with T5 and a conditioner"
            raise ModelError(f"{folder.name!r} has the text encoders {encoders}; {wanted} were wanted.")


def _check_texts(folder: Path, parts: Mapping[str, str], experts: Sequence[ExpertEntry]) -> None:
    """Experts that read prompts in their own way name a family, and components of its classes."""
    for entry in experts:
        if entry.text is None:
            continue
        wanted, named = TEXT_PARTS.get(entry.text.family, ()), entry.text.parts
        if not wanted or set(named) != set(wanted) or any(component not in parts for component in named.values()):
            raise ModelError(
                f"experts.json of {folder.name!r} lets {entry.name!r} read prompts as {entry.text.family!r:.100} with {dict(named)!r:.300}; one of "
                f"{', '.join(TEXT_PARTS)} with components that model_index.json names was wanted."
            )
        if _family(folder, {part: parts[component] for part, component in named.items()}) != entry.text.family:
            raise ModelError(f"experts.json of {folder.name!r} gives {entry.name!r} components of other classes than {entry.text.family} has.")


def _factor(vae: Mapping[str, Any]) -> int:
    if "downsample_factor" in vae:
        value = vae["downsample_factor"]
        if value not in (1, 2, 4, 8, 16, 32, 64, 128):
            raise ModelError(f"the VAE's config.json has downsample_factor = {value!r:.100}; a power of two up to 128 was wanted.")
        return int(value)
    for name in ("encoder_block_out_channels", "down_block_out_channels", "block_out_channels"):
        if name in vae:
            return 2 ** (_levels(vae, name) - 1)
    raise ModelError("the VAE's config.json has no block_out_channels; fetch the model again.")


def _levels(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    if not isinstance(value, list) or not 1 <= len(value) <= 8:
        raise ModelError(f"a config.json has {name} = {value!r:.100}; a list of 1 to 8 widths was wanted; fetch the model again.")
    return len(value)
