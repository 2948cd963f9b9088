"""Damaged shards: every one is reported, whole ones never, and what is whole in a damaged one still comes out.

What must come out is told by where the writer put each member, not by the reader.
"""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from shard_sets import BLOCK, Placed, checksum_holds, encoded, flip, members_of, some_shard, tar_bytes
from tu_diffuse.errors import DataError
from tu_diffuse.shards.check import ShardReport, check_shard
from tu_diffuse.shards.index import accept, join_reports

Damaged = tuple[bytes, bool, set[str], int]  # the shard; is it damaged; keys that must come out; members that must be seen


def keys(placed: list[Placed]) -> set[str]:
    return {member.key for member in placed}


def flipped_header(rng: random.Random) -> Damaged:
    data, placed = some_shard(rng)
    victim = rng.choice(placed)
    header = victim.start if rng.random() < 0.5 else victim.main
    changed = flip(data, header + rng.randrange(BLOCK), rng.randrange(8))
    if checksum_holds(changed[header : header + BLOCK]):
        return changed, False, keys(placed), len(placed)
    lost = header == victim.main  # without an extended header the member itself is still found
    return changed, True, keys(placed) - ({victim.key} if lost else set()), len(placed) - lost


def zeroed_header(rng: random.Random) -> Damaged:
    data, placed = some_shard(rng)
    victim = rng.choice(placed)
    header = victim.start if rng.random() < 0.5 else victim.main
    lost = header == victim.main
    return data[:header] + bytes(BLOCK) + data[header + BLOCK :], True, keys(placed) - ({victim.key} if lost else set()), len(placed) - lost


def cut_between_members(rng: random.Random) -> Damaged:
    data, placed = some_shard(rng)
    place = rng.randrange(len(placed))
    return data[: placed[place].start], True, keys(placed) - keys(placed[place:]), place


def cut_anywhere(rng: random.Random) -> Damaged:
    data, placed = some_shard(rng)
    cut = rng.randrange(len(data))
    lost = [member for member in placed if member.data + len(member.content) > cut]
    return data[:cut], cut < placed[-1].end + BLOCK, keys(placed) - keys(lost), len(placed) - len(lost)


def cut_picture(rng: random.Random) -> Damaged:
    members = members_of(rng.randint(2, 5))
    place = rng.randrange(0, len(members), 3)
    picture = encoded(rng.randrange(256), rng.choice(("JPEG", "PNG", "WEBP")), side=rng.randint(8, 40))
    members[place] = (members[place][0], picture[: rng.randrange(len(picture))])
    data, placed = tar_bytes(members)
    return data, True, keys(placed) - {placed[place].key}, len(placed)


def whole(rng: random.Random) -> Damaged:
    data, placed = some_shard(rng)
    return data, False, keys(placed), len(placed)


def assert_closes(report: ShardReport) -> None:
    assert len(report.samples) + sum(report.skipped.values()) == report.runs


KINDS = (flipped_header, zeroed_header, cut_between_members, cut_anywhere, cut_picture, whole)


def judge(kind: Callable[[random.Random], Damaged], seed: int, path: Path) -> bool:
    """Damage one shard and compare what is found with what must be; returns whether it is damaged."""
    data, damaged, survivors, members = kind(random.Random(f"{kind.__name__} {seed}"))
    path.write_bytes(data)
    report = check_shard(str(path), verify_pictures=kind in (cut_picture, whole))
    where = f"{kind.__name__} {seed}: {report.damages}"
    assert bool(report.damages) == damaged, where
    assert {sample.key for sample in report.samples} == survivors, where
    assert sum(report.members.values()) == members, where
    assert report.members["used"] == 3 * len(survivors), where
    assert_closes(report)
    for damage in report.damages:
        assert (damage.shard, 0 <= damage.offset <= len(data)) == (str(path), True), where
    if damaged:
        with pytest.raises(DataError, match=r"damaged at byte \d+"):
            accept(join_reports([report]))
    return damaged


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_damage_is_reported_and_the_rest_comes_out(kind: Callable[[random.Random], Damaged], tmp_path: Path):
    found = sum(judge(kind, seed, tmp_path / "00000.tar") for seed in range(300))
    assert found == 0 if kind is whole else found > 200  # of 300; the others are harmless, and pass


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_much_damage_is_reported(kind: Callable[[random.Random], Damaged], tmp_path: Path):
    for seed in range(1000, 6000):
        judge(kind, seed, tmp_path / "00000.tar")
