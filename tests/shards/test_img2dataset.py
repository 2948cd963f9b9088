"""Shards that img2dataset itself wrote, from a local web server where some addresses fail.

Its parquet table, which lists every address with its fate, is the oracle.
"""

import http.server
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import pytest
from PIL import Image
from tu_diffuse.cli.main import run
from tu_diffuse.errors import DataError
from tu_diffuse.shards.filters import make_filters
from tu_diffuse.shards.index import index_shards
from tu_diffuse.shards.specs import expand
from web_server import serve

COUNT, PER_SHARD, UNTITLED = 48, 15, 8
MISSING, PAGE, CUT = 3, 5, 6  # what the server does with every eighth address
WRITE = "import json, sys, img2dataset; img2dataset.download(**json.loads(sys.argv[1]))"


def original(i: int) -> bytes:
    ramp = np.arange(60 + i, dtype=np.uint8)
    pixels = np.stack([np.broadcast_to(ramp, (80, 60 + i)), np.full((80, 60 + i), i * 5, np.uint8), np.full((80, 60 + i), 255 - i, np.uint8)], -1)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, ("JPEG", "PNG")[i % 2], **({"quality": 95} if i % 2 == 0 else {}))
    return buffer.getvalue()


class Web(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        i = int(self.path.strip("/"))
        if i % 8 == MISSING:
            self.send_error(404)
            return
        data = {PAGE: b"<html>moved</html>", CUT: original(i)[:200]}.get(i % 8, original(i))
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object):
        pass


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two sets: "resized" to 64 pixels as PNG, and "stored" as downloaded."""
    home = tmp_path_factory.mktemp("img2dataset")
    settings: dict[str, dict[str, Any]] = {
        "resized": {"image_size": 64, "resize_mode": "keep_ratio", "encode_format": "png", "encode_quality": 6},
        "stored": {"resize_mode": "no", "disable_all_reencoding": True},
    }
    with serve(Web) as address:
        rows = [
            {
                "URL": f"{address}/{i}",
                "TEXT": None if i == UNTITLED else f"caption {i} – ü",
                "punsafe": (0.0, 0.05, 0.5, None)[i % 4],
                "AESTHETIC_SCORE": 4.0 + i % 3,
                "LANGUAGE": "en",
                "WIDTH": 1,
                "HEIGHT": 1,
            }
            for i in range(COUNT)
        ]
        (home / "rows.json").write_text(json.dumps(rows))
        for name, options in settings.items():
            arguments = options | {
                "url_list": str(home / "rows.json"),
                "input_format": "json",
                "url_col": "URL",
                "caption_col": "TEXT",
                "save_additional_columns": ["punsafe", "AESTHETIC_SCORE", "LANGUAGE", "WIDTH", "HEIGHT"],
                "output_format": "webdataset",
                "output_folder": str(home / name),
                "number_sample_per_shard": PER_SHARD,
                "processes_count": 1,
                "thread_count": 4,
                "retries": 0,
            }
            environment = os.environ | {"NO_ALBUMENTATIONS_UPDATE": "1", "WANDB_MODE": "disabled"}
            done = subprocess.run([sys.executable, "-c", WRITE, json.dumps(arguments)], env=environment, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stderr
    return {name: home / name for name in settings}


def table(folder: Path) -> list[dict[str, Any]]:
    return [row for path in sorted(folder.glob("*.parquet")) for row in parquet.read_table(path).to_pylist()]


def number_of(row: dict[str, Any]) -> int:
    return int(row["url"].rpartition("/")[2])


def test_every_success_comes_out_once(written: dict[str, Path]):
    folder = written["resized"]
    index = index_shards(expand([f"{folder}/{{00000..00003}}.tar"]), skip_damaged=True, max_lost=0.05, verify_pictures=True)
    rows = table(folder)
    assert len(rows) == COUNT
    successes = {row["key"]: row for row in rows if row["status"] == "success"}
    assert {number_of(row) for row in successes.values()} == {i for i in range(COUNT) if i % 8 not in (MISSING, PAGE, CUT)}
    captioned = {key: row for key, row in successes.items() if row["caption"] is not None}
    assert {sample.key: sample.caption for sample in index.samples} == {key: row["caption"] for key, row in captioned.items()}
    assert (index.skipped, index.vanished, index.notes) == ({"empty caption": 1}, 0, ())
    assert index.members == {"used": 3 * len(captioned), "skipped": 3, "ignored": 0}
    for i, sample in enumerate(index.samples):
        row = captioned[sample.key]
        columns = sample.columns
        assert (columns.unsafe, columns.aesthetic_v2, columns.language) == (row["punsafe"], row["AESTHETIC_SCORE"], "en")
        assert (columns.width, columns.height, columns.original_width) == (row["width"], row["height"], 60 + number_of(row))
        assert index.metadata(i)["url"] == row["url"]
        picture = index.picture(i)
        assert picture.shape[:2] == (row["height"], row["width"])
        assert np.abs(picture[..., 1].astype(int) - number_of(row) * 5).max() <= 3


def test_pages_and_cut_pictures_that_were_stored_as_pictures_are_found(written: dict[str, Path]):
    """Without re-encoding img2dataset looks into no picture, and counts a web page as a success."""
    folder = written["stored"]
    index = index_shards(expand([f"{folder}/*.tar"]), skip_damaged=True, max_lost=0.5, verify_pictures=True)
    successes = {row["key"]: row for row in table(folder) if row["status"] == "success"}
    bad = {key for key, row in successes.items() if number_of(row) % 8 in (PAGE, CUT)}
    assert {damage.key for damage in index.damages if damage.reason == "picture"} == bad
    assert index.skipped == {"picture": len(bad), "empty caption": 1}
    assert {sample.key for sample in index.samples} == {key for key, row in successes.items() if key not in bad and row["caption"]}
    for i, sample in enumerate(index.samples):
        with Image.open(io.BytesIO(original(number_of(successes[sample.key])))) as wanted:
            assert np.array_equal(index.picture(i), np.asarray(wanted))


def test_hashes_hold_where_pictures_are_stored_as_downloaded(written: dict[str, Path]):
    stored = index_shards(expand([f"{written['stored']}/*.tar"]), skip_damaged=True, max_lost=0.5, verify_hashes=True)
    assert "hash" not in stored.skipped
    with pytest.raises(DataError, match="takes that before it resizes"):
        index_shards(expand([f"{written['resized']}/*.tar"]), verify_hashes=True)


def test_check_finds_the_empty_caption_and_nothing_else(written: dict[str, Path], capsys: pytest.CaptureFixture[str]):
    assert run(["shards", "check", f"{written['resized']}/*.tar", "--json"]) == 4
    damage, summary = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    (row,) = (row for row in table(written["resized"]) if row["url"].endswith(f"/{UNTITLED}"))
    assert (damage["kind"], damage["key"], damage["reason"]) == ("damage", row["key"], "empty caption")
    with tarfile.open(damage["shard"]) as tar:
        assert damage["offset"] == tar.getmember(f"{row['key']}.txt").offset
    assert (summary["shards"], summary["samples"], summary["skipped"]) == (4, 29, {"empty caption": 1})


def test_filtered_copy_is_read_like_the_original(written: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source, out = written["resized"], tmp_path / "out"
    code = run(
        ["shards", "filter", f"{source}/*.tar", "--out", str(out), "--filter", "laion-aesthetic", "--skip-damaged", "--max-lost", "0.05", "--json"]
    )
    assert code == 0, capsys.readouterr().err
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    wanted = {
        row["key"]: row["caption"]
        for row in table(source)
        if row["status"] == "success" and row["caption"] and row["punsafe"] is not None and row["punsafe"] < 0.1 and row["AESTHETIC_SCORE"] > 4.5
    }
    copy = index_shards(expand([f"{out}/{{00000..00003}}.tar"]), verify_pictures=True)
    assert {sample.key: sample.caption for sample in copy.samples} == wanted
    assert lines[-1]["kept"] == len(wanted) > 0
    assert lines[-1]["kept"] + lines[-1]["dropped"] == lines[-1]["samples"] == 29
    assert (copy.notes, copy.vanished) == ((), 0)
    assert make_filters("laion-aesthetic").missing == "drop"
    for path in out.glob("*.tar"):
        with tarfile.open(path) as made, tarfile.open(source / path.name) as original_tar:
            for member in made.getmembers():
                before = original_tar.getmember(member.name)
                assert member.get_info() == before.get_info()
                assert made.extractfile(member).read() == original_tar.extractfile(before).read()  # type: ignore[union-attr]
