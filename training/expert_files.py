"""Writing a model folder with other experts than the one it is made from."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from ..model_files import read_json, read_weights
from ..pipeline.model.folder import TEXT_PARTS, ModelFolder
from ..pipeline.staging import copy_folder, linked, staged_folder
from ..text_encoders.clip import clip_state_dict
from ..text_encoders.t5 import t5_state_dict
from ..unet.deltas import LORA, TENSORS, chain, check_hashes, differing, expert_sha256, read_delta, read_expert, write_delta
from ..unet.experts import ExpertEntry, write_experts
from ..unet.lora import read_lora, with_lora
from .terminal_snr import write_scheduler

WHOLE = "diffusion_pytorch_model.safetensors"
_CONVERTED: Mapping[str, tuple[Callable[[Mapping[str, Tensor]], dict[str, Tensor]], str]] = {
    "CLIPTextModel": (clip_state_dict, "model"),
    "CLIPTextModelWithProjection": (clip_state_dict, "model"),
    "T5EncoderModel": (t5_state_dict, "model"),
}


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
    """All tensors, with the config.json of an expert's folder or its bases."""

    folder: Path
    tensors: Mapping[str, Tensor]


Weights = Kept | OnBase | Whole


@dataclass(frozen=True, eq=False)
class Component:
    """A part of another model folder that is added: its folder, and its (library, class) in `model_index.json`."""

    folder: Path
    kind: tuple[str, str]


@dataclass(frozen=True, eq=False)
class Draft:
    """An expert to be written; `entry.sha256` is filled in then, and `entry.subfolder` is where it goes if nothing else lies there."""

    entry: ExpertEntry
    weights: Weights


def write_model(
    model: ModelFolder,
    drafts: Sequence[Draft],
    out: Path,
    link: bool = False,
    added: Mapping[str, Component] | None = None,
    replaced: Mapping[str, Mapping[str, Tensor]] | None = None,
    scheduler: Mapping[str, Any] | None = None,
) -> tuple[ExpertEntry, ...]:
    """Write a model folder: the parts of `model`, and experts.

    `unet/`, which every model folder has, holds the weights of some expert or base; where none of them lies there, the expert of the highest noise
    does. One expert that owns everything makes an ordinary folder without `experts.json`.

    Args:
        model: gives all parts but the U-Nets.
        drafts: the experts, in any order.
        out: the new folder; must not exist.
        link: hard links instead of copies of files that stay the same.
        added: components that experts read prompts with and `model` does not have, by name.
        replaced: new weights of text encoders and the conditioner, by component, under the names of our networks.
        scheduler: config of another noise schedule than the one in `model`'s folder.

    Returns:
        The experts as written, from low to high noise.

    Raises:
        UsageError: `out` exists.
        OutputError: a file could not be written.
        ModelError: the intervals leave a gap or overlap.
    """
    unet = model.path / "unet"
    ordered = sorted((_placed(draft, unet) for draft in drafts), key=lambda draft: draft.entry.sigma_min)
    first, highest = ordered[0].entry, ordered[-1]
    plain = len(ordered) == 1 and first.guidance is None and first.text is None
    if plain or not any(unet in _sources(draft.weights) for draft in ordered):
        ordered[-1] = _at(replace(highest, weights=_stand_alone(highest.weights)), "unet")
    # Text encoders that only experts had which are gone now.
    gone = components(model.experts) - components([draft.entry for draft in ordered]) - set(TEXT_PARTS[model.family])
    with staged_folder(out) as staged:
        copy = linked if link else shutil.copyfile
        _copy_parts(model.path, staged, copy, {} if added is None else added, gone)
        for component, state in ({} if replaced is None else replaced).items():
            _replace_weights(model.path / component, staged / component, model.parts[component], state)
        if scheduler is not None:
            write_scheduler(staged, scheduler)
        store = _Store(staged, ordered, copy)
        if any(unet in _sources(draft.weights) for draft in ordered):
            store.copied(unet)  # before an equal network of another model, so that it keeps its name
        entries: list[ExpertEntry] = []
        for draft in ordered:
            folder = store.write(draft)
            entries.append(replace(draft.entry, subfolder=folder.name, sha256=store.hash_of(folder)))
        if not plain:
            write_experts(staged, entries)
    return tuple(entries)


def components(entries: Sequence[ExpertEntry]) -> set[str]:
    """Names of the components that experts of their own reading read prompts with."""
    return {component for entry in entries if entry.text is not None for component in entry.text.parts.values()}


