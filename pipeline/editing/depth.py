"""Depth maps for ControlNets, by a network of transformers that estimates inverse depth: what is near is white.

Computed on the CPU in float32, so that a picture's map is the same wherever it is drawn. Imported and loaded only where a request asks for a map.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ...errors import ModelError, UnsafeError, first_line, out_of_memory
from ...model_files import read_headers, read_json
from ...weights import check_finite
from .inputs import InputPicture, pixels_of
from .networks import Beside, beside, check_unchanged, open_beside

WEIGHTS = "model"
_TEXTS = ("config.json", "preprocessor_config.json")
_KINDS = ("dpt", "depth_anything")  # relative inverse depth, as depth ControlNets were trained on; others give metres, in which near is small
_BACKBONES = ("beit", "bit", "dinov2", "swinv2")
_PROCESSORS = ("DPTImageProcessor", "DPTImageProcessorFast", "DPTFeatureExtractor")
_UNUSED = "neck.fusion_stage.layers.0.residual_layer1."  # published DPT files lack it: the first layer has nothing to add
_MOST_PIXELS, _MOST_MULTIPLE = 2048, 256
_PICTURES = 16  # whose maps are remembered: as many as are computed together


def checked_estimator(path: Path) -> Beside:
    """A depth network, once its folder was found to be safe and of a kind that is known; no weights are loaded.

    Raises:
        UsageError: there is no such folder.
        UnsafeError: it brings code or pickles, or asks for classes or networks that are not on the lists here.
        ModelError: it is not a valid one.
    """
    folder = open_beside(path, "control-depth-model")
    _settings(folder)
    _processing(folder)
    return beside(folder, WEIGHTS, _TEXTS)


def depth_map(estimator: Beside, picture: InputPicture) -> NDArray[np.uint8]:
    """The depth of a picture, (height, width) uint8 in its own size: 0 is farthest, 255 nearest, all 0 where everything is equally far.

    The map is that of transformers' depth-estimation pipeline.

    Raises:
        UsageError: the picture is gone, or is not what it was.
        UnsafeError, ModelError: the network's files are not valid, or what it computes is not finite.
    """
    return _map(estimator, picture)


@lru_cache(maxsize=_PICTURES)
def _map(estimator: Beside, picture: InputPicture) -> NDArray[np.uint8]:
    pixels = Image.fromarray(pixels_of(picture))
    processor, network = _load(check_unchanged(estimator, WEIGHTS, _TEXTS))
    try:
        with torch.inference_mode():
            output = network(**processor(images=pixels, return_tensors="pt"))
            depth = processor.post_process_depth_estimation(output, [pixels.size[::-1]])[0]["predicted_depth"].numpy()
    except Exception as error:  # the library raises many kinds
        if out_of_memory(error):
            raise
        raise ModelError(f"the depth of {picture.name} cannot be computed with {estimator.name!r} ({first_line(error)}).") from error
    low, high = float(depth.min()), float(depth.max())
    if not np.isfinite(high - low):
        raise ModelError(f"{estimator.name!r} computes a depth of {picture.name} that is not finite; give another depth model.")
    if high == low:
        return np.zeros(depth.shape, np.uint8)
    return ((depth - depth.min()) / (depth.max() - depth.min()) * 255).astype(np.uint8)


def _load(folder: Path) -> tuple[Any, Any]:
    """The classes are chosen by name from the lists above, and told nothing but the fields that they declare."""
    from transformers import AutoModelForDepthEstimation, DPTImageProcessor
    from transformers.utils import logging

    from ..model.library import is_modest

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    settings = _settings(folder)
    if not is_modest(settings):
        raise ModelError(f"the config.json of {folder.name!r} asks for more than any real network has; fetch it again.")
    numbers = sum(math.prod(entry["shape"]) for entry in read_headers(folder, WEIGHTS).values())
    safe: dict[str, Any] = {"use_safetensors": True, "local_files_only": True, "trust_remote_code": False, "output_loading_info": True}
    try:
        config = _config(settings)
        with torch.device("meta"):
            wanted = AutoModelForDepthEstimation.from_config(config, trust_remote_code=False).state_dict()
        if sum(tensor.numel() for name, tensor in wanted.items() if not name.startswith(_UNUSED)) > numbers:
            raise ValueError(f"its config asks for more numbers than the {numbers} that its files hold")
        network, told = AutoModelForDepthEstimation.from_pretrained(folder, config=config, dtype=torch.float32, **safe)
        processor = DPTImageProcessor(**_processing(folder))
    except Exception as error:  # the library raises many kinds
        raise ModelError(f"transformers cannot load the depth model {folder.name!r} ({first_line(error)}); fetch it again.") from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(str(name) for name in told[what] if not str(name).startswith(_UNUSED))
        if names:
            raise ModelError(f"The weights in {folder} do not fit the config ({what}: {', '.join(names[:5])}).")
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point():
            check_finite(name, tensor, folder)
    return processor, network.eval()


def _settings(folder: Path) -> dict[str, Any]:
    """`config.json`, of a kind that is known.

    Raises:
        UnsafeError: its kind, or that of its backbone, is not on the lists.
        ModelError: it gives depth in metres.
    """
    settings = read_json(folder / "config.json")
    inner = settings.get("backbone_config")
    kinds = [(settings, _KINDS), *([] if inner is None else [(inner, _BACKBONES)])]
    for config, known in kinds:
        kind = config.get("model_type") if isinstance(config, dict) else config
        if kind not in known:
            raise UnsafeError(f"--control-depth-model {folder.name!r} asks for the network {kind!r:.100}; only {', '.join(known)} are run here.")
    if settings.get("backbone") is not None:
        raise UnsafeError(
            f"--control-depth-model {folder.name!r} names another network, {settings['backbone']!r:.100}, as its backbone; none is fetched."
        )
    if settings.get("depth_estimation_type", "relative") != "relative":
        raise ModelError(f"--control-depth-model {folder.name!r} estimates metres, in which near is small; give one of relative depth.")
    return settings


def _config(settings: Mapping[str, Any]) -> Any:
    """transformers' config of these settings, of the fields that its class declares; a backbone's likewise."""
    from transformers import CONFIG_MAPPING, PreTrainedConfig

    kind = CONFIG_MAPPING[settings["model_type"]]
    known = {field.name for field in fields(kind)} - {field.name for field in fields(PreTrainedConfig)} | {"out_features", "out_indices"}
    told = {name: value for name, value in settings.items() if name in known}
    if told.get("backbone_config") is not None:
        told["backbone_config"] = _config(told["backbone_config"])
    return kind(**told)


def _processing(folder: Path) -> dict[str, Any]:
    """How pictures are made ready: the fields of `preprocessor_config.json` that DPT's class reads, each within bounds.

    Raises:
        UnsafeError: it asks for another class.
        ModelError: a field cannot be.
    """
    given = read_json(folder / "preprocessor_config.json")
    for key in ("image_processor_type", "feature_extractor_type"):
        if given.get(key, _PROCESSORS[0]) not in _PROCESSORS:
            raise UnsafeError(f"preprocessor_config.json of {folder.name!r} asks for {key} = {given[key]!r:.100}, which is not run here.")
    size = given.get("size", 384)
    size = size if isinstance(size, dict) else {"height": size, "width": size}
    found = {name: given[name] for name in _PROCESSED if name in given} | {"size": size}
    wrong = next((name for name, value in found.items() if not _PROCESSED[name](value)), None)
    if wrong is not None:
        raise ModelError(f"preprocessor_config.json of {folder.name!r} says {wrong} = {found[wrong]!r:.100}, which cannot be; fetch it again.")
    return found


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


def _is_whole(value: object, most: int) -> bool:
    return type(value) is int and 1 <= value <= most


def _is_colour(value: object) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(type(one) in (int, float) and abs(one) <= 1e3 for one in value)


_PROCESSED: Mapping[str, Callable[[Any], bool]] = {
    "do_resize": lambda value: value is True,
    "size": lambda value: value.keys() == {"height", "width"} and all(_is_whole(side, _MOST_PIXELS) for side in value.values()),
    "keep_aspect_ratio": _is_flag,
    "ensure_multiple_of": lambda value: _is_whole(value, _MOST_MULTIPLE),
    "resample": lambda value: value in range(6),
    "do_rescale": _is_flag,
    "rescale_factor": lambda value: type(value) in (int, float) and 0 < value <= 1,
    "do_normalize": _is_flag,
    "image_mean": _is_colour,
    "image_std": lambda value: _is_colour(value) and 0 not in value,
    "do_pad": _is_flag,
    "size_divisor": lambda value: value is None or _is_whole(value, _MOST_MULTIPLE),
}
