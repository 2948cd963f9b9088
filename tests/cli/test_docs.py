"""The commands that README and docs show are commands of the program, option by option."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from tu_diffuse.cli.main import app

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def shown(text: str) -> list[list[str]]:
    """The command lines of a page's indented blocks, without comments."""
    lines = re.findall(r"^ {4}(?:accelerate launch .*-m tu_diffuse|tu-diffuse) (.*)", text.replace("\\\n", " "), re.MULTILINE)
    return [shlex.split(re.split(r"\s{2,}#", line)[0]) for line in lines]


def parse(command: Any, words: list[str]) -> None:
    """Follow groups to a command and read its options.

    Raises:
        Exception: typer's, for a command or an option that is not there.
    """
    context = command.context_class(command, info_name="tu-diffuse")
    if hasattr(command, "commands"):
        values, rest, _ = command.make_parser(context).parse_args(list(words))
        assert rest or "version" in values, words
        if rest:
            _, inner, left = command.resolve_command(context, rest)
            parse(inner, left)
        return
    values, rest, _ = command.make_parser(context).parse_args(list(words))
    assert not rest, f"{rest} is left over of {words}"
    absent = [one.name for one in command.params if one.required and values.get(one.name) is None]
    assert not absent, f"{absent} is missing in {words}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_that_is_shown_is_one(page: Path) -> None:
    command = typer.main.get_command(app)
    for words in shown(page.read_text()):
        parse(command, words)


def test_the_pages_show_commands_and_a_wrong_one_is_found() -> None:
    assert sum(len(shown(page.read_text())) for page in PAGES) > 50
    command = typer.main.get_command(app)
    for wrong, says in {
        "generate x --colour red": "No such option: --colour",
        "fly": "No such command 'fly'",
        "experts fork": "'out'] is missing",
        "generate x --model": "requires an argument",
    }.items():
        with pytest.raises(Exception, match=re.escape(says)):
            parse(command, shlex.split(wrong))
