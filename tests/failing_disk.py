"""A disk that fails at its n-th write, in this process or in a worker of `batch --devices`."""

import builtins
import errno
import io
import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from tu_diffuse.batch import workers

FAULTS = ("ENOSPC", "EIO", "EACCES", "EROFS", "EMFILE", "short")


class Disk:
    """Counts what is written to a folder; at the `first` time, and from there on if `lasting`, it fails as `fault` says."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.first, self.lasting, self.fault = 0, 0, False, ""
        self._folder = str(folder)
        real_write, real_open, real_io_open = os.write, os.open, io.open

        def write(handle: int, data: Any) -> int:
            return real_write(handle, self._written(memoryview(data), lambda part: real_write(handle, part)))

        def opened(path: Any, flags: int, *rest: Any, **named: Any) -> int:
            if flags & (os.O_WRONLY | os.O_RDWR) and self._is_ours(path):
                self._site()
            return real_open(path, flags, *rest, **named)

        def opened_file(path: Any, mode: str = "r", *rest: Any, **named: Any) -> Any:
            if set(mode) & set("wax+") and self._is_ours(path):
                self._site()
            return real_io_open(path, mode, *rest, **named)

        for name in ("fsync", "rename", "replace", "link"):
            monkeypatch.setattr(os, name, self._guarded(getattr(os, name)))
        monkeypatch.setattr(os, "write", write)
        monkeypatch.setattr(os, "open", opened)
        monkeypatch.setattr(io, "open", opened_file)
        monkeypatch.setattr(builtins, "open", opened_file)
        monkeypatch.setattr(os, "fdopen", lambda handle, mode: io.BufferedWriter(_file(handle, self._written)))

    def fails(self, first: int, lasting: bool, fault: str) -> None:
        self.count, self.first, self.lasting, self.fault = 0, first, lasting, fault

    def _is_ours(self, path: Any) -> bool:
        return isinstance(path, str | os.PathLike) and str(path).startswith(self._folder)

    def _is_due(self) -> bool:
        self.count += 1
        return self.count == self.first or (self.lasting and self.count > self.first)

    def _site(self) -> None:
        if self._is_due() and self.fault != "short":
            number = getattr(errno, self.fault)
            raise OSError(number, os.strerror(number))

    def _guarded(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self._site()
            return real(*arguments)

        return call

    def _written(self, data: memoryview, write: Callable[[memoryview], Any]) -> memoryview:
        """What is to be written of `data`; a write that fails has written the half of it."""
        if not self._is_due():
            return data
        half = data[: max(1, len(data) // 2)]
        if self.fault == "short":
            return half
        write(half)
        number = getattr(errno, self.fault)
        raise OSError(number, os.strerror(number))


def _file(handle: int, written: Callable[..., memoryview]) -> io.FileIO:
    class File(io.FileIO):
        def write(self, data: Any) -> int:
            plain = super().write
            return plain(written(memoryview(data), plain))

    return File(handle, "w")


def work_with_faults(job: workers.Job, parent: Connection, first: int, lasting: bool, fault: str) -> None:
    """In the place of `workers._work`: the same with a disk that fails."""
    with pytest.MonkeyPatch.context() as patch:
        Disk(job.out, patch).fails(first, lasting, fault)
        workers._work(job, parent)
