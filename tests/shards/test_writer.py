"""Filtered copies: the same members byte for byte, nothing overwritten, nothing half written; and the numbers about a set."""

import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from shard_sets import FORMATS, encoded, members_of, tar_bytes, write
from tu_diffuse.errors import DataError, OutputError, UsageError
from tu_diffuse.shards import writer
from tu_diffuse.shards.filters import Filters, drop_reason
from tu_diffuse.shards.index import ShardIndex, index_shards
from tu_diffuse.shards.plot import draw_plot
from tu_diffuse.shards.stats import distributions, effects, words
from tu_diffuse.shards.writer import write_filtered


def indexed(*paths: Path, **options: bool) -> ShardIndex:
    return index_shards([str(path) for path in paths], **options)


def blocks(path: Path) -> dict[str, bytes]:
    """Each member with its headers, as bytes of the file."""
    data = path.read_bytes()
    with tarfile.open(path) as tar:
        return {m.name: data[m.offset : m.offset_data + m.size] for m in tar.getmembers()}


@pytest.mark.parametrize("tar_format", FORMATS)
def test_what_is_kept_is_copied_byte_for_byte(tmp_path: Path, tar_format: str):
    own, foreign = members_of(6), ("000000002.npy", b"numbers")
    members = [*own[:7], foreign, *own[7:]]  # between two members of a sample
    sources = [write(tmp_path / f"{i}.tar", members, tar_format) for i in range(2)]
    index = indexed(*sources)
    reasons = [None if i in (0, 2, 5, 7) else "odd" if i % 2 else "even" for i in range(12)]
    written = list(write_filtered(index, reasons, tmp_path / "out"))
    assert [(w.path.name, w.kept, w.dropped) for w in written] == [("0.tar", 3, {"odd": 2, "even": 1}), ("1.tar", 1, {"even": 3, "odd": 2})]
    for source, result, kept in zip(sources, written, ((0, 2, 5), (1,)), strict=True):
        wanted = {name: data for name, data in blocks(source).items() if int(name[:9]) in kept and name != foreign[0]}
        assert list(blocks(result.path).items()) == list(wanted.items())
        assert result.path.stat().st_size % 10240 == 0
    again = indexed(*(w.path for w in written), skip_damaged=False)
    assert [(s.shard, s.key, s.caption) for s in again.samples] == [
        (s.shard, s.key, s.caption) for i, s in enumerate(index.samples) if reasons[i] is None
    ]
    assert (again.notes, again.vanished) == ((), 0)  # the stats beside them agree
    stats = json.loads((tmp_path / "out" / "0_stats.json").read_text())
    assert stats == {"count": 6, "successes": 3, "failed_to_download": 0, "failed_to_resize": 0, "status_dict": {"success": 3, "odd": 2, "even": 1}}
    assert sorted(os.listdir(tmp_path / "out")) == ["0.tar", "0_stats.json", "1.tar", "1_stats.json"]


def test_a_shard_of_which_nothing_is_kept_is_written_empty(tmp_path: Path):
    index = indexed(*(write(tmp_path / f"{i}.tar", members_of(2)) for i in range(2)))
    written = list(write_filtered(index, ["no", "no", None, None], tmp_path / "out"))
    assert len(indexed(*(w.path for w in written)).samples) == 2


def test_what_is_whole_in_a_cut_shard_is_saved(tmp_path: Path):
    data, placed = tar_bytes(members_of(4))
    cut = tmp_path / "a.tar"
    cut.write_bytes(data[: placed[5].data + len(placed[5].content)])  # the last member of the second sample lacks its padding
    index = index_shards([str(cut)], skip_damaged=True, max_lost=1.0)
    assert len(index.samples) == 2
    (written,) = write_filtered(index, [None, None], tmp_path / "out")
    assert blocks(written.path).keys() == {p.name for p in placed[:6]}
    assert len(indexed(written.path).samples) == 2


@pytest.mark.parametrize("name", ["a.tar", "a_stats.json"])
def test_nothing_is_overwritten(tmp_path: Path, name: str):
    index = indexed(write(tmp_path / "a.tar", members_of(2)))
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("mine")
    with pytest.raises(OutputError, match=f"{name}' exists and is never overwritten"):
        list(write_filtered(index, [None, None], out))
    assert {path.name: path.read_text() for path in out.iterdir()} == {name: "mine"}
    with pytest.raises(OutputError, match="never overwritten"):
        list(write_filtered(index, [None, None], tmp_path))


