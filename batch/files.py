"""Files of a folder of pictures, written whole or not at all; what a killed process left half written is known by its name."""

from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from filelock import FileLock

from ..errors import OutputError
from ..pipeline import output

_PREFIX = ".batch-"

publish = partial(output.publish, prefix=_PREFIX)
replace = partial(output.replace, prefix=_PREFIX)


def sweep(folder: Path) -> None:
    """Remove what killed processes left half written; only for a process that is alone in the folder."""
    for path in folder.rglob(f"{_PREFIX}*"):
        path.unlink()


@contextmanager
def locked(path: Path) -> Generator[None]:
    """One process at a time.

    Raises:
        OutputError: the lock file `path` cannot be written.
    """
    lock = FileLock(path)
    try:
        lock.acquire()
    except OSError as error:
        raise OutputError(f"folder {path.parent.name!r} cannot be locked ({error.strerror}); give another --out.") from None
    try:
        yield
    finally:
        lock.release()
