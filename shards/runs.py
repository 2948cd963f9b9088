"""The members of one shard, gathered sample by sample, and what is wrong with each."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from sys import intern
from typing import BinaryIO, cast

from ..errors import DataError
from ..pictures import SIGNATURE_BYTES, decode_picture, has_signature
from .columns import Columns, read_columns
from .encoded_members import (
    ENCODED_SUFFIX,
    ENCODING_MEMBER,
    Encoding,
    check_content,
    header_length,
    read_encoding,
    read_header,
    sample_header,
)
from .scan import Gap, Member, scan

MAX_PICTURE_BYTES = 1 << 26
MAX_TEXT_BYTES = 1 << 20
_KINDS = {
    "jpg": "picture",
    "jpeg": "picture",
    "png": "picture",
    "webp": "picture",
    ENCODED_SUFFIX: "encoded",
    "txt": "caption",
    "json": "metadata",
}
_WHOLE = 3  # members of a sample to which nothing can be added: picture or features, caption, JSON
_HASHES = ("sha256", "sha512", "sha1", "md5")  # img2dataset names the column after the hash


@dataclass(slots=True)
class Run:
    """Adjacent members of one key, while they are read; `problems` are (reason, detail, byte offset), `gaps` lie in it or border on it."""

    key: str
    gaps: list[Gap]
    members: list[Member] = field(default_factory=list[Member])
    parts: dict[str, Member] = field(default_factory=dict[str, Member])
    problems: list[tuple[str, str, int]] = field(default_factory=list[tuple[str, str, int]])
    caption: str = ""
    columns: Columns = field(default_factory=Columns)
    hash: tuple[str, str] | None = None
    content: bytes = b""  # of the picture, until it is verified
    encoding: str = ""  # of features, the key of how they were made
    latent: tuple[int, int] = (0, 0)  # their height and width

    @property
    def complete(self) -> bool:
        """Whether the picture, or what it was encoded to, and the caption are there."""
        return ("picture" in self.parts or "encoded" in self.parts) and "caption" in self.parts


@dataclass(frozen=True, slots=True)
class Read:
    """What lies in a shard.

    Attributes:
        runs: in order.
        gaps: each with the key before it.
        ignored: how many members are passed over.
        encodings: its `encoding.safetensors`, each with what it says, or why it cannot be read.
    """

    runs: list[Run]
    gaps: list[tuple[Gap, str]]
    ignored: int
    encodings: list[tuple[Member, Encoding | str]]


def read_runs(file: BinaryIO, verify_pictures: bool, verify_hashes: bool) -> Read:
    """Read a shard from end to end."""
    runs: list[Run] = []
    gaps: list[tuple[Gap, str]] = []
    encodings: list[tuple[Member, Encoding | str]] = []
    fresh: list[Gap] = []  # gaps since the last member that was kept
    ignored = 0
    for event in scan(file):
        if isinstance(event, Gap):
            gaps.append((event, runs[-1].key if runs else ""))
            fresh.append(event)
            if runs:
                runs[-1].gaps.append(event)
            continue
        if event.name == ENCODING_MEMBER and event.plain:
            encodings.append((event, _encoding(file, event)))
            continue
        key, kind = _split_name(event.name)
        if not kind or not event.plain:
            ignored += 1
            continue
        if not runs or runs[-1].key != key:
            if runs:
                _verify(runs[-1], verify_pictures, verify_hashes)
            runs.append(Run(key, fresh))
        fresh = []
        _add(runs[-1], kind, event, file, whole=verify_pictures or verify_hashes)
    if runs:
        _verify(runs[-1], verify_pictures, verify_hashes)
    return Read(runs, gaps, ignored, encodings)


def _encoding(file: BinaryIO, member: Member) -> Encoding | str:
    if member.size > MAX_PICTURE_BYTES:
        return f"it has {member.size} bytes, more than {MAX_PICTURE_BYTES}"
    file.seek(member.data)
    try:
        return read_encoding(file.read(member.size))
    except DataError as error:
        return str(error)


def _split_name(name: str) -> tuple[str, str]:
    """The key and the kind of a member; the suffix is all after the first dot of the base name, in any case. No kind: not ours."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return folder + slash + stem, _KINDS.get(suffix.lower(), "") if stem else ""


