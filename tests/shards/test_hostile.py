"""Shards that mean harm: nothing is written, run or unpickled, nothing hangs, no header makes the reader ask for gigabytes."""

import json
import os
import pickle
import random
import sys
import tarfile
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from shard_sets import BLOCK, END, encoded, members_of, tar_bytes
from tu_diffuse.errors import DataError
from tu_diffuse.shards.check import check_shard
from tu_diffuse.shards.index import accept, index_shards, join_reports

WATCHED = ("open", "os.mkdir", "os.remove", "os.rename", "os.link", "os.symlink", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen")
WATCHED += ("pickle.find_class", "socket.connect", "shutil.unpack_archive")
_events: list[tuple[str, object]] | None = None


def _listen(event: str, arguments: tuple[object, ...]) -> None:
    if _events is not None and event in WATCHED:
        writes = event != "open" or any(sign in str(arguments[1]) for sign in "wax+")
        if writes:
            _events.append((event, arguments[0]))


sys.addaudithook(_listen)


@contextmanager
def nothing_happens() -> Iterator[None]:
    """No file is opened for writing, no process, pickle or connection comes to life."""
    global _events
    _events = []
    try:
        yield
        assert _events == []
    finally:
        _events = None


class Canary:
    def __reduce__(self):
        return os.mkdir, ("canary",)


def special(name: str, kind: bytes, target: str = "") -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info.tobuf(tarfile.GNU_FORMAT)


def with_size(name: str, size: int, content: bytes = b"") -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % BLOCK)


