"""LoRAs and embeddings, and what they do to a model: named by a command or a line, matched with its weights, and added to copies of them.

    "style.safetensors:0.8@high" ──> LoraUse (recorded in pictures) ──> Adapters (pairs by expert and network) ──> adapted copies (unet/lora.py)

The base weights are never changed: what a LoRA changes is computed from them, and they are there again when it goes.
"""

import re
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from ...errors import ModelError, UnsafeError, UsageError
from ...text_encoders.clip import CLIPTextConfig
from ...unet.experts import ExpertEntry
from ...unet.lora import NOTHING, Added, LowRank, Pairs, with_pairs
from ..model.folder import TEXT_PARTS, ModelFolder
from .embeddings import EmbeddingFile, EmbeddingUse, checked_token, embedding_spec, fit_embedding, read_embedding_file
from .lora_files import find_lora, lora_sha256, read_lora_file
from .lora_fit import TEXT_PREFIX, UNET, Fit, match

MOST_WEIGHT = 100.0
_SPEC = re.compile(r"(?P<file>.+?)(?::(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+)))?(?:@(?P<expert>[A-Za-z0-9._-]{1,64}))?")


@dataclass(frozen=True)
class LoraUse:
    """A LoRA as a request names it and a picture records it.

    Attributes:
        name: of its file, without the folder.
        hash: SHA-256 of its file (`lora_files.LoraFile.sha256`).
        weight: factor of what it adds; 0 adds nothing, negative ones take away.
        expert: the only one that it is for; None for all that it fits.
        experts: those whose U-Net or prompts it changes.
        matched: how many of its keys fit this model.
        keys: how many it has, a pair of down and up counted once.
    """

    name: str
    hash: str
    weight: float
    expert: str | None
    experts: tuple[str, ...]
    matched: int
    keys: int
    option: ClassVar[str] = "--lora"

    @property
    def spec(self) -> str:
        """What `--lora` takes, the folder left out."""
        return f"{self.name}:{self.weight:.12g}{'' if self.expert is None else f'@{self.expert}'}"

    @classmethod
    def stored(cls, item: Any) -> "LoraUse":
        """Back from JSON.

        Raises:
            ValueError: something else.
        """
        match item:
            case {
                "name": str(name),
                "hash": str(sha256),
                "weight": int() | float() as weight,
                "expert": None | str() as expert,
                "experts": [*experts],
                "matched": int(matched),
                "keys": int(keys),
            }:
                return cls(name, sha256, float(weight), expert, tuple(map(str, experts)), matched, keys)
            case _:
                raise ValueError(f"a LoRA is stored as {item!r:.200}")


@dataclass(frozen=True, eq=False)
class ExpertChange:
    """What LoRAs add to the networks that one expert uses.

    Attributes:
        unet: to its U-Net.
        texts: component that it reads prompts with -> what is added to that.
        words: CLIP tower that it reads prompts with -> new word -> (n, width), what embeddings teach it.
    """

    unet: Added = NOTHING
    texts: Mapping[str, Added] = field(default_factory=dict[str, Added])
    words: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict[str, Mapping[str, Tensor]])

    def text(self, component: str) -> Added:
        """What is added to a component of the text side."""
        return self.texts.get(component, NOTHING)


@dataclass(frozen=True, eq=False)
class Adapters:
    """The LoRAs and embeddings of a request, ready to be added.

    Attributes:
        loras: which they are.
        embeddings: likewise.
        changes: expert -> what they add; experts that they leave alone are not there.
    """

    loras: tuple[LoraUse, ...] = ()
    embeddings: tuple[EmbeddingUse, ...] = ()
    changes: Mapping[str, ExpertChange] = field(default_factory=dict[str, ExpertChange])

    @property
    def unets(self) -> dict[str, Added]:
        """Expert -> what is added to its U-Net."""
        return {name: change.unet for name, change in self.changes.items()}

    def change(self, expert: str) -> ExpertChange:
        """What is added to the networks of an expert."""
        return self.changes.get(expert, ExpertChange())


NO_ADAPTERS = Adapters()


