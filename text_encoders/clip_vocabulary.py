"""The vocabulary that CLIP was trained with (OpenAI's, which OpenCLIP took over), from the file that comes with the open_clip package."""

import gzip
from importlib.util import find_spec
from pathlib import Path

from ..errors import ModelError

_WORDS = 49408  # two letters for each byte, merges, begin and end


def clip_merges() -> list[tuple[str, str]]:
    """The merges of its byte-level BPE, most frequent first. The package is found, not imported.

    Raises:
        ModelError: open_clip is not installed.
    """
    spec = find_spec("open_clip")
    if spec is None or spec.origin is None:
        raise ModelError("the package open_clip is not installed; its vocabulary was wanted; put tokenizer files beside the model")
    with gzip.open(Path(spec.origin).with_name("bpe_simple_vocab_16e6.txt.gz"), "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[1 : _WORDS - 2 - 2 * 256 + 1]
    return [(first, second) for first, second in (line.split() for line in lines)]


def clip_words(merges: list[tuple[str, str]], begin: str, end: str) -> dict[str, int]:
    """Token -> id: the bytes' letters, these at a word's end, merges, and the names of the begin and end tokens."""
    letters = _byte_letters()
    words = [*letters, *(letter + "</w>" for letter in letters), *(first + second for first, second in merges), begin, end]
    return {word: i for i, word in enumerate(words)}


def _byte_letters() -> list[str]:
    """The 256 letters that stand for bytes in byte-level BPE, in the order of CLIP's vocabulary: printable ones first."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = 256 - len(printable)
    return [chr(code) for code in printable] + [chr(256 + i) for i in range(others)]
