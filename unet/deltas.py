"""Experts that are stored as what differs from another expert, their base; docs/formats.md describes the files.

A folder with `delta.json` is a delta: it names its base, a folder beside it, which may be a delta again. Tensors in `delta.safetensors` replace the
base's, pairs in `pytorch_lora_weights.safetensors` are added to the result, and everything else is the base's own, mapped from the base's file.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..errors import ModelError
from ..model_files import files_sha256, inside, read_json, read_safetensors, read_weights, weight_files
from ..weights import placed
from .lora import read_lora, with_lora

INDEX = "delta.json"
TENSORS = "delta.safetensors"
LORA = "pytorch_lora_weights.safetensors"
VERSION = 1
MAX_CHAIN = 16


@dataclass(frozen=True)
class Delta:
    """The content of a `delta.json`.

    Attributes:
        base: name of the base's folder, beside the delta's own.
        base_sha256: what `expert_sha256` gives for the base, 64 hex digits.
    """

    base: str
    base_sha256: str


class Stored(NamedTuple):
    """A tensor, and the folder it was read from; a tensor that LoRA changed belongs to the LoRA's folder."""

    tensor: Tensor
    origin: Path


def read_delta(folder: Path) -> Delta | None:
    """Read a folder's `delta.json`; None when the folder holds whole weights.

    Raises:
        ModelError: the file is not valid, of an unknown version, or names a base outside the model folder.
    """
    path = folder / INDEX
    if not path.exists():
        return None
    content = read_json(path)
    base, digest, version = content.get("base"), content.get("base_sha256"), content.get("version")
    if isinstance(version, bool) or version != VERSION or content.keys() != {"version", "base", "base_sha256"}:
        raise ModelError(f"{path} is {content!r:.200}; version {VERSION} with base and base_sha256 was wanted.")
    if not isinstance(base, str) or "/" in base or inside(folder.parent, base) == folder:
        raise ModelError(f"{path} names the base {base!r:.200}; the name of another folder beside {folder.name!r} was wanted.")
    if not isinstance(digest, str) or not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise ModelError(f"{path} gives base_sha256 {digest!r:.200}; 64 hex digits were wanted.")
    return Delta(base, digest)


def chain(folder: Path) -> tuple[Path, ...]:
    """The folder, its base, its base's base and so on; the last one holds whole weights and the `config.json` of all.

    Raises:
        ModelError: a base is not there, the bases go round in a circle, there are more than 16, or a delta also holds whole weights.
    """
    folders = [folder]
    while (delta := read_delta(folders[-1])) is not None:
        if list(folders[-1].glob("diffusion_pytorch_model*")):
            raise ModelError(f"{folders[-1]} holds both {INDEX} and whole weights; remove one of them.")
        base = folders[-1].parent / delta.base
        if base in folders:
            raise ModelError(f"The bases of {folder} go round in a circle ({' -> '.join(f.name for f in [*folders, base])}); fetch the model again.")
        if len(folders) == MAX_CHAIN:
            raise ModelError(f"{folder} is a delta of a delta more than {MAX_CHAIN} times over; merge or store it whole.")
        if not base.is_dir():
            raise ModelError(f"{folders[-1]} is a delta of {delta.base!r}, which is not there; fetch the model again.")
        folders.append(base)
    return tuple(folders)


def origin(folder: Path, sha256: str | None) -> tuple[Path, str | None]:
    """The folder whose weights an expert has, and their hash: its own, or where it is a delta that changes nothing, its base's, and so on.

    Args:
        folder: of the expert.
        sha256: recorded for it, or None.
    """
    for _ in chain(folder):
        delta = read_delta(folder)
        if delta is None or (folder / TENSORS).exists() or (folder / LORA).exists():
            break
        folder, sha256 = folder.parent / delta.base, delta.base_sha256
    return folder, sha256


def own_files(folder: Path, variant: str | None = None) -> list[Path]:
    """The files that decide an expert's weights beside its base: of a delta its JSON, tensors and LoRA, those that are there; else `weight_files`."""
    if (folder / INDEX).exists():
        return [path for path in (folder / INDEX, folder / TENSORS, folder / LORA) if path.exists()]
    return weight_files(folder, variant=variant)


def expert_sha256(folder: Path, variant: str | None = None) -> str:
    """SHA-256 over `own_files`, 64 hex digits; a delta's pins its base's, which `delta.json` names.

    Raises:
        ModelError, UnsafeError: as `weight_files`.
    """
    return files_sha256(own_files(folder, variant))


