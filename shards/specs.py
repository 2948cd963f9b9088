"""Names of shards as people write them - brace patterns, globs, files, URLs - and reading what they name.

Local files are opened directly; `s3://`, `https://` and `http://` go through fsspec, whose back ends come with `pip install 'tu-diffuse[remote]'`.
"""

import errno
import glob
import itertools
import os
import re
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import unquote, urlsplit

from ..errors import DataError, TuDiffuseError, UnsafeError, UsageError

MAX_SHARDS = 100_000
REMOTE_SCHEMES = ("s3", "https", "http")
_MAX_BRACES = 20
_BUFFER = 1 << 16  # bytes of a local file that are read ahead
_REMOTE_BLOCK = 1 << 22  # bytes of one request
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):")  # two letters at least: C: is a drive


def expand(specs: Sequence[str]) -> list[str]:
    """Turn what a person wrote into shard locations: local paths and URLs, in the order given, globs sorted.

    Args:
        specs: each a path, a URL (file, s3, https, http), or either with brace patterns - `{00000..00099}` counts up or down and keeps leading
            zeros, `{a,b}` lists, groups may nest - and with the globs `*`, `?`, `[...]`, `**`. A glob takes names that end in .tar. Text in
            braces that is neither a range nor a list, and a path that exists as it is written, are taken literally. In an http(s) URL only `*` is
            a glob, because ? begins its query.

    Raises:
        UsageError: nothing is found, a file is missing or named twice, more than 100,000 shards, standard input, or a scheme that is not read.
        UnsafeError: `pipe:`, which would run a command.
    """
    if not specs:
        raise UsageError("No shards are named; give files, 'shards/{00000..00099}.tar', 'shards/*.tar', or https:// and s3:// URLs.")
    locations: list[str] = []
    for spec in specs:
        for name in _braces(_checked(spec)) if not os.path.exists(spec) else [spec]:
            locations += _found(name, spec)
            if len(locations) > MAX_SHARDS:
                raise UsageError(f"{spec!r} makes more than {MAX_SHARDS} shards; name fewer at a time.")
    seen: set[str] = set()
    for location in locations:
        identity = location if _is_remote(location) else os.path.realpath(location)
        if identity in seen:
            raise UsageError(f"Shard {shard_name(location)} is named twice; name each shard once.")
        seen.add(identity)
    return locations


def shard_name(location: str) -> str:
    """A location as it may be shown: a URL without its query and user part, which may hold secrets."""
    if not _is_remote(location):
        return location
    parts = urlsplit(location)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def open_shard(location: str) -> BinaryIO:
    """Open a shard for reading and seeking; whatever goes wrong while reading is an OSError.

    Raises:
        UsageError: there is no such shard, or a back end of fsspec is not installed.
        DataError: it cannot be read, or its server does not send parts of a file.
    """
    with _errors_of(location):
        if not _is_remote(location):
            return Path(location).open("rb", buffering=_BUFFER)
        system, path = _filesystem(location)
        file = system.open(path, "rb", block_size=_REMOTE_BLOCK)
        if file.size is None or (location.startswith("http") and len(system.cat_file(path, start=0, end=1)) > 1):
            raise DataError(f"The server of {shard_name(location)} does not send parts of a file; download the shard and name the file.")
        return cast(BinaryIO, _RemoteFile(file))


def read_range(location: str, start: int, size: int) -> bytes:
    """The `size` bytes of a shard from byte `start` on.

    Raises:
        UsageError, DataError: as `open_shard`; also a shard that is shorter.
    """
    with _errors_of(location):
        if _is_remote(location):
            system, path = _filesystem(location)
            data = cast(bytes, system.cat_file(path, start=start, end=start + size)) if size else b""
        else:
            with Path(location).open("rb", buffering=0) as file:
                file.seek(start)
                data = file.read(size)
    if len(data) != size:
        raise DataError(
            f"Shard {shard_name(location)} gave {len(data)} bytes from byte {start} on instead of {size}; it has changed, check it again."
        )
    return data


def read_beside(location: str, suffix: str) -> bytes | None:
    """The file that img2dataset wrote beside a shard (`00000.tar` and "_stats.json": `00000_stats.json`), None when there is none.

    Raises:
        UsageError, DataError: as `open_shard`.
    """
    head, query, tail = location.partition("?") if _is_remote(location) else (location, "", "")
    beside = head.removesuffix(".tar") + suffix + query + tail
    with _errors_of(beside):
        if not _is_remote(location):
            return Path(beside).read_bytes() if os.path.exists(beside) else None
        system, path = _filesystem(beside)
        try:
            return cast(bytes, system.cat_file(path)) if system.exists(path) else None
        except PermissionError:  # what object stores answer for a file that is not there
            return None


