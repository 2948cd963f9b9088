"""One shard, read once from end to end: its whole samples, and a reason for everything that is not one."""

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from ..errors import DataError
from .columns import Columns
from .encoded_members import ENCODING_MEMBER, Encoding, StoredEncoding
from .runs import Read, Run, judge, read_runs
from .scan import Gap
from .specs import open_shard, read_beside, shard_name

_GAPS = {
    "header": "the header of a member is flipped, zeroed or false",
    "truncated": "the file ends before its end",
    "zeros": "zeros that no writer pads with, as an unfinished download leaves them",
}


@dataclass(frozen=True, slots=True)
class Sample:
    """One picture, or the features that it was encoded to, with its caption, and where it lies.

    Attributes:
        shard: number of its shard.
        key: the members' common name up to the first dot, with the folder if any.
        offset, size: of the picture file or the features in the shard, in bytes.
        caption: the .txt.
        columns: what the .json says.
        metadata_offset, metadata_size: of the .json, in bytes; 0 when there is none.
        spans: from byte, to byte, ... of its members with their headers, in order.
        encoding: of features, `Encoding.key`; "" for a picture.
        latent: height and width of its latents; zeros for a picture.
    """

    shard: int
    key: str
    offset: int
    size: int
    caption: str
    columns: Columns
    metadata_offset: int
    metadata_size: int
    spans: tuple[int, ...]
    encoding: str = ""
    latent: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True)
class Damage:
    """One damaged place: the shard's location, the sample's key ("" where none is near), the byte offset, and why.

    `reason` is header, truncated, zeros or count for a place in the tar, encoding for what says how an encoded shard was made; bad name, split key,
    duplicate key, too large, mixed, no picture, no caption, bad caption, empty caption, bad json, picture, hash or encoded for a sample.
    """

    shard: str
    key: str
    offset: int
    reason: str
    detail: str


@dataclass(frozen=True)
class ShardReport:
    """What one shard holds; the counts close as `ShardIndex` says.

    Attributes:
        location, samples, damages, skipped, members: as in `ShardIndex`.
        runs: samples seen, whole or not: runs of adjacent members of one key.
        keys: different keys seen.
        promised: the number of samples by the shard's `_stats.json`, None without one.
        cut: the shard ends too early.
        gap_bytes: bytes between a bad header and the next good one.
        sample_bytes: bytes of all whole samples, headers included.
        unhashed: samples without a hash, when hashes are verified.
        encodings: of an encoded shard, what says how it was made.
    """

    location: str
    samples: tuple[Sample, ...]
    damages: tuple[Damage, ...]
    skipped: Mapping[str, int]
    members: Mapping[str, int]
    runs: int
    keys: int
    promised: int | None
    cut: bool
    gap_bytes: int
    sample_bytes: int
    unhashed: int
    encodings: tuple[StoredEncoding, ...] = ()


def check_shard(location: str, number: int = 0, *, verify_pictures: bool = False, verify_hashes: bool = False) -> ShardReport:
    """Read one shard and judge every sample in it; arguments as of `index_shards`.

    Raises:
        DataError: the shard cannot be read at all (damage is in the report).
        UsageError: it is not there.
    """
    with open_shard(location) as file:
        try:
            read = read_runs(file, verify_pictures, verify_hashes)
        except OSError as error:
            raise DataError(f"Shard {shard_name(location)} cannot be read ({error.strerror or error}); check disk and connection.") from error
    runs, gaps = read.runs, read.gaps
    twins: defaultdict[str, list[Run]] = defaultdict(list)
    for run in runs:
        twins[run.key].append(run)
    samples: list[Sample] = []
    damages: list[Damage] = []
    skipped: Counter[str] = Counter()
    members = Counter(used=len(read.encodings), skipped=0, ignored=read.ignored)
    lost_to: dict[Gap, str] = {}
    for run in runs:
        problem = judge(run, twins[run.key])
        if problem is None:
            samples.append(_sample(run, number))
        elif isinstance(problem, Gap):
            lost_to[problem] = run.key
            skipped[problem.reason] += 1
        else:
            reason, detail, offset = problem
            damages.append(Damage(location, run.key, offset, reason, detail))
            skipped[reason] += 1
        members["used" if problem is None else "skipped"] += len(run.members)
    for gap, before in gaps:
        damages.append(Damage(location, lost_to.get(gap, before), gap.start, gap.reason, _GAPS[gap.reason]))
    encodings, undescribed = _encodings(location, number, read, samples)
    damages += undescribed
    promised = _promised(location)
    if promised is not None and promised > len(twins) and not gaps:
        detail = f"it holds {len(twins)} samples but its _stats.json counts {promised}"
        damages.append(Damage(location, "", runs[-1].members[-1].end if runs else 0, "count", detail))
    return ShardReport(
        location=location,
        samples=tuple(samples),
        damages=tuple(sorted(damages, key=lambda damage: damage.offset)),
        skipped=dict(skipped),
        members=dict(members),
        runs=len(runs),
        keys=len(twins),
        promised=promised,
        cut=any(gap.reason != "header" for gap, _ in gaps),
        gap_bytes=sum(gap.end - gap.start for gap, _ in gaps if gap.reason == "header"),
        sample_bytes=sum(sample.spans[-1] - sample.spans[0] for sample in samples),
        unhashed=sum(run.hash is None for run in runs) if verify_hashes else 0,
        encodings=encodings,
    )


def _encodings(location: str, number: int, read: Read, samples: Sequence[Sample]) -> tuple[tuple[StoredEncoding, ...], list[Damage]]:
    """What says how the samples were encoded, and what is wrong with that."""
    stored = tuple(StoredEncoding(number, m.start, m.data, m.end, m.size, said) for m, said in read.encodings if isinstance(said, Encoding))
    damages = [Damage(location, "", m.start, "encoding", f"{m.name}: {said}") for m, said in read.encodings if isinstance(said, str)]
    undescribed = {sample.encoding for sample in samples} - {"", *(each.encoding.key for each in stored)}
    if undescribed and not damages and not read.gaps:
        damages.append(Damage(location, "", 0, "encoding", f"it has no {ENCODING_MEMBER} that says how its samples were encoded"))
    return stored, damages


def _sample(run: Run, number: int) -> Sample:
    picture, metadata = run.parts.get("picture") or run.parts["encoded"], run.parts.get("metadata")
    spans: list[int] = []
    for member in run.members:
        if spans and spans[-1] == member.start:
            spans[-1] = member.end
        else:
            spans += [member.start, member.end]
    return Sample(
        shard=number,
        key=run.key,
        offset=picture.data,
        size=picture.size,
        caption=run.caption,
        columns=run.columns,
        metadata_offset=0 if metadata is None else metadata.data,
        metadata_size=0 if metadata is None else metadata.size,
        spans=tuple(spans),
        encoding=run.encoding,
        latent=run.latent,
    )


def _promised(location: str) -> int | None:
    """The number of samples that img2dataset counted when the shard was finished."""
    data = read_beside(location, "_stats.json")
    try:
        stats = json.loads(data) if data is not None else None
    except ValueError:
        return None
    successes = cast(dict[str, object], stats).get("successes") if isinstance(stats, dict) else None
    return successes if isinstance(successes, int) and successes >= 0 else None
