"""GenEval's folder of pictures (Ghosh et al. 2023, arXiv 2310.11513), so that its evaluate_images.py judges what was drawn.

    00000/metadata.jsonl      the prompt's line of evaluation_metadata.jsonl; folders are numbered by line, from 0
    00000/samples/00000.png   its pictures

The evaluator counts every samples/<digits>.png of every folder that is named by digits, so nothing else may lie there.
"""

import json
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import DataError, OutputError, UsageError
from ..pipeline.metadata import read_metadata
from .files import replace as write_whole
from .journal import Entry
from .lines import Line, Problem
from .plan import Plan
from .prompt_file import PromptFile

KEYS = ("tag", "include", "exclude")
"""What a line says to the evaluator; the rest of it is options of ours."""

_SAMPLE = re.compile(r"\d+/samples/\d+\.png")


def judged(file: PromptFile) -> PromptFile:
    """The file with a problem for each line that the evaluator could not use: one without a tag, or with another name or format of its pictures."""
    problems = [problem for line in file.lines for problem in _unusable(line)]
    bad = {problem.line for problem in problems}
    return replace(file, lines=tuple(line for line in file.lines if line.number not in bad), problems=tuple(sorted((*file.problems, *problems))))


def _unusable(line: Line) -> Iterable[Problem]:
    if "tag" not in line.carried:
        yield Problem(line.number, 1, "the line has no tag, which GenEval sorts its scores by; take lines of its evaluation_metadata.jsonl.")
    for name in ("name", "format"):
        if name in line.values:
            yield Problem(line.number, line.columns[name], f"{name} is fixed by --layout geneval; leave it out.")


def name_of(line: Line, place: int) -> str:
    """The name, without suffix, of a line's picture number `place`, from 0."""
    return f"{_folder(line)}/samples/{place:05d}"


def prepare(lines: Iterable[Line], plan: Plan, done: Mapping[str, Entry], out: Path) -> None:
    """Make the folders of all pictures that are asked for, each with its line.

    Args:
        lines: of the prompt file.
        plan: what is asked for, named by `name_of`.
        done: of it, from `run.settle`.
        out: the folder.

    Raises:
        UsageError: the folder holds what the evaluator would count beside them: another prompt, or a picture of other settings.
        OutputError: it cannot be written.
    """
    wanted = {planned.name: planned.item for planned in plan.wanted}
    drawn = {entry.file for entry in done.values()}
    for path in out.glob("*/samples/*.png"):
        name = path.relative_to(out).as_posix()
        if _SAMPLE.fullmatch(name) and name not in drawn and not (name in wanted and _carries(path, wanted[name].key)):
            raise UsageError(f"{name} was drawn otherwise than is asked for now, and GenEval would count it; give another --out, or remove it.")
    for name in wanted:
        if not _SAMPLE.fullmatch(name):
            raise UsageError(f"{PurePosixPath(name).parent} was planned with other settings; give another --out.")
    asked = {item.line for item in wanted.values()}
    for line in lines:
        if line.number in asked:
            _make_folder(out / _folder(line), {**line.carried, "prompt": line.values["prompt"]})


def _folder(line: Line) -> str:
    return f"{line.number - 1:05d}"


def _carries(picture: Path, key: str) -> bool:
    with suppress(DataError):
        return read_metadata(picture).get("item") == key
    return False


def _make_folder(folder: Path, metadata: Mapping[str, Any]) -> None:
    path = folder / "metadata.jsonl"
    try:
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        there = path.read_bytes() if path.exists() else None
    except OSError as error:
        raise OutputError(f"folder {folder.name!r} cannot be used ({error.strerror}); give another --out.") from None
    line = (json.dumps(metadata) + "\n").encode()
    if there is None:
        write_whole(line, path)
    elif there != line:
        raise UsageError(f"{folder.name}/metadata.jsonl is of another prompt; give another --out.")
