"""The members of a tar file, and every place where it is damaged.

Python's tarfile takes a bad, zeroed or missing header anywhere after the first for the end of the archive and says nothing. Here the file is read
in seekable mode and, where tarfile stops, all that follows must be zeros, 512 bytes at least. Otherwise the place is a gap, and reading goes on at
the next block of 512 bytes that is a header with a right checksum. Nothing is extracted.
"""

import tarfile
from collections.abc import Generator, Iterator
from typing import Any, BinaryIO, NamedTuple, cast

BLOCK = 512
_CHUNK = 1 << 20
_MAX_HEADER = 1 << 20  # bytes that the headers of one member may take: a long name is a few kilobytes
_MAX_READS = 16  # of one member's headers: long name, long link, global and extended headers take 10
_MAX_TAIL = 1 << 20  # zeros at the end; writers pad to 10 KiB, so more is space that a download reserved and never filled


class Member(NamedTuple):
    """One member: its name, where its first header begins, its content begins, and the next header begins, the content's size, all in bytes.

    A file that is cut in the zeros after the content ends there. `plain` is false for folders, links, devices and sparse files.
    """

    name: str
    start: int
    data: int
    end: int
    size: int
    plain: bool


class Gap(NamedTuple):
    """A damaged place from byte `start` up to `end`, where reading goes on or the file is over.

    `reason` is "header" (a header that is flipped, zeroed or lies), "truncated" (the file ends too early) or "zeros" (a long end of zeros).
    """

    start: int
    end: int
    reason: str


def scan(file: BinaryIO) -> Iterator[Member | Gap]:
    """Yield the members and gaps of a tar in the order of the file, whose position the caller may move in between.

    Members with damaged headers lie in gaps; a member whose content is cut by the end of the file is a gap too. Raises OSError when the file
    cannot be read, and nothing else, whatever it holds.
    """
    held: Gap | None = None  # gaps that border on each other are one
    for event in _events(file):
        if isinstance(event, Member):
            if held is not None:
                yield held
                held = None
            yield event
        else:
            held = event if held is None else Gap(held.start, event.end, held.reason if event.reason == "header" else event.reason)
    if held is not None:
        yield held


def _events(file: BinaryIO) -> Iterator[Member | Gap]:
    size = file.seek(0, 2)
    start: int | None = 0
    while start is not None:
        end, cut = yield from _walk(file, start, size)
        gap = _gap(file, min(end, size), size, cut)
        if gap is None:
            return
        yield gap
        start = gap.end if gap.end < size else None


def _walk(file: BinaryIO, start: int, size: int) -> Generator[Member, None, tuple[int, bool]]:
    """Yield members from `start` on; returns where tarfile stopped, and whether that is a member that the end of the file cuts."""
    window = _Window(file)
    file.seek(start)
    end = start
    try:
        tar = tarfile.open(fileobj=cast(Any, window), mode="r:", errors="surrogateescape")  # noqa: SIM115 - owns nothing that needs closing
    except OSError:
        raise
    except Exception:  # hostile headers raise more than tarfile.TarError: ValueError, OverflowError, RecursionError
        return start, False
    while True:
        window.renew()
        try:
            info = tar.next()
        except OSError:
            raise
        except Exception:
            return end, False
        if info is None:
            return end, False
        cast(Any, tar).members.clear()  # else a shard of 10,000 samples keeps 30,000 of them
        if info.size < 0 or info.offset_data + info.size > tar.offset or tar.offset <= end:
            return end, False
        if info.offset_data + info.size > size:
            return end, True
        yield Member(info.name, end, info.offset_data, min(tar.offset, size), info.size, info.isreg() and not info.issparse())
        end = tar.offset


def _gap(file: BinaryIO, end: int, size: int, cut: bool) -> Gap | None:
    if cut:
        return Gap(end, size, "truncated")
    if _is_zero(file, end, size):
        if size - end < BLOCK:
            return Gap(end, size, "truncated")
        return Gap(end, size, "zeros") if size - end > _MAX_TAIL else None
    resume = _next_header(file, end + BLOCK, size)
    if resume is not None:
        return Gap(end, resume, "header")
    return Gap(end, size, "header" if size - end > 2 * BLOCK and _is_zero(file, size - 2 * BLOCK, size) else "truncated")


def _is_zero(file: BinaryIO, start: int, size: int) -> bool:
    file.seek(start)
    while start < size:
        chunk = file.read(_CHUNK)
        if not chunk or chunk.strip(b"\0"):
            return False
        start += len(chunk)
    return True


def _next_header(file: BinaryIO, start: int, size: int) -> int | None:
    """Where the next block with the checksum of a header lies; headers begin at multiples of 512 bytes."""
    for position in range(start, size, _CHUNK):
        file.seek(position)
        chunk = file.read(_CHUNK)
        for place in range(0, len(chunk) - BLOCK + 1, BLOCK):
            if not chunk[place + 148 : place + 156].strip(b" \0").isdigit():  # where the checksum stands; most blocks end here
                continue
            try:
                tarfile.TarInfo.frombuf(chunk[place : place + BLOCK], "utf-8", "surrogateescape")
            except (tarfile.TarError, ValueError):
                continue
            return position + place
    return None


class _Window:
    """What tarfile sees of a file: between two calls of `renew` so little that no header can ask for gigabytes or lead on to thousands of others."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.renew()

    def renew(self) -> None:
        self._bytes, self._reads = _MAX_HEADER, _MAX_READS

    def read(self, size: int = -1) -> bytes:
        self._reads -= 1
        if not 0 <= size <= self._bytes or self._reads < 0:
            raise tarfile.ReadError("a header is larger than any writer makes it")
        self._bytes -= size
        return self._file.read(size)

    def seek(self, position: int) -> int:
        return self._file.seek(position)

    def tell(self) -> int:
        return self._file.tell()
