"""Which files of a hub's repository are fetched: safetensors, each weight once, and the texts beside them; never pickles, never code."""

import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import PurePosixPath

from ...errors import ModelError, UnsafeError, UsageError
from ...model_files import is_pickle_name
from .models import CONFIGS

_TEXTS = (".json", ".txt", ".model")
_ROOT = ("model_index.json", "experts.json", "defaults.json", "README.md")
_STEMS = ("model", "diffusion_pytorch_model", "open_clip_model", "pytorch_lora_weights")


def choose(names: Collection[str], parts: Collection[str] | None, variant: str | None = None, only: Sequence[str] = ()) -> list[str]:
    """Choose files of a repository, in the order in which they are fetched: `model_index.json`, which makes a folder a model, is the last.

    Args:
        names: of all files.
        parts: the components that `model_index.json` names and that are loaded; None where there is no such file.
        variant: such as "fp16", taken where a part has it; None takes the plain weights, or else the only variant there is.
        only: take these files and no others.

    Raises:
        UnsafeError: weights are there as pickles only, or a pickle or code is asked for.
        UsageError: `only` or `variant` names something that is not there, or there are several files to choose from.
        ModelError: weights are not there at all.
    """
    if only:
        return [_asked(names, name) for name in only]
    if parts is not None:
        chosen = _model(names, parts, variant)
    elif any(name in names for name in CONFIGS):
        chosen = _component(names, variant)
    else:
        chosen = _single(names)
    if variant is not None and not any(f".{variant}" in name for name in chosen):
        raise UsageError(f"there are no weights of the variant {variant!r}; leave it out, or take one that the repository has.")
    cards = [name for name in names if name == "README.md" or name.startswith("LICENSE")]
    return sorted({*chosen, *cards}, key=lambda name: (name == "model_index.json", name.endswith(".safetensors"), name))


def _asked(names: Collection[str], name: str) -> str:
    if is_pickle_name(name) or name.endswith((".py", ".pyc", ".so")):
        raise UnsafeError(f"{name} can run code when loaded and is not fetched; ask for safetensors.")
    if name not in names:
        files = [name for name in names if name.endswith(".safetensors")]
        raise UsageError(f"the repository has no file {name!r}; its safetensors files are {_listed(files)}.")
    return name


def _model(names: Collection[str], parts: Collection[str], variant: str | None) -> list[str]:
    chosen = [name for name in _ROOT if name in names]
    folders = set(parts)
    if "experts.json" in names:  # experts, and bases of deltas
        folders |= {str(PurePosixPath(name).parent) for name in names if name.endswith(".safetensors") and name.count("/") == 1}
    for folder in sorted(folders):
        files = _in_folder(names, folder)
        chosen += _texts(files)
        if f"{folder}/delta.json" in files:
            chosen += [name for name in files if name.endswith(".safetensors")]
        elif folder != "scheduler" and not folder.startswith("tokenizer"):
            chosen += _weights(files, folder, "model" if folder.startswith("text_encoder") else "diffusion_pytorch_model", variant)
    return chosen


def _component(names: Collection[str], variant: str | None) -> list[str]:
    """A repository of one network, such as a T5 encoder."""
    files = _in_folder(names, ".")
    stem = next((stem for stem in _STEMS if any(_parsed(name, stem) for name in files)), _STEMS[0])
    return [*_texts(files), *_weights(files, "the repository", stem, variant)]


def _single(names: Collection[str]) -> list[str]:
    """A repository of one file: a checkpoint, or a LoRA."""
    files = [name for name in names if name.endswith(".safetensors")]
    if not files:
        raise _no_weights(names, "the repository")
    if len(files) > 1:
        raise UsageError(f"the repository is no model folder but has several files; choose with --file one of {_listed(files)}.")
    return files


def _weights(files: Sequence[str], folder: str, stem: str, variant: str | None) -> list[str]:
    """The files of a folder that hold its weights in one variant."""
    variants: dict[str | None, list[tuple[str, bool]]] = {}
    for name in files:
        match = _parsed(name, stem)
        if match is not None:
            variants.setdefault(match["v1"] or match["v2"], []).append((name, match["shard"] is not None))
    if not variants:
        raise _no_weights(files, folder)
    taken = variant if variant in variants else None if None in variants else next(iter(variants))
    if taken is not None and taken != variant and len(variants) > 1:
        raise UsageError(f"the weights of {folder} are there as {_listed(str(name) for name in variants)}; choose with --variant.")
    whole = [name for name, shard in variants[taken] if not shard]
    if whole:
        return whole
    dotted = "" if taken is None else f".{taken}"
    indices = (f"{stem}.safetensors.index{dotted}.json", f"{stem}{dotted}.safetensors.index.json")
    index = [name for name in files if PurePosixPath(name).name in indices]
    if not index:
        raise ModelError(f"the weights of {folder} are there in pieces without an index; take another revision, or tell the repository's owner.")
    return [*index, *(name for name, _ in variants[taken])]


def _parsed(name: str, stem: str) -> re.Match[str] | None:
    pattern = rf"{re.escape(stem)}(?:\.(?P<v1>\w+))?(?P<shard>-\d+-of-\d+)?(?:\.(?P<v2>\w+))?\.safetensors"
    return re.fullmatch(pattern, PurePosixPath(name).name)


def _in_folder(names: Iterable[str], folder: str) -> list[str]:
    return [name for name in names if str(PurePosixPath(name).parent) == folder]


def _texts(files: Iterable[str]) -> list[str]:
    return [name for name in files if name.endswith(_TEXTS) and ".safetensors.index" not in name and ".bin.index" not in name]


def _no_weights(names: Iterable[str], where: str) -> UnsafeError | ModelError:
    pickles = [name for name in names if is_pickle_name(name)]
    if pickles:
        return UnsafeError(
            f"the weights of {where} are there only as pickles ({_listed(pickles)}), which can run code; take a repository with safetensors."
        )
    return ModelError(f"there are no weights of {where} in safetensors; take another repository or revision.")


def _listed(names: Iterable[str]) -> str:
    some = sorted(names)
    return ", ".join(some[:8]) + (", …" if len(some) > 8 else "")
