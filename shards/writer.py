"""Filtered copies of shards: the members of the samples that are kept, byte for byte, in shards of the same names and layout."""

import json
import os
import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from ..errors import DataError, OutputError, UsageError
from .check import Sample
from .index import ShardIndex
from .scan import BLOCK
from .specs import open_shard, shard_name

_RECORD = 10240  # tar files are padded to multiples of this
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Written:
    """One shard that was written: its path, the location it was copied from, the number of samples, and of those left out by reason."""

    path: Path
    source: str
    kept: int
    dropped: dict[str, int]


def write_filtered(index: ShardIndex, reasons: Sequence[str | None], out: Path) -> Iterator[Written]:
    """Write every shard of an index again with a part of its samples; yields after each shard.

    A shard appears under its name complete and synced to disk, then its `_stats.json` with img2dataset's fields, in which the samples that are left
    out are counted by reason. A shard of which nothing is kept is written empty, so that brace patterns still hold.

    Args:
        index: of whole samples.
        reasons: for each sample why it is left out, None to keep it.
        out: folder, made when missing.

    Raises:
        UsageError: two shards have one file name.
        OutputError: a file of that name exists, or the folder cannot be written.
        DataError: a shard changed since it was indexed.
    """
    paths = shard_paths(index.shards, out)
    for path in paths:
        for final in (path, stats_path(path)):
            if os.path.lexists(final):
                raise OutputError(f"{str(final)!r} exists and is never overwritten; give another --out.")
    make_folder(out)
    for location, path, numbers in zip(index.shards, paths, samples_by_shard(index), strict=True):
        kept = [index.samples[i] for i in numbers if reasons[i] is None]
        dropped = count_reasons(reasons[i] for i in numbers)
        encodings = [(each.start, each.end) for each in index.encodings if index.shards[each.shard] == location]
        _write_shard(location, encodings, kept, path)
        write_stats(path, len(kept), dropped)
        yield Written(path, location, len(kept), dropped)


def shard_paths(locations: Sequence[str], out: Path) -> list[Path]:
    """Where the shards made from these go: files of the same names in the folder `out`.

    Raises:
        UsageError: two shards have one file name.
    """
    paths = [out / _file_name(location) for location in locations]
    double = [name for name, count in Counter(path.name for path in paths).items() if count > 1]
    if double:
        raise UsageError(f"{double[0]!r} is the file name of more than one shard; write them into different folders.")
    return paths


def make_folder(out: Path) -> None:
    """Make a folder when it is missing; OutputError when that fails."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(out, error) from error


def samples_by_shard(index: ShardIndex) -> list[list[int]]:
    """The numbers of the samples of each shard."""
    of_shard: list[list[int]] = [[] for _ in index.shards]
    for i, sample in enumerate(index.samples):
        of_shard[sample.shard].append(i)
    return of_shard


def count_reasons(reasons: Iterable[str | None]) -> dict[str, int]:
    """How many samples are left out for each reason, most frequent first."""
    return dict(Counter(reason for reason in reasons if reason is not None).most_common())


def write_stats(path: Path, kept: int, dropped: Mapping[str, int]) -> None:
    """Write the `_stats.json` of the shard `path`, with img2dataset's fields."""
    stats = {
        "count": kept + sum(dropped.values()),
        "successes": kept,
        "failed_to_download": 0,
        "failed_to_resize": 0,
        "status_dict": {"success": kept, **dropped},
    }
    text = json.dumps(stats, indent=4).encode()
    publish(lambda file: file.write(text), stats_path(path))


def end_shard(file: BinaryIO) -> None:
    """Write the zeros that end a tar file; the last member may lack its padding."""
    end = file.tell() + -file.tell() % BLOCK + 2 * BLOCK
    file.write(bytes(end + -end % _RECORD - file.tell()))


def _write_shard(location: str, encodings: Sequence[tuple[int, int]], samples: Sequence[Sample], path: Path) -> None:
    with open_shard(location) as source:

        def write(file: BinaryIO) -> None:
            for start, end in encodings:
                _copy(source, start, end, file, location)
            for sample in samples:
                for start, end in zip(sample.spans[::2], sample.spans[1::2], strict=True):
                    _copy(source, start, end, file, location)
            end_shard(file)

        publish(write, path)


def _copy(source: BinaryIO, start: int, end: int, target: BinaryIO, location: str) -> None:
    source.seek(start)
    while start < end:
        chunk = source.read(min(_CHUNK, end - start))
        if not chunk:
            raise DataError(f"Shard {shard_name(location)} ends at byte {start} but was longer when it was indexed; run again.")
        target.write(chunk)
        start += len(chunk)


def publish(write: Callable[[BinaryIO], object], final: Path) -> None:
    """Write a file under a temporary name, sync it, and give it its final name in one step that fails when the name is taken."""
    partial = final.with_name(f".{final.name}.{secrets.token_hex(4)}.partial")
    try:
        try:
            with partial.open("xb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(partial, final)
            except FileExistsError:
                raise
            except OSError:  # a file system without hard links: reserve the name, then move onto the reservation
                os.close(os.open(final, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
                os.replace(partial, final)
        finally:
            with suppress(FileNotFoundError):
                partial.unlink()
        _sync_folder(final.parent)
    except FileExistsError:
        raise OutputError(f"{str(final)!r} exists and is never overwritten; give another --out.") from None
    except OSError as error:
        raise _unwritable(final.parent, error) from error


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _file_name(location: str) -> str:
    return PurePosixPath(shard_name(location).replace("\\", "/")).name


def stats_path(path: Path) -> Path:
    """The `_stats.json` beside a shard."""
    return path.with_name(path.name.removesuffix(".tar") + "_stats.json")


def _unwritable(folder: Path, error: OSError) -> OutputError:
    return OutputError(f"Folder {str(folder)!r} cannot be written ({error.strerror}); free space, or give another --out.")
