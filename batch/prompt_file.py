"""Read a whole prompt file before anything is loaded: every good line, and every problem with its line and column.

A line that has a problem is never rendered in part; its neighbours do not suffer. docs/prompt-files.md describes the formats for users.
"""

import re
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE, BOM_UTF32_BE, BOM_UTF32_LE
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Literal, get_args

from ..errors import UsageError
from .json_lines import read_json_lines
from .lines import Line, Problem
from .options import BY_NAME
from .tables import header_of, read_table
from .text_lines import read_text_lines

Kind = Literal["txt", "jsonl", "csv", "tsv"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_SUFFIXES: Mapping[str, Kind] = {".txt": "txt", ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "tsv"}


@dataclass(frozen=True)
class PromptFile:
    """What a prompt file holds: its good lines, and the problems of the others, both in the order of the file."""

    lines: tuple[Line, ...]
    problems: tuple[Problem, ...]

    @property
    def bad_lines(self) -> tuple[int, ...]:
        """Numbers of the lines that have problems, each once."""
        return tuple(dict.fromkeys(problem.line for problem in self.problems))


def kind_of(name: str) -> Kind:
    """The kind of a prompt file by its suffix: .txt, .jsonl (or .ndjson), .csv, .tsv; upper case too.

    Raises:
        UsageError: another suffix, or none.
    """
    suffix = PurePath(name).suffix.lower()
    if suffix not in _SUFFIXES:
        raise UsageError(f"prompt file {PurePath(name).name!r} ends in {suffix!r}; use a file that ends in {', '.join(_SUFFIXES)}.")
    return _SUFFIXES[suffix]


def sniff(data: bytes) -> Kind:
    """The kind of prompts that come without a name, from their first line that is not blank.

    It is "jsonl" when that line begins like an object ({ and a quote, or {}), "tsv" or "csv" when its fields are names of options, `prompt` among
    them, and "txt" otherwise.
    """
    text = _decoded(data)
    start = re.search(r"\S", text)
    first = "" if start is None else text[start.start() : start.start() + 2000]
    if re.match(r'\{\s*["}]', first):
        return "jsonl"
    if _is_header(header_of(first, ",")):
        return "csv"
    return "tsv" if _is_header(header_of(first, "\t")) else "txt"


def read_prompts(data: bytes, kind: Kind, carry: Collection[str] = ()) -> PromptFile:
    """Read a prompt file.

    Args:
        data: the whole file: UTF-8 with or without a byte order mark, or UTF-16 with one; lines end in CRLF, LF or CR.
        kind: see `kind_of` and `sniff`.
        carry: keys of a .jsonl file that are no options and taken as they are, into `Line.carried`.

    Returns:
        All good lines and all problems. No content raises an error.
    """
    if data.startswith((BOM_UTF32_LE, BOM_UTF32_BE)):
        return PromptFile((), (Problem(1, 1, "the file is UTF-32; save it as UTF-8."),))
    text = _decoded(data)
    if kind == "txt":
        found = list(read_text_lines(text))
    elif kind == "jsonl":
        found = list(read_json_lines(text, carry))
    else:
        found = list(read_table(text, "," if kind == "csv" else "\t"))
    problems = sorted(item for item in found if isinstance(item, Problem))
    return PromptFile(tuple(item for item in found if isinstance(item, Line)), tuple(problems))


def _decoded(data: bytes) -> str:
    """The text; what cannot be decoded is left for `lines.unreadable`."""
    if data.startswith((BOM_UTF16_LE, BOM_UTF16_BE)):
        return data.decode("utf-16", "replace")
    return data.removeprefix(BOM_UTF8).decode("utf-8", "surrogateescape")


def _is_header(names: list[str]) -> bool:
    return "prompt" in names and all(name in BY_NAME for name in names)
