"""Encoded shards on disk: the same bytes for any number of threads, what goes on after an interruption, and every damage found."""

import errno
import io
import json
import struct
import tarfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoded_sets import CPU, encode, places, read, samples, write_set
from safetensors.torch import load
from shard_sets import flip, write
from tu_diffuse.errors import DataError, OutputError
from tu_diffuse.pipeline.model.folder import ModelFolder, open_folder
from tu_diffuse.shards.check import check_shard
from tu_diffuse.shards.index import ShardIndex, encoding_of
from tu_diffuse.shards.writer import write_filtered
from tu_diffuse.training import encode_shards as module
from tu_diffuse.training.encode_shards import encode_shards, load_encoder
from tu_diffuse.training.encoded import encoding_for, unpack


@pytest.mark.parametrize("threads", [0, 1, 5])
def test_threads_do_not_change_a_byte(ensemble: ModelFolder, tmp_path: Path, threads: int) -> None:
    index = write_set(tmp_path / "raw", [(32, 32), (40, 24)])
    encode(ensemble, index, tmp_path / "a", buckets=True, batch_size=4, threads=2)
    encode(ensemble, index, tmp_path / "b", buckets=True, batch_size=4, threads=threads)
    for path in sorted((tmp_path / "a").iterdir()):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    assert [sample.key for sample in read(tmp_path / "b").samples] == [f"{i:05d}" for i in range(18)]


