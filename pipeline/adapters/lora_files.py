"""LoRA files in the layouts that people bring, read into pairs; which weights the pairs change is for `adapters.py` to find. See docs/loras.md."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...errors import ModelError, UnsafeError, UsageError
from ...model_files import files_sha256, is_pickle_name, read_header, read_json, read_safetensors
from ...strict_json import parse_json
from ...unet.lora import METADATA, LowRank
from ...weights import check_finite

FILE_NAMES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
"""What diffusers and peft call the file in a folder."""
PEFT_CONFIG = "adapter_config.json"

_KEY = re.compile(
    r"(?P<module>[A-Za-z0-9_.]+?)"
    r"(?:\.(?:lora|lora_linear_layer)\.(?P<new>down|up)\.weight"  # diffusers
    r"|_lora\.(?P<old>down|up)\.weight"  # its attention processors of 2023
    r"|\.lora_(?P<kohya>down|up)\.weight"
    r"|\.lora_(?P<peft>[AB])(?:\.\w+)?\.weight"
    r"|\.(?P<alpha>alpha))"
)
_PEFT_PREFIX, _PROCESSOR = "base_model.model.", ".processor."
_KOHYA = re.compile(r"(lora_unet|lora_te[123]?)_(.+)")
_KOHYA_PARTS = {
    "lora_unet": "unet",
    "lora_te": "text_encoder",
    "lora_te1": "text_encoder",
    "lora_te2": "text_encoder_2",
    "lora_te3": "t5",
}
_PARTS = ("unet", "text_encoder", "text_encoder_2", "text_encoder_3", "conditioner")
_OTHER_KINDS = {
    "DoRA": re.compile(r"dora_scale|lora_magnitude_vector"),
    "LoHa": re.compile(r"hada_"),
    "LoKr": re.compile(r"lokr_"),
    "a Tucker-decomposed LoCon": re.compile(r"lora_mid"),
    "OFT": re.compile(r"oft_|boft_"),
    "(IA)³": re.compile(r"\.on_input$|ia3_"),
    "GLoRA": re.compile(r"\.(a1|a2|b1|b2)\.weight$"),
    "a LoRA with biases": re.compile(r"lora_B(\.\w+)?\.bias$|lora_up\.bias$"),
    "a file of whole differences": re.compile(r"\.diff(_b)?$|\.w_norm$|\.b_norm$"),
    "a LoRA with embeddings": re.compile(r"^bundle_emb|lora_embedding_"),
}


class LoraKey(NamedTuple):
    """Where a pair belongs, as the file says it.

    Attributes:
        part: "unet", "text_encoder", "text_encoder_2", "text_encoder_3" or "conditioner"; "t5", whichever of them that is, in the names of kohya's
            programs; None where the file names none.
        module: with dots, or as kohya's programs write it, with underscores for dots.
    """

    part: str | None
    module: str


@dataclass(frozen=True, eq=False)
class LoraFile:
    """A LoRA file.

    Attributes:
        name: of the file, without its folder.
        sha256: of the file, and of the `adapter_config.json` that was read with it; 64 hex digits.
        pairs: what is added to which weight, at weight 1.
    """

    name: str
    sha256: str
    pairs: Mapping[LoraKey, LowRank]


def find_lora(path: Path) -> Path:
    """The file at a path: itself, or in a folder what diffusers or peft wrote there.

    Raises:
        UsageError: there is none.
        UnsafeError: it is a pickle.
    """
    if path.is_dir():
        found = next((path / name for name in FILE_NAMES if (path / name).is_file()), None)
        if found is None:
            raise UsageError(f"the folder {path.name!r} holds no {' or '.join(FILE_NAMES)}; name the LoRA's file.")
        return found
    return adapter_file(path, "LoRA")


def adapter_file(path: Path, what: str) -> Path:
    """A path that is a file and no pickle.

    Raises:
        UsageError: there is no such file.
        UnsafeError: it is a pickle.
    """
    if not path.is_file():
        raise UsageError(f"the {what} {path.name!r} is not there; name a .safetensors file.")
    if is_pickle_name(path.name):
        raise UnsafeError(f"the {what} {path.name!r} is a pickle file, which can run code when loaded; convert it to safetensors first.")
    return path


def lora_sha256(path: Path) -> str:
    """What `LoraFile.sha256` is for a file."""
    config = path.with_name(PEFT_CONFIG)
    return files_sha256([path, config] if config.is_file() and _by_peft(path) else [path])


def _by_peft(path: Path) -> bool:
    return any(name.startswith(_PEFT_PREFIX) for name in read_header(path))


def read_lora_file(path: Path) -> LoraFile:
    """Read a LoRA file of diffusers, peft or kohya's programs.

    A pair's scale is alpha / rank, or alpha / √rank where the settings say rsLoRA (Kalajdzievski 2023, arXiv 2312.03732). Alpha is what the file
    holds for the module, else what the settings of diffusers (in the header) or peft (`adapter_config.json`) say, else the rank.

    Args:
        path: from `find_lora`.

    Raises:
        ModelError: not a safetensors file; no LoRA, or another kind than plain LoRA; half a pair, ranks that do not fit, NaN, no effect.
    """
    tensors = read_safetensors(path)
    found: dict[LoraKey, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        key, end = _key(path, name)
        found.setdefault(key, {})[end] = checked_numbers(path, name, tensor)
    if not found:
        raise ModelError(f"{path.name} holds no tensors; it is no LoRA, save it again.")
    settings = _settings(path)
    pairs = {key: _pair(path, key, parts, settings.get(key.part, {})) for key, parts in found.items()}
    if not any(pair.scale and bool(pair.up.any()) and bool(pair.down.any()) for pair in pairs.values()):
        raise ModelError(f"{path.name} changes nothing: all its products are zero; it was saved before it was trained.")
    return LoraFile(path.name, lora_sha256(path), pairs)


def _key(path: Path, name: str) -> tuple[LoraKey, str]:
    """Where a tensor belongs, and whether it is "down", "up" or "alpha"."""
    for kind, pattern in _OTHER_KINDS.items():
        if pattern.search(name):
            raise ModelError(f"{path.name} is {kind} (it holds {name!r:.200}), which is not covered; merge it into the model with what made it.")
    match = _KEY.fullmatch(name.removeprefix(_PEFT_PREFIX))
    if match is None:
        raise ModelError(f"{path.name} holds a tensor {name!r:.200}, which is no part of a LoRA; name a LoRA file with --lora.")
    end = match["new"] or match["old"] or match["kohya"] or match["alpha"] or {"A": "down", "B": "up"}[match["peft"]]
    module = match["module"]
    kohya = _KOHYA.fullmatch(module)
    if kohya is not None:
        return LoraKey(_KOHYA_PARTS[kohya[1]], kohya[2]), end
    part, _, rest = module.partition(".")
    if part not in _PARTS:
        part, rest = None, module
    if match["old"] is not None:
        rest = rest.replace(_PROCESSOR, ".") + (".0" if rest.endswith("to_out") else "")
    return LoraKey(part, rest), end


def checked_numbers(path: Path, name: str, tensor: Tensor) -> Tensor:
    """A tensor of a file, if it holds floating-point numbers that are finite; an alpha may be a whole number.

    Raises:
        ModelError: it does not.
    """
    if not tensor.is_floating_point() or tensor.numel() == 0:
        if name.endswith(".alpha") and tensor.numel():
            return tensor
        raise ModelError(f"{path.name} holds {name!r:.200} as {tensor.dtype} {tuple(tensor.shape)}; floating-point numbers were wanted.")
    check_finite(name, tensor, path)
    return tensor


def _pair(path: Path, key: LoraKey, parts: Mapping[str, Tensor], settings: Mapping[str, Any]) -> LowRank:
    if not {"down", "up"} <= parts.keys():
        raise ModelError(f"{path.name} holds only {', '.join(sorted(parts))} for {key.module}; both down and up were wanted, save it again.")
    down, up = parts["down"], parts["up"]
    if down.ndim < 2 or up.ndim < 2 or down.shape[0] != up.flatten(1).shape[1]:
        raise ModelError(f"{path.name} holds down {tuple(down.shape)} and up {tuple(up.shape)} for {key.module}, which make no product.")
    rank = down.shape[0]
    if "alpha" in parts and parts["alpha"].numel() != 1:
        raise ModelError(f"{path.name} holds an alpha for {key.module} of {parts['alpha'].numel()} numbers; one was wanted, save it again.")
    alpha = float(parts["alpha"]) if "alpha" in parts else _alpha(path, key.module, settings)
    root = math.sqrt(rank) if settings.get("use_rslora") and "alpha" not in parts else rank
    return LowRank(down, up, 1.0 if alpha is None else alpha / root)


def _alpha(path: Path, module: str, settings: Mapping[str, Any]) -> float | None:
    """What the settings say of a module; a pattern is the end of its name, as peft writes it, with ^ before a whole name."""
    alpha = settings.get("lora_alpha")
    patterns = settings.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise ModelError(f"{path.name} has alpha_pattern = {patterns!r:.200} in its settings; names with numbers were wanted, save it again.")
    for pattern, value in patterns.items():
        whole = str(pattern).removeprefix("^")
        if module == whole or (not str(pattern).startswith("^") and module.endswith(f".{whole}")):
            alpha = value
            break
    if alpha is None:
        return None
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise ModelError(f"{path.name} has the alpha {alpha!r:.200} in its settings; a finite number was wanted, save it again.")
    return float(alpha)


def _settings(path: Path) -> dict[str | None, dict[str, Any]]:
    """Settings by part, from diffusers' header, or for None and every part from peft's file."""
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
        written = parse_json(header.get(METADATA, "{}").encode())
        split = [(*name.partition(".")[::2], value) for name, value in written.items()]
    except (SafetensorError, OSError, ValueError, AttributeError, RecursionError) as error:
        raise ModelError(f"{path.name} has a header whose {METADATA} cannot be read ({error}); save it again.") from error
    settings: dict[str | None, dict[str, Any]] = {}
    for part, name, value in split:
        settings.setdefault(part, {})[name] = value
    if _by_peft(path):
        if not path.with_name(PEFT_CONFIG).is_file():
            raise ModelError(f"{path.name} has no {PEFT_CONFIG} beside it, which holds its alpha; take the whole folder that peft wrote.")
        own = read_json(path.with_name(PEFT_CONFIG))
        if own.get("peft_type", "LORA") != "LORA":
            raise ModelError(f"{path.name} is of the type {own['peft_type']!r:.100}, which is not covered; LORA was wanted.")
        settings = dict.fromkeys((None, *_PARTS), own)
    for own in settings.values():
        for name in ("use_dora", "lora_bias"):
            if own.get(name):
                raise ModelError(f"{path.name} is a LoRA with {name}, which is not covered; merge it into the model with what made it.")
    return settings
