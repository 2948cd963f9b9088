"""Other text encoders for a model: T5 beside CLIP, which says nothing until `finetune --train conditioner`; a CLIP tower in open_clip's layout."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..errors import ModelError, UsageError
from ..model_files import read_json, read_weights, weight_files
from ..pipeline.hub.found import found as pulled
from ..pipeline.hub.models import hub_name
from ..pipeline.model.folder import T5_ADDED, TEXT_PARTS, ModelFolder, open_folder
from ..pipeline.staging import copy_folder, linked, staged_folder
from ..text_encoders.clip import CLIPText, CLIPTextConfig
from ..text_encoders.open_clip import open_clip_state_dict, open_clip_text_config
from ..text_encoders.t5 import T5Config, T5Encoder, t5_state_dict
from ..text_encoders.t5_residual import T5Residual, T5ResidualConfig
from ..text_encoders.tokenizer import load_tokenizer
from ..unet.deltas import chain
from ..weights import load_weights, without_storage

_TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "tokenizer_config.json", "special_tokens_map.json")


def add_t5(model: ModelFolder, t5: Path, out: Path, link: bool = False) -> ModelFolder:
    """Write a model folder that draws what `model` draws, bit by bit, and has a T5 encoder whose part can be trained (`T5Residual`).

    Args:
        model: Stable Diffusion 1 or 2, SDXL or its refiner.
        t5: folder of the encoder as transformers saves it, with its tokenizer's files; or OWNER/NAME of the hub.
        out: the new model folder.
        link: hard links instead of copies of files that stay the same.

    Returns:
        The new model.

    Raises:
        UsageError: a model of another family, no such folder, or `out` exists.
        ModelError: no T5 encoder, or one that lacks its tokenizer.
        UnsafeError: its weights are pickles.
        OutputError: `out` could not be written.
    """
    if model.family not in T5_ADDED or any(entry.text is not None for entry in model.experts):
        families, known = ", ".join(sorted(model.families)), ", ".join(T5_ADDED)
        raise UsageError(f"{model.name!r} reads prompts as {families}; T5 is added to models that read as one of {known}.")
    t5 = pulled(t5)
    if not (t5 / "config.json").is_file():
        raise UsageError(f"--t5 {t5.name!r} holds no config.json; name the folder of a T5 encoder as transformers saves it.")
    encoder = T5Config.from_dict(read_json(t5 / "config.json"))
    load_tokenizer(t5)
    load_weights(without_storage(lambda: T5Encoder(encoder)), t5, "model", convert=t5_state_dict)
    weights = weight_files(t5, "model")
    config = T5ResidualConfig(**_widths(model, encoder))
    copy = linked if link else shutil.copyfile
    with staged_folder(out) as staged:
        _copy_model(model, staged, copy)
        encoder_name, tokenizer_name = _t5_names(model)
        for name in (encoder_name, tokenizer_name, "conditioner"):
            (staged / name).mkdir()
        for path in [t5 / "config.json", *weights, *t5.glob("*.safetensors.index*.json")]:
            copy(path, staged / encoder_name / path.name)
        for name in _TOKENIZER_FILES:
            if (t5 / name).is_file():
                copy(t5 / name, staged / tokenizer_name / name)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            save_file(T5Residual(config).state_dict(), staged / "conditioner" / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
        _write_json(staged / "conditioner" / "config.json", config.to_dict())
        _write_json(staged / "model_index.json", _index_with_t5(model))
    return open_folder(out)


def tower_folder(name: str) -> Path:
    """The folder of an open_clip name: `local-dir:FOLDER`, or `hf-hub:OWNER/NAME`, from the hub's cache or fetched.

    Raises:
        UsageError: another name, or one that is not there and may not be fetched.
        TuDiffuseError: see `hub_pull.pull`.
    """
    kind, _, rest = name.partition(":")
    if kind not in ("local-dir", "hf-hub") or (kind == "hf-hub" and hub_name(rest) is None):
        raise UsageError(f"--clip {name!r} is no name of a tower; give local-dir:FOLDER or hf-hub:OWNER/NAME.")
    folder = pulled(Path(rest)) if kind == "hf-hub" else Path(rest)
    if not (folder / "open_clip_config.json").is_file():
        raise UsageError(f"--clip {name!r} has no open_clip_config.json; name a folder that holds it beside open_clip_model.safetensors.")
    return folder


def use_clip(model: ModelFolder, tower: Path, out: Path, part: str = "text_encoder", link: bool = False) -> ModelFolder:
    """Write a model folder whose CLIP text tower is one in open_clip's layout, under the names that transformers and diffusers know.

    The tower may have more layers than the one whose place it takes: SD 2.x leaves out the last of OpenCLIP ViT-H. The tokenizer stays.

    Args:
        model: any.
        tower: folder with `open_clip_config.json` and `open_clip_model.safetensors`.
        out: the new model folder.
        part: which tower it replaces, "text_encoder" or "text_encoder_2".
        link: hard links instead of copies of files that stay the same.

    Returns:
        The new model.

    Raises:
        UsageError: the model has no such tower, or `out` exists.
        ModelError: no plain CLIP tower, or of other widths than the one it replaces.
        UnsafeError: its weights are pickles.
        OutputError: `out` could not be written.
    """
    kind = model.parts.get(part, "")
    if not kind.startswith("CLIPText"):
        raise UsageError(f"{model.name!r} has no CLIP text tower {part!r}; name one that it has with --part.")
    own = CLIPTextConfig.from_dict(model.configs[part])
    config = open_clip_text_config(read_json(tower / "open_clip_config.json"))
    projection = kind == "CLIPTextModelWithProjection"
    wanted, came = ((one.hidden_size, one.projection_dim if projection else None, one.vocab_size) for one in (own, config))
    if came != wanted or config.num_hidden_layers < own.num_hidden_layers or config.max_position_embeddings < own.max_position_embeddings:
        raise ModelError(
            f"the open_clip tower has width, projection and vocabulary {came} and {config.num_hidden_layers} layers of "
            f"{config.max_position_embeddings} tokens; {part} of {model.name!r} has {wanted} and {own.num_hidden_layers} of "
            f"{own.max_position_embeddings}; take the tower that the model was trained with."
        )
    config = replace(config, num_hidden_layers=own.num_hidden_layers, max_position_embeddings=own.max_position_embeddings)
    state = open_clip_state_dict(read_weights(tower, "open_clip_model"))
    positions = "text_model.embeddings.position_embedding.weight"
    state[positions] = state[positions][: own.max_position_embeddings].clone()
    kept = without_storage(lambda: CLIPText(config, projection)).state_dict().keys()
    if not kept <= state.keys():
        raise ModelError(f"the open_clip file has no weights for {min(kept - state.keys())}; fetch it again.")
    copy = linked if link else shutil.copyfile
    with staged_folder(out) as staged:
        _copy_model(model, staged, copy, left_out=part)
        (staged / part).mkdir()
        save_file({name: state[name] for name in kept}, staged / part / "model.safetensors", metadata={"format": "pt"})
        _write_json(staged / part / "config.json", {**model.configs[part], **asdict(config)})
    return open_folder(out)


def _copy_model(model: ModelFolder, staged: Path, copy: Callable[[Path, Path], object], left_out: str = "") -> None:
    """Copy what of a model is loaded, but for one part; `model_index.json` is written anew, since a link must not be written to."""
    unets = {base.name for entry in model.experts for base in chain(model.path / entry.subfolder)}
    copy_folder(model.path, staged, copy)
    for name in sorted({*model.parts, *unets} - {left_out}):
        copy_folder(model.path / name, staged / name, copy)
    (staged / "model_index.json").unlink()
    _write_json(staged / "model_index.json", _index(model))


def _index(model: ModelFolder) -> dict[str, object]:
    """`model_index.json` of the parts that are loaded."""
    old = read_json(model.path / "model_index.json")
    return {name: value for name, value in old.items() if not isinstance(value, list) or name in model.parts or value == [None, None]}


def _widths(model: ModelFolder, encoder: T5Config) -> dict[str, int]:
    """Of the tokens of all towers together, which have as many heads as they have."""
    towers = [CLIPTextConfig.from_dict(model.configs[part]) for part in TEXT_PARTS[model.family] if part.startswith("text_encoder")]
    width, heads = (sum(getattr(tower, name) for tower in towers) for name in ("hidden_size", "num_attention_heads"))
    return {"clip_width": width, "t5_width": encoder.d_model, "heads": math.gcd(width, heads)}


def _t5_names(model: ModelFolder) -> tuple[str, str]:
    """The components that T5 and its tokenizer become."""
    return ("text_encoder_2", "tokenizer_2") if model.family == "sd" else ("text_encoder_3", "tokenizer_3")


def _index_with_t5(model: ModelFolder) -> dict[str, object]:
    """The same under our own pipeline's name, since diffusers' has no place for T5."""
    encoder, tokenizer = _t5_names(model)
    added = {
        encoder: ["transformers", "T5EncoderModel"],
        tokenizer: ["transformers", "T5Tokenizer"],
        "conditioner": ["tu_diffuse", "T5Residual"],
    }
    return {**_index(model), "_class_name": "TuDiffusePipeline", **added}


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
