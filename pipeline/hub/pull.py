"""Fetching a model of the Hugging Face hub: resolved once to a commit, and every file is of that commit. Done by huggingface_hub, into its cache.

A download that breaks off is taken up again by the library; a pull that was stopped keeps the files that were finished.
"""

import errno
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # before the import: the library would also ask the hub which programs it may be part of

from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]  # of the library that it is built on: httpx, or httpx2
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import tqdm

from ...errors import HubError, OutputError, TuDiffuseError, UsageError
from ...model_files import inside, read_json
from ..model.allowed import allowed_parts
from .choice import choose
from .models import HubName, cache_folder, cached, is_commit, is_offline, storage_of

_BLOCK = 2**20


@dataclass(frozen=True)
class HubFile:
    """A file of a repository.

    Attributes:
        path: relative, with forward slashes.
        size: in bytes.
        sha256: of a large file, 64 hex digits; None where the hub records only git's name for it.
        git_sha1: git's name for its content (of a large file: for a pointer to it).
    """

    path: str
    size: int
    sha256: str | None
    git_sha1: str


@dataclass(frozen=True)
class Pull:
    """What is fetched.

    Attributes:
        name: as it was asked for.
        commit: what that is now.
        folder: the snapshot in the cache.
        files: all that are chosen, in the order in which they are fetched.
        missing: those of them that are not in the cache.
    """

    name: HubName
    commit: str
    folder: Path
    files: tuple[HubFile, ...]
    missing: tuple[HubFile, ...]


def pull(name: HubName, variant: str | None = None) -> Path:
    """Fetch a model, and say so on standard error; see `plan_pull` and `fetch`."""
    return fetch(plan_pull(name, variant), announce)


def announce(work: Pull, file: HubFile | None) -> None:
    """Say on standard error what is fetched; a `tell` for `fetch`."""
    if file is None:
        print(f"fetching {work.name} (commit {work.commit[:12]}): {len(work.missing)} files, {megabytes(work.missing)} MB", file=sys.stderr)
    elif not sys.stderr.isatty():  # a terminal gets the library's bars
        print(f"{file.path} {megabytes([file])} MB", file=sys.stderr)


def megabytes(files: Iterable[HubFile]) -> float:
    """Size of files, in megabytes with one decimal."""
    return round(sum(file.size for file in files) / 1e6, 1)


def plan_pull(name: HubName, variant: str | None = None, only: Sequence[str] = ()) -> Pull:
    """Ask the hub which commit a name means and which of its files are wanted. Fetches at most one small file.

    Args:
        name: the model.
        variant: see `hub_choice.choose`.
        only: see there.

    Raises:
        UsageError: no such model or revision, no access to it, or nothing may be asked; or as `hub_choice.choose`.
        UnsafeError: weights are there as pickles only, or `model_index.json` names a class that is not allowed.
        ModelError: the repository holds no model.
        HubError: the hub cannot be reached, or its answer makes no sense.
    """
    with _asking(name):
        api = HfApi()
        commit = api.model_info(name.repo, revision=name.revision or constants.DEFAULT_REVISION).sha
        if commit is None or not is_commit(commit):
            raise HubError(f"the hub gives {commit!r:.80} as commit of {name}, which is none; try again later.")
        files = listing(HubName(name.repo, commit))
        snapshot = storage_of(name.repo) / "snapshots" / commit
        parts = None
        if "model_index.json" in files and not only:
            parts = allowed_parts(name.repo, _model_index(name, commit, snapshot))
        chosen = tuple(files[path] for path in choose(files, parts, variant, only))
    return Pull(name, commit, snapshot, chosen, tuple(file for file in chosen if not (snapshot / file.path).exists()))


def listing(name: HubName) -> dict[str, HubFile]:
    """All files of a repository, by path.

    Raises:
        ModelError: a name that leads out of the folder.
        UsageError, HubError: as `plan_pull`.
    """
    with _asking(name):
        entries = [entry for entry in HfApi().list_repo_tree(name.repo, revision=name.revision, recursive=True) if isinstance(entry, RepoFile)]
    for entry in entries:
        inside(Path(name.repo), entry.path)
    return {entry.path: HubFile(entry.path, entry.size, None if entry.lfs is None else entry.lfs.sha256, entry.blob_id) for entry in entries}


