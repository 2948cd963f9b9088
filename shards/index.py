"""LAION-style tar shards, as img2dataset writes them: `<key>.jpg|jpeg|png|webp`, `<key>.txt`, `<key>.json`, the members of one key adjacent.

`index_shards` reads every shard once, finds what is damaged (`shard_check.py`), and returns an index of which any picture can then be read by its
offset. Nothing is extracted to disk, unpickled or run; members with other suffixes are passed over and counted. Encoded shards
(`encoded_members.py`) have `<key>.encoded.safetensors` in place of the picture.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError, UsageError
from ..pictures import decode_picture
from .check import Damage, Sample, ShardReport, check_shard
from .encoded_members import ENCODING_MEMBER, StoredEncoding, check_content, differences, read_header
from .specs import read_range, shard_name

MAX_LOST = 0.01


@dataclass(frozen=True)
class ShardIndex:
    """The whole samples of a set of shards, and an account of all else that lies in them.

    Attributes:
        shards: locations, as `specs.expand` returns them; `Sample.shard` counts into it.
        samples: in the order of the shards and of the members within.
        skipped: how many samples were left out for each reason. A sample is a run of adjacent members of one key, so
            `len(samples) + sum(skipped.values())` is the number of such runs in the shards.
        members: how many tar members are "used" (in `samples`, or saying how they were encoded), "skipped" (in samples left out) and "ignored"
            (other suffixes, folders, links); their sum is the number of members with a whole header.
        vanished: how many samples left no trace: by the `_stats.json` of the shard where there is one, else estimated; None when a shard is cut and
            nothing tells how much it held.
        damages: every damaged place, in order.
        notes: what a person may want to know and is no damage.
        encodings: of encoded shards, what says how each was made.
    """

    shards: tuple[str, ...]
    samples: tuple[Sample, ...]
    skipped: Mapping[str, int]
    members: Mapping[str, int]
    vanished: int | None
    damages: tuple[Damage, ...]
    notes: tuple[str, ...]
    encodings: tuple[StoredEncoding, ...] = ()

    def picture(self, i: int) -> NDArray[np.uint8]:
        """Decode the picture of sample i: uint8 (height, width, 3), sRGB.

        Raises:
            DataError: it cannot be read or decoded, with shard, key and byte offset.
        """
        sample = self.samples[i]
        try:
            return decode_picture(self.content(i))
        except DataError as error:
            raise DataError(f"The picture of {self._place(sample)} is damaged: {error}; leave it out, or download the shard again.") from error

    def features(self, i: int) -> bytes:
        """The safetensors file of the encoded sample i, its hash compared.

        Raises:
            DataError: it cannot be read or differs from its hash, with shard, key and byte offset.
        """
        sample, content = self.samples[i], self.content(i)
        try:
            check_content(read_header(content, len(content)), content)
        except DataError as error:
            raise DataError(f"The features of {self._place(sample)} are damaged: {error}; leave it out, or encode the shard again.") from error
        return content

    def content(self, i: int) -> bytes:
        """The file of sample i as it is stored: a picture, or features."""
        sample = self.samples[i]
        return read_range(self.shards[sample.shard], sample.offset, sample.size)

    def _place(self, sample: Sample) -> str:
        return f"sample {sample.key} in shard {shard_name(self.shards[sample.shard])} at byte {sample.offset}"

    def metadata(self, i: int) -> dict[str, Any]:
        """The whole .json of sample i, read from the shard; empty when there is none."""
        sample = self.samples[i]
        if sample.metadata_size == 0:
            return {}
        return json.loads(read_range(self.shards[sample.shard], sample.metadata_offset, sample.metadata_size))

    def fingerprint(self) -> str:
        """A hash over keys, places and captions of all samples, in order: equal for equal data wherever the shards lie."""
        digest = hashlib.sha256()
        for sample in self.samples:
            encoding = [sample.encoding] if sample.encoding else []
            digest.update(json.dumps([sample.shard, sample.key, sample.offset, sample.size, sample.caption, *encoding]).encode())
        return digest.hexdigest()


def index_shards(
    locations: Sequence[str],
    *,
    verify_pictures: bool = False,
    verify_hashes: bool = False,
    skip_damaged: bool = False,
    max_lost: float = MAX_LOST,
    progress: Callable[[ShardReport], None] | None = None,
) -> ShardIndex:
    """Read every shard once and index its samples.

    Args:
        locations: files and URLs; see `specs.expand`.
        verify_pictures: decode every picture. Without it a picture's first bytes are checked, and damage further in is an error of
            `ShardIndex.picture`.
        verify_hashes: compare every picture with the hash in its .json. img2dataset takes that hash before resizing, so this is for pictures
            that were stored as downloaded.
        skip_damaged: leave damaged samples out instead of raising.
        max_lost: with `skip_damaged`, the share of samples (0..1) that may be lost.
        progress: called with each shard's report.

    Raises:
        DataError: damage, or with `skip_damaged` more than `max_lost` of the samples lost, or no sample at all.
        UsageError: a shard is not there.
    """
    reports: list[ShardReport] = []
    for number, location in enumerate(locations):
        report = check_shard(location, number, verify_pictures=verify_pictures, verify_hashes=verify_hashes)
        reports.append(report)
        if progress is not None:
            progress(report)
    index = join_reports(reports)
    accept(index, skip_damaged=skip_damaged, max_lost=max_lost)
    return index


def join_reports(reports: Sequence[ShardReport]) -> ShardIndex:
    """One index of the reports of `check_shard`, in the order of their numbers, whatever is damaged."""
    return ShardIndex(
        shards=tuple(report.location for report in reports),
        samples=tuple(sample for report in reports for sample in report.samples),
        skipped=_sum(report.skipped for report in reports),
        members=_sum(report.members for report in reports),
        vanished=_total([_vanished(report, reports) for report in reports if report.damages]),
        damages=tuple(damage for report in reports for damage in report.damages),
        notes=_notes(reports),
        encodings=tuple(encoding for report in reports for encoding in report.encodings),
    )


def accept(index: ShardIndex, *, skip_damaged: bool = False, max_lost: float = MAX_LOST) -> None:
    """Refuse an index with too much damage; arguments and errors as of `index_shards`."""
    first = "".join(describe(damage) for damage in index.damages[:1])
    if first and not skip_damaged:
        more = f", and {len(index.damages) - 1} more places are damaged" if len(index.damages) > 1 else ""
        raise DataError(f"{first}{more}; download what is damaged again, leave it out, or use --skip-damaged.")
    if first and max_lost < 1:
        known = index.vanished or 0
        lost, total = sum(index.skipped.values()) + known, len(index.samples) + sum(index.skipped.values()) + known
        if index.vanished is None or lost > max_lost * total:
            how = "Nobody knows how many" if index.vanished is None else f"{lost} of {total}"
            raise DataError(
                f"{how} samples are lost to {len(index.damages)} damaged places, more than the {max_lost:.2%} allowed, first: {first}; "
                "download the damaged shards again or leave them out."
            )
    if not index.samples:
        raise DataError("No whole sample was found in the shards; give at least one .tar file with pictures and captions.")


def encoding_of(index: ShardIndex) -> StoredEncoding | None:
    """How the samples of an index were encoded, and where that is written; None for pictures.

    Raises:
        UsageError: pictures and encoded samples, or samples that were encoded in different ways.
        DataError: no shard says how they were encoded.
    """
    ways = dict.fromkeys(sample.encoding for sample in index.samples)
    if list(ways) == [""]:
        return None
    if "" in ways:
        one, other = (next(s.shard for s in index.samples if bool(s.encoding) == encoded) for encoded in (True, False))
        raise UsageError(
            f"Shard {shard_name(index.shards[one])} is encoded and {shard_name(index.shards[other])} holds pictures; give shards of one kind."
        )
    stored = [next((each for each in index.encodings if each.encoding.key == key), None) for key in ways]
    known = [each for each in stored if each is not None]
    if len(ways) > 1 and len(known) > 1:
        places = [shard_name(index.shards[each.shard]) for each in known[:2]]
        apart = differences(known[0].encoding, known[1].encoding)
        raise UsageError(f"Shards {places[0]} and {places[1]} are encoded in different ways (the second has {apart}); give shards of one encoding.")
    if len(known) < len(ways):
        raise DataError(f"No {ENCODING_MEMBER} in the shards says how their samples were encoded; encode them again.")
    return known[0]


def describe(damage: Damage) -> str:
    """One damaged place as the beginning of a sentence."""
    sample = f", sample {damage.key}" if damage.key else ""
    return f"Shard {shard_name(damage.shard)} is damaged at byte {damage.offset}{sample}: {damage.detail}"


def load_shards(paths: Sequence[Path]) -> tuple[NDArray[np.uint8], list[str], list[dict[str, Any]]]:
    """Read whole shards of equally sized pictures into memory.

    Returns:
        pictures (n, height, width, 3) uint8, captions, columns (the .json of each).

    Raises:
        DataError: no sample, damage, or pictures of different sizes.
    """
    index = index_shards([str(path) for path in paths])
    pictures = [index.picture(i) for i in range(len(index.samples))]
    sizes = {picture.shape for picture in pictures}
    if len(sizes) > 1:
        raise DataError(f"The shards hold pictures of {len(sizes)} sizes, such as {sorted(sizes)[:3]}; this reader wants one size.")
    return np.stack(pictures), [sample.caption for sample in index.samples], [index.metadata(i) for i in range(len(pictures))]


def _vanished(report: ShardReport, reports: Sequence[ShardReport]) -> int | None:
    """How many samples of a damaged shard left no trace: what its stats promise, else as many as its fullest neighbour has or its gaps could hold."""
    if report.promised is not None:
        return max(0, report.promised - report.keys)
    if report.cut:
        others = [other.keys for other in reports if other is not report]
        return max(1, max(others) - report.keys) if others else None
    if report.gap_bytes == 0:
        return 0
    return round(report.gap_bytes * len(report.samples) / report.sample_bytes) if report.samples else None


def _sum(counts: Iterable[Mapping[str, int]]) -> Mapping[str, int]:
    total: Counter[str] = Counter()
    for each in counts:
        total.update(each)
    return dict(total)


def _total(numbers: Sequence[int | None]) -> int | None:
    known = [number for number in numbers if number is not None]
    return sum(known) if len(known) == len(numbers) else None


def _notes(reports: Sequence[ShardReport]) -> tuple[str, ...]:
    without = sum(report.promised is None for report in reports)
    unhashed = sum(report.unhashed for report in reports)
    notes: list[str] = []
    if without:
        notes.append(
            f"{without} of {len(reports)} shards have no _stats.json, which img2dataset writes last, so nothing says whether they are finished"
        )
    if unhashed:
        notes.append(f"{unhashed} samples carry no hash to compare their picture with")
    return tuple(notes)
