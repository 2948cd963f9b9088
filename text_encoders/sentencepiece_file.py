"""What a SentencePiece model file says: its pieces with their scores, and its table of normalised characters.

The pieces come from the `sentencepiece` library; the table, which the library does not hand out, from the file's protocol buffer
(fields of `sentencepiece_model.proto`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from ..errors import ModelError

_TRAINER_SPEC, _NORMALIZER_SPEC = 2, 3  # fields of ModelProto
_MODEL_TYPE, _UNIGRAM = 3, 1  # field of TrainerSpec and its default
_CHARSMAP = 2  # field of NormalizerSpec


@dataclass(frozen=True)
class SentencePieceFile:
    """A unigram model.

    Attributes:
        pieces: (text, log-probability), by id.
        unk_id: the id of the unknown piece.
        charsmap: the precompiled table of character replacements, empty for none.
    """

    pieces: list[tuple[str, float]]
    unk_id: int
    charsmap: bytes


def read_sentencepiece(path: Path) -> SentencePieceFile:
    """Read a `spiece.model`.

    Raises:
        ModelError: not a SentencePiece file, or not a unigram model.
    """
    data = path.read_bytes()
    processor = SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(data)
        spec = dict(_fields(data))
        trainer, normalizer = (dict(_fields(_message(spec.get(field, b"")))) for field in (_TRAINER_SPEC, _NORMALIZER_SPEC))
        charsmap = _message(normalizer.get(_CHARSMAP, b""))
    except (RuntimeError, IndexError, ValueError) as error:
        raise ModelError(f"{path} cannot be read ({error}); a SentencePiece model was wanted; fetch the file again") from error
    if trainer.get(_MODEL_TYPE, _UNIGRAM) != _UNIGRAM:
        raise ModelError(f"{path} is a SentencePiece model of type {trainer[_MODEL_TYPE]}; a unigram model was wanted; convert it to tokenizer.json")
    pieces = [(processor.IdToPiece(i), processor.GetScore(i)) for i in range(processor.GetPieceSize())]
    return SentencePieceFile(pieces, processor.unk_id(), charsmap)


def _message(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number where a message should be")
    return value


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field of a protocol-buffer message: an int for a varint, else the raw bytes."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        match tag & 7:
            case 0:
                value, at = _varint(data, at)
                yield tag >> 3, value
                continue
            case 1:
                size = 8
            case 2:
                size, at = _varint(data, at)
            case 5:
                size = 4
            case wire:
                raise ValueError(f"wire type {wire}")
        if at + size > len(data):
            raise ValueError("the file is cut short")
        yield tag >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The base-128 number at a position, and the position after it."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at
