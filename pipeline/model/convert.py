"""Models written anew: as a folder or as a single file, in another number format.

A single file holds less than a folder: what it cannot say has to be what all files of its family have in common. Before one is written it is read in
thought, and refused where the model that comes out would be another.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ...errors import ModelError, OutputError, UsageError
from ...model_files import read_safetensors, read_weights, single_file_layout, within_single_file
from ...schedulers.noise import NoiseSchedule
from ...single_file.documents import documents
from ...single_file.layout import EMA, TEXT_PREFIXES, Layout, layout_of
from ...single_file.writing import metadata, text_tensors, unet_tensors, vae_tensors
from ...text_encoders.clip import CLIPTextConfig, clip_state_dict
from ...text_encoders.clip_vocabulary import clip_merges, clip_words
from ...text_encoders.tokenizer import load_tokenizer
from ...unet.config import UNetConfig
from ...unet.deltas import chain, expert_sha256, read_expert
from ...unet.experts import write_experts
from ...vae.autoencoder import modernise_keys
from ...vae.config import AutoencoderConfig
from ...weights import placed
from ..adapters.adapters import NO_ADAPTERS, Adapters, baked
from ..staging import copy_folder, staged_folder, write_file
from .folder import ModelFolder, open_folder
from .place import DTYPES

_WEIGHTS = "diffusion_pytorch_model"
_BEGIN, _END = "<|startoftext|>", "<|endoftext|>"


def convert(model: ModelFolder, out: Path, dtype: str | None = None, ema: bool = False, adapters: Adapters = NO_ADAPTERS) -> None:
    """Write a model as a single file, where `out` ends in .safetensors, or as a folder in diffusers' layout.

    Args:
        model: a folder or a single file; experts that are stored as deltas are written whole.
        out: must not exist.
        dtype: a name in `place.DTYPES` for all floating-point tensors; None keeps theirs.
        ema: of a single file, its averaged U-Net (`model_ema.`) in place of the other.
        adapters: LoRAs to add for good.

    Raises:
        UsageError: `out` exists, a dtype that is not known, `ema` of a model without such weights, or LoRAs for some only of the experts that share a
            text encoder.
        ModelError: damaged weights, values beyond the range of `dtype`, or a model that a single file cannot hold.
        OutputError: `out` cannot be written.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype!r} is not known; use one of {', '.join(DTYPES)}.")
    inner = within_single_file(model.path)
    average = _average(model) if ema else None
    cast = partial(_cast, dtype=None if dtype is None else DTYPES[dtype])
    read = partial(_read, model, adapters, average)
    if out.suffix == ".safetensors":
        _write_single_file(model, out, cast, read)
    elif inner is not None:
        _unpack(model, out, cast, read)
    else:
        _write_folder(model, out, cast, read)


def unpacked(model: ModelFolder) -> ModelFolder:
    """A model whose files can be copied: itself, or a single file's folder in the user's cache, which is made when it is not there.

    The cache is `tu-diffuse/unpacked` in XDG_CACHE_HOME (`~/.cache`); a folder of it may be removed at any time when no run uses it.

    Raises:
        ModelError: damaged weights.
        OutputError: the folder cannot be written.
    """
    if within_single_file(model.path) is None:
        return model
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tu-diffuse" / "unpacked"
    folder = cache / model.fingerprint[:32] / model.path.parent.stem
    if not folder.is_dir():
        try:
            convert(model, folder)
        except UsageError:  # another process was quicker
            if not folder.is_dir():
                raise
    return open_folder(folder)


Cast = Callable[[Mapping[str, Tensor], Path], dict[str, Tensor]]
"""(tensors, where they come from) to tensors that may be written."""


def _cast(state: Mapping[str, Tensor], folder: Path, dtype: torch.dtype | None) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        new = placed(name, tensor, folder, dtype, "cpu").contiguous()
        if new.dtype != tensor.dtype and new.numel() and not all(math.isfinite(float(extreme)) for extreme in torch.aminmax(new)):
            raise ModelError(f"{name} of {folder} holds values beyond the range of {str(dtype).removeprefix('torch.')}; use bfloat16 or float32.")
        # Parts of one tensor in a single file become tensors of their own.
        tensors[name] = new if new.untyped_storage().nbytes() == new.numel() * new.element_size() else new.clone()
    return tensors


Read = Callable[[str], dict[str, Tensor]]
"""Component or expert's subfolder to its tensors, with what is added to them."""