def with_records(name: str, records: dict[str, str], content: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    info.pax_headers = records
    return info.tobuf(tarfile.PAX_FORMAT) + content + bytes(-len(content) % BLOCK)


def everywhere(records: dict[str, str]) -> bytes:
    return tarfile.TarInfo.create_pax_global_header(records)


WHOLE = tar_bytes(members_of(2), tail=b"")[0]
BOMB = b"".join(special(f"{i}", tarfile.XHDTYPE) for i in range(1500))  # extended headers of extended headers
HOSTILE: dict[str, bytes] = {
    "leads out": tar_bytes([("../../evil.png", encoded(1)), ("../../evil.txt", b"x"), ("/tmp/evil.png", encoded(1)), ("/tmp/evil.txt", b"x")])[0],
    "symbolic link": special("9.png", tarfile.SYMTYPE, "/etc/passwd") + tar_bytes([("9.txt", b"x")])[0],
    "hard link": special("9.png", tarfile.LNKTYPE, "000000000.png") + tar_bytes([("9.txt", b"x")])[0],
    "device": special("9.png", tarfile.CHRTYPE) + special("8.png", tarfile.FIFOTYPE) + tar_bytes([("9.txt", b"x")])[0],
    "pickles": tar_bytes([(f"9.{suffix}", pickle.dumps(Canary())) for suffix in ("pkl", "pickle", "pyd", "pth", "npy", "jpg.pkl", "png")])[0],
    "pickle as picture and json": tar_bytes([(f"9.{suffix}", pickle.dumps(Canary())) for suffix in ("png", "txt", "json")])[0],
    "claims 10 GB": with_size("9.png", 10 * 2**30, encoded(1)),
    "claims 10 GB in binary": with_size("9.png", 2**60, encoded(1)),
    "negative size": with_size("9.png", -BLOCK),
    "negative size far back": with_size("9.png", -(10**12)),
    "size in a record": with_records("9.png", {"size": str(10**15)}, encoded(1)),
    "negative size in a record": with_records("9.png", {"size": "-4096"}, encoded(1)),
    "nonsense in a record": with_records("9.png", {"size": "1e9", "mtime": "nan", "GNU.sparse.map": "a,b", "GNU.sparse.size": "x"}, encoded(1)),
    "sparse": with_records("9.png", {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(2**50)}, b"99999999\n" * 500),
    "global size": everywhere({"size": "1"}),
    "global path": everywhere({"path": "../x.png"}),
    "extended headers without end": BOMB,
    "a name of 30 MB": with_size("././@LongLink", 30 << 20).replace(b"0" + bytes(100), b"L" + bytes(100), 1) + b"n" * (30 << 20),
    "json of 2**20 brackets": tar_bytes([("9.png", encoded(1)), ("9.txt", b"x"), ("9.json", b"[" * (1 << 20))])[0],
    "json with a number of 10**6 digits": tar_bytes([("9.png", encoded(1)), ("9.txt", b"x"), ("9.json", b'{"a": ' + b"9" * 1_000_000 + b"}")])[0],
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("place", ["first", "last"])
def test_hostile_members_do_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, place: str):
    hostile = HOSTILE[name].removesuffix(END)
    path = tmp_path / "a.tar"
    path.write_bytes(hostile + WHOLE + END if place == "first" else WHOLE + hostile + END)
    monkeypatch.chdir(tmp_path)
    tracemalloc.start()
    with nothing_happens():
        report = check_shard(str(path), verify_pictures=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20
    assert os.listdir(tmp_path) == ["a.tar"]
    assert len(report.samples) + sum(report.skipped.values()) == report.runs
    assert not {sample.key for sample in report.samples} - {"000000000", "000000001"}
    if place == "last":
        assert len(report.samples) == 2
    assert report.damages or report.members["ignored"]
    if name in ("hard link", "symbolic link", "device"):
        assert report.members["ignored"] == (2 if name == "device" else 1)  # whatever they point at


def test_canaries_are_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The control: the same pickle, loaded, does its harm, and the listener hears it."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssertionError), nothing_happens():
        pickle.loads(pickle.dumps(Canary()))
    assert os.listdir(tmp_path) == ["canary"]


def mutated(rng: random.Random, data: bytes) -> bytes:
    """Damage of several kinds at once, in headers above all."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 6)):
        block = rng.randrange(len(changed) // BLOCK) * BLOCK
        match rng.randrange(6):
            case 0:
                changed[block + rng.randrange(BLOCK)] ^= 1 << rng.randrange(8)
            case 1:  # another size, name or type, with a checksum that is right
                field = rng.choice(((0, 100), (124, 12), (156, 1), (257, 8)))
                changed[block + field[0] : block + sum(field)] = rng.choice((b"\xff", b"7", b"\0", b"L", b"x", b"/", b"-")) * field[1]
                changed[block + 148 : block + 156] = b" " * 8
                changed[block + 148 : block + 156] = b"%06o\0 " % sum(changed[block : block + BLOCK])
            case 2:
                del changed[block : block + BLOCK * rng.randint(1, 4)]
            case 3:
                changed[block:block] = changed[: BLOCK * rng.randint(1, 4)]
            case 4:
                changed[block : block + BLOCK] = rng.randbytes(BLOCK)
            case _:
                del changed[rng.randrange(len(changed)) :]
        if len(changed) < BLOCK:
            break
    return bytes(changed)


@pytest.mark.parametrize("part", range(4))
def test_2000_mutated_shards_give_a_report_and_nothing_else(tmp_path: Path, part: int):
    sources = [tar_bytes(members_of(3), tar_format)[0] for tar_format in ("ustar", "gnu", "pax")]
    path = tmp_path / "a.tar"
    reported = 0
    for seed in range(500 * part, 500 * part + 500):
        rng = random.Random(seed)
        data = mutated(rng, rng.choice(sources))
        path.write_bytes(data)
        with nothing_happens():
            report = check_shard(str(path), verify_pictures=True)
        assert len(report.samples) + sum(report.skipped.values()) == report.runs, seed
        assert all(0 <= sample.spans[0] < sample.offset < sample.spans[-1] <= len(data) for sample in report.samples), seed
        assert all(join_reports([report]).picture(i).ndim == 3 for i in range(len(report.samples))), seed
        reported += bool(report.damages)
        try:
            accept(join_reports([report]))
        except DataError:
            continue
        assert report.samples, seed
    assert reported > 400


def noise(rng: random.Random) -> bytes:
    return rng.randbytes(rng.randrange(20_000))


@pytest.mark.parametrize("make", [noise, lambda rng: rng.randbytes(100) * rng.randrange(100), lambda rng: bytes(rng.randrange(20_000)) + b"x"])
def test_noise_is_no_shard(tmp_path: Path, make: Callable[[random.Random], bytes]):
    for seed in range(100):
        (tmp_path / "a.tar").write_bytes(make(random.Random(seed)))
        with nothing_happens(), pytest.raises(DataError):
            index_shards([str(tmp_path / "a.tar")])


def test_3000_samples_take_little_memory(tmp_path: Path):
    columns = json.dumps(
        {"url": "https://example.com/" + "x" * 60, "exif": "{}" * 500, "punsafe": 0.1, "similarity": 0.3, "AESTHETIC_SCORE": 5.2}
    ).encode()
    content = {"png": encoded(1), "txt": b"a caption of an ordinary length, some ten words long, not more", "json": columns}
    data, _ = tar_bytes([(f"{i:09d}.{suffix}", content[suffix]) for i in range(3000) for suffix in content])
    path = tmp_path / "a.tar"
    path.write_bytes(data)
    del data, _
    tracemalloc.start()
    index = index_shards([str(path)])
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(index.samples) == 3000
    assert kept < 1000 * 3000  # bytes
    assert peak < 4000 * 3000
