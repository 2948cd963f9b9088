"""JSON Lines: an object a line. The object is taken apart here and its values by the json package, so that each has its column."""

import json
import math
import re
from collections.abc import Collection, Iterator
from typing import Any

from .lines import Cell, Line, Problem, checked_line, numbered_lines, unreadable
from .options import BY_NAME, from_json, shown

_SPACE = re.compile(r"[ \t]*")


def _json_int(digits: str) -> float:
    return int(digits) if len(digits) < 400 else math.inf  # Python refuses to read thousands of digits


_JSON = json.JSONDecoder(parse_int=_json_int)


class _NotJsonError(Exception):
    """What is wrong with the text of a line, at an offset."""

    def __init__(self, at: int, message: str) -> None:
        super().__init__(message)
        self.at = at


def read_json_lines(text: str, carry: Collection[str] = ()) -> Iterator[Line | Problem]:
    """Read a .jsonl file; blank lines are skipped, keys in `carry` are taken as they are."""
    for number, line in numbered_lines(text):
        problem = unreadable(number, line)
        if problem is not None:
            yield problem
            continue
        try:
            cells = _json_cells(line)
        except _NotJsonError as error:
            yield Problem(number, error.at + 1, str(error))
        else:
            yield from checked_line(number, cells, from_json, carry)


def _json_cells(line: str) -> list[Cell]:
    """The pairs of the object, those that are null left out.

    Raises:
        _NotJsonError: the line is no JSON object.
    """
    cells: list[Cell] = []
    at = _after_space(line, 0)
    if line[at] != "{":
        raise _NotJsonError(at, 'the line is not a JSON object; write it like {"prompt": "a red apple", "seed": 7}.')
    at = _after_space(line, at + 1)
    if line[at : at + 1] != "}":
        while True:
            if line[at : at + 1] != '"':
                raise _NotJsonError(at, 'the line is not valid JSON: wanted a key in double quotes here, as in {"prompt": "a red apple"}.')
            key_at = at
            key, at = _json_value(line, at)
            at = _after_space(line, at)
            if line[at : at + 1] != ":":
                raise _NotJsonError(at, "the line is not valid JSON: wanted a colon after the key here.")
            value_at = _after_space(line, at + 1)
            value, at = _json_value(line, value_at)
            if value is not None or key not in BY_NAME:
                cells.append(Cell(key, shown(key), value, key_at + 1, value_at + 1))
            at = _after_space(line, at)
            if line[at : at + 1] == "}":
                break
            if line[at : at + 1] != ",":
                raise _NotJsonError(at, "the line is not valid JSON: wanted a comma or the closing brace here.")
            at = _after_space(line, at + 1)
    at = _after_space(line, at + 1)
    if at < len(line):
        raise _NotJsonError(at, "more follows the object; write one object a line.")
    return cells


def _json_value(line: str, at: int) -> tuple[Any, int]:
    try:
        return _JSON.raw_decode(line, at)
    except json.JSONDecodeError as error:
        raise _NotJsonError(error.pos, f"the line is not valid JSON: {error.msg[:1].lower()}{error.msg[1:]}.") from None
    except RecursionError:
        raise _NotJsonError(at, "the value is nested too deeply; give text, a number, true, false or a list of numbers.") from None


def _after_space(line: str, at: int) -> int:
    found = _SPACE.match(line, at)
    return at if found is None else found.end()
