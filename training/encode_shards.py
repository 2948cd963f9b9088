"""Shards of pictures to shards of what a model's frozen parts say about them, in the order of the samples.

Threads read and decode ahead, the networks run, and another thread writes behind; what is written does not depend on how many there are.
"""

import os
import tarfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from ..attention import AttentionBackend
from ..errors import DataError, OutputError
from ..pipeline.model.folder import ModelFolder
from ..pipeline.model.loading import load_codec
from ..pipeline.model.place import Place
from ..pipeline.model.readers import TextParts, load_text
from ..shards.check import Sample, check_shard
from ..shards.encoded_members import ENCODED_SUFFIX, ENCODING_MEMBER, Encoding, differences
from ..shards.index import ShardIndex
from ..shards.scan import BLOCK
from ..shards.specs import read_range, shard_name
from ..shards.writer import count_reasons, end_shard, make_folder, publish, samples_by_shard, shard_paths, stats_path, write_stats
from ..text_encoders.parts import ClipT5Part
from ..vae.codec import LatentCodec
from .batches import AHEAD, Fitted, ahead, bucket_of, fit, sizes_for
from .encoded import encoding_for, pack_encoding, pack_sample
from .sources import text_features


@dataclass(frozen=True, eq=False)
class Encoder:
    """The frozen parts of a model, and what it does with a sample.

    Attributes:
        encoding: what a shard will say about itself.
        sizes: buckets that pictures are cut to, (width, height).
        codec: pictures to latents.
        parts: the text encoders.
        device: where they are.
    """

    encoding: Encoding
    sizes: tuple[tuple[int, int], ...]
    codec: LatentCodec
    parts: TextParts
    device: torch.device


@dataclass(frozen=True)
class EncodedShard:
    """A shard that is done: its path, its source, the number of samples, of those left out by reason, and whether it was there before."""

    path: Path
    source: str
    kept: int
    dropped: dict[str, int]
    was_there: bool


@dataclass(frozen=True, eq=False)
class _Row:
    """One sample on its way."""

    sample: Sample
    fitted: Fitted
    metadata: bytes


def load_encoder(folder: ModelFolder, resolution: int | None, buckets: bool, dtype: str, device: torch.device) -> Encoder:
    """Load what encodes for a model; arguments as the attributes of `Encoding`, resolution None for the model's own.

    Raises:
        UsageError: a resolution that the model cannot have, or a dtype that is not known.
        ModelError: weights are missing or damaged.
    """
    sizes = sizes_for(folder, resolution, buckets)
    encoding = encoding_for(folder, sizes[0][0], buckets, dtype)
    place = Place(device, torch.float32, AttentionBackend.AUTO)
    return Encoder(encoding, sizes, load_codec(folder, place)[0], load_text(folder, place), device)


def encode_shards(
    index: ShardIndex,
    reasons: Sequence[str | None],
    encoder: Encoder,
    out: Path,
    *,
    batch_size: int = 8,
    threads: int = 2,
    progress: Callable[[int], None] = lambda count: None,  # noqa: ARG005
) -> Iterator[EncodedShard]:
    """Encode every shard of an index into a shard of the same name, and yield after each.

    A shard appears under its name complete and synced to disk. One that is there already is kept when it is whole and says that it was made in this
    way from these samples.

    Args:
        index: of pictures.
        reasons: for each sample why it is left out, None to keep it.
        encoder: from `load_encoder`.
        out: folder, made when missing.
        batch_size: samples that the networks see at once.
        threads: that read and decode; 0 reads when a sample is needed.
        progress: told how many samples each batch had.

    Raises:
        UsageError: two shards have one file name.
        OutputError: a shard is there that was made otherwise, or the folder cannot be written.
        DataError: a picture is damaged, or a value does not fit the dtype.
    """
    paths = shard_paths(index.shards, out)
    of_shard = samples_by_shard(index)
    kept = [[i for i in numbers if reasons[i] is None] for numbers in of_shard]
    there = [os.path.lexists(path) for path in paths]
    for path, numbers, is_there in zip(paths, kept, there, strict=True):
        if is_there:
            _check_finished(path, [index.samples[i] for i in numbers], encoder.encoding)
    make_folder(out)
    _remove_partial({path.name for path in paths}, out)
    batches = [[numbers[i : i + batch_size] for i in range(0, len(numbers), batch_size)] for numbers in kept]
    wanted = (batch for made, is_there in zip(batches, there, strict=True) if not is_there for batch in made)
    with closing(ahead(lambda i: _read(index, i, encoder.sizes), wanted, threads)) as rows:
        empty = {} if isinstance(encoder.parts, ClipT5Part) else {name: tensor[0] for name, tensor in text_features(encoder.parts, [""]).items()}
        head = _member(ENCODING_MEMBER, pack_encoding(encoder.encoding, empty))
        for number, (location, path, is_there) in enumerate(zip(index.shards, paths, there, strict=True)):
            if not is_there:
                publish(lambda file, n=number: _write(file, head, _encoded(encoder, islice(rows, len(batches[n])), progress)), path)
            dropped = count_reasons(reasons[i] for i in of_shard[number])
            if not os.path.lexists(stats_path(path)):
                write_stats(path, len(kept[number]), dropped)
            yield EncodedShard(path, location, len(kept[number]), dropped, is_there)


