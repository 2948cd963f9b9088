"""A new folder or file, whole or not there: filled beside its place, synced, and given its name in one step."""

import os
import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ..errors import OutputError, UsageError

_COPIED = (".json", ".txt", ".model", ".safetensors", ".md")


@contextmanager
def staged_folder(out: Path) -> Generator[Path]:
    """A new folder to be filled, beside `out`; on success its files are synced and it takes that name, else it is removed.

    Raises:
        UsageError: `out` exists.
        OutputError: it could not be written.
    """
    absent(out)
    staged = out.with_name(f".{out.name}.{os.getpid()}.staged")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        staged.mkdir()
        yield staged
        for path in [*sorted(staged.rglob("*")), staged]:
            sync(path)
        if os.path.lexists(out):
            raise UsageError(f"--out {out.name!r} was made by another program meanwhile and is not overwritten; give another name.")
        staged.rename(out)
        sync(out.parent)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"--out {out.name!r} cannot be written ({error}); free space or give another place.") from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def absent(out: Path) -> Path:
    """The path, at which nothing is.

    Raises:
        UsageError: something is.
    """
    if os.path.lexists(out):
        raise UsageError(f"--out {out.name!r} exists and is never overwritten; give another name, or remove it first.")
    return out


def remove_staged(folder: Path) -> None:
    """Remove the folders that a killed run left staged in `folder`, which must be of that run alone."""
    for path in folder.glob(".*.staged"):
        shutil.rmtree(path, ignore_errors=True)


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` fill a file, sync it, and give it the name `path` in one step; an older file is replaced.

    It is filled in a folder of its own beside `path`, because safetensors writes to a temporary file beside the one that it is given; what a killed
    run left there is removed by the next.
    """
    unfinished = path.with_name(f".{path.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    write(unfinished / path.name)
    sync(unfinished / path.name)
    (unfinished / path.name).replace(path)
    unfinished.rmdir()
    sync(path.parent)


def copy_folder(source: Path, target: Path, copy: Callable[[Path, Path], object]) -> None:
    """Copy the files of a folder that a model is made of, not its subfolders."""
    target.mkdir(exist_ok=True)
    for path in sorted(source.iterdir()):
        if path.is_file() and (path.suffix in _COPIED or path.name.startswith("LICENSE")):
            copy(path, target / path.name)


def linked(source: Path, target: Path) -> None:
    """Give a file a second name."""
    os.link(os.path.realpath(source), target)


def sync(path: Path) -> None:
    """Have a file or folder written to the disk before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
