"""What the hub's cache holds, and models by hash: listed, verified, removed. Asks no network."""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import scan_cache_dir
from huggingface_hub.errors import CacheNotFound
from huggingface_hub.utils import CachedRepoInfo

from ...errors import TuDiffuseError, UsageError
from ...unet.deltas import chain, expert_sha256, own_files, read_delta
from ..model.folder import ModelFolder, open_folder
from .models import HubName, cache_folder, is_commit, origin_of
from .pull import HubFile, matches


@dataclass(frozen=True)
class Verified:
    """What came of comparing a model's files with the hashes that are recorded for them.

    Attributes:
        checked: names of the files, or folders of experts, that have a recorded hash, and were read.
        bad: those of them whose content is another.
        unrecorded: files that no hash is recorded for.
        bytes: that were read.
    """

    checked: tuple[str, ...]
    bad: tuple[str, ...]
    unrecorded: tuple[str, ...]
    bytes: int


def cached_models() -> Iterator[dict[str, Any]]:
    """Every commit of a model that the cache holds.

    Yields:
        name, commit, refs (branches and tags that mean it), family (None: no model folder that can be used here), megabytes (on disk), path.
    """
    for repo in _repos():
        for revision in sorted(repo.revisions, key=lambda revision: -revision.last_modified):
            yield {
                "name": repo.repo_id,
                "commit": revision.commit_hash,
                "refs": sorted(revision.refs),
                "family": _family(revision.snapshot_path),
                "megabytes": round(revision.size_on_disk / 1e6, 1),
                "path": str(revision.snapshot_path),
            }


def folder_models(folder: Path) -> Iterator[dict[str, Any]]:
    """Every model folder in a folder, which may be one itself.

    Yields:
        As `cached_models`, with commit None and no refs.

    Raises:
        UsageError: there is no such folder.
    """
    if not folder.is_dir():
        raise UsageError(f"folder {str(folder)!r} is not there; name one that holds models.")
    for index in sorted(folder.rglob("model_index.json")):
        path = index.parent
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        facts = {"name": path.resolve().name, "commit": None, "refs": [], "family": _family(path), "megabytes": round(size / 1e6, 1)}
        yield facts | {"path": str(path)}


def verify(path: Path, recorded: Mapping[str, HubFile] | None = None) -> Verified:
    """Read a model whole and compare it with the hashes that are recorded for it.

    A snapshot of the hub's cache has one for each file, in the name of what its link leads to; a folder has those of `experts.json` and of deltas.

    Args:
        path: a folder, or a single file.
        recorded: what the hub says of each file, by relative name (of a single file, its own name); None takes the hashes above.

    Raises:
        TuDiffuseError: the folder is no whole model.
    """
    root = next((folder for folder in (path, *path.parents) if origin_of(folder) is not None), path if path.is_dir() else path.parent)
    if (path / "model_index.json").exists():
        folder = open_folder(path)  # a part that is missing has no hash to differ from
        if recorded is None and origin_of(root) is None:
            return _verify_experts(folder)
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_symlink() or file.is_file())
    hashes = {file: _linked(file) if recorded is None else _recorded(recorded.get(file.relative_to(root).as_posix())) for file in files}
    checked = [file for file, hash_of in hashes.items() if hash_of is not None]
    bad = [file for file in checked if not (file.exists() and matches(file, *(hashes[file] or (None, None))))]
    names = {file: file.relative_to(root).as_posix() for file in files}
    return Verified(
        checked=tuple(names[file] for file in checked),
        bad=tuple(names[file] for file in bad),
        unrecorded=tuple(name for file, name in names.items() if hashes[file] is None),
        bytes=sum(file.stat().st_size for file in checked if file.exists()),
    )


def removable(name: HubName) -> tuple[list[str], float]:
    """The commits of a model that the cache holds, and the megabytes that removing them sets free.

    Args:
        name: without a revision all commits are meant.

    Raises:
        UsageError: the cache does not hold it.
    """
    commits = _commits(name)
    return commits, round(scan_cache_dir(cache_folder()).delete_revisions(*commits).expected_freed_size / 1e6, 1)


def remove(commits: list[str]) -> None:
    """Remove commits from the cache, with the contents that no other commit has."""
    scan_cache_dir(cache_folder()).delete_revisions(*commits).execute()


def _repos() -> list[CachedRepoInfo]:
    try:
        repos = scan_cache_dir(cache_folder()).repos
    except CacheNotFound:
        return []
    return sorted((repo for repo in repos if repo.repo_type == "model"), key=lambda repo: repo.repo_id)


def _commits(name: HubName) -> list[str]:
    repo = next((repo for repo in _repos() if repo.repo_id == name.repo), None)
    revisions = [] if repo is None else list(repo.revisions)
    wanted = [one.commit_hash for one in revisions if name.revision is None or name.revision == one.commit_hash or name.revision in one.refs]
    if not wanted:
        there = ", ".join(sorted(one.commit_hash for one in revisions))
        raise UsageError(f"the hub's cache does not hold {name}; {f'it has the commits {there}' if there else 'see tu-diffuse models list'}.")
    return sorted(wanted)


def _family(path: Path) -> str | None:
    try:
        return open_folder(path).family
    except TuDiffuseError:
        return None


def _linked(file: Path) -> tuple[str | None, str | None] | None:
    """SHA-256 or git's name of a file of a snapshot, from the name of its content in the cache."""
    digest = os.path.basename(os.readlink(file)) if file.is_symlink() else ""
    return (digest, None) if re.fullmatch(r"[0-9a-f]{64}", digest) else (None, digest) if is_commit(digest) else None


def _recorded(file: HubFile | None) -> tuple[str | None, str | None] | None:
    return None if file is None else (file.sha256, file.git_sha1)


def _verify_experts(folder: ModelFolder) -> Verified:
    """Compare U-Net folders with the hashes that `experts.json` and `delta.json` have of them."""
    wanted: dict[Path, str | None] = {}
    for entry in folder.experts:
        wanted.setdefault(folder.path / entry.subfolder, None)
        wanted[folder.path / entry.subfolder] = entry.sha256 or wanted[folder.path / entry.subfolder]
        for one in chain(folder.path / entry.subfolder):
            delta = read_delta(one)
            if delta is not None:
                wanted[one.parent / delta.base] = delta.base_sha256
    checked = [path for path, digest in wanted.items() if digest is not None]
    bad = [path for path in checked if expert_sha256(path) != wanted[path]]
    covered = {file for path in checked for file in own_files(path)}
    return Verified(
        checked=tuple(path.name for path in checked),
        bad=tuple(path.name for path in bad),
        unrecorded=tuple(path.relative_to(folder.path).as_posix() for path in sorted(folder.path.rglob("*.safetensors")) if path not in covered),
        bytes=sum(file.stat().st_size for file in covered),
    )
