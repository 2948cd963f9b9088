"""What every format of prompt files shares: a record's cells become a good line, or every problem that they have."""

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import UsageError
from ..pipeline.limits import MAX_SEED
from .options import BY_NAME, Option

NEWLINE = re.compile(r"\r\n|\r|\n")
_UNREADABLE = re.compile("[\udc80-\udcff\ufffd]")


@dataclass(frozen=True)
class Line:
    """A good line.

    Attributes:
        number: of the line in the file, from 1; of the first of them where a CSV record has several.
        values: checked values by option name, only those that were given; `options.from_text` says of which types.
        columns: where each value begins, in characters from 1, counted from the beginning of the line or CSV record.
        carried: keys that are no options, which the layout of the folder takes as they are.
    """

    number: int
    values: Mapping[str, Any]
    columns: Mapping[str, int]
    carried: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, order=True)
class Problem:
    """What is wrong, and where: line and column from 1, as in `Line`; the message is one sentence without them."""

    line: int
    column: int
    message: str


@dataclass(frozen=True)
class Cell:
    """One value as it stands in the file.

    Attributes:
        name: of the option, or what stands in its place.
        spelled: the name as a message shows it.
        value: text, or decoded JSON.
        name_at: column of the name.
        value_at: column of the value.
    """

    name: str
    spelled: str
    value: Any
    name_at: int
    value_at: int


def numbered_lines(text: str) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, with their numbers from 1."""
    return ((number, line) for number, line in enumerate(NEWLINE.split(text), 1) if line and not line.isspace())


def unreadable(number: int, text: str) -> Problem | None:
    """The first place of a line that could not be decoded: a byte, as `surrogateescape` leaves it, or U+FFFD, which other decoders leave."""
    found = _UNREADABLE.search(text)
    if found is None:
        return None
    if found[0] == "\ufffd":
        message = "U+FFFD stands here for a character that could not be read; write it again and save the file as UTF-8."
    else:
        message = f"the byte 0x{ord(found[0]) - 0xDC00:02X} is not valid UTF-8; save the file as UTF-8."
    return Problem(number, found.start() + 1, message)


def checked_line(number: int, cells: Iterable[Cell], convert: Callable[[Option, Any], Any], carry: Collection[str] = ()) -> Iterator[Line | Problem]:
    """The line that the cells make, or else every problem that they have.

    Args:
        number: of the line.
        cells: in the order of the file.
        convert: `options.from_text` or `options.from_json`.
        carry: names that are no options and taken as they are.
    """
    values: dict[str, Any] = {}
    carried: dict[str, Any] = {}
    columns: dict[str, int] = {}
    problems: list[Problem] = []
    for cell in cells:
        if cell.name in carry and cell.name not in carried:
            carried[cell.name] = cell.value
        elif cell.name not in BY_NAME and cell.name not in carry:
            problems.append(Problem(number, cell.name_at, unknown(cell.spelled, cell.name)))
        elif cell.name in columns or cell.name in carried:
            problems.append(Problem(number, cell.name_at, f"{cell.spelled} comes a second time; give it once."))
        else:
            columns[cell.name] = cell.value_at
            try:
                values[cell.name] = convert(BY_NAME[cell.name], cell.value)
            except UsageError as error:
                problems.append(Problem(number, cell.value_at, str(error)))
    if "prompt" not in columns:
        problems.append(Problem(number, 1, "the line has no prompt; say what the picture should show."))
    if "seeds" in values:
        rivals = [name for name in ("seed", "count") if name in values]
        problems += [Problem(number, columns[name], f"{name} and seeds contradict each other; leave one of them out.") for name in rivals]
    elif "seed" in values and values["seed"] + values.get("count", 1) - 1 > MAX_SEED:
        message = f"count {values['count']} from seed {values['seed']} on passes the last seed, {MAX_SEED}; start lower or ask for fewer."
        problems.append(Problem(number, columns["count"], message))
    if problems:
        yield from problems
    else:
        yield Line(number, values, columns, carried)


def unknown(spelled: str, name: str) -> str:
    """What to say of a name that no option has."""
    close = difflib.get_close_matches(name, BY_NAME, 1) if len(name) < 40 else []
    return f"{spelled} is not known; " + (f"did you mean {close[0]}?" if close else f"use one of {', '.join(BY_NAME)}.")
