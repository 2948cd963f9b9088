"""Every write fails once, and from there on: no broken picture under its name, one sentence, and the same pixels once the disk is well."""

import builtins
import errno
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tu_diffuse.batch import studio
from tu_diffuse.cli.main import run
from whole_folders import check_complete, digests

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


@pytest.fixture
def loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts of the model are loaded by the first run only."""

    def once(load: Callable[..., Any]) -> Callable[..., Any]:
        made: list[Any] = []

        def loaded(*arguments: Any, **named: Any) -> Any:
            if not made:
                made.append(load(*arguments, **named))
            return made[0]

        return loaded

    for name in ("load_texts", "load_experts", "load_codec"):
        monkeypatch.setattr(studio, name, once(getattr(studio, name)))


CASES = [
    ("", True),
    pytest.param("", False, marks=pytest.mark.slow),
    pytest.param("--memory 1e-4", True),
    pytest.param("--memory 1e-4", False, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("memory", "in_turn"), CASES)
@pytest.mark.usefixtures("loaded_once")
def test_every_write_fails(
    ensemble_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    memory: str,
    in_turn: bool,
) -> None:
    """With `in_turn`, each place has one fault, which happens once or lasts; otherwise all of them both ways."""
    (tmp_path / "p.txt").write_text("a\nb\n")
    common = ["batch", str(tmp_path / "p.txt"), "--model", str(ensemble_folder), "--steps", "2", *memory.split()]
    assert run([*common, "--out", str(tmp_path / "whole")]) == 0
    whole = digests(tmp_path / "whole")
    disk = Disk(tmp_path / "faulty", monkeypatch)
    assert run([*common, "--out", str(tmp_path / "faulty-not")]) == 0
    sites = disk.count
    assert sites > 30
    failed = 0
    for site in range(1, sites + 1):
        turn = [(FAULTS[site // 2 % 6], site % 2 == 0)]
        for fault, lasts in turn if in_turn else [(fault, lasts) for fault in FAULTS for lasts in (False, True)]:
            out = tmp_path / f"faulty-{site}-{fault}-{lasts}"
            capsys.readouterr()
            disk.fails(site, lasts, fault)
            code = run([*common, "--out", str(out)])
            said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tu-diffuse:")]
            if fault == "short":
                assert code == 0
            elif lasts:
                assert code == 74, (site, fault, said)
            assert (code, len(said)) in ((0, 0), (74, 1)), (site, fault, said)
            assert not [line for line in said if "unexpected" in line]
            if out.exists():
                assert digests(out).items() <= whole.items()
            failed += code == 74
            disk.fails(0, False, "")
            assert run([*common, "--out", str(out)]) == 0
            check_complete(out, whole)
    assert failed > sites / 2