def _add(run: Run, kind: str, member: Member, file: BinaryIO, whole: bool) -> None:
    """Take one member into a run, with the content of a caption or JSON, and of a picture or features the beginning or the whole."""
    run.members.append(member)
    limit = MAX_PICTURE_BYTES if kind in ("picture", "encoded") else MAX_TEXT_BYTES
    if kind in run.parts:
        run.problems.append(("duplicate key", f"it has two members of the kind {kind}, so nobody knows which belong together", member.start))
        return
    run.parts[kind] = member
    if member.size > limit:
        run.problems.append(("too large", f"its {kind} has {member.size} bytes, more than {limit}", member.start))
        return
    file.seek(member.data)
    if kind == "encoded":
        _add_encoded(run, member, file, whole)
        return
    content = file.read(member.size if whole or kind != "picture" else min(member.size, SIGNATURE_BYTES))
    try:
        match kind:
            case "picture":
                run.content = content
                if not has_signature(content[:SIGNATURE_BYTES]):
                    run.problems.append(("picture", "its picture is no JPEG, PNG or WebP", member.start))
            case "caption":
                run.caption = content.decode("utf-8")
                if not run.caption.strip():
                    run.problems.append(("empty caption", "its caption is empty", member.start))
            case _:
                metadata = json.loads(content)
                if not isinstance(metadata, dict):
                    raise ValueError("no object")
                _read_metadata(run, cast(dict[str, object], metadata))
    except (ValueError, RecursionError):
        reason, detail = ("bad caption", "its caption is not UTF-8") if kind == "caption" else ("bad json", "its .json is no JSON object")
        run.problems.append((reason, detail, member.start))


def _add_encoded(run: Run, member: Member, file: BinaryIO, whole: bool) -> None:
    try:
        start = file.read(min(member.size, 8))
        start += file.read((member.size if whole else header_length(start, member.size)) - len(start))
        key, run.latent = sample_header(start, member.size)
        run.encoding = intern(key)
        if whole:
            check_content(read_header(start, member.size), start)
    except DataError as error:
        run.problems.append(("encoded", f"its features are damaged: {error}", member.start))


def _read_metadata(run: Run, metadata: Mapping[str, object]) -> None:
    run.columns = read_columns(metadata)
    run.hash = next(((name, value.lower()) for name in _HASHES if isinstance(value := metadata.get(name), str)), None)


def _verify(run: Run, verify_pictures: bool, verify_hashes: bool) -> None:
    """Look into the picture of a run that is read to its end, and let its bytes go."""
    content, run.content = run.content, b""
    if not run.complete or run.problems or "picture" not in run.parts:
        return
    start = run.parts["picture"].start
    if verify_hashes and run.hash is not None and hashlib.new(run.hash[0], content, usedforsecurity=False).hexdigest() != run.hash[1]:
        detail = f"its picture differs from its {run.hash[0]} (img2dataset takes that before it resizes)"
        run.problems.append(("hash", detail, start))
    elif verify_pictures:
        try:
            decode_picture(content)
        except DataError as error:
            run.problems.append(("picture", f"its picture is damaged: {error}", start))


def judge(run: Run, twins: list[Run]) -> tuple[str, str, int] | Gap | None:
    """Why a run is not a whole sample: (reason, detail, byte offset), the gap to which it lost a member, or None for a whole sample."""
    start = run.members[0].start
    if not run.key.isprintable() or run.key.startswith("/") or "\\" in run.key or ".." in run.key.split("/"):
        return "bad name", "its name leads out of a folder or cannot be printed", start
    if run.gaps and len(run.parts) < _WHOLE:
        return run.gaps[0]
    if len(twins) > 1 and not all(twin.complete for twin in twins):
        return "split key", "its members are not adjacent", start
    if run is not twins[0]:
        return "duplicate key", "its key was there before", start
    if run.problems:
        return run.problems[0]
    if "picture" in run.parts and "encoded" in run.parts:
        return "mixed", "it has both a picture and what one was encoded to", start
    if "picture" not in run.parts and "encoded" not in run.parts:
        return "no picture", "it has a caption or .json but no picture", start
    if "caption" not in run.parts:
        return "no caption", "it has no caption (.txt)", start
    return None
