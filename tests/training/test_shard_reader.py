"""Reading LAION-style shards: what is in them comes out, damage is an error."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tu_diffuse.errors import DataError
from tu_diffuse.training.shards import load_shards, read_shard


def picture(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value, 0, 255 - value)).save(buffer, "PNG")
    return buffer.getvalue()


def write(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def samples(count: int) -> list[tuple[str, bytes]]:
    members: list[tuple[str, bytes]] = []
    for i in range(count):
        members += [(f"{i:09d}.png", picture(i)), (f"{i:09d}.txt", f"caption {i}".encode()), (f"{i:09d}.json", json.dumps({"n": i}).encode())]
    return members


def test_samples_come_out_as_they_went_in(tmp_path: Path) -> None:
    found = list(read_shard(write(tmp_path / "a.tar", samples(5))))
    assert [(s.key, s.caption, s.columns["n"]) for s in found] == [(f"{i:09d}", f"caption {i}", i) for i in range(5)]
    pictures, captions, columns = load_shards([tmp_path / "a.tar"])
    assert pictures.shape == (5, 8, 8, 3)
    assert np.array_equal(pictures[:, 0, 0], [[i, 0, 255 - i] for i in range(5)])
    assert captions[3] == "caption 3"
    assert columns[4] == {"n": 4}


@pytest.mark.parametrize("where", [512, 1536, 3000])
def test_flipped_header_bit_is_found(tmp_path: Path, where: int) -> None:
    path = write(tmp_path / "a.tar", samples(5))
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        header = next(member.offset for member in tar.getmembers() if member.offset >= where)
    data[header + 3] ^= 4
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"damaged at byte \d+"):
        list(read_shard(path))


def test_shard_cut_at_a_member_boundary_is_found(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", samples(5))
    with tarfile.open(path) as tar:
        cut = tar.getmembers()[9].offset
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DataError, match="damaged"):
        list(read_shard(path))


@pytest.mark.parametrize("lost", [".png", ".txt"])
def test_sample_without_picture_or_caption_is_an_error(tmp_path: Path, lost: str) -> None:
    members = [member for member in samples(3) if member[0] != f"000000001{lost}"]
    with pytest.raises(DataError, match="Sample 000000001"):
        list(read_shard(write(tmp_path / "a.tar", members)))


def test_code_in_a_shard_is_passed_over(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", [*samples(1), ("000000000.pkl", b"cos\nsystem\n(S'false'\ntR."), ("000000000.pyd", b"x")])
    assert [sample.key for sample in read_shard(path)] == ["000000000"]