def _read(model: ModelFolder, adapters: Adapters, average: Mapping[str, Tensor] | None, name: str) -> dict[str, Tensor]:
    if name in ("unet", *(entry.subfolder for entry in model.experts)):
        stored = {key: one.tensor for key, one in read_expert(model.path / name, model.variant).items()} if average is None else average
        return baked(adapters, "unet", stored, [entry.name for entry in model.experts if entry.subfolder == name])
    readers = [entry.name for entry in model.experts if entry.text is None or name in entry.text.parts.values()]
    return baked(adapters, name, read_weights(model.path / name, _stem(name), model.variant), readers)


def _average(model: ModelFolder) -> dict[str, Tensor]:
    """The averaged U-Net of a single file, under the folder's names. In the file its names have lost their dots."""
    inner = within_single_file(model.path)
    stored = {} if inner is None else read_safetensors(inner.file)
    pieces = {} if inner is None else single_file_layout(inner.file).components["unet"]
    flat = {name: EMA + piece.name.removeprefix("model.").replace(".", "") for name, piece in pieces.items()}
    if not flat or not all(other in stored for other in flat.values()):
        raise UsageError(f"{model.name!r} holds no averaged weights ({EMA}…); leave out --ema.")
    return {name: stored[other].reshape(pieces[name].shape) for name, other in flat.items()}


