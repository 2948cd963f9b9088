"""CSV and TSV (RFC 4180). The csv package tells neither columns nor where a broken record should be left."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from .lines import NEWLINE, Cell, Line, Problem, checked_line, unknown, unreadable
from .options import BY_NAME, from_text, shown

_QUOTED = re.compile(r'"((?:[^"]++|"")*+)"')
_UNQUOTED = {",": re.compile(r"[^,\r\n]*"), "\t": re.compile(r"[^\t\r\n]*")}


@dataclass(frozen=True)
class _Row:
    """One record: its fields with their columns, where it ends, and what is wrong with its quotes."""

    fields: list[tuple[str, int]]
    end: int
    problem: tuple[int, str] | None


def header_of(text: str, separator: str) -> list[str]:
    """The names of the columns if the text is a table, spelled as options are."""
    return [_header_name(field) for field, _ in _row(text, 0, separator).fields]


def _header_name(field: str) -> str:
    return field.strip().replace("-", "_")


def read_table(text: str, separator: str) -> Iterator[Line | Problem]:
    """Read a table.

    The header names options; if it does not, or names one twice, no line is read. A field may be quoted, and then hold separators,
    newlines and doubled quotes. Empty fields are not given, rows of empty fields are skipped. A record with broken quotes ends with its first line.
    """
    header: list[str] | None = None
    start, number = 0, 1
    while start < len(text):
        row = _row(text, start, separator)
        problem = unreadable(number, text[start : row.end])
        if problem is None and row.problem is not None:
            problem = Problem(number, *row.problem)
        if problem is not None or any(field.strip() for field, _ in row.fields):
            if header is None:
                problems = list(_header_problems(number, row)) if problem is None else [problem]
                yield from problems
                if problems:
                    return
                header = [_header_name(name) for name, _ in row.fields]
            elif problem is not None:
                yield problem
            else:
                yield from _table_line(number, header, row)
        number += len(NEWLINE.findall(text, start, row.end))
        start = row.end
    if header is None:
        yield Problem(1, 1, "the file has no header; its first line names the columns, prompt among them.")


def _header_problems(number: int, row: _Row) -> Iterator[Problem]:
    seen: set[str] = set()
    for field, at in row.fields:
        name = _header_name(field)
        if name not in BY_NAME:
            yield Problem(number, at, f"{unknown(f'the column {shown(field)}', name)} Without a right header no line is read.")
        elif name in seen:
            yield Problem(number, at, f"the column {name} comes a second time; without a right header no line is read.")
        seen.add(name)
    if "prompt" not in seen:
        yield Problem(number, 1, "the header has no column prompt; without it no line is read.")


def _table_line(number: int, header: list[str], row: _Row) -> Iterator[Line | Problem]:
    if len(row.fields) != len(header):
        at = row.fields[min(len(header), len(row.fields) - 1)][1]
        yield Problem(
            number, at, f"the line has {len(row.fields)} fields and the header {len(header)}; give as many, and quote fields with separators."
        )
        return
    cells = [Cell(name, name, text, at, at) for name, (text, at) in zip(header, row.fields, strict=True) if text.strip()]
    yield from checked_line(number, cells, from_text)


def _row(text: str, start: int, separator: str) -> _Row:
    """The record that begins at `start`. One with broken quotes ends with its first line, so that the lines after it are read."""
    fields: list[tuple[str, int]] = []
    at = start
    while True:
        column = at - start + 1
        if text.startswith('"', at):
            found = _QUOTED.match(text, at)
            if found is None:
                return _broken_row(text, start, fields, column, "a quoted field begins here and never ends; close it with a double quote.")
            at = found.end()
            if at < len(text) and text[at] not in (separator, "\r", "\n"):
                message = "the quoted field that begins here goes on after its closing quote; double the quotes that are part of the text."
                return _broken_row(text, start, fields, column, message)
            fields.append((found[1].replace('""', '"'), column))
        else:
            found = _UNQUOTED[separator].match(text, at)
            field = "" if found is None else found[0]
            at += len(field)
            if field.lstrip().startswith('"'):
                return _broken_row(text, start, fields, column, "a space stands before the opening quote of this field; remove it.")
            fields.append((field, column))
        if not text.startswith(separator, at):
            newline = NEWLINE.match(text, at)
            return _Row(fields, at if newline is None else newline.end(), None)
        at += 1


def _broken_row(text: str, start: int, fields: list[tuple[str, int]], column: int, message: str) -> _Row:
    newline = NEWLINE.search(text, start)
    return _Row(fields, len(text) if newline is None else newline.end(), (column, message))
