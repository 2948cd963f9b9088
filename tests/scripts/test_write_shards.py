import hashlib
import io
import json
import tarfile

import numpy as np
import pytest
import write_shards
from PIL import Image


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("shards")
    write_shards.main(["--stage", "shapes", "--count", "30", "--out", str(out), "--seed", "3"])
    return out


def members(path):
    with tarfile.open(path) as tar:
        return {m.name: tar.extractfile(m).read() for m in tar.getmembers()}


def test_layout_is_img2datasets(folder):
    found = members(folder / "00000.tar")
    assert list(found)[:4] == ["000000000.jpg", "000000000.txt", "000000000.json", "000000001.jpg"]
    assert len(found) == 90
    assert json.loads((folder / "00000_stats.json").read_text())["successes"] == 30
    assert not list(folder.glob("*.partial"))


def test_samples_are_pictures_captions_and_metadata(folder):
    found = members(folder / "00000.tar")
    pictures = set()
    for i in range(30):
        key = f"00000{i:04d}"
        meta = json.loads(found[f"{key}.json"])
        picture = np.asarray(Image.open(io.BytesIO(found[f"{key}.jpg"])))
        assert picture.shape == (128, 128, 3)
        assert picture.std() > 5
        assert found[f"{key}.txt"].decode() == meta["caption"] != ""
        assert meta["key"] == key
        assert meta["sha256"] == hashlib.sha256(found[f"{key}.jpg"]).hexdigest()
        assert (meta["status"], meta["width"], meta["original_height"], meta["exif"]) == ("success", 128, 128, "{}")
        assert {"url", "similarity", "punsafe", "pwatermark", "error_message"} <= set(meta)
        pictures.add(meta["sha256"])
    assert len(pictures) == 30


def test_same_seed_gives_the_same_bytes(folder, tmp_path):
    write_shards.main(["--count", "30", "--out", str(tmp_path / "a"), "--seed", "3"])
    write_shards.main(["--count", "30", "--out", str(tmp_path / "b"), "--seed", "4"])
    first = (folder / "00000.tar").read_bytes()
    assert (tmp_path / "a" / "00000.tar").read_bytes() == first
    assert (tmp_path / "b" / "00000.tar").read_bytes() != first


def test_full_shards_are_followed_by_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(write_shards, "PER_SHARD", 4)
    write_shards.main(["--count", "6", "--out", str(tmp_path), "--encode-format", "png"])
    assert sorted(p.name for p in tmp_path.glob("*.tar")) == ["00000.tar", "00001.tar"]
    assert list(members(tmp_path / "00001.tar"))[::3] == ["000010000.png", "000010001.png"]


def test_no_samples_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        write_shards.main(["--count", "0", "--out", str(tmp_path)])
    assert "--count is 0" in capsys.readouterr().err