class Shelf:
    """The LoRA and embedding files of a run for one model: each is read and matched once, and found again by its hash."""

    def __init__(self, folder: ModelFolder, files: Mapping[str, Path] | None = None) -> None:
        """Begin with files that are known.

        Args:
            folder: the model.
            files: hash -> path, from another shelf's `files`.
        """
        self.folder = folder
        self.files: dict[str, Path] = {} if files is None else dict(files)
        self.lora = cache(self._lora)
        self.embedding = cache(self._embedding)
        self.adapters = cache(self._adapters)
        self._partial: list[str] = []
        self._read = cache(read_lora_file)
        self._read_embedding = cache(read_embedding_file)
        self._match = cache(self._matched)

    @property
    def partial(self) -> list[str]:
        """For each LoRA of which only a part fits the model, a sentence that says so."""
        return list(dict.fromkeys(self._partial))

    def _lora(self, text: str) -> LoraUse:
        """The LoRA that FILE[:WEIGHT][@EXPERT] names.

        Raises:
            UsageError: no such file or expert, or a weight out of range.
            UnsafeError: the file is a pickle.
            ModelError: the file is no LoRA that is covered, or fits no weight of the model.
        """
        path, weight, expert = lora_spec(text)
        names = [entry.name for entry in self.folder.experts]
        if expert is not None and expert not in names:
            raise UsageError(f"--lora {text!r:.200} is for the expert {expert!r}, which this model does not have; it has {', '.join(names)}.")
        file = self._read(find_lora(path))
        self.files[file.sha256] = find_lora(path)
        fits = self._match(file.sha256, expert)
        matched = {key for fit in fits.values() for key in fit}
        if len(matched) < len(file.pairs):
            self._partial.append(f"{file.name}: {len(matched)} of {len(file.pairs)} keys fit this model")
        return LoraUse(file.name, file.sha256, weight, expert, tuple(fits), len(matched), len(file.pairs))

    def _embedding(self, text: str) -> EmbeddingUse:
        """The embedding that FILE[=TOKEN] names.

        Raises:
            UsageError: no such file, or a word that prompts cannot hold.
            UnsafeError: the file is a pickle.
            ModelError: the file is no embedding, or fits no text encoder of the model.
        """
        path, token = embedding_spec(text)
        file = self._read_embedding(path)
        self.files[file.sha256] = path
        fits = {component: vectors for entry in self.folder.experts for component, vectors in self._words(file, entry).items()}
        if not fits:
            widths = sorted({width for entry in self.folder.experts for _, width in clip_towers(self.folder, entry).values()})
            came = [vectors.shape[1] for vectors in file.vectors.values()]
            raise ModelError(f"{file.name} has vectors of width {_listed(came)}, the text encoders of {self.folder.name!r} take {_listed(widths)}.")
        most = max(len(vectors) for vectors in fits.values())
        return EmbeddingUse(file.name, file.sha256, checked_token(file.token if token is None else token), tuple(sorted(fits)), most)

    def _words(self, file: EmbeddingFile, entry: ExpertEntry) -> dict[str, Tensor]:
        return fit_embedding(file, clip_towers(self.folder, entry))

    def _matched(self, sha256: str, expert: str | None) -> Mapping[str, Fit]:
        return match(self.folder, self._read(self.files[sha256]), expert)

    def _adapters(self, loras: tuple[LoraUse, ...], embeddings: tuple[EmbeddingUse, ...] = ()) -> Adapters:
        """What LoRAs and embeddings add, by expert and network.

        Raises:
            UsageError: a file is not on the shelf, or two embeddings have the same word.
            ModelError: as `lora`.
        """
        if not loras and not embeddings:
            return NO_ADAPTERS
        missing = [one for one in (*loras, *embeddings) if one.hash not in self.files]
        if missing:
            raise UsageError(f"{missing_files(missing)}; name the file, or its folder, with {missing[0].option}.")
        twice = [word for word, times in Counter(one.token.lower() for one in embeddings).items() if times > 1]
        if twice:
            raise UsageError(f"two embeddings have the word {twice[0]!r:.100}; give one of them another with --embedding FILE=WORD.")
        active = [lora for lora in loras if lora.weight != 0]
        added: dict[str, dict[str, tuple[list[Hashable], dict[str, list[LowRank]]]]] = {}
        for lora in active:
            file = self._read(self.files[lora.hash])
            for name, fit in self._match(lora.hash, lora.expert).items():
                networks = added.setdefault(name, {})
                for network in dict.fromkeys(target for target, _ in fit.values()):
                    networks.setdefault(network, ([], {}))[0].append((lora.hash, lora.weight))
                for key, (network, module) in fit.items():
                    pair = file.pairs[key]
                    networks[network][1].setdefault(module, []).append(replace(pair, scale=lora.weight * pair.scale))
        words: dict[str, dict[str, dict[str, Tensor]]] = {}
        for one in embeddings:
            file = self._read_embedding(self.files[one.hash])
            for entry in self.folder.experts:
                for component, vectors in self._words(file, entry).items():
                    words.setdefault(entry.name, {}).setdefault(component, {})[one.token] = vectors
        names = dict.fromkeys((*added, *words))
        return Adapters(loras, embeddings, {name: _expert_change(added.get(name, {}), words.get(name, {})) for name in names})


