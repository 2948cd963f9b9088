"""Write LAION-style shards of the synthetic world, in the layout of img2dataset.

    python scripts/embedded/write_shards.py --stage shapes --count 20000 --out DIR --seed 0

writes DIR/00000.tar, DIR/00000_stats.json, ...: per sample <key>.jpg, <key>.txt and <key>.json, where key is the shard's number in 5 digits and the
sample's in 4, and the JSON has img2dataset's fields beside the columns of LAION's tables (facts of img2dataset 1.x: writer.py, downloader.py).
With pyarrow installed the table DIR/00000.parquet is written too. The same arguments give byte-identical tars.
"""

import argparse
import hashlib
import importlib
import importlib.util
import io
import json
import random
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image
from world import SIDE, STAGES, Stage, captions, render, sample_scene

SHARD_DIGITS = 5
INDEX_DIGITS = 4
PER_SHARD = 10**INDEX_DIGITS
ENCODINGS: dict[str, dict[str, Any]] = {
    "jpg": {"format": "JPEG", "quality": 95},
    "png": {"format": "PNG"},
    "webp": {"format": "WEBP", "lossless": True},
}


def sample(stage: Stage, seed: int, index: int, encoding: str) -> tuple[str, bytes, dict[str, Any]]:
    """The caption, encoded picture and metadata of the `index`-th sample, which depends on nothing but the arguments."""
    rng = random.Random(f"{stage.name} {seed} {index}")
    scene = sample_scene(rng, stage)
    caption = captions(scene, rng)
    buffer = io.BytesIO()
    Image.fromarray(render(scene)).save(buffer, **ENCODINGS[encoding])
    data = buffer.getvalue()
    shard, place = divmod(index, PER_SHARD)
    meta: dict[str, Any] = {
        "url": f"world://{stage.name}/{seed}/{index}",
        "caption": caption,
        "similarity": None,
        "punsafe": 0.0,
        "pwatermark": 0.0,
        "AESTHETIC_SCORE": None,
        "LANGUAGE": "en",
        "key": f"{shard:0{SHARD_DIGITS}d}{place:0{INDEX_DIGITS}d}",
        "status": "success",
        "error_message": None,
        "width": SIDE,
        "height": SIDE,
        "original_width": SIDE,
        "original_height": SIDE,
        "exif": "{}",
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    return caption, data, meta


def _members(caption: str, data: bytes, meta: dict[str, Any], encoding: str) -> Iterator[tuple[str, bytes]]:
    yield f"{meta['key']}.{encoding}", data
    yield f"{meta['key']}.txt", caption.encode()
    yield f"{meta['key']}.json", json.dumps(meta, indent=4).encode()


def write_shard(out: Path, number: int, count: int, stage: Stage, seed: int, encoding: str) -> Path:
    """Write shard `number` with `count` samples and its stats into the folder `out`; returns the tar's path.

    The tar appears under its name only when complete.
    """
    start = time.time()
    name = f"{number:0{SHARD_DIGITS}d}"
    path, partial = out / f"{name}.tar", out / f"{name}.tar.partial"
    rows: list[dict[str, Any]] = []
    with tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar:
        for index in range(number * PER_SHARD, number * PER_SHARD + count):
            caption, data, meta = sample(stage, seed, index, encoding)
            rows.append(meta)
            for member, content in _members(caption, data, meta, encoding):
                info = tarfile.TarInfo(member)  # mtime, owner and mode stay at their fixed defaults
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    partial.replace(path)
    _write_table(out / f"{name}.parquet", rows)
    end = time.time()
    stats = {
        "count": count,
        "successes": count,
        "failed_to_download": 0,
        "failed_to_resize": 0,
        "duration": end - start,
        "start_time": start,
        "end_time": end,
        "status_dict": {"success": count},
    }
    (out / f"{name}_stats.json").write_text(json.dumps(stats, indent=4))
    return path


def _write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    if importlib.util.find_spec("pyarrow") is None:
        return
    arrow, parquet = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    parquet.write_table(arrow.Table.from_pylist(rows), path)


def main(arguments: list[str] | None = None) -> None:
    """Command line of the module's docstring."""
    parser = argparse.ArgumentParser(description="Write LAION-style shards of the synthetic world.")
    parser.add_argument("--stage", choices=tuple(STAGES), default="shapes")
    parser.add_argument("--count", type=int, required=True, help="samples in all")
    parser.add_argument("--out", type=Path, required=True, help="folder, made when missing")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--encode-format", choices=tuple(ENCODINGS), default="jpg")
    options = parser.parse_args(arguments)
    if options.count < 1:
        parser.error(f"--count is {options.count}, but at least 1 sample is needed.")
    options.out.mkdir(parents=True, exist_ok=True)
    for number, first in enumerate(range(0, options.count, PER_SHARD)):
        path = write_shard(options.out, number, min(PER_SHARD, options.count - first), STAGES[options.stage], options.seed, options.encode_format)
        print(f"{path}: {min(options.count, first + PER_SHARD)} of {options.count}", file=sys.stderr)


if __name__ == "__main__":
    main()
