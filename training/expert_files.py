"""Writing a model folder with other experts than the one it is made from: staged beside its place, synced, and given its name in one step."""

import os
import shutil
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..errors import OutputError, UsageError
from ..schedulers.noise import NoiseSchedule
from ..unet.deltas import LORA, TENSORS, chain, check_hashes, expert_sha256, read_delta, read_expert, write_delta
from ..unet.experts import ExpertEntry, write_experts
from ..unet.lora import read_lora, with_lora
from ..weights import read_json

_COPIED = (".json", ".txt", ".model", ".safetensors", ".md")
WHOLE = "diffusion_pytorch_model.safetensors"


class ModelFiles(Protocol):
    """What is needed of a model folder; `pipeline.folder.ModelFolder` is one."""

    @property
    def path(self) -> Path:
        """The folder."""
        ...

    @property
    def name(self) -> str:
        """What messages call it."""
        ...

    @property
    def configs(self) -> Mapping[str, Mapping[str, Any]]:
        """Component or expert's subfolder -> its JSON config."""
        ...

    @property
    def experts(self) -> tuple[ExpertEntry, ...]:
        """From low to high noise."""
        ...

    @property
    def noise(self) -> NoiseSchedule:
        """The training schedule."""
        ...


@dataclass(frozen=True)
class Kept:
    """Weights as an expert's folder stores them, bases included."""

    folder: Path


@dataclass(frozen=True, eq=False)
class OnBase:
    """A delta: tensors that replace those of the base, and perhaps a LoRA file that is added to the result."""

    base: Path
    tensors: Mapping[str, Tensor]
    lora: Path | None = None


@dataclass(frozen=True, eq=False)
class Whole:
    """All tensors, with the config.json of an expert's folder."""

    folder: Path
    tensors: Mapping[str, Tensor]


Weights = Kept | OnBase | Whole


@dataclass(frozen=True, eq=False)
class Draft:
    """An expert to be written; `entry.sha256` is filled in then, and `entry.subfolder` is where it goes if nothing else lies there."""

    entry: ExpertEntry
    weights: Weights


def write_model(model: ModelFiles, drafts: Sequence[Draft], out: Path, link: bool = False) -> tuple[ExpertEntry, ...]:
    """Write a model folder: the parts of `model`, and experts.

    `unet/`, which every model folder has, holds the weights of some expert or base; where none of them lies there, the expert of the highest noise
    does. One expert that owns everything makes an ordinary folder without `experts.json`.

    Args:
        model: gives all parts but the U-Nets.
        drafts: the experts, in any order.
        out: the new folder; must not exist.
        link: hard links instead of copies of files that stay the same.

    Returns:
        The experts as written, from low to high noise.

    Raises:
        UsageError: `out` exists.
        OutputError: a file could not be written.
        ModelError: the intervals leave a gap or overlap.
    """
    ordered = sorted(drafts, key=lambda draft: draft.entry.sigma_min)
    first = ordered[0].entry
    plain = len(ordered) == 1 and first.guidance is None
    highest = ordered[-1]
    if plain or not any(model.path / "unet" in _sources(draft.weights) for draft in ordered):
        ordered[-1] = replace(highest, entry=replace(highest.entry, subfolder="unet"), weights=_stand_alone(highest.weights))
    with staged_folder(out) as staged:
        copy = _linked if link else shutil.copyfile
        copy_parts(model.path, staged, copy)
        store = _Store(staged, ordered, copy)
        entries: list[ExpertEntry] = []
        for draft in ordered:
            folder = store.write(draft)
            entries.append(replace(draft.entry, subfolder=folder.name, sha256=expert_sha256(folder)))
        if not plain:
            write_experts(staged, entries)
    return tuple(entries)


@contextmanager
def staged_folder(out: Path) -> Generator[Path]:
    """A new folder to be filled, beside `out`; on success its files are synced and it takes that name, else it is removed.

    Raises:
        UsageError: `out` exists.
        OutputError: it could not be written.
    """
    if os.path.lexists(out):
        raise UsageError(f"--out {out.name!r} exists and is never overwritten; give another name, or remove it first.")
    staged = out.with_name(f".{out.name}.{os.getpid()}.staged")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        staged.mkdir()
        yield staged
        for path in [*sorted(staged.rglob("*")), staged]:
            _sync(path)
        if os.path.lexists(out):
            raise UsageError(f"--out {out.name!r} was made by another program meanwhile and is not overwritten; give another name.")
        staged.rename(out)
        _sync(out.parent)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"--out {out.name!r} cannot be written ({error}); free space or give another place.") from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def copy_parts(source: Path, target: Path, copy: Callable[[Path, Path], object] = shutil.copyfile) -> None:
    """Copy a model folder without its U-Nets: files of its own, and the folders that `model_index.json` names."""
    parts = [name for name, value in read_json(source / "model_index.json").items() if isinstance(value, list) and name != "unet"]
    for folder in [source, *(source / part for part in parts if (source / part).is_dir())]:
        copy_folder(folder, target / folder.relative_to(source), copy)
    (target / "experts.json").unlink(missing_ok=True)


