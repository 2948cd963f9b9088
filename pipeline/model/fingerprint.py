"""What tells models apart: a hash over the names, sizes and sampled contents of their files."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from ...model_files import weight_files

_TEXTS = (".json", ".txt", ".model")
_SAMPLED_BLOCKS, _BLOCK = 16, 65536


def fingerprint(folder: Path, names: Sequence[str], variant: str | None = None) -> str:
    """SHA-256 over the files that decide a picture: names, sizes, and 16 evenly spaced blocks of 64 KiB (all of a file of up to 1 MiB).

    It tells models apart in milliseconds even for many gigabytes; it is no protection against a file changed on purpose between the blocks.
    `defaults.json` is left out: pictures record the settings themselves. So are weights that are not loaded, such as variants beside plain ones.

    Args:
        folder: the model; the texts in it count.
        names: of its components; "." where the folder itself holds weights.
        variant: of the weights that are loaded, see `model_files.weight_files`.
    """
    digest = hashlib.sha256()
    texts = [path for path in sorted(folder.iterdir()) if path.suffix in _TEXTS and path.name != "defaults.json" and path.is_file()]
    for path in [*texts, *(path for name in sorted(names) for path in _deciding(folder / name, variant))]:
        digest.update(f"{path.relative_to(folder).as_posix()}\0".encode())
        add_sample(digest, path)
    return digest.hexdigest()


def add_sample(digest: "hashlib._Hash", path: Path) -> None:
    """Add a file's size, and sampled blocks of its content."""
    size = path.stat().st_size
    digest.update(f"{size}\0".encode())
    with path.open("rb") as file:
        if size <= _SAMPLED_BLOCKS * _BLOCK:
            digest.update(file.read())
        else:
            for i in range(_SAMPLED_BLOCKS):
                file.seek((size - _BLOCK) * i // (_SAMPLED_BLOCKS - 1))
                digest.update(file.read(_BLOCK))


def _deciding(folder: Path, variant: str | None) -> list[Path]:
    """The files of a component that decide a picture: all texts and weights, but of whole weights only those that are loaded."""
    files = sorted(path for path in folder.iterdir() if path.suffix in (*_TEXTS, ".safetensors") and path.is_file())
    for stem in ("diffusion_pytorch_model", "model"):
        weights = {path for path in files if path.name.startswith((f"{stem}.", f"{stem}-")) and ".safetensors" in path.name}
        if len(weights) > 1:
            weights -= set(weight_files(folder, stem, variant))
            files = [path for path in files if path not in weights]
    return files