def _unpack(model: ModelFolder, out: Path, cast: Cast, read: Read) -> None:
    inner = within_single_file(model.path)
    assert inner is not None
    layout = single_file_layout(inner.file)
    merges = clip_merges()
    with staged_folder(out) as staged:
        for name, content in documents(layout, inner.prediction).items():
            _write_json(staged / name, content)
        for part in layout.components:
            save_file(cast(read(part), model.path / part), staged / part / f"{_stem(part)}.safetensors", metadata={"format": "pt"})
        for folder in staged.glob("tokenizer*"):
            _write_json(folder / "vocab.json", clip_words(merges, _BEGIN, _END))
            lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
            (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")


def _write_folder(model: ModelFolder, out: Path, cast: Cast, read: Read) -> None:
    with staged_folder(out) as staged:
        copy_folder(model.path, staged, shutil.copyfile)
        for part in model.parts:
            source, target = model.path / part, staged / part
            copy_folder(source, target, _copy_document)
            if part == "vae" or part == "conditioner" or part.startswith("text_encoder"):
                save_file(cast(read(part), source), target / f"{_stem(part)}.safetensors", {"format": "pt"})
        for subfolder in dict.fromkeys(["unet", *(entry.subfolder for entry in model.experts)]):
            source, target = model.path / subfolder, staged / subfolder
            target.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(chain(source)[-1] / "config.json", target / "config.json")
            save_file(cast(read(subfolder), source), target / f"{_WEIGHTS}.safetensors", metadata={"format": "pt"})
        if (model.path / "experts.json").exists():
            write_experts(staged, [replace(entry, sha256=expert_sha256(staged / entry.subfolder)) for entry in model.experts])


def _copy_document(source: Path, target: Path) -> None:
    """Copy what is not about weight files."""
    if source.suffix != ".safetensors" and ".safetensors.index" not in source.name and source.name != "delta.json":
        shutil.copyfile(source, target)


def _write_single_file(model: ModelFolder, out: Path, cast: Cast, read: Read) -> None:
    if out.exists():
        raise UsageError(f"--out {out.name!r} exists and is never overwritten; give another name, or remove it first.")
    family = model.family if model.family != "sd" else "sd2" if model.configs["text_encoder"].get("hidden_act") == "gelu" else "sd1"
    expert, *others = model.experts
    if family not in TEXT_PREFIXES or others or model.parts["vae"] != "AutoencoderKL":
        raise ModelError(f"{model.name!r} cannot be a single file: these hold SD 1, SD 2, SDXL or its refiner with one U-Net; write a folder.")
    path = model.path
    try:
        tensors = unet_tensors(read(expert.subfolder), model.configs[expert.subfolder])
        tensors |= vae_tensors(modernise_keys(read("vae")), model.configs["vae"])
        for part in TEXT_PREFIXES[family]:
            tensors |= text_tensors(clip_state_dict(read(part)), model.configs[part], family, part)
    except KeyError as error:
        raise ModelError(f"{model.name!r} has the tensor {error}, for which single files have no name; write a folder.") from None
    if model.configs["scheduler"].get("rescale_betas_zero_snr"):
        tensors |= {name: torch.zeros(()) for name in ("v_pred", "ztsnr")}
    about = metadata(family, model.noise.prediction_type, model.defaults.width, model.name)
    header = {name: {"shape": list(tensor.shape)} for name, tensor in tensors.items()}
    try:
        _check_same(model, layout_of(out.name, header, about))
    except ModelError as error:
        raise ModelError(f"{model.name!r} cannot be a single file, because it would be read as another model: {error} Write a folder.") from None
    written = cast(tensors, path)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_file(out, lambda unfinished: save_file(written, unfinished, metadata=about))
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            out.with_name(f".{out.name}.partial").unlink()
        raise OutputError(f"--out {out.name!r} cannot be written ({error}); free space or give another place.") from error


def _check_same(model: ModelFolder, layout: Layout) -> None:
    """Check that a single file would be read as the model that it is made from.

    Raises:
        ModelError: it would not.
    """
    prediction = model.noise.prediction_type
    if layout.prediction != prediction:
        raise ModelError(f"it predicts {prediction!r}, which a single file cannot say.")
    files = documents(layout, prediction)
    unet = model.experts[0].subfolder
    zeros = bool(files["model_index.json"].get("force_zeros_for_empty_prompt", False))
    pairs = {
        "U-Net": (_unet(model.configs[unet]), _unet(layout.configs["unet"])),
        "autoencoder": (_vae(model.configs["vae"]), _vae(layout.configs["vae"])),
        "model_index.json": ({"force_zeros_for_empty_prompt": model.zero_negative}, {"force_zeros_for_empty_prompt": zeros}),
    }
    pairs |= {part: (_text(model.configs[part], model.parts[part]), _text(config, config["architectures"][0])) for part, config in _texts(layout)}
    for what, (ours, theirs) in pairs.items():
        if ours != theirs:
            apart = [f"{key} = {value!r}" for key, value in ours.items() if value != theirs[key]]
            raise ModelError(f"the {what} has {', '.join(apart)}, which a single file cannot say.")
    ideal = NoiseSchedule.from_config(files["scheduler/scheduler_config.json"])
    if len(ideal.sigmas) != len(model.noise.sigmas) or not torch.allclose(ideal.sigmas, model.noise.sigmas, rtol=1e-6, atol=0):
        raise ModelError("it was trained on another noise schedule than its family, which a single file cannot say.")
    merges = clip_merges()
    for part, config in _texts(layout):
        tokenizer = load_tokenizer(model.path / part.replace("text_encoder", "tokenizer"))
        pad = 0 if config["hidden_act"] == "gelu" else tokenizer.suffix[0]
        same = tokenizer.backend.get_vocab() == clip_words(merges, _BEGIN, _END)
        if not same or tokenizer.pad_id != pad or tokenizer.length != config["max_position_embeddings"]:
            raise ModelError(f"the tokenizer of its {part} is not CLIP's own, which a single file cannot hold.")


def _texts(layout: Layout) -> list[tuple[str, Mapping[str, Any]]]:
    return [(part, config) for part, config in layout.configs.items() if part.startswith("text_encoder")]


def _unet(config: Mapping[str, Any]) -> dict[str, Any]:
    """What decides a U-Net's result; levels without attention have no heads and depths, but the last one's are the middle block's."""
    values = asdict(UNetConfig.from_dict(config))
    for name in ("attention_head_dim", "transformer_layers_per_block"):
        of_levels = zip(values[name], values["down_block_types"], strict=True)
        last = len(values["down_block_types"]) - 1
        values[name] = [value if kind != "DownBlock2D" or level == last else None for level, (value, kind) in enumerate(of_levels)]
    return {name: value for name, value in values.items() if name not in ("sample_size", "dropout", "upcast_attention")}


def _vae(config: Mapping[str, Any]) -> dict[str, Any]:
    values = asdict(AutoencoderConfig.from_dict(config))
    return {name: value for name, value in values.items() if name not in ("sample_size", "force_upcast")}


def _text(config: Mapping[str, Any], kind: str) -> dict[str, Any]:
    values = asdict(CLIPTextConfig.from_dict(config))
    unused = {"eos_token_id"} | ({"projection_dim"} if kind == "CLIPTextModel" else set())
    return {"class": kind} | {name: value for name, value in values.items() if name not in unused}


def _stem(part: str) -> str:
    return "model" if part.startswith("text_encoder") else _WEIGHTS


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
