"""Reading LAION-style shards: what is in them comes out in order, every fault has its name, and the account closes."""

import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from shard_sets import FORMATS, encoded, members_of, tar_bytes, write
from tu_diffuse.errors import DataError
from tu_diffuse.shards.check import check_shard
from tu_diffuse.shards.index import ShardIndex, accept, index_shards, join_reports, load_shards

Members = list[tuple[str, bytes]]


def index(*paths: Path, skip_damaged: bool = True, max_lost: float = 1.0, **options: bool) -> ShardIndex:
    return index_shards([str(path) for path in paths], skip_damaged=skip_damaged, max_lost=max_lost, **options)


def assert_closes(found: ShardIndex, runs: int, members: int) -> None:
    assert len(found.samples) + sum(found.skipped.values()) == runs
    assert sum(found.members.values()) == members


@pytest.mark.parametrize("tar_format", FORMATS)
def test_samples_come_out_as_they_went_in(tmp_path: Path, tar_format: str):
    paths = [write(tmp_path / f"{i}.tar", members_of(5, first=5 * i), tar_format) for i in range(2)]
    found = index(*paths, skip_damaged=False)
    assert [(s.shard, s.key, s.caption) for s in found.samples] == [(i // 5, f"{i:09d}", f"caption {i}") for i in range(10)]
    assert [found.metadata(i)["n"] for i in range(10)] == list(range(10))
    for i in (7, 0, 9, 3):  # any order
        assert found.picture(i).dtype == np.uint8
        assert found.picture(i).shape == (8, 9, 3)
        assert found.picture(i)[0, 0].tolist() == [i, 0, 255 - i]
    assert_closes(found, 10, 30)
    assert (found.skipped, found.vanished, found.damages) == ({}, 0, ())
    assert found.members == {"used": 30, "skipped": 0, "ignored": 0}
    for sample, path in zip(found.samples, [paths[0]] * 5 + [paths[1]] * 5, strict=True):
        assert path.read_bytes()[sample.offset : sample.offset + sample.size] == encoded(int(sample.key))


def test_load_shards_gives_all_at_once(tmp_path: Path):
    pictures, captions, columns = load_shards([write(tmp_path / "a.tar", members_of(5))])
    assert np.array_equal(pictures[:, 0, 0], [[i, 0, 255 - i] for i in range(5)])
    assert captions == [f"caption {i}" for i in range(5)]
    assert columns == [{"n": i} for i in range(5)]
    odd = [("9.png", encoded(9, side=12)), ("9.txt", b"larger")]
    with pytest.raises(DataError, match="pictures of 2 sizes"):
        load_shards([write(tmp_path / "b.tar", members_of(2) + odd)])


def test_fingerprint_tells_data_apart_but_not_places(tmp_path: Path):
    (tmp_path / "elsewhere").mkdir()
    same = [index(write(folder / "a.tar", members_of(3))).fingerprint() for folder in (tmp_path, tmp_path / "elsewhere")]
    other = members_of(3)
    other[4] = (other[4][0], b"caption 7")
    assert same[0] == same[1] != index(write(tmp_path / "c.tar", other)).fingerprint()


def replaced(members: Members, name: str, content: bytes | None) -> Members:
    """The members with the content of one changed, or without it."""
    return [(n, content if n == name and content is not None else c) for n, c in members if n != name or content is not None]


FAULTS: dict[str, tuple[str, Members]] = {
    "no picture": ("no picture", replaced(members_of(3), "000000001.png", None)),
    "no caption": ("no caption", replaced(members_of(3), "000000001.txt", None)),
    "empty caption": ("empty caption", replaced(members_of(3), "000000001.txt", b"")),
    "blank caption": ("empty caption", replaced(members_of(3), "000000001.txt", b" \n\t")),
    "caption in another encoding": ("bad caption", replaced(members_of(3), "000000001.txt", "Löwe".encode("latin-1"))),
    "json cut": ("bad json", replaced(members_of(3), "000000001.json", b'{"n": ')),
    "json list": ("bad json", replaced(members_of(3), "000000001.json", b"[1]")),
    "json empty": ("bad json", replaced(members_of(3), "000000001.json", b"")),
    "json nested too deep": ("bad json", replaced(members_of(3), "000000001.json", b'{"n":' * 100_000)),
    "picture of no bytes": ("picture", replaced(members_of(3), "000000001.png", b"")),
    "picture is a web page": ("picture", replaced(members_of(3), "000000001.png", b"<html><body>404 Not Found</body></html>")),
    "picture is a GIF": ("picture", replaced(members_of(3), "000000001.png", encoded(1, "GIF"))),
    "picture too large": ("too large", replaced(members_of(3), "000000001.png", encoded(1) + bytes(1 << 26))),
    "caption too large": ("too large", replaced(members_of(3), "000000001.txt", b"a" * (1 << 21))),
    "two pictures": ("duplicate key", [*members_of(2), ("000000001.jpg", encoded(1, "JPEG")), *members_of(1, first=2)]),
    "name leads out": ("bad name", [(n.replace("000000001", "../000000001"), c) for n, c in members_of(3)]),
    "name is absolute": ("bad name", [(n.replace("000000001", "/etc/000000001"), c) for n, c in members_of(3)]),
    "name is a drive": ("bad name", [(n.replace("000000001", "C:\\000000001"), c) for n, c in members_of(3)]),
    "name controls the terminal": ("bad name", [(n.replace("000000001", "\x1b[2J"), c) for n, c in members_of(3)]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_has_its_name_and_costs_one_sample(tmp_path: Path, fault: str):
    reason, members = FAULTS[fault]
    path = write(tmp_path / "a.tar", members)
    found = index(path)
    assert found.skipped == {reason: 1}
    assert [s.caption for s in found.samples] == ["caption 0", "caption 2"]
    assert_closes(found, 3, len(members))
    _, placed = tar_bytes(members)
    (damage,) = found.damages
    assert damage.reason == reason
    assert damage.offset in [member.start for member in placed if member.key not in ("000000000", "000000002")]
    with pytest.raises(DataError, match=rf"a\.tar is damaged at byte {damage.offset}, sample "):
        index(path, skip_damaged=False)


def test_split_and_repeated_keys(tmp_path: Path):
    first, second, third = (members_of(1, first=i) for i in range(3))
    split = index(write(tmp_path / "split.tar", first[:1] + second + first[1:] + third))
    assert split.skipped == {"split key": 2}  # two runs of one key: which caption belongs to which picture cannot be known
    assert [s.key for s in split.samples] == ["000000001", "000000002"]
    assert_closes(split, 4, 9)
    repeated = index(write(tmp_path / "repeated.tar", first + second + first + third))
    assert repeated.skipped == {"duplicate key": 1}
    assert [s.key for s in repeated.samples] == ["000000000", "000000001", "000000002"]
    assert_closes(repeated, 4, 12)
    adjacent = index(write(tmp_path / "adjacent.tar", first + first + second))
    assert adjacent.skipped == {"duplicate key": 1}
    assert [s.key for s in adjacent.samples] == ["000000001"]
    assert_closes(adjacent, 2, 9)


def test_equal_keys_in_two_shards_are_two_samples(tmp_path: Path):
    assert len(index(*(write(tmp_path / f"{i}.tar", members_of(2)) for i in range(2)), skip_damaged=False).samples) == 4


def test_what_is_not_ours_is_passed_over_and_counted(tmp_path: Path):
    own = members_of(2)
    foreign = [
        ("000000000.pkl", b"cos\nsystem\n(S'false'\ntR."),
        ("000000001.cls", b"3"),
        ("000000001.seg.png", encoded(1)),
        ("._0.jpg", b"x"),
        ("x/.txt", b"x"),
    ]
    found = index(write(tmp_path / "a.tar", [own[0], foreign[0], *own[1:], *foreign[1:]]), skip_damaged=False)
    assert [s.key for s in found.samples] == ["000000000", "000000001"]
    assert found.members == {"used": 6, "skipped": 0, "ignored": 5}


def test_names_in_folders_and_in_capitals(tmp_path: Path):
    members = [
        ("a/1.JPG", encoded(1, "JPEG")),
        ("a/1.TXT", b"one"),
        ("b/1.jpeg", encoded(2, "JPEG")),
        ("b/1.txt", b"two"),
        ("2.webp", encoded(3, "WEBP")),
        ("2.txt", b"3"),
    ]
    assert [(s.key, s.caption) for s in index(write(tmp_path / "a.tar", members), skip_damaged=False).samples] == [
        ("a/1", "one"),
        ("b/1", "two"),
        ("2", "3"),
    ]


def random_faults(rng: random.Random) -> tuple[Members, Counter[str], list[tuple[str, str]]]:
    """Members of a shard with known defects; the reasons that must be counted, and the (key, caption) that must come out."""
    members: Members = []
    skipped: Counter[str] = Counter()
    survivors: list[tuple[str, str]] = []
    for i in range(rng.randint(3, 9)):
        picture, caption, metadata = members_of(1, first=i)
        fault = rng.choice(["", "", "no picture", "no caption", "empty caption", "bad json", "duplicate key"])
        run = {
            "no picture": [caption, metadata],
            "no caption": [picture, metadata],
            "empty caption": [picture, (caption[0], b""), metadata],
            "bad json": [picture, caption, (metadata[0], b"{")],
        }.get(fault, [picture, caption, metadata])
        order = rng.sample(run, len(run))  # download order is not alphabetical
        members += order
        if fault in ("", "duplicate key"):
            survivors.append((f"{i:09d}", f"caption {i}"))
        if fault == "duplicate key":
            between = members_of(1, first=100 + i)
            members += between + order
            survivors.append((f"{100 + i:09d}", f"caption {100 + i}"))
        skipped.update([fault] if fault else [])
    return members, skipped, survivors


def test_200_shards_with_known_defects_close_their_account(tmp_path: Path):
    reasons: Counter[str] = Counter()
    for seed in range(200):
        members, skipped, survivors = random_faults(random.Random(seed))
        report = check_shard(str(write(tmp_path / "a.tar", members, random.Random(seed).choice(tuple(FORMATS)))))
        assert report.skipped == skipped, seed
        assert [(s.key, s.caption) for s in report.samples] == survivors, seed
        assert sum(report.members.values()) == len(members), seed
        assert report.members["used"] == 3 * len(survivors), seed
        assert len(report.damages) == sum(skipped.values()), seed
        reasons.update(skipped)
    assert len(reasons) == 5
    assert min(reasons.values()) > 100


def stats(path: Path, successes: int) -> None:
    path.with_name(f"{path.stem}_stats.json").write_text(json.dumps({"count": successes + 3, "successes": successes}))


def test_stats_tell_how_many_samples_there_were(tmp_path: Path):
    path = write(tmp_path / "00000.tar", members_of(4))
    assert "1 of 1 shards have no _stats.json" in index(path).notes[0]
    stats(path, 4)
    whole = index(path, skip_damaged=False)
    assert (whole.vanished, whole.notes) == (0, ())
    stats(path, 6)
    short = index(path)
    assert short.vanished == 2
    assert short.damages[0].reason == "count"
    with pytest.raises(DataError, match=r"holds 4 samples but its _stats\.json counts 6"):
        index(path, skip_damaged=False)


def test_more_than_one_percent_lost_stops(tmp_path: Path):
    whole, hurt = write(tmp_path / "a.tar", members_of(99)), tmp_path / "b.tar"
    write(hurt, replaced(members_of(2), "000000001.txt", b""))
    found = index_shards([str(whole), str(hurt)], skip_damaged=True)  # 1 of 101
    assert (len(found.samples), found.skipped) == (100, {"empty caption": 1})
    write(hurt, replaced(replaced(members_of(2), "000000001.txt", b""), "000000000.txt", b""))
    with pytest.raises(
        DataError, match=r"2 of 101 samples are lost to 2 damaged places, more than the 1.00% allowed, first: .*b.tar is damaged at byte"
    ):
        index_shards([str(whole), str(hurt)], skip_damaged=True)
    assert len(index_shards([str(whole), str(hurt)], skip_damaged=True, max_lost=0.02).samples) == 99


def test_a_cut_shard_counts_what_it_must_have_lost(tmp_path: Path):
    data, placed = tar_bytes(members_of(50))
    whole, cut = tmp_path / "a.tar", tmp_path / "b.tar"
    whole.write_bytes(data)
    cut.write_bytes(data[: placed[3 * 20].start])
    with pytest.raises(DataError, match="Nobody knows how many samples are lost"):
        index_shards([str(cut)], skip_damaged=True)
    assert index(cut).vanished is None
    assert index(whole, cut).vanished == 30  # as its neighbour
    stats(cut, 21)
    assert index(whole, cut).vanished == 1  # as its own stats say
    assert index_shards([str(whole), str(cut)], skip_damaged=True, max_lost=0.02).vanished == 1


def test_a_hole_of_many_samples_is_estimated_by_its_bytes(tmp_path: Path):
    data, placed = tar_bytes(members_of(50))
    start, end = placed[3 * 10].start, placed[3 * 30].start
    path = tmp_path / "a.tar"
    path.write_bytes(data[:start] + bytes(end - start) + data[end:])
    found = index(path)
    assert (len(found.samples), found.vanished) == (30, 20)


def test_a_download_that_reserved_its_space_is_found(tmp_path: Path):
    data, placed = tar_bytes(members_of(40))
    cut = placed[60].start
    path = tmp_path / "a.tar"
    path.write_bytes(data[:cut] + bytes(2 << 20))  # every header before is whole, and zeros follow, as at a proper end
    report = check_shard(str(path))
    assert ([d.reason for d in report.damages], report.damages[0].offset, len(report.samples)) == (["zeros"], cut, 20)


@pytest.mark.parametrize(
    ("content", "offset"), [(b"", 0), (b"\x1f\x8b\x08" + bytes(range(256)) * 40, 0), (b"x" * 5000, 0)], ids=["empty", "gzip", "text"]
)
def test_a_file_that_is_no_tar_is_damaged_from_the_start(tmp_path: Path, content: bytes, offset: int):
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    report = check_shard(str(path))
    assert [(d.offset, len(report.samples)) for d in report.damages] == [(offset, 0)]
    with pytest.raises(DataError, match="damaged at byte 0"):
        accept(join_reports([report]))


def test_an_empty_shard_is_no_damage_but_an_empty_set_is_an_error(tmp_path: Path):
    path = write(tmp_path / "a.tar", [])
    assert check_shard(str(path)).damages == ()
    with pytest.raises(DataError, match="No whole sample was found"):
        index(path)


def test_a_shard_that_changed_after_indexing_is_an_error_of_the_picture(tmp_path: Path):
    path = write(tmp_path / "a.tar", members_of(3))
    found = index(path)
    path.write_bytes(path.read_bytes()[: found.samples[1].offset + 40] + bytes(9000))
    assert found.picture(0).shape == (8, 9, 3)
    with pytest.raises(DataError, match=rf"sample 000000001 in shard .*a.tar at byte {found.samples[1].offset} is damaged"):
        found.picture(1)
    path.write_bytes(b"")
    with pytest.raises(DataError, match="it has changed"):
        found.picture(2)


@pytest.mark.parametrize("name", ["sha256", "md5"])
def test_hashes_are_compared_on_request(tmp_path: Path, name: str):
    import hashlib

    members: Members = []
    for i in range(100):
        content = encoded(i)
        column = {name: hashlib.new(name, content).hexdigest()}
        if i % 3 == 0:  # a bit of the pixels, which decodes
            place = random.Random(i).randrange(45, len(content) - 20)
            content = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
        members += [(f"{i}.png", content), (f"{i}.txt", b"c"), (f"{i}.json", json.dumps(column).encode())]
    path = write(tmp_path / "a.tar", members)
    assert index(path, verify_hashes=True).skipped == {"hash": 34}
    assert index(path).skipped == {}
    found = index(write(tmp_path / "b.tar", members_of(2)), verify_hashes=True)
    assert any("2 samples carry no hash" in note for note in found.notes)