def check_hashes(folders: Sequence[Path], sha256: str | None, hash_of: Callable[[Path], str]) -> None:
    """Check an expert and its bases against the hashes that `experts.json` and `delta.json` name.

    Args:
        folders: from `chain`.
        sha256: of the first, or None when nothing names one.
        hash_of: `expert_sha256`, or something that remembers its results.

    Raises:
        ModelError: one of them is not what was named.
    """
    wanted, named_by = sha256, "experts.json"
    for folder in folders:
        if wanted is not None and hash_of(folder) != wanted:
            raise ModelError(f"The weights in {folder} are not the ones that {named_by} names (SHA-256 {wanted[:12]}…); fetch the model again.")
        delta = read_delta(folder)
        wanted, named_by = (None, "") if delta is None else (delta.base_sha256, f"{folder.name}/{INDEX}")


def read_expert(folder: Path, variant: str | None = None) -> dict[str, Stored]:
    """Memory-map an expert's tensors, those of its bases included; nothing is copied but what LoRA changes.

    Raises:
        ModelError: missing or damaged files, or a delta with a tensor that its base does not have in this shape.
        UnsafeError: pickle files only.
    """
    folders = chain(folder)
    whole = folders[-1]
    state = {name: Stored(tensor, whole) for name, tensor in read_weights(whole, variant=variant).items()}
    for own in reversed(folders[:-1]):
        replaced = read_safetensors(own / TENSORS) if (own / TENSORS).exists() else {}
        for name, tensor in replaced.items():
            if name not in state or state[name].tensor.shape != tensor.shape:
                raise ModelError(
                    f"{own / TENSORS} holds {name!r:.200} {tuple(tensor.shape)}, which its base does not have; it belongs to another model."
                )
        state |= {name: Stored(tensor, own) for name, tensor in replaced.items()}
        if (own / LORA).exists():
            changed = with_lora({name: stored.tensor for name, stored in state.items()}, read_lora(own / LORA), own / LORA)
            state |= {name: Stored(tensor, own) for name, tensor in changed.items()}
    return state


def write_delta(folder: Path, base: Path, tensors: Mapping[str, Tensor], base_sha256: str | None = None) -> None:
    """Write a new delta's files; the caller stages the model folder around it.

    Args:
        folder: made here; must not exist.
        base: the base, a folder beside it that is complete.
        tensors: what differs, see `differing`; may be empty.
        base_sha256: `expert_sha256` of the base, where that is known already.

    Raises:
        OSError: a file could not be written.
    """
    folder.mkdir(parents=True)
    content = {"version": VERSION, "base": base.name, "base_sha256": expert_sha256(base) if base_sha256 is None else base_sha256}
    (folder / INDEX).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if tensors:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / TENSORS, metadata={"format": "pt"})


def differing(state: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a state that are not bit for bit those of its base, dtype included: what a delta has to hold."""
    return {name: tensor for name, tensor in state.items() if not _identical(tensor, base[name])}


def _identical(a: Tensor, b: Tensor) -> bool:
    # As bytes: 0.0 and -0.0 are equal as numbers, and NaN is not equal to itself.
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    first, second = (tensor.contiguous().view(-1).view(torch.uint8) for tensor in (a, b))
    return torch.equal(first, second)


class Bases:
    """What the experts of one model share: hashes of bases, taken once, and the tensors that come from bases, placed once for all experts.

    Not for several threads at a time; `ExpertPool` loads one expert at a time.
    """

    def __init__(self, folders: Sequence[Path], dtype: torch.dtype, device: torch.device | str, variant: str | None = None) -> None:
        """Hold nothing yet.

        Args:
            folders: the bases; tensors of other folders are not kept.
            dtype: of floating-point tensors.
            device: where they go, and stay as long as this object lives.
            variant: see `load_weights`.
        """
        self._folders = frozenset(folders)
        self._dtype, self._device, self._variant = dtype, device, variant
        self._hashes: dict[Path, str] = {}
        self._tensors: dict[tuple[Path, str], Tensor] = {}

    def hash_of(self, folder: Path) -> str:
        """`expert_sha256`; remembered for bases."""
        if folder not in self._folders:
            return expert_sha256(folder, self._variant)
        if folder not in self._hashes:
            self._hashes[folder] = expert_sha256(folder, self._variant)
        return self._hashes[folder]

    def place(self, name: str, stored: Stored, device: torch.device | str) -> Tensor:
        """A tensor ready to run: the one copy of it when it comes from a base, else on `device`.

        Raises:
            ModelError: it holds NaN or infinity.
        """
        if stored.origin not in self._folders:
            return placed(name, stored.tensor, stored.origin, self._dtype, device)
        key = (stored.origin, name)
        if key not in self._tensors:
            self._tensors[key] = placed(name, stored.tensor, stored.origin, self._dtype, self._device)
        return self._tensors[key]
