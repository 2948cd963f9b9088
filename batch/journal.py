"""The journal of a folder of pictures: one JSON line for each picture that was made or failed, appended and synced, never rewritten.

A picture is done when its file and its line are there. A line that a power cut tore is left out and ended when the journal is opened again.
"""

import json
import os
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..errors import OutputError, UsageError
from .files import sweep

JOURNAL_FILE = "journal.jsonl"


@dataclass(frozen=True)
class Entry:
    """What became of an item.

    Attributes:
        key: the item's.
        line: of the prompt file.
        status: "done" or "failed".
        file: name of the picture; None when it failed.
        error: why it failed.
        truncated: encoder -> words that it did not see.
        fallbacks: what had to be done differently.
        score: of the picture, with `--best-of`.
        scores: of all its candidates, by seed; None for one that was lost.
    """

    key: str
    line: int
    status: str
    file: str | None = None
    error: str | None = None
    truncated: Mapping[str, str] = field(default_factory=dict[str, str])
    fallbacks: tuple[str, ...] = ()
    score: float | None = None
    scores: Mapping[str, float | None] = field(default_factory=dict[str, float | None])


def read_journal(folder: Path) -> dict[str, Entry]:
    """The last word on each item, by its key; lines that are torn or of a later version's making are passed over.

    Raises:
        OutputError: it cannot be read.
    """
    try:
        lines = (folder / JOURNAL_FILE).read_bytes().splitlines()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise OutputError(f"{JOURNAL_FILE} cannot be read ({error.strerror}); see to the folder's disk and permissions, then run again.") from None
    entries: dict[str, Entry] = {}
    for line in lines:
        with suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
            values: dict[str, Any] = json.loads(line)
            values["fallbacks"] = tuple(values.get("fallbacks", ()))
            entry = Entry(**values)
            entries[entry.key] = entry
    return entries


def append(folder: Path, entry: Entry) -> None:
    """Add a line and sync it to disk; lines of several processes do not mix.

    Raises:
        OutputError: it cannot be written.
    """
    data = (json.dumps({name: value for name, value in asdict(entry).items() if value not in (None, (), {})}) + "\n").encode()
    try:
        with FileLock(folder / f".{JOURNAL_FILE}.lock"), (folder / JOURNAL_FILE).open("ab+") as file:
            end = file.seek(0, os.SEEK_END)
            if end:
                file.seek(end - 1)
                if file.read(1) != b"\n":
                    data = b"\n" + data  # the line before was torn
            _write_all(file.fileno(), data)
            os.fsync(file.fileno())
    except OSError as error:
        raise OutputError(f"{JOURNAL_FILE} cannot be written ({error.strerror}); make room or give another --out, then run again.") from None


def _write_all(handle: int, data: bytes) -> None:
    while data:
        data = data[os.write(handle, data) :]


@contextmanager
def only_run(folder: Path, part: tuple[int, int]) -> Generator[None]:
    """Hold the folder for this process: alone, or one of several parts of which each is held once. A killed process holds nothing.

    What killed processes left half written is removed, once no other process is at work.

    Args:
        folder: of the pictures.
        part: (number, of how many); (1, 1) is the whole.

    Raises:
        UsageError: another process renders this part, or divides the folder otherwise.
        OutputError: the folder cannot be written.
    """
    with ExitStack() as held:
        try:
            with FileLock(folder / ".start.lock"):
                held.enter_context(FileLock(_lock(folder, part), timeout=0))
                others = [path for path in folder.glob(".part-*.lock") if path != _lock(folder, part) and _is_held(path)]
                for path in others:
                    if not path.name.endswith(f"-of-{part[1]}.lock"):
                        raise Timeout(str(path))
                if not others:
                    sweep(folder)
        except Timeout as timeout:
            which = Path(timeout.lock_file).stem.removeprefix(".")
            raise UsageError(f"another process is rendering into {folder.name!r} ({which}); wait for it, or stop it.") from None
        except OSError as error:
            raise OutputError(f"folder {folder.name!r} cannot be locked ({error.strerror}); give another --out.") from None
        yield


def _is_held(path: Path) -> bool:
    try:
        with FileLock(path, timeout=0):
            return False
    except Timeout:
        return True


def _lock(folder: Path, part: tuple[int, int]) -> Path:
    return folder / f".part-{part[0]}-of-{part[1]}.lock"