def _copy_parts(source: Path, target: Path, copy: Callable[[Path, Path], object], added: Mapping[str, Component], gone: set[str]) -> None:
    """Copy a model folder without its U-Nets: files of its own, and the components that `model_index.json` names, but for those that are gone."""
    index = {name: value for name, value in read_json(source / "model_index.json").items() if name not in gone}
    parts = {name: source / name for name, value in index.items() if isinstance(value, list) and name != "unet" and (source / name).is_dir()}
    copy_folder(source, target, copy)
    (target / "experts.json").unlink(missing_ok=True)
    for name, folder in {**parts, **{name: component.folder for name, component in added.items()}}.items():
        copy_folder(folder, target / name, copy)
    if added or gone:
        (target / "model_index.json").unlink()  # it may be a link
        index |= {name: list(component.kind) for name, component in added.items()}
        (target / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _replace_weights(source: Path, target: Path, kind: str, state: Mapping[str, Tensor]) -> None:
    """Write a component's weights anew, as one file, under the names and in the dtypes of its own files."""
    convert, stem = _CONVERTED.get(kind, (dict, "diffusion_pytorch_model"))
    tensors: dict[str, Tensor] = {}
    for name, tensor in read_weights(source, stem).items():
        ours = next(iter(convert({name: tensor})), None)  # none of what our network has no use for
        tensors[name] = tensor if ours is None else state[ours].detach().cpu().to(tensor.dtype).contiguous().clone()
    for path in [*target.glob("*.safetensors"), *target.glob("*.safetensors.index*.json")]:
        path.unlink()
    save_file(tensors, target / f"{stem}.safetensors", metadata={"format": "pt"})


def weights_for(folder: Path, tensors: Mapping[str, Tensor]) -> Weights:
    """New weights of an expert, stored as it is stored: what differs from its base if it is a delta, else whole."""
    own, *bases = chain(folder)
    return OnBase(bases[0], differing(tensors, state_of(Kept(bases[0])))) if bases else Whole(own, tensors)


def verified(model: ModelFolder) -> None:
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


def kept(model: ModelFolder, entry: ExpertEntry) -> Draft:
    """An expert that stays as it is."""
    return Draft(entry, Kept(model.path / entry.subfolder))


def _placed(draft: Draft, unet: Path) -> Draft:
    """What lies in `unet/` stays there, and all experts lie beside each other."""
    if draft.weights == Kept(unet):
        return _at(draft, "unet")
    return _at(draft, f"unet_{draft.entry.name}") if "/" in draft.entry.subfolder else draft


def _at(draft: Draft, subfolder: str) -> Draft:
    return replace(draft, entry=replace(draft.entry, subfolder=subfolder))


def _stand_alone(weights: Weights) -> Weights:
    """The same weights without a base."""
    match weights:
        case OnBase(base):
            return Whole(base, state_of(weights))
        case Kept(folder) if len(chain(folder)) > 1:
            return Whole(folder, state_of(weights))
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
        self._wholes: dict[tuple[str, bytes], Path] = {}
        self._hashes: dict[Path, str] = {}

    def hash_of(self, folder: Path) -> str:
        """`expert_sha256` of a folder that was written; of a copy, what its source had."""
        if folder not in self._hashes:
            self._hashes[folder] = expert_sha256(folder)
        return self._hashes[folder]

    def write(self, draft: Draft) -> Path:
        """Write an expert's weights and give their folder."""
        match draft.weights:
            case Kept(source):
                return self.copied(source)
            case OnBase(base, tensors, lora):
                on = self.copied(base)
                folder = self._free(draft.entry.subfolder, set(self._wanted.values()))
                write_delta(folder, on, tensors, self.hash_of(on))
                if lora is not None:
                    shutil.copyfile(lora, folder / LORA)
            case Whole(source, tensors):
                folder = self._free(draft.entry.subfolder, set(self._wanted.values()))
                folder.mkdir()
                self._copy(chain(source)[-1] / "config.json", folder / "config.json")
                save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WHOLE, metadata={"format": "pt"})
        return folder

    def copied(self, source: Path) -> Path:
        """Copy an expert's folder and its bases, unless that was done, and give its copy."""
        if source not in self._copies:
            delta = read_delta(source)
            self._copies[source] = self._copied_whole(source) if delta is None else self._copied_delta(source, source.parent / delta.base)
        return self._copies[source]

    def _copied_whole(self, source: Path) -> Path:
        """Copy, unless another model had the very same network."""
        content = (expert_sha256(source), (source / "config.json").read_bytes())
        twin = self._wholes.get(content)
        if twin is not None and twin.parent != source.parent:
            return self._copies[twin]
        self._wholes[content] = source
        folder = self._named(source)
        copy_folder(source, folder, self._copy)
        self._hashes[folder] = content[0]
        return folder

    def _copied_delta(self, source: Path, base: Path) -> Path:
        on = self.copied(base)
        folder = self._named(source)
        write_delta(folder, on, {}, self.hash_of(on))  # its base may have another name here
        for name in (TENSORS, LORA):
            if (source / name).exists():
                self._copy(source / name, folder / name)
        return folder

    def _named(self, source: Path) -> Path:
        return self._staged / self._wanted[source] if source in self._wanted else self._free(source.name, self._reserved)

    def _free(self, name: str, reserved: set[str]) -> Path:
        names = (name if number == 1 else f"{name}_{number}" for number in count(1))
        return next(self._staged / free for free in names if free not in reserved and not (self._staged / free).exists())
