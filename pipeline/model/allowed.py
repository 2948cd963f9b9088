"""What a model folder may hold: the classes that are run here, no code, no pickles, no links that lead out of it."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import UnsafeError
from ...model_files import is_pickle_name, read_json
from ..hub.models import origin_of
from .defaults import SAMPLER_OF

# (library, class) pairs that a model_index.json may name. Safety checkers and picture encoders are known and not loaded.
_NETWORKS = {
    ("transformers", "CLIPTextModel"),
    ("transformers", "CLIPTextModelWithProjection"),
    ("transformers", "T5EncoderModel"),
    ("transformers", "CLIPTokenizer"),
    ("transformers", "CLIPTokenizerFast"),
    ("transformers", "T5Tokenizer"),
    ("transformers", "T5TokenizerFast"),
    ("diffusers", "UNet2DConditionModel"),
    ("diffusers", "AutoencoderKL"),
    ("diffusers", "AutoencoderDC"),
    ("diffusers", "AutoencoderTiny"),
    ("diffusers", "AsymmetricAutoencoderKL"),
    ("tu_diffuse", "Conditioner"),
    ("tu_diffuse", "T5Residual"),
}
_NOT_LOADED = {
    ("transformers", "CLIPImageProcessor"),
    ("transformers", "CLIPFeatureExtractor"),
    ("transformers", "CLIPVisionModelWithProjection"),
    ("stable_diffusion", "StableDiffusionSafetyChecker"),
}
_ALLOWED = _NETWORKS | _NOT_LOADED | {("diffusers", name) for name in SAMPLER_OF}
_PIPELINES = (
    "TuDiffusePipeline",
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
    "LatentConsistencyModelPipeline",
)
_CODE_KEYS = ("auto_map", "custom_pipeline", "custom_pipelines", "trust_remote_code")
_CODE_FILE = re.compile(r".*\.(py[a-z]?|so(\.\d+)*|dll|dylib)", re.IGNORECASE)
# What the configs of parts may name; the classes themselves are ours or diffusers', chosen by model_index.json.
_TOKENIZERS = {name for _, name in _NETWORKS if "Tokenizer" in name} | {"PreTrainedTokenizer", "PreTrainedTokenizerFast", "TokenizersBackend"}
_CLASS_KEYS = {
    "_class_name": {name for _, name in _NETWORKS} | SAMPLER_OF.keys(),
    "architectures": {"CLIPModel", "CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel", "T5Model", "T5ForConditionalGeneration"},
    "tokenizer_class": _TOKENIZERS,
}
_PART_NAME = re.compile(r"[A-Za-z0-9_-]{1,100}")


def allowed_parts(name: str, index: Mapping[str, Any]) -> dict[str, str]:
    """The components of a `model_index.json` that are loaded, with their classes.

    Args:
        name: of the model, for messages.
        index: what the file holds.

    Raises:
        UnsafeError: the pipeline, or the class of a component, is not on the list.
    """
    if index.get("_class_name") not in _PIPELINES:
        raise UnsafeError(f"{name!r} asks for the pipeline {index.get('_class_name')!r:.100}; only {', '.join(_PIPELINES)} are run here.")
    parts: dict[str, str] = {}
    for part, value in index.items():
        if not isinstance(value, list) or part.startswith("_") or value == [None, None]:
            continue
        if not _PART_NAME.fullmatch(part):
            raise UnsafeError(f"{name!r} names a part {part!r:.100}, which may not leave the model folder; take another model.")
        if len(value) != 2 or not all(isinstance(v, str) for v in value) or tuple(value) not in _ALLOWED:
            raise UnsafeError(
                f"{name!r} asks for {part} = {value!r:.200}, which is not on the list of classes that are run here; nothing was loaded."
            )
        if tuple(value) not in _NOT_LOADED:
            parts[part] = value[1]
    return parts


def refuse_files(folder: Path) -> None:
    """Refuse files of code, and links that lead out of the folder; those of a hub cache lead to its `blobs`, or to those that repositories share."""
    root = folder.resolve()
    places = [root, *([root.parents[1] / "blobs", root.parents[2] / "blobs"] if origin_of(root) is not None else [])]
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if _CODE_FILE.fullmatch(path.name):
            raise UnsafeError(f"{folder.name!r} brings code along ({name}); remove that file or take another model.")
        if path.is_symlink() and not any(path.resolve().is_relative_to(place) for place in places):
            raise UnsafeError(f"{folder.name!r} holds a link that leads out of the folder ({name}); put the file itself there.")


def refuse_code(folder: Path, index: Mapping[str, Any], names: Sequence[str]) -> None:
    """Refuse configs that ask for code of their own, or for classes that are not on our lists, at any depth."""
    parts = {folder / name for name in names}
    documents = {folder / "model_index.json": index}
    documents |= {path: read_json(path) for place in (folder, *folder.glob("*/"), *parts) for path in place.glob("*config.json")}
    for path, document in documents.items():
        name = path.relative_to(folder).as_posix()
        for key, value in _entries(document):
            if key in _CODE_KEYS:
                raise UnsafeError(f"{name} of {folder.name!r} asks for custom code ({key}); remove the entry or take another model.")
            allowed = _CLASS_KEYS.get(key) if path.parent in parts else None
            classes = value if isinstance(value, list) else [value]
            if allowed is not None and value is not None and not all(isinstance(one, str) and one in allowed for one in classes):
                raise UnsafeError(
                    f"{name} of {folder.name!r} asks for {key} = {value!r:.200}, which is not on the list of classes that are run here."
                )


def _entries(value: object) -> Iterator[tuple[str, Any]]:
    """Names and values of an object and of all objects in it."""
    if isinstance(value, dict):
        yield from value.items()
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _entries(inner)


def refuse_pickles(folder: Path) -> None:
    """Refuse a folder that holds a pickle file."""
    pickles = sorted(p.name for p in folder.iterdir() if is_pickle_name(p.name))
    if pickles:
        raise UnsafeError(
            f"{folder.name!r} holds {pickles[0]}, a pickle file, which can run code when loaded; convert the model to safetensors first."
        )