def _read(index: ShardIndex, i: int, sizes: Sequence[tuple[int, int]]) -> _Row:
    sample = index.samples[i]
    fitted = fit(index.picture(i), sizes[bucket_of(index, i, sizes)])
    return _Row(sample, fitted, read_range(index.shards[sample.shard], sample.metadata_offset, sample.metadata_size))


def _encoded(encoder: Encoder, batches: Iterable[Sequence[_Row]], progress: Callable[[int], None]) -> Iterator[bytes]:
    """The tar members of each batch."""
    for rows in batches:
        features = text_features(encoder.parts, [row.sample.caption for row in rows])
        yield b"".join(
            member
            for i, (row, (mean, std)) in enumerate(zip(rows, _posteriors(encoder, rows), strict=True))
            for member in _members(encoder.encoding, row, mean, std, {name: tensor[i] for name, tensor in features.items()})
        )
        progress(len(rows))


def _posteriors(encoder: Encoder, rows: Sequence[_Row]) -> list[tuple[Tensor, Tensor]]:
    """Mean and standard deviation of each picture's latents; pictures of one size go through the VAE together."""
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for shape in dict.fromkeys(row.fitted.pixels.shape for row in rows):
        same = [i for i, row in enumerate(rows) if row.fitted.pixels.shape == shape]
        mean, std, _ = encoder.codec.posterior(torch.stack([rows[i].fitted.pixels for i in same]).to(encoder.device))
        found |= {i: (mean[place], std[place]) for place, i in enumerate(same)}
    return [found[i] for i in range(len(rows))]


def _members(encoding: Encoding, row: _Row, mean: Tensor, std: Tensor, features: dict[str, Tensor]) -> Iterator[bytes]:
    key = row.sample.key
    try:
        packed = pack_sample(encoding, mean, std, row.fitted, features)
    except DataError as error:
        raise DataError(f"Sample {key}: {error}") from error
    yield _member(f"{key}.{ENCODED_SUFFIX}", packed)
    yield _member(f"{key}.txt", row.sample.caption.encode())
    if row.metadata:
        yield _member(f"{key}.json", row.metadata)


def _member(name: str, content: bytes) -> bytes:
    """A tar member: header, content and padding; no time, owner or mode of this machine."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    return info.tobuf(tarfile.PAX_FORMAT) + content + bytes(-len(content) % BLOCK)


def _write(file: BinaryIO, head: bytes, chunks: Iterator[bytes]) -> None:
    """Write a shard on a thread of its own, at most AHEAD chunks behind what is made."""
    with ThreadPoolExecutor(1, thread_name_prefix="writer") as pool:
        written: deque[Future[int]] = deque([pool.submit(file.write, head)])
        for chunk in chunks:
            written.append(pool.submit(file.write, chunk))
            if len(written) > AHEAD:
                written.popleft().result()
        for future in written:
            future.result()
    end_shard(file)


def _check_finished(path: Path, wanted: Sequence[Sample], encoding: Encoding) -> None:
    report = check_shard(str(path))
    apart = [differences(encoding, each.encoding) for each in report.encodings if each.encoding != encoding]
    if report.damages:
        problem = f"is damaged ({report.damages[0].detail})"
    elif apart or not report.encodings:
        problem = f"was encoded in another way ({apart[0]})" if apart else "is no encoded shard"
    elif [(sample.key, sample.caption) for sample in report.samples] != [(sample.key, sample.caption) for sample in wanted]:
        problem = f"holds other samples than {len(wanted)} of its source that are kept"
    else:
        return
    raise OutputError(f"{shard_name(str(path))!r} exists and {problem}; remove it, or give another --out.")


def _remove_partial(names: set[str], out: Path) -> None:
    """Remove what a run that was killed left of these shards."""
    for path in out.glob(".*.partial"):
        name = path.name.removeprefix(".").rsplit(".", 2)[0]
        if name in names | {stats_path(out / each).name for each in names}:
            path.unlink(missing_ok=True)
