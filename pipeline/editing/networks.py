"""Networks that are brought beside a model, each in a folder of its own: found, refused where they could do harm, known by their content."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ...errors import ModelError, UsageError
from ...model_files import files_sha256, read_headers, weight_files
from ..hub.found import found
from ..hub.models import origin_of
from ..model.allowed import refuse_code, refuse_files


@dataclass(frozen=True)
class Beside:
    """A network beside the model.

    Attributes:
        name: of its folder, or of a hub's network owner/name.
        sha256: of its files.
        path: where it was; not recorded in pictures.
    """

    name: str
    sha256: str
    path: str

    @property
    def recorded(self) -> dict[str, str]:
        """What pictures and keys say of it: all but the path."""
        return {"name": self.name, "sha256": self.sha256}


def beside_from(stored: Mapping[str, Any]) -> Beside:
    """A network from its JSON, with or without a path; raises KeyError and TypeError where it is none."""
    return Beside(str(stored["name"]), str(stored["sha256"]), str(stored.get("path", "")))


def open_beside(path: Path, what: str) -> Path:
    """Find a network's folder, and refuse what in it could do harm. Reads its JSON only.

    Args:
        path: a folder, or a name of the hub, owner/name (see `hub.found`).
        what: the option that names it, such as "control-model".

    Raises:
        UsageError: there is no such folder.
        UnsafeError: it brings code, asks for some, or has links that lead out of it.
    """
    folder = found(path)
    if not (folder / "config.json").is_file():
        raise UsageError(f"--{what} {path.name!r} is no folder with a config.json; give one as save_pretrained writes it (safetensors).")
    refuse_files(folder)
    refuse_code(folder, {}, [])
    return folder


def beside(folder: Path, stem: str, texts: Sequence[str]) -> Beside:
    """A network in a folder that was opened; the headers of its weights are checked.

    Args:
        folder: from `open_beside`.
        stem: of its weight files.
        texts: the JSON files that decide what it computes.

    Raises:
        UnsafeError: its weights are pickles.
        ModelError: they are missing, damaged, or whole numbers.
    """
    for name, entry in read_headers(folder, stem).items():
        if name.endswith((".weight", ".bias")) and not entry["dtype"].startswith(("F", "BF")):
            raise ModelError(f"{name:.100} in {folder} is of the kind {entry['dtype']}; floating-point weights were wanted.")
    files = [*(folder / name for name in texts), *weight_files(folder, stem)]
    origin = origin_of(folder)
    digest = _sha256(tuple((str(file.absolute()), file.stat().st_mtime_ns, file.stat().st_size) for file in files))
    return Beside(folder.resolve().name if origin is None else origin.repo, digest, str(folder.absolute()))


def check_unchanged(network: Beside, stem: str, texts: Sequence[str]) -> Path:
    """The folder of a network that is about to be loaded.

    Raises:
        UnsafeError, ModelError: as `beside`; or its files are not those that were asked for, as on another machine of a cluster.
    """
    folder = Path(network.path)
    if not folder.is_dir() or beside(folder, stem, texts).sha256 != network.sha256:
        raise ModelError(f"{network.name!r} (sha256 {network.sha256[:10]}…) is not what lies at its path now; put the same files there.")
    return folder


@lru_cache(maxsize=64)
def _sha256(files: tuple[tuple[str, int, int], ...]) -> str:
    """Of files with their times and sizes, with which another content under the same name is another one."""
    return files_sha256(Path(name) for name, _, _ in files)