def copy_folder(source: Path, target: Path, copy: Callable[[Path, Path], object] = shutil.copyfile) -> None:
    """Copy the files of a folder that a model is made of, not its subfolders."""
    target.mkdir(exist_ok=True)
    for path in sorted(source.iterdir()):
        if path.is_file() and (path.suffix in _COPIED or path.name.startswith("LICENSE")):
            copy(path, target / path.name)


def verified(model: ModelFiles) -> None:
    """Check every expert and base against its recorded hash, so that nothing is built on damaged weights.

    Raises:
        ModelError: one of them is not what was recorded.
    """
    hashes: dict[Path, str] = {}

    def hash_of(folder: Path) -> str:
        if folder not in hashes:
            hashes[folder] = expert_sha256(folder)
        return hashes[folder]

    for entry in model.experts:
        check_hashes(chain(model.path / entry.subfolder), entry.sha256, hash_of)


def state_of(weights: Weights) -> Mapping[str, Tensor]:
    """All tensors of an expert."""
    match weights:
        case Kept(folder):
            return {name: stored.tensor for name, stored in read_expert(folder).items()}
        case OnBase(base, tensors, lora):
            state = {**state_of(Kept(base)), **tensors}
            return state if lora is None else state | with_lora(state, read_lora(lora), lora)
        case Whole(_, tensors):
            return tensors


def _stand_alone(weights: Weights) -> Weights:
    """The same weights without a base."""
    match weights:
        case OnBase(base):
            return Whole(chain(base)[-1], state_of(weights))
        case Kept(folder) if len(chain(folder)) > 1:
            return Whole(chain(folder)[-1], state_of(weights))
        case _:
            return weights


def _sources(weights: Weights) -> tuple[Path, ...]:
    """The folders that will be copied for these weights."""
    match weights:
        case Kept(folder) | OnBase(folder):
            return chain(folder)
        case Whole():
            return ()


class _Store:
    """The experts' folders of a model folder that is being written, all beside each other, each source copied once."""

    def __init__(self, staged: Path, drafts: Sequence[Draft], copy: Callable[[Path, Path], object]) -> None:
        """Take the folder, the drafts that will be written, whose names are kept free, and how files are copied."""
        self._staged, self._copy = staged, copy
        self._wanted = {draft.weights.folder: draft.entry.subfolder for draft in drafts if isinstance(draft.weights, Kept)}
        self._reserved = {draft.entry.subfolder for draft in drafts}
        self._copies: dict[Path, Path] = {}

    def write(self, draft: Draft) -> Path:
        """Write an expert's weights and give their folder."""
        folder = self._staged / draft.entry.subfolder
        match draft.weights:
            case Kept(source):
                return self._copied(source)
            case OnBase(base, tensors, lora):
                write_delta(folder, self._copied(base), tensors)
                if lora is not None:
                    shutil.copyfile(lora, folder / LORA)
            case Whole(source, tensors):
                folder.mkdir()
                self._copy(source / "config.json", folder / "config.json")
                save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WHOLE, metadata={"format": "pt"})
        return folder

    def _copied(self, source: Path) -> Path:
        if source not in self._copies:
            delta = read_delta(source)
            base = None if delta is None else self._copied(source.parent / delta.base)
            folder = self._copies[source] = self._staged / (self._wanted[source] if source in self._wanted else self._free(source.name))
            if base is None:
                copy_folder(source, folder, self._copy)
            else:
                write_delta(folder, base, {})  # its base may have another name here
                for name in (TENSORS, LORA):
                    if (source / name).exists():
                        self._copy(source / name, folder / name)
        return self._copies[source]

    def _free(self, name: str) -> str:
        names = (name if number == 1 else f"{name}_{number}" for number in count(1))
        return next(free for free in names if free not in self._reserved and not (self._staged / free).exists())


def _linked(source: Path, target: Path) -> None:
    os.link(os.path.realpath(source), target)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
