"""Prompt files as tests read them."""

from typing import Any

from tu_diffuse.batch.prompt_file import Kind, PromptFile, read_prompts


def read(text: str | bytes, kind: Kind) -> PromptFile:
    return read_prompts(text.encode() if isinstance(text, str) else text, kind)


def values(text: str | bytes, kind: Kind) -> list[dict[str, Any]]:
    file = read(text, kind)
    assert file.problems == ()
    return [dict(line.values) for line in file.lines]


def the_problem(text: str | bytes, kind: Kind) -> tuple[int, int, str]:
    file = read(text, kind)
    assert len(file.problems) == 1, file.problems
    (problem,) = file.problems
    return problem.line, problem.column, problem.message
