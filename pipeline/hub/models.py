"""Models of the Hugging Face hub by name, `owner/name` or `owner/name@revision`, and where they lie in the cache. Asks no network of its own.

The cache is huggingface_hub's, which other programs share: `models--owner--name/` with `refs/REVISION` (a commit), `snapshots/COMMIT/` (the files, as
links) and `blobs/` (their contents, named by hash). A model that is used is always one commit's snapshot, whose path tells name and commit.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from ...model_files import inside, is_pickle_name, read_json

_NAME = re.compile(r"([A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9][A-Za-z0-9_.-]*)(?:@([A-Za-z0-9][A-Za-z0-9_./-]*))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
CONFIGS = ("config.json", "open_clip_config.json")
"""What a repository of one network, such as a T5 encoder, has at its root."""


@dataclass(frozen=True)
class HubName:
    """A repository, and a branch, tag or commit of it; None is the branch main."""

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"


def hub_name(text: str) -> HubName | None:
    """Read `owner/name[@revision]`; None where the text has another form, or is a file's name."""
    match = _NAME.fullmatch(text)
    if match is None or ".." in text or "--" in match[1] or match[1].endswith(".safetensors") or is_pickle_name(match[1]):
        return None
    return HubName(match[1], match[2])


def is_commit(text: str) -> bool:
    """Whether this is a whole commit id: 40 hex digits."""
    return _COMMIT.fullmatch(text) is not None


def is_offline() -> bool:
    """Whether the network may not be asked: `--offline`, or HF_HUB_OFFLINE=1."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def cache_folder() -> Path:
    """Where huggingface_hub keeps what it fetched: HF_HUB_CACHE, or `hub` in HF_HOME."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def storage_of(repo: str) -> Path:
    """The folder of a repository in the cache."""
    return cache_folder() / f"models--{repo.replace('/', '--')}"


def origin_of(folder: Path) -> HubName | None:
    """The repository and commit of a snapshot in a hub cache; None for any other folder."""
    storage, snapshots, commit = ("", "", *folder.absolute().parts)[-3:]
    if snapshots == "snapshots" and is_commit(commit) and storage.startswith("models--"):
        return HubName(storage.removeprefix("models--").replace("--", "/"), commit)
    return None


def cached(name: HubName) -> Path | None:
    """A model that was fetched whole: its folder, or its file where it is a single one. None where something is missing."""
    storage, revision = storage_of(name.repo), name.revision or "main"
    ref = storage / "refs" / revision
    commit = revision if is_commit(revision) else ref.read_text().strip() if ref.is_file() else ""
    snapshot = storage / "snapshots" / commit
    if not is_commit(commit) or not snapshot.is_dir():
        return None
    if (snapshot / "model_index.json").exists():  # fetched last
        return snapshot
    files = sorted(snapshot.glob("*.safetensors"))
    if any((snapshot / config).exists() for config in CONFIGS):
        shards = {shard for index in snapshot.glob("*.safetensors.index*.json") for shard in read_json(index).get("weight_map", {}).values()}
        return snapshot if files and all(inside(snapshot, shard).exists() for shard in shards) else None
    return files[0] if len(files) == 1 else None