def _expert_change(networks: Mapping[str, tuple[list[Hashable], Pairs]], words: Mapping[str, Mapping[str, Tensor]]) -> ExpertChange:
    every = {name: Added(tuple(key), pairs) for name, (key, pairs) in networks.items()}
    return ExpertChange(every.get(UNET, NOTHING), {name: added for name, added in every.items() if name != UNET}, words)


def clip_towers(folder: ModelFolder, entry: ExpertEntry) -> dict[str, tuple[str, int]]:
    """The CLIP towers that an expert reads prompts with: part -> (component, width)."""
    parts = TEXT_PARTS[folder.family] if entry.text is None else entry.text.parts
    named = {part: part if entry.text is None else entry.text.parts[part] for part in parts if part.startswith("text_encoder")}
    towers = {part: component for part, component in named.items() if folder.parts[component].startswith("CLIPText")}
    return {part: (component, CLIPTextConfig.from_dict(folder.configs[component]).hidden_size) for part, component in towers.items()}


def lora_spec(text: str) -> tuple[Path, float, str | None]:
    """FILE[:WEIGHT][@EXPERT] to file, weight (1 when left out) and expert; a text that is the path of something there is all file.

    Raises:
        UsageError: a weight out of range.
    """
    found = _SPEC.fullmatch(text)
    if found is None or Path(text).exists():
        return Path(text), 1.0, None
    weight = 1.0 if found["weight"] is None else float(found["weight"])
    if not abs(weight) <= MOST_WEIGHT:
        raise UsageError(f"--lora {text!r:.200} has the weight {weight:g}; give a number from {-MOST_WEIGHT:g} to {MOST_WEIGHT:g}.")
    return Path(found["file"]), weight, found["expert"]


def find_by_hash(paths: Sequence[Path], wanted: Iterable[LoraUse | EmbeddingUse]) -> dict[str, Path]:
    """Find the files that a picture was made with; those of the same name are looked at first.

    Args:
        paths: files, and folders whose .safetensors files are looked at, at any depth.
        wanted: from the picture.

    Returns:
        Hash -> path, for all that are wanted.

    Raises:
        UsageError: a path is not there, or something that is wanted is not among them.
    """
    left = {one.hash: one for one in wanted}
    names = {one.name for one in left.values()}
    absent = [path for path in paths if not path.exists()]
    if absent:
        raise UsageError(f"the path {str(absent[0])!r:.200} is not there; name a file or a folder.")
    listed = [file for path in paths for file in (sorted(path.rglob("*.safetensors")) if path.is_dir() else [path])]
    found: dict[str, Path] = {}
    for file in sorted(listed, key=lambda file: file.name not in names):
        if not left:
            break
        with suppress(ModelError, UnsafeError):  # other files of a folder need not be good
            digest = lora_sha256(find_lora(file))
            if digest in left:
                found[digest] = file
                del left[digest]
    if left:
        options = " and ".join(sorted({one.option for one in left.values()}, reverse=True))
        raise UsageError(f"{missing_files(left.values())}; name the file, or a folder that holds it, with {options}.")
    return found


def missing_files(wanted: Iterable[LoraUse | EmbeddingUse]) -> str:
    """A part of a sentence that says which files are missing."""
    named = dict.fromkeys(f"{one.name} (SHA-256 {one.hash[:12]}…)" for one in wanted)
    return f"{', '.join(named)} {'is' if len(named) == 1 else 'are'} not there"


def baked(adapters: Adapters, network: str, state: Mapping[str, Tensor], experts: Sequence[str]) -> dict[str, Tensor]:
    """The tensors of a network with the LoRAs added for good.

    Args:
        adapters: from `Shelf.adapters`.
        network: "unet", or a component of the text side such as "text_encoder_2".
        state: its tensors, by diffusers' or transformers' names of any version; none is changed.
        experts: those whose U-Net it is, or that read prompts with it.

    Returns:
        All tensors in the dtypes that they had.

    Raises:
        UsageError: the LoRAs are for one of the experts and not for another, and one file cannot hold both.
    """
    changes = [adapters.change(expert) for expert in experts]
    added = [change.unet if network == UNET else change.text(network) for change in changes]
    if len({one.key for one in added}) > 1:
        raise UsageError(f"the LoRAs change {network} for some only of the experts that share it; leave out @EXPERT, or use them with --lora.")
    pairs = added[0].pairs if added else {}
    names = {module: f"{module if f'{module}.weight' in state else module.removeprefix(TEXT_PREFIX)}.weight" for module in pairs}
    return {**state, **{names[module]: with_pairs(state[names[module]], own).to(state[names[module]].dtype) for module, own in pairs.items()}}


def _listed(numbers: Iterable[int]) -> str:
    return " and ".join(map(str, numbers))
