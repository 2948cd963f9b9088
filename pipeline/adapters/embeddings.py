"""Textual-inversion embeddings (Gal et al. 2022, arXiv 2208.01618): files that teach CLIP's text encoders a new word. See docs/loras.md."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from ...errors import ModelError, UsageError
from ...model_files import files_sha256, read_safetensors
from ...text_encoders.tokenizer import word_pattern
from .lora_files import adapter_file, checked_numbers

_SDXL = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}
_A1111 = "emb_params"
MOST_VECTORS = 75  # what fits a prompt


@dataclass(frozen=True)
class EmbeddingUse:
    """An embedding as a request names it and a picture records it.

    Attributes:
        name: of its file, without the folder.
        hash: SHA-256 of its file.
        token: the word in prompts.
        encoders: the components that learn the word.
        vectors: tokens that it takes, of the encoder where these are most.
    """

    name: str
    hash: str
    token: str
    encoders: tuple[str, ...]
    vectors: int
    option: ClassVar[str] = "--embedding"

    @property
    def spec(self) -> str:
        """What `--embedding` takes, the folder left out."""
        return f"{self.name}={self.token}"

    @classmethod
    def stored(cls, item: Any) -> "EmbeddingUse":
        """Back from JSON.

        Raises:
            ValueError: something else.
        """
        match item:
            case {"name": str(name), "hash": str(sha256), "token": str(token), "encoders": [*encoders], "vectors": int(vectors)}:
                return cls(name, sha256, token, tuple(map(str, encoders)), vectors)
            case _:
                raise ValueError(f"an embedding is stored as {item!r:.200}")

    def named_in(self, *texts: str) -> bool:
        """Whether its word stands in one of the texts."""
        return any(re.search(word_pattern(self.token), text, re.IGNORECASE) for text in texts)


@dataclass(frozen=True, eq=False)
class EmbeddingFile:
    """An embedding file.

    Attributes:
        name: of the file, without its folder.
        sha256: of the file.
        token: the word that the file itself names, else the file's name without suffix.
        vectors: (n, width) for each text encoder that it is for, by the part that it names; None where it names none.
    """

    name: str
    sha256: str
    token: str
    vectors: Mapping[str | None, Tensor]


def embedding_spec(text: str) -> tuple[Path, str | None]:
    """FILE[=TOKEN] to file and token; a text that is the path of something there is all file."""
    file, equals, token = text.rpartition("=")
    if not equals or Path(text).exists():
        return Path(text), None
    return Path(file), token


def read_embedding_file(path: Path) -> EmbeddingFile:
    """Read an embedding: of diffusers (`{"<token>": …}`), of A1111 (`emb_params`), or of SDXL (`clip_l`, `clip_g`); (n, width) or (width,) each.

    Raises:
        UsageError: there is no such file.
        UnsafeError: it is a pickle.
        ModelError: not a safetensors file, other tensors in it, NaN, or more than 75 vectors.
    """
    tensors = read_safetensors(adapter_file(path, "embedding"))
    if tensors and tensors.keys() <= _SDXL.keys():
        token, parts = path.stem, {_SDXL[name]: name for name in tensors}
    elif len(tensors) == 1:
        name = next(iter(tensors))
        token, parts = path.stem if name == _A1111 else name, {None: name}
    else:
        raise ModelError(f"{path.name} holds {len(tensors)} tensors; one, named by its word or {_A1111}, or {' and '.join(_SDXL)} were wanted.")
    vectors: dict[str | None, Tensor] = {}
    for part, name in parts.items():
        tensor = checked_numbers(path, name, tensors[name])
        if tensor.ndim not in (1, 2) or not 1 <= tensor.reshape(-1, tensor.shape[-1]).shape[0] <= MOST_VECTORS:
            raise ModelError(f"{path.name} holds {name!r:.100} {tuple(tensor.shape)}; 1 to {MOST_VECTORS} vectors, (n, width), were wanted.")
        vectors[part] = tensor.reshape(-1, tensor.shape[-1])
    return EmbeddingFile(path.name, files_sha256([path]), token, vectors)


def checked_token(token: str) -> str:
    """A word that prompts can hold.

    Raises:
        UsageError: it is empty, longer than 100 characters, or holds white space.
    """
    if not 1 <= len(token) <= 100 or any(letter.isspace() or not letter.isprintable() for letter in token):
        raise UsageError(f"the embedding's word {token!r:.120} cannot stand in a prompt; give another with --embedding FILE=WORD.")
    return token


def fit_embedding(file: EmbeddingFile, towers: Mapping[str, tuple[str, int]]) -> dict[str, Tensor]:
    """Find the text encoders that an embedding is for, by width; of two of equal width the one that the file names.

    Args:
        file: the embedding.
        towers: part -> (component, width) of each CLIP tower.

    Returns:
        Component -> (n, width); empty where none has the width.
    """
    fits: dict[str, Tensor] = {}
    for part, vectors in file.vectors.items():
        fitting = [(name == part, component) for name, (component, width) in towers.items() if width == vectors.shape[1] and component not in fits]
        if fitting:
            fits[max(fitting, key=lambda one: one[0])[1]] = vectors
    return fits
