"""Small sets of shards, and their encoding."""

import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from shard_sets import write
from tu_diffuse.pipeline.model.folder import ModelFolder
from tu_diffuse.shards.index import ShardIndex, index_shards
from tu_diffuse.training.encode_shards import EncodedShard, encode_shards, load_encoder

CPU = torch.device("cpu")


def picture(seed: int, width: int, height: int) -> bytes:
    """Noise in large squares, so that the latents of two pictures and of two cuts differ."""
    buffer = io.BytesIO()
    squares = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(squares).resize((width, height), Image.Resampling.NEAREST).save(buffer, "PNG")
    return buffer.getvalue()


def samples(count: int, first: int, sizes: Sequence[tuple[int, int]]) -> list[tuple[str, bytes]]:
    members: list[tuple[str, bytes]] = []
    for i in range(first, first + count):
        width, height = sizes[i % len(sizes)]
        metadata = json.dumps({"width": width, "height": height, "punsafe": i / 100, "key": i}).encode()
        members += [(f"{i:05d}.png", picture(i, width, height)), (f"{i:05d}.txt", b"a star, number %d" % i), (f"{i:05d}.json", metadata)]
    return members


def write_set(folder: Path, sizes: Sequence[tuple[int, int]] = ((32, 32),)) -> ShardIndex:
    folder.mkdir(exist_ok=True)
    return index_shards([str(write(folder / f"{n}.tar", samples(9, 9 * n, sizes))) for n in range(2)])


def encode(folder: ModelFolder, index: ShardIndex, out: Path, dtype: str = "float32", buckets: bool = False, **options: Any) -> list[EncodedShard]:
    encoder = load_encoder(folder, 32, buckets, dtype, CPU)
    return list(encode_shards(index, options.pop("reasons", [None] * len(index.samples)), encoder, out, **options))


def read(out: Path) -> ShardIndex:
    return index_shards([str(path) for path in sorted(out.glob("*.tar"))], verify_pictures=True)


def places(path: Path) -> Iterator[tuple[int, int]]:
    """From byte, to byte of the content of every safetensors member."""
    with tarfile.open(path) as tar:
        yield from ((m.offset_data, m.offset_data + m.size) for m in tar.getmembers() if m.name.endswith("safetensors"))