def fetch(work: Pull, tell: Callable[[Pull, HubFile | None], None]) -> Path:
    """Fetch what is missing of a model. Each file appears whole or not at all, and has the hash that the hub records for it.

    Args:
        work: from `plan_pull`.
        tell: called with None when there is something to fetch, and then with each file before it is.

    Returns:
        The model: its folder, or where a single file was chosen, that file.

    Raises:
        OutputError: the cache cannot be written, or the disk is too small.
        UsageError, HubError: as `plan_pull`.
    """
    if work.missing:
        _check_room(work)
        tell(work, None)
    for file in work.missing:
        tell(work, file)
        with _asking(work.name):
            path = Path(hf_hub_download(work.name.repo, file.path, revision=work.commit, tqdm_class=_Bar))
            if path != work.folder / file.path:
                raise HubError(f"the hub sent {file.path} of another commit than was asked for; try again later.")
            if not matches(path, file.sha256, file.git_sha1):
                path.resolve().unlink()
                path.unlink()
                raise HubError(f"{file.path} of {work.name} came with another content than the hub records; run the same command again.")
    revision = work.name.revision or constants.DEFAULT_REVISION
    if not is_commit(revision):
        _write_ref(storage_of(work.name.repo) / "refs" / revision, work.commit)
    weights = [file.path for file in work.files if file.path.endswith(".safetensors")]
    whole = cached(HubName(work.name.repo, work.commit))
    return whole if whole is not None else work.folder / weights[0] if len(weights) == 1 else work.folder


def matches(path: Path, sha256: str | None, git_sha1: str | None) -> bool:
    """Whether a file has the content that the hub records: by SHA-256, or where there is none, by git's name for it."""
    digest = hashlib.sha256() if sha256 is not None else hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest() == (git_sha1 if sha256 is None else sha256)


def _model_index(name: HubName, commit: str, snapshot: Path) -> dict[str, Any]:
    """Read `model_index.json` without putting it into the snapshot, which it would make look whole."""
    if (snapshot / "model_index.json").exists():
        return read_json(snapshot / "model_index.json")
    with tempfile.TemporaryDirectory() as folder:
        return read_json(Path(hf_hub_download(name.repo, "model_index.json", revision=commit, local_dir=folder, tqdm_class=_Bar)))


def _check_room(work: Pull) -> None:
    cache = cache_folder()
    place = next(folder for folder in (cache, *cache.parents) if folder.is_dir())
    free = shutil.disk_usage(place).free
    if sum(file.size for file in work.missing) > free:
        raise OutputError(
            f"{work.name} needs {megabytes(work.missing)} MB and {cache} has {free / 1e6:.1f} MB free; free some, or name another place with HF_HOME."
        )


def _write_ref(path: Path, commit: str) -> None:
    if path.is_file() and path.read_text() == commit:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        draft.write_text(commit)
        draft.replace(path)
    except OSError as error:
        raise OutputError(f"the hub's cache {cache_folder()} cannot be written ({error.strerror}); name another place with HF_HOME.") from None


@contextmanager
def _asking(name: HubName) -> Generator[None]:
    """Nothing is asked offline; whatever the library raises becomes one of our errors."""
    if is_offline():
        raise UsageError(f"{name} is not whole in the hub's cache, and offline nothing is fetched; pull it without --offline and HF_HUB_OFFLINE.")
    try:
        yield
    except TuDiffuseError:
        raise
    except GatedRepoError:
        raise UsageError(
            f"{name.repo} is gated: accept its terms on its page, then set HF_TOKEN to a token of yours, or log in with: hf auth login."
        ) from None
    except RepositoryNotFoundError:
        raise UsageError(
            f"the hub has no model {name.repo!r} that you may see; correct the name, or if it is private, set HF_TOKEN to a token of yours."
        ) from None
    except RevisionNotFoundError:
        raise UsageError(f"{name.repo} has no revision {name.revision or 'main'!r}; name a branch, a tag or a whole commit id.") from None
    except HFValidationError as error:
        raise UsageError(f"{name.repo!r} is no name of a model on the hub ({_first_line(error)}); write owner/name.") from None
    except OfflineModeIsEnabled:
        raise UsageError(f"{name} is not whole in the hub's cache, and HF_HUB_OFFLINE is set; fetch it once without that.") from None
    except HfHubHTTPError as error:
        raise HubError(f"the hub answers {error.response.status_code} when asked for {name}; run the same command again later.") from None
    except (EntryNotFoundError, HTTPError) as error:
        said = error if error.__cause__ is None else error.__cause__
        raise HubError(
            f"the hub cannot be reached, or broke off while sending {name} ({_first_line(said)}); run the same command again; whole files are kept."
        ) from None
    except OSError as error:
        if error.errno is None:  # the library's own, for sizes that differ
            raise HubError(f"{name} did not come whole ({_first_line(error)}); run the same command again.") from None
        hint = "free some space, or name another place with HF_HOME" if error.errno == errno.ENOSPC else "name another place with HF_HOME"
        raise OutputError(f"the hub's cache {cache_folder()} cannot be written ({error.strerror}); {hint}.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise HubError(f"the hub's answer about {name} makes no sense ({type(error).__name__}); try again later.") from None


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200].rstrip(".") if text else type(error).__name__


class _Bar(tqdm):
    """The library's progress, on terminals only."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options | {"disable": None})