def test_a_name_taken_while_writing_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    index = indexed(write(tmp_path / "a.tar", members_of(2)))
    out = tmp_path / "out"
    copy = writer._copy

    def taken_meanwhile(*arguments: object) -> None:
        (out / "a.tar").write_text("theirs")
        copy(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(writer, "_copy", taken_meanwhile)
    with pytest.raises(OutputError, match="never overwritten"):
        list(write_filtered(index, [None, None], out))
    assert {path.name: path.read_text() for path in out.iterdir()} == {"a.tar": "theirs"}


def test_shards_of_one_name_are_refused(tmp_path: Path):
    (tmp_path / "b").mkdir()
    index = indexed(write(tmp_path / "a.tar", members_of(1)), write(tmp_path / "b" / "a.tar", members_of(1)))
    with pytest.raises(UsageError, match=r"'a\.tar' is the file name of more than one shard"):
        list(write_filtered(index, [None, None], tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("failing", ["write", "fsync", "link"])
def test_a_failure_leaves_no_file_under_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str):
    index = indexed(write(tmp_path / "a.tar", members_of(2)))

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    if failing == "write":
        monkeypatch.setattr(writer, "_copy", fail)
    else:
        monkeypatch.setattr(os, failing, fail)
        monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OutputError, match=r"cannot be written \(No space left on device\)"):
        list(write_filtered(index, [None, None], tmp_path / "out"))
    assert not [path for path in (tmp_path / "out").iterdir() if path.stat().st_size]


def test_the_order_is_write_sync_name_sync_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    index = indexed(write(tmp_path / "a.tar", members_of(2)))
    calls: list[str] = []
    for name in ("fsync", "link"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, real=real: (calls.append(name), real(*a))[1])
    list(write_filtered(index, [None, None], tmp_path / "out"))
    assert calls == ["fsync", "link", "fsync"] * 2


def test_a_shard_that_changed_since_is_an_error(tmp_path: Path):
    path = write(tmp_path / "a.tar", members_of(2))
    index = indexed(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(DataError, match="was longer when it was indexed"):
        list(write_filtered(index, [None, None], tmp_path / "out"))
    assert not list((tmp_path / "out").iterdir())


def set_of(tmp_path: Path, columns: list[dict[str, object]]) -> ShardIndex:
    members = [
        part
        for i, each in enumerate(columns)
        for part in ((f"{i}.png", encoded(1)), (f"{i}.txt", b"c" * (i + 1)), (f"{i}.json", json.dumps(each).encode()))
    ]
    return indexed(write(tmp_path / "set.tar", members))


def test_statistics_count_values_and_what_is_missing(tmp_path: Path):
    given = [
        {"punsafe": 0.0, "LANGUAGE": "en", "width": 10, "height": 20},
        {"punsafe": None, "LANGUAGE": "de"},
        {"punsafe": 0.25, "LANGUAGE": "en"},
        {"punsafe": 1.0},
    ]
    index = set_of(tmp_path, given)
    filters = Filters(max_unsafe=0.25, language="en")
    found = {each.name: each for each in distributions(index.samples, filters)}
    unsafe = found["unsafe"]
    assert (unsafe.present, unsafe.missing, unsafe.lowest, unsafe.median, unsafe.highest) == (3, 1, 0.0, 0.25, 1.0)
    assert (unsafe.counts[0], unsafe.counts[-1], sum(unsafe.counts)) == (1, 1, 3)
    assert (unsafe.edges[0], unsafe.edges[-1], len(unsafe.edges)) == (0.0, 1.0, len(unsafe.counts) + 1)
    assert unsafe.kept == (None, 0.25)
    assert (found["watermark"].present, found["watermark"].missing, found["watermark"].counts) == (0, 4, ())
    assert (found["smaller_side"].lowest, found["aspect"].highest, found["aspect"].missing) == (10, 0.5, 3)
    assert (found["caption_characters"].lowest, found["caption_characters"].highest) == (1, 4)
    assert all(sum(each.counts) == each.present for each in found.values())
    language, nsfw = words(index.samples, filters)
    assert (language.counts, language.missing, language.kept) == ({"en": 2, "de": 1}, 1, "en")
    assert (nsfw.counts, nsfw.missing) == ({}, 4)


def test_effects_alone_together_and_only(tmp_path: Path):
    columns = [
        s.columns
        for s in set_of(tmp_path, [{"punsafe": u, "LANGUAGE": language} for u in (0.0, 0.5, None) for language in ("en", "de", None)]).samples
    ]
    filters = Filters(max_unsafe=0.1, language="en")
    (language, unsafe), together = effects(filters, columns)
    assert (language.name, language.dropped, language.missing, language.only) == ("language", 6, 3, 2)
    assert (unsafe.name, unsafe.dropped, unsafe.missing, unsafe.only) == ("unsafe", 6, 3, 2)
    assert together == 8 == sum(drop_reason(filters, each) is not None for each in columns)
    (language, unsafe), together = effects(Filters(max_unsafe=0.1, language="en", missing="keep"), columns)
    assert (language.dropped, language.missing, unsafe.dropped, unsafe.missing, together) == (3, 3, 3, 3, 5)


def test_plot_shows_every_column_and_greys_what_is_dropped(tmp_path: Path):
    index = set_of(tmp_path, [{"punsafe": u / 100, "similarity": 0.3, "LANGUAGE": "en"} for u in range(100)])
    blue, grey = (54, 116, 181), (196, 200, 206)

    def pixels(filters: Filters) -> dict[tuple[int, ...], int]:
        picture = draw_plot(distributions(index.samples, filters), words(index.samples, filters), "100 samples")
        assert picture.mode == "RGB"
        colours, counts = np.unique(np.asarray(picture).reshape(-1, 3), axis=0, return_counts=True)
        return {tuple(map(int, colour)): int(count) for colour, count in zip(colours, counts, strict=True)}

    free, filtered = pixels(Filters()), pixels(Filters(max_unsafe=0.5))
    assert grey not in free
    assert 0.8 < filtered[grey] / (free[blue] - filtered[blue]) < 1.25  # what was blue is grey now
    empty = draw_plot(distributions(index.samples, Filters())[:1], [], "one")
    full = draw_plot(distributions(index.samples, Filters()), words(index.samples, Filters()), "all")
    assert isinstance(empty, Image.Image)
    assert full.height > empty.height