class _RemoteFile:
    """A file of fsspec, whose back ends raise anything, as a file that raises OSError; a message names no URL, which may hold secrets."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def __enter__(self) -> "_RemoteFile":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def read(self, size: int) -> bytes:
        wanted = min(size, self._file.size - self._file.tell())
        try:
            data = cast(bytes, self._file.read(size))
        except Exception as error:
            raise OSError(errno.EIO, _reason(error)) from error
        if len(data) < wanted:
            raise OSError(errno.EIO, "the connection ended early")
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


def _is_remote(location: str) -> bool:
    return location.partition("://")[0] in REMOTE_SCHEMES and "://" in location


def _checked(spec: str) -> str:
    if spec == "-":
        raise UsageError("Shards are read in any order, so standard input (-) cannot be one; name files.")
    match = _SCHEME.match(spec)
    scheme = match[1].lower() if match is not None else ""
    if scheme == "pipe":
        raise UnsafeError(f"{spec!r} would run a command, which no shard name may; name files, or https:// and s3:// URLs.")
    if scheme and (scheme not in ("file", *REMOTE_SCHEMES) or not spec[len(scheme) :].startswith("://") or "::" in spec):
        raise UsageError(f"{spec!r} is not a kind of URL that is read; use file://, s3://, https:// or http://.")
    if spec.count("{") > _MAX_BRACES:
        raise UsageError(f"{spec[:60]!r}... has more than {_MAX_BRACES} brace groups; write fewer.")
    if not scheme:
        return spec
    rest = spec[len(scheme) + 3 :]
    return unquote("/" + rest.partition("/")[2]) if scheme == "file" else f"{scheme}://{rest}"


def _braces(text: str) -> Iterator[str]:
    """Each text that a brace pattern stands for, in the order of a shell."""
    opening = text.find("{")
    closing = _closing(text, opening)
    if opening < 0 or closing < 0:
        yield text
        return
    head, inner, tail = text[:opening], text[opening + 1 : closing], text[closing + 1 :]
    match = _RANGE.fullmatch(inner)
    parts = _split(inner)
    if match is not None:
        choices: Iterator[str] = _count(match[1], match[2])
    elif len(parts) > 1:
        choices = itertools.chain.from_iterable(_braces(part) for part in parts)
    else:
        choices = (f"{{{inside}}}" for inside in _braces(inner))
    for choice in choices:
        for rest in _braces(tail):
            yield head + choice + rest


def _closing(text: str, opening: int) -> int:
    depth = 0
    for place in range(max(opening, 0), len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return place
    return -1


def _split(inner: str) -> list[str]:
    """Split at the commas that stand in no inner group."""
    parts, depth = [""], 0
    for letter in inner:
        depth += {"{": 1, "}": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _count(first: str, last: str) -> Iterator[str]:
    padded = any(len(end) > 1 and end.startswith("0") for end in (first, last))
    width = max(len(first), len(last)) if padded else 0
    low, high = int(first), int(last)
    return (f"{number:0{width}d}" for number in (range(low, high + 1) if low <= high else range(low, high - 1, -1)))


def _found(name: str, spec: str) -> list[str]:
    if _is_remote(name):
        if not any(sign in name for sign in ("*" if name.startswith("http") else "*?[")):
            return [name]
        with _errors_of(name):
            system, path = _filesystem(name)
            names = sorted(cast(list[str], system.glob(path)))
        found = [str(system.unstrip_protocol(path)) for path in names if path.endswith(".tar")]
    elif os.path.isdir(name):
        raise UsageError(f"{name!r} is a folder; name its shards, for example {str(Path(name) / '*.tar')!r}.")
    elif os.path.exists(name):
        return [name]
    elif glob.has_magic(name):
        found = sorted(path for path in glob.glob(name, recursive=True) if path.endswith(".tar"))
    else:
        raise UsageError(f"Shard {name!r} is not there{'' if name == spec else f' (from {spec!r})'}; correct the name.")
    if not found:
        raise UsageError(f"No shard (.tar) matches {name!r}; correct the pattern.")
    return found


def _filesystem(location: str) -> tuple[Any, str]:
    import fsspec

    try:
        return cast(tuple[Any, str], fsspec.core.url_to_fs(location))
    except ImportError as error:
        raise UsageError(
            f"{location.partition(':')[0]}:// needs a package that is not installed ({error}); run pip install 'tu-diffuse[remote]'."
        ) from error


@contextmanager
def _errors_of(location: str) -> Generator[None]:
    """Whatever fails inside is an error of ours that names the shard."""
    try:
        yield
    except (TuDiffuseError, MemoryError):
        raise
    except FileNotFoundError as error:
        what = "is not there, or its server does not answer" if _is_remote(location) else "is not there"
        raise UsageError(f"Shard {shard_name(location)} {what}; correct the name.") from error
    except Exception as error:  # the back ends of fsspec raise errors of their own libraries
        raise DataError(f"Shard {shard_name(location)} cannot be read ({_reason(error)}); check access and connection, then run again.") from error


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    status = getattr(error, "status", None)
    return f"{type(error).__name__} {status}" if isinstance(status, int) else type(error).__name__