def test_reading_computing_and_writing_overlap(ensemble: ModelFolder, raw: ShardIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The networks begin with the first batch only when the third was read, and the writer ends the first only when the second was computed."""
    third_read, second_computed = threading.Event(), threading.Event()
    met: list[bool] = []
    read_row, posteriors = module._read, module._posteriors

    def reading(index: ShardIndex, i: int, sizes: Any) -> Any:
        row = read_row(index, i, sizes)
        if i == 8:
            third_read.set()
        return row

    def computing(encoder: Any, rows: Any) -> Any:
        met.append(third_read.wait(30))
        found = posteriors(encoder, rows)
        if rows[0].sample.key == "00003":
            second_computed.set()
        return found

    class SlowFile(io.FileIO):
        def write(self, data: Any) -> int:
            if b"00000.encoded.safetensors" in data:
                met.append(second_computed.wait(30))
            return super().write(data)

    def publishing(fill: Any, final: Path) -> None:
        with SlowFile(final, "w") as file:
            fill(file)

    monkeypatch.setattr(module, "_read", reading)
    monkeypatch.setattr(module, "_posteriors", computing)
    monkeypatch.setattr(module, "publish", publishing)
    encode(ensemble, raw, tmp_path, batch_size=3, threads=1)
    assert met == [True] * 7
    assert len(read(tmp_path).samples) == 18


def test_run_again_keeps_what_is_done(ensemble: ModelFolder, raw: ShardIndex, tmp_path: Path) -> None:
    encode(ensemble, raw, tmp_path / "whole")
    seen: list[int] = []

    def stop(count: int) -> None:
        seen.append(count)
        if sum(seen) > 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode(ensemble, raw, tmp_path / "cut", batch_size=3, progress=stop)
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == ["0.tar", "0_stats.json"]
    (tmp_path / "cut" / "0_stats.json").unlink()  # killed between the two
    (tmp_path / "cut" / ".1.tar.0a1b2c3d.partial").write_bytes(b"half")  # killed while writing
    (tmp_path / "cut" / ".other.tar.0a1b2c3d.partial").write_bytes(b"of another run")
    first = (tmp_path / "cut" / "0.tar").stat()
    done = encode(ensemble, raw, tmp_path / "cut", batch_size=3)
    assert [(shard.kept, shard.was_there) for shard in done] == [(9, True), (9, False)]
    assert (tmp_path / "cut" / "0.tar").stat().st_mtime_ns == first.st_mtime_ns
    (tmp_path / "cut" / ".other.tar.0a1b2c3d.partial").unlink()
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == sorted(path.name for path in (tmp_path / "whole").iterdir())
    again, whole = read(tmp_path / "cut"), read(tmp_path / "whole")
    for i in range(18):
        one, other = unpack(again.features(i)), unpack(whole.features(i))
        assert all(torch.allclose(tensor, other[name], atol=1e-5) for name, tensor in one.items())
        assert again.metadata(i) == raw.metadata(i)


def test_a_full_disk_leaves_no_half_shard(ensemble: ModelFolder, raw: ShardIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class FullFile(io.BufferedWriter):
        def write(self, data: Any) -> int:
            if b"00012.encoded.safetensors" in data:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    def opening(self: Path, mode: str = "r", **options: Any) -> Any:
        return FullFile(io.FileIO(self, mode.replace("b", ""))) if mode == "xb" else open(self, mode, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", opening)
        with pytest.raises(OutputError, match="No space left on device"):
            encode(ensemble, raw, tmp_path, batch_size=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.tar", "0_stats.json"]
    assert [shard.was_there for shard in encode(ensemble, raw, tmp_path, batch_size=2)] == [True, False]


def test_what_is_there_and_made_otherwise_is_refused(ensemble: ModelFolder, sd1_folder: Path, raw: ShardIndex, tmp_path: Path) -> None:
    encode(ensemble, raw, tmp_path)
    before = (tmp_path / "0.tar").read_bytes()
    with pytest.raises(OutputError, match=r"encoded in another way .*dtype float32 instead of float16"):
        encode(ensemble, raw, tmp_path, "float16")
    with pytest.raises(OutputError, match=r"family clip-t5 instead of sd.*another vae"):
        encode(open_folder(sd1_folder), raw, tmp_path)
    with pytest.raises(OutputError, match="holds other samples than 8"):
        encode(ensemble, raw, tmp_path, reasons=["unsafe", *[None] * 17])
    assert (tmp_path / "0.tar").read_bytes() == before
    (tmp_path / "0.tar").write_bytes(flip(before, len(before) // 2, 3)[:-4096])
    with pytest.raises(OutputError, match="is damaged"):
        encode(ensemble, raw, tmp_path)
    write(tmp_path / "0.tar", samples(9, 0, [(32, 32)]))
    with pytest.raises(OutputError, match="is no encoded shard"):
        encode(ensemble, raw, tmp_path)


def test_samples_that_are_left_out_are_counted(ensemble: ModelFolder, raw: ShardIndex, tmp_path: Path) -> None:
    done = encode(ensemble, raw, tmp_path, reasons=["unsafe", None, "size", *[None] * 6, *["unsafe"] * 9])
    assert [(shard.kept, shard.dropped) for shard in done] == [(7, {"unsafe": 1, "size": 1}), (0, {"unsafe": 9})]
    assert [sample.key for sample in read(tmp_path).samples] == ["00001", *(f"{i:05d}" for i in range(3, 9))]
    assert json.loads((tmp_path / "1_stats.json").read_text())["status_dict"] == {"success": 0, "unsafe": 9}


def test_a_filtered_copy_still_says_how_it_was_encoded(sd1_folder: Path, raw: ShardIndex, tmp_path: Path) -> None:
    folder = open_folder(sd1_folder)
    encode(folder, raw, tmp_path / "encoded")
    index = read(tmp_path / "encoded")
    list(write_filtered(index, [None if i % 2 else "x" for i in range(18)], tmp_path / "half"))
    half = read(tmp_path / "half")
    stored = encoding_of(half)
    assert stored is not None
    assert stored.encoding == encoding_for(folder, 32, False, "float32")
    assert [half.features(i) for i in range(9)] == [index.features(2 * i + 1) for i in range(9)]
    assert half.members == {"used": 2 + 27, "skipped": 0, "ignored": 0}


def test_the_library_reads_what_is_stored(sd1_folder: Path, raw: ShardIndex, tmp_path: Path) -> None:
    """Plain tar and safetensors, without this package."""
    encode(open_folder(sd1_folder), raw, tmp_path)
    with tarfile.open(tmp_path / "0.tar") as tar:
        names = tar.getnames()
        files = {name: tar.extractfile(name).read() for name in names}  # type: ignore[union-attr]
    assert names[:4] == ["encoding.safetensors", "00000.encoded.safetensors", "00000.txt", "00000.json"]
    tensors = load(files["00000.encoded.safetensors"])
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "mean": (4, 16, 16),
        "std": (4, 16, 16),
        "sizes": (4,),
        "tokens": (16, 16),
    }
    empty = load(files["encoding.safetensors"])["tokens"]
    assert empty.shape == (16, 16)
    assert not torch.allclose(empty, tensors["tokens"])
    length = struct.unpack("<Q", files["encoding.safetensors"][:8])[0]
    said = json.loads(json.loads(files["encoding.safetensors"][8 : 8 + length])["__metadata__"]["tu-diffuse"])
    assert said["encoding"]["resolution"] == 32
    assert set(said["encoding"]["parts"]) == {"vae", "text_encoder", "tokenizer"}


def test_every_flipped_bit_is_found(ensemble: ModelFolder, raw: ShardIndex, tmp_path: Path) -> None:
    encode(ensemble, raw, tmp_path, "float16")
    whole = (tmp_path / "0.tar").read_bytes()
    rng = np.random.default_rng(0)
    spans = list(places(tmp_path / "0.tar"))
    assert len(spans) == 10
    path = tmp_path / "flipped.tar"
    for _ in range(300):
        start, end = spans[rng.integers(len(spans))]
        place = int(rng.integers(start, min(end, start + 900) if rng.random() < 0.6 else end))  # the header more often than its share
        path.write_bytes(flip(whole, place, int(rng.integers(8))))
        report = check_shard(str(path), verify_pictures=True)
        assert report.damages, place
        assert report.damages[0].reason in ("encoded", "encoding")
        assert len(report.samples) + sum(report.skipped.values()) == 9
        assert sum(report.members.values()) == 28


def test_values_beyond_the_dtype_are_an_error(sd1_folder: Path, raw: ShardIndex, tmp_path: Path) -> None:
    folder = open_folder(sd1_folder)
    encoder = load_encoder(folder, 32, False, "float16", CPU)
    with torch.no_grad():
        encoder.codec.vae.get_submodule("encoder.conv_out").weight.mul_(1e6)  # type: ignore[operator]
    with pytest.raises(DataError, match="Sample 00000: mean holds values that float16 cannot"):
        list(encode_shards(raw, [None] * 18, encoder, tmp_path))
    assert not list(tmp_path.iterdir())
