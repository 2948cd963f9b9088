"""Text: a prompt a line, flags after it, short ones as in kohya's sd-scripts (docs/gen_img_README.md there)."""

import re
from collections.abc import Iterator

from .lines import Cell, Line, Problem, checked_line, numbered_lines, unreadable
from .options import BY_NAME, OPTIONS, from_text, shown

_FLAG = re.compile(r"(?<!\S)--(?=[A-Za-z])(\S+)")
_BACKSLASH = re.compile(r"(?<!\S)\\(?=\\*--)|^\\(?=\\*#)")
_FLAGS = {flag: option.name for option in reversed(OPTIONS) for flag in (option.name, *option.flags)}


def read_text_lines(text: str) -> Iterator[Line | Problem]:
    """Read a text file.

    Blank lines and lines that begin with # are skipped. A word that begins with -- and a letter is a flag; its value goes on to the next flag. One
    backslash is taken off the beginning of a word that goes on with --, and off that of a value that goes on with #.
    """
    for number, line in numbered_lines(text):
        if line.lstrip().startswith("#"):
            continue
        problem = unreadable(number, line)
        if problem is not None:
            yield problem
        else:
            yield from checked_line(number, _cells(line), from_text)


def _cells(line: str) -> Iterator[Cell]:
    flags = list(_FLAG.finditer(line))
    prompt_end, *ends = [*(flag.start() for flag in flags), len(line)]
    prompt = line[:prompt_end]
    if prompt.strip():
        at = len(prompt) - len(prompt.lstrip()) + 1
        yield Cell("prompt", "the prompt", _BACKSLASH.sub("", prompt.strip()), at, at)
    for flag, end in zip(flags, ends, strict=True):
        raw = line[flag.end() : end]
        value = _BACKSLASH.sub("", raw.strip())
        name = flag[1].lower().replace("-", "_") if len(flag[1]) < 40 else flag[1]
        name = "seeds" if name == "d" and "," in value else _FLAGS.get(name, name)
        at = flag.end() + len(raw) - len(raw.lstrip()) if value else flag.start()
        if not value and name in BY_NAME and BY_NAME[name].kind == "flag":
            value = "true"
        yield Cell(name, f"--{shown(flag[1])[1:-1]}", value, flag.start() + 1, at + 1)
